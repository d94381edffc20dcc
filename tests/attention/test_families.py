"""Every family as a user has it: a folder, loaded by its name with default settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kvdistill.corpus.samples import Sample
from kvdistill.extract.extract_shard import extract_samples
from kvdistill.extract.teacher import load_teacher
from kvdistill.types import SEGMENT_IDS
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
    settings = {} if stream is None else {"stream": stream}
    teacher = load_teacher("t", make(tmp_path, settings, long_text="truncate"))
    assert teacher.manifest.adapter_error < 1e-5
    found = extract_samples(teacher, SAMPLES, batch_tokens=4096)
    for name, array in found.shard.arrays.items():
        assert array.shape[1:3] != (0, 0), name
        if name.endswith("value"):
            assert (array != 0).any(axis=(1, 2, 3)).all()
        if name.endswith("importance"):
            first = array[:, :, found.shard.tokens.span(0)]
            np.testing.assert_allclose(first.astype(np.float32).sum(axis=2), 1.0, atol=0.01)


_MHA = {**DECODERS["llama"][1], "num_key_value_heads": 4}
_LONG_ROPE = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 32}
_LONG_ROPE |= {"short_factor": [1.0] * 4, "long_factor": [2.0, 3.0, 4.0, 5.0]}
_LONG = {"original_max_position_embeddings": 32, "max_position_embeddings": 512}
# One query head per key/value head, so importance is the attention's own share of every key.
ATTENDED: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("llama", _MHA),
    "window": ("mistral", {**_MHA, "sliding_window": 40}),
    "windows and soft caps": ("gemma2", {**_MHA, "head_dim": 16, "sliding_window": 40}),
    "ALiBi": DECODERS["falcon, alibi"],
    "T5's bias": ENCODER_DECODERS["t5"],
    "longrope on a long text": ("phi3", {**_MHA, "rope_parameters": _LONG_ROPE, **_LONG}),
}


@pytest.mark.parametrize("family", ATTENDED)
def test_stored_importance_is_the_model_s_own_attention(tmp_path: Path, family: str) -> None:
    model_type, options = ATTENDED[family]
    save_teacher(tmp_path / "t", model_type, **options, base={})
    stream = "encoder" if model_type == "t5" else None
    settings = {"stream": stream, "attn_implementation": "eager"}
    experiment = make(tmp_path, settings, max_length=512)
    teacher = load_teacher("t", experiment)
    stored = extract_samples(teacher, SAMPLES[:1], batch_tokens=4096).shard
    ids = torch.tensor(stored.tokens.token_ids)[None].long()
    segment = torch.tensor(stored.tokens.segment)
    queries, keys = (segment == SEGMENT_IDS[name] for name in ("answer", "rationale"))
    model = teacher.model.get_encoder() if stream else teacher.model
    own = model(ids, output_attentions=True).attentions
    importance = [torch.tensor(x) for n, x in stored.arrays.items() if n.endswith("importance")]
    for weights, received in zip(own, importance[0], strict=True):
        seen = weights[0][:, queries][:, :, keys]
        visible = seen.sum(-1, keepdim=True)
        shares = (seen / visible.clamp_min(1e-9)).sum(1) / (visible > 0).sum(1).clamp_min(1)
        torch.testing.assert_close(received[:, keys].float(), shares, rtol=2e-3, atol=1e-4)
    assert len(importance) == 1
