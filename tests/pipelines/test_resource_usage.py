"""Resource usage of a run, although many runs may share a process."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch

from kvdistill.pipelines.train import reset_peak_memory, resource_usage, weights_hash

SIZE = 200_000_000


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux can reset the peak")
def test_a_peak_is_measured_and_reset() -> None:
    reset_peak_memory()
    before = resource_usage()["peak_memory_bytes"]
    held = np.ones(SIZE, np.uint8)
    during = resource_usage()["peak_memory_bytes"]
    assert during > before + 0.9 * SIZE
    del held
    assert resource_usage()["peak_memory_bytes"] >= 0.9 * during  # a peak, not what is held now
    reset_peak_memory()
    assert resource_usage()["peak_memory_bytes"] < during - 0.8 * SIZE


def test_weights_hash_tells_students_apart_by_any_number_or_shape() -> None:
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2)
    same = torch.nn.Linear(3, 2)
    same.load_state_dict(model.state_dict())
    assert weights_hash(model) == weights_hash(same)
    with torch.no_grad():
        same.bias[1] += 1e-6
    assert weights_hash(model) != weights_hash(same)
    turned = torch.nn.Linear(2, 3)
    turned.weight.data = model.weight.data.reshape(3, 2)
    assert weights_hash(model) != weights_hash(turned)
