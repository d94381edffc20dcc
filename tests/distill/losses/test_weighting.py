"""From errors per token to a loss: reduction, weights, annealing."""

from __future__ import annotations

import pytest
import torch

from kvdistill.config.distill import LossConfig
from kvdistill.distill.losses.weighting import (
    annealed_scale,
    reduce_tokens,
    sum_served,
    weighted_sum,
)


def test_reduction_does_not_depend_on_the_cut():
    torch.manual_seed(0)
    losses, mask = torch.rand(6, 7), torch.rand(6, 7) < 0.5
    whole = reduce_tokens(losses, mask)
    torch.testing.assert_close(whole, losses[mask].mean())
    count = mask.sum()
    parts = sum(reduce_tokens(losses[i:j], mask[i:j], count) for i, j in [(0, 1), (1, 4), (4, 6)])
    torch.testing.assert_close(parts, whole)


def test_reduction_of_nothing_is_zero_and_masked_nan_is_not_read():
    nothing = torch.zeros(2, 3, dtype=torch.bool)
    assert float(reduce_tokens(torch.full((2, 3), float("nan")), nothing)) == 0.0
    assert float(reduce_tokens(torch.ones(2, 3), nothing, num_valid=8)) == 0.0


def test_only_losses_against_teachers_are_annealed_and_counted_as_kv():
    """A router's entropy and the shared space's round trip compare the student with no teacher."""
    annealed = {
        "key": 2, "value": 3, "cosine": 4, "attention_kl": 5, "relation": 6, "codi": 7, "logits": 8,
        "hidden": 9,
    }  # fmt: skip
    constant = {
        "cross_entropy": 5, "rationale": 8, "inject": 7, "entropy": 9, "round_trip": 10,
        "router_aux": 11,
    }  # fmt: skip
    parts = {name: torch.tensor(1.0) for name in annealed | constant}
    loss, kv = weighted_sum(parts, LossConfig.model_validate(annealed | constant), 0.5)
    assert float(kv) == 0.5 * sum(annealed.values())
    assert float(loss) == sum(constant.values()) + 0.5 * sum(annealed.values())
    assert {*annealed, *constant} == LossConfig().weights().keys()


def test_without_teachers_the_kv_share_is_zero():
    loss, kv = weighted_sum(
        {"cross_entropy": torch.tensor(2.0)}, LossConfig(cross_entropy=3.0), 1.0
    )
    assert (float(loss), float(kv)) == (6.0, 0.0)


def test_a_weight_of_zero_is_a_mask():
    errors = torch.tensor([[[1.0, torch.nan], [3.0, 4.0]]], requires_grad=True)
    weight = torch.tensor([[[0.5, 0.0], [0.0, 2.0]]])
    total = sum_served(errors, weight)
    total.backward()
    assert float(total.detach()) == 8.5
    assert torch.equal(errors.grad, weight)


def test_weights_are_kept_where_nothing_is_annealed():
    assert [annealed_scale(step, 10, None) for step in (0, 5, 10)] == [1, 1, 1]


@pytest.mark.parametrize(
    ("anneal_by", "expected"),
    [(1.0, [1, 0.75, 0.5, 0.25, 0]), (0.5, [1, 0.5, 0, 0, 0]), (0.25, [1, 0, 0, 0, 0])],
)
def test_weights_fall_linearly_to_zero_by_the_share_of_steps(anneal_by, expected):
    scales = [annealed_scale(step, 8, anneal_by) for step in (0, 2, 4, 6, 8)]
    assert scales == pytest.approx(expected)
