"""Tokenizers, and rules about token ids and offsets that teachers and the student share."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from typing import Any

from kvdistill.attention.model_folder import loading_fault
from kvdistill.errors import KVDistillError


def load_fast_tokenizer(
    source: str, refused: Callable[[str], KVDistillError], **options: Any
) -> Any:
    """Load a fast tokenizer from a folder or hub id; its offsets are whole ones.

    Args:
        source: where it is.
        refused: makes the error to raise, of what is wrong: it cannot be loaded, or is not fast.
        **options: passed on to ``from_pretrained``.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
    except Exception as error:  # of any library or of the tokenizer's own code
        fault = loading_fault(source, error, "tokenizer.json")
        raise refused(f"cannot load the tokenizer {source!r}: {fault}") from error
    if not tokenizer.is_fast:
        raise refused(
            f"the tokenizer {source!r} ({type(tokenizer).__name__}) gives no character offsets, "
            "which alignment needs; use a fast tokenizer (one with a tokenizer.json)"
        )
    report_whole_offsets(tokenizer)
    return tokenizer


def report_whole_offsets(tokenizer: Any) -> None:
    """Make a fast tokenizer count the white space inside a token to that token.

    Byte-level post-processors trim offsets unless told otherwise (RoBERTa's, and often GPT-2's and
    Llama 3's). A token of white space alone, such as the indentation of code, then stands for no
    character, and nothing aligns with it. Only offsets change, never token ids.
    """
    post_processor = tokenizer.backend_tokenizer.post_processor
    if post_processor is None:
        return
    state = json.loads(
        post_processor.__getstate__(),
        object_hook=lambda o: {**o, "trim_offsets": False} if o.get("trim_offsets") is True else o,
    )
    post_processor.__setstate__(json.dumps(state).encode())
    tokenizer.backend_tokenizer.post_processor = post_processor


def with_ends(
    tokenizer: Any, ids: Sequence[int], *, bos: bool = True, eos: bool = True
) -> tuple[list[int], int]:
    """``BOS ids EOS``, where the tokenizer has them and ``ids`` do not begin or end so already.

    Returns:
        The token ids, and how many were added in front (0 or 1).
    """
    first, last = tokenizer.bos_token_id, tokenizer.eos_token_id
    before = [first] if bos and first is not None and list(ids[:1]) != [first] else []
    after = [last] if eos and last is not None and list(ids[-1:]) != [last] else []
    return [*before, *ids, *after], len(before)


def padding_id(tokenizer: Any, num_embeddings: int) -> int:
    """The padding token, or 0 where there is none with an embedding: padding is masked anyway."""
    pad_id: int | None = tokenizer.pad_token_id
    return pad_id if pad_id is not None and pad_id < num_embeddings else 0


def num_token_ids(tokenizer: Any) -> int:
    """One more than the largest token id; more than ``len(tokenizer)`` where ids have gaps."""
    return max(tokenizer.get_vocab().values(), default=-1) + 1


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """SHA-256 over a fast tokenizer's whole definition: vocabulary, merges, rules."""
    return hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest()
