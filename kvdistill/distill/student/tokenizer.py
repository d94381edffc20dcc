"""The student's tokenizer: loading one, or training one on a corpus.

Alignment needs character offsets, so only fast tokenizers will do.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final

from kvdistill.errors import StudentError

END_OF_TEXT: Final = "<|endoftext|>"


def load_student_tokenizer(name: str, trust_remote_code: bool = False) -> Any:
    """Load a fast tokenizer from a folder or hub id.

    Raises:
        StudentError: not found, or a tokenizer without character offsets.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
    except Exception as error:  # transformers raises OSError, ValueError, KeyError and more
        first_line = str(error).strip().split("\n")[0]
        raise StudentError(f"cannot load the tokenizer {name!r}: {first_line}") from error
    if not tokenizer.is_fast:
        raise StudentError(
            f"the tokenizer {name!r} ({type(tokenizer).__name__}) gives no character offsets, "
            f"which alignment needs; use a fast tokenizer (one with a tokenizer.json)"
        )
    return tokenizer


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Any:
    """Train a byte-level BPE tokenizer; every text round-trips and has exact offsets.

    Returns:
        A ``PreTrainedTokenizerFast`` whose BOS, EOS and padding token is ``<|endoftext|>``.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
    )


def character_tokenizer(texts: Iterable[str]) -> Any:
    """One token per character that occurs, for small formal languages.

    Returns:
        A ``PreTrainedTokenizerFast`` with BOS, EOS, padding and unknown tokens of its own.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = {f"{name}_token": f"<{name}>" for name in ("pad", "bos", "eos", "unk")}
    characters = sorted({character for text in texts for character in text})
    vocab = {token: i for i, token in enumerate([*special.values(), *characters])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token=special["unk_token"]))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
