"""One transfer per batch to the device, bit for bit, and one read of it per step."""

from __future__ import annotations

import threading
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM, TrainerCallback

from kvdistill.corpus.readers import load_corpus
from kvdistill.distill.train.devices import (
    OpaqueMapping,
    Staging,
    keep_precision,
    known_padding,
    to_device,
)
from kvdistill.errors import ConfigError
from kvdistill.pipelines.run_folder import begin
from kvdistill.pipelines.train import build_trainer
from kvdistill.store.reader import KVStore
from tests.pipelines.tiny import variant

GPU = torch.device("cuda")
CPU = torch.device("cpu")
READS = {"item", "tolist", "__float__", "__int__", "__bool__", "__index__", "numpy", "cpu"}
SYNCHRONISING = {
    "_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero",
    "_unique2", "unique_dim", "unique_consecutive", "repeat_interleave",
}  # fmt: skip
"""Operators that make the host wait for a GPU: their result, or its size, is needed there."""


def pageable(num_bytes: int) -> Tensor:
    return torch.empty(num_bytes, dtype=torch.uint8)


class Calls(TorchFunctionMode):
    """Counts transfers and reads of the thread that enters it."""

    def __init__(self) -> None:
        self.found: Counter[str] = Counter()
        self.reading = False

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        name = getattr(function, "__name__", "")
        if name == "to" and (kwargs or {}).get("non_blocking"):
            self.found["transfer"] += 1
        if name not in READS:
            return function(*args, **(kwargs or {}))
        self.found["read"] += 1
        self.reading = True
        try:
            return function(*args, **(kwargs or {}))
        finally:
            self.reading = False


class Operators(TorchDispatchMode):
    """Counts synchronising operators that no call counted by ``Calls`` explains."""

    def __init__(self, calls: Calls) -> None:
        super().__init__()
        self.calls = calls

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        name = function.overloadpacket.__name__
        by_mask = name in ("index", "index_put_") and any(
            x is not None and x.dtype == torch.bool for x in args[1]
        )
        if not self.calls.reading and (name in SYNCHRONISING or by_mask):
            self.calls.found[name] += 1
        return function(*args, **(kwargs or {}))


def batch() -> dict[str, Any]:
    torch.manual_seed(0)
    return {
        "input_ids": torch.arange(6).view(2, 3),
        "attention_mask": torch.tensor([[1, 1, 1], [1, 1, 0]]),
        "text_mask": torch.tensor([[True, False, True]]),
        "task": torch.tensor(7),
        "empty": torch.zeros(0, 4),
        "sample_ids": ["a", "b"],
        "teachers": {
            "t": {
                "key": {"": {"": torch.arange(-4, 3, dtype=torch.int8),
                             "scale": torch.rand(3).half()}},
                "weight": torch.rand(2, 5),
            }
        },
    }  # fmt: skip


def count(given: dict[str, Any]) -> dict[str, Tensor]:
    return {"num_labels": given["input_ids"].sum()}


@pytest.mark.parametrize("device", [CPU, GPU], ids=["as it is", "staged"])
def test_a_batch_arrives_bit_for_bit(device: torch.device) -> None:
    there = to_device(Staging(count, device, allocate=pageable)(batch()), CPU)
    wanted = {**batch(), "counts": {"num_labels": torch.tensor(15)}, "padded": True}

    def same(one: Any, two: Any) -> None:
        if isinstance(two, Tensor):
            assert (one.dtype, one.shape) == (two.dtype, two.shape)
            assert torch.equal(one, two)
        elif isinstance(two, dict):
            assert one.keys() == two.keys()
            for name in two:
                same(one[name], two[name])
        else:
            assert one == two

    same({**there}, wanted)
    assert there.get("absent") is None
    assert "task" in there
    assert len(there) == len(wanted)


def test_a_staged_batch_is_one_asynchronous_copy_from_one_buffer() -> None:
    made: list[Tensor] = []

    def allocate(num_bytes: int) -> Tensor:
        made.append(pageable(num_bytes))
        return made[-1]

    staged = Staging(count, GPU, allocate=allocate)(batch())
    with Calls() as calls:
        there = to_device(staged, CPU)
    (buffer,) = made
    assert calls.found == {"transfer": 1}
    tensors = [there["input_ids"], there["counts"]["num_labels"], there["teachers"]["t"]["weight"]]
    assert {x.untyped_storage().data_ptr() for x in tensors} == {buffer.data_ptr()}
    assert all(x.data_ptr() % 64 == 0 for x in tensors)


class StepCounts(TrainerCallback):
    """What the training thread does in each step, without the optimizer, whose state is its own."""

    def __init__(self) -> None:
        self.calls = Calls()
        self.steps: list[dict[str, int]] = []
        self.modes: list[Any] = []

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        self.leave()

    def on_optimizer_step(self, *_: Any, **__: Any) -> None:
        self.enter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.steps.append(dict(self.calls.found))
        self.calls.found = Counter()

    def enter(self) -> None:
        self.modes = [Operators(self.calls), self.calls]
        for mode in self.modes:
            mode.__enter__()

    def leave(self) -> None:
        for mode in reversed(self.modes):
            mode.__exit__(None, None, None)


def test_a_step_makes_one_transfer_per_batch_and_one_read(extracted: Path, tmp_path: Path) -> None:
    experiment = variant(
        extracted, tmp_path, training__max_steps=3, training__gradient_accumulation_steps=2,
        training__diagnostic_steps=100, training__log_steps=100, training__save_steps=None,
        training__eval_steps=None,
    )  # fmt: skip
    trainer = build_trainer(
        experiment, KVStore.open(experiment.store), load_corpus(experiment.corpus),
        begin(experiment),
    )  # fmt: skip
    trainer.stream.stage = Staging(trainer.distiller.count, GPU, allocate=pageable)
    found = StepCounts()
    trainer.add_callback(found)
    found.enter()
    try:
        trainer.train()
    finally:
        found.leave()
    assert len(found.steps) == 3
    assert found.steps[1:] == [{"transfer": 2, "read": 1}] * 2  # the first measures the figures


@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3_text"])
def test_masks_are_the_same_where_padding_is_known_and_nothing_is_read(
    family: str, padded: bool
) -> None:
    torch.manual_seed(0)
    shape: dict[str, Any] = {
        "vocab_size": 50, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "pad_token_id": 0,
    }  # fmt: skip
    if family != "llama":
        shape["sliding_window"] = 3
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **shape)).eval()
    masks = [torch.ones(2, 7, dtype=torch.long), (torch.arange(14).view(2, 7) < 11).long()]
    given: dict[str, Any] = {"input_ids": torch.arange(14).view(2, 7), "use_cache": False}
    opposite = {**given, "attention_mask": masks[1 - padded]}
    given["attention_mask"] = masks[padded]
    wanted, other = model(**given).logits, []
    with known_padding(padded):
        with Calls() as calls:
            found = model(**given).logits
        # Of another thread, nothing is known: its batch is padded where this one is not.
        reader = threading.Thread(target=lambda: other.append(model(**opposite).logits))
        reader.start()
        reader.join()
    assert torch.equal(found, wanted)
    assert calls.found["read"] == 0
    with Calls() as calls:
        assert torch.equal(other[0], model(**opposite).logits)
    assert calls.found["read"] > 0 or family == "mistral"  # transformers' own way is restored


@pytest.fixture
def one_rank() -> Any:
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


class Reads(nn.Module):
    """Keeps what its forward gets."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.got: Any = None

    def forward(self, given: Any, counts: Any) -> Tensor:
        self.got = given, counts
        return self.linear(torch.ones(1, 4, dtype=self.linear.weight.dtype)).sum()


def test_fsdp_in_bfloat16_leaves_counts_scales_and_weights_as_they_are(one_rank: None) -> None:
    module: Any = Reads()
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    fully_shard(module, mp_policy=policy)
    there = to_device({**batch(), "counts": {}}, CPU)
    module(there, OpaqueMapping({"num_labels": torch.tensor(4100.0)}))
    given, counts = module.got
    assert float(counts["num_labels"]) == 4100.0  # bfloat16 has 4096
    teacher = given["teachers"]["t"]
    assert teacher["weight"].dtype == torch.float32
    assert teacher["key"][""]["scale"].dtype == torch.float16


class State:
    def __init__(self, **plugins: Any) -> None:
        vars(self).update(plugins)


class Plugin:
    def __init__(self, version: int) -> None:
        self.fsdp_version, self.mixed_precision_policy = version, None


def accelerator(precision: str = "bf16", **plugins: Any) -> Any:
    made: Any = State(state=State(**plugins), mixed_precision=precision)
    return made


def test_fsdp_does_not_lower_precision_where_autocast_does_not() -> None:
    plugin: Any = Plugin(2)
    plugin.mixed_precision_policy = MixedPrecisionPolicy(torch.bfloat16, torch.bfloat16)
    keep_precision(accelerator(fsdp_plugin=plugin))
    assert plugin.mixed_precision_policy == MixedPrecisionPolicy()


def test_wrappers_that_cast_everything_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"FSDP version 1 .* set fsdp_version: 2"):
        keep_precision(accelerator(fsdp_plugin=Plugin(1)))
    with pytest.raises(ConfigError, match=r"DeepSpeed in bf16 .* training\.precision to float32"):
        keep_precision(accelerator(deepspeed_plugin=State()))
    keep_precision(accelerator("no", deepspeed_plugin=State()))
