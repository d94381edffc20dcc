"""A teacher in memory: loaded, its adapter verified, its geometry measured.

Everything that the manifest says about a teacher is read off the loaded model, not off its
config: heads, dims, rotations and score scales come from the verification run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvdistill.config import Experiment, GenerateConfig, TeacherConfig
from kvdistill.corpus import Sample
from kvdistill.errors import TeacherError
from kvdistill.extract.batches import Batch
from kvdistill.extract.cached import forward_through_cache
from kvdistill.extract.capture import OnLayer, Site, capture
from kvdistill.extract.describe import Loaded, describe, max_length
from kvdistill.extract.fitting import CACHE, fit
from kvdistill.extract.generate import with_own_rationales
from kvdistill.extract.loading import load_model, load_tokenizer
from kvdistill.extract.streams import forward, read_pair
from kvdistill.extract.text import Bos, Encoded, Reader
from kvdistill.extract.verify import VerifiedLayer
from kvdistill.extract.view import SEGMENTS, chat, parse
from kvdistill.store.manifest import TeacherManifest


@dataclass(frozen=True, eq=False)
class Teacher:
    """A loaded model, what is read from it, and how it is described in the store."""

    model: Any
    reader: Reader
    sites: tuple[Site, ...]
    layers: tuple[VerifiedLayer, ...]
    manifest: TeacherManifest
    max_length: int | None
    """Most tokens of a text: the model's positions, or the config's limit if that is less."""
    writer: Any = None
    """The model with its head, where it writes its own rationales."""
    generate: GenerateConfig | None = None

    @property
    def tokenizer(self) -> Any:
        """The fast tokenizer."""
        return self.reader.tokenizer

    @property
    def device(self) -> torch.device:
        """Where token ids go."""
        return _input_device(self.model)

    def read(self, samples: Sequence[Sample], max_length: int | None = None) -> list[Encoded]:
        """Tokens of samples as this teacher reads them, truncated to ``max_length`` if given.

        Raises:
            TeacherError: the view does not fit a sample, or offsets are wrong; names the sample.
        """
        if self.manifest.stream == "decoder":
            return read_pair(self.reader, self.model, samples, max_length)
        return self.reader.read(samples, max_length)

    def own_texts(self, samples: Sequence[Sample], batch_tokens: int) -> list[Sample] | None:
        """The samples with this teacher's own rationales, where it writes them.

        Raises:
            TeacherError: a sample has no prompt to continue.
        """
        if self.generate is None:
            return None
        return with_own_rationales(
            self.writer,
            self.reader,
            samples,
            self.generate,
            batch_tokens=batch_tokens,
            max_length=self.max_length,
        )

    def run(self, batch: Batch, on_layer: OnLayer) -> Tensor:
        """A forward pass that hands ``on_layer`` every kept layer's Q, K and V."""
        if self.manifest.adapter == CACHE.name:
            inputs = (batch.input_ids, batch.attention_mask)
            return forward_through_cache(self.model, *inputs, self.layers, on_layer)
        with capture(self.sites, on_layer):
            return self.forward(batch)

    @torch.inference_mode()
    def forward(self, batch: Batch) -> Tensor:
        """One pass over a right-padded batch; the final hidden state ``[B, T, E]``."""
        return forward(self.model, self.manifest.stream, batch)


def load_teacher(name: str, experiment: Experiment) -> Teacher:
    """Load a teacher, find and verify its adapter, and describe it.

    Raises:
        TeacherError: no such model, weights that are missing or not safe to read, a tokenizer
            without offsets, layers that do not exist, or an architecture that does not verify.
    """
    config = experiment.teachers[name]
    whole, missing = load_model(name, config, _device(experiment.extraction.device))
    model = whole if config.generate is None else whole.base_model
    reader = _reader(name, config, model)
    verified = fit(name, model, config.stream)
    chosen = _chosen(name, config, verified.layers)
    layers = tuple(layer for layer in verified.layers if layer.layer_idx in chosen)
    found = tuple(site for site in verified.sites if site.layer_idx in chosen)
    manifest = describe(name, experiment, reader, Loaded(model, missing, verified, layers))
    limit = max_length(model, experiment.extraction.max_length)
    writer = None if config.generate is None else whole
    return Teacher(model, reader, found, layers, manifest, limit, writer, config.generate)


def _reader(name: str, config: TeacherConfig, model: Any) -> Reader:
    tokenizer = load_tokenizer(name, config)
    view = chat(tokenizer, config.system) if config.chat else parse(config.template)
    if config.generate is not None and view.source is None:
        view = SEGMENTS
    needs_bos = model.config.model_type.startswith("gemma")
    bos: Bos = "add" if config.bos == "always" or needs_bos else "keep"
    if config.bos == "never":
        bos = "remove"
    return Reader(tokenizer, view, add_special_tokens=not config.chat, bos=bos)


def _input_device(model: Any) -> torch.device:
    device: torch.device = model.get_input_embeddings().weight.device
    return device


def _chosen(name: str, config: TeacherConfig, layers: Sequence[VerifiedLayer]) -> set[int]:
    available = {layer.layer_idx for layer in layers}
    if config.layers is None:
        return available
    unknown = sorted(set(config.layers) - available)
    if unknown:
        raise TeacherError(
            f"teacher {name!r} has no attention layer {unknown}; it has {sorted(available)}; "
            f"change teachers.{name}.layers"
        )
    return set(config.layers)


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(name)
