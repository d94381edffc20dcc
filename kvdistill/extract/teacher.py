"""A teacher in memory: loaded, its adapter verified, its geometry measured.

What the manifest records of a teacher is read off the loaded model rather than its config: heads,
dims, rotations and score scales come from the verification run.

Every stored teacher has one token axis. An encoder-decoder is therefore three teachers:
``encoder``, self-attention over the whole text; ``cross``, the decoder's cross-attention to that
text; ``decoder``, self-attention over what follows the prompt, with the prompt as the encoder's
input (a plain text is the input of both).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import date
from itertools import groupby
from typing import Any, Literal

import torch
from torch import Tensor

from kvdistill import provenance
from kvdistill.attention.adapters import Adapter
from kvdistill.attention.attention_rule import unexplained
from kvdistill.attention.behaviour import UNLIMITED, BatchRule
from kvdistill.attention.fitting import Verified, fit_adapter
from kvdistill.attention.geometry import VerifiedLayer, position_limit, quantisation
from kvdistill.attention.hooks import OnLayer, Site, capture
from kvdistill.attention.language_head import OutputHead
from kvdistill.attention.prompt_template import (
    SEGMENTS,
    SOURCE,
    TARGET,
    chat_template,
    parse_template,
)
from kvdistill.attention.tokens import padding_id, tokenizer_fingerprint
from kvdistill.attention.verification import CACHE, forward_through_cache
from kvdistill.config.experiment import Experiment
from kvdistill.config.extraction import ExtractionConfig, GenerateConfig, TeacherConfig
from kvdistill.corpus.samples import Sample
from kvdistill.errors import TeacherError
from kvdistill.extract.loading import (
    load_teacher_config,
    load_teacher_model,
    load_teacher_tokenizer,
    native_dtype,
    state_fingerprint,
    text_model_of,
    weights_fingerprint,
)
from kvdistill.extract.predictions import output_head
from kvdistill.extract.tokenise import (
    Bos,
    PromptTokenizer,
    TeacherBatch,
    TokenisedSample,
    Windows,
    batch_by_tokens,
)
from kvdistill.store import identity
from kvdistill.store.codecs import Transforms
from kvdistill.store.manifest import TeacherManifest
from kvdistill.types import LayerGroup, LongText


@dataclass(frozen=True, eq=False)
class Teacher:
    """A loaded model, how it is read, and how the store describes it."""

    model: Any
    prompt_tokenizer: PromptTokenizer
    sites: tuple[Site, ...]
    layers: tuple[VerifiedLayer, ...]
    manifest: TeacherManifest
    max_length: int | None
    """Most tokens of a text: the model's positions, or the config's limit if that is less."""
    long_text: LongText = "error"
    """What to do with a text of more."""
    window_overlap: int = 0
    """Tokens that windows of such a text share."""
    rule: BatchRule = UNLIMITED
    """Which texts may share a batch."""
    head: OutputHead | None = None
    """Where predictions are stored: what makes logits of ``forward``'s hidden states."""
    causal_lm: Any = None
    """The model with its head, where it generates its own rationales."""
    generate: GenerateConfig | None = None
    is_sharded: bool = False
    """Whether several processes read together, each with a part of the weights."""
    transforms: Transforms = field(default_factory=dict)
    """Fitted codecs of a teacher that is stored in ``klt``."""

    @property
    def tokenizer(self) -> Any:
        """The fast tokenizer."""
        return self.prompt_tokenizer.tokenizer

    @property
    def device(self) -> torch.device:
        """Device of the input token ids."""
        device: torch.device = self.model.get_input_embeddings().weight.device
        return device

    @property
    def num_embeddings(self) -> int:
        """Token ids that the model can read are below this."""
        return int(self.model.get_input_embeddings().weight.shape[0])

    @property
    def pad_id(self) -> int:
        """Token id of padding, which is masked."""
        return padding_id(self.tokenizer, self.num_embeddings)

    def is_too_long(self, sample: TokenisedSample) -> bool:
        """Whether a text exceeds the teacher's positions."""
        return self.max_length is not None and sample.max_tokens > self.max_length

    def windows(self, sample: TokenisedSample) -> Windows:
        """The windows of a text that is too long.

        Raises:
            TeacherError: the teacher cannot be read in windows, or they leave no room.
        """
        assert self.max_length is not None
        if sample.source_ids is not None or self.rule.alone:
            name = self.manifest.name
            raise TeacherError(
                f"teacher {name!r} cannot be read in windows: it "
                f"{'depends on its batch' if self.rule.alone else 'reads pairs of texts'}; set "
                f"teachers.{name}.long_text to truncate or skip"
            )
        return Windows.of(sample, self.max_length, self.window_overlap, self.device)

    def batches(self, lengths: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
        """``batch_by_tokens``, so that no text changes how another one is read.

        A text that is read in windows is a batch of its own.
        """
        budget = 1 if self.rule.alone else batch_tokens
        limit = max(lengths, default=0) if self.max_length is None else self.max_length
        yield from ([i] for i, length in enumerate(lengths) if length > limit)
        whole = [length if length <= limit else 0 for length in lengths]
        yield from batch_by_tokens(whole, budget, self.rule.padded_to)

    def tokenise(
        self, samples: Sequence[Sample], max_length: int | None = None
    ) -> list[TokenisedSample]:
        """Samples in this teacher's tokens, truncated to ``max_length`` if given.

        Raises:
            TeacherError: the prompt template does not fit a sample, offsets are wrong, or a token
                has no embedding; names the sample.
        """
        if self.manifest.stream != "decoder":
            tokenised = self.prompt_tokenizer.tokenise(samples, max_length)
        else:
            tokenised = self._tokenise_pairs(samples, max_length)
        for sample, tokens in zip(samples, tokenised, strict=True):
            self._require_embeddings(sample, tokens)
        return tokenised

    def _tokenise_pairs(
        self, samples: Sequence[Sample], max_length: int | None
    ) -> list[TokenisedSample]:
        """What the encoder and what the decoder reads of every sample."""
        source, target = (PromptTokenizer(self.tokenizer, half) for half in (SOURCE, TARGET))
        start = _decoder_start(self.model)
        pairs = zip(
            source.tokenise(samples, max_length),
            target.tokenise(samples, max_length and max_length - 1),
            strict=True,
        )
        return [replace(t.with_first(start), source_ids=s.token_ids) for s, t in pairs]

    def _require_embeddings(self, sample: Sample, tokens: TokenisedSample) -> None:
        found = [ids for ids in (tokens.token_ids, tokens.source_ids) if ids is not None]
        largest = max((int(ids.max()) for ids in found if ids.size), default=0)
        if largest >= self.num_embeddings:
            name = self.manifest.name
            raise TeacherError(
                f"teacher {name!r}: sample {sample.sample_id!r} contains the token "
                f"{self.tokenizer.convert_ids_to_tokens(largest)!r} with id {largest}, but the "
                f"model has {self.num_embeddings} embeddings; set teachers.{name}.tokenizer to the "
                "model's own, or remove the token from the text"
            )

    def run(self, batch: TeacherBatch, on_layer: OnLayer) -> Tensor:
        """A forward pass that hands ``on_layer`` every kept layer's Q, K and V."""
        if self.manifest.adapter == CACHE.name:
            inputs = (batch.input_ids, batch.attention_mask)
            return forward_through_cache(self.model, *inputs, self.layers, on_layer)
        with capture(self.sites, on_layer, hidden=self.manifest.has_hidden):
            return self.forward(batch)

    @torch.inference_mode()
    def forward(self, batch: TeacherBatch) -> Tensor:
        """One pass without cache or head over a right-padded batch: final hidden ``[B, T, E]``."""
        model, stream = self.model, self.manifest.stream
        if stream == "encoder":
            output = model.get_encoder()(**batch.inputs)
        elif stream == "cross":
            start = torch.full_like(batch.input_ids[:, :1], _decoder_start(model))
            output = model(**batch.inputs, decoder_input_ids=start, use_cache=False)
        else:
            output = model(**batch.inputs, use_cache=False)
        name = "encoder_last_hidden_state" if stream == "cross" else "last_hidden_state"
        hidden: Tensor = getattr(output, name)
        return hidden


def _decoder_start(model: Any) -> int:
    token_id: int | None = getattr(model.config, "decoder_start_token_id", None)
    if token_id is None:
        raise TeacherError(
            f"the config of {type(model).__name__} has no decoder_start_token_id, nor "
            "has its generation config; set it in either"
        )
    return token_id


def load_teacher(name: str, experiment: Experiment, day: date | None = None) -> Teacher:
    """Load a teacher, find and verify its adapter, and describe it.

    ``day`` is the date that a chat template prints where the config sets none; else today.

    Raises:
        TeacherError: no such model, weights that are missing or not safe to read, a tokenizer
            without offsets, layers that do not exist, or an architecture that does not verify.
    """
    extraction = experiment.extraction
    named = extraction.device
    if named == "auto":
        named = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(named)
    experiment = identity.in_dtype(experiment, name, native_dtype(device))
    config, predicts = experiment.teachers[name], extraction.stores_predictions
    whole, missing = load_teacher_model(name, config, device, predicts=predicts)
    model = text_model_of(name, whole)
    prompt_tokenizer = prompt_tokenizer_of(name, config, model.config.model_type, day)
    verified = fit_adapter(name, model, config.stream)
    chosen = _chosen_layers(name, config, verified.layers)
    layers = tuple(layer for layer in verified.layers if layer.layer_idx in chosen)
    _refuse_unavailable(name, extraction, model, verified)
    _refuse_unstorable(name, config, verified.adapter, layers)
    head = output_head(name, whole, model, verified, extraction)
    generates = config.generate is not None
    quantised = quantisation(whole.config) is not None
    facts = {
        "weights_fingerprint": weights_fingerprint(model, missing, quantised=quantised),
        "state_fingerprint": state_fingerprint(model, head and whole, whole if generates else None),
        "model_files": identity.teacher_files(config, {}),
        "has_confidence": head is not None and extraction.confidence,
        "num_logits": extraction.logits if head else 0,
        **_facts(model.config, prompt_tokenizer),
    }
    return Teacher(
        model,
        prompt_tokenizer,
        tuple(site for site in verified.sites if site.layer_idx in chosen),
        layers,
        _manifest(name, experiment, model, verified, layers=layers, **facts),
        max_positions(model, experiment.max_length(name)),
        experiment.long_text(name),
        extraction.window_overlap,
        verified.batches,
        head,
        whole if generates else None,
        config.generate,
        config.tp_plan is not None,
    )


def _facts(config: Any, prompts: PromptTokenizer) -> dict[str, Any]:
    return {
        "architecture": identity.number_changing(config.to_dict()),
        "tokenizer_fingerprint": tokenizer_fingerprint(prompts.tokenizer),
        "template": prompts.template.source,
        "template_date": prompts.template.date,
    }


def facts_without_weights(name: str, config: TeacherConfig, day: str | None) -> dict[str, Any]:
    """Fields of a teacher's manifest that need its config and tokenizer alone."""
    architecture = load_teacher_config(config).get_text_config()
    printed = None if day is None else date.fromisoformat(day)
    prompts = prompt_tokenizer_of(name, config, architecture.model_type, printed)
    facts = _facts(architecture, prompts)
    facts["architecture"].pop("quantization_config", None)  # loading completes it
    return {"model": config.model, **facts}


def prompt_tokenizer_of(
    name: str, config: TeacherConfig, model_type: str, day: date | None = None
) -> PromptTokenizer:
    """A teacher's tokenizer with its prompt template; raises TeacherError if one is unusable."""
    tokenizer = load_teacher_tokenizer(name, config)
    template = (
        chat_template(tokenizer, config.system, config.template_date or day)
        if config.chat
        else parse_template(config.template)
    )
    if config.template_date is not None and template.date is None:
        raise TeacherError(
            f"teacher {name!r}: its chat template prints no date; remove "
            f"teachers.{name}.template_date"
        )
    if config.generate is not None and template.source is None:
        template = SEGMENTS
    needs_bos = model_type.startswith("gemma")
    bos: Bos = "add" if config.bos == "always" or needs_bos else "keep"
    if config.bos == "never":
        bos = "remove"
    return PromptTokenizer(tokenizer, template, add_special_tokens=not config.chat, bos=bos)


def _chosen_layers(name: str, config: TeacherConfig, layers: Sequence[VerifiedLayer]) -> set[int]:
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


def _refuse_unavailable(
    name: str, extraction: ExtractionConfig, model: Any, verified: Verified
) -> None:
    hidden = [name for name in ("hidden_at_cue", "hidden") if getattr(extraction, name)]
    if verified.adapter.stream == "cross" and hidden:
        raise TeacherError(
            f"teacher {name!r}: extraction.{hidden[0]} does not apply to stream cross, whose "
            "tokens are the encoder's; leave it off, or set stream to encoder or decoder"
        )
    if not verified.sites and (extraction.importance or hidden):
        raise TeacherError(
            f"teacher {name!r}: no adapter fits {type(model).__name__}, so it is read from its "
            "cache, which has no queries and no hidden states; set extraction.importance, "
            ".hidden_at_cue and .hidden to false, or write an adapter "
            "(kvdistill/attention/adapters.py)"
        )
    problem = unexplained(verified.layers, model.dtype)
    if problem and extraction.importance and verified.adapter.stream != "cross":
        raise TeacherError(
            f"teacher {name!r}: importance cannot be computed for {type(model).__name__}, because "
            f"{problem}; set extraction.importance to false"
        )


def _refuse_unstorable(
    name: str, config: TeacherConfig, adapter: Adapter, layers: Sequence[VerifiedLayer]
) -> None:
    for layer in layers:
        unknown = sorted(set(config.heads or ()) - set(range(layer.num_key_value_heads)))
        if unknown:
            raise TeacherError(
                f"teacher {name!r}, layer {layer.layer_idx} has no key/value head {unknown}; it "
                f"has {layer.num_key_value_heads}; change teachers.{name}.heads"
            )
    if config.eviction is not None and adapter.stream == "cross" and config.eviction.ranks:
        raise TeacherError(
            f"teacher {name!r}: eviction {config.eviction.method} ranks by attention, which "
            "stream cross does not have; use right_crop, uniform or random"
        )


def _manifest(
    name: str,
    experiment: Experiment,
    model: Any,
    verified: Verified,
    *,
    layers: Sequence[VerifiedLayer],
    **facts: Any,
) -> TeacherManifest:
    config, extraction, adapter = experiment.teachers[name], experiment.extraction, verified.adapter
    settings = identity.recorded_settings(experiment, name)
    return TeacherManifest(
        name=name,
        model=config.model,
        revision=config.revision,
        model_type=model.config.model_type,
        kind=verified.kind,
        stream=adapter.stream,
        **facts,
        settings=settings,
        extraction_fingerprint=identity.extraction_fingerprint(settings),
        versions=provenance.versions(),
        dtype=config.dtype,
        attn_implementation=model.config._attn_implementation,
        backend=extraction.backend,
        codec=experiment.codec(name),
        groups=_layer_groups(layers, config.heads),
        kept_heads=config.heads,
        eviction=config.eviction,
        skipped_layers=verified.skipped,
        position_encoding=_position_encoding(verified),
        rotary={layer.layer_idx: layer.rotary for layer in layers if layer.rotary is not None},
        key_norm=adapter.key_norm,
        hidden_size=model.config.get_text_config().hidden_size,
        has_importance=extraction.importance and adapter.stream != "cross",
        has_hidden_at_cue=extraction.hidden_at_cue,
        has_hidden=extraction.hidden,
        has_summaries=extraction.summaries,
        parts=config.parts,
        own_text=config.generate is not None,
        adapter=adapter.name,
        adapter_error=max(layer.error for layer in verified.layers),
    )


def _layer_groups(
    layers: Sequence[VerifiedLayer], heads: Sequence[int] | None
) -> tuple[LayerGroup, ...]:
    """Layers of equal geometry, which the store keeps in one array."""

    def geometry(layer: VerifiedLayer) -> tuple[int, int, int]:
        num_heads = layer.num_key_value_heads if heads is None else len(heads)
        return num_heads, layer.key_head_dim, layer.value_head_dim

    ordered = sorted(layers, key=lambda layer: (geometry(layer), layer.layer_idx))
    groups = (
        LayerGroup(tuple(layer.layer_idx for layer in members), *shape)
        for shape, members in groupby(ordered, geometry)
    )
    return tuple(sorted(groups, key=lambda group: group.layers))


def _position_encoding(verified: Verified) -> Literal["rotary", "absolute", "relative", "none"]:
    if any(layer.rotary is not None for layer in verified.layers):
        return "rotary"
    if verified.behaviour.absolute_positions:
        return "absolute"
    return "relative" if any(x.bias is not None for x in verified.layers) else "none"


def max_positions(model: Any, limit: int | None) -> int | None:
    """Most tokens of a text: the model's positions, or ``limit`` if that is less."""
    trained = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    known = [length for length in (position_limit(model), trained, limit) if length and length > 0]
    return min(known, default=None)
