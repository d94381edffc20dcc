"""Devices of a run: one per process."""

from __future__ import annotations

import logging

from transformers import TrainingArguments

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
