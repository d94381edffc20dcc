"""What a run leaves behind: its folder, its record, and the model card of its student.

RUN/config.yaml           the whole experiment, defaults included
RUN/run.json              provenance; ``finished``, the final metrics and checksums once it is
RUN/training_log.jsonl    one object per log
RUN/training.log          the same as text, warnings included
RUN/tensorboard/          the same for TensorBoard
RUN/checkpoint-*/         to resume from
RUN/best/                 the best student so far, while the run goes on
RUN/student/              the final student: a Hugging Face folder, and its checksums
RUN/eval_samples.jsonl    the final evaluation, one object per held-out sample
RUN/diagnostics.json      layer maps, an alignment, per-layer errors, for the report
RUN/report.html           that `kvdistill run` ends with; its tables beside it
"""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import Any, Final

import yaml

from kvdistill import provenance
from kvdistill.config.base import current_names
from kvdistill.config.experiment import Experiment
from kvdistill.config.load import dump_experiment, flatten, parse_experiment
from kvdistill.config.yaml_text import parse_yaml
from kvdistill.errors import ConfigError, KVDistillError, RunFolderError
from kvdistill.store.commit import file_record, folder_fault, replace_file
from kvdistill.store.format import COMMIT
from kvdistill.store.manifest import TeacherManifest, sealed_json, unsealed_json
from kvdistill.text import markdown_text, shorten

log = logging.getLogger(__name__)


UNWRITABLE: Final = {
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO,
    errno.EISDIR, errno.ENOTDIR,
}  # fmt: skip


class RunFolder:
    """Every path of one run, listed above."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.yaml"
        self.record = path / "run.json"
        self.log = path / "training_log.jsonl"
        self.human_log = path / "training.log"
        self.best = path / "best"
        self.student = path / "student"
        self.eval_samples = path / "eval_samples.jsonl"
        self.diagnostics = path / "diagnostics.json"

    def read_record(self) -> dict[str, Any]:
        """``run.json``; empty if the run has not begun."""
        if not self.record.is_file():
            return {}
        try:
            return unsealed_json(self.record.read_bytes())
        except ValueError as error:
            raise ConfigError(
                f"{self.record}: expected a JSON object as it was written: {error}; remove this "
                "file to train the run again from its last checkpoint"
            ) from None

    def checkpoint(self, *, remove_changed: bool = False) -> Path | None:
        """The newest checkpoint that is complete and unchanged; warns of those that it skips."""
        named = (p for p in self.path.glob("checkpoint-*") if p.name.split("-", 1)[1].isdecimal())
        for path in sorted(named, key=lambda path: -int(path.name.split("-")[1])):
            fault = folder_fault(path)
            if fault is None:
                return path
            log.warning("%s is not resumed from: %s", path, fault)
            if remove_changed and (path / COMMIT).is_file():
                shutil.rmtree(path, ignore_errors=True)
        return None

    def write_record(self, record: dict[str, Any]) -> None:
        """Replace ``run.json`` in one step."""
        replace_file(self.record, sealed_json(record))

    def read_config(self) -> dict[str, Any]:
        """``config.yaml`` under the settings' names of today; ConfigError if it is damaged."""
        try:
            return current_names(parse_yaml(self.config.read_text(encoding="utf-8")), warn=False)
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise ConfigError(
                f"{self.config}: {shorten(str(error))}; restore it from a copy, or remove it to "
                "go on with the config in hand"
            ) from None

    def file_records(self) -> dict[str, Any]:
        """Sizes and checksums of what a report reads, for the record of a finished run."""
        read = (self.config, self.log, self.eval_samples, self.diagnostics)
        return {path.name: file_record(path).model_dump() for path in read if path.is_file()}


@contextmanager
def writing(folder: RunFolder) -> Iterator[None]:
    """Turn a write that fails, in whichever library, into one line.

    Raises:
        RunFolderError: the disk is full, or the folder cannot be written.
    """
    try:
        yield
    except Exception as error:
        reason = str(error).split("\n")[0]
        # safetensors gives no number, and torch whatever its writer or the C++ library says.
        failed = getattr(error, "errno", 0) in UNWRITABLE or "os error" in reason
        if isinstance(error, KVDistillError) or not (failed or _of_torch_save(error)):
            raise
        raise RunFolderError(
            f"{folder.path}: cannot be written ({reason}); committed checkpoints are unchanged: "
            "free space or fix permissions, then run the same command again to resume"
        ) from error


def _of_torch_save(error: Exception) -> bool:
    """Whether ``torch.save`` raised it while it wrote."""
    calls = traceback.extract_tb(error.__traceback__)
    return isinstance(error, RuntimeError) and any(
        call.name == "save" and call.filename.endswith("torch/serialization.py") for call in calls
    )


def begin(experiment: Experiment) -> RunFolder:
    """Open or create the folder of a run.

    Raises:
        ConfigError: the folder holds a run of another configuration.
    """
    folder = RunFolder(experiment.output_dir / experiment.name)
    if os.environ.get("RANK", "0") != "0":
        return folder  # torchrun starts all ranks at once; rank 0 alone writes the record
    if folder.config.is_file() and folder.config.stat().st_size:
        refuse_other_config(folder, experiment)
    else:
        replace_file(folder.config, dump_experiment(experiment))
    record = folder.read_record()
    if not record.get("finished"):
        attempts = [*record.get("attempts", []), provenance.describe()]
        head = {"name": experiment.name, "seed": experiment.seed, "finished": False}
        folder.write_record(record | head | {"attempts": attempts})
        folder.checkpoint(remove_changed=True)
    return folder


def refuse_other_config(folder: RunFolder, experiment: Experiment) -> None:
    """Refuse a folder whose run has another configuration, but for ``slurm`` and ``report_to``.

    Raises:
        ConfigError: names the folder, the setting and both values.
    """
    # Parsed as a config, so that settings of a later version have their defaults.
    earlier = parse_experiment(folder.read_config())
    stored = flatten(earlier.model_dump(mode="json"))
    expected = flatten(experiment.model_dump(mode="json"))
    if experiment.training.precision == "auto":  # the run keeps to what it began with
        expected["training.precision"] = stored["training.precision"]
    for name, teacher in experiment.teachers.items():
        if teacher.dtype == "auto" and name in earlier.teachers:  # what the store has
            expected[f"teachers.{name}.dtype"] = stored[f"teachers.{name}.dtype"]
    # These change no number, and may change between two attempts.
    keys = {key for key in stored | expected if not key.startswith(("slurm.", "report_to"))}
    different = sorted(key for key in keys if stored.get(key) != expected.get(key))
    if different:
        key = different[0]
        more = f" (and {len(different) - 1} more)" if len(different) > 1 else ""
        raise ConfigError(
            f"{folder.path} holds a run with {key}={stored.get(key)!r}, this config has "
            f"{expected.get(key)!r}{more}; choose another name (--set name=…) or remove the folder"
        )


def learned(folder: RunFolder) -> dict[str, str]:
    """A finished run's held-out figures, each with what it is to be compared with, if known.

    That is its first evaluation, and a finished run beside it that learned the same text in the
    same order from the same start without teachers. Empty where rank 0 has yet to write them.
    """
    record, found, rows = folder.read_record(), dict[str, str](), list[dict[str, Any]]()
    if not record.get("finished"):
        return {}
    other = text_alone(folder)
    alone = None if other is None else other.read_record()
    with suppress(OSError, ValueError):  # a log that cannot be read is no comparison
        rows = [json.loads(line) for line in folder.log.read_text(encoding="utf-8").splitlines()]
    for name, value in record["metrics"].items():
        if name not in ("eval_perplexity", "eval_bits_per_character", "eval_exact_match"):
            continue
        before = (row for row in rows if name in row and row["step"] < record["steps"])
        notes = [f"{row[name]:.4g} after {row['step']} steps" for row in islice(before, 1)]
        if alone is not None and name in alone["metrics"]:
            notes.append(f"{alone['metrics'][name]:.4g} without teachers in {alone['name']}")
        shown = name.removeprefix("eval_").replace("_", " ")
        found[shown] = f"{value:.4g}" + (f" ({'; '.join(notes)})" if notes else "")
    return found


def text_alone(folder: RunFolder) -> RunFolder | None:
    """A finished run without teachers in the same parent folder that this one compares with."""
    record = folder.read_record()
    if not parse_experiment(folder.read_config()).losses.uses_teachers:
        return None
    for path in sorted(folder.path.parent.glob("*/run.json")):
        other = RunFolder(path.parent)
        with suppress(KVDistillError, OSError):  # a folder that cannot be read is no comparison
            found = other.read_record()
            equal = found.get("finished") and found.get("controls") == record.get("controls")
            if equal and not parse_experiment(other.read_config()).losses.uses_teachers:
                return other
    return None


IN_THIS_FOLDER: Final = "path/to/this/folder"
_HOW_TO_LOAD: Final = f"""\
## How to load it
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

student = AutoModelForCausalLM.from_pretrained("{IN_THIS_FOLDER}")
tokenizer = AutoTokenizer.from_pretrained("{IN_THIS_FOLDER}")
```"""
_HOW_TO_LOAD_LATENT: Final = """

Its latent reasoning needs `kvdistill.LatentStudent.from_pretrained`."""


def model_card(
    experiment: Experiment,
    teachers: Mapping[str, TeacherManifest],
    corpus_fingerprint: str,
    record: Mapping[str, Any],
) -> str:
    """README.md of a student's folder, with the hub's front matter.

    ``teachers`` are those whose keys and values were used, ``record`` is the finished run's.
    """
    last = record["attempts"][-1]
    corpus = experiment.corpus
    sources = [c.dataset or (c.path and c.path.name) for c in (corpus, *corpus.parts.values())]
    origin = {
        "corpus": ", ".join(markdown_text(source) for source in sources if source),
        "its samples": f"`{corpus_fingerprint[:12]}` (SHA-256)",
        "command": markdown_text(last["command"]),
        "commit": last["git_commit"] or "–",
        "started": last["started"],
        **last["versions"],
    }
    metrics = {
        name.removeprefix("eval_").replace("_", " "): f"{value:.6g}"
        for name, value in record["metrics"].items()
    }
    base = experiment.student.model
    on_hub = base is not None and not Path(base).exists()
    parts = [
        card_head(experiment.name, {"base_model": base} if base is not None and on_hub else {}),
        _summary(experiment, teachers),
        _HOW_TO_LOAD + (_HOW_TO_LOAD_LATENT if experiment.latent is not None else ""),
        _teacher_section(teachers),
        _training_section(experiment, record),
        markdown_table("Held-out samples", metrics) if metrics else "",
        "## Licence\n\nThe terms of what this was made from apply: the models above, and the "
        "corpus. A field `license` is the uploader's choice.",
        markdown_table("Provenance", origin),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def card_head(title: str, more: Mapping[str, str]) -> str:
    """The hub's front matter, with ``more`` of it, and the heading."""
    head = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["kvdistill", "knowledge-distillation", "kv-cache"],
        **more,
    }
    return f"---\n{yaml.safe_dump(head, sort_keys=False)}---\n\n# {title}"


def _summary(experiment: Experiment, teachers: Mapping[str, TeacherManifest]) -> str:
    student = experiment.student
    start = "from scratch" if student.model is None else f"from {markdown_text(student.model)}"
    if student.lora is not None:
        start += f", with LoRA of rank {student.lora.rank} merged into its weights"
    source = "on text alone, without teachers"
    if teachers:
        source = f"through the key/value caches of {', '.join(teachers)}"
    return f"A language model trained with kvdistill {start}, {source}."


def _teacher_section(teachers: Mapping[str, TeacherManifest]) -> str:
    if not teachers:
        return ""
    rows = [
        f"| {name} | {markdown_text(t.model)} | {markdown_text(t.revision or '–')} | "
        f"{len(t.layers)} | {t.codec.key}/{t.codec.value} | `{t.weights_fingerprint[:12]}` |"
        for name, t in teachers.items()
    ]
    columns = ("name", "model", "revision", "layers", "codec (keys/values)", "weights")
    head = f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}"
    return "\n".join(["## Teachers", "", head, *rows])


def _training_section(experiment: Experiment, record: Mapping[str, Any]) -> str:
    training = experiment.training
    weights = {name: weight for name, weight in experiment.losses.weights().items() if weight}
    rows = {
        "losses": ", ".join(f"{weight:g} · {name}" for name, weight in weights.items()),
        "projection": experiment.projection.mode,
        "fusion": experiment.fusion.method,
        "steps": record["steps"],
        "batch": f"{training.batch_size} × {training.gradient_accumulation_steps}",
        "learning rate": f"{training.learning_rate:g}, {training.schedule}",
        "precision": training.precision,
        "seed": experiment.seed,
        "seconds": f"{record['seconds']:.0f}",
    }
    if record.get("best"):
        rows["best step"] = record["best"]["step"]
    return markdown_table("Training", rows)


def markdown_table(title: str, rows: Mapping[str, Any]) -> str:
    """A section of two columns without heads."""
    lines = [f"| {name} | {value} |" for name, value in rows.items()]
    return "\n".join([f"## {title}", "", "| | |", "|---|---|", *lines])
