"""Loading a teacher's weights and tokenizer, and their fingerprints.

Whatever makes that impossible becomes one clear line. Fingerprints are of what was loaded, and
independent of where it was loaded from.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import xxhash

from kvdistill.attention.tokens import report_whole_offsets
from kvdistill.config.extraction import TeacherConfig
from kvdistill.errors import TeacherError


def load_teacher_model(
    name: str, config: TeacherConfig, device: torch.device
) -> tuple[Any, set[str]]:
    """A model in eval mode on ``device``: the base model, or with its head where it generates.

    Also the names of parameters that the checkpoint lacks, which transformers initialises at
    random: none of them may belong to a layer.

    Raises:
        TeacherError: not found, gated, unreadable, pickled weights, or incomplete weights.
    """
    from transformers import AutoModel, AutoModelForCausalLM

    kind = AutoModel if config.generate is None else AutoModelForCausalLM
    options: dict[str, Any] = {
        "trust_remote_code": config.trust_remote_code,
        "dtype": getattr(torch, config.dtype),
        # None makes transformers choose sdpa, or eager where sdpa cannot compute the model.
        "attn_implementation": (
            None if config.attn_implementation == "sdpa" else config.attn_implementation
        ),
    }
    try:
        if config.weights == "random":
            return _random_model(kind, config, options).to(device), set()
        if config.gguf_file:
            options["gguf_file"] = config.gguf_file
        if config.device_map is not None:
            options["device_map"] = config.device_map
        with _without_progress_bars():
            model, info = kind.from_pretrained(
                config.model,
                revision=config.revision,
                use_safetensors=None if config.gguf_file else True,
                output_loading_info=True,
                **options,
            )
    except (OSError, ValueError, ImportError, KeyError) as error:
        raise _cannot_load(name, config.model, error) from error
    missing = set(info["missing_keys"])
    lacking = sorted(key for key in missing if "pooler" not in key)
    if lacking:
        raise TeacherError(
            f"teacher {name!r}: the weights in {config.model} lack {len(lacking)} parameters of "
            f"{type(model).__name__}, such as {lacking[0]}, which would be random; use a complete "
            "checkpoint"
        )
    model = model.eval().requires_grad_(False)
    return model if config.device_map is not None else model.to(device), missing


def _random_model(kind: Any, config: TeacherConfig, options: dict[str, Any]) -> Any:
    """The model's architecture with random weights: a placebo for what it has learned.

    The seed is fixed, so that every process of an extraction reads with the same teacher.
    """
    from transformers import AutoConfig

    architecture = AutoConfig.from_pretrained(
        config.model, revision=config.revision, trust_remote_code=config.trust_remote_code
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = kind.from_config(architecture, **options)
    return model.eval().requires_grad_(False)


def load_teacher_tokenizer(name: str, config: TeacherConfig) -> Any:
    """The teacher's fast tokenizer; its offsets are whole ones.

    Raises:
        TeacherError: not found, or without character offsets.
    """
    from transformers import AutoTokenizer

    source = config.tokenizer or config.model
    is_own = config.tokenizer is None
    options: dict[str, Any] = {"gguf_file": config.gguf_file} if is_own and config.gguf_file else {}
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            source,
            revision=config.revision if is_own else None,
            trust_remote_code=config.trust_remote_code,
            **options,
        )
    except (OSError, ValueError, ImportError, KeyError) as error:
        raise _cannot_load(name, source, error) from error
    if not tokenizer.is_fast:
        raise TeacherError(
            f"teacher {name!r}: {type(tokenizer).__name__} has no character offsets, which "
            f"alignment needs; set teachers.{name}.tokenizer to one with a tokenizer.json"
        )
    report_whole_offsets(tokenizer)
    return tokenizer


def _cannot_load(name: str, source: str, error: Exception) -> TeacherError:
    """One line: transformers' messages are long, and their first sentences hold the cause."""
    cause = " ".join(str(error).split())[:300]
    return TeacherError(
        f"teacher {name!r}: cannot load {source!r}: {cause} (check the name and your access to "
        "it; without a network, run `kvdistill fetch` ahead of time)"
    )


@contextmanager
def _without_progress_bars() -> Iterator[None]:
    """Keep transformers' bar over the weights from overwriting bars that are already shown."""
    from transformers.utils import logging

    is_enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if is_enabled:
            logging.enable_progress_bar()


def weights_fingerprint(model: Any, excluded: Collection[str] = ()) -> str:
    """xxh3 over every parameter's name, dtype, shape and bytes, in order of names.

    ``excluded`` are parameters that the checkpoint lacks (a BERT without its pooler): they are
    random, and keys and values do not depend on them.
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
