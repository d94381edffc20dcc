"""What a run says of how it was made."""

from __future__ import annotations

from pathlib import Path

import pytest

import kvdistill
from kvdistill.provenance import command

PACKAGE = Path(kvdistill.__file__).parent


@pytest.mark.parametrize(
    ("arguments", "typed"),
    [
        (["/opt/env/bin/kvdistill", "train", "a.yaml"], "kvdistill train a.yaml"),
        (["train.py", "--seed", "1"], "train.py --seed 1"),
        ([f"{PACKAGE}/slurm/worker.py"], "python -m kvdistill.slurm.worker"),
        ([f"{PACKAGE}/cli.py", "run", "my file"], "python -m kvdistill.cli run 'my file'"),
    ],
)
def test_a_command_reads_as_it_would_be_typed(arguments: list[str], typed: str) -> None:
    assert command(arguments) == typed
