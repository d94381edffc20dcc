"""Devices of a run: one per process, one transfer per batch, losses and statistics in float32.

A batch has dozens of tensors per teacher. The collating thread copies them into one page-locked
buffer (``Staging``), which moves to the device as a whole, asynchronously (``to_device``).
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor
from torch.distributed.fsdp import MixedPrecisionPolicy
from transformers import TrainingArguments
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from kvdistill.config.training import TrainingConfig
from kvdistill.distill.data.collate import Batch
from kvdistill.errors import ConfigError

log = logging.getLogger(__name__)


class OneDeviceArguments(TrainingArguments):  # type: ignore[misc]
    """Arguments of a process that trains on one device, however many it sees.

    With several, the Trainer would wrap the model in ``nn.DataParallel``, which replicates modules
    without what is hooked into them. Several devices are one process each.
    """

    @property
    def n_gpu(self) -> int:
        """Devices of this process: 1, or 0 on a CPU."""
        return min(int(super().n_gpu), 1)

    def warn_of_idle_devices(self, name: str) -> None:
        """Log how to train on all visible devices, where run ``name`` uses one of several."""
        visible = int(super().n_gpu)
        if visible > 1:
            log.warning(
                "%s: %d GPUs are visible, and one process trains on one of them (%s); to use all, "
                "run `torchrun --nproc_per_node=%d -m kvdistill.cli train CONFIG`",
                name, visible, self.device, visible,
            )  # fmt: skip


def chosen_precision(training: TrainingConfig) -> str:
    """``training.precision``; for ``auto``, bfloat16 where the device computes in it.

    Under DeepSpeed, which supports no mixed precision here, it is float32.
    """
    if training.precision != "auto":
        return training.precision
    on_gpu = training.device != "cpu" and torch.cuda.is_available()
    is_mixed = on_gpu and os.environ.get("ACCELERATE_USE_DEEPSPEED") != "true"
    is_native = is_mixed and torch.cuda.is_bf16_supported(including_emulation=False)
    return "bfloat16" if is_native else "float32"


def require_launcher(environment: Mapping[str, str]) -> None:
    """Refuse variables that an earlier launch left in a shell: torch waits half an hour for ranks.

    Raises:
        ConfigError: they announce processes that neither torchrun, srun nor mpirun has started.
    """
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    given = {name: environment[name] for name in names if name in environment}
    rank, world = given.get("RANK", "0"), given.get("WORLD_SIZE", "1")
    sizes = {environment.get(name) for name in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")}
    launched = "TORCHELASTIC_RUN_ID" in environment or world in {"1", *sizes}
    if not (launched and rank.isdecimal() and world.isdecimal() and int(rank) < int(world)):
        shown = ", ".join(f"{name}={value}" for name, value in given.items())
        raise ConfigError(
            f"{shown}: no launcher has started these processes; if the variables are left over in "
            f"this shell, `unset {' '.join(names)}`, else start all processes with torchrun"
        )


def keep_precision(accelerator: Any) -> None:
    """Leave mixed precision to autocast under FSDP, as it is in one process.

    accelerate's policy for FSDP would compute the projectors and the fusion weights in bfloat16,
    reduce gradients in it, and return losses of three digits.

    Raises:
        ConfigError: FSDP 1, or DeepSpeed in mixed precision: both cast the teachers' statistics.
    """
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is not None:
        if plugin.fsdp_version != 2:
            raise ConfigError(
                "FSDP version 1 casts the teachers' statistics, and its weights cannot be gathered "
                "for evaluation; set fsdp_version: 2, as examples/accelerate/fsdp.yaml does"
            )
        plugin.mixed_precision_policy = MixedPrecisionPolicy()
    deepspeed = getattr(accelerator.state, "deepspeed_plugin", None)
    if deepspeed is not None and accelerator.mixed_precision != "no":
        raise ConfigError(
            f"DeepSpeed in {accelerator.mixed_precision} casts the teachers' statistics and all "
            "projectors; set training.precision to float32, or use examples/accelerate/fsdp.yaml"
        )


class OpaqueMapping:
    """A read-only mapping that a module's wrappers pass on as it is.

    FSDP, DDP and DeepSpeed look for tensors in dicts, lists and data classes among a module's
    arguments, and cast or copy them: bfloat16 would round a count of 4,100 to 4,096.
    """

    def __init__(self, content: Mapping[str, Any]) -> None:
        self._content = content

    def __getitem__(self, key: str) -> Any:
        return self._content[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._content)

    def __len__(self) -> int:
        return len(self._content)

    def __contains__(self, key: object) -> bool:
        return key in self._content

    def keys(self) -> Any:
        """Its keys; with ``[]``, what ``{**mapping}`` needs."""
        return self._content.keys()

    def get(self, key: str, default: Any = None) -> Any:
        """The value of a key, or the default."""
        return self._content.get(key, default)


ALIGNMENT: Final = 64
"""Bytes to whose multiples the tensors of a buffer are aligned."""


class StagedBatch(dict[str, Any]):
    """A batch whose tensors are views of one ``buffer``, uint8 ``[N]``."""

    buffer: Tensor


def page_locked(num_bytes: int) -> Tensor:
    """Memory that the device reads by itself, from torch's cache of such memory: uint8 ``[N]``."""
    return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)


@dataclass(frozen=True, eq=False)
class Staging:
    """Prepares a batch for its transfer, in the thread that collated it.

    Its ``counts``, what losses are divided by, are part of the batch and need no transfer of their
    own; ``padded`` is whether any token of it is padding. For a GPU, its tensors are copied into
    one buffer.
    """

    count: Callable[[Batch], dict[str, Tensor]]
    device: torch.device
    allocate: Callable[[int], Tensor] = page_locked

    def __call__(self, batch: Batch) -> Batch:
        """The batch with ``counts`` and ``padded``, packed unless the device is a CPU."""
        padded = not bool(batch["attention_mask"].all())
        batch = {**batch, "counts": self.count(batch), "padded": padded}
        if self.device.type != "cuda":
            return batch
        tensors: list[Tensor] = []

        def collect(x: Tensor) -> Tensor:
            tensors.append(x)
            return x

        _each_tensor(batch, collect)
        ends = torch.tensor([-(-x.nbytes // ALIGNMENT) * ALIGNMENT for x in tensors]).cumsum(0)
        starts = [0, *ends.tolist()]
        buffer = self.allocate(starts[-1])
        views = (_view(buffer, start, x) for start, x in zip(starts, tensors, strict=False))
        staged = StagedBatch(_each_tensor(batch, lambda x: next(views).copy_(x)))
        staged.buffer = buffer
        return staged


def to_device(batch: Batch, device: torch.device) -> OpaqueMapping:
    """A batch on the device; of a ``StagedBatch`` in one asynchronous copy."""
    if not isinstance(batch, StagedBatch):
        return OpaqueMapping(_each_tensor(batch, lambda x: x.to(device)))
    there = batch.buffer.to(device, non_blocking=True)
    return OpaqueMapping(
        _each_tensor(batch, lambda x: _view(there, int(x.storage_offset()) * x.element_size(), x))
    )


def _view(buffer: Tensor, start: int, like: Tensor) -> Tensor:
    return buffer[start : start + like.nbytes].view(like.dtype).view(like.shape)


def _each_tensor(batch: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """The batch with ``function`` of every tensor in it; nested dicts are followed."""
    if isinstance(batch, dict):
        return {key: _each_tensor(value, function) for key, value in batch.items()}
    return function(batch) if isinstance(batch, Tensor) else batch


@contextmanager
def known_padding(padded: bool) -> Iterator[None]:
    """Build SDPA's masks in this thread without asking the device whether the batch is padded.

    transformers reads it back in every forward pass, to leave out a mask that hides nothing.
    """
    build, thread = ALL_MASK_ATTENTION_FUNCTIONS["sdpa"], threading.get_ident()

    def build_without_reading(*args: Any, **options: Any) -> Any:
        if threading.get_ident() == thread:
            options |= {"allow_is_causal_skip": False} if padded else {"attention_mask": None}
        return build(*args, **options)

    ALL_MASK_ATTENTION_FUNCTIONS["sdpa"] = build_without_reading
    try:
        yield
    finally:
        del ALL_MASK_ATTENTION_FUNCTIONS["sdpa"]
