"""From stored logits to a student's loss: the same vocabulary, another one, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from kvdistill.corpus.readers import read_files
from kvdistill.distill.student.build import train_tokenizer
from kvdistill.errors import ConfigError
from kvdistill.pipelines.extract import extract
from kvdistill.pipelines.train import train
from kvdistill.studies.report.reading import read_run
from tests.pipelines.test_parts import assembled
from tests.pipelines.tiny import variant
from tests.slurm.experiment import CORPUS, write_experiment, write_models

NO_KV = {"losses__key": 0, "losses__value": 0, "losses__logits": 1.0}


@pytest.fixture(scope="module")
def extracted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``llama``, its ``other`` with random weights of its own and more words, and ``bert``."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("logits")
    write_models(folder / "models")
    torch.manual_seed(1)
    config = LlamaConfig.from_pretrained(folder / "models/llama", vocab_size=600)
    LlamaForCausalLM(config).save_pretrained(folder / "models/other")
    texts = [sample.text for sample in read_files(CORPUS, limit=20)]
    train_tokenizer(texts, 600).save_pretrained(str(folder / "models/other"))
    path = write_experiment(folder, folder / "models")
    models = {n: {"model": str(folder / "models" / n)} for n in ("llama", "other", "bert")}
    models["llama"]["template"] = "<|endoftext|>{text}"  # which the student's tokens begin with
    experiment = variant(
        path, folder / "runs", corpus__max_samples=12, extraction__logits=8,
        teachers=models,
    )  # fmt: skip
    path.write_text(json.dumps(experiment.model_dump(mode="json", exclude_defaults=True)))
    assert extract(experiment).complete
    return path


def with_teachers(extracted: Path, folder: Path, *names: str, **changes: Any) -> Any:
    body = json.loads(extracted.read_text(encoding="utf-8"))["teachers"]
    return variant(extracted, folder, teachers={n: body[n] for n in names}, **NO_KV | changes)


def test_a_teacher_has_nothing_to_teach_itself(extracted: Path, tmp_path: Path) -> None:
    student = {"model": str(extracted.parent / "models/llama")}
    batches, found = {}, {}
    for name in ("llama", "other"):
        run = assembled(with_teachers(extracted, tmp_path, name, student=student))
        run.distiller.eval()
        batches[name] = next(iter(run.stream))
        parts = run.distiller(batches[name])["parts"]
        assert set(parts) == {"cross_entropy", "logits"}
        found[name] = float(parts["logits"].detach())
    assert abs(found["llama"]) < 1e-6  # float16
    assert found["other"] > 5e-5
    text, predicted = (
        int(batches[name]["teachers"][name]["predictions"]["mask"].sum()) / int(x.sum())
        for name, x in ((n, b["text_mask"]) for n, b in batches.items())
    )
    assert text == pytest.approx(1, abs=0.02)
    assert 0.5 < predicted < 1


def test_a_step_may_be_cut_anywhere(extracted: Path, tmp_path: Path) -> None:
    run = assembled(with_teachers(extracted, tmp_path, "llama", "other", "bert"))
    distiller = run.distiller.eval()
    batches = list(run.stream)[:3]
    counts = [distiller.count(batch) for batch in batches]
    total = {name: torch.stack([c[name] for c in counts]).sum() for name in counts[0]}
    assert total["num_predictions"] > 0
    shares = [distiller(batch, total)["parts"]["logits"] for batch in batches]
    means = [distiller(batch)["parts"]["logits"] for batch in batches]
    wanted = sum(m * c["num_predictions"] for m, c in zip(means, counts, strict=True))
    torch.testing.assert_close(sum(shares), wanted / total["num_predictions"])


def test_a_store_of_more_predictions_serves_fewer(extracted: Path, tmp_path: Path) -> None:
    found = []
    for k in (8, 2):
        run = assembled(with_teachers(extracted, tmp_path, "llama", extraction__logits=k))
        found.append(next(iter(run.stream))["teachers"]["llama"]["predictions"])
    more, fewer = found
    assert torch.equal(fewer["ids"], more["ids"][..., :2])
    assert torch.equal(fewer["logprob"], more["logprob"][..., :2])
    mask = more["mask"]
    others = torch.logaddexp(more["rest"], more["logprob"][..., 2:].logsumexp(-1))
    torch.testing.assert_close(fewer["rest"][mask], others[mask])


def test_a_student_learns_what_its_teacher_predicted(extracted: Path, tmp_path: Path) -> None:
    experiment = with_teachers(
        extracted, tmp_path, "llama", losses__cross_entropy=0, training__max_steps=30,
        training__learning_rate=0.01, training__log_steps=1,
    )  # fmt: skip
    curve = read_run(train(experiment).folder).curve("loss_logits")[1]
    assert sum(curve[-3:]) < 0.5 * sum(curve[:3])


def test_another_texts_predictions_teach_less(extracted: Path, tmp_path: Path) -> None:
    student = {"model": str(extracted.parent / "models/llama")}
    found = []
    for method in ("none", "shuffled"):
        run = assembled(
            with_teachers(extracted, tmp_path, "llama", student=student, placebo={"method": method})
        )
        found.append(run.distiller.eval()(next(iter(run.stream)))["parts"]["logits"])
    assert found[1] > 10 * found[0]


def test_what_cannot_be_is_refused(extracted: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no teacher predicts text"):
        assembled(with_teachers(extracted, tmp_path, "bert"))
    for changes, line in (
        ({"extraction__logits": 0}, "reads predictions that extraction must store"),
        ({"placebo": {"method": "noise"}}, "replaces no predictions"),
        ({"latent": {}, "alignment__time": "latent"}, "losses.logits is undefined on latent"),
    ):
        with pytest.raises(ConfigError, match=line):
            with_teachers(extracted, tmp_path, "llama", **changes)


def test_another_tokenizer_than_the_stores_is_refused(extracted: Path, tmp_path: Path) -> None:
    experiment = with_teachers(extracted, tmp_path, "llama", "other")
    changed = shutil.copytree(extracted.parent / "models/llama", tmp_path / "llama")
    shutil.copy(extracted.parent / "models/other/tokenizer.json", changed)
    teachers = experiment.teachers
    teachers["llama"] = teachers["llama"].model_copy(update={"model": str(changed)})
    with pytest.raises(ConfigError, match="tokenizer of teacher 'llama' is not the one"):
        assembled(experiment)
