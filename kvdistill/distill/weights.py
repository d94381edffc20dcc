"""What training writes and reads back: the student as a Hugging Face folder, the rest beside it.

FOLDER/model.safetensors, config.json, tokenizer…   loads with ``AutoModelForCausalLM``
FOLDER/adapter/                                      the LoRA adapter alone, where there is one
FOLDER/projectors.safetensors                        projectors, router, injection gates
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from kvdistill.distill import lora
from kvdistill.distill.latent.student import WEIGHTS as LATENT
from kvdistill.distill.latent.student import is_latent
from kvdistill.distill.sharded import load_state

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
