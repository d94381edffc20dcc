"""Every fault of a cluster, from a real Slurm, with toy units.

After each fault ``status`` must be right, and at the end every unit is done once and nothing
unfinished is left.
"""

from __future__ import annotations

import dataclasses
import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from kvdistill.config.slurm import SlurmProfile
from kvdistill.provenance import process_start
from kvdistill.slurm import client
from kvdistill.slurm.ledger import Attempt
from kvdistill.slurm.status import Status, read_status
from kvdistill.slurm.submit import submit_array
from kvdistill.slurm.task import Task, owned_units
from tests.slurm.cluster import CREDENTIAL_SECONDS, Cluster, run_until_idle, wait_for
from tests.slurm.toy import done, ledger, leftovers, toy_task

pytestmark = pytest.mark.slurm

PROFILE = SlurmProfile(
    partition="low", cpus_per_task=1, memory_gb=1, time_min=10, signal_delay_s=20
)


def submit(folder: Path, units: Sequence[str], tasks: int, seconds: float, **options: Any) -> str:
    profile = PROFILE.model_copy(update=options)
    whole = toy_task(folder, *units, seconds=seconds)
    parts = [
        dataclasses.replace(whole, units=owned_units(units, i, tasks), task=i, num_tasks=tasks)
        for i in range(tasks)
    ]
    (job_id,) = submit_array(parts, profile, "toy")
    return job_id


def look(folder: Path, units: Sequence[str]) -> Status:
    return read_status(ledger(folder), units, done(folder), heartbeat_seconds=0.3)


def state(folder: Path, unit: str) -> str:
    return look(folder, [unit]).units[unit]


def holder(folder: Path, unit: str) -> Attempt:
    attempt = ledger(folder).attempt(ledger(folder).holder(unit) or "")
    assert attempt is not None
    return attempt


def test_an_array_does_every_unit_once(login: Cluster, tmp_path: Path) -> None:
    units = [f"unit-{i}" for i in range(10)]
    job_id = submit(tmp_path, units, tasks=3, seconds=0)
    run_until_idle(login, job_id)
    assert done(tmp_path) == set(units)
    assert look(tmp_path, units).is_complete
    assert sum(attempt.units_done for attempt in ledger(tmp_path).attempts()) == 10
    assert {a.job for a in ledger(tmp_path).attempts()} == {f"{job_id}_{i}" for i in range(3)}
    assert not leftovers(tmp_path)


def test_one_task_is_no_array_and_works_all_the_same(login: Cluster, tmp_path: Path) -> None:
    job_id = submit(tmp_path, ["a", "fail-1"], tasks=1, seconds=0)
    run_until_idle(login, job_id)
    assert state(tmp_path, "a") == "done"
    # It failed, came back twice by itself as the very same job, and was then left alone.
    assert state(tmp_path, "fail-1") == "quarantined"
    assert [f.job for f in ledger(tmp_path).failures("fail-1")] == [job_id] * 3


def test_pending_elements_show_slurms_reason(login: Cluster, tmp_path: Path) -> None:
    job_id = submit(tmp_path, ["a"], tasks=1, seconds=0, extra={"hold": ""})
    wait_for("the held job", lambda: bool(look(tmp_path, ["a"]).waiting))
    status = look(tmp_path, ["a"])
    assert status.units == {"a": "pending"}
    assert [job.reason for job in status.waiting] == ["JobHeldUser"]
    login.client("scontrol", "release", job_id)
    run_until_idle(login, job_id)
    assert state(tmp_path, "a") == "done"


def test_requeue_of_one_element_while_it_runs(login: Cluster, tmp_path: Path) -> None:
    units = ["slow-1", "slow-2", "a", "b"]
    job_id = submit(tmp_path, units, tasks=2, seconds=3)
    wait_for("both", lambda: look(tmp_path, units).count("running") == 2)
    first = holder(tmp_path, "slow-2").job
    assert first is not None
    login.client("scontrol", "requeue", first)
    wait_for("the first to be put back", lambda: state(tmp_path, "slow-2") != "running")
    run_until_idle(login, job_id)
    assert look(tmp_path, units).is_complete
    restarts = {a.job: a.restart for a in ledger(tmp_path).attempts()}
    assert sorted(restarts.values()) == [0, 1]
    assert restarts[first] == 1
    assert not look(tmp_path, units).failures
    assert not leftovers(tmp_path)


def test_a_cancelled_element_stays_cancelled(login: Cluster, tmp_path: Path) -> None:
    units = ["slow-1", "slow-2"]
    job_id = submit(tmp_path, units, tasks=2, seconds=4)
    wait_for("both", lambda: look(tmp_path, units).count("running") == 2)
    victim = holder(tmp_path, "slow-1").job
    assert victim is not None
    client.cancel([victim])
    run_until_idle(login, job_id)
    assert look(tmp_path, units).units == {"slow-1": "pending", "slow-2": "done"}
    assert login.states(job_id)[victim] == "CANCELLED"
    again = submit(tmp_path, ["slow-1"], tasks=1, seconds=0)
    run_until_idle(login, again)
    assert look(tmp_path, units).is_complete
    assert not leftovers(tmp_path)


def test_a_worker_killed_outright(login: Cluster, tmp_path: Path) -> None:
    job_id = submit(tmp_path, ["slow-1", "a"], tasks=1, seconds=4)
    wait_for("the slow unit", lambda: state(tmp_path, "slow-1") == "running")
    os.kill(holder(tmp_path, "slow-1").pid, signal.SIGKILL)
    wait_for("the death to be seen", lambda: state(tmp_path, "slow-1") == "stale")
    assert "killed" in look(tmp_path, ["slow-1"]).stale["slow-1"]
    run_until_idle(login, job_id)
    again = submit(tmp_path, ["slow-1", "a"], tasks=1, seconds=0)
    run_until_idle(login, again)
    assert look(tmp_path, ["slow-1", "a"]).is_complete
    assert [f.kind for f in ledger(tmp_path).failures("slow-1")] == ["killed"]
    assert not leftovers(tmp_path)


def test_a_node_goes_down_while_its_copy_still_runs(login: Cluster, tmp_path: Path) -> None:
    job_id = submit(tmp_path, ["slow-1", "a"], tasks=1, seconds=8)
    wait_for("the slow unit", lambda: state(tmp_path, "slow-1") == "running")
    first = holder(tmp_path, "slow-1")
    login.freeze(first.host)
    try:
        login.set_node(first.host, "down")
        time.sleep(CREDENTIAL_SECONDS)
        login.start_now(job_id)
        wait_for("the second copy", lambda: holder(tmp_path, "slow-1").restart == 1)
        second = holder(tmp_path, "slow-1")
        assert process_start(first.pid) == first.process_start, "the first copy must still run"
        assert second.host != first.host
        assert look(tmp_path, ["slow-1"]).units == {"slow-1": "running"}
        run_until_idle(login, job_id)
    finally:
        login.thaw(first.host)
        login.set_node(first.host, "resume")
    wait_for("the first copy to go", lambda: process_start(first.pid) is None)
    assert look(tmp_path, ["slow-1", "a"]).is_complete
    assert not ledger(tmp_path).failures("slow-1"), "a lost node is not the unit's fault"
    assert not leftovers(tmp_path)


def test_a_preempted_element_is_warned_and_comes_back(login: Cluster, tmp_path: Path) -> None:
    units = ["slow-1", "a"]
    job_id = submit(tmp_path, units, tasks=1, seconds=30)
    wait_for("the slow unit", lambda: state(tmp_path, "slow-1") == "running")
    (tmp_path / "high.sh").write_text("#!/bin/sh\nsleep 2\n")
    urgent = login.client(
        "sbatch", "--parsable", "--partition=high", "--nodes=2", "--exclusive",
        f"--output={tmp_path}/high.log", str(tmp_path / "high.sh"),
    )  # fmt: skip
    wait_for("the preemption", lambda: state(tmp_path, "slow-1") == "pending", 40)
    attempt = ledger(tmp_path).attempts()[0]
    assert attempt.outcome == "interrupted"
    assert not look(tmp_path, units).failures, "a preemption is not the unit's fault"
    wait_for("the urgent job", lambda: not client.queue([urgent]))
    assert job_id in client.queue([job_id])
    client.cancel([job_id])
    again = submit(tmp_path, units, tasks=1, seconds=0)
    run_until_idle(login, again)
    assert look(tmp_path, units).is_complete
    assert not leftovers(tmp_path)


def test_a_unit_that_always_fails_is_quarantined(login: Cluster, tmp_path: Path) -> None:
    units = ["a", "fail-1", "b", "c"]
    job_id = submit(tmp_path, units, tasks=2, seconds=0)
    run_until_idle(login, job_id)
    status = look(tmp_path, units)
    assert status.units == {"a": "done", "fail-1": "quarantined", "b": "done", "c": "done"}
    assert "RuntimeError: cannot do fail-1" in status.failures["fail-1"][-1].message
    assert "_misbehave" in (status.failures["fail-1"][-1].traceback or "")
    assert Path(status.failures["fail-1"][-1].log or "").exists()


def test_out_of_memory_is_named(login: Cluster, tmp_path: Path) -> None:
    units = ["eat-1", "a"]
    job_id = submit(tmp_path, units, tasks=1, seconds=30, extra={"mem": "150M"})
    wait_for("the kill", lambda: state(tmp_path, "eat-1") == "stale")
    run_until_idle(login, job_id)
    assert "out of memory" in look(tmp_path, units).stale["eat-1"]
    again = submit(tmp_path, units, tasks=1, seconds=0)
    run_until_idle(login, again)
    assert [f.kind for f in ledger(tmp_path).failures("eat-1")] == ["out_of_memory"]
    assert look(tmp_path, units).is_complete
    assert not leftovers(tmp_path)


def test_a_time_limit_is_named_and_work_goes_on(login: Cluster, tmp_path: Path) -> None:
    units = ["slow-1", "a"]
    job_id = submit(tmp_path, units, tasks=1, seconds=600, time_min=1, signal_delay_s=50)
    wait_for("the warning", lambda: bool(ledger(tmp_path).failures("slow-1")), 40)
    failure = ledger(tmp_path).failures("slow-1")[0]
    assert (failure.kind, failure.job) == ("time_limit", job_id)
    assert state(tmp_path, "slow-1") == "failed"
    wait_for("it to come back", lambda: client.queue([job_id])[job_id].state == "PENDING")
    client.cancel([job_id])
    again = submit(tmp_path, units, tasks=1, seconds=0)
    run_until_idle(login, again)
    assert look(tmp_path, units).is_complete
    assert not leftovers(tmp_path)


def test_a_node_of_two_workers_shares_its_gpus_and_comes_back(
    login: Cluster, tmp_path: Path
) -> None:
    units = ["slow-1", "slow-2", "a", "b"]
    job_id = submit(tmp_path, units, tasks=1, seconds=3, workers=2, gpus_per_node=2)
    wait_for("both", lambda: look(tmp_path, units).count("running") == 2)
    login.client("scontrol", "requeue", job_id)
    wait_for("both to stop", lambda: look(tmp_path, units).count("pending") == 4)
    assert {a.outcome for a in ledger(tmp_path).attempts()} == {"interrupted"}
    run_until_idle(login, job_id)
    assert look(tmp_path, units).is_complete
    gpus = {unit: (tmp_path / "results" / unit).read_text().split()[1] for unit in units}
    assert gpus == {"slow-1": "0", "a": "0", "slow-2": "1", "b": "1"}
    assert not look(tmp_path, units).failures
    assert not leftovers(tmp_path)


def test_arrays_are_split_at_the_sites_limit(
    login: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "max_array_size", lambda: 3)
    units = [f"unit-{i}" for i in range(5)]
    whole = toy_task(tmp_path, *units)
    tasks = [
        Task(**{**vars(whole), "units": owned_units(units, i, 5), "task": i, "num_tasks": 5})
        for i in range(5)
    ]
    ids = submit_array(tasks, PROFILE, "toy")
    assert len(ids) == 3
    for job_id in ids:
        run_until_idle(login, job_id)
    assert done(tmp_path) == set(units)


def test_the_real_limit_is_read(login: Cluster) -> None:
    assert client.max_array_size() == 2001
