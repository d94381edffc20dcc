"""An adapter is believed only after it reproduces what the model's own attention is given.

A few tokens run through the model while a spy records the arguments of every attention product.
The tapped Q and K, rotated by the model's frequencies in float32, and the tapped V must equal
them. The same run tells what no config says uniformly: which layers rotate, whether channel
pairs are halves or neighbours, and by how much scores are scaled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from kvdistill.attention.adapters import QKV, Adapter, adapters_for, is_known, separate
from kvdistill.attention.cache_reader import verify_cache
from kvdistill.attention.geometry import VerifiedLayer
from kvdistill.attention.hooks import Site, capture, sites
from kvdistill.attention.probe import AttentionInputs, AttentionProbe, probing
from kvdistill.attention.rotary import candidates, rotate
from kvdistill.errors import TeacherError
from kvdistill.store.manifest import RotarySpec
from kvdistill.types import Stream

TOLERANCE: Final = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
"""Largest difference, relative to the largest entry, that arithmetic alone explains."""


def verify_adapter(
    model: Any,
    sites: Sequence[Site],
    rotations: Sequence[Sequence[RotarySpec]],
    run: Callable[[], object],
) -> list[VerifiedLayer]:
    """Run ``run`` (one forward pass of one unpadded sequence) and compare at every site.

    Raises:
        TeacherError: a layer's tapped tensors are not what its attention is given.
    """
    tapped: dict[int, QKV] = {}
    spy = AttentionProbe()
    with (
        probing(sites, spy),
        _visible_attention(model),
        capture(sites, tapped.__setitem__),
        spy,
        torch.no_grad(),
    ):
        run()
    verified = []
    for site in sites:
        if site.layer_idx not in spy.seen or site.layer_idx not in tapped:
            raise TeacherError(
                f"layer {site.layer_idx}: the attention of {type(site.attention).__name__} was "
                "not seen; this model cannot be verified with attn_implementation sdpa or eager"
            )
        seen, taps = spy.seen[site.layer_idx], tapped[site.layer_idx]
        verified.append(_compare_layer(site, taps, seen, rotations[site.layer_idx]))
    return verified


def _compare_layer(
    site: Site, taps: QKV, seen: AttentionInputs, rotations: Sequence[RotarySpec]
) -> VerifiedLayer:
    options: list[tuple[float, float, RotarySpec | None]] = []
    for spec in (*rotations, None):
        if spec is not None and spec.rotary_dim > taps.key.shape[-1]:
            continue
        query, factor = _best_factor(_turned(taps.query, spec), seen.query)
        error = max(
            _input_difference(query, seen.query),
            _input_difference(_turned(taps.key, spec), seen.key),
            _input_difference(taps.value.float(), seen.value),
        )
        options.append((error, factor, spec))
    error, factor, spec = min(options, key=lambda option: option[0])
    tolerance = TOLERANCE[taps.key.dtype]
    if not error <= tolerance:
        raise TeacherError(
            f"adapter {site.adapter.name!r} does not fit {type(site.attention).__name__}, layer "
            f"{site.layer_idx}: its keys and values differ from the attention's own inputs by "
            f"{error:.1e} (relative), where {tolerance:.0e} is rounding; this architecture needs "
            "an adapter of its own (kvdistill/attention/adapters.py)"
        )
    _, num_heads, _, key_dim = taps.key.shape
    scaling = seen.scaling or getattr(site.attention, "scaling", key_dim**-0.5)
    return VerifiedLayer(
        layer_idx=site.layer_idx,
        num_key_value_heads=num_heads,
        key_head_dim=key_dim,
        value_head_dim=taps.value.shape[-1],
        rotary=spec,
        scaling=factor * scaling,
        error=error,
        softcap=getattr(site.attention, "attn_logit_softcapping", None),
    )


def _turned(x: Tensor, spec: RotarySpec | None) -> Tensor:
    if spec is None:
        return x.float()
    return rotate(x, torch.arange(x.shape[-2], device=x.device), spec)


def _best_factor(query: Tensor, seen: Tensor) -> tuple[Tensor, float]:
    """Some models scale queries before the product (OPT): find the factor, then apply it."""
    if query.shape != seen.shape:
        return query, 1.0
    factor = float((query * seen.float()).sum() / (query * query).sum().clamp_min(1e-30))
    factor = 1.0 if abs(factor - 1.0) < 1e-3 else factor
    return query * factor, factor


def _input_difference(tapped: Tensor, seen: Tensor) -> float:
    """Relative to the largest entry; attention may have repeated key/value heads for queries."""
    if tapped.shape != seen.shape:
        repeats, rest = divmod(seen.shape[1], tapped.shape[1])
        if rest or not repeats:
            return float("inf")
        tapped = tapped.repeat_interleave(repeats, dim=1)
        if tapped.shape != seen.shape:
            return float("inf")
    seen = seen.float()
    return float((tapped - seen).abs().max() / seen.abs().max().clamp_min(1e-30))


@contextmanager
def _visible_attention(model: Any) -> Iterator[None]:
    """Use a kernel that the spy can see, and go back to the chosen one afterwards.

    ``sdpa`` also says by what scores are scaled; ``eager`` multiplies out of the spy's sight.
    """
    chosen = model.config._attn_implementation
    if chosen == "sdpa" or not (model._supports_sdpa and model._can_set_attn_implementation()):
        yield
        return
    model.set_attn_implementation("sdpa")
    try:
        yield
    finally:
        model.set_attn_implementation(chosen)


CACHE: Final = Adapter("own cache, un-rotated", layers="", attention="", taps=(), cut=separate)
"""Not an adapter but the absence of one: see ``cached.py``."""


PROBE_TOKENS: Final = 13
"""Length of the verification run; prime, so that no axis is mistaken for the token axis."""


def fit_adapter(name: str, model: Any, stream: Stream | None) -> Verified:
    """Verify the adapters that may fit a model, and take the first that does.

    Raises:
        TeacherError: none fits; says what was wrong with the likeliest.
    """
    problems: list[str] = []
    for adapter in adapters_for(name, model, stream):
        try:
            found, skipped = sites(model, adapter)
            rotations = candidates(model, max(site.layer_idx for site in found) + 1)
            layers = verify_adapter(model, found, rotations, lambda: _probe(model))
        except (TeacherError, RuntimeError) as error:
            # A stranger's tensors need not split as the adapter at hand would have them.
            problems.append(" ".join(str(error).split()))
            continue
        return Verified(adapter, found, skipped, layers)
    if not is_known(model) and not model.config.is_encoder_decoder:
        try:
            cached, without = verify_cache(model, _probe_ids(model))
        except TeacherError as error:
            raise TeacherError(f"teacher {name!r}: {error}") from None
        return Verified(CACHE, [], without, cached)
    raise TeacherError(f"teacher {name!r}: {problems[0]}")


def _probe_ids(model: Any) -> torch.Tensor:
    vocab_size = model.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocab_size, (1, PROBE_TOKENS), generator=generator)
    return ids.to(model.get_input_embeddings().weight.device)


@torch.inference_mode()
def _probe(model: Any) -> None:
    """A pass over a few random tokens, through every stream that the model has."""
    inputs = {"input_ids": _probe_ids(model)}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = inputs["input_ids"][:, :-2]
    model(**inputs, attention_mask=torch.ones_like(inputs["input_ids"]), use_cache=False)


@dataclass(frozen=True, eq=False)
class Verified:
    """The adapter that fits a model, and what was measured with it."""

    adapter: Adapter
    sites: list[Site]
    skipped: dict[int, str]
    layers: list[VerifiedLayer]


# MERGED-DOC extract.fitting
# Finding how a model is read: its family's adapter, any that fits, or its own cache.
