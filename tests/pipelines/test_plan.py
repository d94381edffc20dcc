from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from kvdistill.commands.prepare import fetch_command, plan_command
from kvdistill.config.load import dump_experiment, load_experiment, parse_experiment
from kvdistill.corpus.samples import Sample
from kvdistill.errors import TeacherError
from kvdistill.extract.extract_shard import ExtractedShard, extract_samples
from kvdistill.extract.teacher import Teacher
from kvdistill.pipelines import plan
from kvdistill.pipelines.extract import extract
from kvdistill.pipelines.fetch import fetch, needs
from kvdistill.pipelines.outlook import savings
from kvdistill.pipelines.plan import DISK_MARGIN, estimate_extraction
from kvdistill.store.reader import KVStore
from tests.extract.models import BASE, save_teacher
from tests.pipelines.test_teachers import make

ROWS = "".join(
    f'{{"prompt": "Ann has {i} apples.", "rationale": "{"So she has more. " * (i % 4)}{i}.", '
    f'"answer": "{i}"}}\n'
    for i in range(1, 25)
)


def test_the_projection_is_what_extraction_then_makes(tmp_path: Path) -> None:
    save_teacher(tmp_path / "t")
    experiment = make(tmp_path, {}, ROWS)
    projected = estimate_extraction(experiment, num_samples=24, num_sized=24)
    (teacher,) = projected.teachers
    extract(experiment)
    store = KVStore.open(experiment.store)
    table = store.read_shard("t", store.shard_ids[0]).tokens
    assert teacher.tokens == table.num_tokens
    size = sum(
        file.stat().st_size for file in store.paths.shard("t", "00000").rglob("*") if file.is_file()
    )
    assert teacher.gigabytes["int8"] == pytest.approx(size / 1e9, rel=0.05)
    assert set(teacher.gigabytes) == {"bf16", "fp16", "int8", "int4", "fp8_e4m3"}
    assert teacher.gigabytes["int4"] < teacher.gigabytes["int8"] < teacher.gigabytes["bf16"]
    assert teacher.lengths[1.0] == max(table.sample_ptr[1:] - table.sample_ptr[:-1])
    rationales = [(table.segment[table.span(i)] == 2).sum() for i in range(24)]
    assert teacher.touched[16] == sum(n > 16 for n in rationales) / 24
    assert teacher.hours == pytest.approx(teacher.tokens / teacher.tokens_per_second / 3600)
    assert projected.needed_gigabytes == pytest.approx(DISK_MARGIN * teacher.gigabytes["int8"])
    assert projected.fits
    assert projected.shards == 1


def test_the_rate_is_that_of_a_warm_model_and_of_full_batches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_teacher(tmp_path / "t")
    experiment = make(tmp_path, {}, ROWS)
    extraction = experiment.extraction.model_copy(update={"batch_tokens": 300})
    experiment, calls = experiment.model_copy(update={"extraction": extraction}), []

    def record(teacher: Teacher, samples: Sequence[Sample], **kwargs: Any) -> ExtractedShard:
        calls.append(extract_samples(teacher, samples, **kwargs))
        return calls[-1]

    monkeypatch.setattr(plan, "extract_samples", record)
    (teacher,) = estimate_extraction(experiment, 24, 2).teachers
    warm_up, timed = calls
    assert 0 < warm_up.num_read < 50
    assert timed.num_read >= 200
    assert teacher.tokens_per_second == timed.num_read / timed.seconds


@pytest.mark.parametrize(
    "codec",
    [
        {"key": "int4", "value": "int4"},
        {"key": "klt", "value": "klt", "key_bits": 3, "value_bits": 4, "pilot_tokens": 1000},
    ],
    ids=["int4", "klt"],
)
def test_the_size_of_a_codec_does_not_depend_on_the_configured_one(
    tmp_path: Path, codec: dict[str, Any]
) -> None:
    """Of int4 it would: compressed codes of values that were decoded from coarser ones."""
    save_teacher(tmp_path / "t")
    sizes = [
        estimate_extraction(make(tmp_path, {"codec": chosen}, ROWS), 24, 24).teachers[0].gigabytes
        for chosen in ({"key": "int8", "value": "int8"}, codec)
    ]
    for name in ("bf16", "fp16", "int8", "int4", "fp8_e4m3"):
        assert sizes[0][name] == pytest.approx(sizes[1][name], rel=0.01)


def test_a_few_samples_stand_for_all(tmp_path: Path) -> None:
    save_teacher(tmp_path / "t")
    experiment = make(tmp_path, {}, ROWS)
    (whole,) = estimate_extraction(experiment, 24, 2).teachers
    (part,) = estimate_extraction(experiment, 8, 2).teachers
    assert part.tokens == pytest.approx(whole.tokens, rel=0.15)


def test_long_texts_and_the_students_tokenizer(tmp_path: Path) -> None:
    save_teacher(tmp_path / "t")
    experiment = make(tmp_path, {}, ROWS, max_length=30)
    student = experiment.student.model_copy(update={"model": str(tmp_path / "t")})
    (teacher,) = estimate_extraction(experiment.model_copy(update={"student": student})).teachers
    assert 0 < teacher.too_long < 1
    assert teacher.alignment is not None
    assert teacher.alignment.coverage == teacher.alignment.one_to_one_rate == 1.0
    assert teacher.mapped_layers == (0, 1, 2)
    nothing = estimate_extraction(experiment).teachers[0]
    assert (nothing.alignment, nothing.mapped_depths) == (None, None)  # no such tokenizer


@pytest.mark.parametrize(("num_layers", "layers"), [(1, [0]), (2, [0, 2, 3]), (5, [])])
def test_layers_that_the_student_does_not_read_are_said(
    tmp_path: Path, num_layers: int, layers: list[int]
) -> None:
    """Storing them alone, as the plan says, gives the map of the whole store."""
    save_teacher(tmp_path / "t", num_hidden_layers=5)
    body = make(tmp_path, {}, ROWS).model_dump(mode="json")
    architecture = {**BASE, "model_type": "llama", "num_hidden_layers": num_layers}
    body["student"] = {"tokenizer": str(tmp_path / "t"), "architecture": architecture}
    config = tmp_path / "e.yaml"
    config.write_text(yaml.safe_dump(body), encoding="utf-8")
    output = CliRunner().invoke(plan_command, [str(config), "--sized", "2"]).output
    (whole,) = estimate_extraction(load_experiment(config), 8, 2).teachers
    said = re.search(r"teachers.t.layers to (\[.*?\])", output)
    assert (json.loads(said[1]) if said else []) == layers
    if said is None:
        return
    assert list(whole.mapped_layers) == layers
    body["teachers"]["t"]["layers"] = json.loads(said[1])
    if found := re.search(r"explicit_layers.t (\[.*\])", output):
        body["alignment"] |= {"layers": "explicit", "explicit_layers": {"t": json.loads(found[1])}}
    config.write_text(yaml.safe_dump(body), encoding="utf-8")
    (part,) = estimate_extraction(load_experiment(config), 8, 2).teachers
    assert part.mapped_depths == pytest.approx(whole.mapped_depths, abs=1e-3)
    assert part.num_layers == len(part.mapped_layers)


def test_a_disk_that_is_too_small_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_teacher(tmp_path / "t")
    config = tmp_path / "e.yaml"
    config.write_text(dump_experiment(make(tmp_path, {}, ROWS)), encoding="utf-8")
    runner = CliRunner()
    result = runner.invoke(plan_command, [str(config), "--parallel", "4", "--sized", "2"])
    assert result.exit_code == 0
    assert "does not fit" not in result.output
    full = shutil.disk_usage(tmp_path)._replace(free=1)
    monkeypatch.setattr("kvdistill.pipelines.plan.shutil.disk_usage", lambda path: full)
    result = runner.invoke(plan_command, [str(config), "--sized", "2"])
    assert "does not fit" in result.output
    arguments = [str(config), "--json", "--sized", "2", "--parallel", "64"]
    body = json.loads(runner.invoke(plan_command, arguments).output)
    assert (body["fits"], body["array_size"], body["samples"]) == (False, 1, 24)
    assert body["teachers"][0]["teacher"] == "t"


def test_fetch_knows_every_need_once_and_no_pickles(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    experiment = parse_experiment(
        {
            "store": str(tmp_path / "store"),
            "corpus": {"path": str(tmp_path / "c.jsonl")},
            "teachers": {
                "a": {"model": "org/big", "revision": "abc"},
                "b": {"model": "org/big", "revision": "abc", "template": "{text}"},
                "c": {"model": "org/quantised", "gguf_file": "q4.gguf", "tokenizer": "org/tok"},
                "d": {"model": str(tmp_path)},
            },
            "student": {"model": "org/small"},
        }
    )
    calls: list[tuple[str, str | None, tuple[str, ...]]] = []
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download",
        lambda source, revision, allow_patterns: calls.append(
            (source, revision, tuple(allow_patterns))
        ),
    )
    words: list[tuple[str, str]] = []
    fetch(experiment, lambda need, word: words.append((need.source, word)))
    assert [source for source, _, _ in calls] == [
        "org/big", "org/quantised", "org/tok", "org/small"
    ]  # fmt: skip
    assert calls[0][1] == "abc"
    assert "q4.gguf" in calls[1][2]
    assert not any("*.bin" in files or "*.py" in files for _, _, files in calls)
    assert (str(tmp_path), "on this machine") in words
    assert (str(tmp_path), "fetching") not in words
    assert len(needs(experiment)) == 5


def test_fetching_what_is_not_there_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(*args: object, **kwargs: object) -> None:
        raise OSError("offline\nfor good")

    monkeypatch.setattr("huggingface_hub.snapshot_download", gone)
    experiment = make(tmp_path, {"model": "org/nothing"})
    with pytest.raises(TeacherError, match=r"cannot fetch model 'org/nothing': offline for good"):
        fetch(experiment)
    config = tmp_path / "e.yaml"
    local = {"teachers": {"t": {"model": str(tmp_path)}}, "student": {"model": str(tmp_path)}}
    config.write_text(
        dump_experiment(parse_experiment(experiment.model_dump(mode="json") | local)),
        encoding="utf-8",
    )
    result = CliRunner().invoke(fetch_command, [str(config)])
    assert "all 1 are on this machine" in result.output


def test_what_a_store_saves_follows_from_operations(tmp_path: Path) -> None:
    from transformers import AutoModel, LlamaConfig, LlamaForCausalLM

    model = AutoModel.from_pretrained(save_teacher(tmp_path / "t", num_hidden_layers=5))
    body = make(tmp_path, {}, ROWS).model_dump(mode="json")
    architecture = {**BASE, "model_type": "llama", "tie_word_embeddings": True}
    body["student"] = {"tokenizer": str(tmp_path / "t"), "architecture": architecture}
    body["training"]["epochs"] = 2
    config = tmp_path / "e.yaml"
    config.write_text(yaml.safe_dump(body), encoding="utf-8")
    experiment = load_experiment(config)
    found = savings(experiment)
    extract(experiment)
    tokens = KVStore.open(experiment.store).token_table("t", "00000").num_tokens
    size = model.num_parameters() - model.get_input_embeddings().weight.numel()
    assert found.read == pytest.approx(2 * size * tokens, rel=0.03)
    vocabulary = model.config.vocab_size
    options = {k: v for k, v in architecture.items() if k != "model_type"}
    student = LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, **options))  # the head counts
    assert found.trained == pytest.approx(6 * student.num_parameters() * 2 * tokens, rel=0.05)
    for runs in (1, 8):
        live = runs * (2 * found.read + found.trained)
        cached = 1.1 * found.read + runs * found.trained
        assert found.ratio(runs) == pytest.approx(live / cached)
    assert found.ratio(found.crossover) == pytest.approx(1)
    for epochs, first in ((1, 2), (2, 1)):
        arguments = [str(config), "--sized", "2", "--set", f"training.epochs={epochs}"]
        output = CliRunner().invoke(plan_command, arguments).output
        assert f"the store pays from run {first}, " in output
    live = CliRunner().invoke(plan_command, [*arguments, "--set", "kv_source=live"]).output
    assert "pays from" not in live
