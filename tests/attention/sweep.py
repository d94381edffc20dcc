"""Every text model type of the installed transformers as teacher and student, in small.

    python -m tests.attention.sweep [TYPE ...]          examine, print a line each
    python -m tests.attention.sweep --write             examine all and write docs/model-types.md

A teacher is loaded from a folder as a user's is, and extracted, or refused in one line. What is
extracted, alone and in a padded batch, is compared with the model's own cache of each text alone,
or with what its attention is given where it has no such cache. A student is verified, its keys and
values are compared in the same way, and rewriting them with themselves must change no logit.
"""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from kvdistill.attention.adapters import QKV
from kvdistill.attention.geometry import VerifiedLayer, text_model
from kvdistill.attention.hooks import Site
from kvdistill.attention.kv_capture import KVCapture, verify_student
from kvdistill.attention.rotary import rotate
from kvdistill.attention.verification import CACHE
from kvdistill.corpus.samples import Sample
from kvdistill.errors import KVDistillError
from kvdistill.extract.extract_shard import extract_samples
from kvdistill.extract.teacher import Teacher, load_teacher
from kvdistill.extract.tokenise import collate_teacher_batch
from tests.attention.tiny_configs import small_model, text_types
from tests.extract.models import TEXTS, tiny_tokenizer
from tests.pipelines.test_teachers import make

PAGE = Path(__file__).parents[2] / "docs/model-types.md"
TOLERANCE = 5e-4
SECONDS = 240
STREAMS = ("encoder", "decoder", "cross")
SAMPLES = [
    Sample("a", (("prompt", TEXTS[0][:40]), ("rationale", TEXTS[1][:30]), ("answer", " 72"))),
    Sample("b", (("text", "Short."),)),
    Sample("c", (("prompt", TEXTS[2][:20]), ("answer", "!"))),
]


def teacher_outcome(folder: Path, model_type: str, stream: str | None) -> str:
    """``works …`` or ``refused: …``; anything else that is raised is a fault."""
    settings = {} if stream is None else {"stream": stream}
    try:
        notes = []
        try:
            teacher = load_teacher("t", make(folder, settings))
        except KVDistillError as error:
            if "extraction.importance" not in str(error):
                raise
            teacher = load_teacher("t", make(folder, settings, importance=False))
            notes = ["no importance"]
        extract_samples(teacher, SAMPLES, batch_tokens=4096)
    except KVDistillError as error:
        return refusal(str(error))
    if teacher.manifest.adapter == CACHE.name:
        notes = ["from its cache"]
    notes += ["encoder"] if teacher.manifest.kind == "encoder" else []
    if teacher.rule.alone or teacher.rule.padded_to is not None:
        notes.append("alone" if teacher.rule.alone else "batched by length")
    error = teacher_error(teacher)
    if not error <= TOLERANCE:
        return f"FAULT: wrong by {error:.1e}"
    return ", ".join(["works", *notes])


def teacher_error(teacher: Teacher) -> float:
    """Largest relative error of what is read in batches, against each text alone."""
    tokenised = teacher.tokenise(SAMPLES)
    lengths = [sample.num_tokens for sample in tokenised]
    found: dict[int, dict[int, QKV]] = {}
    for chosen in teacher.batches(lengths, 4096):
        layers: dict[int, QKV] = {}
        batch = collate_teacher_batch(tokenised, chosen, teacher.pad_id, teacher.device)
        teacher.run(batch, layers.__setitem__)
        for row, i in enumerate(chosen):
            cuts = {
                n: QKV(*(x[row : row + 1, :, : lengths[i]] for x in q)) for n, q in layers.items()
            }
            found[i] = cuts
    worst = 0.0
    for i, layers in found.items():
        alone = collate_teacher_batch(tokenised, [i], teacher.pad_id, teacher.device)
        read = Read(layers, teacher.layers, teacher.sites)
        by_cache = teacher.manifest.kind == "decoder"
        run = partial(teacher.forward, alone)
        worst = max(worst, read.error(teacher.model, alone.input_ids, run, by_cache=by_cache))
    return worst


@dataclass(frozen=True, eq=False)
class Read:
    """What the product has read of one text."""

    found: dict[int, QKV]
    layers: Sequence[VerifiedLayer]
    sites: Sequence[Site]

    def error(self, model: Any, ids: Tensor, run: Callable[[], Any], *, by_cache: bool) -> float:
        """Relative difference from the model's cache, or from what its attention is given."""
        if by_cache:
            try:
                error = difference(self.found, self.layers, cached(model, ids))
            except (NotEnough, TypeError, ValueError, AttributeError, IndexError, KeyError):
                error = float("inf")  # no cache of keys and values by layer
            if error < float("inf"):
                return error
        with recorded(self.sites) as seen:
            run()
        return difference(self.found, self.layers, seen)


class NotEnough(Exception):
    """A cache does not hold every token of every layer."""


@torch.no_grad()
def cached(model: Any, ids: Tensor) -> dict[int, tuple[Tensor, Tensor]]:
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    cache = DynamicCache(config=model.config)
    cache.layers = [DynamicLayer() if getattr(x, "is_sliding", False) else x for x in cache.layers]
    model(input_ids=ids, past_key_values=cache, use_cache=True)
    found = {
        layer_idx: (layer.keys, layer.values)
        for layer_idx, layer in enumerate(cache.layers)
        if isinstance(getattr(layer, "keys", None), Tensor) and layer.keys.ndim == 4
    }
    if not found or any(key.shape[2] != ids.shape[1] for key, _ in found.values()):
        raise NotEnough
    return found


@contextmanager
def recorded(sites: Sequence[Site]) -> Iterator[dict[int, tuple[Tensor, Tensor]]]:
    """Keys and values that every site's attention product is given."""
    seen: dict[int, tuple[Tensor, Tensor]] = {}
    running: list[int] = []
    original = F.scaled_dot_product_attention, torch.matmul

    def sdpa(query: Tensor, key: Tensor, value: Tensor, *args: Any, **options: Any) -> Tensor:
        if running:
            seen[running[-1]] = key, value  # rather than products of an indexer before it
        return original[0](query, key, value, *args, **options)

    products: list[tuple[Tensor, Tensor]] = []

    def matmul(one: Tensor, other: Tensor, **options: Any) -> Tensor:
        if running and one.ndim == 4 == other.ndim:
            products.append((one, other))
        return original[1](one, other, **options)

    def leave(*args: Any) -> None:
        if running[-1] not in seen and len(products) > 1:
            (_, key_transposed), (_, value) = products[-2:]  # an indexer's come before
            seen[running[-1]] = key_transposed.mT, value
        running.clear()
        products.clear()

    handles = []
    for site in sites:
        enter = lambda module, args, i=site.layer_idx: running.append(i)  # noqa: E731
        handles.append(site.attention.register_forward_pre_hook(enter))
        handles.append(site.attention.register_forward_hook(leave))
    F.scaled_dot_product_attention, torch.matmul = sdpa, matmul  # type: ignore[assignment]
    try:
        yield seen
    finally:
        F.scaled_dot_product_attention, torch.matmul = original  # type: ignore[assignment]
        for handle in handles:
            handle.remove()


def difference(
    found: dict[int, QKV],
    layers: Sequence[VerifiedLayer],
    reference: dict[int, tuple[Tensor, Tensor]],
) -> float:
    """Largest difference relative to the largest entry; infinite where nothing can be compared."""
    worst, compared = 0.0, 0
    for layer in layers:
        if layer.layer_idx not in reference:
            continue
        key, value = found[layer.layer_idx].key.float(), found[layer.layer_idx].value.float()
        if layer.rotary is not None:
            key = rotate(key, torch.arange(key.shape[2]), layer.rotary)
        for ours, theirs in zip((key, value), reference[layer.layer_idx], strict=True):
            repeats = theirs.shape[1] // ours.shape[1]
            same = ours.repeat_interleave(repeats, dim=1)
            if same.shape != theirs.shape:
                return float("inf")
            worst = max(worst, float((same - theirs).abs().max() / theirs.abs().max()))
        compared += 1
    return worst if compared == len(layers) else float("inf")


def student_outcome(model: Any) -> str:
    """``works``, or why not."""
    ids = torch.arange(3, 14)[None]
    try:
        verified = verify_student(model)
        capture = KVCapture(model)
        with torch.no_grad():
            before = model(input_ids=ids).logits
            with capture() as found:
                model(input_ids=ids, use_cache=False)
            try:
                with capture.rewriting(lambda own, layer, kind: own):
                    same = model(input_ids=ids, use_cache=False).logits
                with capture.rewriting(lambda own, layer, kind: own + 1.0):
                    other = model(input_ids=ids, use_cache=False).logits
            except KVDistillError:
                note, same, other = ", no injection", before, before + 1
            else:
                note = ""
    except KVDistillError as error:
        return refusal(str(error))
    layers = dict(zip((layer.layer_idx for layer in verified.layers), found, strict=True))
    inner = text_model(model)
    run = partial(inner, input_ids=ids, use_cache=False)
    error = Read(layers, verified.layers, verified.sites).error(inner, ids, run, by_cache=True)
    if not error <= TOLERANCE:
        return f"FAULT: wrong by {error:.1e}"
    if float((same - before).abs().max()) > 1e-4 * float(before.abs().max()):
        return "FAULT: rewriting keys and values with themselves changes the logits"
    if torch.equal(other, before):
        return "FAULT: rewriting keys and values changes nothing"
    return f"works{note}"


REASONS = {
    "an encoder cannot be a student": "an encoder",
    "the same heads in every layer": "heads differ between layers",
    "takes no position_ids": "no adapter fits, and its cache cannot be verified",
    "cannot be un-rotated": "no adapter fits, and its cache cannot be un-rotated",
    "holds no keys": "no adapter fits, and it has no cache of keys",
    "was not observed": "its attention product is not observed",
    "differ from the attention": "no adapter gives its queries, keys and values",
    "no list of layers": "no adapter has its modules",
    "no layer has": "no adapter has its modules",
    "reads other tokens": "it shifts its input",
    "has keys that no token changes": "its keys do not depend on its input",
    "behind the rotation": "keys cannot be read before the rotation",
    "failed in": "its code fails while it is verified",
}
"""Short forms of refusals, by what they contain; the first that fits."""


def refusal(line: str) -> str:
    """A refusal in a few words; more than one line is a fault."""
    if "\n" in line:
        return f"FAULT, not one line: {line!r}"
    return next((f"no: {r}" for part, r in REASONS.items() if part in line), f"no: {line}")


def examine(model_type: str) -> dict[str, str]:
    """Outcomes by role: ``teacher`` (or ``teacher, STREAM``) and ``student``."""
    base, headed = small_model(model_type)
    if base is None:
        return {"built": headed}
    outcomes: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        base.save_pretrained(folder / "t")
        tiny_tokenizer().save_pretrained(folder / "t")
        is_pair = base.config.is_encoder_decoder
        for stream in STREAMS if is_pair else (None,):
            role = "teacher" if stream is None else f"teacher, {stream}"
            outcomes[role] = guarded(lambda s=stream: teacher_outcome(folder, model_type, s))
    if headed is not None and not is_pair:
        outcomes["student"] = guarded(lambda: student_outcome(headed))
    return outcomes


def guarded(outcome: Callable[[], str]) -> str:
    try:
        return outcome()
    except Exception as error:  # what the sweep is there to find
        import traceback

        place = traceback.extract_tb(error.__traceback__)[-1]
        seen = " ".join(str(error).split())[:160]
        return (
            f"TRACEBACK {type(error).__name__}: {seen} ({Path(place.filename).name}:{place.lineno})"
        )


def in_a_process(model_type: str) -> dict[str, str]:
    """``examine`` in a forked process, ended after ``SECONDS``."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        signal.alarm(SECONDS)
        outcomes = {"all": guarded(lambda: repr(examine(model_type)))}
        os.write(writing, outcomes["all"].encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        text = pipe.read().decode()
    os.waitpid(child, 0)
    if not text:
        return {"all": f"FAULT: died, or took more than {SECONDS} s"}
    return dict(eval(text, {"__builtins__": {}})) if text.startswith("{") else {"all": text}


def sweep(types: Sequence[str]) -> Iterator[tuple[str, dict[str, str]]]:
    """Outcomes of every type, each in a process of its own."""
    import transformers

    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    examine("llama")  # imports what every forked process would import again
    for model_type in types:
        yield model_type, in_a_process(model_type)


def page(outcomes: dict[str, dict[str, str]]) -> str:
    """The page of the documentation: one row per type."""
    import transformers

    rows, unbuilt = [], []
    for model_type, found in outcomes.items():
        if "built" in found:
            unbuilt.append(f"`{model_type}`")
            continue
        streams = {stream: found[f"teacher, {stream}"] for stream in STREAMS if
                   f"teacher, {stream}" in found}  # fmt: skip
        same = len(set(streams.values())) == 1
        teacher = found.get("teacher") or "; ".join(
            f"{'every stream' if same else stream} {outcome}"
            for stream, outcome in list(streams.items())[: 1 if same else None]
        )
        rows.append(f"| `{model_type}` | {teacher} | {found.get('student', '')} |")
    works = sum("works" in row for row in rows)
    return HEAD.format(
        version=transformers.__version__, rows="\n".join(rows), num=len(rows), works=works,
        unbuilt=", ".join(unbuilt),
    )  # fmt: skip


HEAD = """# Model types

Every text model type of transformers {version} that can be built small, with random weights:
{num} types, of which {works} can be a teacher or a student. What works was extracted in float32,
alone and in a padded batch, and equals the model's own cache (or, for encoders and caches of
another kind, what its attention is given) to 5e-4 of the largest entry. As a student, its captured
keys and values equal them too, and rewriting them with themselves changes no logit. What does not
work is refused in one line. An encoder-decoder is up to three teachers
([streams](teachers.md#encoder-decoders)).

*No importance*: set `extraction.importance: false`. *From its cache*: no adapter fits; float32
only, without importance and hidden states. *Batched by length*: padding would change its keys, so
only texts of one length share a batch. `python -m tests.attention.sweep --write` writes this page,
and a slow test compares it.

| model type | as teacher | as student |
|---|---|---|
{rows}

Not built: {unbuilt}.
"""


def main(arguments: list[str]) -> None:
    torch.set_num_threads(1)
    outcomes = {}
    for model_type, found in sweep([a for a in arguments if a[0] != "-"] or text_types()):
        outcomes[model_type] = found
        for role, outcome in found.items():
            print(f"{model_type:22s} {role:17s} {outcome}", flush=True)
    if "--write" in arguments:
        PAGE.write_text(page(outcomes), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
