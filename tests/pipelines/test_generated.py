"""Teachers that write their own rationales."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kvdistill.corpus.readers import load_corpus
from kvdistill.corpus.samples import Sample
from kvdistill.errors import ConfigError, TeacherError
from kvdistill.extract.generate import GumbelNoise, generate_rationales
from kvdistill.extract.teacher import load_teacher
from kvdistill.pipelines.extract import extract
from kvdistill.store.reader import KVStore
from tests.extract.models import save_teacher
from tests.pipelines.test_teachers import PLAIN, make

ROWS = "".join(
    f'{{"prompt": "What are {i} and {"one and " * (i % 3)}two?", "rationale": "Gold.", '
    f'"answer": "{i + 2}"}}\n'
    for i in range(6)
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_teacher(tmp_path / "t", head=True, tie_word_embeddings=False, initializer_range=0.3)
    return tmp_path


def written(folder: Path, name: str, teacher: dict[str, Any], **extraction: Any) -> list[str]:
    generate = {"max_new_tokens": 12, "temperature": 1.0, **teacher.pop("generate", {})}
    experiment = make(folder, {"generate": generate, **teacher}, ROWS, **extraction)
    experiment = experiment.model_copy(update={"store": folder / name})
    assert extract(experiment).complete
    store = KVStore.open(experiment.store)
    shard = store.read_shard("t", store.shard_ids[0])
    assert shard.texts is not None
    for i, (own, corpus) in enumerate(zip(shard.texts, store.samples("00000"), strict=True)):
        assert (own.sample_id, own.segments[0]) == (corpus.sample_id, corpus.segments[0])
        assert own.segments[2] == corpus.segments[2]
        span = shard.tokens.span(i)
        assert shard.tokens.char_end[span].max() == len(own.text)
        rationale = shard.tokens.segment[span] == 2
        assert rationale.any() == bool(dict(own.segments)["rationale"])
    return [dict(own.segments)["rationale"] for own in shard.texts]


def test_a_rationale_depends_on_seed_and_draw_and_not_on_the_batch(folder: Path) -> None:
    first = written(folder, "a", {})
    assert len(set(first)) == 6
    assert "Gold." not in "".join(first)
    assert written(folder, "b", {}, batch_tokens=1) == first
    assert written(folder, "c", {"generate": {"draw": 1}}) != first
    assert written(folder, "d", {"generate": {"seed": 1}}) != first


@pytest.mark.parametrize("positions", [24, 128], ids=["the model's positions", "max_length"])
@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_a_bound_budget_is_each_prompts_own(
    tmp_path: Path, model_type: str, positions: int
) -> None:
    options: dict[str, Any] = {"max_position_embeddings": positions}
    if model_type == "gpt2":
        options = {"n_positions": positions, "n_embd": 32, "n_layer": 2, "n_head": 4, "base": {}}
    save_teacher(tmp_path / "t", model_type, head=True, tie_word_embeddings=False, **options)
    config = {"max_new_tokens": 40, "temperature": 1.0}
    experiment = make(tmp_path, {"generate": config}, ROWS, max_length=24)
    teacher = load_teacher("t", experiment)
    samples = load_corpus(experiment.corpus).train
    assert teacher.generate is not None
    together, alone, pairs = (
        generate_rationales(teacher, samples, teacher.generate, batch_tokens=n)
        for n in (10_000, 1, 140)
    )
    assert together == alone == pairs
    lengths = [
        s.num_tokens for s in teacher.tokenise([Sample("a", s.segments[:1]) for s in samples])
    ]
    budgets = [24 - length for length in lengths]
    assert len(set(budgets)) > 1
    assert min(budgets) < 0 < max(budgets)
    for sample, budget in zip(together, budgets, strict=True):
        text = dict(sample.segments)["rationale"]
        assert bool(text) == (budget > 0)


def test_a_template_keeps_its_own_end_token_before_the_rationale(folder: Path) -> None:
    template = "{prompt}</s>{rationale}{answer}"
    teacher = load_teacher("t", make(folder, {"template": template, "generate": {}}, ROWS))
    seen: list[int] = []
    teacher.causal_lm.register_forward_pre_hook(
        lambda _module, _args, kwargs: seen.extend(kwargs["input_ids"][0].tolist()),
        with_kwargs=True,
    )
    assert teacher.generate is not None
    sample = Sample("a", (("prompt", "Two?"), ("rationale", ""), ("answer", "4")))
    generate_rationales(teacher, [sample], teacher.generate, batch_tokens=64)
    assert seen[: seen.index(2) + 1] == [*teacher.tokenizer("Two?").input_ids, 2]


def test_without_temperature_it_is_the_likeliest_continuation(folder: Path) -> None:
    greedy = written(folder, "a", {"generate": {"temperature": 0.0}})
    assert written(folder, "b", {"generate": {"temperature": 0.0, "draw": 1}}) == greedy
    experiment = make(folder, {"generate": {"max_new_tokens": 12}}, ROWS)
    teacher = load_teacher("t", experiment)
    prompt = "What are 0 and two?"
    ids = teacher.tokenizer(prompt, return_tensors="pt").input_ids
    for _ in range(12):
        with torch.no_grad():
            following = teacher.causal_lm(ids).logits[:, -1].argmax(-1, keepdim=True)
        ids = torch.cat([ids, following], dim=1)
    text = teacher.tokenizer.decode(ids[0], skip_special_tokens=True)[len(prompt) :]
    assert greedy[0].strip() == text.strip()


def test_stops_and_templates(folder: Path) -> None:
    free = written(folder, "a", {"generate": {"temperature": 0.0}})
    stop = free[0].strip()[2]
    cut = written(folder, "b", {"generate": {"temperature": 0.0, "stop": [stop]}})
    assert cut[0].strip() == free[0].strip().partition(stop)[0].rstrip()
    template = "Q: {prompt} A: {rationale:lstrip}{answer}"
    other = written(folder, "c", {"template": template, "generate": {"temperature": 0.0}})
    assert other != free


def test_a_prompt_that_fills_the_positions_is_not_continued(folder: Path) -> None:
    experiment = make(folder, {"generate": {}}, ROWS, max_length=20, long_text="skip")
    (report,) = extract(experiment).teachers
    assert report.skipped > 0


def test_gumbel_noise_draws_from_the_softmax() -> None:
    logits = torch.tensor([0.0, 1.0, 2.0, float("-inf")]).log_softmax(0)
    noise = GumbelNoise(range(4000))
    drawn = noise(torch.zeros(4000, 1), logits.expand(4000, 4)).argmax(1)
    share = np.bincount(drawn.numpy(), minlength=4) / 4000
    np.testing.assert_allclose(share, logits.exp(), atol=0.03)


def test_what_cannot_be_continued(folder: Path) -> None:
    with pytest.raises(TeacherError, match="has no prompt to continue"):
        extract(make(folder, {"generate": {}}, PLAIN))
    (folder / "store").rename(folder / "plain")
    with pytest.raises(TeacherError, match="to generate"):
        extract(make(folder, {"generate": {}, "template": "{prompt}{answer}"}, ROWS))
    with pytest.raises(ConfigError, match="does not go with `stream`"):
        make(folder, {"generate": {}, "stream": "encoder"})


def test_a_teacher_without_a_head_cannot_write(tmp_path: Path) -> None:
    save_teacher(tmp_path / "t", tie_word_embeddings=False)
    with pytest.raises(TeacherError, match="lm_head"):
        extract(make(tmp_path, {"generate": {}}, ROWS))
