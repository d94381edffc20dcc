"""A student for others: in ONNX, if onnxruntime reproduces torch's logits, or on the hub."""

from __future__ import annotations

import os
import shutil
import tempfile
import warnings
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

from kvdistill.config.training import StudentConfig
from kvdistill.distill.student.build import build_student, load_student_tokenizer
from kvdistill.errors import MissingExtra, StudentError
from kvdistill.pipelines.evaluate import require_student_folder
from kvdistill.pipelines.merge_students import OF_ONE_RUN
from kvdistill.pipelines.run_folder import IN_THIS_FOLDER, RunFolder
from kvdistill.store.hub import hub_errors, hub_remedy

SHAPES: Final = ((2, 9), (1, 16), (3, 5))
"""``[B, T]`` that are compared; the first one is traced."""
TOLERANCE: Final = 1e-3
"""Largest difference of a logit, relative to the largest logit."""


def export_onnx(student: Path, output: Path) -> tuple[Path, float]:
    """Write ``output/model.onnx``: ``input_ids``, ``attention_mask [B, T]`` → ``logits [B, T, V]``.

    Without a cache: it scores samples, and generates one token per call. Batch and length are
    dynamic. The tokenizer and the config are copied beside it.

    Returns:
        The file, and its largest difference from torch, relative to the largest logit.

    Raises:
        MissingExtra: onnx, onnxscript or onnxruntime is not installed.
        StudentError: no student, ``output`` exists, or onnxruntime's logits differ from torch's.
    """
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as missing:
        raise MissingExtra(
            f"export --onnx needs the extra 'onnx' ({missing}): pip install 'kvdistill[onnx]'"
        ) from missing
    if output.exists():
        raise StudentError(f"{output} already exists; choose another name, or remove it first")
    require_student_folder(student)
    tokenizer = load_student_tokenizer(str(student))
    model = _LogitsOnly(build_student(StudentConfig(model=str(student)), tokenizer, seed=0).eval())
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=".onnx-") as staged:
        folder = Path(staged) / "model"
        folder.mkdir()
        _write_onnx(model, folder / "model.onnx")
        error = _largest_difference(model, folder / "model.onnx")
        if not error <= TOLERANCE:
            raise StudentError(
                f"{student}: onnxruntime's logits differ from torch's by {error:.2g} of the "
                f"largest one (expected at most {TOLERANCE}); nothing was written"
            )
        tokenizer.save_pretrained(folder)
        model.student.config.save_pretrained(folder)
        shutil.move(folder, output)
    return output / "model.onnx", error


def push_student(run: Path, repo: str, *, private: bool, license_id: str | None) -> str:
    """Upload a finished run's student and its card to the model ``repo`` of the hub, in one commit.

    A repository that does not exist is made, ``private`` or not. The card names ``repo`` and, if
    given, ``license_id``. Projectors and what only the run needs stay here.

    Returns:
        The address of the model.

    Raises:
        StudentError: no finished run, a damaged student, or the hub refuses or is not there.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    folder = RunFolder(run)
    if not folder.read_record().get("finished"):
        raise StudentError(
            f"{run}: not a finished run; `kvdistill train` with its config makes one"
        )
    require_student_folder(folder.student)
    card = (folder.student / "README.md").read_text(encoding="utf-8")
    if license_id is not None:
        card = card.replace("---\n", f"---\nlicense: {license_id}\n", 1)
    api = HfApi(endpoint=os.environ.get("HF_ENDPOINT"))
    try:
        made = api.create_repo(repo, private=private, exist_ok=True)
        card = card.replace(IN_THIS_FOLDER, made.repo_id)
        files = [path for path in folder.student.rglob("*") if path.is_file()]
        names = {path.relative_to(folder.student).as_posix(): path for path in files}
        operations = [CommitOperationAdd("README.md", card.encode())] + [
            CommitOperationAdd(name, names[name]) for name in sorted(names.keys() - set(OF_ONE_RUN))
        ]
        message = f"Student of {folder.read_record()['name']}, trained with kvdistill"
        api.create_commit(made.repo_id, operations, commit_message=message)
    except hub_errors() as error:
        raise StudentError(f"{repo}: {hub_remedy(error, 'model')}") from error
    return str(made)


class _LogitsOnly(nn.Module):
    """The student with tensors in and one tensor out, as the exporter requires."""

    def __init__(self, student: Any) -> None:
        super().__init__()
        self.student = student

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        output = self.student(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
        logits: Tensor = output.logits
        return logits


def _inputs(vocab_size: int, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Random token ids and a mask, both ``[B, T]``; the first sample has two tokens of padding."""
    generator = torch.Generator().manual_seed(shape[1])
    mask = torch.ones(shape, dtype=torch.long)
    if shape[0] > 1:
        mask[0, -2:] = 0
    return torch.randint(0, vocab_size, shape, generator=generator), mask


def _write_onnx(model: _LogitsOnly, path: Path) -> None:
    free = {0: torch.export.Dim("batch"), 1: torch.export.Dim("length")}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's own deprecations
        program: Any = torch.onnx.export(
            model,
            _inputs(model.student.config.get_text_config().vocab_size, SHAPES[0]),
            dynamo=True,
            verbose=False,
            input_names=["input_ids", "attention_mask"],
            output_names=["logits"],
            dynamic_shapes={"input_ids": free, "attention_mask": free},
        )
    program.save(str(path), external_data=True)  # one file holds 2 GB at most


@torch.inference_mode()
def _largest_difference(model: _LogitsOnly, path: Path) -> float:
    """Largest relative difference over all shapes, padding excluded."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    worst = 0.0
    for shape in SHAPES:
        ids, mask = _inputs(model.student.config.get_text_config().vocab_size, shape)
        wanted = model(ids, mask)[mask.bool()]
        (found,) = session.run(None, {"input_ids": ids.numpy(), "attention_mask": mask.numpy()})
        difference = torch.from_numpy(found)[mask.bool()] - wanted
        worst = max(worst, float(difference.abs().max() / wanted.abs().max()))
    return worst
