"""What training writes and reads back: the student as a Hugging Face folder, the rest beside it.

FOLDER/model.safetensors, config.json, tokenizer…   loads with ``AutoModelForCausalLM``
FOLDER/adapter/                                      the LoRA adapter alone, where there is one
FOLDER/projectors.safetensors                        projectors, router, injection gates
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from kvdistill.distill.student import lora
from kvdistill.distill.student.latent.model import WEIGHTS as LATENT
from kvdistill.distill.student.latent.model import is_latent
from kvdistill.errors import StudentError

PROJECTORS: Final = "projectors.safetensors"


STUDENT_PREFIX: Final = "student."


def save_weights(
    distiller: Any, tokenizer: Any, folder: Path, state: Mapping[str, Tensor] | None = None
) -> None:
    """Write a distiller's weights; ``state`` is its state where a wrapper has gathered it."""
    folder.mkdir(parents=True, exist_ok=True)
    student, projectors = {}, {}
    for name, value in (distiller.state_dict() if state is None else state).items():
        if name.startswith(STUDENT_PREFIX):
            student[name.removeprefix(STUDENT_PREFIX)] = value
        else:
            projectors[name] = value.contiguous()
    plain: dict[str, Tensor] = student
    if lora.is_adapted(distiller.student):
        lora.save_adapter(distiller.student, student, folder)
        plain = lora.merged(distiller.student, student)
    distiller.student.save_pretrained(folder, state_dict=plain)
    tokenizer.save_pretrained(folder)
    if projectors:
        save_file(projectors, folder / PROJECTORS)


def load_weights(distiller: Any, folder: Path) -> None:
    """Read back what ``save_weights`` wrote; frozen weights under an adapter are left alone."""
    if lora.is_adapted(distiller.student):
        student = lora.load_adapter(distiller.student, folder)
        if is_latent(folder):
            student |= load_file(folder / LATENT)
    else:
        student = type(distiller.student).from_pretrained(folder, dtype=torch.float32).state_dict()
    state = {f"{STUDENT_PREFIX}{name}": value for name, value in student.items()}
    if (folder / PROJECTORS).is_file():
        state |= load_file(folder / PROJECTORS)
    load_state(distiller, state)


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """While inside, every rank has the weights of the outermost shard; nothing where none is."""
    shards = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for shard in shards:
        shard.unshard()
    try:
        yield
    finally:
        for shard in shards:
            shard.reshard()


def load_state(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load whole tensors by name into a plain or a sharded model; what has none is left alone.

    Raises:
        StudentError: the model has no such weights.
    """
    if not any(isinstance(module, FSDPModule) for module in model.modules()):
        found = model.load_state_dict(dict(state), strict=False)
        if found.unexpected_keys:
            raise StudentError(
                f"saved weights {found.unexpected_keys[:3]} belong to no part of this model; the "
                "folder was written by a run with other settings"
            )
        return
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    options = StateDictOptions(full_state_dict=True, strict=False)
    with torch.no_grad():
        set_model_state_dict(model, dict(state), options=options)


# MERGED-DOC distill.sharded
# Fully sharded students (FSDP2): running a part of the model by itself, and loading weights.
#
# A sharded module gathers its weights when *it* is called. Evaluation calls the student, not the
# distiller around it, so what the distiller holds has to be gathered by hand.
