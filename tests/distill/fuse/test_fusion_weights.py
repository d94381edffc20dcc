"""Teachers with student layers of their own: who counts where, and what is refused."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kvdistill.config.distill import FusionConfig
from kvdistill.distill.fuse.fusion_weights import FusionWeights
from kvdistill.errors import ConfigError

LAYERS = 3


def weights(**settings: Any) -> FusionWeights:
    teachers: Any = [SimpleNamespace(name=name) for name in ("one", "two")]
    return FusionWeights(FusionConfig.model_validate(settings), teachers, 8, LAYERS, 0)


def batch(covered: Any = ((True, True), (True, True))) -> dict[str, Any]:
    mask = torch.tensor(covered)[:, None]
    return {"teachers": {n: {"covered": mask[i]} for i, n in enumerate(("one", "two"))}}


def test_a_layer_with_one_teacher_is_its_own_and_a_shared_one_is_shared() -> None:
    fixed = weights(weights={"one": 3, "two": 1}, layers={"two": [2]})
    alpha, _ = fixed(batch(), None)
    assert alpha[0, 0, :, 0].tolist() == [1.0, 1.0, 0.75]
    assert alpha[1, 0, :, 0].tolist() == [0.0, 0.0, 0.25]


def test_where_a_layers_only_teacher_covers_nothing_there_is_no_weight() -> None:
    alpha, _ = weights(layers={"one": [0, 1], "two": [2]})(
        batch(((True, False), (True, True))), None
    )
    assert alpha.sum(0)[0].tolist() == [[1.0, 0.0], [1.0, 0.0], [1.0, 1.0]]


def test_a_router_chooses_among_a_layers_teachers_alone() -> None:
    routed = weights(method="mlp", layers={"two": [0]})
    inputs = batch() | {"query_mask": torch.ones(1, 2, dtype=torch.bool)}
    alpha, _ = routed(inputs, torch.randn(1, 2, 8))
    assert (alpha[1, :, 1:] == 0).all()
    assert torch.allclose(alpha.sum(0), torch.ones(()))


@pytest.mark.parametrize("layers", [{"nobody": [0]}, {"one": [3]}])
def test_an_unknown_teacher_or_layer_is_refused(layers: dict[str, list[int]]) -> None:
    with pytest.raises(ConfigError, match="count from 0 to 2"):
        weights(layers=layers)
