"""Fusion weights: teachers with student layers of their own, and weights by similarity."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kvdistill.config.distill import FusionConfig
from kvdistill.distill.fuse.fusion_weights import FusionWeights, similarity_weights
from kvdistill.errors import ConfigError

LAYERS = 3


def weights(**settings: Any) -> FusionWeights:
    teachers: Any = [SimpleNamespace(name=name) for name in ("one", "two")]
    config = FusionConfig.model_validate(settings)
    return FusionWeights(config, teachers, 8, LAYERS, {"math": 1, "zh": 2})


def batch(covered: Any = ((True, True), (True, True))) -> dict[str, Any]:
    mask = torch.tensor(covered)[:, None]
    return {"teachers": {n: {"covered": mask[i]} for i, n in enumerate(("one", "two"))}}


def test_a_layer_with_one_teacher_is_its_own_and_a_shared_one_is_shared() -> None:
    fixed = weights(weights={"one": 3, "two": 1}, layers={"two": [2]})
    alpha = fixed(batch(), None).alpha()
    assert alpha[0, 0, :, 0].tolist() == [1.0, 1.0, 0.75]
    assert alpha[1, 0, :, 0].tolist() == [0.0, 0.0, 0.25]


def test_where_a_layers_only_teacher_covers_nothing_there_is_no_weight() -> None:
    fixed = weights(layers={"one": [0, 1], "two": [2]})
    alpha = fixed(batch(((True, False), (True, True))), None).alpha()
    assert alpha.sum(0)[0].tolist() == [[1.0, 0.0], [1.0, 0.0], [1.0, 1.0]]


def test_a_router_chooses_among_a_layers_teachers_alone() -> None:
    routed = weights(method="mlp", layers={"two": [0]})
    inputs = batch() | {"query_mask": torch.ones(1, 2, dtype=torch.bool)}
    alpha = routed(inputs, torch.randn(1, 2, 8)).alpha()
    assert (alpha[1, :, 1:] == 0).all()
    assert torch.allclose(alpha.sum(0), torch.ones(()))


def test_served_pairs_are_counted_before_the_step_and_dropout_changes_none() -> None:
    covers = batch(((True, False), (True, True)))
    assert {k: int(v) for k, v in weights(layers={"two": [2]}).count(covers).items()} == {
        "num_served": 4, "num_contested": 1,
    }  # fmt: skip
    dropping = weights(layers={"two": [2]}, teacher_dropout=0.9).train()
    assert all(float(dropping(covers, None).alpha().sum()) == 4 for _ in range(20))
    assert int(weights(weights={"one": 1, "two": 0}).count(covers)["num_served"]) == 3


def test_a_subset_of_teachers_shares_the_weights_alone() -> None:
    mixture = weights(layers={"one": [0, 1]})(batch(), None)
    assert mixture.alpha([0])[:, 0, :, 0].tolist() == [[1, 1, 0], [0, 0, 0]]
    assert mixture.alpha()[:, 0, :, 0].tolist() == [[0.5, 0.5, 0], [0.5, 0.5, 1]]


def test_every_task_has_weights_of_its_own_and_other_texts_the_usual_ones() -> None:
    given = {"math": {"one": 1}, "zh": {"one": 1, "two": 3}}
    routed = weights(by_task=given, weights={"one": 3, "two": 2})
    everything = {"covered": torch.ones(3, 1, dtype=torch.bool)}
    inputs: dict[str, Any] = {"teachers": {"one": everything, "two": everything}}
    inputs["task"] = torch.tensor([1, 2, 0])
    alpha = routed(inputs, None).alpha()
    torch.testing.assert_close(alpha[0, :, 0, 0], torch.tensor([1.0, 0.25, 0.6]))
    torch.testing.assert_close(alpha.sum(0), torch.ones(3, LAYERS, 1))
    counts = routed.count(inputs)
    assert int(counts["num_contested"]) == 2 * LAYERS


def test_a_text_whose_only_teacher_does_not_cover_it_has_no_weight() -> None:
    routed = weights(by_task={"math": {"one": 1}})
    inputs = batch(((True, False), (True, True))) | {"task": torch.tensor([1])}
    assert routed(inputs, None).alpha()[:, 0, 0].tolist() == [[1, 0], [0, 0]]
    assert int(routed.count(inputs)["num_served"]) == LAYERS


@pytest.mark.parametrize("settings", [{"weights": {"one": 3, "two": 1}}, {"method": "mlp"}])
def test_a_text_that_names_its_teacher_has_no_other(settings: dict[str, Any]) -> None:
    everything = {"covered": torch.ones(4, 1, dtype=torch.bool)}
    inputs: dict[str, Any] = {"teachers": {"one": everything, "two": everything}}
    inputs |= {"query_mask": torch.ones(4, 1, dtype=torch.bool)}
    hidden = torch.randn(4, 1, 8)
    free = weights(**settings)
    plain = free(inputs, hidden).alpha()[:, 3, 0, 0].tolist()
    inputs["teacher"] = torch.tensor([1, 2, -1, 0])
    alpha = free(inputs, hidden).alpha()[:, :, 0, 0]
    assert alpha.T.tolist() == [[1, 0], [0, 1], [0, 0], plain]


def test_a_task_that_no_text_has_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"no text of the corpus has task 'code'.*'math', 'zh'"):
        weights(by_task={"code": {"one": 1}})


@pytest.mark.parametrize("layers", [{"nobody": [0]}, {"one": [3]}])
def test_an_unknown_teacher_or_layer_is_refused(layers: dict[str, list[int]]) -> None:
    with pytest.raises(ConfigError, match="count from 0 to 2"):
        weights(layers=layers)


def similarity_of(query, prototype, similarity):
    if similarity == "l2":
        return -math.dist(query, prototype)
    dot = sum(a * b for a, b in zip(query, prototype, strict=True))
    return dot if similarity == "dot" else dot / (math.hypot(*query) * math.hypot(*prototype))


@pytest.mark.parametrize("similarity", ["cosine", "dot", "l2"])
@pytest.mark.parametrize("temperature", [0.3, 2.0])
def test_similarity_weights_against_the_definition(similarity, temperature):
    torch.manual_seed(0)
    queries = [torch.randn(4, 3), torch.randn(4, 5), torch.randn(4, 3)]
    prototypes = [torch.randn(2, 3), torch.randn(1, 5), torch.randn(4, 3)]
    alpha = similarity_weights(queries, prototypes, similarity, temperature)
    assert alpha.shape == (3, 4, 1, 1)
    for b in range(4):
        scores = [
            math.exp(
                max(similarity_of(q[b].tolist(), p.tolist(), similarity) for p in ps) / temperature
            )
            for q, ps in zip(queries, prototypes, strict=True)
        ]
        expected = torch.tensor(scores) / sum(scores)
        torch.testing.assert_close(alpha[:, b, 0, 0], expected)


def test_a_text_at_one_teachers_prototype_gets_that_teacher():
    prototypes = torch.eye(3).unsqueeze(1).unbind()
    alpha = similarity_weights([torch.eye(3)] * 3, prototypes, "cosine", 0.01)
    torch.testing.assert_close(alpha[:, :, 0, 0], torch.eye(3))
