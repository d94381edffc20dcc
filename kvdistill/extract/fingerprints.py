"""What a teacher's weights and tokenizer are, independently of where they were loaded from."""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from typing import Any

import torch
import xxhash


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
