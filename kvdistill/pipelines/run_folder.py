"""A run's folder: what was asked, by which software, how it went, and whether it is finished.

RUN/config.yaml           the whole experiment, defaults included
RUN/run.json              provenance; ``finished`` and the final metrics once it is
RUN/training_log.jsonl    one object per log
RUN/training.log          the same for people, warnings included
RUN/tensorboard/          the same for TensorBoard
RUN/checkpoint-*/         to resume from
RUN/best/                 the best student so far, while the run goes on
RUN/student/              the final student: an ordinary Hugging Face folder
RUN/eval_samples.jsonl    the final evaluation, one object per held-out sample
RUN/diagnostics.json      layer maps, an alignment, per-layer errors, for the report
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from kvdistill import provenance
from kvdistill.config.base import current_names
from kvdistill.config.experiment import Experiment
from kvdistill.config.load import dump_experiment, flatten, parse_experiment
from kvdistill.errors import ConfigError


@dataclass(frozen=True)
class RunFolder:
    """Every path of one run."""

    path: Path

    @property
    def config(self) -> Path:
        """The experiment that the run was made from."""
        return self.path / "config.yaml"

    @property
    def record(self) -> Path:
        """Provenance and outcome."""
        return self.path / "run.json"

    @property
    def log(self) -> Path:
        """One JSON object per log of the trainer."""
        return self.path / "training_log.jsonl"

    @property
    def human_log(self) -> Path:
        """The same for people, with warnings."""
        return self.path / "training.log"

    @property
    def student(self) -> Path:
        """The final student."""
        return self.path / "student"

    @property
    def best(self) -> Path:
        """The best student so far, while the run goes on."""
        return self.path / "best"

    @property
    def eval_samples(self) -> Path:
        """The final evaluation, sample by sample."""
        return self.path / "eval_samples.jsonl"

    @property
    def diagnostics(self) -> Path:
        """What the report draws."""
        return self.path / "diagnostics.json"

    def read_record(self) -> dict[str, Any]:
        """``run.json``, or nothing if the run has not begun."""
        if not self.record.is_file():
            return {}
        record: dict[str, Any] = json.loads(self.record.read_text(encoding="utf-8"))
        return record

    def checkpoint(self) -> Path | None:
        """The newest checkpoint, if there is one."""
        found = [p for p in self.path.glob("checkpoint-*") if (p / "trainer_state.json").is_file()]
        return max(found, key=lambda path: int(path.name.split("-")[1]), default=None)

    def write_record(self, record: dict[str, Any]) -> None:
        """Replace ``run.json`` in one step."""
        staged = self.record.with_suffix(".tmp")
        staged.write_text(json.dumps(record, indent=1), encoding="utf-8")
        staged.replace(self.record)


def begin(experiment: Experiment) -> RunFolder:
    """Open or create the folder of a run.

    Raises:
        ConfigError: the folder holds a run of another configuration.
    """
    folder = RunFolder(experiment.output_dir / experiment.name)
    if os.environ.get("RANK", "0") != "0":
        return folder  # torchrun's other ranks start at the same moment; the first keeps the books
    if folder.config.is_file():
        refuse_other_config(folder, experiment)
    else:
        folder.path.mkdir(parents=True, exist_ok=True)
        folder.config.write_text(dump_experiment(experiment), encoding="utf-8")
    record = folder.read_record()
    if not record.get("finished"):
        attempts = [*record.get("attempts", []), provenance.describe()]
        folder.write_record(
            {
                "name": experiment.name,
                "seed": experiment.seed,
                "finished": False,
                "attempts": attempts,
            }
        )
    return folder


def refuse_other_config(folder: RunFolder, experiment: Experiment) -> None:
    """See to it that a folder's run is of this configuration; Slurm's settings do not count.

    Raises:
        ConfigError: names the folder, the setting and both values.
    """
    # Read as a config, so that settings which a later version added have their defaults.
    written = yaml.safe_load(folder.config.read_text(encoding="utf-8"))
    earlier = parse_experiment(current_names(written, warn=False))
    stored = flatten(earlier.model_dump(mode="json"))
    asked = flatten(experiment.model_dump(mode="json"))
    # What is asked of Slurm changes no number, and may change between two tries.
    keys = {key for key in stored | asked if not key.startswith("slurm.")}
    different = sorted(key for key in keys if stored.get(key) != asked.get(key))
    if different:
        key = different[0]
        more = f" (and {len(different) - 1} more)" if len(different) > 1 else ""
        raise ConfigError(
            f"{folder.path} holds a run with {key}={stored.get(key)!r}, this config has "
            f"{asked.get(key)!r}{more}; choose another name (--set name=…) or remove the folder"
        )
