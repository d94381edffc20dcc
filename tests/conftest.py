"""Fixtures that every part of the tests may use."""

from __future__ import annotations

import gc
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kvdistill.corpus.samples import Shard
from kvdistill.store.manifest import TeacherManifest
from kvdistill.store.reader import KVStore
from tests import preloaded
from tests.pipelines.tiny import make_extracted
from tests.store.made import (
    LENGTHS,
    TWO_GROUPS,
    Made,
    make_corpus,
    make_shard,
    make_store,
    make_teacher,
)

ROOT = Path(__file__).parents[1]
MEMORY_DISK = Path("/dev/shm")
SCRATCH_BYTES = 4 << 30


def pytest_configure(config: pytest.Config) -> None:
    """Keep scratch files in memory: every shard and checkpoint is flushed, which disks are slow at.

    `TMPDIR`, `--basetemp` and a memory disk that is small or absent leave pytest's own choice.
    """
    asked = config.option.basetemp or os.environ.get("TMPDIR")
    if asked or not MEMORY_DISK.is_dir():
        return
    if shutil.disk_usage(MEMORY_DISK).free >= SCRATCH_BYTES:
        os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(MEMORY_DISK))


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


def freeze_heap() -> None:
    """Leave what is imported by now out of all later collections.

    A training makes two full ones. Over the modules of torch and transformers they would cost more
    than the steps of a tiny run, and in a forked child they would copy every page.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module", autouse=True)
def frozen_heap() -> None:
    """``freeze_heap`` for what earlier modules have imported."""
    freeze_heap()


@pytest.fixture(scope="session")
def extracted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Path of an experiment file whose store is complete."""
    path = make_extracted(tmp_path_factory.mktemp("extracted"))
    freeze_heap()
    return path


@pytest.fixture(scope="session")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with `python` and `kvdistill` that need not import anything: see `preloaded`."""
    folder = tmp_path_factory.mktemp("programs")
    address = folder / "socket"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.preloaded", str(address)]
    with subprocess.Popen(command, cwd=ROOT, env=environment) as server:
        while not address.exists():
            assert server.poll() is None
            time.sleep(0.1)
        preloaded.write_program(folder / "kvdistill", str(address), "-m", "kvdistill.cli")
        preloaded.write_program(folder / "python", str(address))
        yield folder
        server.kill()


@pytest.fixture
def build() -> Any:
    """Builders of small teachers and shards without any model."""

    class Build:
        teacher: Callable[..., TeacherManifest] = staticmethod(make_teacher)
        shard: Callable[..., Made] = staticmethod(make_shard)
        corpus: Callable[..., list[Shard]] = staticmethod(make_corpus)
        store: Callable[..., tuple[KVStore, dict[str, Made]]] = staticmethod(make_store)
        two_groups = TWO_GROUPS
        lengths = LENGTHS

    return Build


@pytest.fixture(params=["zarr", "zarr without zarrs", "safetensors"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each store backend in turn, zarr with either of its readers."""
    if request.param == "zarr without zarrs":
        monkeypatch.setattr("kvdistill.store.backends.zarr._HAS_ZARRS", False)
    return str(request.param.partition(" ")[0])
