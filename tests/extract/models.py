"""Tiny random teachers, saved as ordinary folders, so that loading is tested too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    PreTrainedTokenizerFast,
)

TEXTS = [
    "Natalia sold clips to 48 of her friends in April, and then she sold half as many in May.",
    "Weng earns $12 an hour for babysitting. Yesterday she did 50 minutes: 12/60 = $0.2.",
    "How many clips did Natalia sell altogether? 48 + 24 = 72. Überraschung: 猫 and 🙂!",
]

BASE: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def tiny_model(model_type: str, seed: int = 0, head: bool = False, **options: Any) -> Any:
    """A random base model, or one with a language-model head, in eval mode."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(model_type, **options)
    kind = AutoModel
    if head:
        kind = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    model = kind.from_config(config, dtype=torch.float32).eval()
    return model.requires_grad_(False)


def tiny_tokenizer(vocab_size: int = 300, bos: bool = False) -> PreTrainedTokenizerFast:
    """Byte-level BPE with `<pad>` 0, `<s>` 1, `</s>` 2."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    if bos:
        from tokenizers.processors import TemplateProcessing

        tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


def save_teacher(folder: Path, model_type: str = "llama", **options: Any) -> Path:
    """A tiny teacher with its tokenizer, as a folder that `from_pretrained` reads."""
    tokenizer = tiny_tokenizer(bos=options.pop("bos", False))
    base = options.pop("base", BASE)
    model = tiny_model(
        model_type, options.pop("seed", 0), **{**base, **options, "vocab_size": len(tokenizer)}
    )
    transformers.utils.logging.set_verbosity_error()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
