"""The layout of a store: its folders, and the arrays of a shard.

    STORE/kvstore.json
    STORE/corpus/<shard>.jsonl
    STORE/teachers/<teacher>/teacher.json
    STORE/teachers/<teacher>/shards/<shard>/     committed shards, and nothing else
    STORE/teachers/<teacher>/tmp/                shards being written
    STORE/teachers/<teacher>/aside/              shards that ``verify --repair`` moved away

Names reach a path only through ``checked_name``, so no manifest can point outside the store.

``shard_arrays`` derives names, axes, shapes and dtypes of a shard's arrays from the teacher's
manifest. The writer refuses what deviates from it, the reader compares files with it before
allocating, and ``verify`` compares both with the disk.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from kvdistill.errors import GeometryError, StoreFormatError
from kvdistill.store.codecs import CODECS
from kvdistill.store.codecs.klt import layer_blocks, token_bytes
from kvdistill.store.codecs.parts import part_name
from kvdistill.store.manifest import TeacherManifest
from kvdistill.store.shard import BLOCK_TOKENS
from kvdistill.types import CodecSpec, Kind, LayerGroup

MANIFEST: Final = "kvstore.json"

TEACHER: Final = "teacher.json"

COMMIT: Final = "COMMIT.json"

TEXTS: Final = "texts.jsonl"

TOKEN_COLUMNS: Final = {
    "token_ids": "int32",
    "char_start": "int32",
    "char_end": "int32",
    "segment": "int8",
}

UNPREDICTED: Final = "unpredicted"
"""Attribute of predictions: what stands for a text's first token, which nothing predicts."""

NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


@dataclass(frozen=True)
class StorePaths:
    """Every path of the store under ``root``."""

    root: Path

    @property
    def manifest(self) -> Path:
        """The frozen plan."""
        return self.root / MANIFEST

    @property
    def teachers(self) -> Path:
        """One folder per teacher."""
        return self.root / "teachers"

    @property
    def corpus(self) -> Path:
        """The samples, one file per shard."""
        return self.root / "corpus"

    def samples(self, shard_id: str) -> Path:
        """The samples of one shard, one JSON line each."""
        return self.corpus / f"{checked_name(shard_id)}.jsonl"

    def teacher(self, teacher: str) -> Path:
        """The folder of one teacher."""
        return self.teachers / checked_name(teacher)

    def teacher_manifest(self, teacher: str) -> Path:
        """Provenance and geometry of one teacher."""
        return self.teacher(teacher) / TEACHER

    def statistics(self, teacher: str, part: str = "") -> Path:
        """Channel statistics of a teacher's committed shards, or those of a part of the plan."""
        return self.teacher(teacher) / f"statistics{part}.safetensors"

    def prototypes(self, teacher: str, part: str = "") -> Path:
        """Prototype vectors of one teacher, for routers, likewise."""
        return self.teacher(teacher) / f"prototypes{part}.safetensors"

    def transform(self, teacher: str) -> Path:
        """Bases of codec klt; see ``derived.py``."""
        return self.teacher(teacher) / "transform.safetensors"

    def shards(self, teacher: str) -> Path:
        """The committed shards of one teacher."""
        return self.teacher(teacher) / "shards"

    def shard(self, teacher: str, shard_id: str) -> Path:
        """One committed shard."""
        return self.shards(teacher) / checked_name(shard_id)

    def temporary(self, teacher: str) -> Path:
        """Shards that are being written."""
        return self.teacher(teacher) / "tmp"

    def aside(self, teacher: str) -> Path:
        """Damaged shards, moved here by a repair so that no check deletes anything."""
        return self.teacher(teacher) / "aside"


def checked_name(name: str) -> str:
    """Return ``name`` if it is a valid folder name inside the store.

    Raises:
        StoreFormatError: it does not begin with a letter or digit, has characters other than
            letters, digits, ``.``, ``_`` and ``-``, or more than 100 of them.
    """
    if not NAME.fullmatch(name):
        raise StoreFormatError(
            f"{name!r} is not a usable name: up to 100 letters, digits, '.', '_' and '-', "
            "beginning with a letter or digit"
        )
    return name


def folder_names(parent: Path) -> set[str]:
    """Names of the folders in ``parent`` that may be ours; empty if there is no such folder.

    File systems, desktops and people leave other entries: ``.snapshot``, ``lost+found``.
    """
    try:
        with os.scandir(parent) as entries:
            return {
                entry.name for entry in entries if NAME.fullmatch(entry.name) and entry.is_dir()
            }
    except (FileNotFoundError, NotADirectoryError):
        return set()


@dataclass(frozen=True)
class Counts:
    """The sizes of a shard that are not in its teacher's manifest."""

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
    rows: tuple[tuple[int, ...], ...] = ()
    """Layers of each position of the first axis, where these are several (codec klt)."""


def group_prefix(manifest: TeacherManifest, group_idx: int) -> str:
    """``"g0/"`` … if a teacher has several geometries, else empty."""
    return f"g{group_idx}/" if len(manifest.groups) > 1 else ""


def common_group(manifest: TeacherManifest, layers: Sequence[int] | None) -> int:
    """Index of the group that holds these layers (all when None), and so their arrays.

    Raises:
        GeometryError: they are of several geometries, or not stored.
    """
    chosen = set(manifest.layers if layers is None else layers)
    for group_idx, group in enumerate(manifest.groups):
        if chosen and chosen <= set(group.layers):
            return group_idx
    raise GeometryError(
        f"teacher {manifest.name!r}: layers {sorted(chosen)} are not of one geometry; choose from "
        f"one of {[list(group.layers) for group in manifest.groups]}"
    )


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
    yield from _prediction_specs(manifest, counts.num_tokens)
    for group_idx, group in enumerate(manifest.groups):
        prefix = group_prefix(manifest, group_idx)
        yield from _group_specs(manifest, counts, group, prefix)


def _prediction_specs(manifest: TeacherManifest, num_tokens: int) -> Iterator[ArraySpec]:
    """What the teacher thought of every token; see ``extract/predictions.py``."""
    columns = {"nll": 1, "entropy": 1} if manifest.has_confidence else {}
    if manifest.num_logits:
        columns |= {"top_ids": 2, "top_logprobs": 2, "rest_logprob": 1}
    for name, num_axes in columns.items():
        axes, shape = ("token", "rank"), (num_tokens, manifest.num_logits)
        dtype, first = ("int32", "-1") if name == "top_ids" else ("float16", "nan")
        yield ArraySpec(name, axes[:num_axes], shape[:num_axes], dtype, {UNPREDICTED: first})


def _packed_spec(
    codec: CodecSpec, group: LayerGroup, kind: Kind, num_tokens: int
) -> dict[str, Any]:
    """Codes of klt: a position per block of layers, named by its first one, and no heads."""
    rows = layer_blocks(group.layers, codec.block_layers)
    width = token_bytes(group, kind, codec)
    return {
        "axes": ("block", "head", "token", "byte"),
        "shape": (len(rows), 1, num_tokens, width),
        "group": LayerGroup(tuple(layers[0] for layers in rows), 1, width, width),
        "rows": tuple(rows),
    }


def _group_specs(
    manifest: TeacherManifest, counts: Counts, group: LayerGroup, prefix: str
) -> Iterator[ArraySpec]:
    lead = (len(group.layers), group.num_key_value_heads)
    for kind in manifest.kinds:
        codec, (num_heads, dim) = CODECS[getattr(manifest.codec, kind)], manifest.shape(group, kind)
        heads = (len(group.layers), num_heads)
        for part in codec.parts(kind):
            attributes: dict[str, str | int] = {
                "role": part.suffix or "codes",
                "codec": codec.name,
                "logical_dtype": part.logical,
            }
            if part.per == "block":
                attributes["block_tokens"] = BLOCK_TOKENS
            length: int = getattr(counts, f"num_{part.per}s")
            place: dict[str, Any] = {
                "axes": ("layer", "head", part.per, "dim"),
                "shape": (*heads, length, part.width(dim)),
                "group": replace(group, num_key_value_heads=num_heads),
            }
            if part.channels == "packed":
                place = _packed_spec(manifest.codec, group, kind, length)
            name = part_name(f"{prefix}{kind}", part.suffix)
            yield ArraySpec(name, dtype=part.dtype, attributes=attributes, **place)
        yield ArraySpec(
            f"{prefix}{kind}_statistics",
            ("count_mean_m2", "layer", "head", "dim"),
            (3, *heads, dim),
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
