"""Epochs of unequal length as the one epoch of equal steps that the Trainer takes."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from types import SimpleNamespace
from typing import Any

import torch

from kvdistill.distill.train.run_batches import PLACEHOLDER, EpochAccounting, RunBatches


class Stream:
    """Epochs of 5, 3, 5, 3, … batches; ``done`` of the first are counted as done."""

    def __init__(self, epoch: int = 0, done: int = 0) -> None:
        self.epoch, self.first, self.done = epoch, epoch, done

    @property
    def batches_done(self) -> int:
        return self.done if self.epoch == self.first else 0

    def num_batches(self, epoch: int) -> int:
        return 3 if epoch % 2 else 5

    def __iter__(self) -> Iterator[dict[str, Any]]:
        epoch = self.epoch
        for i in range(self.batches_done, self.num_batches(epoch)):
            if i == self.num_batches(epoch) - 1:
                self.epoch += 1
            yield {"batch": (epoch, i)}


def steps_of(batches: RunBatches, count: int) -> list[tuple[list[Any], float, bool]]:
    """Per step: its micro-batches, the epochs at its end, whether it starts an epoch."""
    iterator, found = iter(batches), []
    for _ in range(count):
        step = list(islice(iterator, batches.accumulation))
        found.append(([b.get("batch") for b in step], batches.epochs, batches.starts_epoch))
    return found


def test_a_short_last_step_is_padded_in_front_and_epochs_follow_each_other() -> None:
    batches = RunBatches(Stream(), 2, steps_done=0, max_steps=6)
    assert len(batches) == 12
    assert steps_of(batches, 6) == [
        ([(0, 0), (0, 1)], 2 / 5, True),
        ([(0, 2), (0, 3)], 4 / 5, False),
        ([None, (0, 4)], 1.0, False),
        ([(1, 0), (1, 1)], 1 + 2 / 3, True),
        ([None, (1, 2)], 2.0, False),
        ([(2, 0), (2, 1)], 2 + 2 / 5, True),
    ]


def test_a_resumed_run_gives_the_same_steps_after_those_that_the_trainer_discards() -> None:
    whole = steps_of(RunBatches(Stream(), 2, steps_done=0, max_steps=6), 6)
    for done, stream in ((2, Stream(0, 4)), (3, Stream(1, 0)), (4, Stream(1, 2))):
        batches = RunBatches(stream, 2, steps_done=done, max_steps=6)
        iterator = iter(batches)
        assert list(islice(iterator, 2 * done)) == [{PLACEHOLDER: True}] * 2 * done
        found = []
        for _ in range(6 - done):
            step = list(islice(iterator, 2))
            found.append(([b.get("batch") for b in step], batches.epochs, batches.starts_epoch))
        assert found == whole[done:]


def test_an_empty_epoch_ends_the_batches() -> None:
    class Empty(Stream):
        def __iter__(self) -> Iterator[dict[str, Any]]:
            return iter(())

    assert list(RunBatches(Empty(), 2, steps_done=0, max_steps=3)) == []


def test_the_generator_moves_at_every_epoch_but_the_first_of_a_run() -> None:
    batches = RunBatches(Stream(), 2, steps_done=0, max_steps=6)
    accounting, moved = EpochAccounting(batches), []
    iterator = iter(batches)
    for step in range(6):
        list(islice(iterator, 2))
        before = torch.get_rng_state()
        state = SimpleNamespace(global_step=step, epoch=None)
        accounting.on_step_begin(None, state, None)
        moved.append(not torch.equal(before, torch.get_rng_state()))
        accounting.on_step_end(None, state, None)
        assert state.epoch == batches.epochs
    assert moved == [False, False, False, True, False, True]
