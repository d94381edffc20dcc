"""Hooks that hand over every layer's Q, K and V as a forward pass computes them.

One layer at a time: when an attention module returns, its tapped outputs are cut into heads and
passed to a callback, and dropped. So a batch never holds all layers' queries, and the callback
can move or encode keys and values while the next layer runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from kvdistill.adapters import QKV, Adapter, Heads
from kvdistill.errors import TeacherError

OnLayer = Callable[[int, QKV], None]


@dataclass(frozen=True, eq=False)
class Site:
    """One layer that has keys and values, in a model in hand."""

    layer_idx: int
    layer: nn.Module
    attention: nn.Module
    taps: tuple[nn.Module, ...]
    heads: Heads
    adapter: Adapter


def sites(model: nn.Module, adapter: Adapter) -> tuple[list[Site], dict[int, str]]:
    """Find an adapter's modules: ``(layers with attention, {layer without it: why})``.

    Raises:
        TeacherError: the model has no such layers, or none of them has the adapter's modules.
    """
    layers = _descend(model, adapter.layers)
    if not isinstance(layers, nn.ModuleList):
        raise TeacherError(f"{type(model).__name__} has no list of layers at {adapter.layers!r}")
    found: list[Site] = []
    skipped: dict[int, str] = {}
    for layer_idx, layer in enumerate(layers):
        attention = _descend(layer, adapter.attention)
        taps = [_descend(attention, tap) for tap in adapter.taps] if attention else [None]
        present = tuple(tap for tap in taps if tap is not None)
        if attention is None or len(present) < len(taps):
            skipped[layer_idx] = f"{type(layer).__name__} without {adapter.attention}"
            continue
        heads = _heads(attention, model)
        found.append(Site(layer_idx, layer, attention, present, heads, adapter))
    if not found:
        wanted = f"{adapter.attention}.{{{','.join(adapter.taps)}}}"
        raise TeacherError(f"{type(model).__name__}: no layer has {wanted}")
    return found, skipped


@contextmanager
def capture(sites_: Sequence[Site], on_layer: OnLayer) -> Iterator[None]:
    """While active, call ``on_layer(layer_idx, qkv)`` once for every site of a forward pass."""
    handles = []
    try:
        for site in sites_:
            handles += _attach(site, on_layer)
        yield
    finally:
        for handle in handles:
            handle.remove()


def _attach(site: Site, on_layer: OnLayer) -> list[Any]:
    outputs: dict[int, Tensor] = {}

    def tapped(position: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Tensor) -> None:
            outputs[position] = output

        return hook

    def done(module: nn.Module, args: Any, output: Any) -> None:
        collected = tuple(outputs[position] for position in range(len(site.taps)))
        outputs.clear()
        on_layer(site.layer_idx, site.adapter.cut(collected, site.heads))

    handles = [tap.register_forward_hook(tapped(i)) for i, tap in enumerate(site.taps)]
    return [*handles, site.attention.register_forward_hook(done)]


def _descend(module: nn.Module | None, path: str) -> nn.Module | None:
    for name in path.split("."):
        child = getattr(module, name, None)
        if child is None and name.isdigit() and isinstance(module, nn.ModuleList):
            child = module[int(name)]
        if not isinstance(child, nn.Module):
            return None
        module = child
    return module


def _heads(attention: nn.Module, model: nn.Module) -> Heads:
    model_config: Any = model.config
    config: Any = getattr(attention, "config", None) or model_config.get_text_config()
    num_query = config.num_attention_heads
    names = ("head_dim", "attention_head_size", "head_size", "key_value_proj_dim")
    head_dim = next((getattr(attention, n) for n in names if hasattr(attention, n)), None)
    if head_dim is None:
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // num_query
    num_key_value = next(
        (
            getattr(place, name)
            for place in (attention, config)
            for name in ("num_kv_heads", "num_key_value_heads")
            if getattr(place, name, None) is not None
        ),
        num_query,
    )
    return Heads(num_query, num_key_value, head_dim)
