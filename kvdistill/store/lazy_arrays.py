"""A store as lazy dask and xarray arrays: data is read when something is computed.

One dask chunk is one layer of one shard, decoded to float32, so a reduction over a store of any
size needs the memory of a few chunks, on threads or on a distributed cluster: tasks carry only
the store's path.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from kvdistill.errors import GeometryError
from kvdistill.store.format import UNPREDICTED, ArraySpec, Counts, common_group, shard_arrays
from kvdistill.store.reader import KVStore
from kvdistill.types import PLURALS, Kind

if TYPE_CHECKING:
    import xarray


def dask_array(
    store: KVStore,
    teacher: str,
    kind: Kind,
    *,
    layer: int | None = None,
    head: int | None = None,
    shard_ids: Sequence[str] | None = None,
) -> Any:
    """Decoded keys or values of the committed shards, in order, as one lazy array.

    float32 ``[L, H, T, D]``; ``layer`` (the teacher's own index) and ``head`` drop their axis.

    Raises:
        ShardNotFound: nothing is committed.
        GeometryError: no such layer or head; or ``layer`` is None and layers differ in geometry.
    """
    manifest = store.teacher(teacher)
    group = manifest.groups[common_group(manifest, None if layer is None else [layer])]
    num_heads, dim = manifest.shape(group, kind)
    if head is not None and not 0 <= head < num_heads:
        what = PLURALS[kind]
        raise GeometryError(f"head {head} requested of layers with {num_heads} heads of {what}")
    layers = group.layers if layer is None else (layer,)
    heads = None if head is None else [head]
    sizes = (num_heads if head is None else 1, dim)
    array = _stack(store, teacher, (kind, layers, heads), sizes, shard_ids)
    index = (0 if layer is not None else slice(None), 0 if head is not None else slice(None))
    return array[index]


def dataset(
    store: KVStore,
    teacher: str,
    *,
    layers: Sequence[int] | None = None,
    shard_ids: Sequence[str] | None = None,
) -> xarray.Dataset:
    """Keys, values, hidden states, importance, predictions, token table: with named dimensions.

    Dimensions ``layer, head, token, key_dim, value_dim``, for hidden states ``layer, one, token,
    hidden_dim``; coordinates ``layer`` (the teacher's own index) and per token ``sample``,
    ``token_id``, ``segment``, ``char_start``, ``char_end``.
    The token table is read immediately, everything else when it is computed.

    Raises:
        ShardNotFound: nothing is committed.
        GeometryError: the layers differ in geometry.
    """
    import xarray

    manifest = store.teacher(teacher)
    group = manifest.groups[common_group(manifest, layers)]
    chosen = tuple(sorted(layers)) if layers is not None else group.layers
    variables: dict[str, Any] = {}
    for kind in manifest.kinds:
        sizes: tuple[int, ...] = manifest.shape(group, kind)
        array = _stack(store, teacher, (kind, chosen, None), sizes, shard_ids)
        heads = "one" if kind == "hidden" else "head"
        variables[kind] = (("layer", heads, "token", f"{kind}_dim"), array)
    if manifest.has_importance:
        sizes = (group.num_key_value_heads,)
        array = _stack(store, teacher, ("importance", chosen, None), sizes, shard_ids)
        variables["importance"] = (("layer", "head", "token"), array)
    coordinates = {"layer": list(chosen), **_token_coordinates(store, teacher, shard_ids)}
    for name, spec in shard_arrays(manifest, Counts(0, 0, 0)).items():
        if UNPREDICTED in spec.attributes:
            variables[name] = (spec.axes, _stack_tokens(store, teacher, spec, shard_ids))
    return xarray.Dataset(variables, coordinates, {"teacher": teacher})


Selection = tuple[str, tuple[int, ...], list[int] | None]


def _stack(
    store: KVStore,
    teacher: str,
    selection: Selection,
    sizes: tuple[int, ...],
    shard_ids: Sequence[str] | None,
) -> Any:
    """``[layer, sizes[0], token, *sizes[1:]]`` of all shards: a chunk per shard and layer."""
    import dask
    import dask.array as da

    name, layers, heads = selection
    shards = store.committed_in_order(teacher) if shard_ids is None else list(shard_ids)
    counts = {shard_id: store.commit(teacher, shard_id).num_tokens for shard_id in shards}
    read, root = dask.delayed(_read_chunk, pure=True), store.place.location
    rows = []
    for layer in layers:
        pieces = [
            da.from_delayed(
                read(root, teacher, shard_id, (name, (layer,), heads)),
                (1, sizes[0], counts[shard_id], *sizes[1:]),
                np.float32,
            )
            for shard_id in shards
        ]
        rows.append(da.concatenate(pieces, axis=2))
    return da.concatenate(rows, axis=0)


def _stack_tokens(
    store: KVStore, teacher: str, spec: ArraySpec, shard_ids: Sequence[str] | None
) -> Any:
    """``[token, …]`` of all shards, as stored: a chunk per shard."""
    import dask
    import dask.array as da

    read, pieces = dask.delayed(store.token_array), []
    for shard_id in store.committed_in_order(teacher) if shard_ids is None else shard_ids:
        shape = (store.commit(teacher, shard_id).num_tokens, *spec.shape[1:])
        pieces.append(da.from_delayed(read(teacher, shard_id, spec.name), shape, spec.dtype))
    return da.concatenate(pieces)


def _read_chunk(
    root: Path | str, teacher: str, shard_id: str, selection: Selection
) -> NDArray[np.float32]:
    store = KVStore.open(root)
    name, layers, heads = selection
    if name in store.teacher(teacher).kinds:
        return store.read_decoded(teacher, shard_id, name, layers, heads)
    arrays = store.read_shard(teacher, shard_id, layers, heads, kinds=()).arrays
    (array,) = (array for key, array in arrays.items() if key.rpartition("/")[2] == name)
    return np.asarray(array, np.float32)


def _token_coordinates(
    store: KVStore, teacher: str, shard_ids: Sequence[str] | None
) -> dict[str, tuple[str, np.ndarray]]:
    chosen = store.committed_in_order(teacher) if shard_ids is None else shard_ids
    tables = [store.token_table(teacher, shard_id) for shard_id in chosen]
    sample = [
        np.repeat(np.array(table.sample_ids, object), np.diff(table.sample_ptr)) for table in tables
    ]
    columns = {"sample": sample}
    for name, column in (
        ("token_id", "token_ids"),
        ("segment", "segment"),
        ("char_start", "char_start"),
        ("char_end", "char_end"),
    ):
        columns[name] = [getattr(table, column) for table in tables]
    return {name: ("token", np.concatenate(parts)) for name, parts in columns.items()}
