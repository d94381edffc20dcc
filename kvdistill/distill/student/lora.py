"""LoRA students: frozen pretrained weights with trainable low-rank updates (arXiv 2106.09685).

peft injects adapters into the student, which stays the model that it was: keys and values are
captured from the same modules, with the updates applied. A LoRA student is saved twice: merged, so
that it loads as an ordinary model, and as an adapter in peft's own format, which is exact. Both are
made from a state dict, because a sharded model's weights are whole only there.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import load, save_file
from torch import Tensor, nn
from torch.func import functional_call

from kvdistill.config.training import LoraConfig
from kvdistill.errors import MissingExtra, StudentError

ADAPTER_FOLDER: Final = "adapter"
ADAPTER_FILE: Final = "adapter_model.safetensors"
ADAPTER_NAME: Final = "default"
PEFT_PREFIX: Final = "base_model.model."
"""Precedes a model's own names in the files of a ``PeftModel``."""


def adapt(student: Any, config: LoraConfig, seed: int) -> Any:
    """Inject adapters into a student, in place; all other weights are frozen.

    The product of an adapter's two matrices starts at zero; the first is drawn from ``seed``.

    Raises:
        MissingExtra: peft is not installed.
        StudentError: a target module does not exist, or cannot be adapted.
    """
    try:
        import peft
    except ImportError as error:
        raise MissingExtra("student.lora needs peft: pip install 'kvdistill[lora]'") from error
    targets = config.target_modules
    experts = _expert_tensors(student, targets or ())
    modules = None if targets is None else [name for name in targets if name not in experts]
    settings = peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules="all-linear" if modules is None else modules,
        exclude_modules=_routers(student) if modules is None else None,
        target_parameters=experts or None,
        task_type=peft.TaskType.CAUSAL_LM,
    )
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            adapted = peft.inject_adapter_in_model(settings, student, adapter_name=ADAPTER_NAME)
    except ValueError as error:
        linear = {n for n, m in student.named_modules() if _is_linear(m)}
        names = sorted({name.rpartition(".")[2] for name in linear} | set(_experts(student)))
        raise StudentError(
            f"student.lora.target_modules {list(targets or ())}: {' '.join(str(error).split())} "
            f"(this student has {', '.join(names)})"
        ) from error
    ends = (student.get_input_embeddings(), student.get_output_embeddings())
    if any(hasattr(end, "lora_A") for end in ends):
        # Merged, the input and the output embeddings are no longer the same matrix.
        student.config.get_text_config().tie_word_embeddings = False
        student.config.tie_word_embeddings = False
    return adapted


def _routers(student: Any) -> list[str] | None:
    """Linear layers that return more than their product (Llama 4, Phi-3.5 MoE)."""
    named = student.named_modules()
    return [n for n, m in named if _is_linear(m) and "Router" in type(m).__name__] or None


def _is_linear(module: Any) -> bool:
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def _experts(student: Any) -> list[str]:
    """Tensors of mixture-of-experts layers, ``experts.gate_up_proj``: all experts in one."""
    named = [name.split(".") for name, x in student.named_parameters() if x.ndim == 3]
    return sorted({".".join(parts[-2:]) for parts in named if parts[-2] == "experts"})


def _expert_tensors(student: Any, targets: Iterable[str]) -> list[str]:
    """Those of ``targets`` that name such a tensor and no module."""
    return [t for t in targets if any(f".{name}".endswith(f".{t}") for name in _experts(student))]


def is_adapted(student: Any) -> bool:
    """Whether a student has adapters."""
    return any(hasattr(module, "lora_A") for module in student.modules())


def merged_state(student: Any, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A student's state with every update added to its weight, under the base model's names.

    Args:
        student: has the adapters; its own weights are not read.
        state: whole tensors, named as in ``student.state_dict()``.
    """
    layers = {name: module for name, module in student.named_modules() if hasattr(module, "lora_A")}
    plain = {}
    for name, frozen in state.items():
        if ".lora_" in name:
            continue
        value, (module, _, parameter) = frozen, name.rpartition(".")
        # One wrapper per adapted parameter: an expert's two tensors have one around the other.
        while (owner := module.removesuffix(".base_layer")) != module:
            module = owner
            if getattr(layers[owner], "parameter_name", "weight") == parameter:
                weights = {
                    f"layer.{key.removeprefix(owner + '.')}": weight
                    for key, weight in state.items()
                    if key.startswith(f"{owner}.lora_")
                }
                update = functional_call(_Update(layers[owner]), weights, ())
                value = value + update.to(value)
        plain[f"{module}.{parameter}" if module else parameter] = value
    return plain


class _Update(nn.Module):
    """The update of one adapted layer, computed by peft from whichever weights are bound."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.layer = layer

    def forward(self) -> Tensor:
        update: Tensor = self.layer.get_delta_weight(ADAPTER_NAME)
        return update


def save_adapter(student: Any, state: Mapping[str, Tensor], folder: Path) -> None:
    """Write ``folder/adapter`` for ``peft.PeftModel.from_pretrained``."""
    path = folder / ADAPTER_FOLDER
    path.mkdir(parents=True, exist_ok=True)
    adapter = _adapter_state(student, state)
    save_file({name: value.contiguous() for name, value in adapter.items()}, path / ADAPTER_FILE)
    _adapted_model(student)[1].peft_config[ADAPTER_NAME].save_pretrained(str(path))


def load_adapter(student: Any, folder: Path) -> dict[str, Tensor]:
    """Read ``folder/adapter``, under the names that ``student.state_dict()`` gives its weights.

    Raises:
        StudentError: no such adapter, or it has other modules or another rank.
    """
    path = folder / ADAPTER_FOLDER / ADAPTER_FILE
    if not path.is_file():
        raise StudentError(
            f"{folder} has no {ADAPTER_FOLDER}/: it was not saved by a LoRA student; remove "
            "student.lora, or give a checkpoint of a LoRA run"
        )
    stored, own = load(path.read_bytes()), student.state_dict()
    names = _adapter_state(student, {name: name for name in own})
    fits = names.keys() == stored.keys()
    if not fits or any(stored[key].shape != own[name].shape for key, name in names.items()):
        raise StudentError(
            f"{path} holds adapters of other modules or of another rank than student.lora "
            "configures; use the settings that it was trained with"
        )
    return {name: stored[key] for key, name in names.items()}


def _adapter_state(student: Any, state: Mapping[str, Any]) -> dict[str, Any]:
    """The adapter's entries of a state, under the names that peft's files have."""
    from peft import get_peft_model_state_dict

    prefix, model = _adapted_model(student)
    own = {name.removeprefix(prefix): value for name, value in state.items()}
    adapter = get_peft_model_state_dict(
        model, own, adapter_name=ADAPTER_NAME, save_embedding_layers=False
    )
    return {f"{PEFT_PREFIX}{name}": value for name, value in adapter.items()}


def _adapted_model(student: Any) -> tuple[str, Any]:
    """The model that peft adapted and the prefix of its names; a latent student wraps one."""
    name, model = next((n, m) for n, m in student.named_modules() if hasattr(m, "peft_config"))
    return (f"{name}." if name else ""), model
