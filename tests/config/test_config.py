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
