"""Architectures without an adapter, read from their own cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from kvdistill.attention import verification as fitting
from kvdistill.attention.hooks import capture
from kvdistill.attention.verification import CACHE, fit_adapter, forward_through_cache
from kvdistill.errors import TeacherError
from kvdistill.pipelines.extract import extract
from kvdistill.store.reader import KVStore
from tests.attention.families import DECODERS
from tests.extract.models import save_teacher, tiny_model
from tests.pipelines.test_teachers import make

IDS = torch.arange(3, 42).reshape(3, 13)


def stranger(name: str, monkeypatch: pytest.MonkeyPatch, **options: Any) -> tuple[Any, Any]:
    """A model whose family is unknown and which no adapter fits; and how it is really read."""
    model_type, own = DECODERS[name]
    model = tiny_model(model_type, **{**own, **options})
    known = fit_adapter("t", model, None)
    monkeypatch.setattr(fitting, "adapters_for", lambda *args: [])
    monkeypatch.setattr(fitting, "is_known", lambda model: False)
    return model, known


@pytest.mark.parametrize(
    "name",
    ["llama", "gemma3, sliding", "pythia, partial rotary", "gptj, interleaved", "gpt2, fused",
     "smollm3, layers without rotary"],
)  # fmt: skip
def test_equals_what_the_adapter_taps(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, known = stranger(name, monkeypatch)
    verified = fit_adapter("t", model, None)
    assert verified.adapter == CACHE
    tapped: dict[int, Any] = {}
    with capture(known.sites, tapped.__setitem__):
        own = model(IDS).last_hidden_state
    cached: dict[int, Any] = {}
    mask = torch.ones_like(IDS)
    hidden = forward_through_cache(model, IDS, mask, verified.layers, cached.__setitem__)
    torch.testing.assert_close(hidden, own, rtol=1e-4, atol=1e-5)
    assert cached.keys() == tapped.keys()
    for layer_idx, qkv in tapped.items():
        torch.testing.assert_close(cached[layer_idx].key, qkv.key, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(cached[layer_idx].value, qkv.value, rtol=1e-4, atol=1e-5)


def test_a_rotation_that_is_not_found_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = stranger("llama", monkeypatch)
    monkeypatch.setattr(
        "kvdistill.attention.verification.rotary_candidates",
        lambda model, num_layers: [[]] * num_layers,
    )
    with pytest.raises(TeacherError, match="those of layer 0 still depend on their position"):
        fit_adapter("t", model, None)


def test_a_wrong_rotation_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model, known = stranger("llama", monkeypatch)
    wrong = known.layers[0].rotary.model_copy(update={"interleaved": True})
    monkeypatch.setattr(
        "kvdistill.attention.verification.rotary_candidates",
        lambda model, num_layers: [[wrong]] * num_layers,
    )
    with pytest.raises(TeacherError, match="still depend on their position"):
        fit_adapter("t", model, None)


def test_only_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = stranger("llama", monkeypatch)
    with pytest.raises(TeacherError, match="float32 only"):
        fit_adapter("t", model.bfloat16(), None)


def test_extracted_without_importance(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_teacher(tmp_path / "t")
    extract(make(tmp_path, {}, importance=False))
    (tmp_path / "store").rename(tmp_path / "tapped")
    stranger("llama", monkeypatch)
    with pytest.raises(TeacherError, match="set extraction"):
        extract(make(tmp_path, {}))
    extract(make(tmp_path, {}, importance=False))
    for kind in ("key", "value"):
        one, other = (
            KVStore.open(tmp_path / name).read("t", "00000001", 1, 0, kind)
            for name in ("store", "tapped")
        )
        torch.testing.assert_close(torch.tensor(one), torch.tensor(other), rtol=0.02, atol=0.02)
