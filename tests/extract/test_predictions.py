"""What a teacher thought of its text: its own loss, in chunks, stored beside keys and values."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

from kvdistill.attention import language_head
from kvdistill.config.experiment import Experiment
from kvdistill.corpus.readers import load_corpus
from kvdistill.errors import ConfigError, StoreMismatch, TeacherError
from kvdistill.extract.predictions import LOWEST, predictions
from kvdistill.extract.teacher import load_teacher
from kvdistill.extract.tokenise import collate_teacher_batch
from kvdistill.pipelines.extract import extract
from kvdistill.store.maintenance import verify_store
from kvdistill.store.reader import KVStore
from tests.attention import test_language_head
from tests.attention.families import ENCODER_DECODERS
from tests.attention.test_language_head import Largest
from tests.extract.models import save_teacher
from tests.extract.tokenizers_of_every_kind import unigram
from tests.pipelines.test_teachers import make

ROWS = "".join(
    f'{{"prompt": "What are {i} and {"one and " * (i % 3)}two?", "rationale": " 猫 {i}+2.", '
    f'"answer": " {i + 2}"}}\n'
    for i in range(5)
) + '{"text": "a"}\n{"text": ""}\n'  # fmt: skip
SEQ2SEQ = {name: ENCODER_DECODERS[name][1] | {"base": {}} for name in ("t5", "bart")}
FAMILIES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "llama": ({"tie_word_embeddings": False, "bos": True}, {}),
    "gemma2": ({"head_dim": 16, "final_logit_softcapping": 2.0}, {}),
    "gpt2": ({"n_embd": 32, "n_layer": 2, "n_head": 4, "base": {}}, {"template": "{text}"}),
    "t5": (SEQ2SEQ["t5"], {"stream": "decoder"}),
    "bart": (SEQ2SEQ["bart"], {"stream": "decoder"}),
}


def saved(folder: Path, family: str, **options: Any) -> dict[str, Any]:
    """Saves a tiny teacher with its head; its settings."""
    more, settings = FAMILIES[family]
    save_teacher(folder / "t", family, head=True, **more, **options)
    return settings


def reloaded(folder: Path) -> Any:
    """The model in a folder, by transformers alone."""
    is_pair = AutoConfig.from_pretrained(folder).is_encoder_decoder
    kind = AutoModelForSeq2SeqLM if is_pair else AutoModelForCausalLM
    return kind.from_pretrained(folder)


@torch.no_grad()
def own_loss(model: Any, ids: NDArray[np.int32], source: NDArray[np.int32] | None = None) -> float:
    """The model's loss on one text, or its decoder's on what follows a source."""
    ids_1T = torch.from_numpy(ids)[None].long()
    if source is None:
        return float(model(ids_1T, labels=ids_1T).loss)
    labels = torch.nn.functional.pad(ids_1T[:, 1:], (0, 1), value=-100)
    source_1T = torch.from_numpy(source)[None].long()
    return float(model(source_1T, decoder_input_ids=ids_1T, labels=labels).loss)


CASES: list[Any] = [*((family, "bytes") for family in FAMILIES), ("llama", "unigram")]
CASES += [pytest.param("t5", "unigram", marks=pytest.mark.slow)]


@pytest.mark.parametrize(("family", "kind"), CASES)
def test_the_nll_is_the_models_own_loss_padded_or_alone(
    family: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = saved(tmp_path, family)
    if kind == "unigram":
        unigram().save(str(tmp_path / "t/tokenizer.json"))
    experiment = make(tmp_path, settings, ROWS, confidence=True, logits=3)
    teacher = load_teacher("t", experiment)
    assert teacher.head is not None
    vocabulary = teacher.num_embeddings
    monkeypatch.setattr(language_head, "MAX_LOGITS", 4 * vocabulary)
    monkeypatch.setattr(test_language_head, "VOCABULARY", vocabulary)
    model = reloaded(tmp_path / "t")
    tokenised = teacher.tokenise(load_corpus(experiment.corpus).train)
    for rows in ([0, 1, 2, 3, 4, 5], [1], [4]):
        chosen = [i for i in rows if tokenised[i].num_tokens]
        batch = collate_teacher_batch(tokenised, chosen, 0, torch.device("cpu"))
        hidden = teacher.forward(batch)
        with Largest() as largest:
            found = predictions(teacher.head, hidden, batch, confidence=True, num_logits=3)
        assert largest.numel <= 4 * vocabulary
        nll = iter(found["nll"].split([n - 1 for n in batch.lengths]))
        wanted = {
            i: own_loss(model, tokenised[i].token_ids, tokenised[i].source_ids) for i in chosen
        }
        for i in chosen:
            mean = float(next(nll).mean())  # NaN, as the loss is, where one token is all
            assert mean == pytest.approx(wanted[i], abs=1e-4, nan_ok=True)
        assert sum(math.isfinite(loss) for loss in wanted.values()) >= min(len(rows), 5)


def only_shard(experiment: Experiment) -> tuple[KVStore, Any]:
    assert extract(experiment).complete
    store = KVStore.open(experiment.store)
    return store, store.read_shard("t", store.shard_ids[0])


@pytest.mark.parametrize("backend", ["zarr", "safetensors"])
def test_what_is_stored_is_the_distribution_that_predicted_a_token(
    tmp_path: Path, backend: str
) -> None:
    saved(tmp_path, "llama")
    store, shard = only_shard(
        make(tmp_path, {}, ROWS, confidence=True, logits=4, backend=backend, batch_tokens=40)
    )
    model = reloaded(tmp_path / "t")
    arrays, tokens = shard.arrays, shard.tokens
    first = tokens.sample_ptr[:-1][np.diff(tokens.sample_ptr) > 0]
    assert np.isnan(arrays["nll"][first]).all()
    assert (arrays["top_ids"][first] == -1).all()
    assert np.isnan(arrays["nll"]).sum() == np.isnan(arrays["rest_logprob"]).sum() == len(first)
    for i in range(tokens.num_samples):
        span = tokens.span(i)
        ids = torch.from_numpy(tokens.token_ids[span])[None].long()
        if ids.shape[1] < 2:
            continue
        with torch.no_grad():
            logprob = model(ids).logits[0, :-1].log_softmax(-1)
        own = {
            name: torch.from_numpy(arrays[name][span][1:]) for name in arrays if "key" not in name
        }
        close = {"atol": 1e-3, "rtol": 1e-3, "check_dtype": False}
        chosen = logprob.gather(1, ids[0, 1:, None])[:, 0]
        torch.testing.assert_close(own["nll"], -chosen, **close)
        entropy = torch.distributions.Categorical(logits=logprob).entropy()
        torch.testing.assert_close(own["entropy"], entropy, **close)
        torch.testing.assert_close(own["top_logprobs"], logprob.topk(4).values, **close)
        at = logprob.gather(1, own["top_ids"].long())
        torch.testing.assert_close(at, logprob.topk(4).values)
        mass = own["top_logprobs"].double().exp().sum(1) + own["rest_logprob"].double().exp()
        torch.testing.assert_close(mass, torch.ones_like(mass), atol=2e-3, rtol=0)
    assert verify_store(store) == []


def test_the_whole_vocabulary_leaves_no_mass_and_more_is_refused(tmp_path: Path) -> None:
    saved(tmp_path, "llama")
    vocabulary = load_teacher("t", make(tmp_path, {}, ROWS)).num_embeddings
    _, shard = only_shard(make(tmp_path, {}, ROWS, logits=vocabulary))
    assert "nll" not in shard.arrays
    assert np.nanmax(shard.arrays["rest_logprob"]) == LOWEST
    with pytest.raises(TeacherError, match=rf"its vocabulary has {vocabulary} tokens; set it"):
        load_teacher("t", make(tmp_path, {}, ROWS, logits=vocabulary + 1))


@pytest.mark.parametrize(
    ("family", "settings"),
    [("llama", {}), pytest.param("t5", {"weights": "random"}, marks=pytest.mark.slow)],
)
def test_keys_and_values_are_as_without(
    family: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    settings = saved(tmp_path, family) | settings
    plain, one = only_shard(make(tmp_path, settings, ROWS))
    (tmp_path / "store").rename(tmp_path / "plain")
    store, other = only_shard(make(tmp_path, settings, ROWS, confidence=True, logits=2))
    for name, array in one.arrays.items():
        np.testing.assert_array_equal(array, other.arrays[name])
    assert other.arrays.keys() - one.arrays.keys() == {
        "nll", "entropy", "top_ids", "top_logprobs", "rest_logprob"
    }  # fmt: skip
    ours, theirs = plain.teacher("t"), store.teacher("t")
    assert ours.weights_fingerprint == theirs.weights_fingerprint
    assert extract(make(tmp_path, settings, ROWS)).teachers[0].shards == 0  # what it asks is there
    (tmp_path / "store").rename(tmp_path / "more")
    (tmp_path / "plain").rename(tmp_path / "store")
    with pytest.raises(StoreMismatch, match="confidence: stored False, requested True; logits: "):
        extract(make(tmp_path, settings, ROWS, confidence=True, logits=2))


def test_the_head_belongs_to_what_was_extracted(tmp_path: Path) -> None:
    saved(tmp_path, "llama")
    wanted = make(tmp_path, {}, ROWS, confidence=True)
    stated = load_teacher("t", wanted).manifest
    weights = AutoModelForCausalLM.from_pretrained(tmp_path / "t")
    weights.lm_head.weight.data[0, 0] += 1
    weights.save_pretrained(tmp_path / "t")
    changed = load_teacher("t", wanted).manifest
    assert stated.weights_fingerprint == changed.weights_fingerprint
    assert stated.state_fingerprint != changed.state_fingerprint


@pytest.mark.parametrize(
    "family",
    ["bert", *(pytest.param(f"{x} of t5", marks=pytest.mark.slow) for x in ("encoder", "cross"))],
)
def test_an_encoder_has_none_which_is_said_and_no_difference(
    family: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings: dict[str, Any] = {}
    if family == "bert":
        save_teacher(tmp_path / "t", "bert", num_key_value_heads=4)
    else:
        saved(tmp_path, "t5")
        settings = {"stream": family.partition(" ")[0]}
    language_free = make(tmp_path, settings, ROWS, confidence=True, logits=2)
    with caplog.at_level(logging.WARNING):
        load_teacher.__globals__["output_head"].__globals__["log_once"].cache_clear()
        store, shard = only_shard(language_free)
    assert "teacher 't' is an encoder and predicts no text" in caplog.text
    assert not store.teacher("t").has_confidence
    assert not {"nll", "top_ids"} & shard.arrays.keys()
    assert extract(make(tmp_path, settings, ROWS)).complete


def test_a_generated_text_has_the_nll_of_what_was_generated(tmp_path: Path) -> None:
    saved(tmp_path, "llama", initializer_range=0.3)
    rows = "".join(ROWS.splitlines(keepends=True)[:5])
    written = {"generate": {"max_new_tokens": 8, "temperature": 1.0}}
    store, shard = only_shard(make(tmp_path, written, rows, confidence=True))
    assert store.teacher("t").own_text
    model = reloaded(tmp_path / "t")
    for i in range(5):
        span = shard.tokens.span(i)
        assert (shard.tokens.segment[span] == 2).any()
        found = shard.arrays["nll"][span][1:].astype(np.float32).mean()
        assert found == pytest.approx(own_loss(model, shard.tokens.token_ids[span]), abs=2e-3)


def test_in_windows_a_token_is_predicted_where_the_one_before_it_is_first_read(
    tmp_path: Path,
) -> None:
    saved(tmp_path, "llama")
    text = json.dumps({"text": "Natalia sold 48 clips in April, and half as many in May."}) + "\n"
    settings = {"max_length": 13, "long_text": "window", "window_overlap": 4, "importance": False}
    _, shard = only_shard(make(tmp_path, {}, text, confidence=True, **settings))
    ids, model = torch.from_numpy(shard.tokens.token_ids).long(), reloaded(tmp_path / "t")
    starts = [*range(0, len(ids) - 13, 8), len(ids) - 13]  # of 12 tokens each, after the first one
    assert len(starts) > 2
    wanted = []
    for token in range(1, len(ids)):
        start = next(s for s in starts if token - 1 < 1 + s + 12)
        context = torch.cat([ids[:1], ids[1 + start : token]])[None]
        with torch.no_grad():
            wanted.append(-float(model(context).logits[0, -1].log_softmax(0)[ids[token]]))
    np.testing.assert_allclose(shard.arrays["nll"][1:], wanted, rtol=2e-3)


def test_a_checkpoint_without_a_head_and_a_stored_eviction_are_refused(tmp_path: Path) -> None:
    save_teacher(tmp_path / "t", tie_word_embeddings=False)
    with pytest.raises(TeacherError, match=r"missing \(lm_head.weight\)"):
        load_teacher("t", make(tmp_path, {}, ROWS, confidence=True))
    with pytest.raises(ConfigError, match=r"teachers\.t\.eviction keeps other tokens"):
        make(tmp_path, {"eviction": {}}, ROWS, confidence=True)
