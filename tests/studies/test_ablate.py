"""Studies: arms times seeds, what they may differ in, and runs that are never computed twice."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from kvdistill.cli import cli
from kvdistill.config.load import load_experiment
from kvdistill.errors import (
    ConfigError,
    ControlError,
    IncompleteStore,
    KVDistillError,
    StoreNotFound,
)
from kvdistill.pipelines.extract import extract
from kvdistill.studies.controls import check_records, check_settings
from kvdistill.studies.design import StudyDesign, load_study, write_record

OFF = {"losses.key": 0, "losses.value": 0}
TINY = {"max_steps": 3, "batch_size": 2, "max_length": 48, "learning_rate": 1e-2, "device": "cpu"}


@pytest.fixture
def study(extracted: Path, tmp_path: Path) -> Any:
    """Writes a study over the extracted store; returns its path."""

    def write(changes: dict[str, Any] | None = None, **body: Any) -> Path:
        experiment = yaml.safe_load(extracted.read_text(encoding="utf-8"))
        experiment |= {"output_dir": str(tmp_path / "runs"), "training": TINY}
        experiment |= changes or {}
        (tmp_path / "experiment.yaml").write_text(yaml.safe_dump(experiment, sort_keys=False))
        whole = {"name": "study", "experiment": "experiment.yaml", "seeds": [0, 1], **body}
        path = tmp_path / "study.yaml"
        path.write_text(yaml.safe_dump(whole, sort_keys=False))
        return path

    return write


def checked(path: Path) -> StudyDesign:
    design = load_study(path)
    check_settings(design)
    return design


def invoke(*arguments: str) -> Any:
    result = CliRunner().invoke(cli, ["ablate", *arguments])
    if result.exception is not None and isinstance(result.exception, KVDistillError):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result


def test_arms_times_seeds_seed_by_seed(study: Any) -> None:
    design = checked(study(arms={"alone": {"teachers": [], "settings": OFF}, "both": {}}))
    assert [run.name for run in design.runs] == ["alone-s0", "both-s0", "alone-s1", "both-s1"]
    assert [run.experiment.seed for run in design.runs] == [0, 0, 1, 1]
    assert design.baseline == "alone"
    assert not design.runs[0].experiment.teachers
    assert design.folder.name == "study"


def test_a_grid_is_every_combination(study: Any) -> None:
    grid = {"losses.key": [1, 3], "projection.mode": ["frozen", "student_to_teacher"]}
    design = checked(study(grid=grid, arms={"none": {"teachers": [], "settings": OFF}}))
    assert set(design.arms) == {
        "none",
        *(f"key-{key}_mode-{mode}" for key in (1, 3) for mode in grid["projection.mode"]),
    }
    run = design.of_arm("key-3_mode-frozen")[1]
    assert run.experiment.losses.key == 3
    assert run.experiment.projection.mode == "frozen"


def test_eight_arms(study: Any) -> None:
    path = study(changes={"extraction": {"summaries": True}}, preset="eight-arms")
    design = checked(path)
    assert list(design.arms) == [
        "cross-entropy", "single-llama", "single-bert", "multi-fixed", "multi-similarity",
        "multi-learnable", "placebo-shuffled", "placebo-untrained", "placebo-noise",
    ]  # fmt: skip
    placebos = {name for name, arm in design.arms.items() if arm.placebo}
    assert placebos == {"placebo-shuffled", "placebo-untrained", "placebo-noise"}
    assert not design.of_arm("cross-entropy")[0].experiment.losses.uses_teachers
    untrained = design.of_arm("placebo-untrained")[0].experiment.teachers
    assert {name: teacher.weights for name, teacher in untrained.items()} == {
        "llama-untrained": "random",
        "bert-untrained": "random",
    }
    every = design.experiment_of_all_teachers().teachers
    assert set(every) == {"llama", "bert", "llama-untrained", "bert-untrained"}


def test_leave_one_out_renormalises_given_weights(study: Any) -> None:
    changes = {"fusion": {"weights": {"llama": 0.75, "bert": 0.25}}}
    design = checked(study(changes=changes, preset="leave-one-out"))
    assert list(design.arms) == ["all", "without-llama", "without-bert"]
    left = design.of_arm("without-llama")[0].experiment
    assert set(left.teachers) == {"bert"}
    assert left.fusion.weights == {"bert": 0.25}


def test_baselines_need_predictions(study: Any) -> None:
    with pytest.raises(ConfigError, match=r"stores none; set extraction.logits"):
        load_study(study(preset="baselines"))
    changes = {"extraction": {"logits": 4}, "losses": {"relation": 0.5, "logits": 2}}
    design = checked(study(changes=changes, preset="baselines"))
    weights = {
        name: {k: v for k, v in design.of_arm(name)[0].experiment.losses.weights().items() if v}
        for name in design.arms
    }
    kv = {"key": 3.0, "value": 3.0, "relation": 0.5}
    text, logits = {"cross_entropy": 1.0}, {"cross_entropy": 1.0, "logits": 2.0}
    assert weights == {
        "cross-entropy": text, "logits": logits, "kv": kv | text, "kv-and-logits": kv | logits,
        "logits-shuffled": logits,
    }  # fmt: skip
    assert [name for name, arm in design.arms.items() if arm.placebo] == ["logits-shuffled"]
    changes["extraction"]["hidden"], changes["losses"]["hidden"] = True, 0.5
    design = checked(study(changes=changes, preset="baselines"))
    weights["hidden"] = text | {"hidden": 0.5}
    for name, arm in weights.items():
        found = design.of_arm(name)[0].experiment.losses.weights()
        assert {k: v for k, v in found.items() if v} == arm


def test_e1_to_e5_needs_a_latent_student(study: Any) -> None:
    with pytest.raises(ConfigError, match="latent"):
        load_study(study(preset="E1-E5"))
    latent = {
        "latent": {"num_latents": 4, "projector_width": 8},
        "alignment": {"time": "latent"},
        "projection": {"mode": "identity"},
    }
    design = checked(study(changes=latent, preset="E1-E5"))
    methods = [
        run.experiment.latent.eviction.method for run in design.runs[:5] if run.experiment.latent
    ]
    assert methods == ["rkv", "uniform", "right_crop", "rkv", "rkv"]
    assert design.arms["E5-shuffled"].placebo


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("training.max_steps", 5),
        ("training.learning_rate", 0.5),
        ("student.architecture.hidden_size", 32),
        ("corpus.eval_samples", 3),
        ("seed", 3),
    ],
)
def test_an_arm_may_not_touch_a_control(study: Any, setting: str, value: Any) -> None:
    arms = {"a": {}, "b": {"settings": {setting: value}}}
    with pytest.raises(ControlError, match=setting.rsplit(".", maxsplit=1)[-1]):
        checked(study(arms=arms))


def test_what_is_studied_may_differ_if_it_is_declared(study: Any) -> None:
    arms = {"a": {}, "b": {"settings": {"training.learning_rate": 0.5}}}
    design = checked(study(arms=arms, may_differ=["training.learning_rate"]))
    assert design.of_arm("b")[0].experiment.training.learning_rate == 0.5


def test_a_difference_that_nobody_stated_is_refused(study: Any) -> None:
    design = checked(study(arms={"a": {}, "b": {"settings": {"losses.key": 7}}}))
    sneaky = design.runs[1].experiment
    sneaky = sneaky.model_copy(
        update={"alignment": sneaky.alignment.model_copy(update={"causal": True})}
    )
    runs = list(design.runs)
    runs[1] = type(runs[1])("b", 0, sneaky)
    other = StudyDesign(design.config, design.body, design.folder, design.arms, tuple(runs))
    with pytest.raises(ControlError, match=r"alignment.causal.*neither states it"):
        check_settings(other)


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ({}, "needs arms"),
        ({"arms": {"a": {"settings": {"losses.keys": 1}}}}, "did you mean 'key'"),
        ({"arms": {"a": {"teachers": ["nobody"]}}}, "no teacher 'nobody'"),
        ({"arms": {"a": {}}, "baseline": "b"}, "no arm 'b'"),
        ({"arms": {"a": {"settings": {"name.x": 1}}}}, "not a section"),
        ({"arms": {"a": {}}, "seeds": [1, 1]}, "duplicate"),
    ],
)
def test_a_wrong_study_is_one_clear_line(study: Any, body: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says) as caught:
        load_study(study(**body))
    assert "\n" not in str(caught.value)


def test_a_study_runs_records_itself_and_computes_nothing_twice(study: Any) -> None:
    arms = {
        "alone": {"teachers": [], "settings": OFF, "description": "no teacher"},
        "shuffled": {"settings": {"placebo.method": "shuffled"}, "placebo": True},
    }
    path = study(arms=arms)
    printed = invoke(str(path), "--arm", "alone").output
    design = load_study(path)
    assert f"report: {design.folder / 'report.html'}" in printed
    assert "How good is the student of alone?" in (design.folder / "report.html").read_text()
    assert [run.name for run in design.missing] == ["shuffled-s0", "shuffled-s1"]
    alone = design.runs[0].folder.record.read_bytes()
    printed = json.loads(invoke(str(path), "--json").output.splitlines()[-1])
    assert set(printed["metrics"]) == {run.name for run in design.runs}
    assert design.runs[0].folder.record.read_bytes() == alone
    record = json.loads((design.folder / "ablation.json").read_text())
    assert record["baseline"] == "alone"
    assert [(arm["name"], arm["placebo"]) for arm in record["arms"]] == [
        ("alone", False),
        ("shuffled", True),
    ]
    assert record["arms"][1]["runs"][1] == {"seed": 1, "path": "shuffled-s1"}
    _check_what_runs_recorded(design)


def test_a_run_does_not_depend_on_those_before_it_in_the_process(study: Any) -> None:
    arms = {"half": {"settings": {"training.precision": "bfloat16"}}, "full": {}}
    whole = {"arms": arms, "may_differ": ["training.precision"], "seeds": [0]}
    found = []
    for name, arguments in (("alone", ["--arm", "full"]), ("after", [])):
        path = study(name=name, **whole)
        invoke(str(path), *arguments)
        folder = load_study(path).of_arm("full")[0].folder
        rows = [json.loads(line) for line in folder.log.read_text().splitlines()]
        timed = ("time", "train_runtime", "train_samples_per_second", "train_steps_per_second")
        found.append([{k: v for k, v in row.items() if k not in timed} for row in rows])
        assert [*(folder.path / "tensorboard").glob("events*")]
    assert found[0] == found[1]


def _check_what_runs_recorded(design: StudyDesign) -> None:
    records = {run.name: run.folder.read_record() for run in design.runs}
    of_seed = [
        {n: r["controls"] for n, r in records.items() if n.endswith(s)} for s in ("s0", "s1")
    ]
    for controls in of_seed:
        assert len({json.dumps(found) for found in controls.values()}) == 1
    first, second = (next(iter(controls.values())) for controls in of_seed)
    assert first["initial_student"] != second["initial_student"]
    assert first["order"] != second["order"]
    assert first["corpus"] == second["corpus"]
    assert all(record["peak_memory_bytes"] > 1e6 for record in records.values())


def test_runs_that_started_from_other_students_are_not_compared(study: Any) -> None:
    design = checked(study(arms={"a": {}, "b": {"settings": {"losses.key": 7}}}, seeds=[0]))
    for run, student in zip(design.runs, ("one", "other"), strict=True):
        run.folder.path.mkdir(parents=True)
        run.folder.write_record({"finished": True, "controls": {"initial_student": student}})
    with pytest.raises(ControlError, match="initial student is other in run b-s0 and one"):
        check_records(design)


def test_a_finished_run_of_other_settings_is_refused(study: Any) -> None:
    invoke(str(study(arms={"a": {}}, seeds=[0])))
    changed = study(arms={"b": {}, "a": {"settings": {"losses.key": 9}}}, seeds=[0])
    with pytest.raises(ConfigError, match=r"losses.key=.*, this config has 9"):
        invoke(str(changed))


def test_a_missing_teacher_is_named_and_can_be_extracted(study: Any, tmp_path: Path) -> None:
    model = yaml.safe_load((study(arms={"a": {}}).parent / "experiment.yaml").read_text())
    llama = {"model": model["teachers"]["llama"]["model"]}
    changes = {"store": str(tmp_path / "store"), "teachers": {"llama": llama}}
    arms = {"llama": {}, "twin": {"teachers": ["twin"]}}
    path = study(
        changes=changes, arms=arms, teachers={"twin": {**llama, "weights": "random"}}, seeds=[0]
    )
    with pytest.raises(StoreNotFound, match="--extract"):
        invoke(str(path))
    extract(load_experiment(tmp_path / "experiment.yaml"))
    with pytest.raises(IncompleteStore, match=r"teacher 'twin'.*--extract"):
        invoke(str(path))
    invoke(str(path), "--extract", "--arm", "twin")
    assert [run.name for run in load_study(path).missing] == ["llama-s0"]


def test_a_dry_run_writes_nothing(study: Any, tmp_path: Path) -> None:
    output = invoke(str(study(arms={"a": {}})), "--dry-run").output
    assert "1 arms × seeds 0, 1: 2 runs, 2 to do" in output
    assert not (tmp_path / "runs").exists()


def test_several_runs_at_a_time(study: Any) -> None:
    path = study(arms={"a": {}, "b": {"settings": {"losses.key": 7}}}, seeds=[0])
    invoke(str(path), "--workers", "2")
    assert load_study(path).missing == []
    assert write_record(load_study(path)).is_file()
