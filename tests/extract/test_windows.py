"""Texts longer than a teacher's positions, read in overlapping windows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvdistill.attention.adapters import QKV
from kvdistill.config.load import parse_experiment
from kvdistill.corpus.samples import Sample
from kvdistill.errors import ConfigError, TeacherError
from kvdistill.extract.extract_shard import extract_samples
from kvdistill.extract.teacher import load_teacher
from kvdistill.extract.tokenise import TokenisedSample, Windows
from tests.attention.families import ENCODER_DECODERS
from tests.extract.models import TEXTS, save_teacher
from tests.pipelines.test_teachers import make

LIMIT, OVERLAP = 24, 8
LONG = Sample("long", (("text", " ".join(TEXTS)),))
SHORT = Sample("short", (("text", "Short."),))
WINDOWED: dict[str, Any] = {
    "importance": False,
    "confidence": True,
    "hidden_at_cue": True,
    "long_text": "window",
    "window_overlap": OVERLAP,
}


@given(
    first=st.integers(0, 3),
    limit=st.integers(8, 20),
    overlap=st.integers(0, 4),
    more=st.integers(1, 60),
)
def test_every_token_comes_once_with_its_context(
    first: int, limit: int, overlap: int, more: int
) -> None:
    length = limit + more
    segment = np.where(np.arange(length) < first, -1, 0).astype(np.int8)
    numbers = np.arange(length, dtype=np.int32)
    sample = TokenisedSample(numbers, numbers, numbers, segment)
    windows = Windows.of(sample, limit, overlap, torch.device("cpu"))
    ids = windows.batch.input_ids
    assert ids.shape[1] == limit
    assert windows.stitch(ids)[0].tolist() == numbers.tolist()
    assert (ids[:, :first] == torch.arange(first)).all()
    assert (ids[:, first:].diff(dim=1) == 1).all()
    assert int(ids[0, first]) == first
    assert int(ids[-1, -1]) == length - 1
    later = windows.row_T > 0
    assert (windows.place_T[later] >= first + overlap).all()


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_a_long_text_is_stored_as_its_windows_are_read(tmp_path: Path, family: str) -> None:
    heads = {"num_key_value_heads": 4} if family == "bert" else {}
    save_teacher(tmp_path / "t", family, bos=family == "llama", head=family == "llama", **heads)
    codec = {"codec": {"key": "fp16", "value": "fp16"}}
    teacher = load_teacher("t", make(tmp_path, codec, max_length=LIMIT, **WINDOWED))
    found = extract_samples(teacher, [SHORT, LONG, LONG], batch_tokens=4096)
    assert found.windowed == ("long", "long")
    tokens, arrays = found.shard.tokens, found.shard.arrays
    assert tokens.span(1).stop - tokens.span(1).start > 2 * LIMIT
    (sample,) = teacher.tokenise([LONG])
    windows = Windows.of(sample, LIMIT, OVERLAP, teacher.device)
    for i, ids in enumerate(windows.batch.input_ids):
        own: dict[int, QKV] = {}
        batch = type(windows.batch)((0,), (LIMIT,), ids[None])
        hidden = teacher.run(batch, own.__setitem__)
        mine = windows.row_T == i
        places, rows = windows.place_T[mine], np.flatnonzero(mine.numpy())
        for layer, qkv in own.items():
            for kind, wanted in {"key": qkv.key, "value": qkv.value}.items():
                stored = arrays[kind][layer][:, tokens.span(2)][:, rows].astype(np.float32)
                np.testing.assert_allclose(
                    stored, wanted[0][:, places].numpy(), rtol=2e-3, atol=2e-3
                )
        if mine[-1]:
            final = arrays["hidden_at_cue"][-1, 2].astype(np.float32)
            np.testing.assert_allclose(final, hidden[0, -1].numpy(), rtol=2e-3, atol=2e-3)
    if family == "llama":
        assert np.isfinite(arrays["nll"][tokens.span(1)][1:]).all()


def test_what_cannot_be_read_in_windows_is_refused(tmp_path: Path) -> None:
    save_teacher(tmp_path / "t")
    body = make(tmp_path, {"long_text": "window"}, importance=False).model_dump(mode="json")
    with pytest.raises(ConfigError, match="importance and an eviction are undefined"):
        parse_experiment({**body, "extraction": {"importance": True}})
    settings = {**WINDOWED, "confidence": False, "window_overlap": LIMIT}
    teacher = load_teacher("t", make(tmp_path, {}, max_length=LIMIT, **settings))
    with pytest.raises(TeacherError, match=r"lower extraction\.window_overlap"):
        extract_samples(teacher, [LONG], batch_tokens=4096)
    model_type, options = ENCODER_DECODERS["t5"]
    save_teacher(tmp_path / "t", model_type, **options, base={})
    settings = {**WINDOWED, "hidden_at_cue": False, "confidence": False}
    pair = Sample("pair", (("prompt", " ".join(TEXTS)), ("answer", TEXTS[0])))
    teacher = load_teacher("t", make(tmp_path, {"stream": "decoder"}, max_length=LIMIT, **settings))
    with pytest.raises(TeacherError, match="reads pairs of texts"):
        extract_samples(teacher, [pair], batch_tokens=4096)
