"""`plan --disk`: what each way to store a teacher takes and costs, and what of it fits."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner

from kvdistill.commands.prepare import plan_command
from kvdistill.config.load import load_experiment
from kvdistill.corpus.samples import Sample
from kvdistill.errors import ConfigError
from kvdistill.extract.teacher import load_teacher
from kvdistill.pipelines.extract import extract
from kvdistill.pipelines.plan import DISK_MARGIN, estimate_extraction
from kvdistill.pipelines.store_options import (
    CodecTrial,
    StoreOption,
    StoreOptions,
    captured,
    would_fit,
)
from kvdistill.store.reader import KVStore
from kvdistill.types import CodecSpec
from tests.attention.families import DECODERS
from tests.extract.models import BASE, TEXTS, save_teacher
from tests.pipelines.test_plan import ROWS
from tests.pipelines.test_teachers import make

LATENT = {"latent": {"num_latents": 4}, "alignment": {"time": "latent"}}


def config_file(folder: Path, num_layers: int = 2, **sections: Any) -> Path:
    """An experiment with a teacher of five layers and a student of some."""
    save_teacher(folder / "t", num_hidden_layers=5)
    body = make(folder, {}, ROWS).model_dump(mode="json", exclude_defaults=True)
    architecture = {**BASE, "model_type": "llama", "num_hidden_layers": num_layers}
    body["student"] = {"tokenizer": str(folder / "t"), "architecture": architecture}
    (folder / "e.yaml").write_text(yaml.safe_dump(body | sections), encoding="utf-8")
    return folder / "e.yaml"


def planned(config: Path, disk: str, *more: str) -> str:
    done = CliRunner().invoke(plan_command, [str(config), "--disk", disk, "--sized", "12", *more])
    assert done.exception is None, done.output
    return done.stdout


def pasted(config: Path, output: str) -> Path:
    """The experiment with the lines that a plan gives."""
    lines = yaml.safe_load(re.split("experiment file:\n|next:", output)[1])
    body = yaml.safe_load(config.read_text())
    for name, own in lines["teachers"].items():
        body["teachers"][name] |= own
    body |= {key: value for key, value in lines.items() if key != "teachers"}
    config.with_name("pasted.yaml").write_text(yaml.safe_dump(body), encoding="utf-8")
    return config.with_name("pasted.yaml")


def rows_of(output: str) -> list[list[str]]:
    return re.findall(
        r"^ +([\d.]+)% +([\d.]+ \w*B)  (\S+(?: \S+/\S+)?) +(\w+) +(\w+) +(\w+)$", output, re.M
    )


@pytest.mark.parametrize(
    "family", ["llama", "gpt_oss, sinks", pytest.param("gemma2, sliding", marks=pytest.mark.slow)]
)
def test_the_output_is_the_models_own(tmp_path: Path, family: str) -> None:
    """Grouped heads, sinks; windows and soft caps."""
    model_type, options = DECODERS[family]
    save_teacher(tmp_path / "t", model_type, **options)
    teacher = load_teacher("t", make(tmp_path, {}, ROWS))
    seen: dict[int, torch.Tensor] = {}

    def watch(layer_idx: int) -> Any:
        return lambda _, args: seen.update({layer_idx: args[0].detach().clone()})

    for site in teacher.sites:
        site.attention.o_proj.register_forward_pre_hook(watch(site.layer_idx))
    (tokens,) = teacher.tokenise([Sample("a", (("text", TEXTS[0]),))])
    text = captured(teacher, tokens)
    exact, coarse = (
        CodecTrial(teacher, CodecSpec(key=name, value=name), None) for name in ("fp16", "int4")
    )
    for trial in (exact, coarse):
        trial.add(text)
    for layer in teacher.layers:
        own = seen[layer.layer_idx].unflatten(-1, (layer.num_key_value_heads, -1))
        output = coarse.squares[layer.layer_idx][1]
        torch.testing.assert_close(output, own.double().square().sum((0, 1, 3)), rtol=1e-3, atol=0)
        assert exact.error([layer.layer_idx]) < 2e-3
        assert 0.01 < coarse.error([layer.layer_idx]) < 0.5


def test_errors_and_sizes_are_those_of_the_store_that_is_then_made(tmp_path: Path) -> None:
    """The best that fits, pasted, takes what was said, and no more than the disk."""
    config = config_file(tmp_path)
    output = planned(config, "80kB", "--sized", "24")
    rows = rows_of(output)
    errors = [float(row[0]) for row in rows]
    assert errors == sorted(errors)
    (_, size, codec, layers, heads, tokens), *_ = rows
    assert (layers, heads, tokens) == ("mapped", "all", "all")
    experiment = load_experiment(pasted(config, output))
    assert extract(experiment).complete
    store = KVStore.open(experiment.store)
    assert list(store.teacher("t").layers) == [0, 2, 3]
    files = store.paths.shard("t", "00000").rglob("*")
    made = sum(path.stat().st_size for path in files if path.is_file())
    said = float(size.split()[0]) * 1000 / DISK_MARGIN
    assert made == pytest.approx(said, rel=0.12)
    assert made < 80_000
    (again,) = estimate_extraction(experiment, 24, 24, options=True).teachers
    own = next(x for x in again.options if x.kind == (codec, "all", "all", "all"))
    assert 100 * own.error == pytest.approx(errors[0], abs=0.02)


def test_options_rank_codecs_and_heads(tmp_path: Path) -> None:
    body = json.loads(planned(config_file(tmp_path), "1TB", "--json"))
    assert body["options"][0]["gigabytes"] > body["options"][-1]["gigabytes"]
    options = {tuple(x["kind"]): x for x in body["teachers"][0]["options"]}
    names = ["fp16", "bf16", "int8", "fp8_e4m3", "int8/int4", "klt 4.3/5.3", "klt 0.8/1.2"]
    whole = [options[name, "all", "all", "all"] for name in names]
    errors = [x["error"] for x in whole]
    assert errors == sorted(errors)
    assert errors[0] < 1e-3
    half = options["fp16", "all", "half", "all"]
    assert 0.3 < half["error"] < 0.5**0.5 + 0.01  # it lacks the quieter half of the output
    assert half["settings"]["heads"] in ([0], [1])
    assert half["gigabytes"] < 0.7 * whole[0]["gigabytes"]
    mapped, fixed = options["int8", "mapped", "all", "all"], whole[0]["fixed_gigabytes"]
    assert mapped["settings"]["layers"] == [0, 2, 3]
    assert mapped["gigabytes"] - fixed == pytest.approx(0.6 * (whole[2]["gigabytes"] - fixed))


def test_a_latent_student_needs_few_tokens(tmp_path: Path) -> None:
    config = config_file(tmp_path, **LATENT)
    output = planned(config, "35kB")
    assert {row[5] for row in rows_of(output)} == {"latent"}
    experiment = load_experiment(pasted(config, output))
    eviction = experiment.teachers["t"].eviction
    assert eviction is not None
    assert eviction.budget == 4
    assert extract(experiment).complete


def test_where_nothing_fits_what_would_is_said(tmp_path: Path) -> None:
    config = config_file(tmp_path, num_layers=5)
    output = planned(config, "38kB")
    assert "nothing fits" in output
    assert re.search(r"would fit: the same with teachers.t.layers \[0, \d.*\]", output)
    assert re.search(r"would fit: codec int4 .* keeps \d+ tokens of a text", output)
    assert "would fit: nothing" in planned(config, "1kB")
    assert "nothing to try codecs on" in planned(config, "1GB", "--set", "extraction.max_length=2")


@pytest.mark.parametrize(
    ("limit", "expected"),
    [
        (7.0, ["t.layers [0, 3, 6]", "keeps 25 tokens"]),
        (2.5, ["nothing; read a smaller corpus"]),
    ],
)
def test_fewer_layers_or_tokens_that_would_fit(limit: float, expected: list[str]) -> None:
    def option(codec: str, size: float) -> StoreOptions:
        kind = (codec, "all", "all", "all")
        own = StoreOption(kind, {}, tuple(range(7)), size / DISK_MARGIN, 3 / DISK_MARGIN, 0.1)
        return StoreOptions.of({"t": own})

    found = would_fit([option("int4", 19), option("klt 1.7/2.5", 11)], limit, 100)
    assert len(found) == len(expected)
    assert all(words in line for words, line in zip(expected, found, strict=True))


@pytest.mark.parametrize("disk", ["2 tibs", "0TB", "-1GB", "TB", "1e3GB"])
def test_a_size_that_is_none_is_one_line(tmp_path: Path, disk: str) -> None:
    (tmp_path / "e.yaml").write_text("name: a")
    with pytest.raises(ConfigError, match=r"^--disk: .* is no size; write it as 2TB") as caught:
        CliRunner().invoke(
            plan_command, [str(tmp_path / "e.yaml"), f"--disk={disk}"], catch_exceptions=False
        )
    assert len(str(caught.value)) < 200
