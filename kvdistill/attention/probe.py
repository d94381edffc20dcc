"""What a model's attention is given, seen from outside.

Every attention ends in ``scaled_dot_product_attention`` or in a pair of matrix products; a torch
function mode sees their arguments without changing the model. Hooks say whose they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from kvdistill.attention.hooks import Site

_PRODUCTS: Final = (torch.matmul, Tensor.matmul, Tensor.__matmul__)


@dataclass(frozen=True, eq=False)
class AttentionInputs:
    """Queries, keys and values ``[B, H, T, D]`` of one attention product, rotated."""

    query: Tensor
    key: Tensor
    value: Tensor
    scaling: float | None
    """None where the product was seen, but not what it was multiplied by."""


class AttentionProbe(TorchFunctionMode):
    """Records the Q, K, V that reach ``scaled_dot_product_attention`` or a pair of products."""

    def __init__(self) -> None:
        super().__init__()
        self.layer_idx: int | None = None
        self.seen: dict[int, AttentionInputs] = {}
        self._products: list[tuple[Tensor, Tensor]] = []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Look at attention products of the layer that is running; change nothing."""
        kwargs = kwargs or {}
        layer_idx = self.layer_idx
        if layer_idx is not None and layer_idx not in self.seen:
            if func is F.scaled_dot_product_attention:
                query, key, value = _bound(args, kwargs)
                scaling = kwargs.get("scale") or query.shape[-1] ** -0.5
                self.seen[layer_idx] = AttentionInputs(query, key, value, scaling)
            elif func in _PRODUCTS and args[0].ndim == 4 and args[1].ndim == 4:
                self._products.append((args[0], args[1]))
                if len(self._products) == 2:
                    (query, key_turned), (_, value) = self._products
                    self.seen[layer_idx] = AttentionInputs(
                        query, key_turned.transpose(2, 3), value, None
                    )
        return func(*args, **kwargs)

    def enter(self, layer_idx: int) -> None:
        """A layer's attention begins."""
        self.layer_idx, self._products = layer_idx, []

    def leave(self) -> None:
        """A layer's attention ends."""
        self.layer_idx = None


def _bound(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    names = ("query", "key", "value")
    query, key, value = (args[i] if i < len(args) else kwargs[name] for i, name in enumerate(names))
    return query, key, value


@contextmanager
def probing(sites: Sequence[Site], spy: AttentionProbe) -> Iterator[None]:
    """While active, the spy knows which site's attention is running."""
    handles = []
    try:
        for site in sites:
            handles.append(site.attention.register_forward_pre_hook(_entering(spy, site)))
            handles.append(site.attention.register_forward_hook(_leaving(spy)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _entering(spy: AttentionProbe, site: Site) -> Callable[[nn.Module, Any], None]:
    def hook(module: nn.Module, args: Any) -> None:
        spy.enter(site.layer_idx)

    return hook


def _leaving(spy: AttentionProbe) -> Callable[[nn.Module, Any, Any], None]:
    def hook(module: nn.Module, args: Any, output: Any) -> None:
        spy.leave()

    return hook
