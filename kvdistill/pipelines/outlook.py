"""What a run is about to do, before any weights are loaded: models, tokens, disk space and time.

Models are built on the meta device, a few texts are tokenised, and time follows from arithmetic:
two operations per parameter and token of a forward pass, six of a training step, at the speed of a
matrix product. ``plan.py`` measures all of it on a pilot instead.
"""

from __future__ import annotations

import math
import shutil
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Final

import torch

from kvdistill.attention.fitting import located_sites
from kvdistill.attention.geometry import Heads
from kvdistill.attention.kv_capture import KVCapture
from kvdistill.config.experiment import Experiment
from kvdistill.corpus.samples import Sample
from kvdistill.distill.student.build import outlined_student, tokenizer_of
from kvdistill.errors import AdapterError, StoreNotFound, StudentError, TeacherError
from kvdistill.extract.loading import outlined_teacher
from kvdistill.extract.teacher import prompt_tokenizer_of
from kvdistill.extract.tokenise import PromptTokenizer
from kvdistill.pipelines.extract_tasks import texts_to_extract
from kvdistill.pipelines.plan import existing, shards_to_extract, spread
from kvdistill.pipelines.run_folder import RunFolder
from kvdistill.store.bucket import local_folder
from kvdistill.store.codecs import CODECS
from kvdistill.store.reader import KVStore
from kvdistill.text import format_bytes, format_duration, shorten
from kvdistill.types import CodecSpec, Kind

PILOT: Final = 64
"""Texts that are tokenised."""
REACHED: Final = 0.5
"""Share of a matrix product's speed that a model's passes reach, roughly."""
OVERHEAD: Final = 0.1
"""What extraction adds to its teachers' passes, as a share of them, roughly."""


@dataclass(frozen=True)
class Savings:
    """What a store saves over teachers that read every text in every run.

    A run with teachers in memory costs ``epochs · read + trained``, one from a store ``trained``;
    the store costs ``(1 + overhead) · read``, once. All in one unit: operations or seconds.
    """

    read: float
    """One forward pass of all teachers over the corpus."""
    trained: float
    """A run's training steps, all epochs of them."""
    epochs: float
    overhead: float = OVERHEAD

    def ratio(self, num_runs: float) -> float:
        """Cost of this many runs with teachers in memory, over that with a store."""
        live = num_runs * (self.epochs * self.read + self.trained)
        return live / ((1 + self.overhead) * self.read + num_runs * self.trained)

    @property
    def crossover(self) -> float:
        """Runs at which both cost the same; below 1, the first run pays for its store."""
        return (1 + self.overhead) / self.epochs


@dataclass(frozen=True)
class Outline:
    """A model by its config and tokenizer."""

    model_type: str
    heads: Mapping[int, Heads]
    """By layer, of all whose keys and values are read; none where only its cache may have them."""
    num_parameters: int
    """But for the embeddings."""
    prompts: PromptTokenizer
    hidden_size: int
    num_tied: int = 0
    """Of a language head that is the embeddings."""

    @property
    def size(self) -> str:
        """Parameters that compute: ``106,203,456 parameters without embeddings``."""
        return f"{self.num_parameters:,} parameters without embeddings"

    @property
    def shape(self) -> str:
        """Layers and heads: ``30 layers × 3 KV heads of 64``."""
        counts = Counter((head.num_key_value, head.head_dim) for head in self.heads.values())
        parts = (f"{n} layers × {heads} KV heads of {dim}" for (heads, dim), n in counts.items())
        return " + ".join(parts) or "layers read from its cache"

    def num_tokens(self, samples: Sequence[Sample]) -> int:
        """Tokens of texts, extrapolated by characters."""
        pilot = spread(samples, PILOT)
        read = sum(tokens.num_tokens for tokens in self.prompts.tokenise(pilot))
        whole, part = (sum(len(s.text) for s in some) for some in (samples, pilot))
        return round(read * whole / max(part, 1))


def teacher_outline(experiment: Experiment, name: str) -> Outline:
    """A teacher without its weights.

    Raises:
        TeacherError: model or tokenizer cannot be loaded, or no adapter has its modules.
    """
    config = experiment.teachers[name]
    model = outlined_teacher(name, config)
    try:
        sites = located_sites(model, config.stream)
    except AdapterError as error:
        raise TeacherError(f"teacher {name!r}: {error}") from None
    kept = (s for s in sites if config.layers is None or s.layer_idx in config.layers)
    heads = {site.layer_idx: site.heads for site in kept}
    if config.heads is not None:
        num = len(config.heads)
        heads = {i: head._replace(num_key_value=num) for i, head in heads.items()}
    kind, width = model.config.model_type, model.config.get_text_config().hidden_size
    return Outline(kind, heads, _size(model), prompt_tokenizer_of(name, config, kind), width)


def student_outline(experiment: Experiment) -> Outline:
    """The student without its weights; raises StudentError as ``check_student``."""
    config, max_length = experiment.student, experiment.training.max_length
    tokenizer = tokenizer_of(config)
    student = outlined_student(config, tokenizer, max_length)
    capture = KVCapture(student)
    heads = {site.layer_idx: site.heads for site in capture.sites}
    head, embeddings = student.get_output_embeddings(), student.get_input_embeddings()
    tied = head.weight.numel() if head is not None and head.weight is embeddings.weight else 0
    shown = (student.config.model_type, heads, _size(student), PromptTokenizer(tokenizer))
    return Outline(*shown, capture.geometry.hidden_size, tied)


def savings(experiment: Experiment) -> Savings:
    """What the experiment's store saves, in operations: 2 per parameter and token of a forward pass
    and 6 of a training step. Attention itself, and the losses against teachers, are left out.

    Raises:
        CorpusError, ConfigError: as ``prepare_store``.
        StudentError, TeacherError: one of the models cannot be outlined.
    """
    samples, training = texts_to_extract(experiment), experiment.training
    read = sum(
        2 * outline.num_parameters * outline.num_tokens([s for s in samples if s.is_of(parts)])
        for name, parts in ((name, config.parts) for name, config in experiment.teachers.items())
        for outline in [teacher_outline(experiment, name)]
    )
    epochs = training.epochs
    if training.max_steps:
        batch = training.batch_size * training.gradient_accumulation_steps
        epochs = training.max_steps * batch / len(samples)
    student = student_outline(experiment)
    length = min(student.num_tokens(samples) / len(samples), training.max_length)
    size = student.num_parameters + student.num_tied
    return Savings(read, 6 * size * length * len(samples) * epochs, epochs)


def savings_line(experiment: Experiment) -> str | None:
    """``savings`` in a sentence; None without teachers, a store, or a student that can be built."""
    if not experiment.teachers or experiment.kv_source != "store":
        return None
    try:
        found = savings(experiment)
    except (StudentError, TeacherError):  # the student's tokenizer may be trained later
        return None
    first = math.floor(found.crossover) + 1
    return (
        f"against teachers in memory the store pays from run {first}, and 8 such runs are up to "
        f"{found.ratio(8):.1f} times cheaper (by operations: reading {found.read:.1e}, training "
        f"{found.trained:.1e})"
    )


def _size(model: Any) -> int:
    embeddings = model.get_input_embeddings()
    left_out = set() if embeddings is None else {*embeddings.parameters()}
    return sum(int(x.numel()) for x in model.parameters() if x not in left_out)


@cache
def _bytes_per_token(heads: Heads, codec: CodecSpec, hidden: int, length: int = 256) -> float:
    """What one token of one layer takes in a codec, before compression; ``hidden`` channels."""
    num = heads.num_key_value
    shapes: dict[Kind, tuple[int, int]] = {"hidden": (1, hidden)} if hidden else {}
    shapes |= {"key": (num, heads.head_dim), "value": (num, heads.value_head_dim)}
    total = 0.0
    for kind, (num, dim) in shapes.items():
        name, numbers = getattr(codec, kind), num * dim
        if name == "klt":
            total += numbers * getattr(codec, f"{kind}_bits") / 8
            continue
        parts = CODECS[name].encode(torch.ones(num, length, dim), kind)
        total += sum(part.nbytes for part in parts.values()) / length
    return total


def outlook(experiment: Experiment) -> Iterator[str]:
    """Lines on what ``run`` will do: corpus, teachers, student, disk and time.

    Raises:
        CorpusError, ConfigError: as ``prepare_store``.
        StudentError: as ``check_student``.
    """
    samples = texts_to_extract(experiment)
    shards = shards_to_extract(experiment, samples)
    characters = sum(len(sample.text) for sample in samples)
    yield f"corpus: {len(samples):,} samples, {characters:,} characters, {len(shards):,} shards"
    to_read = [sample for shard in shards for sample in shard.samples]
    needed, work = 0.0, 0.0
    for name, config in experiment.teachers.items():
        left = _num_missing(experiment, name, len(shards))
        if not left:  # the model may have been deleted
            yield f"teacher {name}: all {len(shards)} shards are there"
            continue
        try:
            outline, codec = teacher_outline(experiment, name), experiment.codec(name)
        except TeacherError as error:  # perhaps of the meta device alone; extraction decides
            yield f"teacher {name}: unknown ({shorten(str(error), 200)})"
            continue
        tokens = outline.num_tokens([s for s in to_read if s.is_of(config.parts)])
        hidden = outline.hidden_size if experiment.extraction.hidden else 0
        rows = (_bytes_per_token(heads, codec, hidden) for heads in outline.heads.values())
        size = tokens * sum(rows)
        needed += size * left / len(shards)
        work += 2 * outline.num_parameters * tokens * left / len(shards)
        yield (
            f"teacher {name}: {outline.shape}, about {tokens:,} tokens, {format_bytes(size)} as "
            f"{'/'.join(dict.fromkeys((codec.key, codec.value)))}"
            + (f"; {left} of {len(shards)} shards left" if left < len(shards) else "")
        )
    student, training = student_outline(experiment), experiment.training
    start = f"from {experiment.student.model or 'scratch'}"
    yield f"student: {student.model_type}, {start}, {student.shape}, {student.size}"
    batch = training.batch_size * training.gradient_accumulation_steps
    steps = training.max_steps or math.ceil(training.epochs * math.ceil(len(samples) / batch))
    yield f"training: {steps:,} steps of {batch} samples, up to {training.max_length} tokens each"
    free = shutil.disk_usage(existing(local_folder(experiment.store))).free
    fits = "" if needed < free else "; does not fit: choose a smaller codec or fewer layers"
    yield f"disk: {format_bytes(needed)} needed, {format_bytes(free)} free{fits}"
    length = min(student.num_tokens(samples) / len(samples), training.max_length)
    finished = RunFolder(experiment.output_dir / experiment.name).read_record().get("finished")
    trained = 0.0 if finished else 6 * student.num_parameters * length * steps * batch
    speed = REACHED * operations_per_second(training.device)
    parts = [f"{format_duration(work / speed)} to extract"] if work else []
    parts += [] if finished else [f"{format_duration(trained / speed)} to train"]
    yield f"time: very roughly {' and '.join(parts)}" if parts else "nothing is left to do"


def _num_missing(experiment: Experiment, teacher: str, num_shards: int) -> int:
    try:
        store = KVStore.open(experiment.store)
    except StoreNotFound:
        return num_shards
    return num_shards - len(store.committed(teacher)) if store.has_teacher(teacher) else num_shards


def operations_per_second(device: str) -> float:
    """Speed of a matrix product on the accelerator, or on the CPU."""
    accelerator = torch.accelerator.current_accelerator() if device != "cpu" else None
    size, kind = (1024, torch.float32) if accelerator is None else (8192, torch.bfloat16)
    x = torch.ones(size, size, dtype=kind, device=accelerator or "cpu")
    seconds = []
    for _ in range(4):  # the first one loads kernels
        began = time.perf_counter()
        float((x @ x)[0, 0])  # waits for the device
        seconds.append(time.perf_counter() - began)
    return float(2 * size**3 / min(seconds))
