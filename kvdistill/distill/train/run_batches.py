"""All micro-batches of a run in the form that ``transformers.Trainer`` takes: one epoch.

The Trainer expects epochs of equal length, which length buckets and resumption on another number
of ranks do not give. As a single epoch, a run is counted in optimizer steps alone; the stream's own
epochs are written into the Trainer's state by a callback.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice, repeat
from typing import Any, Final

import torch
from torch.utils.data import IterableDataset
from transformers import TrainerCallback

from kvdistill.distill.data.collate import Batch
from kvdistill.distill.data.stream import KVStream, epochs_for

PLACEHOLDER: Final = "placeholder"
"""Only key of a micro-batch that stands for no samples."""


class RunBatches(IterableDataset[Batch]):
    """``accumulation`` micro-batches for each of ``max_steps`` optimizer steps.

    Where the last step of a stream's epoch has fewer batches, placeholders precede them, so that
    gradients are synchronised on a real batch. Steps before a resumption, which the Trainer
    discards, are placeholders too.
    """

    def __init__(
        self, stream: KVStream, accumulation: int, *, steps_done: int, max_steps: int
    ) -> None:
        self.stream, self.accumulation = stream, accumulation
        self.steps_done, self.max_steps = steps_done, max_steps
        self.epochs = 0.0
        """Epochs of the stream up to the end of the current step, such as 1.25."""
        self.starts_epoch = False
        """Whether the current step is the first of an epoch of the stream."""

    def __len__(self) -> int:
        return self.max_steps * self.accumulation

    def __iter__(self) -> Iterator[Batch]:
        yield from repeat({PLACEHOLDER: True}, self.steps_done * self.accumulation)
        while True:
            epoch, done = self.stream.epoch, self.stream.batches_done
            self.starts_epoch = not done
            batches = iter(self.stream)
            while step := list(islice(batches, self.accumulation)):
                done += len(step)
                self.epochs = epoch + done / self.stream.num_batches(epoch)
                yield from repeat({PLACEHOLDER: True}, self.accumulation - len(step))
                yield from step
                self.starts_epoch = False
            if self.stream.epoch == epoch:
                return  # an epoch without samples


class EpochAccounting(TrainerCallback):  # type: ignore[misc]
    """Writes the stream's epochs, not the Trainer's single one, into the Trainer's state."""

    def __init__(self, batches: RunBatches) -> None:
        self.batches = batches

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Set the number of epochs that the remaining steps need."""
        steps = self.batches.max_steps - self.batches.steps_done
        state.num_train_epochs = epochs_for(self.batches.stream, steps, self.batches.accumulation)

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Draw the base seed that a DataLoader draws from torch's generator at every epoch.

        The DataLoader of the single epoch drew the first one. Without the others, dropout on a
        CPU would differ from that of earlier versions.
        """
        if self.batches.starts_epoch and state.global_step:
            torch.empty((), dtype=torch.int64).random_()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Set the fractional epoch that logs and checkpoints hold."""
        state.epoch = self.batches.epochs
