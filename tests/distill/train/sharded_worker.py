"""One of two ranks that share a student by FSDP2, on CPU (gloo): torchrun … sharded_worker.py."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from kvdistill.attention.geometry import HeadShape
from kvdistill.attention.kv_capture import KVCapture
from kvdistill.distill.student.injection import InjectionGate, injecting
from kvdistill.distill.targets import unmeasured
from kvdistill.distill.train.checkpoint import gathered, load_state
from tests.distill.student.test_checkpointing import IDS, build


class Holder(nn.Module):
    """What a distiller does with its student: read its KV, then inject into a second pass."""

    def __init__(self, student: Any) -> None:
        super().__init__()
        self.student, self.gate = student, InjectionGate(2)
        self.capture = KVCapture(student)
        self.standardise = unmeasured(2, HeadShape(2, 4))  # buffers, which are loaded too

    def forward(self, given: Tensor) -> Tensor:
        mask = (torch.arange(9) < 4).expand(2, 2, 9)
        with self.capture() as found:
            plain = self.student(input_ids=IDS, labels=IDS, use_cache=False).loss
        kv = sum(key.square().mean() + value.pow(3).mean() for _, key, value in found)
        with injecting(self.capture, given, given, mask, self.gate):
            injected = self.student(input_ids=IDS, labels=IDS, use_cache=False).loss
        loss: Tensor = plain + kv + 3 * injected
        return loss


def sharded(holder: Holder) -> Holder:
    mesh = init_device_mesh("cpu", (2,))
    for layer in holder.student.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(holder, mesh=mesh)
    return holder


def whole(x: Tensor) -> Tensor:
    return x.full_tensor() if isinstance(x, DTensor) else x


def main() -> None:
    torch.distributed.init_process_group("gloo")
    torch.manual_seed(3)
    given = torch.randn(2, 2, 2, 9, 8)
    plain = Holder(build("llama"))
    shared = sharded(Holder(build("llama")))
    assert any(isinstance(p, DTensor) for p in shared.parameters()), "nothing was sharded"
    wanted, got = plain(given), shared(given)
    torch.testing.assert_close(got, wanted, atol=1e-6, rtol=1e-6)
    wanted.backward()
    got.backward()
    for (name, one), other in zip(plain.named_parameters(), shared.parameters(), strict=True):
        torch.testing.assert_close(whole(other.grad), one.grad, atol=1e-6, rtol=1e-5, msg=name)

    with torch.no_grad(), gathered(shared):
        logits = shared.student(input_ids=IDS, use_cache=False).logits
    reference = plain.student(input_ids=IDS, use_cache=False).logits
    torch.testing.assert_close(logits, reference, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(shared(given), plain(given), atol=1e-6, rtol=1e-6)

    options = StateDictOptions(full_state_dict=True)
    state = get_model_state_dict(shared, options=options)
    moved = {name: value + 1 for name, value in state.items()}
    load_state(shared, moved)
    again = get_model_state_dict(shared, options=options)
    assert again.keys() == plain.state_dict().keys()
    assert all(torch.equal(again[name], moved[name]) for name in moved)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
