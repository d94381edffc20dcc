"""Which arrays a shard has: names, axes, shapes and dtypes, derived from the teacher's manifest.

One function answers for everybody: the writer refuses what deviates from it, the reader checks
what it finds against it before a byte is allocated, and ``verify`` compares both with the disk.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Final

from kvdistill.store.codecs import CODECS, Part, part_name
from kvdistill.store.manifest import TeacherManifest
from kvdistill.store.shard import BLOCK_TOKENS
from kvdistill.types import KINDS, Kind, LayerGroup

TOKEN_COLUMNS: Final = {
    "token_ids": "int32",
    "char_start": "int32",
    "char_end": "int32",
    "segment": "int8",
}


@dataclass(frozen=True)
class Counts:
    """What fixes a shard's shapes besides the manifest."""

    num_samples: int
    num_tokens: int
    num_blocks: int


@dataclass(frozen=True)
class ArraySpec:
    """One stored array. ``group`` is set where the first two axes are layers and heads."""

    name: str
    axes: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: str
    attributes: dict[str, str | int] = field(default_factory=dict)
    group: LayerGroup | None = None


def group_prefix(manifest: TeacherManifest, group_idx: int) -> str:
    """``"g0/"`` … where a teacher has several geometries, else empty."""
    return f"g{group_idx}/" if len(manifest.groups) > 1 else ""


def shard_arrays(manifest: TeacherManifest, counts: Counts) -> dict[str, ArraySpec]:
    """Every array of a shard, by name."""
    return {spec.name: spec for spec in _specs(manifest, counts)}


def _specs(manifest: TeacherManifest, counts: Counts) -> Iterator[ArraySpec]:
    yield ArraySpec("sample_ptr", ("boundary",), (counts.num_samples + 1,), "int64")
    for name, dtype in TOKEN_COLUMNS.items():
        yield ArraySpec(name, ("token",), (counts.num_tokens,), dtype)
    if manifest.has_hidden_at_cue:
        shape = (len(manifest.layers) + 1, counts.num_samples, manifest.hidden_size)
        yield ArraySpec("hidden_at_cue", ("layer", "sample", "hidden"), shape, "float32")
    if manifest.has_summaries:
        shape = (2, counts.num_samples, manifest.hidden_size)
        yield ArraySpec("hidden_summary", ("mean_first", "sample", "hidden"), shape, "float32")
    for group_idx, group in enumerate(manifest.groups):
        prefix = group_prefix(manifest, group_idx)
        yield from _group_specs(manifest, counts, group, prefix)


def _group_specs(
    manifest: TeacherManifest, counts: Counts, group: LayerGroup, prefix: str
) -> Iterator[ArraySpec]:
    lead = (len(group.layers), group.num_key_value_heads)
    for kind in KINDS:
        codec = CODECS[manifest.codec.key if kind == "key" else manifest.codec.value]
        for part in codec.parts(kind):
            yield replace(
                _part_spec(part, kind, group, counts),
                name=part_name(f"{prefix}{kind}", part.suffix),
                attributes=_attributes(part, codec.name),
            )
        yield ArraySpec(
            f"{prefix}{kind}_statistics",
            ("count_mean_m2", "layer", "head", "dim"),
            (3, *lead, group.head_dim(kind)),
            "float64",
        )
    if manifest.has_importance:
        shape = (*lead, counts.num_tokens)
        yield ArraySpec(
            f"{prefix}importance", ("layer", "head", "token"), shape, "float16", group=group
        )
    if manifest.eviction is not None:
        shape = (*lead, counts.num_tokens)
        yield ArraySpec(f"{prefix}kept", ("layer", "head", "token"), shape, "int32", group=group)


def _part_spec(part: Part, kind: Kind, group: LayerGroup, counts: Counts) -> ArraySpec:
    length = counts.num_tokens if part.per == "token" else counts.num_blocks
    width = part.width(group.head_dim(kind))
    shape = (len(group.layers), group.num_key_value_heads, length, width)
    return ArraySpec("", ("layer", "head", part.per, "dim"), shape, part.dtype, group=group)


def _attributes(part: Part, codec: str) -> dict[str, str | int]:
    attributes: dict[str, str | int] = {
        "role": part.suffix or "codes",
        "codec": codec,
        "logical_dtype": part.logical,
    }
    if part.per == "block":
        attributes["block_tokens"] = BLOCK_TOKENS
    return attributes
