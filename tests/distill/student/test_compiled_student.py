"""A compiled student computes what the plain one does: values, captured KV, gradients."""

from __future__ import annotations

import pytest
import torch

from kvdistill.attention.kv_capture import KVCapture
from tests.distill.student.test_checkpointing import build, step


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text", "gpt2"])
def test_values_and_gradients_are_the_same(model_type: str) -> None:
    plain, compiled = build(model_type).eval(), build(model_type).eval()
    wanted = step(plain, KVCapture(plain))
    capture = KVCapture(compiled)
    capture.compile_layers(backend="aot_eager")
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    got = step(compiled, capture)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > graphs, "nothing was compiled"
    for name, value in wanted.items():
        torch.testing.assert_close(got[name], value, atol=1e-5, rtol=1e-5, msg=name)
    assert compiled.state_dict().keys() == plain.state_dict().keys()
