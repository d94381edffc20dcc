"""Stage 2: open the store, check it against the config, train, evaluate, save.

No teacher is loaded and no code that could load one is imported.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import json
import os
import resource
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xxhash

from kvdistill.config.base import log
from kvdistill.config.experiment import Experiment
from kvdistill.corpus.readers import Splits, load_corpus
from kvdistill.corpus.samples import Sample, corpus_fingerprint
from kvdistill.distill.evaluate.answers import is_gradable
from kvdistill.errors import ConfigError, IncompleteStore, Interrupted, StoreMismatch
from kvdistill.pipelines.extract_tasks import other_extraction, to_extract
from kvdistill.pipelines.run_folder import RunFolder, begin, model_card, writing
from kvdistill.slurm.lease import lease
from kvdistill.slurm.signals import handling
from kvdistill.store.commit import replace_file, sweep
from kvdistill.store.reader import KVStore

if TYPE_CHECKING:
    from kvdistill.distill.train.set_up import SourceOf


@dataclass(frozen=True)
class TrainingReport:
    """How a run ended."""

    folder: Path
    metrics: dict[str, float]
    resumed: bool
    already_finished: bool = False


def train(experiment: Experiment) -> TrainingReport:
    """Distil the store into a student; an interrupted run resumes from its last checkpoint.

    Raises:
        StoreNotFound: there is no store yet.
        IncompleteStore: shards are missing (exit code 3).
        StoreMismatch: the store was made from another corpus, or by other teachers.
        StudentError: the student or its tokenizer cannot be used.
        ConfigError: exact match is configured, but no held-out sample has an answer.
        FolderInUse: another process trains this run.
        CorpusError: there was no token to learn from or to score.
        Interrupted: a signal stopped it, in the loop after a checkpoint was saved (exit code 75).
    """
    from kvdistill.distill.train.devices import require_launcher

    require_launcher(os.environ)
    splits = load_corpus(experiment.corpus)
    _check_answers(experiment, splits)
    store = KVStore.open(experiment.store)
    require_matching_store(store, experiment, splits)
    folder = RunFolder(experiment.output_dir / experiment.name)
    # The ranks of a run are one trainer, and what has finished is only read.
    reads = os.environ.get("RANK", "0") != "0" or folder.read_record().get("finished")
    held = contextlib.nullcontext(lambda: None) if reads else lease(folder.path)
    try:
        with handling(), writing(folder), held as require_lease:
            return _train_alone(experiment, store, splits, require_lease)
    except KeyboardInterrupt:
        raise Interrupted(
            f"{folder.path}: stopped by a signal; run the same command again to resume"
        ) from None


def _train_alone(
    experiment: Experiment, store: KVStore, splits: Splits, require_lease: Callable[[], None]
) -> TrainingReport:
    folder = begin(experiment)
    record = folder.read_record()
    if record.get("finished"):
        return TrainingReport(folder.path, record["metrics"], False, already_finished=True)
    sweep(folder.path)
    checkpoint = folder.checkpoint()
    began = time.monotonic()
    reset_peak_memory()
    trainer = build_trainer(experiment, store, splits, folder)
    trainer.before_saving = require_lease
    with contextlib.closing(trainer):
        _train_to_the_end(trainer, folder, checkpoint)
        try:
            metrics = trainer.evaluate() if splits.evaluation else {}
            best = trainer.best
            if experiment.training.keep_best and best.step != trainer.state.global_step:
                metrics = trainer.evaluate_best()
            trainer.save_whole(folder.student)
            _write_outcome(folder, trainer, store, splits, metrics=metrics, began=began)
        except KeyboardInterrupt:
            trainer.save_checkpoint()
            raise
    return TrainingReport(folder.path, metrics, checkpoint is not None)


def _train_to_the_end(trainer: Any, folder: RunFolder, checkpoint: Path | None) -> None:
    """Train from a checkpoint or the start; raises Interrupted where a signal came meanwhile."""
    try:
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    except (Exception, KeyboardInterrupt) as error:
        trainer.abort(f"{type(error).__name__}: {error}")
        raise
    if trainer.stop.agreed or (trainer.stop.name is not None and trainer.args.world_size == 1):
        trainer.save_checkpoint()
        raise Interrupted(
            f"{folder.path}: stopped by {trainer.stop.name}, saved at step "
            f"{trainer.state.global_step} of {trainer.state.max_steps}; run the same command again "
            "to resume"
        )
    trainer.require_taught()


def require_trainable_student(experiment: Experiment) -> None:
    """Raise StudentError where the student's tokenizer or architecture cannot be used.

    Called before extraction, which may take hours.
    """
    from kvdistill.distill.student.build import check_student, tokenizer_of

    tokenizer = tokenizer_of(experiment.student)
    check_student(experiment.student, tokenizer, experiment.training.max_length)


def require_matching_store(store: KVStore, experiment: Experiment, splits: Splits) -> None:
    """Refuse a store that does not match the config; names the setting on both sides.

    Raises:
        IncompleteStore: a teacher has not been extracted at all.
        StoreMismatch: another corpus, or a teacher that was extracted differently.
    """
    expected, found = corpus_fingerprint(splits.train), store.manifest.corpus_fingerprint
    if found != expected:
        raise StoreMismatch(
            f"{store.where} holds the corpus {found[:12]}, the config names the corpus "
            f"{expected[:12]}; use another store path, or that corpus"
        )
    present = store.teachers()
    for name in experiment.teachers:
        if name not in present:
            raise IncompleteStore(
                f"{store.where} has no teacher {name!r} (it has {present}); "
                "run `kvdistill extract` with this config first"
            )
        if (other := other_extraction(store, experiment, name)) is not None:
            raise StoreMismatch(other)


def _check_answers(experiment: Experiment, splits: Splits) -> None:
    wanted = experiment.training.exact_match_samples
    if splits.evaluation and experiment.latent is not None:
        wanted = wanted or len(splits.evaluation)  # it is scored by nothing else
    if wanted and not any(is_gradable(sample) for sample in splits.evaluation):
        raise ConfigError(
            f"exact match is wanted of {wanted} samples, but none of the {len(splits.evaluation)} "
            "held-out samples has both a prompt and an answer; hold out such samples "
            "(corpus.eval_samples, corpus.eval_path), or set training.exact_match_samples to 0"
        )


def build_trainer(
    experiment: Experiment,
    store: KVStore,
    splits: Splits,
    folder: RunFolder,
) -> Any:
    """Student, distiller, stream and trainer of a run, ready to train.

    Raises:
        IncompleteStore: shards are missing that the run needs.
        KVDistillError: see ``assemble``.
    """
    from transformers import set_seed

    from kvdistill.distill.data.collate import require_text
    from kvdistill.distill.data.stream import Rank
    from kvdistill.distill.train.callbacks import Commits, HumanLog, JsonLines, ProgressBar
    from kvdistill.distill.train.pilot import explained_lines
    from kvdistill.distill.train.set_up import assemble, log_callbacks, training_arguments
    from kvdistill.distill.train.trainer import KVDistillTrainer

    experiment = _with_precision(experiment, folder)
    arguments = training_arguments(experiment, folder.path, bool(splits.evaluation))
    rank = Rank(arguments.process_index, arguments.world_size)
    there, source_of = _shards_of(experiment, store, folder, rank.rank)
    samples = splits.train
    if experiment.training.partial_store:
        samples = [sample for shard_id in there.shard_ids for sample in there.samples(shard_id)]
    set_seed(experiment.seed)  # for the projectors; the student has its own generator
    run = assemble(
        experiment,
        there,
        samples,
        rank,
        resuming=folder.checkpoint() is not None,
        source_of=source_of,
        device=arguments.device,
    )
    if splits.evaluation:
        require_text(run.tokenizer, splits.evaluation, experiment.training.max_length)
    human_log = HumanLog(folder.human_log, experiment.name)
    if arguments.process_index == 0:
        if experiment.losses.of_kv:
            how = "by the fused kernel" if run.unfused is None else f"unfused: {run.unfused}"
            human_log.write(f"keys and values are compared {how}")
            folder.write_record(folder.read_record() | {"compared": how})
        if run.explained:
            folder.write_record(folder.read_record() | {"explained_at_start": run.explained})
        for line in explained_lines(run.explained):
            human_log.write(line)
    initial_student = weights_hash(run.distiller.student)
    if experiment.training.gradient_checkpointing:
        run.distiller.capture.checkpoint_activations()
    if experiment.training.compile:
        run.distiller.capture.compile_layers()
    trainer = KVDistillTrainer(
        run.distiller,
        stream=run.stream,
        tokenizer=run.tokenizer,
        experiment=experiment,
        arguments=arguments,
        evaluation=splits.evaluation,
        callbacks=[
            JsonLines(folder.log),
            human_log,
            ProgressBar(experiment.name),
            *log_callbacks(experiment, folder.path),
            Commits(folder.path, experiment.training.keep_checkpoints),
        ],
    )
    trainer.initial_student, trainer.samples = initial_student, samples
    return trainer


def _with_precision(experiment: Experiment, folder: RunFolder) -> Experiment:
    """``training.precision: auto`` as the run began with it, or else as this device has it."""
    from kvdistill.distill.train.devices import chosen_precision

    if experiment.training.precision != "auto":
        return experiment
    written, record = folder.read_config() if folder.config.is_file() else {}, folder.read_record()
    begun = written.get("training", {}).get("precision", "auto")
    chosen = record.get("precision") if begun == "auto" else begun
    chosen = chosen or chosen_precision(experiment.training)
    if os.environ.get("RANK", "0") == "0" and record.get("precision") != chosen:
        folder.write_record(record | {"precision": chosen})
    training = experiment.training.model_copy(update={"precision": chosen})
    return experiment.model_copy(update={"training": training})


def _shards_of(
    experiment: Experiment, store: KVStore, folder: RunFolder, rank: int
) -> tuple[KVStore, SourceOf | None]:
    """The store of a run, perhaps with a part of its plan, and what else makes a source of it."""
    if not experiment.losses.uses_teachers:
        return store, None
    if experiment.kv_source == "live":
        from kvdistill.pipelines.live import live_source

        return to_extract(store, experiment), live_source(experiment, store)
    if not experiment.training.partial_store:
        return store, None
    return store.only(_shards_at_the_start(experiment, store, folder, rank)), None


def _shards_at_the_start(
    experiment: Experiment, store: KVStore, folder: RunFolder, rank: int
) -> list[str]:
    """Shards that all teachers had when the run began; the first rank looks, and records them."""
    from accelerate.utils import broadcast_object_list

    if rank == 0 and "shards" not in folder.read_record():
        missing = {name: store.missing(name) for name in experiment.teachers}
        absent = {shard_id for found in missing.values() for shard_id in found}
        there = [shard_id for shard_id in store.shard_ids if shard_id not in absent]
        folder.write_record(folder.read_record() | {"shards": there})
        lacking = ", ".join(f"{name} lacks {len(found)}" for name, found in missing.items())
        log.warning(
            f"{folder.path}: trains on {len(there)} of {len(store.shard_ids)} shards; {lacking}"
        )
    shards: list[str] = broadcast_object_list([folder.read_record().get("shards")])[0]
    if not shards:
        raise IncompleteStore(
            f"{store.where}: no shard yet that all teachers have; run `kvdistill extract`"
        )
    return shards


def _diagnose(trainer: Any) -> dict[str, Any]:
    """Data for the report's figures; under FSDP all ranks take part."""
    from kvdistill.distill.evaluate.diagnostics import diagnose
    from kvdistill.distill.train.checkpoint import gathered

    alone = trainer.is_world_process_zero() or trainer.is_fsdp_enabled
    if not alone or trainer.experiment.latent is not None:  # no alignment by token
        return {}
    distiller = trainer.accelerator.unwrap_model(trainer.model)
    with gathered(distiller):
        return diagnose(distiller, trainer.stream)


def _write_outcome(
    folder: RunFolder,
    trainer: Any,
    store: KVStore,
    splits: Splits,
    *,
    metrics: dict[str, float],
    began: float,
) -> None:
    """Everything that a finished run leaves beside its student; all ranks call it."""
    diagnostics = _diagnose(trainer)
    if not trainer.is_world_process_zero():
        return
    replace_file(folder.diagnostics, json.dumps(diagnostics))
    rows = [json.dumps(row, ensure_ascii=False) + "\n" for row in trainer.held_out.rows]
    replace_file(folder.eval_samples, "".join(rows))
    outcome = {
        "finished": True,
        "metrics": metrics,
        "calibration": trainer.held_out.calibration,
        "steps": trainer.state.global_step,
        "best": None if trainer.best is None else asdict(trainer.best),
        "seconds": time.monotonic() - began,
        **resource_usage(),
        "controls": recorded_controls(trainer, trainer.samples, splits.evaluation),
        "files": folder.file_records(),
    }
    record = folder.read_record() | outcome
    experiment: Experiment = trainer.experiment
    names = experiment.teachers if experiment.losses.uses_teachers else ()
    teachers = {name: store.teacher(name) for name in names}
    corpus = store.manifest.corpus_fingerprint
    replace_file(folder.student / "README.md", model_card(experiment, teachers, corpus, record))
    folder.write_record(record)  # last: nothing is written after a run has finished
    shutil.rmtree(folder.best, ignore_errors=True)  # it is the student


def reset_peak_memory() -> None:
    """Start a new measurement of peak memory: many runs may share one process."""
    import torch

    gc.collect()  # a trainer and its callbacks refer to one another
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    # Not Linux, or not permitted: the peak is then that of the whole process.
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def resource_usage() -> dict[str, float]:
    """``peak_memory_bytes`` of this process and ``peak_device_bytes`` of its GPU, if any."""
    import torch

    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
        peak = int(status.partition("VmHWM:")[2].split()[0]) * 1024
    except OSError:
        unit = 1 if sys.platform == "darwin" else 1024
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    found = {"peak_memory_bytes": float(peak)}
    if torch.cuda.is_available():
        found["peak_device_bytes"] = float(torch.cuda.max_memory_allocated())
    return found


def weights_hash(model: Any) -> str:
    """xxh3 over the names, shapes and float32 bytes of all parameters, sorted by name."""
    digest = xxhash.xxh3_128()
    for name, parameter in sorted(model.named_parameters()):
        digest.update(f"{name} {tuple(parameter.shape)}".encode())
        digest.update(parameter.detach().float().cpu().contiguous().numpy())
    return digest.hexdigest()


def recorded_controls(
    trainer: Any, train: Sequence[Sample], evaluation: Sequence[Sample]
) -> dict[str, Any]:
    """What runs of one seed must have in common to be comparable, read off the run itself.

    Corpus, tokenizer, order and number of steps determine the student's tokens.
    """
    tokenizer = trainer.processing_class.backend_tokenizer.to_str()
    return {
        "initial_student": trainer.initial_student,
        "tokenizer": hashlib.sha256(tokenizer.encode()).hexdigest(),
        "corpus": corpus_fingerprint(train),
        "evaluation": corpus_fingerprint(evaluation),
        "order": trainer.stream.order.fingerprint,
        "steps": trainer.state.global_step,
    }
