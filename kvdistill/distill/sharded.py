"""Fully sharded students (FSDP2): running a part of the model by itself, and loading weights.

A sharded module gathers its weights when *it* is called. Evaluation calls the student, not the
distiller around it, so what the distiller holds has to be gathered by hand.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from kvdistill.errors import StudentError


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """While inside, every rank has the weights of the outermost shard; nothing where none is."""
    shards = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for shard in shards:
        shard.unshard()
    try:
        yield
    finally:
        for shard in shards:
            shard.reshard()


def load_state(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load whole tensors by name into a plain or a sharded model; what has none is left alone.

    Raises:
        StudentError: the model has no such weights.
    """
    if not any(isinstance(module, FSDPModule) for module in model.modules()):
        found = model.load_state_dict(dict(state), strict=False)
        if found.unexpected_keys:
            raise StudentError(
                f"saved weights {found.unexpected_keys[:3]} belong to no part of this model; the "
                "folder was written by a run with other settings"
            )
        return
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    options = StateDictOptions(full_state_dict=True, strict=False)
    with torch.no_grad():
        set_model_state_dict(model, dict(state), options=options)
