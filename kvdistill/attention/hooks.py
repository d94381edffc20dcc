"""Hooks: where they sit in a model, and what teachers are read and verified with.

Every hook of the package is attached through ``attached``, which removes it again. On it stand
``capture`` (unrotated queries, keys and values), ``attention_probe`` (what attention is given,
after rotation), the student's ``KVCapture`` and the hidden states of extraction.

Captured layers are handed over one at a time and then dropped, so a batch never holds the queries
of all layers, and a callback can encode or move one layer while the next one runs.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from kvdistill.attention.adapters import QKV, Adapter, LayerStates
from kvdistill.attention.attention_rule import MaskRule, read_mask_function
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
def capture(sites: Sequence[Site], on_layer: OnLayer, *, hidden: bool = False) -> Iterator[None]:
    """While inside, call ``on_layer`` for every site as soon as its Q, K and V are computed.

    With ``hidden``, for ``LayerStates``, when the layer has ended.
    """
    tap = _tap_with_output if hidden else _tap
    with attached(handle for site in sites for handle in tap(site, on_layer)):
        yield


def _tap_with_output(site: Site, on_layer: OnLayer) -> Iterator[RemovableHandle]:
    waiting: list[QKV] = []

    def ended(module: nn.Module, args: Any, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        if hidden.ndim != 3:
            raise AdapterError(
                f"extraction.hidden: {type(module).__name__} returns several hidden states a token "
                f"({list(hidden.shape)}); set it to false, and losses.hidden to 0"
            )
        states: Any = LayerStates(*waiting.pop(), hidden.unsqueeze(1))
        on_layer(site.layer_idx, states)

    yield from _tap(site, lambda _, qkv: waiting.append(qkv))
    yield site.layer.register_forward_hook(ended)


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

    A setting is None where the product was seen without it.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    scaling: float | None = None
    mask: MaskRule | None = None
    """None where the product shows only what a text of this length can see."""
    softcap: float | None = None
    sinks: Tensor | None = None
    probabilities: Tensor | None = None
    """The attention itself, ``[B, HQ, T, T]``; float32 where the kernel allows it."""


@contextmanager
def attention_probe(model: Any, sites: Sequence[Site]) -> Iterator[dict[int, AttentionInputs]]:
    """While inside, record by layer index what the attention of every site is given and computes.

    Models that dispatch through transformers' ``AttentionInterface`` run a kernel that records its
    arguments, and the weights of the model's own eager attention in float32; for all others (GPT-J,
    Falcon) a torch function mode observes ``scaled_dot_product_attention`` or the two matrix
    products, the second of which multiplies the weights. The model's own kernel is restored.
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
        self.masks: list[tuple[Tensor, MaskRule | None]] = []
        """Masks that the model has made, and what they are."""
        self._site: Site | None = None
        self._products: list[tuple[Tensor, Tensor]] = []

    def bracket(self, site: Site) -> Iterator[RemovableHandle]:
        """Attach hooks between which the running layer is ``site``'s."""

        def enter(module: nn.Module, args: Any) -> None:
            self._site, self._products = site, []

        def leave(module: nn.Module, args: Any, output: Any) -> None:
            self._site = None

        yield site.attention.register_forward_pre_hook(enter)
        yield site.attention.register_forward_hook(leave)

    def kernel(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **options: Any
    ) -> Any:
        """An attention function for ``AttentionInterface``: record, then compute as eager does."""
        mask = args[0] if args else options.pop("attention_mask", None)
        site, self._site = self._site, None  # products inside of the kernel are not observed
        rule = self._rule_of(mask, options.get("sliding_window"))
        if mask is None and _is_causal(module, options):
            mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=key.device)
            mask, rule = mask.tril()[None, None], MaskRule(causal=True)
        if mask is not None and not mask.is_floating_point():
            mask = torch.zeros_like(mask, dtype=torch.float32).masked_fill_(~mask.bool(), -1e30)
        inputs = (x.float() for x in (query, key, value))
        mixed, weights = _eager_kernel(module)(module, *inputs, mask, **options)
        self._site = site
        # Products before the kernel (of an indexer that selects tokens) are not the attention's.
        if site is not None:
            self.seen.pop(site.layer_idx, None)
        self._record(
            AttentionInputs(
                query,
                key,
                value,
                options.get("scaling"),
                rule,
                options.get("softcap"),
                options.get("s_aux"),
                weights,
            )
        )
        return mixed.to(value.dtype), weights

    def _rule_of(self, mask: Tensor | None, sliding_window: int | None) -> MaskRule | None:
        """What a layer's mask is: one that the model has made, itself or with a bias added."""
        if mask is None:
            return None
        memory = mask.untyped_storage().data_ptr()
        same = [rule for own, rule in self.masks if own.untyped_storage().data_ptr() == memory]
        if same:
            return same[0]
        visible = mask > torch.finfo(mask.dtype).min / 2 if mask.is_floating_point() else mask
        alike = {rule for own, rule in self.masks if torch.equal(own, visible[:1, :1].bool())}
        if len(alike) > 1:  # windows wider than the text; the layer states its own
            alike = {rule for rule in alike if rule and rule.sliding_window == sliding_window}
        return alike.pop() if len(alike) == 1 else None

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Observe attention products of the running layer."""
        kwargs = kwargs or {}
        if self._site is not None and self._site.layer_idx not in self.seen:
            if func is F.scaled_dot_product_attention:
                self._record(_sdpa_inputs(*args, **kwargs))
            elif func in _PRODUCTS and args[0].ndim == args[1].ndim == 4:
                self._products.append((args[0], args[1]))
                if len(self._products) == 2:
                    (query, key_transposed), (weights, value) = self._products
                    rule = _buffered_rule(self._site.attention)
                    key = key_transposed.mT
                    seen = AttentionInputs(query, key, value, mask=rule, probabilities=weights)
                    self._record(seen)
        return func(*args, **kwargs)

    def _record(self, inputs: AttentionInputs) -> None:
        if self._site is not None:
            self.seen.setdefault(self._site.layer_idx, inputs)


def _buffered_rule(attention: nn.Module) -> MaskRule | None:
    """The mask that an attention module keeps as a buffer ``[1, 1, positions, positions]``."""
    for buffer in attention.buffers(recurse=False):
        if buffer.ndim == 4 and buffer.dtype in (torch.bool, torch.uint8):
            kept = buffer[0, 0].bool()
            return read_mask_function(partial(_of_buffer, kept), kept.device, len(kept))
    return None


def _of_buffer(kept: Tensor, sample: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
    return kept[query, key]


def _is_causal(module: Any, options: dict[str, Any]) -> bool:
    stated = options.get("is_causal")
    return bool(getattr(module, "is_causal", False) if stated is None else stated)


def _eager_kernel(module: nn.Module) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """The eager attention of a module's own file, which applies its soft cap, bias and sinks."""
    places = (sys.modules.get(base.__module__) for base in type(module).__mro__)
    found = (getattr(place, "eager_attention_forward", None) for place in places)
    return next((kernel for kernel in found if kernel is not None), _plain_eager)


def _plain_eager(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options: Any
) -> tuple[Tensor, Tensor]:
    """Attention of a model without an eager form of its own: scale, mask, softmax."""
    weights = _sdpa_weights(query, key, mask, options.get("scaling"))
    value = value.repeat_interleave(query.shape[1] // value.shape[1], dim=1)
    return (weights @ value).transpose(1, 2), weights


def _sdpa_weights(query: Tensor, key: Tensor, mask: Tensor | None, scaling: float | None) -> Tensor:
    """Weights of ``scaled_dot_product_attention``, in float32."""
    key = key.float().repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    scores = query.float() @ key.mT * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, -torch.inf)
    elif mask is not None:
        scores = scores + mask
    return scores.softmax(-1)


def _sdpa_inputs(*args: Any, **options: Any) -> AttentionInputs:
    """Bind the arguments of ``scaled_dot_product_attention``."""
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale")
    given: dict[str, Any] = dict(zip(names, args, strict=False)) | options
    query, key, value = (given[name] for name in names[:3])
    mask = given.get("attn_mask")
    scaling = given.get("scale") or query.shape[-1] ** -0.5
    if given.get("is_causal"):
        mask = query.new_ones(query.shape[2], key.shape[2], dtype=torch.bool).tril()
    weights = _sdpa_weights(query, key, mask, scaling)
    return AttentionInputs(query, key, value, scaling, probabilities=weights)


@contextmanager
def _dispatched_to(probe: _AttentionProbe, model: Any) -> Iterator[None]:
    """Run a model's attention through the probe, where the model can change its kernel."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import causal_mask_function, sdpa_mask

    def explicit_mask(*args: Any, **options: Any) -> Any:
        # A mask that is left to the kernel's is_causal argument could not be read.
        skips = {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
        mask: Any = sdpa_mask(*args, **{**options, **skips})
        function = options.get("mask_function", causal_mask_function)
        probe.masks.append((mask, read_mask_function(function, mask.device)))
        return mask

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
        # The registries outlive the probe, and would hold the tensors that it has recorded.
        AttentionInterface.register(PROBE_KERNEL, sdpa_attention_forward)
        AttentionMaskInterface.register(PROBE_KERNEL, sdpa_mask)
