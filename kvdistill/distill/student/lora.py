"""LoRA students: a pretrained model whose weights stay, with low-rank updates that learn.

Adapters are put inside the student (``peft.inject_adapter_in_model``), which stays the model that
it was: keys and values are read from the same modules, now with the update in them, and it
generates and injects as before. What is saved is the sum, so that a LoRA student loads like any
other, and the adapter beside it, which is exact and small. LoRA: Hu et al., arXiv 2106.09685.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from kvdistill.config.training import LoraConfig
from kvdistill.errors import MissingExtra, StudentError

ADAPTER: Final = "adapter"


NAME: Final = "default"


WEIGHTS: Final = "adapter_model.safetensors"


PREFIX: Final = "base_model.model."
"""What peft puts before the names of a model in its files."""


def adapt(student: Any, config: LoraConfig, seed: int) -> Any:
    """Put adapters into a student, in place; everything else is frozen.

    Args:
        student: a transformers causal LM.
        config: rank, scale, and which modules.
        seed: of the adapters' first weights (their product starts at zero).

    Raises:
        MissingExtra: peft is not installed.
        StudentError: a target module does not exist, or cannot have an adapter.
    """
    try:
        import peft
    except ImportError as error:
        raise MissingExtra(
            "student.lora needs the extra 'lora': pip install 'kvdistill[lora]'"
        ) from error
    targets = config.target_modules
    settings = peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules="all-linear" if targets is None else list(targets),
        task_type=peft.TaskType.CAUSAL_LM,
    )
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return peft.inject_adapter_in_model(settings, student, adapter_name=NAME)
    except ValueError as error:
        names = sorted({n.split(".")[-1] for n, m in student.named_modules() if _takes_adapter(m)})
        raise StudentError(
            f"student.lora.target_modules {list(targets or ())}: {str(error).strip()} "
            f"(this student has {', '.join(names)})"
        ) from error


def is_adapted(student: Any) -> bool:
    """Whether a student has adapters."""
    return any(hasattr(module, "lora_A") for module in student.modules())


def merged(student: Any, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A student's state with every update added to its weight, under the model's own names."""
    layers = _adapted_layers(student)
    plain = {}
    for name, value in state.items():
        if ".lora_" in name:
            continue
        module, _, parameter = name.rpartition(".")
        owner = module.removesuffix(".base_layer")
        updated = owner in layers and parameter == "weight"
        plain[f"{owner}.{parameter}" if owner else parameter] = (
            value + _update(layers[owner], owner, state).to(value) if updated else value
        )
    return plain


def save_adapter(student: Any, state: Mapping[str, Tensor], folder: Path) -> None:
    """Write ``folder/adapter`` as peft does; ``PeftModel.from_pretrained`` reads it."""
    place = folder / ADAPTER
    place.mkdir(parents=True, exist_ok=True)
    names = _file_names(student)
    save_file({names[k]: state[k].contiguous() for k in names}, place / WEIGHTS)
    _host(student)[1].peft_config[NAME].save_pretrained(str(place))


def load_adapter(student: Any, folder: Path) -> dict[str, Tensor]:
    """Read ``folder/adapter`` for a student that has the same adapters: its part of the state.

    Raises:
        StudentError: there is none, or it has other modules or another rank.
    """
    place = folder / ADAPTER / WEIGHTS
    if not place.is_file():
        raise StudentError(f"{folder} has no {ADAPTER}/; it was not saved by a LoRA student")
    stored, names, own = load_file(place), _file_names(student), student.state_dict()
    fits = set(names.values()) == set(stored)
    if not fits or any(stored[names[name]].shape != own[name].shape for name in names):
        raise StudentError(
            f"{place} holds adapters of other modules or of another rank than student.lora asks for"
        )
    return {name: stored[names[name]] for name in names}


def _host(student: Any) -> tuple[str, Any]:
    """The language model that holds the adapters, and its name: a latent student wraps one."""
    return next((n, m) for n, m in student.named_modules() if hasattr(m, "peft_config"))


def _file_names(student: Any) -> dict[str, str]:
    """Adapter weights of a student's state, each with its name in peft's file."""
    prefix = f"{_host(student)[0]}.".removeprefix(".")
    return {
        name: PREFIX + name.removeprefix(prefix).replace(f".{NAME}.", ".")
        for name in student.state_dict()
        if ".lora_" in name
    }


def _adapted_layers(student: Any) -> dict[str, Any]:
    return {name: module for name, module in student.named_modules() if hasattr(module, "lora_A")}


def _update(layer: Any, name: str, state: Mapping[str, Tensor]) -> Tensor:
    """``scale · B A``, in the layout of the layer's weight."""
    down, up = (state[f"{name}.lora_{side}.{NAME}.weight"] for side in ("A", "B"))
    product: Tensor = layer.scaling[NAME] * (up.float() @ down.float())
    return product.T if layer.fan_in_fan_out else product


def _takes_adapter(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
