"""Student layers as real-valued depths of the teacher.

Every student layer gets a depth between two stored teacher layers and the linear mix of both.
Depths count *stored* layers: a hybrid model whose 8 attention layers lie among 32, or a store
that kept every other layer, is still read from bottom to top. Choosing layers cleverly rarely
pays (arXiv 2502.04499, "Revisiting Intermediate-Layer Matching in Knowledge Distillation"),
so ``ratio`` is the default.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvdistill.errors import ConfigError, GeometryError
from kvdistill.types import LayerMethod


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

    def apply(self, x: Tensor, read_layers: Sequence[int], dim: int = 1) -> Tensor:
        """Mix teacher layers into student layers along ``dim``.

        Args:
            x: any floating tensor with teacher layers along ``dim``, such as ``[B, L, H, T, D]``
                (``dim=1``) or statistics ``[L, H, D]`` (``dim=0``).
            read_layers: which teacher layer is at each position of that axis.
            dim: the axis of layers.

        Raises:
            GeometryError: a needed layer was not read, or the axis has another length.
        """
        position = {layer: i for i, layer in enumerate(read_layers)}
        absent = sorted(set(self.needed) - position.keys())
        if absent or x.shape[dim] != len(position):
            raise GeometryError(
                f"layer map: needs teacher layers {list(self.needed)}, got {list(read_layers)} "
                f"and an axis of {x.shape[dim]}; read LayerMap.needed"
            )
        low = x.index_select(dim, _index([position[layer] for layer in self.lower], x))
        if not any(self.fraction):
            return low
        pairs = zip(self.lower, self.upper, self.fraction, strict=True)
        above = [position[up if part else lower] for lower, up, part in pairs]
        shape = [1] * x.dim()
        shape[dim] = len(self.fraction)
        fraction = torch.tensor(self.fraction, device=x.device, dtype=x.dtype).view(shape)
        return torch.lerp(low, x.index_select(dim, _index(above, x)), fraction)


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
    num_teacher = len(teacher_layers)
    if num_student_layers < 1 or num_teacher < 1:
        raise ConfigError(
            f"layer map: {num_student_layers} student and {num_teacher} stored teacher layers; "
            "both need at least one"
        )
    if method == "explicit":
        return _from_layers(explicit or (), num_student_layers, teacher_layers)
    return _from_depths(_depths(method, num_student_layers, num_teacher), teacher_layers)


def _depths(method: LayerMethod, num_student: int, num_teacher: int) -> list[float]:
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
    if method == "last_aligned":
        return [float(num_teacher - num_student + i) for i in student]
    raise ConfigError(f"alignment.layers: {method} needs a pilot; call the function of its name")


def _from_depths(depths: Sequence[float], teacher_layers: Sequence[int]) -> LayerMap:
    last = len(teacher_layers) - 1
    lower = [math.floor(depth) for depth in depths]
    fraction = tuple(depth - low for depth, low in zip(depths, lower, strict=True))
    return LayerMap(
        tuple(teacher_layers[low] for low in lower),
        tuple(teacher_layers[min(low + 1, last)] for low in lower),
        fraction,
    )


def _from_layers(
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


def _index(positions: list[int], like: Tensor) -> Tensor:
    return torch.tensor(positions, device=like.device, dtype=torch.long)
