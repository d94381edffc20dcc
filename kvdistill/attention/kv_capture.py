"""The student's attention, read and rewritten while it trains.

Taps are those of teachers, from the same table, and are verified on the student in hand when
training starts. Gradients flow through what is captured. With activation checkpointing, a layer
that the backward pass recomputes is recomputed as it was: what was rewritten in the forward pass
is rewritten again, and nothing is captured twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Final, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from kvdistill.attention.adapters import QKV, Adapter, LayerStates, adapters_for
from kvdistill.attention.fitting import Verified, first_fitting
from kvdistill.attention.geometry import HeadShape, StudentGeometry, text_model
from kvdistill.attention.hooks import Site, attached, capture, find_sites
from kvdistill.errors import AdapterError, StudentError
from kvdistill.types import KINDS, Kind

Rewrite = Callable[[Tensor, int, Kind], Tensor]
"""From own keys or values ``[B, H, T, D]``, attention layer (counted from 0) and kind to what the
student attends to."""


_FITTING: Final[WeakKeyDictionary[nn.Module, Adapter]] = WeakKeyDictionary()
"""The verified adapter of every student in memory. Its modules are located anew each time, since
LoRA replaces them."""


_NOT_CAUSAL: Final = "an encoder cannot be a student; choose a causal language model"


def verify_student(student: Any) -> Verified:
    """Verify on a few tokens that what is tapped is what the student's attention computes with.

    Runs without dropout; the training mode of every module and all random states are restored.

    Raises:
        StudentError: no adapter fits, or its tapped tensors differ from the attention's inputs.
    """
    base = text_model(student)
    devices = {p.device.index for p in base.parameters() if p.device.type == "cuda"}
    training = [module for module in student.modules() if module.training]
    with torch.random.fork_rng(devices=devices):
        student.eval()
        try:
            verified = first_fitting(base, _student_adapters(base))
            if verified.kind != "decoder":
                raise AdapterError(_NOT_CAUSAL)
            _FITTING[base] = verified.adapter
            return verified
        except AdapterError as error:
            raise _unreadable(student, error) from None
        finally:
            for module in training:
                module.training = True


def _student_adapters(base: Any) -> list[Adapter]:
    """The model type's own adapter, or every decoder's for an unknown type."""
    decoders = [adapter for adapter in adapters_for(base) if adapter.kind == "decoder"]
    if not decoders:
        raise AdapterError(_NOT_CAUSAL)
    return decoders


def _unreadable(student: Any, error: AdapterError) -> StudentError:
    kind = student.config.model_type
    return StudentError(
        f"keys and values of a student of type {kind!r} cannot be read: {error}; correct "
        "student.architecture, or take another model"
    )


class CapturedLayer(NamedTuple):
    """Unrotated queries, keys and values ``[B, H, T, D]`` of one attention layer."""

    query: Tensor | None
    """None unless queries were requested: they are several times as large as the keys."""
    key: Tensor
    value: Tensor


def stack_layers(captured: Sequence[CapturedLayer]) -> tuple[Tensor | None, Tensor, Tensor]:
    """Queries, keys and values of all layers, ``[B, L, H, T, D]`` each."""
    queries = [layer.query for layer in captured if layer.query is not None]
    key, value = (torch.stack([getattr(x, kind) for x in captured], dim=1) for kind in KINDS)
    return torch.stack(queries, dim=1) if queries else None, key, value


class KVCapture:
    """Captures and rewrites unrotated keys and values while the student runs.

    Layers are those with attention, counted from 0; ``skipped`` names all others, and why.
    """

    def __init__(self, student: Any) -> None:
        base = text_model(student)
        try:
            self.adapter, self.sites, self.skipped = _locate(student, base)
        except AdapterError as error:
            raise _unreadable(student, error) from None
        self.geometry = _geometry(student, self.sites)
        self._student = student
        self._rewrite: Rewrite | None = None
        self.replaying = self.capturing = False

    def compile_layers(self, backend: str = "inductor") -> None:
        """``torch.compile`` what a layer does outside of its attention, in place.

        Hooks are attached and removed inside attention, and dynamo does not see hooks that were
        not there when it traced; so no compiled module has any.
        """
        # The gradient share walks a graph twice; donated buffers would be freed by the first walk.
        torch._functorch.config.donated_buffer = False
        first, _, _ = self.adapter.attention.partition(".")
        for site in self.sites:
            for name, child in site.layer.named_children():
                if name != first:
                    child.compile(backend=backend, dynamic=True)

    def checkpoint_activations(self) -> None:
        """Let the backward pass recompute every layer instead of keeping its activations.

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
                "context_fn": lambda: (nullcontext(), _Replay(self, self._rewrite, self.capturing)),
            }
        )

    @contextmanager
    def __call__(
        self, *, queries: bool = False, outputs: list[Tensor] | None = None
    ) -> Iterator[list[CapturedLayer]]:
        """While inside, collect what every layer computes, layer by layer.

        The layer's own output ``[B, 1, T, E]`` is appended to ``outputs``.
        """
        found: list[CapturedLayer] = []

        def collect(layer_idx: int, qkv: QKV | LayerStates) -> None:
            if not self.replaying:
                query = qkv.query if queries else None
                found.append(CapturedLayer(query, qkv.key, qkv.value))
                if isinstance(qkv, LayerStates) and outputs is not None:
                    outputs.append(qkv.hidden)

        self.capturing = True
        try:
            with capture(self.sites, collect, hidden=outputs is not None):
                yield found
        finally:
            self.capturing = False

    @contextmanager
    def rewriting(self, rewrite: Rewrite) -> Iterator[None]:
        """While inside, the student attends to ``rewrite(own [B, H, T, D], layer, kind)``.

        Keys are unrotated on both sides.

        Raises:
            StudentError: keys and values are computed from shared latents.
        """
        self.check_rewritable()
        outer, self._rewrite = self._rewrite, rewrite
        try:
            with attached(self.rewriting_hooks(rewrite, replays=False)):
                yield
        finally:
            self._rewrite = outer

    def check_rewritable(self) -> None:
        """Refuse a student whose keys cannot be replaced head by head.

        Raises:
            StudentError: keys and values are computed from shared latents.
        """
        if not self.adapter.can_rewrite:
            raise StudentError(
                f"a student of type {self._student.config.model_type!r} computes keys from latents "
                "and a part that all heads share, so a teacher's cannot be injected; set "
                "losses.inject to 0"
            )

    def rewriting_hooks(self, rewrite: Rewrite, *, replays: bool) -> Iterator[RemovableHandle]:
        """Attach hooks that rewrite in recomputed passes, or in all others."""
        for index, site in enumerate(self.sites):
            # A single tap holds queries, keys and values; of three, the first holds queries.
            is_fused = len(site.taps) == 1
            kinds: list[Sequence[Kind]] = [KINDS] if is_fused else [(kind,) for kind in KINDS]
            for tap, held in zip(site.taps[-len(kinds) :], kinds, strict=True):
                yield tap.register_forward_hook(self._rewriter(index, held, rewrite, replays))

    def _rewriter(
        self, index: int, kinds: Sequence[Kind], rewrite: Rewrite, replays: bool
    ) -> Callable[..., Tensor]:
        site = self.sites[index]

        def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            if self.replaying != replays:
                return output
            rewritten = output.clone()
            views = site.adapter.cut(_alone(rewritten, kinds, site), site.heads)
            own = site.cut(_alone(output, kinds, site))
            for kind in kinds:
                before, seen = getattr(views, kind), getattr(own, kind)
                new = rewrite(seen, index, kind)
                if site.adapter.finish is not None:  # which scales every vector afterwards
                    lengths = (x.norm(dim=-1, keepdim=True) for x in (before, seen))
                    new = new * next(lengths) / next(lengths).clamp_min(1e-30)
                before.copy_(new)
            return rewritten

        return hook


def _alone(output: Tensor, kinds: Sequence[Kind], site: Site) -> tuple[Tensor, ...]:
    """The outputs of all taps where only that of ``kinds`` is there; the others are never read."""
    if len(site.taps) == 1:
        return (output,)
    dims = {"query": site.heads.head_dim, "key": site.heads.head_dim}
    dims["value"] = site.heads.value_head_dim
    blank = output[..., :1]
    return tuple(
        output if name in kinds else blank.expand(*output.shape[:-1], dim)
        for name, dim in dims.items()
    )


class _Replay:
    """Context of a layer that a backward pass recomputes, with the hooks of its forward pass.

    What a capture computes (Llama 4's norm) is recomputed too. A class rather than a generator: a
    graph that is kept is walked again and re-enters it.
    """

    def __init__(self, student: KVCapture, rewrite: Rewrite | None, captured: bool) -> None:
        self._capture, self._rewrite, self._captured = student, rewrite, captured
        self._hooks: AbstractContextManager[None] = nullcontext()

    def __enter__(self) -> None:
        self._capture.replaying = True
        if self._rewrite is not None:
            self._hooks = attached(self._capture.rewriting_hooks(self._rewrite, replays=True))
        elif self._captured and not self._capture.capturing:
            self._hooks = capture(self._capture.sites, lambda layer_idx, qkv: None)
        self._hooks.__enter__()

    def __exit__(self, *error: Any) -> None:
        self._hooks.__exit__(*error)
        self._capture.replaying = False


def _locate(student: Any, base: Any) -> tuple[Adapter, list[Site], dict[int, str]]:
    """The adapter that a student's weights verify; of a shell without weights, one that fits."""
    if base not in _FITTING and not any(parameter.is_meta for parameter in base.parameters()):
        verify_student(student)
    problems: list[AdapterError] = []
    for adapter in [_FITTING[base]] if base in _FITTING else _student_adapters(base):
        try:
            return adapter, *find_sites(base, adapter)
        except AdapterError as error:
            problems.append(error)
    raise problems[0]


def _geometry(student: Any, sites: list[Site]) -> StudentGeometry:
    kind = student.config.model_type
    heads, *others = {site.heads for site in sites}
    if others or heads.num_query % heads.num_key_value:
        raise StudentError(
            f"a student of type {kind!r} needs the same heads in every layer, and query heads that "
            "are a multiple of key/value heads; got (query, key/value, dims) "
            f"{', '.join(str(tuple(found)) for found in (heads, *others))}"
        )
    dims: dict[Kind, int] = {"key": heads.head_dim, "value": heads.value_head_dim}
    shapes = {kind: HeadShape(heads.num_key_value, dim) for kind, dim in dims.items()}
    hidden_size = student.config.get_text_config().hidden_size
    shapes["hidden"] = HeadShape(1, hidden_size)
    return StudentGeometry(len(sites), shapes, hidden_size)
