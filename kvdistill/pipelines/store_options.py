"""Ways to store a teacher, and what each costs: disk, and an error of what attention puts out.

Codecs are tried on a pilot's own keys and values. The error is that of the attention output before
the output projection, relative, where every layer gets the unmodified model's input; averaged over
the stored layers. Heads that are not stored count as no output. Where attention cannot be computed
from queries and keys, it is that of the keys and values.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
import torch
import yaml
from torch import Tensor

from kvdistill.attention.adapters import QKV
from kvdistill.attention.attention_rule import attention_output, unexplained
from kvdistill.attention.geometry import VerifiedLayer
from kvdistill.attention.verification import CACHE
from kvdistill.config.base import log_once
from kvdistill.config.experiment import Experiment
from kvdistill.corpus.samples import Sample
from kvdistill.errors import TeacherError
from kvdistill.extract.encode import TeacherPilot, bases_of, read_pilot
from kvdistill.extract.slots import keep_heads, num_slots
from kvdistill.extract.teacher import Teacher
from kvdistill.extract.tokenise import TokenisedSample, collate_teacher_batch
from kvdistill.store.codecs import CODECS, codec_of
from kvdistill.store.derived import with_bases
from kvdistill.store.format import group_prefix
from kvdistill.text import format_bytes
from kvdistill.types import KINDS, CodecSpec, StoredEviction

DISK_MARGIN: Final = 1.1
"""Factor for shards being written and for the pilot's error."""
SINGLE: Final = tuple(CodecSpec(key=x, value=x) for x in CODECS if x not in ("int4_v1", "klt"))
RATES: Final = ((4.3, 5.3), (3.0, 4.0), (1.7, 2.5), (0.8, 1.2))
TRIED: Final = (
    *(*SINGLE, CodecSpec(key="int8", value="int4")),
    *(CodecSpec(key="klt", value="klt", key_bits=k, value_bits=v) for k, v in RATES),
)
TRIAL_TOKENS: Final = 1024
"""Tokens of a text that codecs are tried on, at most: attention takes the square of it."""

OptionKind = tuple[str, str, str, str]
"""Codec; layers: ``all`` that the config stores, or the ``mapped`` ones that the student reads;
heads: ``all``, or the ``half`` of the KV heads whose attention puts out most; tokens: ``all``, or
the ``latent`` ones that ``latent.eviction`` keeps."""


@dataclass(frozen=True)
class StoreOption:
    """One way to store a teacher."""

    kind: OptionKind
    settings: dict[str, Any]
    """Of the teacher's section of the config."""
    layers: tuple[int, ...]
    gigabytes: float
    fixed_gigabytes: float
    """Token tables, which neither codec nor layers nor heads change."""
    error: float


@dataclass(frozen=True)
class StoreOptions:
    """The same kind of option for all teachers: sizes with a margin, the error of the worst."""

    kind: OptionKind
    teachers: dict[str, StoreOption]
    gigabytes: float
    fixed_gigabytes: float
    error: float

    @staticmethod
    def of(teachers: dict[str, StoreOption]) -> StoreOptions:
        """The sum of teachers."""
        own = list(teachers.values())
        size, fixed = sum(x.gigabytes for x in own), sum(x.fixed_gigabytes for x in own)
        worst = max(x.error for x in own)
        return StoreOptions(own[0].kind, teachers, DISK_MARGIN * size, DISK_MARGIN * fixed, worst)

    def share_within(self, gigabytes: float) -> float:
        """The share of its keys and values that would fit."""
        fixed = self.fixed_gigabytes
        return max(0.0, gigabytes - fixed) / max(self.gigabytes - fixed, 1e-12)


def joint_options(teachers: Mapping[str, Sequence[StoreOption]]) -> list[StoreOptions]:
    """Ways to store all teachers, the smallest error first.

    What is no smaller than something better of the same layers and tokens is left out.
    """
    by_kind = {name: {x.kind: x for x in own} for name, own in teachers.items()}
    rows: dict[str, StoreOptions] = {}
    for kind in (x.kind for x in next(iter(teachers.values()), ())):
        if all(kind in own for own in by_kind.values()):
            row = StoreOptions.of({name: own[kind] for name, own in by_kind.items()})
            # Where the student reads all layers, "mapped" is "all" again.
            rows.setdefault(str([x.settings for x in row.teachers.values()]), row)
    found: list[StoreOptions] = []
    for row in sorted(rows.values(), key=lambda x: (x.error, x.gigabytes)):
        better = [x.gigabytes for x in found if x.kind[1::2] == row.kind[1::2]]
        if row.gigabytes < min(better, default=float("inf")):
            found.append(row)
    return found


LEARNED: Final = (
    "the error is attention's; a student learned as much from klt at 1.1 bits as from int8 "
    "(docs/frontier.md)"
)


def disk_lines(
    options: Sequence[StoreOptions],
    gigabytes: float,
    depths: Mapping[str, Sequence[float] | None],
    text_tokens: float,
) -> Iterator[str]:
    """What fits on a disk, the best first, and how to ask for it, as text.

    ``depths`` are those that the student reads of every teacher, ``text_tokens`` a mean text has.
    """
    if not options:
        yield "\nnothing to try codecs on: no text of the pilot is short enough for the teachers"
        return
    fitting = [x for x in options if x.gigabytes <= gigabytes]
    what = "what fits, best first" if fitting else "nothing fits; the smallest is"
    yield f"\n{format_bytes(gigabytes * 1e9)} of disk: {what}"
    yield f"  {'error':>6}  {'size':>8}  {'codec':<12} {'layers':<7} {'heads':<6} tokens"
    for row in fitting or sorted(options, key=lambda x: x.gigabytes)[:1]:
        codec, layers, heads, tokens = row.kind
        total = format_bytes(row.gigabytes * 1e9)
        yield f"  {row.error:6.2%}  {total:>8}  {codec:<12} {layers:<7} {heads:<6} {tokens}"
    yield LEARNED
    if fitting:
        yield f"for the first, set in the experiment file:\n{_settings_yaml(fitting[0], depths)}"
    else:
        yield from (f"  would fit: {x}" for x in would_fit(options, gigabytes, text_tokens))


def would_fit(options: Sequence[StoreOptions], gigabytes: float, text_tokens: float) -> list[str]:
    """Where no option fits, what would: evenly spaced layers in the smallest one, and a budget of
    tokens, of ``text_tokens`` of a mean text, in the smallest codec that goes with an eviction.
    """
    smallest, *_ = by_size = sorted(options, key=lambda x: x.gigabytes)
    share, found = smallest.share_within(gigabytes), []
    for name, own in smallest.teachers.items():
        places = np.linspace(0, len(own.layers) - 1, int(share * len(own.layers)))
        found.append(f"teachers.{name}.layers {[own.layers[round(place)] for place in places]}")
    found = [f"the same with {' and '.join(found)}"] if not any("[]" in x for x in found) else []
    whole = next(x for x in by_size if not x.kind[0].startswith("klt"))
    if budget := int(whole.share_within(gigabytes) * text_tokens):
        found.append(
            f"codec {whole.kind[0]} with alignment.time latent, and an eviction of every teacher "
            f"that keeps {budget} tokens of a text (teachers.NAME.eviction.budget)"
        )
    return found or ["nothing; read a smaller corpus (corpus.max_samples)"]


def _settings_yaml(best: StoreOptions, depths: Mapping[str, Sequence[float] | None]) -> str:
    """The teachers' sections, and a layer map of the student's ``depths`` if it interpolates."""
    body: dict[str, Any] = {"teachers": {name: x.settings for name, x in best.teachers.items()}}
    rounded = {name: [round(depth, 3) for depth in own or ()] for name, own in depths.items()}
    if best.kind[1] == "mapped" and any(depth % 1 for own in rounded.values() for depth in own):
        body["alignment"] = {"layers": "explicit", "explicit_layers": rounded}
    return yaml.safe_dump(body, sort_keys=False, default_flow_style=None, width=10_000).rstrip()


class CodecTrial:
    """A codec on some texts: the bytes of their keys and values, and what attention loses."""

    def __init__(self, teacher: Teacher, spec: CodecSpec, pilot: TeacherPilot | None) -> None:
        manifest = teacher.manifest.model_copy(update={"codec": spec})
        self.spec, self.teacher = spec, replace(teacher, manifest=manifest)
        self.bases = bases_of(self.teacher, pilot) if spec.transforms and pilot else {}
        self.transforms = with_bases(manifest, self.bases) if self.bases else {}
        self.num_bytes, self.num_tokens = 0, 0
        """Of keys and values, before any compression; of the texts."""
        self.squares: dict[int, Tensor] = {}
        """Of attention's error and output, by layer and stored KV head: float64 ``[2, H]``."""

    @property
    def basis_bytes(self) -> int:
        """Of ``klt``'s bases, which are a file of the teacher."""
        return sum(x.basis.nbytes + 8 * len(x.mean) for x in self.bases.values())

    def add(self, text: Mapping[int, QKV]) -> dict[int, QKV]:
        """Try it on a text, ``[1, H, T, D]`` by layer; returns it with keys and values decoded."""
        found, kept = dict(text), self.teacher.manifest.kept_heads
        heads = slice(None) if kept is None else list(kept)
        groups = enumerate(self.teacher.manifest.groups)
        for (i, group), kind in itertools.product(groups, KINDS):
            codec = codec_of(
                self.spec, kind, self.transforms, group_prefix(self.teacher.manifest, i)
            )
            stored = [getattr(keep_heads(text[layer], kept), kind) for layer in group.layers]
            encoded = codec.encode(torch.cat(stored), kind)
            self.num_bytes += sum(part.nbytes for part in encoded.values())
            for layer, decoded in zip(group.layers, codec.decode(encoded, kind), strict=True):
                x_BHTD = getattr(text[layer], kind).clone()
                x_BHTD[0, heads] = decoded
                found[layer] = found[layer]._replace(**{kind: x_BHTD})
        self.num_tokens += stored[0].shape[2]
        for layer, squares in _output_squares(self.teacher, text, found).items():
            self.squares[layer] = self.squares.get(layer, 0) + squares[:, heads]
        return found

    def error(self, layers: Sequence[int], heads: Sequence[int] | None = None) -> float:
        """Relative error of the output, a mean over layers; heads but these put out nothing."""
        errors = []
        for error_H, output_H in (self.squares[layer] for layer in layers):
            chosen = range(len(output_H)) if heads is None else heads
            lost = float(output_H.sum() + sum(error_H[i] - output_H[i] for i in chosen))
            errors.append((max(lost, 0.0) / max(float(output_H.sum()), 1e-30)) ** 0.5)
        return float(np.mean(errors))


def captured(teacher: Teacher, tokens: TokenisedSample) -> dict[int, QKV]:
    """Unrotated queries, keys and values of one text by layer, float32 ``[1, H, T, D]``."""
    batch = collate_teacher_batch([tokens], [0], teacher.pad_id, teacher.device)
    found: dict[int, QKV] = {}

    def keep(layer_idx: int, qkv: QKV) -> None:
        found[layer_idx] = QKV(*(x.float() for x in qkv))

    teacher.run(batch, keep)
    return found


def _output_squares(
    teacher: Teacher, text: Mapping[int, QKV], other: Mapping[int, QKV]
) -> dict[int, Tensor]:
    modules = {site.layer_idx: site.attention for site in teacher.sites}
    dtype = getattr(torch, teacher.manifest.dtype)
    is_known = teacher.manifest.adapter != CACHE.name and not unexplained(teacher.layers, dtype)

    def output(rule: VerifiedLayer, qkv: QKV) -> Tensor:
        if not is_known:
            return torch.cat([qkv.key, qkv.value], dim=-1)[0].flatten(1)
        sinks = getattr(modules[rule.layer_idx], rule.sinks) if rule.sinks else None
        return attention_output(rule, *qkv, sinks)[0].flatten(1)

    found = {}
    for rule in teacher.layers:
        exact, near = (output(rule, states[rule.layer_idx]) for states in (text, other))
        squares = torch.stack([(near - exact).square().sum(1), exact.square().sum(1)])
        found[rule.layer_idx] = squares.double().cpu()
    return found


@torch.inference_mode()
def try_codecs(
    teacher: Teacher, samples: Sequence[Sample], corpus: Sequence[Sample], batch_tokens: int
) -> list[CodecTrial]:
    """The configured codec and ``TRIED`` on samples; ``klt`` is fitted on others of the corpus."""
    ids, own, trials = {x.sample_id for x in samples}, teacher.manifest.codec, []
    unseen = [sample for sample in corpus if sample.sample_id not in ids]
    fitted = {"codec": own if own.transforms else TRIED[-1]}
    reader = replace(teacher, manifest=teacher.manifest.model_copy(update=fitted))
    pilot = None if teacher.manifest.eviction else read_pilot(reader, unseen, batch_tokens)
    for spec in dict.fromkeys([own, *TRIED]):
        try:
            if pilot is not None or not spec.transforms:
                trials.append(CodecTrial(teacher, spec, pilot))
        except TeacherError as error:  # the pilot has too few tokens
            log_once(str(error))
    limit = min(teacher.max_length or TRIAL_TOKENS, TRIAL_TOKENS)
    for tokens in teacher.tokenise(samples, limit):
        text = captured(teacher, tokens)
        for trial in trials:
            trial.add(text)
    return trials


def kept_tokens(encoded: Sequence[TokenisedSample], eviction: StoredEviction | None) -> float:
    """Share of tokens that an eviction stores."""
    if eviction is None:
        return 1.0
    stored = sum(num_slots(sample.segment, eviction) for sample in encoded)
    return stored / max(sum(sample.num_tokens for sample in encoded), 1)


def store_options(
    experiment: Experiment,
    teacher: Teacher,
    trials: Sequence[CodecTrial],
    encoded: Sequence[TokenisedSample],
    *,
    mapped: Sequence[int],
    sizes: Mapping[str, float],
    tokens: int,
) -> Iterator[StoreOption]:
    """Every combination of codec, layers, heads and tokens.

    ``encoded`` is the pilot, ``mapped`` are the layers that the student reads, ``sizes`` measured
    bytes per token by codec name, ``tokens`` those of the corpus.
    """
    manifest = teacher.manifest
    num_heads = {i: g.num_key_value_heads for g in manifest.groups for i in g.layers}
    width = {i: g.key_head_dim + g.value_head_dim for g in manifest.groups for i in g.layers}
    layers = {"all": manifest.layers, "mapped": tuple(mapped) or manifest.layers}
    half = None if manifest.kept_heads else _half_of_heads(trials[0])
    heads: dict[str, list[int] | None] = {"all": None, "half": half}
    evictions = {"all": manifest.eviction} | _latent_eviction(experiment, teacher)
    shares = {name: kept_tokens(encoded, eviction) for name, eviction in evictions.items()}
    raw = {trial.spec: trial.num_bytes / max(trial.num_tokens, 1) for trial in trials}
    # Of a token: importance, 2 bytes per layer and head, and what depends on neither.
    received = 2 * manifest.has_importance * sum(num_heads.values())
    tables = sizes["bf16"] - shares["all"] * (raw[SINGLE[0]] + received)
    for trial, *names in itertools.product(trials, layers, heads, evictions):
        spec, chosen, only = trial.spec, layers[names[0]], heads[names[1]]
        if spec.transforms and names[2] != "all":
            continue
        size = shares["all"] * (raw[spec] + received)
        if spec in SINGLE:  # as measured: compressed
            size = sizes[codec_name(spec)] - tables
        stored = sum(width[i] * (len(only) if only else num_heads[i]) for i in chosen)
        part = stored / sum(width[i] * num_heads[i] for i in width)
        size *= part * shares[names[2]] / max(shares["all"], 1e-12)
        codec = {"key": spec.key, "value": spec.value} | spec.model_dump(exclude_defaults=True)
        settings: dict[str, Any] = {"codec": codec}
        settings |= {"layers": list(chosen)} if chosen != manifest.layers else {}
        settings |= {"heads": only} if only else {}
        if (eviction := evictions[names[2]]) != manifest.eviction and eviction is not None:
            settings["eviction"] = eviction.model_dump(mode="json", exclude_defaults=True)
        rates = f" {spec.key_bits:g}/{spec.value_bits:g}" if spec.transforms else ""
        yield StoreOption(
            (codec_name(spec) + rates, names[0], names[1], names[2]),
            settings,
            tuple(chosen),
            (tokens * (tables + size) + part * trial.basis_bytes) / 1e9,
            tokens * tables / 1e9,
            trial.error(chosen, only),
        )


def codec_name(spec: CodecSpec) -> str:
    """``int8``, or ``key/value``."""
    return spec.key if spec.key == spec.value else f"{spec.key}/{spec.value}"


def _half_of_heads(trial: CodecTrial) -> list[int] | None:
    """The half of the KV heads whose attention puts out most; None where layers differ in heads."""
    shares = [output_H / output_H.sum().clamp_min(1e-30) for _, output_H in trial.squares.values()]
    if len({len(share_H) for share_H in shares}) > 1 or len(shares[0]) == 1:
        return None
    best: list[int] = torch.stack(shares).mean(0).topk((len(shares[0]) + 1) // 2).indices.tolist()
    return sorted(best)


def _latent_eviction(experiment: Experiment, teacher: Teacher) -> dict[str, StoredEviction | None]:
    """What a latent student reads, as an eviction at extraction."""
    latent, manifest = experiment.latent, teacher.manifest
    if latent is None or experiment.alignment.time != "latent":
        return {}
    own = {"method": latent.eviction.method, "budget": latent.budget, "mix": latent.eviction.mix}
    eviction = StoredEviction.model_validate(own)
    can_rank = manifest.has_importance or not eviction.ranks
    return {"latent": eviction if can_rank and not manifest.eviction else manifest.eviction}
