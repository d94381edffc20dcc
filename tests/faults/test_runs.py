"""One trainer per run, exit code 75 at any moment, logs without repetitions, no debris."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kvdistill.config.load import dump_experiment
from kvdistill.distill.train.devices import require_launcher
from kvdistill.distill.train.trainer import KVDistillTrainer
from kvdistill.errors import ConfigError, FolderInUse, Interrupted, ShardCorrupt
from kvdistill.pipelines import train as stage_2
from kvdistill.pipelines.run_folder import RunFolder, begin
from kvdistill.pipelines.train import train
from kvdistill.slurm.heartbeat import new_attempt
from kvdistill.slurm.lease import lease
from kvdistill.slurm.ledger import Ledger
from kvdistill.store import commit
from tests.pipelines.tiny import variant

PHASES = {
    "before the step loop": (stage_2, "build_trainer"),
    "in the last evaluation": (KVDistillTrainer, "_score"),
    "while the student is saved": (KVDistillTrainer, "save_whole"),
    "while the outcome is written": (stage_2, "_write_outcome"),
}
DEFAULT = ("before the step loop", "in the last evaluation")


@pytest.mark.parametrize(
    ("phase", "number"),
    [
        pytest.param(phase, number, marks=() if phase in DEFAULT else pytest.mark.slow)
        for phase, number in zip(PHASES, (signal.SIGTERM, signal.SIGUSR1) * 2, strict=True)
    ],
)
def test_a_signal_outside_the_step_loop_loses_nothing(
    extracted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, phase: str, number: int
) -> None:
    """Without periodic checkpoints too."""
    experiment = variant(extracted, tmp_path, training__save_steps=None, training__max_steps=3)
    before = signal.getsignal(number)
    with monkeypatch.context() as patched:
        patched.setattr(*PHASES[phase], lambda *_, **__: os.kill(os.getpid(), number))
        with pytest.raises(Interrupted, match="run the same command again"):
            train(experiment)
    assert signal.getsignal(number) == before
    steps: list[int] = []
    step = KVDistillTrainer.training_step
    monkeypatch.setattr(
        KVDistillTrainer, "training_step", lambda *a, **k: steps.append(1) or step(*a, **k)
    )
    report = train(experiment)
    assert RunFolder(report.folder).read_record()["steps"] == 3
    assert report.resumed == ("before" not in phase)


def running(tmp_path: Path, config: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "kvdistill.cli", "train", str(config)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)


def test_a_second_trainer_is_refused(extracted: Path, tmp_path: Path) -> None:
    experiment = variant(extracted, tmp_path)
    with lease(begin(experiment).path), pytest.raises(FolderInUse, match="wait for it") as found:
        train(experiment)
    assert str(os.getpid()) in str(found.value)
    assert len(str(found.value)) <= 500
    assert len(RunFolder(tmp_path / "tiny").read_record()["attempts"]) == 1


@pytest.mark.slow
def test_a_killed_trainer_is_followed_at_once(extracted: Path, tmp_path: Path) -> None:
    changes = {"training__max_steps": 100_000, "training__log_steps": 1}
    experiment = variant(extracted, tmp_path / "runs", **changes)
    (tmp_path / "config.yaml").write_text(dump_experiment(experiment))
    process = running(tmp_path, tmp_path / "config.yaml")
    folder = RunFolder(tmp_path / "runs" / "tiny")
    try:
        while process.poll() is None and not (folder.log.is_file() and folder.log.read_text()):
            time.sleep(0.05)
        with pytest.raises(
            FolderInUse, match=rf"process {process.pid} on .*; wait for it"
        ) as found:
            train(experiment)
        assert len(str(found.value)) <= 500
        assert len(folder.read_record()["attempts"]) == 1
    finally:
        process.kill()
        process.communicate()
    with lease(folder.path) as require:
        require()
    assert not [path for path in (folder.path / ".lease").rglob("*") if path.is_file()]


def test_a_crashed_holder_of_a_lease_is_followed_by_one_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger = Ledger(tmp_path / ".lease")
    gone = replace(new_attempt(0, 1, ledger, {}), attempt_id="gone", machine="m", heartbeat=1.0)

    def crash() -> None:
        ledger.write_attempt(gone)
        ledger.reassign("folder", "gone")

    crash()
    with lease(tmp_path) as require:
        ledger.reassign("folder", "other")  # as if this process had been frozen for long
        with pytest.raises(FolderInUse, match="other"):
            require()
    crash()
    # Another process sees the crash too, and follows a moment later.
    monkeypatch.setattr(time, "sleep", lambda _: ledger.reassign("folder", "other"))
    with pytest.raises(FolderInUse, match="other"), lease(tmp_path):
        pass


def test_a_trainer_that_lost_its_lease_saves_nothing_more(
    extracted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    experiment = variant(extracted, tmp_path, training__save_steps=2, training__max_steps=4)
    check = KVDistillTrainer.training_step

    def steal(trainer: Any, *args: Any, **options: Any) -> Any:
        if trainer.state.global_step == 2:
            Ledger(tmp_path / "tiny" / ".lease").reassign("folder", "somebody")
        return check(trainer, *args, **options)

    monkeypatch.setattr(KVDistillTrainer, "training_step", steal)
    with pytest.raises(FolderInUse, match="somebody"):
        train(experiment)
    names = {path.name for path in (tmp_path / "tiny").iterdir()}
    assert "checkpoint-2" in names
    assert not {"checkpoint-4", "student"} & names


def test_files_of_a_run_have_the_mode_of_the_umask(extracted: Path, tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        settings = {"training__save_steps": 2, "training__eval_steps": 2}
        run = train(variant(extracted, tmp_path, training__keep_best=True, **settings)).folder
    finally:
        os.umask(before)
    modes = {p.relative_to(run).as_posix(): p.stat().st_mode & 0o777 for p in run.rglob("*.*")}
    files = {name: mode for name, mode in modes.items() if (run / name).is_file()}
    assert {"student/model.safetensors", "checkpoint-6/projectors.safetensors"} < set(files)
    assert not {name: oct(mode) for name, mode in files.items() if mode != 0o640}


def test_shards_have_the_mode_of_the_umask(tmp_path: Path, build: Any) -> None:
    store, _ = build.store(tmp_path / "s", build.teacher(backend="safetensors"))
    files = [path for path in store.paths.root.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} >= {".safetensors", ".json"}
    assert len({path.stat().st_mode & 0o777 for path in files}) == 1


def test_a_shard_that_shrinks_while_it_is_open_is_damaged_and_no_bus_error(
    tmp_path: Path, build: Any
) -> None:
    store, _ = build.store(tmp_path / "s", build.teacher(backend="safetensors"))
    shard_id = store.shard_ids[0]
    store.read_shard("tiny", shard_id)
    (file,) = store.paths.shard("tiny", shard_id).glob("*.safetensors")
    os.truncate(file, 100)
    with pytest.raises(ShardCorrupt, match="truncated since it was opened"):
        store.read_shard("tiny", shard_id)


def test_a_student_that_is_open_is_replaced_and_not_overwritten(
    extracted: Path, tmp_path: Path
) -> None:
    """Weights are mapped: a file that shrinks under its reader ends it by SIGBUS."""
    experiment = variant(extracted, tmp_path)
    folder = RunFolder(train(experiment).folder)
    with (folder.student / "model.safetensors").open("rb") as mapped:
        content = mapped.read()
        folder.write_record(folder.read_record() | {"finished": False})
        (folder.student / "stale.bin").write_text("of another version")
        train(experiment)
        mapped.seek(0)
        assert mapped.read() == content
        inode = os.fstat(mapped.fileno()).st_ino
    assert (folder.student / "model.safetensors").stat().st_ino != inode
    assert not (folder.student / "stale.bin").exists()


def debris(folder: Path, *, of: str) -> None:
    """What a writer leaves, by a process that is ``gone`` or alive."""
    pid = os.getpid() if of == "alive" else 2**22 + 1
    name = commit.staged_name(of).replace(f"-{os.getpid()}.", f"-{pid}.")
    folder.mkdir(exist_ok=True)
    (folder / name).mkdir()
    (folder / name / "part").write_text("x")
    (folder / f".{name}.tmp").write_text("x")


def test_nothing_of_a_killed_trainer_is_left(extracted: Path, tmp_path: Path) -> None:
    experiment = variant(extracted, tmp_path)
    run = begin(experiment).path
    debris(run, of="gone")
    train(experiment)
    assert not [path.name for path in run.rglob("*") if "gone" in path.name]
    hidden = [path.name for path in run.rglob(".*") if path.is_file()]
    assert not hidden


@pytest.mark.parametrize(
    "left",
    [
        {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "node7", "MASTER_PORT": "29500"},
        {"WORLD_SIZE": "4", "SLURM_STEP_NUM_TASKS": "1"},
        {"RANK": "1"},
        {"RANK": "2", "WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "x"},
        {"RANK": "0", "WORLD_SIZE": "x"},
    ],
)
def test_variables_left_in_a_shell_are_one_line_at_once(left: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match="if the variables are left over in this shell") as caught:
        require_launcher(left)
    assert "unset RANK" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) <= 500


@pytest.mark.parametrize(
    "launched",
    [
        {},
        {"RANK": "0", "WORLD_SIZE": "1"},
        {"RANK": "1", "WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "x"},
        {"RANK": "3", "WORLD_SIZE": "4", "SLURM_STEP_NUM_TASKS": "4"},
        {"RANK": "1", "WORLD_SIZE": "2", "OMPI_COMM_WORLD_SIZE": "2"},
    ],
)
def test_launched_processes_are_left_alone(launched: dict[str, str]) -> None:
    require_launcher(launched)


def test_training_looks_for_its_launcher_first(
    extracted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "3")
    with pytest.raises(ConfigError, match="RANK=3"):
        train(variant(extracted, tmp_path))
    assert not (tmp_path / "tiny").exists()
