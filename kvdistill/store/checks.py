"""What a shard must satisfy before it is published, and what ``verify`` asks again later."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import numpy as np

from kvdistill.errors import GeometryError, NonFiniteError
from kvdistill.store.manifest import ShardPlan, TeacherManifest
from kvdistill.store.schema import ArraySpec
from kvdistill.store.shard import EncodedShard, TokenTable, block_ptr

EXPONENTS: Final[dict[object, int]] = {"bfloat16": 0x7F80, "ufloat8_e5m3": 0xF8}
"""Floats that are stored as integers: the bits that are all set in NaN and infinity."""


def check_shard(
    manifest: TeacherManifest,
    plan: ShardPlan,
    shard: EncodedShard,
    arrays: Mapping[str, np.ndarray],
    specs: Mapping[str, ArraySpec],
) -> None:
    """Refuse a shard that is not what the manifest and the plan declare.

    Raises:
        GeometryError: wrong counts, missing or unknown arrays, wrong shapes or dtypes.
        NonFiniteError: NaN or infinity; names array, layer, head and sample.
    """
    where = f"teacher {manifest.name!r}, shard {plan.shard_id}"
    if shard.tokens.num_samples != plan.num_samples:
        raise GeometryError(
            f"{where}: {shard.tokens.num_samples} samples, but the plan has {plan.num_samples}"
        )
    check_sample_ptr(shard.tokens, where)
    missing, unknown = sorted(specs.keys() - arrays.keys()), sorted(arrays.keys() - specs.keys())
    if missing or unknown:
        raise GeometryError(
            f"{where}: arrays missing: {missing or 'none'}; not declared by the manifest: "
            f"{unknown or 'none'}; expected {sorted(specs)}"
        )
    for name, spec in specs.items():
        array = arrays[name]
        if array.shape != spec.shape or array.dtype != np.dtype(spec.dtype):
            raise GeometryError(
                f"{where}: {name} is {array.dtype} {array.shape}, but the manifest asks for "
                f"{spec.dtype} {spec.shape} {spec.axes}"
            )
        check_finite(array, spec, shard.tokens, where)


def check_sample_ptr(tokens: TokenTable, where: str) -> None:
    """Refuse boundaries that do not begin at 0, rise, and end at the number of tokens.

    Raises:
        GeometryError: names where.
    """
    ptr = tokens.sample_ptr
    ok = ptr.ndim == 1 and ptr.size > 0 and ptr[0] == 0 and bool((np.diff(ptr) >= 0).all())
    if not ok or ptr[-1] != tokens.num_tokens:
        raise GeometryError(
            f"{where}: sample_ptr must rise from 0 to {tokens.num_tokens} tokens, got {ptr!r}"
        )


def check_finite(array: np.ndarray, spec: ArraySpec, tokens: TokenTable, where: str) -> None:
    """Refuse NaN and infinity in stored floats; integer codes carry theirs in the scales.

    Raises:
        NonFiniteError: names array, layer, head and sample of the first one.
    """
    bad = _non_finite(array, spec)
    if bad is None:
        return
    place = ", ".join(f"{axis} {i}" for axis, i in zip(spec.axes, bad, strict=True))
    if spec.group is not None:
        place = f"layer {spec.group.layers[bad[0]]}, head {bad[1]}, {_sample(spec, bad, tokens)}"
    raise NonFiniteError(
        f"{where}: {spec.name} is not finite, or beyond fp16's range, at {place}; check the "
        "teacher's dtype, or store with codec bf16"
    )


def _non_finite(array: np.ndarray, spec: ArraySpec) -> tuple[int, ...] | None:
    exponent = EXPONENTS.get(spec.attributes.get("logical_dtype"))
    if exponent is not None:
        finite = (array & exponent) != exponent
    elif array.dtype.kind == "f":
        finite = np.isfinite(array)
    else:
        return None
    if finite.all():
        return None
    return tuple(int(i) for i in np.unravel_index(int(np.argmin(finite)), array.shape))


def _sample(spec: ArraySpec, bad: tuple[int, ...], tokens: TokenTable) -> str:
    ptr = block_ptr(tokens.sample_ptr) if spec.axes[2] == "block" else tokens.sample_ptr
    sample_idx = int(np.searchsorted(ptr, bad[2], side="right")) - 1
    return f"sample {tokens.sample_ids[sample_idx]!r}"
