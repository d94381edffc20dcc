"""Reading a teacher's weights and tokenizer, with one clear line when that is not possible."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import xxhash

from kvdistill.config.extraction import TeacherConfig
from kvdistill.errors import TeacherError


def load_teacher_model(
    name: str, config: TeacherConfig, device: torch.device
) -> tuple[Any, set[str]]:
    """A model in eval mode on ``device``: the base model, or with a head where it is to write.

    Also the names of parameters that the checkpoint lacks, which transformers fills at random:
    none of them may belong to a layer.

    Raises:
        TeacherError: not found, gated, unreadable, pickled weights, or incomplete weights.
    """
    from transformers import AutoModel, AutoModelForCausalLM

    kind = AutoModel if config.generate is None else AutoModelForCausalLM
    options: dict[str, Any] = {"gguf_file": config.gguf_file} if config.gguf_file else {}
    if config.device_map is not None:
        options["device_map"] = config.device_map
    try:
        if config.weights == "random":
            return _untrained(kind, config).to(device), set()
        with _without_progress_bars():
            model, info = kind.from_pretrained(
                config.model,
                revision=config.revision,
                trust_remote_code=config.trust_remote_code,
                dtype=getattr(torch, config.dtype),
                attn_implementation=_kernel(config),
                use_safetensors=None if config.gguf_file else True,
                output_loading_info=True,
                **options,
            )
    except (OSError, ValueError, ImportError, KeyError) as error:
        raise TeacherError(_reason(name, config.model, error)) from error
    missing = set(info["missing_keys"])
    lacking = sorted(key for key in missing if "pooler" not in key)
    if lacking:
        raise TeacherError(
            f"teacher {name!r}: the weights in {config.model} lack {len(lacking)} parameters of "
            f"{type(model).__name__}, such as {lacking[0]}; they would be random"
        )
    model = model.eval().requires_grad_(False)
    return model if config.device_map is not None else model.to(device), missing


def load_teacher_tokenizer(name: str, config: TeacherConfig) -> Any:
    """The teacher's fast tokenizer.

    Raises:
        TeacherError: not found, or without character offsets.
    """
    from transformers import AutoTokenizer

    source = config.tokenizer or config.model
    own = config.tokenizer is None
    options: dict[str, Any] = {"gguf_file": config.gguf_file} if own and config.gguf_file else {}
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            source,
            revision=config.revision if own else None,
            trust_remote_code=config.trust_remote_code,
            **options,
        )
    except (OSError, ValueError, ImportError, KeyError) as error:
        raise TeacherError(_reason(name, source, error)) from error
    if not tokenizer.is_fast:
        raise TeacherError(
            f"teacher {name!r}: {type(tokenizer).__name__} gives no character offsets, and "
            f"alignment needs them; set teachers.{name}.tokenizer to one with a tokenizer.json"
        )
    return tokenizer


def _untrained(kind: Any, config: TeacherConfig) -> Any:
    """The model's architecture with weights that are drawn anew: a placebo for what it learned.

    Always the same draw, so that every process of an extraction reads with the same teacher.
    """
    from transformers import AutoConfig

    architecture = AutoConfig.from_pretrained(
        config.model, revision=config.revision, trust_remote_code=config.trust_remote_code
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = kind.from_config(
            architecture,
            trust_remote_code=config.trust_remote_code,
            dtype=getattr(torch, config.dtype),
            attn_implementation=_kernel(config),
        )
    return model.eval().requires_grad_(False)


def _kernel(config: TeacherConfig) -> str | None:
    """None lets transformers take sdpa, or eager for what sdpa cannot do (Gemma 2's soft cap)."""
    return None if config.attn_implementation == "sdpa" else config.attn_implementation


@contextmanager
def _without_progress_bars() -> Iterator[None]:
    """Loading draws a bar over the weights, across whatever bars are already drawn."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _reason(name: str, source: str, error: Exception) -> str:
    """One line: transformers' messages are long, and their first sentence says what is wrong."""
    first = " ".join(str(error).split())[:300]
    return (
        f"teacher {name!r}: cannot load {source!r}: {first} (is the name right, is it downloaded, "
        "and do you have access? `kvdistill fetch` downloads ahead of time)"
    )


def weights_fingerprint(model: Any, excluded: Collection[str] = ()) -> str:
    """xxh3 over every parameter's name, dtype, shape and bytes, in order of names.

    ``excluded`` are parameters that the checkpoint does not have (a BERT without its pooler):
    they were initialised at random and play no part in keys and values.
    """
    digest = xxhash.xxh3_128()
    for name, parameter in sorted(model.named_parameters()):
        if name in excluded:
            continue
        digest.update(f"{name} {parameter.dtype} {tuple(parameter.shape)}".encode())
        digest.update(parameter.detach().contiguous().view(torch.uint8).cpu().numpy())
    return f"xxh3:{digest.hexdigest()}"


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """SHA-256 over a fast tokenizer's whole definition: vocabulary, merges, rules."""
    return hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest()


# MERGED-DOC extract.fingerprints
# What a teacher's weights and tokenizer are, independently of where they were loaded from.
