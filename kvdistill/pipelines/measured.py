"""What a run writes down of itself besides its metrics: what it cost, and what it held equal."""

from __future__ import annotations

import hashlib
import resource
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import xxhash

from kvdistill.corpus import Sample, fingerprint

CLEAR_PEAK: Final = Path("/proc/self/clear_refs")
STATUS: Final = Path("/proc/self/status")


def forget_peak() -> None:
    """Begin a new peak of memory, where the system can: many runs may share one process."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    try:
        CLEAR_PEAK.write_text("5", encoding="ascii")
    except OSError:
        return  # not Linux, or not allowed; the peak is then the process's


def costs() -> dict[str, float]:
    """``peak_memory_bytes`` of this process and ``peak_device_bytes``, where there is a device."""
    import torch

    found = {"peak_memory_bytes": float(_peak_memory_bytes())}
    if torch.cuda.is_available():
        found["peak_device_bytes"] = float(torch.cuda.max_memory_allocated())
    return found


def weights_hash(model: Any) -> str:
    """xxh3 over every parameter's name, shape and bytes, in order of names."""
    digest = xxhash.xxh3_128()
    for name, parameter in sorted(model.named_parameters()):
        digest.update(f"{name} {tuple(parameter.shape)}".encode())
        digest.update(parameter.detach().float().cpu().contiguous().numpy())
    return digest.hexdigest()


def controls(trainer: Any, train: Sequence[Sample], evaluation: Sequence[Sample]) -> dict[str, Any]:
    """What runs of one seed must share to be compared, read off the run and not off its settings.

    The student's tokens follow from corpus, tokenizer, order, steps and length, all of which are
    among them.
    """
    tokenizer = trainer.processing_class.backend_tokenizer.to_str()
    return {
        "initial_student": trainer.initial_student,
        "tokenizer": hashlib.sha256(tokenizer.encode()).hexdigest(),
        "corpus": fingerprint(train),
        "evaluation": fingerprint(evaluation),
        "order": trainer.stream.order.fingerprint,
        "steps": trainer.state.global_step,
    }


def _peak_memory_bytes() -> int:
    try:
        lines = STATUS.read_text(encoding="ascii").splitlines()
    except OSError:
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    (peak,) = (line.split()[1] for line in lines if line.startswith("VmHWM:"))
    return int(peak) * 1024
