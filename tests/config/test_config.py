"""An invalid config is one line that names the key; a valid one survives a round trip."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kvdistill.config.experiment import Experiment
from kvdistill.config.load import dump_experiment, load_experiment, parse_experiment
from kvdistill.errors import ConfigError
from tests.config.template import TEMPLATE, template


def test_commented_template_is_valid_and_round_trips(tmp_path: Path) -> None:
    experiment = load_experiment(TEMPLATE)
    (tmp_path / "whole.yaml").write_text(dump_experiment(experiment), encoding="utf-8")
    assert load_experiment(tmp_path / "whole.yaml") == experiment


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"corpus__pth": "x"}, ["unknown key corpus.pth", "did you mean 'path'"]),
        ({"teachers__smollm2__laers": [1]}, ["teachers.smollm2.laers", "'layers'"]),
        ({"losses__keys": 1}, ["losses.keys", "'key'"]),
        ({"zzz": 1}, ["unknown key zzz", "known keys", "teachers"]),
        ({"training__epochs": "many"}, ["training.epochs", "'many'"]),
        ({"training__batch_size": 0}, ["training.batch_size", "greater than 0"]),
        ({"extraction__backend": "hdf5"}, ["extraction.backend", "zarr"]),
        ({"corpus__dataset": "openai/gsm8k"}, ["corpus", "exactly one"]),
        ({"student__model": "gpt2"}, ["student", "exactly one"]),
        ({"fusion__weights": {"smollm2": 1.0, "gpt4": 1.0}}, ["gpt4", "minilm"]),
        ({"fusion__weights": {"smollm2": 1.0}}, ["no weight", "minilm"]),
        ({"fusion__balance": {"factors": {"gpt4": 1.0}}}, ["balance.factors", "gpt4", "minilm"]),
        ({"fusion__balance": {"spans": {"minilm": [0.5, 0.5]}}}, ["spans.minilm", "start < end"]),
        (
            {"fusion__balance": {"method": "pcgrad"}, "losses__cosine": 1},
            ["fusion.balance", "losses.cosine", "leave"],
        ),
        (
            {"fusion__balance": {"spans": {"minilm": [0, 1]}}, "projection__mode": "frozen"},
            ["fusion.balance", "student_to_teacher", "another mode"],
        ),
        ({"projection": {"mode": "frozen", "hidden": 8}}, ["hidden", "frozen", "bottleneck"]),
        ({"fusion__weights": {"smollm2": 0, "minilm": 0}}, ["fusion.weights", "0"]),
        ({"teachers": {}}, ["at least one teacher"]),
        ({"name": "../escape"}, ["name"]),
    ],
)
def test_invalid_config_is_one_line(changes: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_experiment(template(**changes))
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


def pretrained(**changes: Any) -> Experiment:
    """The template with a pretrained student, and only what ``changes`` states."""
    body = template(student={"model": "org/pretrained"}, losses={}, training={})
    body.pop("projection", None)
    for dotted, value in changes.items():
        section, key = dotted.split("__")
        body.setdefault(section, {})[key] = value
    return parse_experiment(body)


def rates(experiment: Experiment) -> tuple[float | None, ...]:
    training, losses = experiment.training, experiment.losses
    rate, own = training.learning_rate, experiment.projection.learning_rate
    return rate, training.warmup_steps, losses.key, losses.value, own


def test_a_pretrained_student_has_defaults_of_its_own() -> None:
    assert rates(pretrained()) == (1e-4, 0.1, 0.3, 0.3, 1e-3)
    assert rates(pretrained(student__lora={})) == (5e-4, 0.1, 0.3, 0.3, 1e-3)
    assert rates(pretrained(training__schedule="constant")) == (1e-4, 0, 0.3, 0.3, 1e-3)
    scratch = parse_experiment(template(losses={}, training={}))
    assert rates(scratch) == (1e-3, 0, 3, 3, None)
    assert (scratch.first_projection, pretrained().first_projection) == ("grouped_mean", "ridge")
    assert (scratch.fitted, pretrained().fitted) == (None, "ridge")


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("training__learning_rate", 1e-3),  # the default of a student from scratch, but stated
        ("training__warmup_steps", 0),
        ("training__warmup_steps", 7),
        ("losses__key", 3.0),
        ("projection__learning_rate", 1e-4),
        ("projection__init", "grouped_mean"),
    ],
)
def test_what_is_stated_wins_over_the_student_s_defaults(setting: str, value: Any) -> None:
    experiment = pretrained(**{setting: value})
    section, key = setting.split("__")
    assert getattr(getattr(experiment, section), key) == value
    assert parse_experiment(experiment.model_dump(mode="json")) == experiment
    if key == "init":
        assert experiment.fitted is None


def test_a_preset_wins_over_the_student_s_defaults() -> None:
    body = template(student={"model": "org/pretrained"}, losses={}, training={}, preset="kava")
    body["alignment"] = {}
    experiment = parse_experiment(body)
    assert (experiment.losses.key, experiment.training.learning_rate) == (0.5, 1e-4)


@pytest.mark.parametrize(
    ("changes", "scratch", "ours"),
    [
        ({"projection__mode": "frozen"}, "pca", "ridge"),
        ({"projection__mode": "joint"}, None, "ridge"),
        ({"projection__mode": "joint", "projection__method": "bottleneck"}, None, None),
        ({"projection__mode": "shared_space", "losses__round_trip": 1.0}, None, "ridge"),
        ({"projection__init": "pca"}, None, None),  # heads have none, and nothing is projected
        ({"projection__init": "pca", "losses__inject": 1.0}, "pca", "pca"),
        ({"projection__init": "ridge"}, "ridge", "ridge"),
        ({"losses__key": 0, "losses__value": 0}, None, None),
    ],
)
def test_what_is_fitted_before_the_first_step(
    changes: dict[str, Any], scratch: str | None, ours: str | None
) -> None:
    assert pretrained(**changes).fitted == ours
    body = pretrained(**changes).model_dump(mode="json")
    assert parse_experiment(body | {"student": template()["student"]}).fitted == scratch


def test_a_mode_without_a_closed_form_refuses_one() -> None:
    with pytest.raises(ConfigError, match="init ridge has no closed form for mode identity"):
        pretrained(projection__mode="identity", projection__init="ridge")
    with pytest.raises(ConfigError, match="init pca does not fit mode shared_space; use ridge"):
        pretrained(projection__mode="shared_space", projection__init="pca", losses__round_trip=1.0)


def test_a_fraction_of_steps_is_a_warm_up() -> None:
    assert pretrained(training__warmup_steps=0.25).training.warmup_steps == 0.25
    with pytest.raises(ConfigError) as caught:
        pretrained(training__warmup_steps=1.5)
    assert "training.warmup_steps" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_section_is_named() -> None:
    body = template()
    del body["student"]
    with pytest.raises(ConfigError, match="student is required"):
        parse_experiment(body)


def test_overrides_replace_and_add() -> None:
    experiment = load_experiment(
        TEMPLATE, ["training.epochs=2", "extraction.codec.key=bf16", "corpus.eval_samples=0"]
    )
    assert experiment.training.epochs == 2
    assert experiment.codec("smollm2").key == "bf16"
    assert experiment.codec("smollm2").value == "int8"


@pytest.mark.parametrize("override", ["training.epochs", "=3", "name.x=1", "name=[1"])
def test_invalid_override_is_named(override: str) -> None:
    with pytest.raises(ConfigError, match="--set"):
        load_experiment(TEMPLATE, [override])


@pytest.mark.parametrize("content", ["- a\n- b\n", "a: [", "just text"])
def test_file_without_a_mapping_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "bad.yaml").write_text(content, encoding="utf-8")
    with pytest.raises(ConfigError, match=r"bad\.yaml"):
        load_experiment(tmp_path / "bad.yaml")


def test_missing_file_names_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="kvdistill init"):
        load_experiment(tmp_path / "none.yaml")


def test_every_field_of_the_schema_is_described() -> None:
    definitions = Experiment.model_json_schema()["$defs"]
    bare = [
        f"{name}.{key}"
        for name, section in definitions.items()
        if name.endswith(("Config", "Profile"))
        for key, field in section["properties"].items()
        if not field.get("description")
    ]
    assert bare == []
