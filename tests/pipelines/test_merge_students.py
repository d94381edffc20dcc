"""The average of students: its weights, its folder, and which students have none."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from transformers import AutoModelForCausalLM, AutoTokenizer

from kvdistill.cli import cli
from kvdistill.errors import ConfigError, KVDistillError, StudentError
from kvdistill.pipelines.merge_students import merge_students
from kvdistill.pipelines.run_folder import RunFolder
from kvdistill.pipelines.train import train
from kvdistill.store.commit import folder_fault
from tests.pipelines.tiny import variant


@pytest.fixture(scope="module")
def runs(extracted: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two branches of one student, a teacher each, and one whose record names another start."""
    folder = tmp_path_factory.mktemp("branches")
    common = {"training__max_steps": 2, "training__eval_steps": None}
    arms = [
        {"name": "one", "fusion__weights": {"llama": 1, "bert": 0}},
        {"name": "two", "fusion__weights": {"llama": 0, "bert": 1}},
    ]
    found = [train(variant(extracted, folder, **common, **arm)).folder for arm in arms]
    other = RunFolder(shutil.copytree(found[1], folder / "other-start"))
    record = other.read_record()
    assert record["controls"] | {"initial_student": "0"} != record["controls"]
    record["controls"]["initial_student"] = "0"
    other.write_record(record)
    return [*found, other.path]


def state(folder: Path) -> dict[str, torch.Tensor]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    return dict(model.state_dict())


def copy(run: Path, to: Path, change: Callable[[torch.nn.Module], object], **options: str) -> Path:
    """A student's folder with a changed model, no run around it."""
    model = AutoModelForCausalLM.from_pretrained(run / "student", dtype="auto")
    change(model)
    model.save_pretrained(to, **options)
    AutoTokenizer.from_pretrained(run / "student").save_pretrained(to)
    return to


def test_an_average_of_two_branches_is_an_ordinary_student(
    runs: list[Path], tmp_path: Path
) -> None:
    output = tmp_path / "new" / "merged"
    done = CliRunner().invoke(
        cli,
        ["merge-students", str(runs[0]), str(runs[1] / "student"), "--weights", "3,1", "--out",
         str(output)],
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    one, two, merged = (state(path) for path in (runs[0] / "student", runs[1] / "student", output))
    assert any(not torch.equal(one[name], two[name]) for name in one)
    for name, found in merged.items():
        torch.testing.assert_close(found, 0.75 * one[name] + 0.25 * two[name])
    assert folder_fault(output) is None
    written = {path.name for path in output.iterdir()}
    assert written == {p.name for p in (runs[0] / "student").iterdir()} - {
        "projectors.safetensors", "stream.json", "recent_losses.json"
    }  # fmt: skip
    card = (output / "README.md").read_text()
    assert "0.75" in card
    assert "# merged" in card
    assert AutoTokenizer.from_pretrained(output)("How").input_ids


def test_dtype_and_files_are_kept_and_equal_students_stay_equal(
    runs: list[Path], tmp_path: Path
) -> None:
    parts = [
        copy(run, tmp_path / run.name, lambda m: m.bfloat16(), max_shard_size="20KB")
        for run in runs[:2]
    ]
    output = merge_students(parts, [], tmp_path / "merged")
    assert len(list(output.glob("*.safetensors"))) > 1
    one, two, merged = (state(path) for path in (*parts, output))
    for name, found in merged.items():
        assert found.dtype == torch.bfloat16
        exact = (one[name].double() + two[name].double()) / 2
        assert torch.equal(found, exact.bfloat16())
    same = merge_students([parts[0]] * 3, [], tmp_path / "same")
    assert all(torch.equal(x, one[name]) for name, x in state(same).items())


def test_students_of_another_start_are_refused(
    runs: list[Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(StudentError, match="initial weights") as caught:
        merge_students([runs[0], runs[2]], [], tmp_path / "merged")
    assert len(str(caught.value)) <= 500
    apart = shutil.copytree(runs[2] / "student", tmp_path / "moved")  # nothing tells where it began
    assert merge_students([runs[0], apart], [], tmp_path / "merged").is_dir()
    assert "moved: its initial weights are not known" in caplog.text


def narrow(model: torch.nn.Module) -> None:
    layer = model.model.layers[0].mlp
    layer.up_proj.weight.data = layer.up_proj.weight.data[:-1].clone()


def another_base(model: torch.nn.Module) -> None:
    model.config.rope_parameters["rope_theta"] = 5e5


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (narrow, ["up_proj", "[24, 16]", "[23, 16]"]),
        (another_base, ["rope_theta", "500000.0"]),
        (lambda model: model.bfloat16(), ["dtype", "bfloat16"]),
    ],
)
def test_students_that_differ_are_refused_in_one_line(
    runs: list[Path], tmp_path: Path, change: Callable[[torch.nn.Module], object], words: list[str]
) -> None:
    other = copy(runs[1], tmp_path / "other", change)
    with pytest.raises(StudentError) as caught:
        merge_students([runs[0], other], [], tmp_path / "merged")
    message = str(caught.value)
    assert "\n" not in message
    assert "one checkpoint" in message
    assert all(word in message for word in words), message
    assert not (tmp_path / "merged").exists()


def test_another_vocabulary_is_refused(runs: list[Path], tmp_path: Path) -> None:
    other = copy(runs[1], tmp_path / "other", lambda _: None)
    text = (other / "tokenizer.json").read_text()
    (other / "tokenizer.json").write_text(text.replace('"Ġ', '"ĠĠ', 1))
    with pytest.raises(StudentError, match=r"vocabulary is '500 tokens"):
        merge_students([runs[0], other], [], tmp_path / "merged")


def test_bad_input_is_one_line(runs: list[Path], tmp_path: Path) -> None:
    cut = copy(runs[0], tmp_path / "cut", lambda _: None)
    weights = (cut / "model.safetensors").read_bytes()
    (cut / "model.safetensors").write_bytes(weights[:40])
    bare = copy(runs[0], tmp_path / "bare", lambda _: None)
    (bare / "config.json").write_text("[" * 20_000)
    (tmp_path / "there").mkdir()
    cases: list[tuple[type[KVDistillError], str, list[Path], list[float], str]] = [
        (ConfigError, "1 students", runs[:1], [], "merged"),
        (ConfigError, "2 students", runs[:2], [1.0], "merged"),
        (ConfigError, "not all 0", runs[:2], [0.0, 0.0], "merged"),
        (ConfigError, "nan", runs[:2], [1.0, float("nan")], "merged"),
        (StudentError, "already exists", runs[:2], [], "there"),
        (StudentError, "no config.json", [runs[0], tmp_path], [], "merged"),
        (StudentError, "restore", [runs[0], cut], [], "merged"),
        (StudentError, "restore", [runs[0], bare], [], "merged"),
    ]
    for kind, words, students, given, name in cases:
        with pytest.raises(kind, match=words) as caught:
            merge_students(students, given, tmp_path / name)
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "merged").exists()
    arguments = [*map(str, runs[:2]), "--weights", "a,b", "--out", "x"]
    done = CliRunner().invoke(cli, ["merge-students", *arguments])
    assert done.exit_code == 2
    assert "0.7,0.3" in done.output
