"""A run's stream, from its settings: in which order, in what batches, how often each text."""

from __future__ import annotations

from collections.abc import Sequence

from kvdistill.config_training import TrainingConfig
from kvdistill.corpus import Sample
from kvdistill.distill.data.buckets import Buckets
from kvdistill.distill.data.collate import Collate
from kvdistill.distill.data.mixture import mixture_of
from kvdistill.distill.data.order import Order
from kvdistill.distill.data.source import Source
from kvdistill.distill.data.stream import KVStream, Rank
from kvdistill.distill.data.tokens import token_counts


def open_stream(
    source: Source,
    collate: Collate,
    samples: Sequence[Sample],
    training: TrainingConfig,
    *,
    seed: int,
    rank: Rank,
) -> KVStream:
    """The stream of one rank, at its beginning.

    Args:
        source: the shards.
        collate: makes batches; its tokenizer measures lengths.
        samples: the corpus that the shards were cut from, in its order.
        training: batch size, batching, weights and windows.
        seed: of the order.
        rank: this process among those that train together.

    Raises:
        ConfigError: weights of tasks that the corpus does not have.
    """
    order = Order(
        seed,
        tuple(source.sizes),
        training.window_shards,
        mixture_of(samples, training.task_weights),
        _buckets(collate, samples, training),
    )
    return KVStream(
        source,
        collate,
        order,
        batch_size=training.batch_size,
        read_threads=training.read_ahead,
        # The trainer takes all batches of a step at once.
        batches_ahead=training.steps_ahead * training.gradient_accumulation_steps,
        rank=rank,
    )


def _buckets(
    collate: Collate, samples: Sequence[Sample], training: TrainingConfig
) -> Buckets | None:
    if training.batching == "plain":
        return None
    lengths = token_counts(collate.tokenizer, samples, training.max_length)
    budget = training.tokens_per_batch or training.batch_size * training.max_length
    return Buckets(lengths, budget)
