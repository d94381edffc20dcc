"""With activation checkpointing every value and gradient is what it was without."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from kvdistill.attention.kv_capture import KVCapture
from kvdistill.distill.student.injection import InjectionGate, injecting
from kvdistill.errors import StudentError
from tests.distill.student.test_injection import STUDENTS

IDS = torch.arange(18).reshape(2, 9)


def build(model_type: str) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **STUDENTS[model_type])
    return AutoModelForCausalLM.from_config(config).train()


def step(student: Any, capture: KVCapture, *, inside: bool = False) -> dict[str, Tensor]:
    """Losses on captured KV, on logits, and on an injected second pass, all in one backward."""
    torch.manual_seed(1)
    heads = capture.geometry.shapes["key"]
    given = [torch.randn(2, 2, heads.num_heads, 9, heads.head_dim)] * 2
    given = [x.requires_grad_() for x in given]
    gate, mask = InjectionGate(2), (torch.arange(9) < 4).expand(2, 2, 9)
    for parameter in student.parameters():
        parameter.grad = None
    torch.manual_seed(2)  # dropout of GPT-2
    outputs: list[Tensor] = []
    with capture(queries=True, outputs=outputs) as found:
        plain = student(input_ids=IDS, labels=IDS, use_cache=False).loss
        if inside:  # layers are computed again while capture listens
            plain.backward(retain_graph=True)
    kv = sum(q.square().mean() + 2 * k.square().mean() + v.pow(3).mean() for q, k, v in found)
    kv += sum(x.pow(3).mean() for x in outputs)
    with injecting(capture, *given, mask, gate):
        injected = student(input_ids=IDS, labels=IDS, use_cache=False).loss
        if inside:
            plain.backward(retain_graph=True)
            student.zero_grad()
    (plain + kv + 3 * injected).backward()
    grads = {name: p.grad for name, p in student.named_parameters()}
    return {
        "plain": plain, "kv": kv, "injected": injected, "gate": gate.logit_KL.grad,
        "given": given[0].grad, "num": torch.tensor(len(found)), **grads,
    }  # fmt: skip


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("model_type", STUDENTS)
def test_values_and_gradients_are_the_same(model_type: str, inside: bool) -> None:
    student = build(model_type)
    wanted = step(student, KVCapture(student), inside=False)
    capture = KVCapture(student)
    capture.checkpoint_activations()
    calls = []
    base = getattr(student, student.base_model_prefix)
    layer = base.get_submodule(capture.adapter.layers)[0]
    attention = layer.get_submodule(capture.adapter.attention)
    attention.register_forward_pre_hook(lambda *_: calls.append(1))
    got = step(student, capture, inside=inside)
    assert len(calls) >= 4, "no layer was computed again, so nothing was tested"
    for name, value in wanted.items():
        torch.testing.assert_close(got[name], value, atol=1e-6, rtol=1e-6, msg=name)


def test_hooks_that_are_gone_by_the_backward_pass_would_be_noticed() -> None:
    """The test above can fail: plain checkpointing forgets the injection."""
    student = build("llama")
    wanted = step(student, KVCapture(student))
    student.activation_checkpointing_enable({"use_reentrant": False})
    try:
        got = step(student, KVCapture(student))
    except torch.utils.checkpoint.CheckpointError:
        return  # torch noticed that other tensors were computed
    assert not torch.allclose(got["gate"], wanted["gate"], atol=1e-6)


def test_a_model_that_cannot_is_refused() -> None:
    student = build("llama")
    student.supports_gradient_checkpointing = False
    with pytest.raises(StudentError, match="gradient_checkpointing"):
        KVCapture(student).checkpoint_activations()
