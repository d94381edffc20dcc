"""The student: building or loading it, and reading its keys and values during a forward pass.

Keys are read before rotation, from the same places that teachers are read from. Gradients flow
through what is read, with activation checkpointing as well: a layer that the backward pass computes
again is computed as it was, so what was rewritten is rewritten again, and what was read is not
read twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kvdistill.adapters import DECODERS, QKV, Adapter, Heads
from kvdistill.config_training import StudentConfig
from kvdistill.distill.lora import adapt
from kvdistill.distill.projection import HeadShape
from kvdistill.errors import StudentError
from kvdistill.types import KINDS, Kind

Rewrite = Callable[[Tensor, int, Kind], Tensor]
"""From own keys or values ``[B, H, T, D]``, layer and kind to what the student attends to."""


@dataclass(frozen=True)
class StudentGeometry:
    """Layers and key/value heads of the student."""

    num_layers: int
    heads: HeadShape
    hidden_size: int


def build_student(config: StudentConfig, tokenizer: Any, seed: int) -> Any:
    """The student to be trained: pretrained, or from scratch with a given seed.

    Args:
        config: which model, or which architecture.
        tokenizer: the student's; sets the vocabulary size of a student from scratch.
        seed: initialisation of a student from scratch; the same seed, the same weights.

    Returns:
        A transformers causal LM in float32.

    Raises:
        StudentError: not found, an impossible architecture, or a vocabulary that is too small.
        MissingExtra: LoRA without peft.
    """
    from transformers import AutoModelForCausalLM

    with _one_line(config):
        if config.model is not None:
            student = AutoModelForCausalLM.from_pretrained(
                config.model, dtype=torch.float32, trust_remote_code=config.trust_remote_code
            )
        else:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                student = AutoModelForCausalLM.from_config(_architecture(config, tokenizer))
    rows = student.get_input_embeddings().num_embeddings
    if rows < len(tokenizer):
        raise StudentError(
            f"the student has {rows} embeddings but its tokenizer has {len(tokenizer)} tokens; "
            "they must belong together (student.tokenizer)"
        )
    return student if config.lora is None else adapt(student, config.lora, seed)


def check_student(config: StudentConfig, tokenizer: Any) -> StudentGeometry:
    """Whether a student can be built and its KV read, found out without its weights.

    Raises:
        StudentError: as ``build_student``, or its keys and values cannot be located.
    """
    from transformers import AutoModelForCausalLM

    with _one_line(config), torch.device("meta"):
        student = AutoModelForCausalLM.from_config(
            _architecture(config, tokenizer), trust_remote_code=config.trust_remote_code
        )
    return KVCapture(student).geometry


def _architecture(config: StudentConfig, tokenizer: Any) -> Any:
    """The student's transformers config; one from scratch takes its tokens from the tokenizer."""
    from transformers import AutoConfig

    if config.model is not None:
        return AutoConfig.from_pretrained(config.model, trust_remote_code=config.trust_remote_code)
    tokens = {
        f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")
    }
    given = {"vocab_size": len(tokenizer), **tokens, **(config.architecture or {})}
    return AutoConfig.for_model(**given)


@contextmanager
def _one_line(config: StudentConfig) -> Iterator[None]:
    """Whatever transformers raises about a student, as one line that names it."""
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        what = config.model or config.architecture
        first_line = str(error).strip().split("\n")[0]
        raise StudentError(f"cannot build the student {what!r}: {first_line}") from error


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


def student_geometry(student: Any) -> StudentGeometry:
    """Layers, key/value heads and hidden size, from the student's config."""
    config = student.config.get_text_config()
    num_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    if config.num_attention_heads % num_heads:
        raise StudentError(
            f"the student has {config.num_attention_heads} query heads for {num_heads} key/value "
            "heads; the first must be a multiple of the second"
        )
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return StudentGeometry(
        config.num_hidden_layers, HeadShape(num_heads, head_dim), config.hidden_size
    )
