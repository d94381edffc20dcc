"""The student: building or loading it, and reading its keys and values during a forward pass.

Keys are read before rotation, from the same places that teachers are read from. Gradients flow
through what is read, with activation checkpointing as well: a layer that the backward pass computes
again is computed as it was, so what was rewritten is rewritten again, and what was read is not
read twice.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from kvdistill.attention.geometry import StudentGeometry
from kvdistill.attention.hooks import KVCapture
from kvdistill.config.training import StudentConfig
from kvdistill.distill.student.lora import adapt
from kvdistill.errors import StudentError


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
