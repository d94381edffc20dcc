"""Steps that are no number end a run; steps unlike the others are named."""

from __future__ import annotations

import logging
import math

import pytest
import torch
from torch import Tensor

from kvdistill.distill.train.guards import MIN_STEPS, StepGuard
from kvdistill.errors import NonFiniteError


def alone(value: Tensor) -> Tensor:
    return value


NORM = torch.tensor(1.0)


def parts(loss: float, key: float = 1.0) -> dict[str, Tensor]:
    return {"loss": torch.tensor(loss), "key": torch.tensor(key)}


def feed(guard: StepGuard, *losses: float) -> list[bool]:
    found = []
    for step, loss in enumerate(losses, 1):
        guard.record([f"s{step}"], parts(loss))
        found.append(guard.check(step, NORM, alone).spike)
    return found


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_part_that_is_no_number_is_named_with_its_samples_and_step(value: float) -> None:
    guard = StepGuard("run-1", 5.0)
    guard.record(["good-1", "good-2"], parts(1.0))
    guard.record(["bad-1", "bad-2"], parts(2.0, value))
    with pytest.raises(NonFiniteError) as caught:
        guard.check(7, NORM, alone)
    message = str(caught.value)
    for words in ("run-1", "step 7", "key", "bad-1, bad-2"):
        assert words in message
    assert "good-1" not in message
    assert "loss," not in message  # only the part that is broken


def test_a_gradient_that_is_no_number_names_all_samples_of_the_step() -> None:
    guard = StepGuard("run", 5.0)
    guard.record(["a"], parts(1.0))
    guard.record(["b"], parts(1.0))
    with pytest.raises(NonFiniteError, match=r"gradient .* samples a, b"):
        guard.check(1, torch.tensor(math.nan), alone)
    guard.record(["a"], parts(1.0))
    report = guard.check(
        1, torch.tensor(math.inf), alone, may_overflow=True
    )  # the scaler's business
    assert report.grad_norm == math.inf


def test_a_long_batch_is_not_listed_to_the_end() -> None:
    guard = StepGuard("run", 5.0)
    guard.record([f"s{i}" for i in range(100)], parts(math.nan))
    with pytest.raises(NonFiniteError, match=r"s7 and 92 more\. "):
        guard.check(1, NORM, alone)


def test_a_spike_is_told_from_the_median_and_named(caplog: pytest.LogCaptureFixture) -> None:
    guard = StepGuard("run", 3.0)
    with caplog.at_level(logging.WARNING):
        assert feed(guard, *[1.0, 2.0] * (MIN_STEPS // 2), 4.4, 6.1, 2.0) == (
            [False] * (MIN_STEPS + 1) + [True, False]
        )
    (record,) = caplog.records
    assert f"samples s{MIN_STEPS + 2}" in record.getMessage()
    assert f"step {MIN_STEPS + 2}" in record.getMessage()
    assert 6.1 not in guard.losses  # a spike does not move what is usual


def test_the_first_steps_of_a_run_are_no_spikes() -> None:
    assert not any(feed(StepGuard("run", 2.0), 1.0, 100.0, 1.0))


def test_losses_of_micro_batches_and_ranks_add_up_before_they_are_judged() -> None:
    guard = StepGuard("run", 3.0)
    feed(guard, *[1.0] * MIN_STEPS)
    for name in ("a", "b"):
        guard.record([name], parts(0.9))
    assert not guard.check(50, NORM, alone).spike
    for name in ("a", "b"):
        guard.record([name], parts(0.9 if name == "a" else 1.0))
    assert guard.check(51, NORM, lambda value: 2 * value).spike


def test_what_was_seen_survives_a_checkpoint() -> None:
    first, second = StepGuard("run", 3.0), StepGuard("run", 3.0)
    feed(first, *[1.0] * MIN_STEPS)
    second.load_state_dict(first.state_dict())
    assert feed(first, 9.0) == feed(second, 9.0) == [True]


def test_ranks_judge_the_same_sums_and_all_refuse_what_one_of_them_saw() -> None:
    """One that raised alone would leave the others waiting for its part of the sum."""
    guards = [StepGuard("run", 3.0) for _ in range(2)]
    guards[0].record(["good"], parts(1.0))
    guards[1].record(["bad"], parts(math.nan))
    sent: list[Tensor] = []
    for guard in guards:
        with pytest.raises(NonFiniteError):  # alone, to see what each would send
            guard.check(3, NORM, lambda sums: sent.append(sums) or sums * math.nan)
    total = sent[0] + sent[1]
    for guard, name, wanted in zip(
        guards, ("good", "bad"), ("named by another rank", "samples bad"), strict=True
    ):
        guard.record([name], parts(math.nan if name == "bad" else 1.0))
        with pytest.raises(NonFiniteError, match=f"loss became NaN or infinite; .*{wanted}"):
            guard.check(3, NORM, lambda _: total)


def test_a_request_to_stop_reaches_the_other_ranks_with_the_losses() -> None:
    guard = StepGuard("run", 3.0)
    for value, wanted in ((0.0, False), (1.0, True)):
        guard.record(["a"], parts(2.0))
        report = guard.check(1, NORM, lambda sums, v=value: sums + sums.new_tensor([1.0, 0.0, v]))
        assert (report.parts, report.stop) == ({"loss": 3.0, "key": 1.0}, wanted)
