"""What a checkpoint holds: the student as a Hugging Face folder, the rest beside it.

    FOLDER/model.safetensors, config.json, tokenizer…   loads with ``AutoModelForCausalLM``
    FOLDER/adapter/                                     the LoRA adapter alone, where there is one
    FOLDER/projectors.safetensors                       projectors, router, injection gates

A fully sharded (FSDP2) module gathers its weights when it is called. Evaluation calls the student
and not the distiller around it, so the distiller's own shard is gathered by ``gathered``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import load, save_file
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from kvdistill.distill.student import lora
from kvdistill.distill.student.latent.model import LATENT_FILE, is_latent, split_state
from kvdistill.errors import StudentError

PROJECTORS_FILE: Final = "projectors.safetensors"

STREAM: Final = "stream.json"
"""Position in the stream."""

GUARD: Final = "recent_losses.json"
"""State of the ``StepGuard``."""

STUDENT_PREFIX: Final = "student."


def save_weights(
    distiller: Any, tokenizer: Any, folder: Path, state: Mapping[str, Tensor] | None = None
) -> None:
    """Write student, tokenizer and projectors.

    ``state`` holds the whole tensors of ``distiller.state_dict()`` where a wrapper has gathered
    them; the distiller's own if not given.
    """
    folder.mkdir(parents=True, exist_ok=True)
    state = distiller.state_dict() if state is None else state
    student, projectors = split_state(state, STUDENT_PREFIX)
    if lora.is_adapted(distiller.student):
        lora.save_adapter(distiller.student, student, folder)
        student = lora.merged_state(distiller.student, student)
    distiller.student.save_pretrained(folder, state_dict=student)
    tokenizer.save_pretrained(folder)
    if projectors:
        save_file(projectors, folder / PROJECTORS_FILE)


def load_weights(distiller: Any, folder: Path) -> None:
    """Load what ``save_weights`` wrote; the frozen weights under an adapter are kept.

    Raises:
        StudentError: the folder was written by a run with other settings.
    """
    if lora.is_adapted(distiller.student):
        student = lora.load_adapter(distiller.student, folder)
        if is_latent(folder):
            student |= load((folder / LATENT_FILE).read_bytes())
    else:
        student = type(distiller.student).from_pretrained(folder, dtype=torch.float32).state_dict()
    state = {f"{STUDENT_PREFIX}{name}": value for name, value in student.items()}
    if (folder / PROJECTORS_FILE).is_file():
        state |= load((folder / PROJECTORS_FILE).read_bytes())
    load_state(distiller, state)


def load_state(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load whole tensors by name into a plain or a sharded model; other weights are kept.

    Raises:
        StudentError: the model has no such weights.
    """
    if not any(isinstance(module, FSDPModule) for module in model.modules()):
        found = model.load_state_dict(dict(state), strict=False)
        if found.unexpected_keys:
            raise StudentError(
                f"saved weights {found.unexpected_keys[:3]} belong to no part of this model; use "
                "the settings of the run that saved them, or another name"
            )
        return
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    options = StateDictOptions(full_state_dict=True, strict=False)
    with torch.no_grad():  # ranks exchange weights one by one, so all in one order
        set_model_state_dict(model, dict(sorted(state.items())), options=options)


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """Give every rank the whole weights of an FSDP2 model while inside; no-op for a plain one."""
    shards = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for shard in shards:
        shard.unshard()
    try:
        yield
    finally:
        for shard in shards:
            shard.reshard()
