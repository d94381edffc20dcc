"""Exit code 75 at any moment of a command, not only where it has work to save."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kvdistill.config.load import dump_experiment
from tests.pipelines.tiny import variant


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_the_command_exits_75_from_its_first_import_on(
    extracted: Path, tmp_path: Path, number: signal.Signals
) -> None:
    """Before training installs any handler: while torch is imported."""
    config = tmp_path / "config.yaml"
    config.write_text(dump_experiment(variant(extracted, tmp_path / "runs")))
    command = [sys.executable, "-m", "kvdistill.cli", "train", str(config)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    maps = Path(f"/proc/{process.pid}/maps")
    while process.poll() is None and "libtorch" not in maps.read_text():
        time.sleep(0.01)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 75, errors
    assert "run the same command again" in errors
