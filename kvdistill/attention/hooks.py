"""Hooks that hand over every layer's Q, K and V as a forward pass computes them.

One layer at a time: when an attention module returns, its tapped outputs are cut into heads and
passed to a callback, and dropped. So a batch never holds all layers' queries, and the callback
can move or encode keys and values while the next layer runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kvdistill.attention.adapters import DECODERS, QKV, Adapter, Heads
from kvdistill.attention.geometry import student_geometry
from kvdistill.errors import StudentError, TeacherError
from kvdistill.types import KINDS, Kind

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


Rewrite = Callable[[Tensor, int, Kind], Tensor]
"""From own keys or values ``[B, H, T, D]``, layer and kind to what the student attends to."""


class KVCapture:
    """Reads the unrotated keys and values of every layer while the student runs."""

    def __init__(self, student: Any) -> None:
        config = student.config.get_text_config()
        self.adapter = _adapter(config.model_type)
        self.geometry = student_geometry(student)
        self._cut_heads = Heads(config.num_attention_heads, *self.geometry.heads)
        base = getattr(student, student.base_model_prefix, student)
        layers = base.get_submodule(self.adapter.layers)
        self._layers = list(layers)
        self._attention = [layer.get_submodule(self.adapter.attention) for layer in layers]
        self._student = student
        self._rewrite: Rewrite | None = None
        self.replaying = False

    def compile_layers(self, backend: str = "inductor") -> None:
        """``torch.compile`` what a layer does outside of its attention, in place.

        Hooks come and go inside attention, and dynamo does not look for hooks that it has not
        seen when it traced; so what is compiled has none.
        """
        # The gradient share walks a graph twice; buffers given away the first time would be gone.
        torch._functorch.config.donated_buffer = False
        first, _, _ = self.adapter.attention.partition(".")
        for layer in self._layers:
            for name, child in layer.named_children():
                if name != first:
                    child.compile(backend=backend, dynamic=True)

    def checkpoint_activations(self) -> None:
        """Let the backward pass compute every layer again instead of keeping its activations.

        Raises:
            StudentError: the architecture does not support it.
        """
        if not self._student.supports_gradient_checkpointing:
            raise StudentError(
                f"a student of type {self._student.config.model_type!r} does not support "
                "training.gradient_checkpointing; switch it off"
            )
        self._student.activation_checkpointing_enable(
            activation_checkpointing_kwargs={
                "use_reentrant": False,
                "context_fn": lambda: (nullcontext(), _Replay(self, self._rewrite)),
            }
        )

    @contextmanager
    def __call__(self) -> Iterator[list[QKV]]:
        """Collect query, key and value, each ``[B, H, T, D]``, layer by layer, while inside."""
        found: list[QKV] = []
        handles = []
        for attention in self._attention:
            outputs: dict[str, Tensor] = {}
            for tap in self.adapter.taps:
                module: nn.Module = attention.get_submodule(tap)
                hook = self._hook(tap, outputs, found)
                handles.append(module.register_forward_hook(hook))
        try:
            yield found
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def rewriting(self, rewrite: Rewrite) -> Iterator[None]:
        """While inside, the student attends to ``rewrite(own [B, H, T, D], layer, kind)`` instead.

        Keys are unrotated on both sides.
        """
        outer, self._rewrite = self._rewrite, rewrite
        try:
            with self.hooks(rewrite, replays=False):
                yield
        finally:
            self._rewrite = outer

    @contextmanager
    def hooks(self, rewrite: Rewrite, *, replays: bool) -> Iterator[None]:
        """Rewrite while inside, in passes that are computed again or in those that are not."""
        handles = [
            attention.get_submodule(tap).register_forward_hook(
                self._rewriting_hook(layer, tap_idx, rewrite, replays=replays)
            )
            for layer, attention in enumerate(self._attention)
            for tap_idx, tap in enumerate(self.adapter.taps)
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _rewriting_hook(self, layer: int, tap_idx: int, rewrite: Rewrite, *, replays: bool) -> Any:
        num_taps = len(self.adapter.taps)
        # One tap holds queries, keys and values; of three the first is queries, which stay.
        kinds = KINDS if num_taps == 1 else KINDS[tap_idx - 1 : tap_idx] if tap_idx else ()

        def hook(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
            if self.replaying != replays:
                return output
            out = output.clone()
            views = self.adapter.cut((out,) * num_taps, self._cut_heads)
            own = self.adapter.cut((output,) * num_taps, self._cut_heads)
            for kind in kinds:
                getattr(views, kind).copy_(rewrite(getattr(own, kind), layer, kind))
            return out

        return hook

    def _hook(self, tap: str, outputs: dict[str, Tensor], found: list[QKV]) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
            if self.replaying:
                return
            outputs[tap] = output
            if len(outputs) == len(self.adapter.taps):
                cut = self.adapter.cut(
                    tuple(outputs[name] for name in self.adapter.taps), self._cut_heads
                )
                found.append(cut)
                outputs.clear()

        return hook


class _Replay:
    """A layer is computed again, by a backward pass: as it was, whatever goes on by then.

    A class, since a graph that is kept is walked again, and this is entered again with it.
    """

    def __init__(self, capture: KVCapture, rewrite: Rewrite | None) -> None:
        self._capture, self._rewrite = capture, rewrite
        self._hooks: AbstractContextManager[None] = nullcontext()

    def __enter__(self) -> None:
        self._capture.replaying = True
        if self._rewrite is not None:
            self._hooks = self._capture.hooks(self._rewrite, replays=True)
        self._hooks.__enter__()

    def __exit__(self, *error: Any) -> None:
        self._hooks.__exit__(*error)
        self._capture.replaying = False


def _adapter(model_type: str) -> Adapter:
    if model_type not in DECODERS:
        raise StudentError(
            f"no adapter says where a student of type {model_type!r} has its keys and values; "
            f"known decoder types: {', '.join(sorted(DECODERS))}"
        )
    return DECODERS[model_type]
