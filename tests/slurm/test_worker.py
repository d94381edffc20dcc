"""Workers as real processes that are stopped, killed, frozen and run twice, without Slurm."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvdistill.errors import SlurmError
from kvdistill.slurm.heartbeat import Heartbeat, new_attempt
from kvdistill.slurm.ledger import Attempt, Ledger
from kvdistill.slurm.local_pool import run_pool
from kvdistill.slurm.signals import StopFlag
from kvdistill.slurm.status import UNIT_STATES, read_status
from kvdistill.slurm.task import TRY_AGAIN, Task, owned_units
from kvdistill.slurm.worker import work
from tests.slurm.cluster import wait_for
from tests.slurm.toy import done, ledger, leftovers, toy_task

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    for name in ("SLURM_JOB_ID", "SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID"):
        monkeypatch.delenv(name, raising=False)


def start(task: Task, **environment: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-m", "kvdistill.slurm.worker"],
        stdin=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
    )
    assert process.stdin is not None
    with process.stdin as pipe:
        pipe.write(task.to_json())
    return process


def states(task: Task) -> dict[str, str]:
    status = read_status(
        ledger(task.folder),
        task.units,
        done(task.folder),
        ask_slurm=False,
        heartbeat_seconds=task.heartbeat_seconds,
    )
    return dict(status.units)


@given(st.lists(st.text("abc", min_size=1), unique=True), st.integers(1, 9))
def test_shares_partition_the_units(units: list[str], num_tasks: int) -> None:
    shares = [owned_units(units, task, num_tasks) for task in range(num_tasks)]
    assert sorted(unit for part in shares for unit in part) == sorted(units)
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_a_task_outside_its_count_is_refused() -> None:
    with pytest.raises(SlurmError, match="task 3 of 3"):
        owned_units(["a"], 3, 3)


def test_a_task_survives_json(tmp_path: Path) -> None:
    task = toy_task(tmp_path, "a", "b")
    assert Task.from_json(task.to_json()) == task


def test_done_units_are_done_once(tmp_path: Path) -> None:
    task = toy_task(tmp_path, "a", "b")
    assert work(task).outcome == "complete"
    before = (tmp_path / "results/a").stat().st_mtime_ns
    assert work(task).outcome == "complete"
    assert (tmp_path / "results/a").stat().st_mtime_ns == before
    assert [a.units_done for a in ledger(tmp_path).attempts()] == [2, 0]
    assert [a.work_done for a in ledger(tmp_path).attempts()] == [20, 0]
    assert not leftovers(tmp_path)


def test_a_failing_unit_does_not_hold_up_the_rest(tmp_path: Path) -> None:
    task = toy_task(tmp_path, "a", "fail-1", "b", "once-1")
    first = work(task)
    assert (first.outcome, first.exit_code) == ("incomplete", TRY_AGAIN)
    assert states(task) == {"a": "done", "fail-1": "failed", "b": "done", "once-1": "failed"}
    work(task)
    last = work(task)
    assert (last.outcome, last.exit_code) == ("incomplete", 1)
    assert states(task)["fail-1"] == "quarantined"
    assert states(task)["once-1"] == "done"
    failures = ledger(tmp_path).failures("fail-1")
    assert len(failures) == 3
    assert failures[0].message == "RuntimeError: cannot do fail-1"
    assert "in _misbehave" in (failures[0].traceback or "")
    assert ledger(tmp_path).clear_failures("fail-1") == 3
    assert states(task)["fail-1"] == "pending"


def test_three_failures_in_a_row_end_the_process_not_the_units(tmp_path: Path) -> None:
    task = toy_task(tmp_path, *(f"fail-{i}" for i in range(9)))
    assert work(task).again
    assert list(states(task).values()) == ["failed"] * 3 + ["pending"] * 6


def test_out_of_memory_is_named(tmp_path: Path) -> None:
    work(toy_task(tmp_path, "memory-1"))
    assert [f.kind for f in ledger(tmp_path).failures("memory-1")] == ["out_of_memory"]


def test_a_task_that_cannot_start_blames_no_unit(tmp_path: Path) -> None:
    task = toy_task(tmp_path, "a", broken=True)
    ending = work(task)
    assert (ending.outcome, ending.exit_code) == ("failed", 1)
    status = read_status(ledger(tmp_path), task.units, set(), ask_slurm=False)
    assert status.of("pending") == ["a"]
    assert [attempt.message for attempt in status.broken] == [
        "could not start: ValueError: no such model"
    ]
    assert not leftovers(tmp_path)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_worker_abandons_its_unit_and_exits_75(tmp_path: Path, number: int) -> None:
    task = toy_task(tmp_path, "a", "slow-1", "b", seconds=60)
    process = start(task)
    wait_for("the slow unit", lambda: states(task)["slow-1"] == "running")
    process.send_signal(number)
    assert process.wait(10) == TRY_AGAIN
    assert states(task) == {"a": "done", "slow-1": "pending", "b": "pending"}
    assert ledger(tmp_path).attempts()[0].stop == signal.Signals(number).name
    assert not leftovers(tmp_path)


def test_a_warned_worker_finishes_what_fits(tmp_path: Path) -> None:
    task = toy_task(tmp_path, "slow-1", "b", seconds=0.9)
    long_warning = Task(**{**vars(task), "warning_seconds": 60.0})
    process = start(long_warning)
    wait_for("the slow unit", lambda: states(task)["slow-1"] == "running")
    process.send_signal(signal.SIGUSR2)
    assert process.wait(10) == TRY_AGAIN
    assert states(task) == {"slow-1": "done", "b": "pending"}


def test_a_unit_that_outlasts_the_time_limit_is_blamed_for_it(tmp_path: Path) -> None:
    task = toy_task(tmp_path, "slow-1", seconds=60)
    process = start(task)
    wait_for("the slow unit", lambda: states(task)["slow-1"] == "running")
    process.send_signal(signal.SIGUSR2)
    assert process.wait(10) == TRY_AGAIN
    assert [f.kind for f in ledger(tmp_path).failures("slow-1")] == ["time_limit"]


def test_a_killed_worker_is_stale_and_its_unit_is_taken_over(tmp_path: Path) -> None:
    task = toy_task(tmp_path, "slow-1", seconds=1.0)
    process = start(task)
    wait_for("the slow unit", lambda: states(task)["slow-1"] == "running")
    process.kill()
    process.wait()
    assert states(task) == {"slow-1": "stale"}
    assert work(task).outcome == "complete"
    assert [f.kind for f in ledger(tmp_path).failures("slow-1")] == ["killed"]
    assert not leftovers(tmp_path)


def test_a_unit_that_kills_its_worker_is_quarantined(tmp_path: Path) -> None:
    task = toy_task(tmp_path, "a", "die-1", "b")
    ending = run_pool([task], gpus=[])
    assert (ending.outcome, ending.again) == ("incomplete", False)
    assert states(task) == {"a": "done", "die-1": "quarantined", "b": "done"}
    drafts = {path.name.split(".")[1] for path in leftovers(tmp_path)}
    assert drafts == {"die-1"}, "kept until the unit is done: its writer might still be alive"


def test_a_living_workers_unit_is_left_to_it(tmp_path: Path) -> None:
    task = toy_task(tmp_path, "slow-1", "b", seconds=3)
    process = start(task)
    wait_for("the slow unit", lambda: states(task)["slow-1"] == "running")
    ending = work(task)
    assert ending.outcome == "complete"
    assert "other workers" in ending.message
    assert states(task) == {"slow-1": "running", "b": "done"}
    assert process.wait(20) == 0
    assert states(task)["slow-1"] == "done"


def test_a_frozen_worker_is_given_up_and_may_come_back(tmp_path: Path) -> None:
    task = toy_task(tmp_path, "slow-1", "b", seconds=0.5)
    process = start(task)
    wait_for("the slow unit", lambda: states(task)["slow-1"] == "running")
    process.send_signal(signal.SIGSTOP)
    wait_for("silence to be noticed", lambda: states(task)["slow-1"] == "stale")
    assert work(task).outcome == "complete"
    published = (tmp_path / "results/slow-1").read_text()
    process.send_signal(signal.SIGCONT)
    assert process.wait(20) == 0
    assert (tmp_path / "results/slow-1").read_text() == published
    assert not leftovers(tmp_path)


def test_a_restarted_element_supersedes_its_earlier_run_at_once(tmp_path: Path) -> None:
    task = toy_task(tmp_path, "slow-1", seconds=3)
    job = {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "2"}
    first = start(task, **job)
    wait_for("the slow unit", lambda: states(task)["slow-1"] == "running")
    second = start(task, **job, SLURM_RESTART_COUNT="1")
    wait_for("the takeover", lambda: ".r1." in (ledger(tmp_path).holder("slow-1") or ""))
    assert (first.wait(20), second.wait(20)) == (0, 0)
    assert done(tmp_path) == {"slow-1"}
    assert not leftovers(tmp_path)


def test_a_pool_gives_out_gpus_and_does_everything_once(tmp_path: Path) -> None:
    units = [f"unit-{i}" for i in range(12)]
    tasks = [toy_task(tmp_path, *owned_units(units, i, 3)) for i in range(3)]
    assert run_pool(tasks, gpus=["4", "5"]).outcome == "complete"
    assert done(tmp_path) == set(units)
    seen = {unit: (tmp_path / "results" / unit).read_text().split()[1] for unit in units}
    assert [seen[f"unit-{i}"] for i in range(3)] == ["4", "5", "4"]
    assert sum(a.units_done for a in ledger(tmp_path).attempts()) == 12


def test_a_stopped_pool_stops_its_workers(tmp_path: Path) -> None:
    script = (
        "import sys\nfrom pathlib import Path\nfrom kvdistill.slurm.local_pool import run_pool\n"
        "from tests.slurm.toy import toy_task\n"
        "tasks = [toy_task(Path(sys.argv[1]), f'slow-{i}', seconds=60) for i in range(2)]\n"
        "sys.exit(run_pool(tasks, gpus=[]).exit_code)\n"
    )
    pool = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)])
    wait_for("two workers", lambda: len(ledger(tmp_path).claims()) == 2)
    pool.terminate()
    assert pool.wait(20) == TRY_AGAIN
    assert all(attempt.ended for attempt in ledger(tmp_path).attempts())
    assert not leftovers(tmp_path)


def test_every_unit_is_in_one_state_and_speed_is_told(tmp_path: Path) -> None:
    task = toy_task(tmp_path, "a", "slow-1", "b", "c", seconds=60)
    work(toy_task(tmp_path, "fail-1"))
    process = start(task)
    wait_for("the slow unit", lambda: states(task)["slow-1"] == "running")
    units = ("fail-1", *task.units)
    status = read_status(ledger(tmp_path), units, done(tmp_path), ask_slurm=False)
    assert {state: status.count(state) for state in UNIT_STATES} == {
        "done": 1, "running": 1, "stale": 0, "quarantined": 0, "failed": 1, "pending": 2,
    }  # fmt: skip
    assert status.work_per_second > 0
    assert status.eta_seconds is not None
    assert not status.is_complete
    process.terminate()
    process.wait(10)


def test_files_that_a_power_cut_emptied_stop_nobody(tmp_path: Path) -> None:
    task = toy_task(tmp_path, "a", "fail-1")
    work(task)
    (tmp_path / "results/a").unlink()
    (tmp_path / "claims").mkdir(exist_ok=True)
    (tmp_path / "claims/a.json").touch()
    for path in (*tmp_path.glob("attempts/*"), *tmp_path.glob("failures/fail-1/*")):
        path.write_bytes(b"")
    assert states(task) == {"a": "stale", "fail-1": "pending"}
    work(task)
    assert states(task) == {"a": "done", "fail-1": "failed"}
    assert not list(tmp_path.glob("claims/*"))


def test_heartbeats_resume_after_a_disk_that_fails_for_a_while(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse = False
    written: list[Attempt] = []

    def write(self: Ledger, newest: Attempt) -> None:
        if refuse:
            raise OSError(28, "No space left on device")
        written.append(newest)

    monkeypatch.setattr(Ledger, "write_attempt", write)
    attempt = new_attempt(0, 1, ledger(tmp_path), {})
    with Heartbeat(Ledger(tmp_path), attempt, StopFlag(1.0), 0.01):
        refuse = True
        time.sleep(0.1)
        before = len(written)
        refuse = False
        wait_for("the next beat", lambda: len(written) > before, 10)


def test_heartbeats_stay_whole_while_they_are_read(tmp_path: Path) -> None:
    task = toy_task(tmp_path, "slow-1", seconds=60)
    process = start(Task(**{**vars(task), "heartbeat_seconds": 0.01}))
    wait_for("the slow unit", lambda: states(task)["slow-1"] == "running")
    beats = set()
    end = time.monotonic() + 1.5
    while time.monotonic() < end:
        beats |= {attempt.heartbeat for attempt in ledger(tmp_path).attempts()}
    process.terminate()
    process.wait(10)
    assert len(beats) > 10
