"""Hooks: where they sit in a model, and what teachers are read and verified with.

Every hook of the package is attached through ``attached``, which removes it again. On it stand
``capture`` (unrotated queries, keys and values), ``attention_probe`` (what attention is given,
after rotation), the student's ``KVCapture`` and the hidden states of extraction.

Captured layers are handed over one at a time and then dropped, so a batch never holds the queries
of all layers, and a callback can encode or move one layer while the next one runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from kvdistill.attention.adapters import QKV, Adapter
from kvdistill.attention.geometry import Heads, read_heads
from kvdistill.errors import AdapterError

OnLayer = Callable[[int, QKV], None]
"""Receives a layer's index and its Q, K and V."""


@dataclass(frozen=True, eq=False)
class Site:
    """One layer that has keys and values, in the model in hand."""

    layer_idx: int
    layer: nn.Module
    attention: nn.Module
    taps: tuple[nn.Module, ...]
    heads: Heads
    adapter: Adapter

    def cut(self, outputs: tuple[Tensor, ...]) -> QKV:
        """Unrotated Q, K and V from the outputs of the taps, as attention computes with them."""
        qkv = self.adapter.cut(outputs, self.heads)
        finish = self.adapter.finish
        return qkv if finish is None else finish(self.attention, qkv)


def find_sites(model: nn.Module, adapter: Adapter) -> tuple[list[Site], dict[int, str]]:
    """Locate an adapter's modules: ``(layers with attention, {layer without it: why})``.

    Raises:
        AdapterError: the model has no such layers, or none of them has the adapter's modules.
    """
    layers = _submodule(model, adapter.layers)
    if not isinstance(layers, nn.ModuleList):
        raise AdapterError(f"{type(model).__name__} has no list of layers at {adapter.layers!r}")
    config: Any = model.config
    found: list[Site] = []
    skipped: dict[int, str] = {}
    for layer_idx, layer in enumerate(layers):
        attention = _submodule(layer, adapter.attention)
        taps = tuple(_first_of(attention, tap) for tap in adapter.taps)
        present = tuple(tap for tap in taps if tap is not None)
        if attention is None or present != taps:
            shares = getattr(attention, "is_kv_shared_layer", False)
            skipped[layer_idx] = (
                "reuses the keys and values of an earlier layer"
                if shares
                else f"{type(layer).__name__} without {adapter.attention}"
            )
            continue
        heads = read_heads(attention, config.get_text_config())
        if adapter.has_key_per_query:
            heads = heads._replace(num_key_value=heads.num_query)
        found.append(Site(layer_idx, layer, attention, present, heads, adapter))
    if not found:
        wanted = f"{adapter.attention}.{{{','.join(adapter.taps)}}}"
        raise AdapterError(f"{type(model).__name__}: no layer has {wanted}")
    return found, skipped


def _first_of(module: nn.Module | None, paths: str) -> nn.Module | None:
    """The first existing submodule of ``a|b``."""
    found = (_submodule(module, path) for path in paths.split("|"))
    return next((submodule for submodule in found if submodule is not None), None)


def _submodule(module: nn.Module | None, path: str) -> nn.Module | None:
    try:
        return None if module is None else module.get_submodule(path)
    except AttributeError:
        return None


@contextmanager
def attached(handles: Iterable[RemovableHandle]) -> Iterator[None]:
    """Keep hooks attached while inside.

    ``handles`` is consumed here, so with a generator that registers hooks as it goes all of them
    are removed even if one cannot be registered.
    """
    with ExitStack() as stack:
        for handle in handles:
            stack.callback(handle.remove)
        yield


@contextmanager
def capture(sites: Sequence[Site], on_layer: OnLayer) -> Iterator[None]:
    """While inside, call ``on_layer`` for every site as soon as its Q, K and V are computed."""
    with attached(handle for site in sites for handle in _tap(site, on_layer)):
        yield


def _tap(site: Site, on_layer: OnLayer) -> Iterator[RemovableHandle]:
    outputs: dict[int, Tensor] = {}

    def collector(position: int) -> Callable[..., None]:
        def collect(module: nn.Module, args: Any, output: Tensor) -> None:
            outputs[position] = output
            if len(outputs) == len(site.taps):
                tapped = tuple(outputs[i] for i in range(len(site.taps)))
                outputs.clear()
                on_layer(site.layer_idx, site.cut(tapped))

        return collect

    for position, tap in enumerate(site.taps):
        yield tap.register_forward_hook(collector(position))


@dataclass(frozen=True, eq=False)
class AttentionInputs:
    """What one attention product is given: Q, K and V ``[B, H, T, D]``, rotated, and its settings.

    A setting is None (or False) where the product was seen without it.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    scaling: float | None = None
    causal: bool | None = None
    sliding_window: int | None = None
    softcap: float | None = None
    has_position_bias: bool = False


@contextmanager
def attention_probe(model: Any, sites: Sequence[Site]) -> Iterator[dict[int, AttentionInputs]]:
    """While inside, record by layer index what the attention of every site is given.

    Models that dispatch through transformers' ``AttentionInterface`` run a kernel that records its
    arguments; for all others (GPT-J, Falcon) a torch function mode observes
    ``scaled_dot_product_attention`` or the two matrix products. The model's own kernel is restored.
    """
    probe = _AttentionProbe()
    hooks = attached(handle for site in sites for handle in probe.bracket(site))
    with hooks, _dispatched_to(probe, model), probe:
        yield probe.seen


PROBE_KERNEL: Final = "kvdistill_probe"
_PRODUCTS: Final = (torch.matmul, Tensor.matmul, Tensor.__matmul__)


class _AttentionProbe(TorchFunctionMode):
    """Records the first attention product of every site; changes nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[int, AttentionInputs] = {}
        self._layer_idx: int | None = None
        self._products: list[tuple[Tensor, Tensor]] = []

    def bracket(self, site: Site) -> Iterator[RemovableHandle]:
        """Attach hooks between which the running layer is ``site``'s."""

        def enter(module: nn.Module, args: Any) -> None:
            self._layer_idx, self._products = site.layer_idx, []

        def leave(module: nn.Module, args: Any, output: Any) -> None:
            self._layer_idx = None

        yield site.attention.register_forward_pre_hook(enter)
        yield site.attention.register_forward_hook(leave)

    def kernel(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **options: Any
    ) -> Any:
        """An attention function for ``AttentionInterface``: record, then compute with sdpa.

        sdpa cannot soft-cap. That alters what later layers read, and no comparison: each layer
        is compared with its own inputs.
        """
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        mask = args[0] if args else options.pop("attention_mask")
        softcap, bias = options.pop("softcap", None), options.get("position_bias")
        causal, masks_bias = _read_mask(mask, query, key)
        if causal is None:
            is_causal = options.get("is_causal")
            causal = getattr(module, "is_causal", None) if is_causal is None else is_causal
        has_bias = masks_bias or (bias is not None and bool(bias.any()))
        scaling, window = options.get("scaling"), options.get("sliding_window")
        # Products before the kernel (of an indexer that selects tokens) are not the attention's.
        if self._layer_idx is not None:
            self.seen.pop(self._layer_idx, None)
        self._record(AttentionInputs(query, key, value, scaling, causal, window, softcap, has_bias))
        return sdpa_attention_forward(module, query, key, value, mask, **options)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Observe attention products of the running layer."""
        kwargs = kwargs or {}
        if self._layer_idx is not None and self._layer_idx not in self.seen:
            if func is F.scaled_dot_product_attention:
                self._record(_sdpa_inputs(*args, **kwargs))
            elif func in _PRODUCTS and args[0].ndim == 4 and args[1].ndim == 4:
                self._products.append((args[0], args[1]))
                if len(self._products) == 2:
                    (query, key_transposed), (_, value) = self._products
                    self._record(AttentionInputs(query, key_transposed.mT, value))
        return func(*args, **kwargs)

    def _record(self, inputs: AttentionInputs) -> None:
        if self._layer_idx is not None:
            self.seen.setdefault(self._layer_idx, inputs)


def _sdpa_inputs(*args: Any, **options: Any) -> AttentionInputs:
    """Bind the arguments of ``scaled_dot_product_attention``."""
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale")
    given = dict(zip(names, args, strict=False)) | options
    query, key, value = given["query"], given["key"], given["value"]
    scaling = given.get("scale") or query.shape[-1] ** -0.5
    causal, has_bias = _read_mask(given.get("attn_mask"), query, key)
    if causal is None:
        causal = given.get("is_causal", False)
    return AttentionInputs(query, key, value, scaling, causal, has_position_bias=has_bias)


def _read_mask(mask: Tensor | None, query: Tensor, key: Tensor) -> tuple[bool | None, bool]:
    """Whether a mask (bool, or added to scores) is causal, and whether it carries a bias."""
    if mask is None:
        return None, False
    is_additive = mask.is_floating_point()
    visible = mask > torch.finfo(mask.dtype).min / 2 if is_additive else mask.bool()
    shown = visible.expand(*visible.shape[:-2], query.shape[2], key.shape[2])
    return not bool(shown.triu(1).any()), is_additive and bool(mask[visible].any())


@contextmanager
def _dispatched_to(probe: _AttentionProbe, model: Any) -> Iterator[None]:
    """Run a model's attention through the probe, where the model can change its kernel."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask

    def explicit_mask(*args: Any, **options: Any) -> Any:
        # A mask that is left to the kernel's is_causal argument could not be read.
        skips = {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
        return sdpa_mask(*args, **{**options, **skips})

    if not model._can_set_attn_implementation():
        yield
        return
    chosen = model.config._attn_implementation
    AttentionInterface.register(PROBE_KERNEL, probe.kernel)
    AttentionMaskInterface.register(PROBE_KERNEL, explicit_mask)
    model.set_attn_implementation(PROBE_KERNEL)
    try:
        yield
    finally:
        model.set_attn_implementation(chosen)
        # The registry outlives the probe, and would hold the tensors that it has recorded.
        AttentionInterface.register(PROBE_KERNEL, sdpa_attention_forward)
