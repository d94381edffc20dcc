"""A wrong config is one clear line that names the key; a right one survives a round trip."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

import kvdistill.config
from kvdistill.config.base import RENAMED, _warn_renamed
from kvdistill.config.experiment import Experiment
from kvdistill.config.load import dump_experiment, flatten, load_experiment, parse_experiment
from kvdistill.config.study import AblationConfig
from kvdistill.errors import ConfigError

TEMPLATE = Path(kvdistill.config.__file__).with_name("experiment.yaml")


def template(**changes: Any) -> dict[str, Any]:
    body: dict[str, Any] = yaml.safe_load(TEMPLATE.read_text(encoding="utf-8"))
    for dotted, value in changes.items():
        *parents, last = dotted.split("__")
        place = body
        for parent in parents:
            place = place.setdefault(parent, {})
        place[last] = value
    return body


def test_the_commented_template_is_valid_and_round_trips(tmp_path: Path) -> None:
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
def test_a_wrong_config_is_one_line(changes: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_experiment(template(**changes))
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


def test_a_missing_section_is_named() -> None:
    body = template()
    del body["student"]
    with pytest.raises(ConfigError, match="student is required"):
        parse_experiment(body)


def test_overrides_replace_and_add(tmp_path: Path) -> None:
    experiment = load_experiment(
        TEMPLATE, ["training.epochs=2", "extraction.codec.key=bf16", "corpus.eval_samples=0"]
    )
    assert experiment.training.epochs == 2
    assert experiment.codec("smollm2").key == "bf16"
    assert experiment.codec("smollm2").value == "int8"


@pytest.mark.parametrize("override", ["training.epochs", "=3", "name.x=1", "name=[1"])
def test_a_wrong_override_names_itself(override: str) -> None:
    with pytest.raises(ConfigError, match="--set"):
        load_experiment(TEMPLATE, [override])


@pytest.mark.parametrize("content", ["- a\n- b\n", "a: [", "just text"])
def test_a_file_that_is_no_mapping_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "bad.yaml").write_text(content, encoding="utf-8")
    with pytest.raises(ConfigError, match=r"bad\.yaml"):
        load_experiment(tmp_path / "bad.yaml")


def test_a_missing_file_names_the_remedy(tmp_path: Path) -> None:
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


FORMER = [pytest.param(old, new, id=old) for old, new in RENAMED.items()]


@pytest.mark.parametrize(("old", "new"), FORMER)
def test_a_former_key_works_in_files_and_overrides_with_one_warning(
    old: str, new: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _warn_renamed.cache_clear()
    value = 0.25 if old.startswith("losses") else 7
    written = tmp_path / "old.yaml"
    written.write_text(yaml.safe_dump(template(**{old.replace(".", "__"): value})))
    for experiment in (
        load_experiment(written),
        load_experiment(TEMPLATE, [f"{old}={value}"]),
        load_experiment(written, [f"{new}={value}"]),
    ):
        assert flatten(experiment.model_dump())[new] == value
        assert new.rpartition(".")[2] in dump_experiment(experiment)
        assert old.rpartition(".")[2] + ":" not in dump_experiment(experiment)
    assert [record.getMessage() for record in caplog.records] == [
        f"setting {old} is deprecated; use {new}"
    ]


def test_an_override_by_either_name_replaces_what_the_file_gives_by_the_other(
    tmp_path: Path,
) -> None:
    path = tmp_path / "file.yaml"
    for key, override in (("fade_by", "anneal_by"), ("anneal_by", "fade_by")):
        path.write_text(yaml.safe_dump(template(**{f"losses__{key}": 0.5})))
        assert load_experiment(path, [f"losses.{override}=1.0"]).losses.anneal_by == 1.0


def test_a_key_given_under_both_names_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"fade_by is the former name of losses\.anneal_by"):
        parse_experiment(template(losses__fade_by=0.5, losses__anneal_by=0.6))


def test_a_study_may_use_former_keys_everywhere() -> None:
    config = AblationConfig.model_validate(
        {
            "name": "old",
            "experiment": {"losses": {"fade_by": 0.5}, "training": {"read_ahead": 3}},
            "arms": {"dotted": {"settings": {"losses.fade_by": 1.0}},
                     "section": {"settings": {"losses": {"inject_text": 0.1}}}},
            "may_differ": ["training.steps_ahead"],
        }
    )  # fmt: skip
    assert config.experiment == {"losses": {"anneal_by": 0.5}, "training": {"prefetch_threads": 3}}
    assert config.arms["dotted"].settings == {"losses.anneal_by": 1.0}
    assert config.arms["section"].settings == {"losses": {"inject_fraction": 0.1}}
    assert config.may_differ == ("training.prefetch_steps",)
