"""Student layers as real-valued depths of the teacher.

Every student layer gets a depth between two *stored* teacher layers and the linear mix of both, so
a hybrid model whose 8 attention layers are among 32 is still read from bottom to top. Choosing
layers cleverly rarely pays (Revisiting Intermediate-Layer Matching in Knowledge Distillation,
arXiv 2502.04499), so ``ratio`` is the default; ``cka`` matches layers by ``linear_cka`` on a pilot.

A teacher whose layers differ in heads or dims is stored in groups of equal geometry. Layers of
different groups cannot be mixed, so each group acts as a teacher of its own for the student layers
that it serves; together the groups serve every student layer exactly once.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvdistill.errors import ConfigError, GeometryError
from kvdistill.types import LayerGroup, LayerMethod


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


def linear_cka(student_LNC: Tensor, teacher_LNC: Tensor) -> Tensor:
    """Similarity of every student layer to every teacher layer: ``[L_s, L_t]`` in [0, 1].

        CKA(X, Y) = ‖Yᵀ X‖² / (‖Xᵀ X‖ · ‖Yᵀ Y‖),   X, Y centred, Frobenius norms

    (Similarity of Neural Network Representations Revisited, arXiv 1905.00414.) It needs no equal
    widths and is invariant to rotation and scale. An untrained student resembles nothing.

    Args:
        student_LNC: ``[L_s, N, C_s]``: N aligned tokens, all heads and channels of a layer.
        teacher_LNC: ``[L_t, N, C_t]``: the same tokens.
    """
    x = student_LNC.float() - student_LNC.float().mean(1, keepdim=True)
    y = teacher_LNC.float() - teacher_LNC.float().mean(1, keepdim=True)
    norm_x, norm_y = (
        torch.einsum("lnc,lnd->lcd", z, z).square().sum((1, 2)).sqrt() for z in (x, y)
    )
    cross = torch.stack([torch.einsum("nc,lnd->lcd", one, y).square().sum((1, 2)) for one in x])
    return cross / (norm_x[:, None] * norm_y[None]).clamp_min(torch.finfo(torch.float32).tiny)


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
