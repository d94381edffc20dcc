"""Every family as a user has it: a folder, loaded by its name with default settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvdistill.corpus.samples import Sample
from kvdistill.extract.extract_shard import extract_samples
from kvdistill.extract.teacher import load_teacher
from tests.attention.families import DECODERS, ENCODER_DECODERS, ENCODERS
from tests.extract.models import TEXTS, save_teacher
from tests.pipelines.test_teachers import make

SAMPLES = [
    Sample("a", (("prompt", TEXTS[0]), ("rationale", TEXTS[1]), ("answer", "72"))),
    Sample("b", (("text", "Short."),)),
]
CASES = [(name, None) for name in (*DECODERS, *ENCODERS)]
CASES += [(name, stream) for name in ENCODER_DECODERS for stream in ("encoder", "decoder", "cross")]


@pytest.mark.parametrize(("family", "stream"), CASES, ids=lambda value: value or "self")
def test_a_saved_teacher_is_loaded_and_read(
    tmp_path: Path, family: str, stream: str | None
) -> None:
    every: dict[str, tuple[str, dict[str, Any]]] = {**DECODERS, **ENCODERS, **ENCODER_DECODERS}
    model_type, options = every[family]
    save_teacher(tmp_path / "t", model_type, **options, base={})
    teacher = load_teacher("t", make(tmp_path, {} if stream is None else {"stream": stream}))
    assert teacher.manifest.adapter_error < 1e-5
    found = extract_samples(teacher, SAMPLES, batch_tokens=4096, long_text="truncate")
    for name, array in found.shard.arrays.items():
        assert array.shape[1:3] != (0, 0), name
        if name.endswith("value"):
            assert (array != 0).any(axis=(1, 2, 3)).all()
        if name.endswith("importance"):
            first = array[:, :, found.shard.tokens.span(0)]
            np.testing.assert_allclose(first.astype(np.float32).sum(axis=2), 1.0, atol=0.01)
