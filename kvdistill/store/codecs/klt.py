"""klt: principal components of all heads of several layers, each with a number of bits of its own.

Keys and values of neighbouring layers and heads are correlated, which no codec per head can use. A
group of layers is cut into *blocks*. A token's keys (or values) in a block are one vector of ``n``
channels: its mean is subtracted, the rest rotated into principal components (Karhunen–Loève
transform), and component ``i`` is stored in ``b_i`` bits, none in many directions. The bits go
where they lower the error most, as in KVTC (KV Cache Transform Coding for Compact Storage in LLM
Inference, arXiv 2511.01815); errors are weighted by channel, by what attention makes of them.

The first token of a sample is an attention sink that follows no statistics; it is stored exactly.

A token takes the same number of bytes in every block. Components are sorted by their bits, in
bundles of eight, so a bundle of ``b`` bits takes ``b`` bytes. Codes of ``b`` bits are cut into
fields of 8, 4, 2 and 1 bits (5 = 4 + 1, the upper bits first), and a run's fields of one width are
packed together as in int4: a byte holds components ``i``, ``i + n/2`` …, the first in its low bits.

Decoding is ``mean + scale · ((2·code + 1 − 2^b) @ basis)``. The basis holds small integers whose
products' sums stay below 2^24, so float32 represents every partial sum and the result has the same
bits in any order of summation: in numpy, torch, on any device (with TF32 off, torch's default).
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import TYPE_CHECKING, Any, ClassVar, Final

import numpy as np
from numpy.typing import NDArray

from kvdistill.store.codecs.parts import Part, concatenate, to_float32
from kvdistill.types import CodecName, CodecSpec, Kind, LayerGroup

if TYPE_CHECKING:
    import torch

    from kvdistill.store.codecs.parts import Array

MAX_BITS: Final = 8
BUNDLE: Final = 8
"""Components that have the same number of bits."""
_WIDTHS: Final = (8, 4, 2, 1)
_GAUSSIAN_STEPS: Final = (1.0, 1.596, 0.9957, 0.586, 0.3352, 0.1881, 0.1041, 0.0568, 0.0308)
"""Steps of least squared error for a Gaussian of deviation 1, by number of bits (Max, 1960)."""
_LONGER_STEPS: Final = (0.85, 1.0, 1.2, 1.5, 2.0, 3.0)
"""Multiples of them that are tried: components have heavier tails."""
_HELD: Final = 8
"""Every eighth token of the pilot measures the steps and errors."""
_LARGEST_SUM: Final = 2**24 - 16


def layer_blocks(layers: Sequence[int], size: int) -> list[tuple[int, ...]]:
    """Consecutive layers in blocks of at most ``size``, of as equal lengths as possible."""
    pieces = np.array_split(np.array(layers), -(-len(layers) // size))
    return [tuple(piece.tolist()) for piece in pieces]


def token_bytes(group: LayerGroup, kind: Kind, codec: CodecSpec) -> int:
    """Bytes of a token in each block, by the bits per element of the largest block."""
    longest = max(map(len, layer_blocks(group.layers, codec.block_layers)))
    bits = codec.key_bits if kind == "key" else codec.value_bits
    return max(1, int(bits * longest * group.num_key_value_heads * group.head_dim(kind) / 8))


@dataclass(frozen=True, eq=False)
class Basis:
    """What one block of layers is coded with; ``n`` channels in the order (layer, head, dim).

    ``mean``    float32 ``[n]``
    ``weight``  float32 ``[n]``, of the squared error
    ``basis``   int16 ``[m, n]``, half a step of every component that has bits
    ``scale``   float32 ``[1]``, unit of the basis
    ``bits``    uint8 ``[m]``, not ascending
    """

    mean: NDArray[np.float32]
    weight: NDArray[np.float32]
    basis: NDArray[np.int16]
    scale: NDArray[np.float32]
    bits: NDArray[np.uint8]
    _on: dict[Any, tuple[Any, ...]] = field(default_factory=dict)
    FIELDS: ClassVar = ("mean", "weight", "basis", "scale", "bits")

    def on(self, like: Array, *, encoder: bool = False) -> tuple[Any, Any, Any]:
        """``mean``, ``basis`` and ``scale``; the encoder's ``mean``, ``[n, m]`` and offset ``[m]``.

        All float32, in the library and on the device of ``like``, where they are kept.
        """
        key = (None if isinstance(like, np.ndarray) else like.device, encoder)
        if key not in self._on:
            basis, last = self.basis.astype(np.float32), self.scale
            if encoder:
                weighted = basis * self.weight
                norm = np.maximum((weighted * basis).sum(axis=1), np.float32(1e-30))
                basis = np.ascontiguousarray((weighted / (2 * norm * self.scale)[:, None]).T)
                last = np.exp2(self.bits.astype(np.float32) - 1)
            found: tuple[Any, ...] = (self.mean, basis, last)
            if key[0] is not None:
                import torch

                found = tuple(torch.from_numpy(x).to(key[0]) for x in found)
            self._on[key] = found
        mean, matrix, last = self._on[key]
        return mean, matrix, last

    def encode(self, x_TN: Array, num_bytes: int) -> Array:
        """``[..., T, n]`` → uint8 ``[..., T, num_bytes]``."""
        mean, forward, offset = self.on(x_TN, encoder=True)
        with _no_autocast(x_TN):
            ratio = (to_float32(x_TN) - mean) @ forward + offset
        ratio = ratio.clip(offset * 0, offset * 2 - 1)
        codes = ratio.astype(np.uint8) if isinstance(ratio, np.ndarray) else ratio.byte()
        packed: Array = _pack(codes, self.bits, num_bytes)
        return packed

    def coefficients(self, packed: Array) -> Array:
        """Packed codes ``[..., bytes]`` → odd integers as float32 ``[..., m]``."""
        pieces, at = [], 0
        for bits, count in _runs_of_bits(self.bits):
            code: Any = None
            for width in (width for width in _WIDTHS if bits & width):
                size = count * width // 8
                piece, at = packed[..., at : at + size], at + size
                fields = [piece >> shift & (2**width - 1) for shift in range(0, 8, width)]
                values = concatenate(fields, axis=-1)
                code = values if code is None else code << width | values
            pieces.append(to_float32(code) * 2 + (1 - 2**bits))
        joined: Array = concatenate(pieces, axis=-1)
        return joined

    def decode(self, coefficients: Array, channels: slice) -> Array:
        """Odd integers ``[..., m]`` → float32 ``[..., channels]``; the same bits everywhere."""
        mean, basis, scale = self.on(coefficients)
        with _no_autocast(coefficients):
            total = coefficients @ basis[:, channels]
        decoded: Array = total * scale + mean[channels]
        return decoded


@dataclass(frozen=True, eq=False)
class Transform:
    """The codec ``klt`` of one kind of one geometry; without bases, its layout alone."""

    group: LayerGroup = field(default_factory=lambda: LayerGroup((), 0, 0, 0))
    num_bytes: int = 0
    """Of a token and block."""
    blocks: tuple[tuple[tuple[int, ...], Basis], ...] = ()
    """Layers and basis of every block."""
    layers: tuple[int, ...] = ()
    """Layers to decode, ascending; codes are those of the blocks that hold them."""
    heads: tuple[int, ...] | None = None
    name: CodecName = "klt"

    def select(self, layers: Sequence[int] | None, heads: Sequence[int] | None = None) -> Transform:
        """The codec of some layers and heads of what is stored, and of the blocks they are in."""
        wanted = tuple(sorted(self.layers if layers is None else layers))
        blocks = tuple((rows, basis) for rows, basis in self.blocks if set(rows) & set(wanted))
        own = None if heads is None else tuple(sorted(heads))
        return replace(self, blocks=blocks, layers=wanted, heads=own)

    def parts(self, kind: Kind) -> tuple[Part, ...]:
        """The stored arrays: codes by block, first tokens by layer and head."""
        codes = Part("", "uint8", "klt", channels="packed")
        return (codes, Part("exact", "float16", "float16", per="sample"))

    def encode(self, x: Array, kind: Kind) -> dict[str, Array]:
        """``[..., L, H, T, D]`` of one sample, all layers of the blocks → codes and first tokens.

        Only the first tokens of ``self.layers`` are returned; a sample without tokens has zeros.
        """
        held, pieces = sorted(layer for rows, _ in self.blocks for layer in rows), list[Any]()
        for rows, basis in self.blocks:
            first = held.index(rows[0])
            flat = flatten_layers(x[..., first : first + len(rows), :, :, :])
            pieces.append(basis.encode(flat, self.num_bytes)[..., None, None, :, :])
        chosen: Any = x[..., [held.index(layer) for layer in self.layers], :, :1, :]
        if x.shape[-2] == 0:
            chosen = concatenate([chosen, chosen.sum(-2)[..., None, :]], axis=-2)
        exact = chosen.astype(np.float16) if isinstance(chosen, np.ndarray) else chosen.half()
        return {"": concatenate(pieces, axis=-4), "exact": exact}

    def decode(
        self, parts: Mapping[str, Array], kind: Kind, block_idx: Array | None = None
    ) -> Array:
        """Codes ``[..., blocks, 1, T, bytes]``, numpy or torch → float32 ``[..., L, H, T, D]``.

        ``parts["first"]``, where it is given, is the position of the first token of every row of
        ``exact``, -1 where it is not among these tokens; else one row stands at the front.
        """
        layer = self.by_layer(parts, kind)
        rows = [layer(row)[..., None, :, :, :] for row in range(len(self.layers))]
        return concatenate(rows, axis=-4)

    def by_layer(self, parts: Mapping[str, Array], kind: Kind) -> Callable[[int], Array]:
        """``decode`` of one row of ``layers``, ``[..., H, T, D]``; a block is unpacked once."""
        unpacked: dict[int, Array] = {}
        num_heads, dim = self.group.num_key_value_heads, self.group.head_dim(kind)

        def decode_row(row: int) -> Array:
            layer = self.layers[row]
            at = next(i for i, (layers, _) in enumerate(self.blocks) if layer in layers)
            layers, basis = self.blocks[at]
            if at not in unpacked:
                unpacked.clear()
                unpacked[at] = basis.coefficients(parts[""][..., at, 0, :, :])
            start = layers.index(layer) * num_heads * dim
            flat = basis.decode(unpacked[at], slice(start, start + num_heads * dim))
            x: Any = flat.reshape(*flat.shape[:-1], num_heads, dim).swapaxes(-3, -2)
            if self.heads is not None:
                x = x[..., list(self.heads), :, :]
            exact, first = parts["exact"][..., row, :, :, :], parts.get("first")
            if first is not None:
                x[..., first[first >= 0], :] = to_float32(exact[..., first >= 0, :])
            elif x.shape[-2]:
                x[..., :1, :] = to_float32(exact)
            decoded: Array = x
            return decoded

        return decode_row


def flatten_layers(x: Array) -> Array:
    """``[..., L, H, T, D]`` → ``[..., T, L·H·D]``."""
    moved: Any = x.swapaxes(-2, -3).swapaxes(-3, -4)  # [..., T, L, H, D]
    flat: Array = moved.reshape(*moved.shape[:-3], math.prod(moved.shape[-3:]))
    return flat


def _runs_of_bits(bits: NDArray[np.uint8]) -> Iterator[tuple[int, int]]:
    """Numbers of bits and how many components have them, in order."""
    return ((width, len(list(run))) for width, run in groupby(bits.tolist()))


def _pack(codes: Any, bits: NDArray[np.uint8], num_bytes: int) -> Any:
    """Codes uint8 ``[..., m]`` → bytes ``[..., num_bytes]``, unused ones zero."""
    pieces, start, unused = [], 0, num_bytes - int(bits.sum()) // 8
    for width, count in _runs_of_bits(bits):
        run, start, left = codes[..., start : start + count], start + count, width
        for size in (size for size in _WIDTHS if width & size):
            left -= size
            fields, length = run >> left & (2**size - 1), count * size // 8
            packed = fields[..., :length]
            for i in range(1, 8 // size):
                packed = packed | fields[..., i * length : (i + 1) * length] << i * size
            pieces.append(packed)
    return concatenate([*pieces, codes[..., [0] * unused] & 0] if unused else pieces, axis=-1)


def _no_autocast(like: Any) -> Any:
    """Half precision would round the products."""
    if isinstance(like, np.ndarray):
        return nullcontext()
    import torch

    return torch.autocast(like.device.type, enabled=False)


def fit_basis(x_TN: torch.Tensor, weight_N: torch.Tensor, num_bytes: int) -> Basis:
    """Fit one block's transform on a pilot.

    The error that counts is ``Σ weight · (x − x̂)²``: principal components are those of the weighted
    channels, and a bundle gets its next bit where that lowers the weighted error most. Steps and
    errors are measured with the pilot's own coefficients, not derived from a distribution.

    Args:
        x_TN: keys or values of the pilot's tokens ``[T, n]``, first tokens left out.
        weight_N: positive, ``[n]``.
        num_bytes: of a token.
    """
    import torch

    x, mean = x_TN.float(), x_TN.float().mean(dim=0)
    root = weight_N.float().sqrt()
    y = (x - mean) * root
    _, vectors = torch.linalg.eigh(y.T @ y / len(y))
    vectors = torch.nn.functional.pad(vectors.flip(1), (0, -vectors.shape[1] % BUNDLE))
    steps, errors = _steps(y[::_HELD] @ vectors)
    of_bundles = errors.reshape(len(errors), -1, BUNDLE).sum(dim=2)
    bits = _allocate(of_bundles.cpu().numpy(), num_bytes)
    order = np.argsort(-bits, kind="stable")[: int((bits > 0).sum())]
    chosen = torch.from_numpy((order[:, None] * BUNDLE + np.arange(BUNDLE)).ravel()).to(x.device)
    component_bits = torch.from_numpy(np.repeat(bits[order], BUNDLE)).to(x.device)
    half_step = steps[component_bits, chosen] / 2
    rows_MN = (vectors[:, chosen] * half_step / root[:, None]).T.double()
    largest = torch.exp2(component_bits.double()) - 1
    bound = (largest @ rows_MN.abs()).max() / (_LARGEST_SUM - largest.sum() / 2)
    unit = torch.maximum(bound, rows_MN.abs().max() / (2**15 - 1)).float()
    integers = (rows_MN / unit).round().to(torch.int16)
    return Basis(
        mean=mean.cpu().numpy(),
        weight=weight_N.float().cpu().numpy(),
        basis=integers.cpu().numpy(),
        scale=unit.reshape(1).cpu().numpy(),
        bits=component_bits.to(torch.uint8).cpu().numpy(),
    )


def _steps(z_TM: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Step of least squared error and that error, by number of bits and component."""
    import torch

    error = z_TM.square().mean(dim=0)
    deviation = error.sqrt().clamp_min(1e-20)
    steps, errors = [torch.ones_like(error)], [error]
    for bits in range(1, MAX_BITS + 1):
        best, step = torch.full_like(error, torch.inf), deviation
        for longer in _LONGER_STEPS:
            tried = deviation * (_GAUSSIAN_STEPS[bits] * longer)
            half = 2 ** (bits - 1)
            decoded = ((z_TM / tried).floor().clamp(-half, half - 1) + 0.5) * tried
            found = (decoded - z_TM).square().mean(dim=0)
            step = torch.where(found < best, tried, step)
            best = torch.minimum(found, best)
        steps.append(step)
        errors.append(best)
    return torch.stack(steps), torch.stack(errors)


def _allocate(errors: NDArray[Any], num_bytes: int) -> NDArray[np.int64]:
    """Bits of every bundle, at most ``num_bytes`` in all: each goes where the error falls most."""
    bits = np.zeros(errors.shape[1], np.int64)
    heap = [(errors[1, i] - errors[0, i], i) for i in range(len(bits))]
    heapq.heapify(heap)
    for _ in range(num_bytes):
        if not heap:
            break
        _, i = heapq.heappop(heap)
        bits[i] += 1
        if bits[i] < MAX_BITS:
            heapq.heappush(heap, (errors[bits[i] + 1, i] - errors[bits[i], i], i))
    return bits
