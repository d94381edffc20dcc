"""The store of teachers of every kind: streams, templates, hidden states, importance."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from kvdistill.config.experiment import Experiment
from kvdistill.config.load import parse_experiment
from kvdistill.errors import ConfigError, ShardNotFound, TeacherError
from kvdistill.extract.extract_shard import cue
from kvdistill.extract.teacher import load_teacher
from kvdistill.pipelines.extract import extract
from kvdistill.store.prototypes import teacher_prototypes
from kvdistill.store.reader import KVStore
from tests.attention.families import ENCODER_DECODERS
from tests.extract.models import save_teacher

CORPUS = (
    '{"prompt": "Two and two?", "rationale": "2+2=4.", "answer": "4"}\n'
    '{"prompt": "Three and four make how much?", "rationale": "It is 3+4=7.", "answer": "7"}\n'
)
PLAIN = '{"text": "Natalia sold clips to 48 of her friends."}\n'


def make(
    folder: Path, teacher: dict[str, Any], text: str = CORPUS, **extraction: Any
) -> Experiment:
    (folder / "corpus.jsonl").write_text(text, encoding="utf-8")
    return parse_experiment(
        {
            "store": str(folder / "store"),
            "corpus": {"path": str(folder / "corpus.jsonl")},
            "teachers": {"t": {"model": str(folder / "t"), **teacher}},
            "extraction": {"device": "cpu", **extraction},
            "student": {"model": str(folder / "student")},
        }
    )


def only_shard(experiment: Experiment) -> tuple[KVStore, Any]:
    assert extract(experiment).complete
    store = KVStore.open(experiment.store)
    return store, store.read_shard("t", store.shard_ids[0])


@pytest.mark.parametrize("text", [CORPUS, PLAIN], ids=["segments", "plain"])
@pytest.mark.parametrize("stream", ["encoder", "decoder", "cross"])
@pytest.mark.parametrize("family", ["t5", "bart"])
def test_streams(tmp_path: Path, family: str, stream: str, text: str) -> None:
    model_type, options = ENCODER_DECODERS[family]
    save_teacher(tmp_path / "t", model_type, **options, base={})
    experiment = make(tmp_path, {"stream": stream}, text)
    store, shard = only_shard(experiment)
    manifest = store.teacher("t")
    layers = 3 if stream == "encoder" else 2
    assert (manifest.kind, manifest.stream) == ("encoder_decoder", stream)
    assert shard.arrays["key"].shape[0] == layers
    assert manifest.has_importance == (stream != "cross")
    (first, *_) = store.samples(store.shard_ids[0])
    span = shard.tokens.span(0)
    starts, ends = shard.tokens.char_start[span], shard.tokens.char_end[span]
    covered = [first.text[start:end] for start, end in zip(starts, ends, strict=True)]
    whole = stream != "decoder" or text == PLAIN
    assert "".join(covered) == (first.text if whole else "\n2+2=4.\n4")
    assert (shard.tokens.segment[0] == -1) == (stream == "decoder")


def test_a_decoder_stream_depends_on_what_its_encoder_reads(tmp_path: Path) -> None:
    model_type, options = ENCODER_DECODERS["bart"]
    save_teacher(tmp_path / "t", model_type, **options, base={})
    _, one = only_shard(make(tmp_path, {"stream": "decoder"}))
    (tmp_path / "store").rename(tmp_path / "first")
    _, other = only_shard(
        make(tmp_path, {"stream": "decoder"}, CORPUS.replace("Two and two?", "One and three?"))
    )
    assert one.tokens.token_ids.tolist() == other.tokens.token_ids.tolist()
    own, theirs = one.arrays["value_scale"], other.arrays["value_scale"]
    span = one.tokens.span(0)
    np.testing.assert_array_equal(own[0], theirs[0])  # the first layer has read no source yet
    assert (own[1, :, span] != theirs[1, :, span]).any()
    np.testing.assert_array_equal(own[1, :, span.stop :], theirs[1, :, span.stop :])


def test_an_encoder_decoder_needs_a_stream(tmp_path: Path) -> None:
    model_type, options = ENCODER_DECODERS["bart"]
    save_teacher(tmp_path / "t", model_type, **options, base={})
    with pytest.raises(TeacherError, match=r"'t': .* set its `stream` to one of encoder, decoder"):
        extract(make(tmp_path, {}))
    with pytest.raises(TeacherError, match="does not apply to stream cross"):
        extract(make(tmp_path, {"stream": "cross"}, hidden_at_cue=True))


def test_only_an_encoder_decoder_has_streams(tmp_path: Path) -> None:
    save_teacher(tmp_path / "t")
    with pytest.raises(TeacherError, match="has one stream"):
        extract(make(tmp_path, {"stream": "encoder"}))


def test_a_prompt_template_makes_another_teacher(tmp_path: Path) -> None:
    save_teacher(tmp_path / "t")
    template = "Q: {prompt}\nA: {rationale:strip}{answer}"
    store, shard = only_shard(make(tmp_path, {"template": template}))
    assert store.teacher("t").template == template
    special = shard.tokens.segment == -1
    assert special[:2].all()
    text = "".join(s.text for s in store.samples(store.shard_ids[0]))
    assert (shard.tokens.char_end - shard.tokens.char_start).sum() == len(text) - 2  # two strips
    assert (shard.arrays["key"][:, :, special] != 0).any()


def test_gemma_gets_its_bos(tmp_path: Path) -> None:
    save_teacher(tmp_path / "t", "gemma", head_dim=16)
    _, shard = only_shard(make(tmp_path, {}))
    assert shard.tokens.token_ids[shard.tokens.sample_ptr[:-1]].tolist() == [1, 1]


def test_hidden_states_at_the_cue_and_summaries(tmp_path: Path) -> None:
    save_teacher(tmp_path / "t")
    experiment = make(tmp_path, {}, hidden_at_cue=True, summaries=True, batch_tokens=1000)
    _, shard = only_shard(experiment)
    teacher = load_teacher("t", experiment)
    for i in range(2):
        span = shard.tokens.span(i)
        ids = torch.from_numpy(shard.tokens.token_ids[span].astype(np.int64))[None]
        with torch.no_grad():
            output = teacher.model(input_ids=ids, output_hidden_states=True)
        position = cue(shard.tokens.segment[span])
        assert shard.tokens.segment[span][position + 1] == 3
        own = torch.stack([hidden[0, position] for hidden in output.hidden_states]).numpy()
        np.testing.assert_allclose(shard.arrays["hidden_at_cue"][:, i], own, rtol=1e-4, atol=1e-5)
        last = output.last_hidden_state[0]
        mean, first = shard.arrays["hidden_summary"][:, i]
        np.testing.assert_allclose(mean, last.mean(0), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(first, last[0], rtol=1e-4, atol=1e-5)


def test_prototypes_are_made_of_all_shards(tmp_path: Path) -> None:
    save_teacher(tmp_path / "t")
    whole = make(tmp_path, {}, summaries=True, prototypes=2)
    store, shard = only_shard(whole)
    assert store.paths.prototypes("t").is_file()
    found = teacher_prototypes(store, "t", 2)
    mean, first = shard.arrays["hidden_summary"]
    np.testing.assert_allclose(found["mean"], mean.mean(0), atol=1e-6)
    np.testing.assert_allclose(found["cls"], first.mean(0), atol=1e-6)
    assert found["kmeans"].shape == (2, 32)


def test_no_prototypes_without_summaries(tmp_path: Path) -> None:
    save_teacher(tmp_path / "t")
    store, _ = only_shard(make(tmp_path, {}))
    with pytest.raises(ShardNotFound, match="has no hidden summaries"):
        teacher_prototypes(store, "t", 2)


def test_importance_is_the_attention_of_the_answer(tmp_path: Path) -> None:
    """With one query head per key head: the model's own attention, renormalised."""
    save_teacher(tmp_path / "t", num_key_value_heads=4, attn_implementation="eager")
    experiment = make(tmp_path, {"attn_implementation": "eager"})
    _, shard = only_shard(experiment)
    teacher = load_teacher("t", experiment)
    span = shard.tokens.span(0)
    ids = torch.from_numpy(shard.tokens.token_ids[span].astype(np.int64))[None]
    with torch.no_grad():
        attentions = teacher.model(input_ids=ids, output_attentions=True).attentions
    segment = shard.tokens.segment[span]
    answer, rationale = np.flatnonzero(segment == 3), np.flatnonzero(segment == 2)
    for layer, attention in enumerate(attentions):
        part = attention[0][:, answer][:, :, rationale]
        own = (part / part.sum(-1, keepdim=True)).mean(1)
        stored = shard.arrays["importance"][layer][:, span]
        np.testing.assert_allclose(stored[:, rationale], own, rtol=2e-3, atol=1e-4)


def test_importance_can_be_left_out(tmp_path: Path) -> None:
    save_teacher(tmp_path / "t")
    _, shard = only_shard(make(tmp_path, {}, importance=False))
    assert "importance" not in shard.arrays


@pytest.mark.parametrize(
    ("model_type", "options", "longest"),
    [
        ("roberta", {"max_position_embeddings": 24, "pad_token_id": 1}, 22),
        ("bert", {"max_position_embeddings": 24}, 24),
        ("gpt2", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 24, "base": {}}, 24),
        ("opt", {"max_position_embeddings": 24, "word_embed_proj_dim": 32, "ffn_dim": 48}, 24),
        ("t5", {**ENCODER_DECODERS["t5"][1], "base": {}}, None),
    ],
)
def test_a_text_may_fill_every_position(
    tmp_path: Path, model_type: str, options: dict[str, Any], longest: int | None
) -> None:
    save_teacher(tmp_path / "t", model_type, **options)
    teacher = {"stream": "encoder"} if model_type == "t5" else {}
    text = PLAIN.replace("friends", "friends in April, and half as many in May")
    experiment = make(tmp_path, teacher, text, long_text="truncate")
    assert load_teacher("t", experiment).max_length == longest
    _, shard = only_shard(experiment)
    assert shard.tokens.num_tokens == (longest or shard.tokens.num_tokens)


@pytest.mark.parametrize(
    ("teacher", "message"),
    [
        ({"chat": True, "template": "{text}"}, "not both"),
        ({"system": "Be brief."}, "needs `chat: true`"),
        ({"stream": "decoder", "template": "{text}"}, "takes neither `template` nor `chat`"),
    ],
)
def test_prompt_templates_that_contradict(
    tmp_path: Path, teacher: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        make(tmp_path, teacher)


def test_weights_that_are_not_there_are_not_invented(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    save_teacher(tmp_path / "t")
    path = tmp_path / "t" / "model.safetensors"
    weights = load_file(path)
    del weights["layers.1.self_attn.k_proj.weight"]
    save_file(weights, path, {"format": "pt"})
    with pytest.raises(TeacherError, match=r"1 param.* missing .*layers\.1\.self_attn\.k_proj"):
        extract(make(tmp_path, {}))


def add_tokens(folder: Path, *, extra: int) -> None:
    """``extra`` ordinary tokens and a padding token, all beyond the model's embeddings."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([f"extra{i}" for i in range(extra)])
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(folder)


@pytest.mark.parametrize(
    "teacher", [{}, {"generate": {"max_new_tokens": 4}}], ids=["read", "write"]
)
def test_padding_needs_no_embedding(tmp_path: Path, teacher: dict[str, Any]) -> None:
    save_teacher(tmp_path / "t", head=True, tie_word_embeddings=False)
    _, shard = only_shard(make(tmp_path, teacher))
    assert len(set(np.diff(shard.tokens.sample_ptr))) > 1
    add_tokens(tmp_path / "t", extra=2)
    (tmp_path / "store").rename(tmp_path / "before")
    _, padded = only_shard(make(tmp_path, teacher))
    np.testing.assert_array_equal(padded.tokens.token_ids, shard.tokens.token_ids)
    np.testing.assert_array_equal(padded.arrays["key"], shard.arrays["key"])


def test_a_token_without_an_embedding_is_named_before_the_first_batch(tmp_path: Path) -> None:
    save_teacher(tmp_path / "t")
    add_tokens(tmp_path / "t", extra=2)
    text = '{"text": "Two."}\n{"text": "and extra1."}\n'
    message = r"sample '00000001' contains the token 'extra1' .* set teachers\.t\.tokenizer"
    with pytest.raises(TeacherError, match=message):
        extract(make(tmp_path, {}, text))
