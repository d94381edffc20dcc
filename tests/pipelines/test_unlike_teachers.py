"""Stage 2 with teachers that are no plain decoder: encoder-decoders, and writers of their own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kvdistill.distill.data.stream import KVStream
from kvdistill.errors import ConfigError
from kvdistill.pipelines.extract import extract
from kvdistill.pipelines.run_folder import RunFolder
from kvdistill.pipelines.train import train
from kvdistill.store.reader import KVStore
from tests.attention.families import ENCODER_DECODERS
from tests.extract.models import save_teacher
from tests.pipelines.test_modes import assembled
from tests.pipelines.tiny import variant
from tests.slurm.experiment import write_experiment, write_models

SMALL = {"corpus__max_samples": 12, "corpus__eval_samples": 0, "corpus__shard_chars": 4000}


def logged(folder: Path, key: str) -> list[float]:
    rows = [json.loads(line) for line in RunFolder(folder).log.read_text().splitlines()]
    return [row[key] for row in rows if key in row]


def test_encoder_decoders_share_a_space_with_a_decoder(tmp_path: Path) -> None:
    """Phase 5: T5's encoder, BART's decoder and cross-attention, and a Llama."""
    write_models(tmp_path / "models")
    path = write_experiment(tmp_path, tmp_path / "models")
    for family in ("t5", "bart"):
        model_type, options = ENCODER_DECODERS[family]
        positions = {"max_position_embeddings": 1024} if family == "bart" else {}
        save_teacher(tmp_path / family, model_type, **{**options, **positions}, base={})
    teachers: dict[str, dict[str, Any]] = {
        "llama": {"model": str(tmp_path / "models/llama")},
        "t5-encoder": {"model": str(tmp_path / "t5"), "stream": "encoder"},
        "bart-decoder": {"model": str(tmp_path / "bart"), "stream": "decoder"},
        "bart-cross": {"model": str(tmp_path / "bart"), "stream": "cross"},
    }
    changes = {
        **SMALL, "teachers": teachers, "preset": "phase-5", "training__max_steps": 60,
        "training__log_steps": 10, "training__learning_rate": 1e-2,
    }  # fmt: skip
    extract(variant(path, tmp_path, **changes))
    run = assembled(path, tmp_path, **changes)
    causal = {space.name: space.causal for space in run.distiller.teachers}
    assert causal == {
        "llama": True, "t5-encoder": False, "bart-decoder": True, "bart-cross": False
    }  # fmt: skip
    assert isinstance(run.stream, KVStream)
    report = train(variant(path, tmp_path, **changes))
    for name in ("loss", "loss_round_trip", "loss_cross_entropy"):
        values = logged(report.folder, name)
        assert np.isfinite(values).all()
        assert values[-1] < values[0], name


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of one teacher's two own rationales per prompt; the experiment's file."""
    folder = tmp_path_factory.mktemp("own")
    write_models(folder / "models")
    path = write_experiment(folder, folder / "models")
    options = {"tie_word_embeddings": False, "initializer_range": 0.3}
    save_teacher(folder / "writer", head=True, max_position_embeddings=2048, **options)
    extract(variant(path, folder, **own(folder)))
    return path


def own(folder: Path) -> dict[str, Any]:
    teachers = {
        f"own-{draw}": {
            "model": str(folder / "writer"),
            "generate": {"max_new_tokens": 12, "temperature": 1.0, "draw": draw},
        }
        for draw in (0, 1)
    }
    return {**SMALL, "teachers": teachers, "training__max_length": 400}


def test_own_rationales_are_aligned_segment_by_segment(samples: Path, tmp_path: Path) -> None:
    changes = {**own(samples.parent), "alignment__time": "segments"}
    run = assembled(samples, tmp_path, **changes)
    batch = next(iter(run.stream))
    assert isinstance(run.stream, KVStream)
    store = KVStore.open(samples.parent / "store")
    assert store.teacher("own-0").own_text
    rationales = {
        name: [dict(text.segments)["rationale"] for text in store.read_shard(name, "00000").texts]
        for name in ("own-0", "own-1")
    }
    assert rationales["own-0"] != rationales["own-1"]
    item = run.stream.source.load(0).item(0)
    one = run.stream.collate([item])
    for name in rationales:
        shard, index = item.shards[name]
        theirs = torch.from_numpy(shard.tokens.segment[shard.tokens.span(index)]).long()
        (tokens,) = run_tokens(run, item)
        ours = torch.from_numpy(tokens.segment).long()
        start, weight = one["teachers"][name]["start"][0], one["teachers"][name]["weight"][0]
        columns = start[:, None] + torch.arange(weight.shape[1])
        used = weight > 0
        assert used[ours == 2].any()
        meets = theirs[columns.clamp_max(len(theirs) - 1)]
        assert (meets == ours[: len(columns), None])[used].all()
    output = run.distiller(batch)
    assert bool(torch.isfinite(output["loss"]))


def run_tokens(run: Any, item: Any) -> Any:
    from kvdistill.distill.data.collate import tokenize

    return tokenize(run.stream.collate.tokenizer, [item.sample], run.stream.collate.max_length)


def test_own_rationales_train_and_are_refused_by_characters(samples: Path, tmp_path: Path) -> None:
    changes = {**own(samples.parent), "preset": "phase-2"}
    with pytest.raises(ConfigError, match=r"'own-0' generated its own rationales.*segments"):
        assembled(samples, tmp_path, **changes)
    changes |= {"alignment__time": "segments", "training__max_steps": 40}
    changes |= {"training__log_steps": 10, "training__learning_rate": 1e-2}
    report = train(variant(samples, tmp_path, **changes))
    for name in ("loss_key", "loss_value"):
        values = logged(report.folder, name)
        assert np.isfinite(values).all()
        assert values[-1] < values[0], name
