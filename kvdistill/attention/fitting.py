"""Which adapter reads a model, found by trying: the table's, those of other families, its cache.

Every candidate is verified (``attention/verification.py``), and how the model reads its tokens is
measured through it (``attention/behaviour.py``). Whatever an unknown model raises in between
becomes one line that names the model, the step and what was seen.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from kvdistill.attention.adapters import QKV, Adapter, TeacherKind, adapters_for, known_adapters
from kvdistill.attention.behaviour import (
    UNLIMITED,
    BatchRule,
    Behaviour,
    Read,
    Reading,
    measure_batching,
    measure_behaviour,
)
from kvdistill.attention.geometry import VerifiedLayer
from kvdistill.attention.hooks import Site, capture, find_sites
from kvdistill.attention.verification import (
    CACHE,
    PROBE_TOKENS,
    forward_through_cache,
    probe_ids,
    verify_adapter,
    verify_cache,
)
from kvdistill.errors import AdapterError, TeacherError
from kvdistill.text import shorten
from kvdistill.types import Stream


@dataclass(frozen=True, eq=False)
class Verified:
    """The adapter that fits a model, and what was measured with it."""

    adapter: Adapter
    sites: list[Site]
    skipped: dict[int, str]
    """Layers without keys and values of their own, and why."""
    layers: list[VerifiedLayer]
    behaviour: Behaviour
    batches: BatchRule = UNLIMITED
    """Which texts may share a batch; measured for teachers."""

    @property
    def kind(self) -> TeacherKind:
        """What the model is by how it reads, whatever its family usually is."""
        if self.adapter.kind == "encoder_decoder":
            return "encoder_decoder"
        return "decoder" if self.behaviour.causal else "encoder"


def fit_adapter(name: str, model: Any, stream: Stream | None) -> Verified:
    """Verify the adapters that may fit a teacher and return the first that does, else its cache.

    Raises:
        TeacherError: none fits; the message is about the likeliest.
    """
    try:
        verified = _fit(model, stream)
        layers, sites = verified.layers, verified.sites
        read = _tap_reader(model, sites) if sites else _cache_reader(model, layers)
        with fitting_step(model, "comparing a text alone with the same text in a batch"):
            batches = measure_batching(read, probe_ids(model))
    except AdapterError as error:
        raise TeacherError(f"teacher {name!r}: {error}") from None
    if batches.padded_to is None:
        # longrope chooses the factors of a whole batch by its longest text.
        lengths = (layer.rotary.trained_length for layer in layers if layer.rotary is not None)
        batches = BatchRule(min((n for n in lengths if n is not None), default=None))
    elif verified.adapter.stream == "decoder":
        # Texts of one length need not have encoder inputs of one length.
        batches = BatchRule(padded_to=0, alone=True)
    return replace(verified, batches=batches)


def _fit(model: Any, stream: Stream | None) -> Verified:
    adapters = adapters_for(model, stream)
    try:
        return first_fitting(model, adapters)
    except AdapterError as error:
        if known_adapters(model) or model.config.is_encoder_decoder:
            raise
        closest = error
    try:
        with fitting_step(model, f"running {PROBE_TOKENS} tokens with a cache"):
            layers, without = verify_cache(model)
            read = _cache_reader(model, layers)
            behaviour = _measured_behaviour(model, read, layers)
    except AdapterError as error:
        raise AdapterError(f"{error} (the likeliest adapter: {closest})") from None
    layers = [replace(layer, mask=layer.mask._replace(causal=behaviour.causal)) for layer in layers]
    return Verified(CACHE, [], without, layers, behaviour)


@contextmanager
def fitting_step(model: Any, step: str) -> Iterator[None]:
    """Turn whatever the code of an unknown model raises in a step of verification into one line.

    Raises:
        AdapterError: names the model, the step and what was raised.
    """
    try:
        yield
    except (AdapterError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        seen = f"{type(error).__name__}: {shorten(str(error), 200)}"
        raise AdapterError(
            f"{type(model).__name__} ({model.config.model_type}) failed in {step}: {seen}"
        ) from error


def located_sites(model: Any, stream: Stream | None) -> list[Site]:
    """Layers that the likeliest adapter finds in a model, which may be on the meta device.

    Nothing is run, so that the adapter is not verified. Empty for a model of unknown type with
    other modules: its cache may yet be read.

    Raises:
        AdapterError: as ``find_sites``, or the stream does not fit.
    """
    closest = None
    for adapter in adapters_for(model, stream):
        try:
            with fitting_step(model, f"locating the modules of adapter {adapter.name!r}"):
                return find_sites(model, adapter)[0]
        except AdapterError as error:
            closest = closest or error
    if closest is not None and (known_adapters(model) or model.config.is_encoder_decoder):
        raise closest
    return []


def first_fitting(model: Any, adapters: Sequence[Adapter]) -> Verified:
    """Verify adapters on a model in turn and return the first that fits.

    Raises:
        AdapterError: none fits; the message is about the first whose modules the model has.
    """
    absent, unfit = [f"no adapter to try on {type(model).__name__}"], []
    for adapter in adapters:
        try:
            with fitting_step(model, f"locating the modules of adapter {adapter.name!r}"):
                sites, skipped = find_sites(model, adapter)
        except AdapterError as error:
            absent.append(str(error))
            continue
        try:
            with fitting_step(model, f"verifying adapter {adapter.name!r}"):
                return _verified(model, adapter, sites, skipped)
        except AdapterError as error:
            unfit.append(str(error))
    raise AdapterError((unfit or absent[1:] or absent)[0])


def _verified(
    model: Any, adapter: Adapter, sites: Sequence[Site], skipped: dict[int, str]
) -> Verified:
    layers = verify_adapter(model, sites)
    own = {layer.layer_idx for layer in layers}
    shared = {
        site.layer_idx: f"{type(site.layer).__name__} attends to keys and values of another layer"
        for site in sites
        if site.layer_idx not in own
    }
    sites = [site for site in sites if site.layer_idx in own]
    behaviour = _measured_behaviour(model, _tap_reader(model, sites), layers)
    if model.dtype != torch.float32 and not all(layer.mask.causal for layer in layers):
        # Rounding hides small movements, but not a mask.
        behaviour = replace(behaviour, causal=False)
    return Verified(adapter, sites, {**skipped, **shared}, layers, behaviour)


def _measured_behaviour(model: Any, read: Read, layers: Sequence[VerifiedLayer]) -> Behaviour:
    shifts = "position_ids" in inspect.signature(model.forward).parameters
    indices = [layer.layer_idx for layer in layers]
    return measure_behaviour(read, indices, probe_ids(model), shifts)


def _tap_reader(model: Any, sites: Sequence[Site]) -> Read:
    stream = sites[0].adapter.stream

    @torch.no_grad()
    def read(
        ids: Tensor, mask: Tensor | None = None, source: Tensor | None = None, position: int = 0
    ) -> Reading:
        real = torch.ones_like(ids) if mask is None else mask
        inputs = {"input_ids": ids, "attention_mask": real}
        if stream == "decoder":
            own = inputs if source is None else {"input_ids": source}
            inputs = {**own, "decoder_input_ids": ids, "decoder_attention_mask": real}
        elif stream != "self":
            inputs["decoder_input_ids"] = ids[:, :1]
        if position:
            inputs["position_ids"] = position + torch.arange(ids.shape[1], device=ids.device)[None]
        tapped: dict[int, QKV] = {}
        with capture(sites, tapped.__setitem__):
            output = model(**inputs, use_cache=False)
        is_encoder = stream in ("encoder", "cross")
        hidden = output.encoder_last_hidden_state if is_encoder else output.last_hidden_state
        return _reading(tapped, hidden)

    return read


def _cache_reader(model: Any, layers: Sequence[VerifiedLayer]) -> Read:
    def read(
        ids: Tensor, mask: Tensor | None = None, source: Tensor | None = None, position: int = 0
    ) -> Reading:
        real = torch.ones_like(ids) if mask is None else mask
        found: dict[int, QKV] = {}
        run = forward_through_cache
        hidden = run(model, ids, real, layers, found.__setitem__, position=position)
        return _reading(found, hidden)

    return read


def _reading(found: dict[int, QKV], hidden: Tensor) -> Reading:
    ordered = [found[layer_idx] for layer_idx in sorted(found)]
    return Reading([qkv.key for qkv in ordered], [qkv.value for qkv in ordered], hidden)
