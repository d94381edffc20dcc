"""What killed workers leave in a complete store is removed; what living ones hold is not."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kvdistill.config.experiment import Experiment
from kvdistill.pipelines.extract import extract
from kvdistill.pipelines.extract_tasks import extract_pool, extraction_ledger
from kvdistill.slurm.heartbeat import new_attempt
from kvdistill.store import commit
from kvdistill.store.format import StorePaths
from kvdistill.store.reader import KVStore
from tests.pipelines.tiny import variant

NOBODY = 2**22 + 1
"""No process has this pid: Linux gives at most 2 ** 22."""


def staged(stem: str, pid: int) -> str:
    return commit.staged_name(stem).replace(f"-{os.getpid()}.", f"-{pid}.")


def leave(store: Path, experiment: Experiment, pid: int) -> list[Path]:
    """Every kind of file that a worker holds while it works, as if process ``pid`` had done so."""
    paths, ledger = StorePaths(store), extraction_ledger(experiment, "llama")
    me = new_attempt(0, 1, ledger, {})
    me = replace(me, attempt_id=f"of-{pid}", pid=pid)
    ledger.write_attempt(me)
    assert ledger.claim(f"{pid}", me.attempt_id)
    folders = [
        paths.temporary("llama") / staged("00000", pid),
        store / "tmp" / staged("llama", pid),
    ]
    folders.append(store.parent / staged(".store", pid))
    files = [
        paths.teacher("llama") / f"{staged('.prototypes.safetensors', pid)}.tmp",
        ledger.folder / "claims" / staged(".00000.json", pid),
        ledger.folder / "attempts" / staged(".x.json", pid),
        ledger.folder / "failures" / "00000" / staged(".x.json", pid),
    ]
    for folder in folders:
        folder.mkdir(parents=True)
        (folder / "part").write_text("x")
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("{")
    return [*folders, *files, ledger.folder / "claims" / f"{pid}.json"]


@pytest.mark.parametrize("how", ["in this process", "in a pool"])
def test_debris_of_killed_workers_is_removed_once_a_teacher_is_complete(
    extracted: Path, tmp_path: Path, how: str
) -> None:
    store = tmp_path / "store"
    shutil.copytree(extracted.parent / "store", store)
    experiment = variant(extracted, tmp_path / "runs", store=str(store))
    gone, alive = leave(store, experiment, NOBODY), leave(store, experiment, os.getpid())
    if how == "in a pool":
        extract_pool(experiment, "llama", 1, lambda done, total: None)
    else:
        extract(experiment, ["llama"])
    assert [path for path in gone if path.exists()] == []
    assert [path for path in alive if not path.exists()] == []


def test_nothing_is_removed_while_shards_are_missing(extracted: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    shutil.copytree(extracted.parent / "store", store)
    experiment = variant(extracted, tmp_path / "runs", store=str(store))
    shutil.rmtree(StorePaths(store).shard("llama", KVStore.open(store).shard_ids[0]))
    gone = leave(store, experiment, NOBODY)
    from kvdistill.pipelines.extract_tasks import clear_debris

    clear_debris(KVStore.open(store), experiment, "llama")
    assert all(path.exists() for path in gone)


def test_what_another_machine_staged_is_kept_for_a_day(tmp_path: Path) -> None:
    fresh, old = tmp_path / "a.00000000-1.0123456789ab", tmp_path / "b.00000000-1.0123456789ab"
    earlier = tmp_path / "c.0123456789ab"  # of a version that did not name its process
    for folder in (fresh, old, earlier):
        folder.mkdir()
        (folder / "part").write_text("x")
    for path in (old, old / "part", earlier, earlier / "part"):
        os.utime(path, (1.0, 1.0))
    (tmp_path / "notes.txt").write_text("mine")
    commit.sweep(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [fresh.name, "notes.txt"]


def test_a_write_that_is_interrupted_leaves_no_staged_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(commit, "flush", interrupt)
    with pytest.raises(KeyboardInterrupt):
        commit.replace_file(tmp_path / "x.json", "{}")
    assert not [*tmp_path.iterdir()]
