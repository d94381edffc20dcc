"""One extracted store for all tests of stage 2."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.pipelines.tiny import make_extracted


@pytest.fixture(scope="session")
def extracted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Path of an experiment file whose store is complete."""
    return make_extracted(tmp_path_factory.mktemp("extracted"))
