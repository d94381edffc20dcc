"""Student layers as real-valued depths of the teacher.

Every student layer gets a depth between two *stored* teacher layers and the linear mix of both, so
a hybrid model whose 8 attention layers are among 32 is still read from bottom to top. Choosing
layers cleverly rarely pays (Revisiting Intermediate-Layer Matching in Knowledge Distillation,
arXiv 2502.04499), so ``ratio`` is the default; ``cka`` matches layers by ``MinibatchCKA`` on a
pilot.

A teacher whose layers differ in heads or dims is stored in groups of equal geometry. Layers of
different groups cannot be mixed, so each group acts as a teacher of its own for the student layers
that it serves; together the groups serve every student layer exactly once.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from kvdistill.errors import ConfigError, GeometryError
from kvdistill.types import LayerGroup, LayerMethod

CKA_TOKENS: Final = 1024
"""Tokens of a batch that CKA compares."""


@dataclass(frozen=True)
class LayerMap:
    """Student layer ``i`` is ``(1 − fraction[i]) · lower[i] + fraction[i] · upper[i]``.

    ``lower`` and ``upper`` are the teacher's own layer indices.
    """

    lower: tuple[int, ...]
    upper: tuple[int, ...]
    fraction: tuple[float, ...]

    @property
    def needed(self) -> tuple[int, ...]:
        """Teacher layers that must be read, ascending."""
        pairs = zip(self.lower, self.upper, self.fraction, strict=True)
        used = {layer for low, up, part in pairs for layer in ((low, up) if part else (low,))}
        return tuple(sorted(used))

    @property
    def depths(self) -> tuple[float, ...]:
        """The real-valued teacher layer of every student layer."""
        ends = zip(self.lower, self.upper, self.fraction, strict=True)
        return tuple(low + part * (up - low) for low, up, part in ends)

    def apply(self, x_BLHTD: Tensor) -> Tensor:
        """Mix the layers ``needed`` into student layers, along axis 1.

        Raises:
            GeometryError: the axis has another length.
        """
        position = {layer: i for i, layer in enumerate(self.needed)}
        if x_BLHTD.shape[1] != len(position):
            raise GeometryError(
                f"layer map: needs teacher layers {list(self.needed)}, got an axis of "
                f"{x_BLHTD.shape[1]}; read LayerMap.needed"
            )
        low = x_BLHTD[:, [position[layer] for layer in self.lower]]
        if not any(self.fraction):
            return low
        rows = zip(self.lower, self.upper, self.fraction, strict=True)
        high = x_BLHTD[:, [position[upper if part else lower] for lower, upper, part in rows]]
        fraction = torch.tensor(self.fraction, device=low.device, dtype=low.dtype)
        return torch.lerp(low, high, fraction.view(-1, 1, 1, 1))


def layer_map(
    method: LayerMethod,
    num_student_layers: int,
    teacher_layers: Sequence[int],
    *,
    explicit: Sequence[float] | None = None,
) -> LayerMap:
    """Map student layers to depths of the teacher.

    Args:
        method: ``ratio``: depth ``l · L_t / L_s``. ``uniform``: evenly from the first layer to
            the last. ``skip``: every ``⌊L_t / L_s⌋``-th layer, unmixed. ``last_aligned``: last
            to last and downwards (C2C, arXiv 2510.03215). ``explicit``: as given.
        num_student_layers: how many student layers have keys and values.
        teacher_layers: stored teacher layers, ascending.
        explicit: one teacher layer index per student layer; ``5.25`` mixes layers 5 and 6.

    Raises:
        ConfigError: the method cannot map these layers.
    """
    if method == "explicit":
        return _explicit_map(explicit or (), num_student_layers, teacher_layers)
    num_teacher = len(teacher_layers)
    depths = _depths(method, num_student_layers, num_teacher)
    lower = [math.floor(depth) for depth in depths]
    return LayerMap(
        tuple(teacher_layers[low] for low in lower),
        tuple(teacher_layers[min(low + 1, num_teacher - 1)] for low in lower),
        tuple(depth - low for depth, low in zip(depths, lower, strict=True)),
    )


def _depths(method: LayerMethod, num_student: int, num_teacher: int) -> list[float]:
    """Positions among the stored teacher layers, one per student layer."""
    student = range(num_student)
    if method == "ratio":
        return [min(i * num_teacher / num_student, num_teacher - 1) for i in student]
    if method == "uniform":
        last = max(num_student - 1, 1)
        return [i * (num_teacher - 1) / last for i in student]
    if num_teacher < num_student:
        raise ConfigError(
            f"alignment.layers: {method} needs at least as many teacher layers as student "
            f"layers, got {num_teacher} for {num_student}; use ratio or uniform"
        )
    if method == "skip":
        return [float(i * (num_teacher // num_student)) for i in student]
    return [float(num_teacher - num_student + i) for i in student]  # last_aligned


def _explicit_map(
    layers: Sequence[float], num_student_layers: int, teacher_layers: Sequence[int]
) -> LayerMap:
    if len(layers) != num_student_layers:
        raise ConfigError(
            f"alignment.layers: explicit needs one teacher layer per student layer, got "
            f"{len(layers)} for {num_student_layers}"
        )
    mapping = LayerMap(
        tuple(math.floor(layer) for layer in layers),
        tuple(math.ceil(layer) for layer in layers),
        tuple(layer - math.floor(layer) for layer in layers),
    )
    absent = sorted(set(mapping.needed) - set(teacher_layers))
    if absent:
        raise ConfigError(
            f"alignment.layers: explicit names teacher layers {absent} that are not stored; "
            f"stored are {list(teacher_layers)}"
        )
    return mapping


def by_group(
    mapping: LayerMap, groups: Sequence[LayerGroup]
) -> Iterator[tuple[int, tuple[int, ...], LayerMap]]:
    """Split a layer map by groups: a group's index, the student layers it serves, and their map.

    A student layer between two groups takes the nearer layer, unmixed. Groups that serve no student
    layer are left out.
    """
    group_of = {layer: idx for idx, group in enumerate(groups) for layer in group.layers}
    entries: dict[int, list[tuple[int, int, int, float]]] = {}
    rows = zip(mapping.lower, mapping.upper, mapping.fraction, strict=True)
    for student_layer, (low, up, part) in enumerate(rows):
        row = low, up, part
        if part and group_of[low] != group_of[up]:
            row = (low, low, 0.0) if part < 0.5 else (up, up, 0.0)
        entries.setdefault(group_of[row[0]], []).append((student_layer, *row))
    for group_idx, found in sorted(entries.items()):
        students, lowers, uppers, fractions = zip(*found, strict=True)
        yield group_idx, students, LayerMap(lowers, uppers, fractions)


class MinibatchCKA:
    """Similarity of every student layer to every teacher layer: linear CKA from batches of tokens.

        CKA = Σ HSIC(K, L) / √(Σ HSIC(K, K) · Σ HSIC(L, L)),   K = X Xᵀ, L = Y Yᵀ

    summed over batches with the unbiased estimator of HSIC, which makes the result independent of
    the batches' size (Do Wide and Deep Networks Learn the Same Things?, arXiv 2010.15327, eq. 3).
    It needs no equal widths and is invariant to rotation and scale. Nothing grows with the widths
    or with the number of batches: kernels of ``CKA_TOKENS`` squared per student layer are the
    largest part of it. An untrained student resembles nothing.
    """

    def __init__(self) -> None:
        self._sums: list[Tensor] = []

    def add(self, student: Sequence[Tensor], teacher: Iterable[Tensor]) -> None:
        """Add a batch: layers ``[N, C]`` of the same tokens, a teacher's taken one at a time."""
        kernels = torch.stack([_kernel(layer) for layer in student])
        columns, own = [], []
        for layer in teacher:
            kernel = _kernel(layer)[None]
            columns.append(_unbiased_hsic(kernels, kernel))
            own.append(_unbiased_hsic(kernel, kernel))
        found = [torch.stack(columns, 1), _unbiased_hsic(kernels, kernels), torch.cat(own)]
        doubled = [x.double().cpu() for x in found]
        before = self._sums or [torch.zeros_like(x) for x in doubled]
        self._sums = [a + b for a, b in zip(before, doubled, strict=True)]

    def value(self) -> Tensor:
        """``[L_s, L_t]``, at most about 1; 0 where a layer does not vary.

        Raises:
            ConfigError: no batch has been added.
        """
        if not self._sums:
            raise ConfigError("alignment.layers: cka has no pilot; the store has no sample")
        cross, student, teacher = self._sums
        scale = student.clamp_min(0)[:, None] * teacher.clamp_min(0)
        return cross / scale.sqrt().clamp_min(torch.finfo(torch.float32).tiny)


def _kernel(tokens_NC: Tensor) -> Tensor:
    """Linear kernel ``[N, N]`` of at most ``CKA_TOKENS`` evenly spaced tokens, diagonal zero."""
    num = len(tokens_NC)
    if num > CKA_TOKENS:
        tokens_NC = tokens_NC[torch.arange(CKA_TOKENS, device=tokens_NC.device) * num // CKA_TOKENS]
    centred = tokens_NC.float() - tokens_NC.float().mean(0)
    return (centred @ centred.T).fill_diagonal_(0)


def _unbiased_hsic(k_LNN: Tensor, l_LNN: Tensor) -> Tensor:
    """HSIC_1 of kernels with zero diagonals, ``[L]``: 0 with fewer than four tokens."""
    n = k_LNN.shape[-1]
    if n < 4:
        return k_LNN.new_zeros(len(k_LNN))
    rows_k, rows_l = k_LNN.sum(-1), l_LNN.sum(-1)
    trace = (k_LNN * l_LNN).sum((1, 2))
    sums = rows_k.sum(-1) * rows_l.sum(-1) / ((n - 1) * (n - 2))
    return (trace + sums - 2 * (rows_k * rows_l).sum(-1) / (n - 2)) / (n * (n - 3))


def monotone_map(similarity: Tensor, teacher_layers: Sequence[int]) -> LayerMap:
    """The non-decreasing assignment of student to teacher layers of largest total similarity.

    Args:
        similarity: ``[L_s, L_t]``.
        teacher_layers: which teacher layer each column is, ascending.

    Raises:
        ConfigError: similarities are not finite, or of another number of teacher layers.
    """
    num_student, num_teacher = similarity.shape
    if num_teacher != len(teacher_layers) or not bool(torch.isfinite(similarity).all()):
        raise ConfigError(
            f"alignment.layers: cka needs finite similarities to {len(teacher_layers)} teacher "
            f"layers, got {tuple(similarity.shape)}"
        )
    # Dynamic programming. best[j]: largest sum so far with the last student layer at a column ≤ j.
    best, choices = torch.zeros(num_teacher, dtype=torch.float64), []
    for row in similarity.double().cpu():
        best, choice = torch.cummax(best + row, dim=0)
        choices.append(choice)
    picked, limit = [], num_teacher - 1
    for choice in reversed(choices):
        limit = int(choice[limit])
        picked.append(teacher_layers[limit])
    layers = tuple(reversed(picked))
    return LayerMap(layers, layers, (0.0,) * num_student)
