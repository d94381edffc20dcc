"""Teachers that read parts of a corpus: what is stored, what it costs, and whom it teaches."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kvdistill.config.experiment import Experiment
from kvdistill.config.load import load_experiment
from kvdistill.corpus.readers import load_corpus
from kvdistill.distill.data.stream import Rank
from kvdistill.distill.train.set_up import Assembled, assemble
from kvdistill.errors import ConfigError
from kvdistill.pipelines.extract import extract
from kvdistill.pipelines.plan import estimate_extraction
from kvdistill.store.maintenance import verify_store
from kvdistill.store.reader import KVStore
from tests.pipelines.tiny import variant
from tests.slurm.experiment import CORPUS, write_experiment, write_models

ROWS = CORPUS.read_text(encoding="utf-8").splitlines()
CODE = [{"text": f"for i in range({i}):\n    print(i * {i + 3})\n" * 3} for i in range(16)]
FUSION = {"math": {"llama": 1}, "code": {"bert": 1}}


@pytest.fixture(scope="module")
def extracted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``llama`` reads maths alone; ``everything`` is the same model over the whole corpus."""
    folder = tmp_path_factory.mktemp("parts")
    write_models(folder / "models")
    path = write_experiment(folder, folder / "models")
    (folder / "math.jsonl").write_text("\n".join(ROWS[:16]) + "\n", encoding="utf-8")
    (folder / "code.jsonl").write_text("\n".join(map(json.dumps, CODE)) + "\n", encoding="utf-8")
    parts = {name: {"path": str(folder / f"{name}.jsonl")} for name in ("math", "code")}
    model = str(folder / "models/llama")
    experiment = variant(
        path, folder / "runs",
        corpus={"parts": parts, "shard_chars": 2500},
        teachers={
            "llama": {"model": model, "parts": ["math"]},
            "everything": {"model": model},
            "bert": {"model": str(folder / "models/bert"), "parts": ["code"]},
        },
        extraction__summaries=True,
    )  # fmt: skip
    path.write_text(json.dumps(experiment.model_dump(mode="json", exclude_defaults=True)))
    assert extract(experiment).complete
    return path


def lengths(store: KVStore, teacher: str) -> dict[str, int]:
    found = {}
    for shard_id in store.shard_ids:
        tokens = store.read_shard(teacher, shard_id).tokens
        found |= dict(zip(tokens.sample_ids, np.diff(tokens.sample_ptr).tolist(), strict=True))
    return found


def test_a_teacher_stores_its_parts_alone_and_these_as_ever(extracted: Path) -> None:
    experiment = load_experiment(extracted)
    store = KVStore.open(experiment.store)
    tasks = {s.sample_id: s.task for s in load_corpus(experiment.corpus).train}
    own, whole = lengths(store, "llama"), lengths(store, "everything")
    assert own == {name: n if tasks[name] == "math" else 0 for name, n in whole.items()}
    for shard_id in store.shard_ids:
        one, other = (store.read_shard(name, shard_id) for name in ("llama", "everything"))
        for i in range(one.tokens.num_samples):
            mine, theirs = one.tokens.span(i), other.tokens.span(i)
            if mine.start < mine.stop:
                assert (one.arrays["key"][:, :, mine] == other.arrays["key"][:, :, theirs]).all()
    assert not verify_store(store)
    assert store.statistics("llama")["key"].count == sum(
        int((store.read_shard("llama", i).tokens.segment >= 0).sum()) for i in store.shard_ids
    )


def test_the_plan_counts_what_is_read(extracted: Path) -> None:
    experiment = load_experiment(extracted)
    store = KVStore.open(experiment.store)
    for teacher in estimate_extraction(experiment).teachers:
        real = sum(lengths(store, teacher.teacher).values())
        assert teacher.tokens == pytest.approx(real, rel=0.02)
        folders = [store.paths.shard(teacher.teacher, shard_id) for shard_id in store.shard_ids]
        files = [f for folder in folders for f in folder.rglob("*") if f.is_file()]
        size = sum(f.stat().st_size for f in files)
        assert teacher.gigabytes["int8"] == pytest.approx(size / 1e9, rel=0.25)  # tiny shards


def test_a_part_that_the_corpus_lacks_is_refused(extracted: Path, tmp_path: Path) -> None:
    body = {"model": str(extracted.parent / "models/llama"), "parts": ["poems"]}
    experiment = variant(extracted, tmp_path, teachers={"llama": body})
    with pytest.raises(ConfigError, match=r"no text of the corpus has task 'poems'.*'code', 'math"):
        extract(experiment)


def assembled(experiment: Experiment) -> Assembled:
    torch.manual_seed(0)
    store, splits = KVStore.open(experiment.store), load_corpus(experiment.corpus)
    return assemble(experiment, store, splits.train, Rank())


def teachers(extracted: Path, *names: str) -> dict[str, Any]:
    body = json.loads(extracted.read_text(encoding="utf-8"))["teachers"]
    return {name: body[name] for name in names}


BALANCES = [{"balance": {"method": m}} for m in ("explained", "gradnorm", "pcgrad")]


@pytest.mark.parametrize("fusion", [{}, {"by_task": FUSION}, *BALANCES], ids=str)
def test_outside_its_parts_a_teacher_changes_nothing(
    fusion: dict[str, Any], extracted: Path, tmp_path: Path
) -> None:
    both, alone = (
        assembled(variant(extracted, tmp_path, teachers=teachers(extracted, *names), **settings))
        for names, settings in ((("bert", "llama"), {"fusion": fusion}), (("bert",), {}))
    )
    heads = alone.distiller.heads.state_dict()
    both.distiller.heads.load_state_dict(heads, strict=False)
    both.distiller.student.load_state_dict(alone.distiller.student.state_dict())
    seen = 0
    for one, other in zip(both.stream, alone.stream, strict=True):
        code = one["task"] == 1  # tasks are numbered by name
        if code.all():
            losses = [run.distiller.train()(x)["loss"] for run, x in ((both, one), (alone, other))]
            assert torch.equal(*losses)
            students = [list(run.distiller.student.parameters()) for run in (both, alone)]
            for pair in zip(*map(torch.autograd.grad, losses, students), strict=True):
                assert torch.equal(*pair)
            seen += 1
        covered = one["teachers"]["llama"]["covered"]
        assert not covered[code].any()
        assert covered[~code].any(1).all()
    assert seen


def test_a_text_is_taught_by_the_teachers_of_its_task(extracted: Path, tmp_path: Path) -> None:
    by_task = {"math": {"everything": 1, "llama": 3}, "code": {"bert": 1}}
    run = assembled(variant(extracted, tmp_path, fusion={"by_task": by_task}))
    for batch in run.stream:
        alpha = run.distiller.weigh(batch, None).alpha()[:, :, 0].amax(-1)  # [N, B]
        for task, row in zip(batch["task"].tolist(), alpha.T.tolist(), strict=True):
            assert row == ([0.75, 0.25, 0] if task == 2 else [0, 0, 1])
