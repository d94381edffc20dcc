"""A student whose weights are split over ranks is read, injected into, evaluated and loaded.

accelerate shards on accelerators only, so this is torch's own FSDP2 around the same parts.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from kvdistill.distill.train.checkpoint import gathered, load_state
from kvdistill.errors import StudentError

ROOT = Path(__file__).parents[3]


def test_two_ranks_that_share_a_student_compute_what_one_does() -> None:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [sys.executable, *launcher, str(Path(__file__).with_name("sharded_worker.py"))],
        capture_output=True, text=True, check=False, cwd=ROOT, timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]


def test_a_plain_model_needs_no_gathering_and_refuses_strange_weights() -> None:
    model = nn.Linear(2, 2)
    with gathered(model):
        load_state(model, {"bias": torch.ones(2)})
    assert model.bias.tolist() == [1, 1]
    with pytest.raises(StudentError, match="other"):
        load_state(model, {"other": torch.ones(2)})
