"""Download of everything that an experiment needs from a hub, for offline compute nodes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from kvdistill.attention.model_folder import loading_fault
from kvdistill.config.experiment import Experiment
from kvdistill.corpus.readers import load_corpus
from kvdistill.errors import TeacherError

TOKENIZER_FILES: Final = ("*.json", "*.txt", "*.model", "*.jinja")
MODEL_FILES: Final = (*TOKENIZER_FILES, "*.safetensors")  # no pickles


@dataclass(frozen=True)
class Need:
    """A model, tokenizer or data set that the config names."""

    kind: Literal["model", "tokenizer", "dataset"]
    source: str
    revision: str | None = None
    files: tuple[str, ...] = ()


def fetch(
    experiment: Experiment, report: Callable[[Need, str], None] = lambda need, state: None
) -> list[Need]:
    """Download what is not local; ``report`` is called before and after each.

    Raises:
        TeacherError: a model or tokenizer is missing, gated or unreachable.
        CorpusError, MissingExtra: the data set cannot be loaded.
    """
    wanted = needs(experiment)
    for need in wanted:
        if need.kind == "dataset":
            report(need, "fetching")
            load_corpus(experiment.corpus)
        elif not Path(need.source).exists():
            report(need, "fetching")
            _download(need)
        report(need, "on this machine")
    return wanted


def needs(experiment: Experiment) -> list[Need]:
    """Every model, tokenizer and data set that the config names, once each."""
    sources = experiment.corpus.sources.values()
    found = [Need("dataset", source.dataset) for source in sources if source.dataset is not None]
    for teacher in experiment.teachers.values():
        code = ("*.py",) if teacher.trust_remote_code else ()
        weights = (teacher.gguf_file, *TOKENIZER_FILES) if teacher.gguf_file else MODEL_FILES
        found.append(Need("model", teacher.model, teacher.revision, (*weights, *code)))
        if teacher.tokenizer is not None:
            found.append(Need("tokenizer", teacher.tokenizer, None, TOKENIZER_FILES))
    student = experiment.student
    if student.model is not None:
        found.append(Need("model", student.model, None, MODEL_FILES))
    if student.tokenizer is not None:
        found.append(Need("tokenizer", student.tokenizer, None, TOKENIZER_FILES))
    return list(dict.fromkeys(found))


def _download(need: Need) -> None:
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        huggingface_hub.snapshot_download(
            need.source, revision=need.revision, allow_patterns=list(need.files)
        )
    except (OSError, HfHubHTTPError, HFValidationError) as error:
        remedy = "check the name and the network; gated models need `hf auth login`"
        fault = loading_fault(need.source, error, remedy=remedy)
        raise TeacherError(f"cannot fetch {need.kind} {need.source!r}: {fault}") from error
