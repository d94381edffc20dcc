"""Maps that are fitted before step 1: what they explain, with which memory, saved and resumed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from kvdistill.config.experiment import Experiment
from kvdistill.corpus.readers import load_corpus
from kvdistill.distill.data.stream import Rank
from kvdistill.distill.train import pilot
from kvdistill.distill.train.checkpoint import load_weights, save_weights
from kvdistill.distill.train.set_up import Assembled, assemble
from kvdistill.pipelines.run_folder import begin
from kvdistill.pipelines.train import build_trainer, train
from kvdistill.store.reader import KVStore
from tests.pipelines.rank_worker import StopAt
from tests.pipelines.tiny import variant

SCRATCH = {"projection__init": "ridge"}


def pretrained(extracted: Path, folder: Path, **changes: Any) -> Experiment:
    """The student starts as the teacher ``llama``."""
    model = str(extracted.parent / "models/llama")
    return variant(extracted, folder, student={"model": model}, **changes)


def assembled(experiment: Experiment, **options: Any) -> Assembled:
    torch.manual_seed(0)
    store, splits = KVStore.open(experiment.store), load_corpus(experiment.corpus)
    return assemble(experiment, store, splits.train, Rank(), **options)


def parts(run: Assembled) -> dict[str, float]:
    output = run.distiller.eval()(next(iter(run.stream)))
    return {name: float(value.detach()) for name, value in output["parts"].items()}


def test_a_pretrained_student_starts_with_fitted_heads(extracted: Path, tmp_path: Path) -> None:
    experiment = pretrained(extracted, tmp_path, fusion__weights={"llama": 1, "bert": 0})
    run = assembled(experiment)
    assert run.explained["llama"].keys() == {"key", "value"}
    for layers in run.explained["llama"].values():  # the teacher is the student itself
        assert len(layers) == 3
        assert all(share > 0.98 for share in layers)
    for layers in run.explained["bert"].values():
        assert all(-0.2 < share < 0.9 for share in layers)
    fitted = parts(run)
    random = parts(assembled(experiment.model_copy(update={
        "projection": experiment.projection.model_copy(update={"init": "grouped_mean"})
    })))  # fmt: skip
    for kind in ("key", "value"):
        assert fitted[kind] < 0.03
        assert random[kind] > 0.7
    assert fitted["cross_entropy"] == random["cross_entropy"]


def test_a_pretrained_student_starts_with_a_fitted_shared_space(
    extracted: Path, tmp_path: Path
) -> None:
    changes = {"projection__mode": "shared_space", "losses__round_trip": 1.0}
    changes |= {"fusion__weights": {"llama": 1, "bert": 0}}
    run, random = (
        assembled(pretrained(extracted, tmp_path, **changes, **init))
        for init in ({}, {"projection__init": "grouped_mean"})
    )
    for layers in run.explained["llama"].values():  # the teacher is the student itself
        assert all(share > 0.98 for share in layers)
    fitted, unfitted = parts(run), parts(random)
    assert fitted["round_trip"] < 1e-9  # the space is wider than both models
    for kind in ("key", "value"):
        assert fitted[kind] < 0.03
        assert unfitted[kind] > 0.2


def test_heads_read_the_student_standardised(extracted: Path, tmp_path: Path) -> None:
    distiller = (run := assembled(pretrained(extracted, tmp_path))).distiller
    found: dict[str, list[torch.Tensor]] = {"key": [], "value": []}
    for _, batch in zip(range(20), run.stream, strict=False):
        output = distiller.run_student(batch)
        mask = batch["teachers"]["llama"]["covered"]
        for kind, rows in found.items():
            x = distiller.regressed(output, kind).detach()
            rows.append(x.permute(0, 3, 1, 2, 4)[mask])
    for rows in found.values():
        joined = torch.cat(rows)
        assert float(joined.mean(0).abs().max()) < 0.2
        assert float((joined.std(0) - 1).abs().max()) < 0.2


def test_a_student_from_scratch_is_fitted_on_request_alone(extracted: Path, tmp_path: Path) -> None:
    plain = assembled(variant(extracted, tmp_path))
    assert not plain.explained
    assert not any("standardise_student" in name for name in plain.distiller.state_dict())
    fitted = assembled(variant(extracted, tmp_path, **SCRATCH))
    assert all(0 < share < 1 for layers in fitted.explained["llama"].values() for share in layers)
    assert parts(fitted)["key"] < parts(plain)["key"]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"losses__inject": 0.5, "losses__cosine": 0.1},
        {"projection__mode": "frozen", "projection__init": "pca"},
        {"projection__mode": "joint", "projection__method": "full"},
        {"projection__mode": "shared_space", "losses__round_trip": 1.0},
    ],
    ids=["heads", "heads and projectors", "pca", "joint", "shared space"],
)
def test_chunks_of_layers_change_nothing(
    changes: dict[str, Any], extracted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    experiment = pretrained(extracted, tmp_path, projection__pilot_batches=2, **changes)
    passes: list[int] = []
    measure = pilot._measure

    def counted(distiller: Any, batches: Any, fits: Any) -> Any:
        passes.append(sum(pilot.PilotMoments.size_bytes(*fit.widths) for fit in fits))
        return measure(distiller, batches, fits)

    monkeypatch.setattr(pilot, "_measure", counted)
    whole = assembled(experiment)
    monkeypatch.setattr(pilot, "MOMENT_BYTES", bound := 3 * max(passes) // 7)
    passes.clear()
    parted = assembled(experiment)
    assert len(passes) >= 3
    assert max(passes) <= bound
    assert parted.explained == whole.explained
    for (name, one), other in zip(
        whole.distiller.state_dict().items(), parted.distiller.state_dict().values(), strict=True
    ):
        assert torch.equal(one, other), name


def test_the_batches_of_a_pilot_do_not_matter(extracted: Path, tmp_path: Path) -> None:
    one, two = (
        assembled(pretrained(extracted, tmp_path, training__batch_size=size)) for size in (2, 7)
    )
    for teacher, kinds in one.explained.items():
        for kind, shares in kinds.items():
            assert two.explained[teacher][kind] == pytest.approx(shares, abs=1e-4)
    for name, weight in one.distiller.state_dict().items():
        close = {"rtol": 1e-3, "atol": 1e-3}
        torch.testing.assert_close(two.distiller.state_dict()[name], weight, **close)


def test_a_checkpoint_holds_what_was_fitted(extracted: Path, tmp_path: Path) -> None:
    experiment = pretrained(extracted, tmp_path)
    first = assembled(experiment)
    save_weights(first.distiller, first.tokenizer, tmp_path / "saved")
    saved = load_file(tmp_path / "saved/projectors.safetensors")
    assert "standardise_student.key.mean_LHD" in saved
    resumed = assembled(experiment, resuming=True)
    assert not resumed.explained
    assert parts(resumed)["key"] != parts(first)["key"]
    load_weights(resumed.distiller, tmp_path / "saved")
    assert parts(resumed) == parts(first)


def test_a_resumed_run_ends_as_one_without_a_break(extracted: Path, tmp_path: Path) -> None:
    whole = pretrained(extracted, tmp_path / "whole")
    train(whole)
    broken = pretrained(extracted, tmp_path / "broken")
    folder = begin(broken)
    stopped = build_trainer(broken, KVStore.open(broken.store), load_corpus(broken.corpus), folder)
    stopped.add_callback(StopAt(2))
    stopped.train()
    explained = folder.read_record()["explained_at_start"]
    assert train(broken).resumed
    for name in ("student/model.safetensors", "checkpoint-6/projectors.safetensors"):
        one = load_file(tmp_path / "whole" / whole.name / name)
        two = load_file(tmp_path / "broken" / broken.name / name)
        assert all(torch.equal(one[key], two[key]) for key in one)
    record = folder.read_record()
    assert record["finished"]
    assert record["explained_at_start"] == explained
    log = folder.human_log.read_text(encoding="utf-8")
    assert log.count("llama: variance of keys explained before step 1") == 1


def test_a_pilot_of_few_texts_holds_none_out(extracted: Path, tmp_path: Path) -> None:
    run = assembled(pretrained(extracted, tmp_path))
    few = pilot.Pilot(run.stream.source, run.stream.collate, num_texts=3, batch_size=8)
    found = pilot.fit_projections(run.distiller, few, "ridge")
    assert found["llama"]["key"] == [None] * 3
    assert not pilot.explained_lines(found)


@pytest.mark.gpu
def test_a_pilot_runs_where_the_student_trains(extracted: Path, tmp_path: Path) -> None:
    experiment = pretrained(extracted, tmp_path, alignment__layers="cka")
    torch.cuda.reset_peak_memory_stats()
    there, here = (assembled(experiment, device=device) for device in ("cuda", "cpu"))
    assert torch.cuda.max_memory_allocated() > 0
    assert {parameter.device.type for parameter in there.distiller.parameters()} == {"cpu"}
    for teacher, kinds in here.explained.items():
        for kind, shares in kinds.items():
            assert there.explained[teacher][kind] == pytest.approx(shares, abs=1e-3)
