"""Slurm's commands, faked, and the messages where there is none."""

from __future__ import annotations

import json
import pickle
import re
import shlex
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import click
import pytest
import yaml
from click.testing import CliRunner

from kvdistill.cli import cli
from kvdistill.config.load import parse_experiment
from kvdistill.config.slurm import SlurmConfig, SlurmProfile
from kvdistill.errors import ConfigError, SlurmError
from kvdistill.pipelines.extract_tasks import extraction_ledger
from kvdistill.slurm import client
from kvdistill.slurm.heartbeat import job_element, new_attempt
from kvdistill.slurm.launch import Launch, launch_command
from kvdistill.slurm.ledger import Failure, Submission
from kvdistill.slurm.retry import crash_cause, requeue_this_job
from kvdistill.slurm.status import read_status
from kvdistill.slurm.submit import ArrayElement, batch_script, dask_options, submit_array
from kvdistill.slurm.task import Task, partition_round_robin
from tests.config.template import template
from tests.slurm.experiment import ROOT, write_experiment
from tests.slurm.toy import ledger, toy_task

Fake = Callable[[str, str], Path]


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fake:
    """Put a shell script of this name on the PATH; calls are recorded in ``<name>.calls``."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")

    def make(name: str, body: str) -> Path:
        calls = folder / f"{name}.calls"
        (folder / name).write_text(f'#!/bin/sh\necho "$@" >> {calls}\n{body}\n')
        (folder / name).chmod(0o755)
        return calls

    return make


@pytest.fixture
def no_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("0:07", 7), ("59:00", 3540), ("1:00:00", 3600), ("2-00:00:01", 172_801),
     ("UNLIMITED", None), ("INVALID", None), ("", None)],
)  # fmt: skip
def test_durations(text: str, seconds: int | None) -> None:
    assert client.parse_duration(text) == seconds


def test_the_queue_is_read_by_element(fake: Fake) -> None:
    fake("squeue", 'echo "7_0|RUNNING|None|n1"; echo "7_1|PENDING|Priority|"')
    queue = client.queue(["7"])
    assert queue["7_0"].state == "RUNNING"
    assert queue["7_1"].reason == "Priority"


def test_forgotten_jobs_are_no_error(fake: Fake) -> None:
    fake("squeue", 'echo "slurm_load_jobs error: Invalid job id specified" >&2; exit 1')
    assert client.queue(["7"]) == {}


def test_a_refusal_is_one_line(fake: Fake) -> None:
    fake("squeue", 'printf "error: first\\nerror: second\\n" >&2; exit 1')
    with pytest.raises(SlurmError, match=r"`squeue .*failed: error: first error: second"):
        client.queue(["7"])


def test_a_client_that_hangs_is_given_up(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    fake("squeue", "exec sleep 30")
    monkeypatch.setattr(client, "TIMEOUT_SECONDS", 0.2)
    with pytest.raises(SlurmError, match="did not answer"):
        client.queue(["7"])


def test_only_the_element_itself_is_requeued(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    fake("squeue", "echo RUNNING")
    calls = fake("scontrol", "")
    # For one element of every array, SLURM_JOB_ID equals the array's id.
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "7")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    monkeypatch.delenv("SLURM_RESTART_COUNT", raising=False)
    assert requeue_this_job(max_restarts=2)
    assert calls.read_text() == "requeue 7_3\n"


def test_restarts_are_capped(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = fake("scontrol", "")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    assert not requeue_this_job(max_restarts=2)
    assert not calls.exists()


@pytest.mark.parametrize("state", ["COMPLETING", "CANCELLED", "PENDING", ""])
def test_a_job_that_is_being_ended_is_not_requeued(fake: Fake, state: str) -> None:
    fake("squeue", f"echo {state}")
    calls = fake("scontrol", "")
    assert not client.requeue("7")
    assert not calls.exists()


def test_a_site_that_forbids_requeueing_is_no_crash(
    fake: Fake, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    fake("squeue", "echo RUNNING")
    fake("scontrol", 'echo "Requested operation is presently disabled" >&2; exit 1')
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.delenv("SLURM_RESTART_COUNT", raising=False)
    assert not requeue_this_job(max_restarts=2)
    assert "presently disabled" in capfd.readouterr().err


def test_elements_are_named_outside_and_inside_arrays() -> None:
    assert job_element({}) is None
    assert job_element({"SLURM_JOB_ID": "7"}) == "7"
    array = {"SLURM_JOB_ID": "9", "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "2"}
    assert job_element(array) == "7_2"


@pytest.mark.parametrize(
    ("line", "cause"),
    [("slurmstepd: error: Detected 1 oom_kill event in StepId=7.0", "out_of_memory"),
     ("slurmstepd: error: StepId=2.0 exceeded memory limit (3 > 1), being killed", "out_of_memory"),
     ("*** STEP 7.0 ON n1 CANCELLED AT 2026-01-01T00:00:00 DUE TO TIME LIMIT ***", "time_limit"),
     ("*** JOB 7 ON n1 CANCELLED AT 2026-01-01T00:00:00 DUE TO PREEMPTION ***", None),
     ("*** STEP 7.0 ON n1 CANCELLED AT 2026-01-01T00:00:00 ***", None),
     ("bus error", "killed")],
)  # fmt: skip
def test_a_crash_is_named_by_its_own_log_lines(
    tmp_path: Path, line: str, cause: str | None
) -> None:
    log = ledger(tmp_path).log("7")
    log.parent.mkdir()
    log.write_text("Out Of Memory, of an earlier attempt\n")
    attempt = new_attempt(0, 1, ledger(tmp_path), {"SLURM_JOB_ID": "7"})
    end_of_ours = log.stat().st_size + len(line) + 1
    log.write_text(f"{log.read_text()}{line}\nDUE TO TIME LIMIT, of a later one\n")
    assert crash_cause(attempt, end_of_ours) == cause


PROFILE = SlurmProfile(
    partition="gpu", account="lab", qos="long", constraint="h100", gpus_per_node=8,
    cpus_per_task=64, memory_gb=900, time_min=1440, signal_delay_s=300, array_parallelism=16,
    setup=("module load cuda", "export HF_HUB_OFFLINE=1"), container="kv.sqsh",
    container_mounts=("/data:/data",), extra={"exclusive": "", "mail-type": "FAIL"},
)  # fmt: skip


def test_a_profile_becomes_a_script(tmp_path: Path) -> None:
    text = batch_script(PROFILE, "kv", "python x", ledger(tmp_path), elements=40)
    lines = set(text.splitlines())
    assert lines >= {
        "#SBATCH --partition=gpu", "#SBATCH --account=lab", "#SBATCH --qos=long",
        "#SBATCH --constraint=h100", "#SBATCH --gpus-per-node=8", "#SBATCH --cpus-per-task=64",
        "#SBATCH --mem=900GB", "#SBATCH --time=1440", "#SBATCH --signal=USR2@300",
        "#SBATCH --array=0-39%16", "#SBATCH --exclusive", "#SBATCH --mail-type=FAIL",
        "#SBATCH --requeue", "module load cuda", "export HF_HUB_OFFLINE=1",
    }  # fmt: skip
    srun = next(line for line in lines if line.startswith("srun"))
    assert {"--container-image=kv.sqsh", "--container-mounts=/data:/data"} <= set(shlex.split(srun))
    assert "--cpus-per-task=64" in srun
    assert "wckey" not in text


@pytest.mark.parametrize("elements", [None, 3])
def test_a_written_script_requests_what_a_submission_requests(
    fake: Fake, tmp_path: Path, elements: int | None
) -> None:
    fake("srun", "")
    fake("sbatch", 'echo "Submitted batch job 7"')
    fake("scontrol", 'echo "MaxArraySize = 1001"')
    tasks = [toy_task(tmp_path, name) for name in "abc"[: elements or 1]]
    assert submit_array(tasks, PROFILE, "kv") == ["7"]
    (path,) = ledger(tmp_path).jobs.glob("7*_submission.sh")
    submitted = path.read_text().splitlines()
    written = batch_script(PROFILE, "kv", "x", ledger(tmp_path), elements=elements).splitlines()
    directives = [{x for x in text if x.startswith("#SBATCH")} for text in (submitted, written)]
    assert directives[0] == directives[1]
    log = ledger(tmp_path).log("%j" if elements is None else "%A_%a")
    assert f"#SBATCH --error={log}" in directives[0], "logs are found by this name"
    assert set(PROFILE.setup) <= set(submitted) & set(written)
    srun = [next(x for x in text if x.startswith("srun ")) for text in (submitted, written)]
    asked = [" ".join(shlex.split(line)).replace("=", " ") for line in srun]
    assert asked[0].startswith(asked[1].removesuffix(" x"))


def test_a_profile_becomes_dask_workers(tmp_path: Path) -> None:
    profile = SlurmProfile(
        partition="cpu", qos="long", time_min=90, cpus_per_task=8, memory_gb=16,
        setup=("module load x",), extra={"exclusive": "", "mail-type": "FAIL"},
    )  # fmt: skip
    options = dask_options(profile, tmp_path)
    assert options["walltime"] == "01:30:00"
    assert options["job_extra_directives"] == ["--qos=long", "--exclusive", "--mail-type=FAIL"]
    assert (options["cores"], options["memory"]) == (8, "16GB")
    assert options["job_script_prologue"] == ["module load x"]


def test_a_warning_longer_than_the_limit_is_refused() -> None:
    with pytest.raises(ValueError, match="must be shorter than time_min"):
        SlurmProfile(time_min=1, signal_delay_s=60)


def test_an_elements_pickle_holds_names_only(tmp_path: Path) -> None:
    element = ArrayElement(toy_task(tmp_path, "a").to_json(), workers=1, max_restarts=3)
    assert pickle.loads(pickle.dumps(element)) == element
    assert b"tests.slurm.toy:toy" in pickle.dumps(element)
    assert len(pickle.dumps(element)) < 1000


def test_a_node_of_several_workers_splits_its_share(tmp_path: Path) -> None:
    task = toy_task(tmp_path, "a", "b", "c")
    parts = partition_round_robin(task, 2)
    assert [part.units for part in parts] == [("a", "c"), ("b",)]
    assert [part.units for part in partition_round_robin(task, 8)] == [("a",), ("b",), ("c",)]


def test_one_process_needs_no_torchrun() -> None:
    assert launch_command(Launch(("-m", "x")), {}) == [sys.executable, "-m", "x"]


def test_torchrun_gets_its_place_from_slurm() -> None:
    launch = Launch(("-m", "x"), nodes=2, processes_per_node=8)
    place = {"SLURM_JOB_ID": "40007", "SLURM_NODEID": "1", "SLURM_LAUNCH_NODE_IPADDR": "10.0.0.3"}
    command = launch_command(launch, place)
    assert command[1:3] == ["-m", "torch.distributed.run"]
    assert {"--nnodes=2", "--nproc-per-node=8", "--node-rank=1", "--master-addr=10.0.0.3",
            "--master-port=20007"} <= set(command)  # fmt: skip
    assert command[-2:] == ["-m", "x"]


@pytest.mark.parametrize("code", [0, 1, 3])
def test_a_launched_commands_exit_code_passes_through(code: int) -> None:
    with pytest.raises(SystemExit) as left:
        Launch(("-c", f"raise SystemExit({code})"))()
    assert left.value.code == code


def test_a_closed_gate_keeps_its_exit_code() -> None:
    with pytest.raises(SystemExit) as left:
        Launch(("-c", "1/0"), gate=("-c", "raise SystemExit(3)"))()
    assert left.value.code == 3


@pytest.mark.parametrize(
    "command", [["extract", "{}", "--slurm"], ["run", "{}", "--slurm"], ["dask", "{}"]]
)
def test_without_slurm_the_error_is_one_line(
    no_slurm: None, tmp_path: Path, command: list[str]
) -> None:
    config = write_experiment(tmp_path, tmp_path)
    result = CliRunner().invoke(cli, [part.format(config) for part in command])
    assert isinstance(result.exception, SlurmError)
    assert str(result.exception).startswith("no Slurm on this machine")
    assert "\n" not in str(result.exception)
    assert not (tmp_path / "store").exists()


def test_a_dry_run_needs_no_slurm_and_writes_nothing(no_slurm: None, tmp_path: Path) -> None:
    config = write_experiment(tmp_path, tmp_path)
    before = sorted(tmp_path.rglob("*"))
    result = CliRunner().invoke(cli, ["run", str(config), "--dry-run"], catch_exceptions=False)
    assert result.output.count("#!/bin/bash") == 3
    assert "--task=$SLURM_ARRAY_TASK_ID --num-tasks=3" in result.output
    assert sorted(tmp_path.rglob("*")) == before


def test_written_scripts_find_their_log_folders(no_slurm: None, tmp_path: Path) -> None:
    config = write_experiment(tmp_path, tmp_path)
    arguments = ["run", str(config), "--write-sbatch", str(tmp_path / "scripts")]
    CliRunner().invoke(cli, arguments, catch_exceptions=False)
    names = {path.name for path in (tmp_path / "scripts").iterdir()}
    assert names == {"extract-llama.sbatch", "extract-bert.sbatch", "train.sbatch"}
    for path in (tmp_path / "scripts").iterdir():
        (output,) = (x for x in path.read_text().splitlines() if x.startswith("#SBATCH --output="))
        assert Path(output.partition("=")[2]).parent.is_dir()


def test_status_and_retry_need_no_slurm(no_slurm: None, tmp_path: Path) -> None:
    config = write_experiment(tmp_path, tmp_path)
    CliRunner().invoke(cli, ["run", str(config), "--write-sbatch", str(tmp_path / "scripts")])
    result = CliRunner().invoke(cli, ["status", str(config), "--json"], catch_exceptions=False)
    assert json.loads(result.output)["teachers"]["llama"]["pending"] == 12
    result = CliRunner().invoke(cli, ["retry", str(config)], catch_exceptions=False)
    assert result.output.startswith("0 shards")


def test_status_is_complete_when_slurm_does_not_answer(fake: Fake, tmp_path: Path) -> None:
    fake("sbatch", "")
    fake("squeue", 'echo "Unable to contact slurm controller" >&2; exit 1')
    submission = Submission("7", "toy", 0.0, (("a",),))
    ledger(tmp_path).record_submission(submission)
    seen = read_status(ledger(tmp_path), ["a", "b"], {"b"})
    assert seen.units == {"a": "pending", "b": "done"}
    assert "Unable to contact" in (seen.slurm_error or "")


def test_the_pages_profiles_are_valid_and_its_commands_exist() -> None:
    page = (ROOT / "docs/slurm.md").read_text()
    blocks = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    assert len(blocks) == 2
    for block in blocks:
        SlurmConfig.model_validate(yaml.safe_load(block)["slurm"])
    lines = re.findall(r"^kvdistill (.+?)(?:\s+#.*)?$", page, re.MULTILINE)
    assert len(lines) > 8
    for line in lines:
        name, *arguments = shlex.split(line)
        command = cli.get_command(click.Context(cli), name)
        assert command is not None, name
        command.make_context(name, arguments)


def test_many_failures_fit_a_screen(no_slurm: None, tmp_path: Path) -> None:
    config = write_experiment(tmp_path, tmp_path)
    CliRunner().invoke(cli, ["run", str(config), "--write-sbatch", str(tmp_path / "scripts")])
    book = ledger(tmp_path / "store/teachers/llama")
    for unit in (f"{i:05}" for i in range(12)):
        for attempt in ("x", "y", "z"):
            trace = f"Traceback of {unit} by {attempt}"
            book.record_failure(Failure(unit, attempt, "error", "E: bad", trace, "7", None, 0.0))
    shown = CliRunner().invoke(cli, ["status", str(config)], catch_exceptions=False).output
    assert "llama: 0 of 12 shards done, 12 quarantined" in shown
    assert shown.count("E: bad (3×, quarantined)") == 8
    assert "and 4 more" in shown
    assert f"next: kvdistill logs {config}, then kvdistill retry {config}" in shown
    shown = CliRunner().invoke(cli, ["logs", str(config)], catch_exceptions=False).output
    assert shown.count("Traceback of") == 8
    assert "4 more; name them to see them: 00008 00009 00010 00011" in shown
    shown = CliRunner().invoke(cli, ["logs", str(config), "00009"], catch_exceptions=False).output
    assert "Traceback of 00009" in shown
    shown = CliRunner().invoke(cli, ["retry", str(config), "00009"], catch_exceptions=False).output
    assert "llama 00009: 3 failures cleared" in shown
    assert len(book.failed_units()) == 11


def test_an_unknown_profile_names_the_known(tmp_path: Path) -> None:
    config = write_experiment(tmp_path, tmp_path)
    arguments = ["extract", str(config), "--dry-run", "--profile", "sight"]
    result = CliRunner().invoke(cli, arguments)
    assert isinstance(result.exception, ConfigError)
    assert "no profile 'sight'; slurm.profiles has ['site']" in str(result.exception)


@pytest.mark.parametrize(("limit", "jobs"), [("0", 3), ("1", 3), ("2", 3), ("3", 2), ("", 1)])
def test_a_site_without_arrays_gets_a_job_per_task(
    fake: Fake, tmp_path: Path, limit: str, jobs: int
) -> None:
    fake("srun", "")
    fake("scontrol", f'echo "MaxArraySize = {limit}"')
    calls = fake("sbatch", 'echo "Submitted batch job 7"')
    ids = submit_array([toy_task(tmp_path, name) for name in "abc"], PROFILE, "kv")
    assert len(ids) == len(calls.read_text().splitlines()) == jobs


def test_a_machine_without_srun_is_one_line(
    fake: Fake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake("sbatch", 'echo "Submitted batch job 7"')
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    fake("scontrol", 'echo "MaxArraySize = 1001"')
    with pytest.raises(SlurmError, match="srun") as caught:
        submit_array([toy_task(tmp_path, "a")], PROFILE, "kv")
    assert "\n" not in str(caught.value)


def test_memory_may_be_left_to_the_site(fake: Fake, tmp_path: Path) -> None:
    profile = SlurmProfile(memory_gb=None, extra={"mem-per-cpu": "4G"})
    written = batch_script(profile, "kv", "x", ledger(tmp_path))
    assert "--mem=" not in written
    assert "#SBATCH --mem-per-cpu=4G" in written
    fake("srun", "")
    fake("sbatch", 'echo "Submitted batch job 7"')
    fake("scontrol", 'echo "MaxArraySize = 1001"')
    submit_array([toy_task(tmp_path, "a")], profile, "kv")
    (path,) = ledger(tmp_path).jobs.glob("7*_submission.sh")
    assert "--mem=" not in path.read_text()
    assert "#SBATCH --mem-per-cpu=4G" in path.read_text()
    with pytest.raises(SlurmError, match="memory_gb"):
        dask_options(profile, tmp_path)


def test_no_pickle_is_written_where_others_may_write(fake: Fake, tmp_path: Path) -> None:
    fake("srun", "")
    fake("sbatch", 'echo "Submitted batch job 7"')
    fake("scontrol", 'echo "MaxArraySize = 1001"')
    shared, own = tmp_path / "store", tmp_path / "runs" / "jobs"
    tasks = [replace(toy_task(shared, name), jobs_folder=own) for name in "ab"]
    assert submit_array(tasks, PROFILE, "kv") == ["7"]
    assert list(own.rglob("*.pkl"))
    assert {path.suffix for path in shared.rglob("*") if path.is_file()} == {".json"}
    assert own.stat().st_mode & 0o777 == 0o700
    assert [job.job_id for job in ledger(shared).submissions()] == ["7"]
    assert Task.from_json(tasks[0].to_json()) == tasks[0]


def test_extraction_keeps_its_jobs_beside_the_users_runs(tmp_path: Path) -> None:
    settings = {"store": tmp_path / "shared", "output_dir": tmp_path / "mine", "name": "run"}
    experiment = parse_experiment(template(**{k: str(v) for k, v in settings.items()}))
    found = extraction_ledger(experiment, "smollm2")
    assert found.folder == tmp_path / "shared/teachers/smollm2"
    assert found.open_jobs() == tmp_path / "mine/run.slurm/extract-smollm2"


@pytest.mark.parametrize("mode", [0o770, 0o702, 0o777])
def test_a_folder_of_jobs_that_others_may_write_is_refused(tmp_path: Path, mode: int) -> None:
    jobs = ledger(tmp_path).jobs
    jobs.mkdir()
    jobs.chmod(mode)
    with pytest.raises(SlurmError, match="chmod 700"):
        ledger(tmp_path).open_jobs()


def test_submissions_of_earlier_versions_are_found(tmp_path: Path) -> None:
    body = {"job_id": "6", "name": "kv", "submitted": 1.0, "elements": [["a"], ["b"]]}
    (tmp_path / "jobs").mkdir()
    (tmp_path / "jobs/submission-6.json").write_text(json.dumps(body))
    ledger(tmp_path).record_submission(Submission("7", "kv", 2.0, (("a",),)))
    assert [job.job_id for job in ledger(tmp_path).submissions()] == ["6", "7"]
