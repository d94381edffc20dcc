"""How many optimizer steps lie ahead: epochs need not have equally many batches.

Length buckets cut every epoch anew, and a run that goes on with other ranks has done its first
steps with batches of another size. So steps are counted epoch by epoch, from where the stream is.
"""

from __future__ import annotations

from math import ceil

from kvdistill.distill.data.stream import KVStream


def steps_in(stream: KVStream, epoch: int, batches_per_step: int) -> int:
    """Optimizer steps of one epoch; the last may have fewer batches."""
    return max(1, ceil(stream.num_batches(epoch) / batches_per_step))


def steps_left(stream: KVStream, epochs: float, batches_per_step: int) -> int:
    """Optimizer steps from the stream's place to the end of ``epochs`` epochs since the first."""
    whole = int(epochs)
    steps = -(stream.batches_done // batches_per_step)
    for epoch in range(stream.epoch, whole):
        steps += steps_in(stream, epoch, batches_per_step)
    if stream.epoch <= whole < epochs:
        steps += ceil((epochs - whole) * steps_in(stream, whole, batches_per_step))
    return max(0, steps)


def epochs_for(stream: KVStream, steps: int, batches_per_step: int) -> int:
    """Epochs since the first that ``steps`` more steps need, the last one begun included."""
    if steps <= 0:
        return 0
    epoch, steps = stream.epoch, steps + stream.batches_done // batches_per_step
    while steps > 0:
        steps -= steps_in(stream, epoch, batches_per_step)
        epoch += 1
    return epoch
