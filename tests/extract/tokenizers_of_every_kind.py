"""One small tokenizer of every kind, saved as a folder that ``AutoTokenizer`` reads."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from kvdistill.distill.student.build import character_tokenizer, train_tokenizer

TEXTS = [
    "def f(x):\n        return x\n\n\tif  a:\n    pass\n",
    "  lead 猫が🙂é\r\nx  ﬁn ㎏ e\u0301 中文",
    "the man said   hello\n\n\nÜberraschung: 👨\u200d👩\u200d👧!",
]
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def byte_level(post: Any, prefix: bool = False, normalizer: Any = None) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    if post is not None:
        tokenizer.post_processor = post
    return tokenizer


def metaspace_bpe() -> Tokenizer:
    """Llama's first: spaces become ▁, one is prepended, unknown characters fall back to bytes."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    steps = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    tokenizer.normalizer = normalizers.Sequence(steps)
    trainer = trainers.BpeTrainer(
        vocab_size=330, special_tokens=SPECIAL + BYTES, limit_alphabet=20, show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


def unigram(normalizer: Any = None) -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    trainer = trainers.UnigramTrainer(
        vocab_size=110, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    body = json.loads(tokenizer.to_str())
    body["model"]["vocab"] += [[byte, -20.0] for byte in BYTES]
    body["model"]["byte_fallback"] = True
    return Tokenizer.from_str(json.dumps(body))


def word_piece() -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(vocab_size=120, special_tokens=SPECIAL, show_progress=False)
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.post_processor = processors.BertProcessing(("</s>", 2), ("<s>", 1))
    return tokenizer


def _gpt2(trim: bool, prefix: bool = False) -> Tokenizer:
    return byte_level(processors.ByteLevel(trim_offsets=trim), prefix)


def _sequence() -> Tokenizer:
    bos = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    return byte_level(processors.Sequence([processors.ByteLevel(trim_offsets=True), bos]))


def _roberta() -> Tokenizer:
    post = processors.RobertaProcessing(("</s>", 2), ("<s>", 1), trim_offsets=True)
    return byte_level(post, prefix=True)


BYTE_LEVEL: dict[str, Callable[[], Any]] = {
    "byte-level": lambda: _gpt2(trim=False),
    "byte-level, trimmed": lambda: _gpt2(trim=True),
    "byte-level, prefix space": lambda: _gpt2(trim=False, prefix=True),
    "byte-level, prefix space, trimmed": lambda: _gpt2(trim=True, prefix=True),
    "byte-level, NFC, trimmed": lambda: byte_level(
        processors.ByteLevel(trim_offsets=True), normalizer=normalizers.NFC()
    ),
    "Llama 3's": _sequence,
    "RoBERTa's": _roberta,
    "this package's": lambda: train_tokenizer(TEXTS, 300),
}
EVERY_KIND: dict[str, Callable[[], Any]] = {
    **BYTE_LEVEL,
    "metaspace BPE": metaspace_bpe,
    "unigram": unigram,
    "unigram, NFKC": lambda: unigram(normalizers.NFKC()),
    "unigram, NFD": lambda: unigram(normalizers.NFD()),
    "WordPiece": word_piece,
    "characters": lambda: character_tokenizer(TEXTS),
}


def save_tokenizer(folder: Path, kind: str) -> Path:
    """Save the tokenizer of this kind; ``<s>`` and ``</s>`` are its BOS and EOS."""
    tokenizer = EVERY_KIND[kind]()
    if isinstance(tokenizer, Tokenizer):
        names = ("pad_token", "bos_token", "eos_token", "unk_token")
        special: dict[str, Any] = dict(zip(names, SPECIAL, strict=True))
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
    tokenizer.save_pretrained(folder)
    return folder
