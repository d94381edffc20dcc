"""One committed shard, open for reading: select its arrays, and decode them.

Two levels are read: ``read`` returns stored codes of whole layers and heads, ``decode`` and
``decode_shard`` return float32 keys or values of a sample or of the shard.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from kvdistill.corpus.samples import Sample
from kvdistill.errors import GeometryError, ShardCorrupt
from kvdistill.store.backends import ArrayReader, Backend
from kvdistill.store.backends.safetensors import SafetensorsBackend
from kvdistill.store.backends.zarr import ZarrBackend
from kvdistill.store.channel_statistics import ChannelStatistics
from kvdistill.store.codecs import CODECS, Codec, Transforms, codec_of
from kvdistill.store.codecs.klt import Transform
from kvdistill.store.codecs.parts import part_name, parts_of
from kvdistill.store.commit import REMEDY, checked_bytes
from kvdistill.store.format import (
    TEXTS,
    TOKEN_COLUMNS,
    UNPREDICTED,
    ArraySpec,
    Counts,
    common_group,
    group_prefix,
    shard_arrays,
)
from kvdistill.store.manifest import Commit, TeacherManifest
from kvdistill.store.shard import BLOCK_TOKENS, TokenTable, block_idx, block_ptr
from kvdistill.types import Kind

BACKENDS: Final[dict[str, Backend]] = {"zarr": ZarrBackend(), "safetensors": SafetensorsBackend()}

Positions = tuple[list[int] | None, list[int] | None]


def open_shard(
    folder: Path,
    manifest: TeacherManifest,
    commit: Commit,
    transforms: Callable[[], Transforms] = dict,
) -> OpenedShard:
    """Open a committed shard after checking its metadata against manifest and commit.

    ``transforms`` loads what decodes codec klt.

    Raises:
        ShardCorrupt: metadata or token boundaries do not match.
    """
    counts = Counts(commit.num_samples, commit.num_tokens, commit.num_blocks)
    specs = shard_arrays(manifest, counts)
    data = BACKENDS[manifest.backend].open(folder, commit, specs)
    ptr = data.read("sample_ptr")
    if ptr[0] != 0 or bool((np.diff(ptr) < 0).any()) or ptr[-1] != counts.num_tokens:
        raise ShardCorrupt(
            f"{folder}: sample_ptr does not rise from 0 to {counts.num_tokens}; {REMEDY}"
        )
    blocks = block_ptr(ptr)
    if blocks[-1] != counts.num_blocks:
        raise ShardCorrupt(
            f"{folder}: sample_ptr gives {blocks[-1]} blocks, expected the committed "
            f"{counts.num_blocks}; {REMEDY}"
        )
    return OpenedShard(folder, manifest, commit, specs, data, ptr, blocks, transforms)


def read_samples(text: str) -> tuple[Sample, ...]:
    """Samples from JSON lines."""
    return tuple(Sample.from_json(line) for line in text.split("\n") if line)


@dataclass(frozen=True, eq=False)
class OpenedShard:
    """An open shard: its files, and the manifest and commit that describe them."""

    folder: Path
    manifest: TeacherManifest
    commit: Commit
    specs: dict[str, ArraySpec]
    data: ArrayReader
    sample_ptr: NDArray[np.int64]
    block_ptr: NDArray[np.int64]
    transforms: Callable[[], Transforms]

    def token_table(self) -> TokenTable:
        """The token table; read from disk at every call."""
        sample_ids = self.data.attributes.get("sample_ids")
        if not isinstance(sample_ids, list) or len(sample_ids) != self.commit.num_samples:
            raise ShardCorrupt(
                f"{self.folder}: sample_ids is not a list of the committed "
                f"{self.commit.num_samples}; {REMEDY}"
            )
        columns = {name: self.data.read(name) for name in TOKEN_COLUMNS}
        return TokenTable(tuple(sample_ids), self.sample_ptr, **columns)

    def own_texts(self) -> tuple[Sample, ...] | None:
        """The teacher's own text if it generated its rationales, else None."""
        if not self.manifest.own_text:
            return None
        return read_samples(checked_bytes(self.folder, TEXTS, self.commit).decode("utf-8"))

    def read(
        self, layers: Sequence[int] | None, heads: Sequence[int] | None, kinds: Sequence[Kind]
    ) -> dict[str, np.ndarray]:
        """Stored arrays of the selected layers, heads and kinds. See ``KVStore.read_shard``."""
        _refuse_unknown_layers(self.manifest, layers)
        arrays = {}
        for name in self._names(kinds):
            positions = axis_positions(self.specs[name], layers, heads)
            if positions is not None:
                arrays[name] = self.data.read(name, *positions)
        return arrays

    def decode_shard(
        self, kind: Kind, layers: Sequence[int] | None, heads: Sequence[int] | None
    ) -> NDArray[np.float32]:
        """Decoded float32 ``[L, H, T, D]``. See ``KVStore.read_decoded``."""
        _refuse_unknown_layers(self.manifest, layers)
        stem = self._stem(kind, layers)
        arrays = self.read(layers, heads, [kind])
        parts = parts_of(arrays, stem)
        parts["first"] = np.where(np.diff(self.sample_ptr) > 0, self.sample_ptr[:-1], -1)
        return self._codec(kind, layers, heads).decode(parts, kind, block_idx(self.sample_ptr))

    def decode(
        self,
        sample_idx: int,
        kind: Kind,
        layers: Sequence[int] | None,
        heads: Sequence[int] | None,
        tokens: slice,
    ) -> NDArray[np.float32]:
        """Decoded float32 ``[L, H, tokens, D]`` of one sample. See ``KVStore.read_sample``."""
        _refuse_unknown_layers(self.manifest, layers)
        first, last = map(int, self.sample_ptr[sample_idx : sample_idx + 2])
        start, stop, step = tokens.indices(last - first)
        if step != 1:
            raise GeometryError(f"tokens must be a slice without a step, got {tokens}")
        stop = max(start, stop)
        block = int(self.block_ptr[sample_idx])
        spans = {
            "token": slice(first + start, first + stop),
            "block": slice(block + start // BLOCK_TOKENS, block - (-stop // BLOCK_TOKENS)),
            "sample": slice(sample_idx, sample_idx + 1),
        }
        stem, codec = self._stem(kind, layers), self._codec(kind, layers, heads)
        parts = {}
        for part in codec.parts(kind):
            name = part_name(stem, part.suffix)
            layer_idx, head_idx = axis_positions(self.specs[name], layers, heads) or (None, None)
            parts[part.suffix] = self.data.read(name, layer_idx, head_idx, spans[part.per])
        token_blocks = np.arange(start, stop) // BLOCK_TOKENS - start // BLOCK_TOKENS
        parts["first"] = np.array([0 if start == 0 < stop else -1])
        return codec.decode(parts, kind, token_blocks)

    def _codec(
        self, kind: Kind, layers: Sequence[int] | None, heads: Sequence[int] | None
    ) -> Codec:
        """The codec of what is read of these layers and heads."""
        prefix = group_prefix(self.manifest, common_group(self.manifest, layers))
        codec = codec_of(self.manifest.codec, kind, self.transforms(), prefix)
        return codec.select(layers, heads) if isinstance(codec, Transform) else codec

    def statistics(self) -> dict[str, ChannelStatistics]:
        """This shard's statistics by ``"key"``, ``"value"`` (``"g0/key"`` …)."""
        end = "_statistics"
        return {
            name.removesuffix(end): ChannelStatistics.from_array(self.data.read(name))
            for name in self.specs
            if name.endswith(end)
        }

    def _stem(self, kind: Kind, layers: Sequence[int] | None) -> str:
        """Name of the array that holds a kind of these layers."""
        return f"{group_prefix(self.manifest, common_group(self.manifest, layers))}{kind}"

    def _names(self, kinds: Sequence[Kind]) -> list[str]:
        """Arrays that ``read`` returns: parts of the kinds, importance, kept and others."""
        stems = [group_prefix(self.manifest, i) for i in range(len(self.manifest.groups))]
        names = [
            part_name(f"{stem}{kind}", part.suffix)
            for stem in stems
            for kind in kinds
            for part in CODECS[getattr(self.manifest.codec, kind)].parts(kind)
        ]
        names += [f"{stem}{name}" for stem in stems for name in ("importance", "kept")]
        others = [
            n
            for n, x in self.specs.items()
            if x.group is None and {"sample", UNPREDICTED} & {*x.axes, *x.attributes}
        ]
        return [name for name in names if name in self.specs] + others


def axis_positions(
    spec: ArraySpec, layers: Sequence[int] | None, heads: Sequence[int] | None
) -> Positions | None:
    """Ascending positions on the layer and head axes; None if the array has none of the layers."""
    if spec.group is None:
        return (None, None)
    if spec.rows:
        held = [i for i, row in enumerate(spec.rows) if layers is None or set(layers) & set(row)]
        return (held if layers else None, None) if held else None
    num_heads = spec.group.num_key_value_heads
    if heads is not None and (
        not heads or len(set(heads)) != len(heads) or not set(heads) <= set(range(num_heads))
    ):
        raise GeometryError(
            f"heads {list(heads)} requested of layers with {num_heads} key/value heads; expected "
            f"distinct numbers from 0 to {num_heads - 1}"
        )
    head_idx = None if heads is None else sorted(heads)
    if layers is None:
        return (None, head_idx)
    chosen = [i for i, layer in enumerate(spec.group.layers) if layer in set(layers)]
    return (chosen, head_idx) if chosen else None


def _refuse_unknown_layers(manifest: TeacherManifest, layers: Sequence[int] | None) -> None:
    if layers is None:
        return
    if not layers or len(set(layers)) != len(layers) or not set(layers) <= set(manifest.layers):
        raise GeometryError(
            f"teacher {manifest.name!r} stores the layers {list(manifest.layers)}; layers "
            f"{list(layers)} were requested"
        )
