"""The command line: fast help, one line per error, exit codes."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

from kvdistill.cli import COMMANDS, cli

ROOT = Path(__file__).parents[2]


Command = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def kvdistill(programs: Path) -> Command:
    """Run a command, in a folder."""

    def run(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
        command = [str(programs / "kvdistill"), *arguments]
        return subprocess.run(command, capture_output=True, text=True, cwd=cwd, check=False)

    return run


def test_help_names_every_command_and_imports_nothing_heavy() -> None:
    code = (
        "import sys, runpy\n"
        "sys.argv = ['kvdistill', '--help']\n"
        "try:\n    runpy.run_module('kvdistill.cli', run_name='__main__')\n"
        "except SystemExit:\n    pass\n"
        "heavy = {'torch', 'transformers', 'numpy', 'zarr', 'pydantic'} & set(sys.modules)\n"
        "print('HEAVY', sorted(heavy))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    for name in COMMANDS:
        assert f"  {name} " in done.stdout
    assert "HEAVY []" in done.stdout


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_every_command_has_help(name: str) -> None:
    done = CliRunner().invoke(cli, [name, "--help"])
    assert done.exit_code == 0, done.stderr
    assert f"{name} [OPTIONS]" in done.stdout


def test_init_writes_the_defaults_of_a_pretrained_student(
    tmp_path: Path, kvdistill: Command
) -> None:
    from kvdistill.config.experiment import PRETRAINED
    from kvdistill.config.load import load_experiment

    done = kvdistill("init", "new.yaml", "--student", "models/smollm2", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    experiment = load_experiment(tmp_path / "new.yaml")
    assert experiment.student.model == "models/smollm2"
    written = yaml.safe_load((tmp_path / "new.yaml").read_text())
    for name, defaults in PRETRAINED.items():
        for key, value in defaults.items():
            assert getattr(getattr(experiment, name), key) == value
            assert name == "projection" or written[name][key] == value
    shown = kvdistill("config", "show", "new.yaml", cwd=tmp_path).stdout
    assert shown.endswith(
        "# fitted before step 1 on 8 batches of 8 texts: the maps of smollm2, minilm "
        "(projection.mode student_to_teacher), in closed form by ridge\n"
    )
    assert yaml.safe_load(shown) == experiment.model_dump(mode="json")


def test_init_writes_a_config_that_show_accepts(tmp_path: Path, kvdistill: Command) -> None:
    assert kvdistill("init", "new.yaml", cwd=tmp_path).returncode == 0
    shown = kvdistill("config", "show", "new.yaml", "--set", "seed=7", cwd=tmp_path)
    assert shown.returncode == 0
    assert "seed: 7" in shown.stdout
    assert "# training.fused_kernels: on a GPU with Triton\n" in shown.stdout
    assert "# dtype auto of minilm: as stored; else bfloat16 on a GPU" in shown.stdout
    shown = kvdistill("config", "show", "new.yaml", "--set", "losses.cosine=1", cwd=tmp_path)
    assert "without effect, since losses.cosine needs all layers\n" in shown.stdout
    again = kvdistill("init", "new.yaml", cwd=tmp_path)
    assert again.returncode == 1
    assert "already exists" in again.stderr


def test_schema_is_json(kvdistill: Command) -> None:
    schema = json.loads(kvdistill("config", "schema").stdout)
    assert "teachers" in schema["properties"]


def test_an_error_is_one_line_and_debug_adds_the_traceback(
    tmp_path: Path, kvdistill: Command
) -> None:
    done = kvdistill("config", "show", "none.yaml", cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert "Traceback" in kvdistill("--debug", "config", "show", "none.yaml", cwd=tmp_path).stderr


def test_gsm8k_export_from_a_local_copy_and_tokenizer_training(
    tmp_path: Path, kvdistill: Command
) -> None:
    source = ROOT / "examples/data/gsm8k_test.jsonl"
    exported = kvdistill(
        "data", "gsm8k", "out/gsm8k.jsonl", "--from", str(source), "--max-samples", "20",
        cwd=tmp_path,
    )  # fmt: skip
    assert exported.returncode == 0, exported.stderr
    rows = [json.loads(line) for line in (tmp_path / "out/gsm8k.jsonl").read_text().splitlines()]
    assert len(rows) == 20
    assert set(rows[0]) == {"sample_id", "prompt", "rationale", "answer"}
    made = kvdistill(
        "data", "tokenizer", "out/gsm8k.jsonl", "tokenizer", "--vocab-size", "400", cwd=tmp_path
    )
    assert made.returncode == 0, made.stderr
    assert (tmp_path / "tokenizer" / "tokenizer.json").is_file()
