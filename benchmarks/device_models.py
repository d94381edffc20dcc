"""Models, texts and stores of real sizes from nothing: what ``benchmarks/device.py`` works on.

Weights and codes are random, which does not affect cost. Nothing is downloaded.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final


@dataclass(frozen=True)
class Shape:
    """The sizes of a decoder."""

    model_type: str
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    tied: bool = True

    @property
    def architecture(self) -> dict[str, Any]:
        """As a transformers config takes it."""
        return {
            "model_type": self.model_type,
            "num_hidden_layers": self.layers,
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "vocab_size": self.vocabulary,
            "tie_word_embeddings": self.tied,
            "max_position_embeddings": 4096,
        }

    @property
    def matrix_parameters(self) -> int:
        """Weights that every token is multiplied with, the head apart."""
        attention = self.hidden * self.head_dim * 2 * (self.heads + self.kv_heads)
        return self.layers * (attention + 3 * self.hidden * self.intermediate)

    def forward_flops(self, lengths: Sequence[int], *, head: bool) -> float:
        """Of one pass over texts of these lengths: products with weights, and causal attention."""
        weights = self.matrix_parameters + head * self.hidden * self.vocabulary
        attention = 2 * self.layers * self.heads * self.head_dim * sum(n * n for n in lengths)
        return float(2 * weights * sum(lengths) + attention)

    def kv_elements(self) -> int:
        """Elements of keys and values of one token."""
        return 2 * self.layers * self.kv_heads * self.head_dim


SHAPES: Final = {
    "Qwen2.5-7B": Shape("qwen2", 28, 3584, 18944, 28, 4, 128, 152_064, tied=False),
    "Llama-3.2-1B": Shape("llama", 16, 2048, 8192, 32, 8, 64, 128_256),
    "Qwen2.5-0.5B": Shape("qwen2", 24, 896, 4864, 14, 2, 64, 151_936),
    "SmolLM2-135M": Shape("llama", 30, 576, 1536, 9, 3, 64, 49_152),
}
TINY: Final = {
    "Qwen2.5-7B": Shape("qwen2", 3, 48, 64, 6, 2, 8, 1024, tied=False),
    "Llama-3.2-1B": Shape("llama", 2, 32, 64, 4, 2, 8, 1024),
    "Qwen2.5-0.5B": Shape("qwen2", 2, 32, 48, 2, 1, 16, 1024),
    "SmolLM2-135M": Shape("llama", 3, 24, 32, 3, 1, 8, 1024),
}


def make_words() -> list[str]:
    """Words of a language of 700."""
    draw = random.Random(0)
    letters = "abcdefghijklmnopqrstuvwxyz"
    return ["".join(draw.choices(letters, k=draw.randint(2, 7))) for _ in range(700)]


def write_corpus(path: Path, num_texts: int, num_words: int) -> None:
    """Texts of ``num_words`` words each, a token or a little more per word; a prompt and an answer.

    Lengths differ by up to a tenth.
    """
    draw, words = random.Random(1), make_words()
    rows = []
    for i in range(num_texts):
        text = draw.choices(words, k=num_words - draw.randrange(num_words // 10 + 1))
        cut = len(text) // 2
        parts = {"prompt": " ".join(text[:cut]), "answer": " " + " ".join(text[cut:])}
        rows.append(json.dumps({"id": f"s{i}", **parts}) + "\n")
    path.write_text("".join(rows), encoding="utf-8")


def write_tokenizer(folder: Path) -> None:
    """A byte-level tokenizer trained on the words, of less than 1,024 tokens."""
    from kvdistill.distill.student.build import train_tokenizer

    text = " ".join(make_words())
    train_tokenizer([text, f" {text}"] * 3, 1000).save_pretrained(folder)


def write_model(folder: Path, shape: Shape, tokenizer: Path, *, weights: bool) -> None:
    """A teacher's folder: tokenizer, config and, if ``weights``, random weights in float32."""
    import shutil

    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    shutil.copytree(tokenizer, folder, dirs_exist_ok=True)
    config = AutoConfig.for_model(**shape.architecture)
    if weights:
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    else:
        config.save_pretrained(folder)


MANIFEST: Final[dict[str, Any]] = {
    "revision": None, "model_type": "llama", "kind": "decoder", "weights_fingerprint": "0",
    "tokenizer_fingerprint": "0", "template": None, "extraction_fingerprint": "0", "versions": {},
    "dtype": "bfloat16", "attn_implementation": "sdpa", "backend": "zarr",
    "codec": {"key": "int8", "value": "int8"}, "position_encoding": "none", "hidden_size": 8,
    "adapter": "benchmark", "adapter_error": 0.0,
}  # fmt: skip


def write_store(
    folder: Path, corpus: Path, teachers: Mapping[str, Shape], shard_chars: int
) -> None:
    """A store of random int8 codes of these teachers, for the texts of a corpus."""
    from kvdistill.config.corpus import CorpusConfig
    from kvdistill.corpus.readers import load_corpus
    from kvdistill.corpus.samples import cut_into_shards
    from kvdistill.store.manifest import TeacherManifest
    from kvdistill.store.writer import add_teacher, create, publish_shard

    samples = load_corpus(CorpusConfig(path=corpus, shard_chars=shard_chars)).train
    shards = list(cut_into_shards(samples, shard_chars))
    store = create(folder, shards)
    for number, (name, shape) in enumerate(teachers.items()):
        group = {
            "layers": list(range(shape.layers)), "num_key_value_heads": shape.kv_heads,
            "key_head_dim": shape.head_dim, "value_head_dim": shape.head_dim,
        }  # fmt: skip
        body = {**MANIFEST, "name": name, "model": name, "groups": [group]}
        add_teacher(store, TeacherManifest.model_validate(body))
        codes = _RandomCodes(shape, max(len(s.text) for s in samples), 4.0 + 0.3 * number)
        for shard in shards:
            publish_shard(store, name, shard.shard_id, *codes.shard(shard.samples))


class _RandomCodes:
    """One teacher's codes of a long text, of which every sample takes its first tokens."""

    def __init__(self, shape: Shape, num_chars: int, chars_per_token: float) -> None:
        import torch

        from kvdistill.store.channel_statistics import ChannelStatistics
        from kvdistill.store.codecs import CODECS
        from kvdistill.store.codecs.parts import part_name
        from kvdistill.types import KINDS

        self.chars_per_token = chars_per_token
        generator = torch.Generator().manual_seed(0)
        size = (shape.layers, shape.kv_heads, int(num_chars / chars_per_token) + 2, shape.head_dim)
        x, codec = torch.randn(size, generator=generator), CODECS["int8"]
        self.parts = {
            part_name(kind, part.suffix): (part.per, codec.encode(x, kind)[part.suffix].numpy())
            for kind in KINDS
            for part in codec.parts(kind)
        }
        tokens = x.double().numpy()
        mean = tokens.mean(axis=2)
        m2 = ((tokens - mean[:, :, None]) ** 2).sum(axis=2)
        self.statistics = dict.fromkeys(KINDS, ChannelStatistics(size[2], mean, m2))

    def shard(self, samples: Sequence[Any]) -> tuple[Any, dict[str, Any]]:
        """An encoded shard and its statistics."""
        import numpy as np

        from kvdistill.store.shard import EncodedShard, TokenTable
        from kvdistill.types import SEGMENT_IDS

        tables, lengths = [], []
        for sample in samples:
            count = int(len(sample.text) / self.chars_per_token)
            edges = (np.arange(count + 1) * self.chars_per_token).astype(np.int32)
            in_prompt = edges[:-1] < len(dict(sample.segments)["prompt"])
            segment = np.where(in_prompt, SEGMENT_IDS["prompt"], SEGMENT_IDS["answer"])
            tables.append((edges[:-1], edges[1:], segment.astype(np.int8)))
            lengths.append(count)
        start, end, segment = (np.concatenate(column) for column in zip(*tables, strict=True))
        blocks = {"token": lengths, "block": [-(-n // 64) for n in lengths]}
        arrays = {
            name: np.concatenate([codes[:, :, :n] for n in blocks[per]], axis=2)
            for name, (per, codes) in self.parts.items()
        }
        ptr = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        table = TokenTable((), ptr, start, start, end, segment)
        ids = tuple(sample.sample_id for sample in samples)
        return EncodedShard(replace(table, sample_ids=ids), arrays), self.statistics
