"""Work of an evaluation, split over the ranks of a distributed run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch.distributed.fsdp import FSDPModule

Item = TypeVar("Item")
Result = TypeVar("Result")


def over_ranks(
    model: Any, work: Sequence[Item], function: Callable[[Item], Result]
) -> list[Result]:
    """``function`` of every item, in their order and on every rank; a rank computes every n-th.

    An item's result does not depend on the number of ranks. Each rank computes everything where
    the model's weights are sharded, since its forward passes then need all ranks.

    Raises:
        Exception: the first of any rank, on all of them, so that none waits for another.
    """
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()) or is_sharded(model):
        return [function(item) for item in work]
    rank, world = distributed.get_rank(), distributed.get_world_size()
    own: dict[int, Result] = {}
    failure: Exception | None = None
    try:
        for number in range(rank, len(work), world):
            own[number] = function(work[number])
    except Exception as error:  # raised below, by all ranks
        failure = error
    found: list[Any] = [None] * world
    distributed.all_gather_object(found, (own, failure))
    for _, failed in found:
        if failed is not None:
            raise failed
    return [found[number % world][0][number] for number in range(len(work))]


def is_sharded(model: Any) -> bool:
    """Whether a rank holds parts of the weights only (FSDP2, DeepSpeed ZeRO-3)."""
    return any(isinstance(module, FSDPModule) for module in model.modules()) or any(
        hasattr(parameter, "ds_id") for parameter in model.parameters()
    )
