"""Fixtures that every part of the tests may use."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="session")
def real_models() -> Path:
    """Folder with ``smollm2``, ``minilm`` and ``gemma3``: what `make models` fetches."""
    folder = Path(os.environ.get("KVDISTILL_MODELS", ROOT / "models"))
    absent = [
        name
        for name in ("smollm2", "minilm", "gemma3")
        if not (folder / name / "config.json").is_file()
    ]
    if absent:
        pytest.fail(f"{folder} has no {absent}; run `make models`, or set KVDISTILL_MODELS")
    return folder
