"""Former names of settings work wherever a setting can be given, with one warning."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from kvdistill.config.base import RENAMED, log_once
from kvdistill.config.load import dump_experiment, flatten, load_experiment, parse_experiment
from kvdistill.config.study import AblationConfig
from kvdistill.errors import ConfigError
from kvdistill.pipelines.run_folder import begin
from tests.config.template import TEMPLATE, template

FORMER = [pytest.param(old, new, id=old) for old, new in RENAMED.items()]


@pytest.mark.parametrize(("old", "new"), FORMER)
def test_former_key_works_in_files_and_overrides_with_one_warning(
    old: str, new: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    log_once.cache_clear()
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


def test_override_under_either_name_replaces_the_value_of_the_file(
    tmp_path: Path,
) -> None:
    path = tmp_path / "file.yaml"
    for key, override in (("fade_by", "anneal_by"), ("anneal_by", "fade_by")):
        path.write_text(yaml.safe_dump(template(**{f"losses__{key}": 0.5})))
        assert load_experiment(path, [f"losses.{override}=1.0"]).losses.anneal_by == 1.0


def test_key_given_under_both_names_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"fade_by is the former name of losses\.anneal_by"):
        parse_experiment(template(losses__fade_by=0.5, losses__anneal_by=0.6))


def test_studies_accept_former_keys_everywhere() -> None:
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


def test_earlier_run_with_former_keys_continues_without_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    log_once.cache_clear()
    changes = {"losses__anneal_by": 0.5, "training__prefetch_threads": 3}
    experiment = parse_experiment(template(output_dir=str(tmp_path), **changes))
    folder = begin(experiment)
    written = folder.config.read_text(encoding="utf-8")
    for old, new in RENAMED.items():
        assert f"{new.rpartition('.')[2]}:" in written
        written = written.replace(f"{new.rpartition('.')[2]}:", f"{old.rpartition('.')[2]}:")
    folder.config.write_text(written, encoding="utf-8")
    assert begin(experiment).path == folder.path
    assert caplog.records == []
