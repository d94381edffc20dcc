"""Whether this machine, and the models it has, can run an experiment: one line per check.

A rule is not written down twice: the code that would refuse at extraction or training is run here
on models without weights.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import torch
from packaging.requirements import Requirement

from kvdistill.attention.kv_capture import KVCapture
from kvdistill.config.experiment import Experiment
from kvdistill.config.extraction import TeacherConfig
from kvdistill.config.load import load_experiment
from kvdistill.corpus.readers import load_corpus
from kvdistill.distill.align.layers import layer_map
from kvdistill.distill.losses.attention_maps import AttentionMaps
from kvdistill.distill.losses.fused_residual import kernel_fault
from kvdistill.distill.losses.load_balancing import LoadBalancing
from kvdistill.distill.student.build import outlined_student, tokenizer_of
from kvdistill.distill.student.latent.model import LatentStudent
from kvdistill.distill.train.set_up import trackers
from kvdistill.errors import ConfigError, KVDistillError, SlurmError, StoreNotFound, TeacherError
from kvdistill.pipelines.outlook import (
    Outline,
    operations_per_second,
    student_outline,
    teacher_outline,
)
from kvdistill.pipelines.plan import existing
from kvdistill.slurm import client
from kvdistill.store.bucket import is_url
from kvdistill.store.reader import KVStore
from kvdistill.text import format_bytes, shorten


@dataclass(frozen=True)
class Check:
    """One thing that was looked at."""

    name: str
    is_fine: bool
    text: str
    """What was found, or what is wrong, the remedy last."""


def examine(config: Path | None = None, overrides: Sequence[str] = ()) -> Iterator[Check]:
    """Check this machine, and all that an experiment file needs of it.

    Losses are left out where a teacher or the student already fails.
    """
    looks: dict[str, Callable[[], str]] = {"packages": _packages, "device": _device}
    experiment = None
    try:
        experiment = None if config is None else load_experiment(config, overrides)
    except KVDistillError as error:
        yield Check("config", False, shorten(str(error), 500))
    looks |= {"slurm": partial(_slurm, experiment), "hub": _hub}
    if experiment is not None:
        outline = cache(partial(teacher_outline, experiment))
        looks["store"] = partial(_store, experiment)
        looks["runs"] = partial(_disk, experiment.output_dir)
        if experiment.report_to:
            looks["report_to"] = lambda: ", ".join(trackers(experiment))
        looks["corpus"] = partial(_corpus, experiment)
        for name, teacher in experiment.teachers.items():
            looks[f"teacher {name}"] = partial(_teacher, outline, name, teacher)
        looks["student"] = partial(_student, experiment)
        looks["losses"] = partial(_losses, outline, experiment)
    checks: dict[str, Check] = {}
    for name, look in looks.items():
        models = [x for key, x in checks.items() if key == "student" or key.startswith("teacher ")]
        if name == "losses" and not all(check.is_fine for check in models):
            continue
        checks[name] = _checked(name, look)
        yield checks[name]


def _checked(name: str, look: Callable[[], str]) -> Check:
    try:
        return Check(name, True, look())
    except KVDistillError as error:
        return Check(name, False, shorten(str(error), 500))
    except OSError as error:
        cause = shorten(str(error), 400)
        return Check(name, False, f"{cause}; check the path, its permissions and free space")


def _packages() -> str:
    """Every package that kvdistill requires, in the range that it requires."""
    found = importlib.metadata.distributions()
    versions = {x.name.lower().replace("_", "-"): x.version for x in found}
    if "kvdistill" not in versions:
        raise ConfigError("kvdistill is not installed; pip install kvdistill")
    required = map(Requirement, importlib.metadata.requires("kvdistill") or ())
    needed = [x for x in required if x.marker is None or x.marker.evaluate({"extra": ""})]
    for package in needed:
        version = versions.get(package.name.lower())
        if version is None or not package.specifier.contains(version, prereleases=True):
            raise ConfigError(
                f"{package.name} {version or 'is not installed'}, expected "
                f"{package.specifier or 'any version'}; pip install '{package}'"
            )
    shown = ", ".join(f"{name} {versions[name]}" for name in ("torch", "transformers"))
    return f"Python {platform.python_version()}, {shown}; all {len(needed)} are in range"


def _device() -> str:
    """The accelerator, or the CPU, and what it computes."""
    accelerator = torch.accelerator.current_accelerator()
    if accelerator is None and shutil.which("nvidia-smi"):
        raise ConfigError(
            f"nvidia-smi is there, but torch {torch.__version__} finds no GPU; install the build "
            "of torch for its driver"
        )
    try:
        speed = f"{operations_per_second('auto') / 1e9:,.0f} GFLOP/s in a matrix product"
    except RuntimeError as error:  # of a driver, or of a device that others fill
        raise ConfigError(f"{accelerator} does not compute: {shorten(str(error), 200)}") from None
    if accelerator is None:
        return f"no accelerator; {torch.get_num_threads()} threads on the CPU, {speed}"
    module = torch.get_device_module(accelerator)
    names = [module.get_device_name(i) for i in range(torch.accelerator.device_count())]
    fault = kernel_fault(torch.device(accelerator.type, 0))
    kernel = "fused kernel" if fault is None else f"no fused kernel: {fault}"
    return f"{', '.join(names)}, {speed}, {kernel}"


def _slurm(experiment: Experiment | None) -> str:
    profiles = {} if experiment is None else experiment.slurm.profiles
    if not client.is_available():
        return "none on this machine; only --slurm needs it"
    try:
        partitions = client.call(["sinfo", "--noheader", "--format=%R"]).split()
    except SlurmError as error:
        cause = shorten(str(error), 200)
        if not profiles:
            return f"no answer ({cause}); only --slurm needs it"
        raise SlurmError(f"{cause}; use a login node, or --write-sbatch DIR") from None
    for name, profile in profiles.items():
        if profile.partition is not None and profile.partition not in partitions:
            raise SlurmError(
                f"slurm.profiles.{name}.partition: expected one of {', '.join(partitions)}, got "
                f"{profile.partition!r}"
            )
    return f"partitions {', '.join(partitions)}"


def _hub() -> str:
    """The hub is not needed where models are in folders or in its cache.

    One that does not answer is not asked again by this process: each model would wait for retries.
    """
    from huggingface_hub import constants, get_session, get_token

    local = "models must be in folders or in the cache, which `kvdistill fetch` fills"
    if constants.HF_HUB_OFFLINE:
        return f"switched off by HF_HUB_OFFLINE; {local}"
    try:
        get_session().head(constants.ENDPOINT, timeout=5)
    except Exception as error:  # the client's errors have no common base
        constants.HF_HUB_OFFLINE = True
        return f"not reachable ({type(error).__name__}); {local}"
    return "reachable" if get_token() else "reachable; gated models need `hf auth login`"


def _store(experiment: Experiment) -> str:
    if not is_url(experiment.store):
        return _disk(Path(experiment.store))
    try:
        return f"{KVStore.open(experiment.store).where} is there"
    except StoreNotFound:
        return f"{experiment.store} is reachable, and no store yet"


def _disk(folder: Path, size_bytes: int = 32 << 20) -> str:
    """Free space and the speed of writing where a folder is, or will be."""
    place, block = existing(folder), os.urandom(1 << 20)
    with tempfile.TemporaryFile(dir=place) as file:
        began = time.perf_counter()
        for _ in range(size_bytes // len(block)):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
        speed = size_bytes / (time.perf_counter() - began)
    free = shutil.disk_usage(place).free
    return f"{format_bytes(free)} free, {format_bytes(speed)}/s written in {place}"


def _corpus(experiment: Experiment) -> str:
    splits = load_corpus(experiment.corpus)
    return f"{len(splits.train):,} samples to train on, {len(splits.evaluation):,} held out"


def _teacher(outline: Callable[[str], Outline], name: str, config: TeacherConfig) -> str:
    found, folder = outline(name), Path(config.model)
    reads_folder = config.weights == "trained" and not config.gguf_file and folder.is_dir()
    if reads_folder and not any(folder.glob("*.safetensors")):
        raise TeacherError(f"teacher {name!r}: {folder} has no *.safetensors; save its weights")
    return f"{found.model_type}, {found.shape}; verified when it is loaded"


def _student(experiment: Experiment) -> str:
    found = student_outline(experiment)
    return f"{found.model_type}, {found.shape}, {found.size}"


def _losses(outline: Callable[[str], Outline], experiment: Experiment) -> str:
    """Losses and layer maps that this student and these teachers can have."""
    config, losses, latent = experiment.student, experiment.losses, experiment.latent
    tokenizer = tokenizer_of(config)
    # These read or run the student's weights, which may be random ones.
    device = "meta" if latent is None and not losses.attention_kl else "cpu"
    student = outlined_student(config, tokenizer, experiment.training.max_length, device)
    LoadBalancing(student, losses.router_aux)
    if latent is not None:
        LatentStudent(student, latent)
    if losses.inject:
        KVCapture(student).check_rewritable()
    if losses.attention_kl:
        AttentionMaps(student, experiment.alignment)
    alignment, num_layers = experiment.alignment, KVCapture(student).geometry.num_layers
    for name in experiment.teachers if alignment.layers != "cka" else ():
        explicit = (alignment.explicit_layers or {}).get(name)
        if layers := tuple(outline(name).heads):
            layer_map(alignment.layers, num_layers, layers, explicit=explicit)
    used = (name for name, weight in losses.weights().items() if weight)
    return f"{', '.join(used)}: usable with this student"
