"""Rate and distortion of every codec on a real model's keys and values.

    python benchmarks/codecs.py --model models/smollm2 --corpus gsm8k/train.jsonl --samples 16 \
        --domain code=code.jsonl --domain zh=poems.jsonl

Rate: bits per stored element, scales and exact tokens included, as written by the zarr backend (in
brackets: by the safetensors backend). Bases of ``klt`` belong to a teacher, not to tokens; their
size is printed apart. Distortion: the effect of the decoded keys and values inside the model:

    tensor     relative error of keys and of values, first tokens left out
    attention  relative error of the attention output (before the output projection); the inputs of
               each layer are those of the unmodified model; mean over layers
    KL, ΔNLL   decoders only. All layers replaced at once: divergence of the next-token distribution
               from that of the unmodified model, and change of the text's negative log-likelihood

``klt`` is fitted on samples of the corpus after the first ``--samples``, which are measured. Every
``--domain`` is measured with the same bases.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from kvdistill.attention.adapters import QKV
from kvdistill.attention.kv_capture import KVCapture
from kvdistill.config.load import parse_experiment
from kvdistill.corpus.readers import read_files
from kvdistill.corpus.samples import Sample
from kvdistill.extract.encode import read_pilot
from kvdistill.extract.teacher import Teacher, load_teacher
from kvdistill.pipelines.store_options import CodecTrial, captured
from kvdistill.store.codecs import codec_of
from kvdistill.store.codecs.parts import part_name
from kvdistill.store.format import Counts, shard_arrays
from kvdistill.store.open_shard import BACKENDS
from kvdistill.types import KINDS, CodecSpec, Kind

PAIRS = (
    ("bf16", "bf16"), ("fp16", "fp16"), ("int8", "int8"), ("fp8_e4m3", "fp8_e4m3"),
    ("int8", "int4"), ("int4", "int8"), ("int4", "int4"),
)  # fmt: skip


@dataclass
class Clean:
    """One text: its tokens, and what the unmodified model computes."""

    input_ids: Tensor
    states: dict[int, QKV]
    log_probs: Tensor | None


def run_clean(teacher: Teacher, head: Any, sample: Sample) -> Clean:
    (tokens,) = teacher.tokenise([sample], 512)
    ids = torch.from_numpy(tokens.token_ids.astype(np.int64))[None]
    log_probs = None if head is None else head(ids).logits[0].log_softmax(-1)
    return Clean(ids, captured(teacher, tokens), log_probs)


def stacked(states: Mapping[int, QKV], kind: Kind) -> Tensor:
    """Keys or values of all layers, ``[L, H, T, D]``."""
    return torch.cat([getattr(qkv, kind) for qkv in states.values()])


def measure(trial: CodecTrial, texts: Sequence[Clean], head: Any) -> str:
    """Errors and effects over some texts, as cells of a row."""
    tensor = {kind: np.zeros(2) for kind in KINDS}
    kl, nll, count = 0.0, 0.0, 0
    for clean in texts:
        states = trial.add(clean.states)
        decoded: dict[Kind, Tensor] = {kind: stacked(states, kind) for kind in KINDS}
        for kind in KINDS:
            want = stacked(clean.states, kind)[:, :, 1:]
            error = decoded[kind][:, :, 1:] - want
            tensor[kind] += [float(error.square().sum()), float(want.square().sum())]
        if head is not None and clean.log_probs is not None:
            log_probs = rewritten(head, clean.input_ids, decoded)
            kl += float((clean.log_probs.exp() * (clean.log_probs - log_probs)).sum())
            target = clean.input_ids[0, 1:, None]
            nll += float((clean.log_probs - log_probs)[:-1].gather(-1, target).sum())
            count += clean.input_ids.shape[1]
    errors = [f"{(error / norm) ** 0.5:.2%}" for error, norm in tensor.values()]
    errors.append(f"{trial.error(list(texts[0].states)):.2%}")
    effect = f"{kl / count:.1e} | {nll / count:+.4f}" if count else "– | –"
    return f"{' | '.join(errors)} | {effect}"


def bits(trial: CodecTrial, texts: Sequence[Clean]) -> tuple[float, float]:
    """Per element, in zarr and in safetensors."""
    tokens = [clean.input_ids.shape[1] for clean in texts]
    counts = Counts(len(texts), sum(tokens), sum(-(-n // 64) for n in tokens))
    arrays, elements = {}, 0
    for kind in KINDS:
        codec = codec_of(trial.spec, kind, trial.transforms)
        encoded = [codec.encode(stacked(clean.states, kind), kind) for clean in texts]
        elements += sum(stacked(clean.states, kind).numel() for clean in texts)
        for part in codec.parts(kind):
            pieces = [parts[part.suffix] for parts in encoded]
            arrays[part_name(kind, part.suffix)] = torch.cat(pieces, dim=2).numpy()
    specs = {n: x for n, x in shard_arrays(trial.teacher.manifest, counts).items() if n in arrays}
    sizes = []
    for backend in BACKENDS.values():
        with tempfile.TemporaryDirectory() as folder:
            backend.write(Path(folder), arrays, specs, {})
            files = (path for path in Path(folder).rglob("*") if path.is_file())
            data = (path for path in files if path.name != "zarr.json")
            sizes.append(8 * sum(path.stat().st_size for path in data) / elements)
    return sizes[0], sizes[1]


def rewritten(head: Any, input_ids: Tensor, decoded: Mapping[Kind, Tensor]) -> Tensor:
    """Log-probabilities of the model with all keys and values replaced."""
    with KVCapture(head).rewriting(lambda _, layer, kind: decoded[kind][layer][None]):
        return head(input_ids).logits[0].log_softmax(-1)


def rated(text: str, block_layers: int) -> CodecSpec:
    key_bits, value_bits = map(float, text.split("/"))
    return CodecSpec(
        key="klt", value="klt", key_bits=key_bits, value_bits=value_bits, block_layers=block_layers
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--domain", action="append", default=[], help="name=file.jsonl")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--klt", default="0.6/1.1,1.2/1.8,1.7/2.5,3/4,4.3/5.3", help="K/V bits, …")
    parser.add_argument("--block-layers", type=int, default=10)
    parser.add_argument("--pilot-tokens", type=int, default=16_384)
    parser.add_argument("--only-klt", action="store_true")
    arguments = parser.parse_args()
    torch.set_grad_enabled(False)
    experiment = parse_experiment(
        {
            "store": "unused",
            "corpus": {"path": str(arguments.corpus)},
            "teachers": {"t": {"model": str(arguments.model)}},
            "student": {"model": str(arguments.model)},
            "extraction": {
                "device": "cpu", "importance": False,
                "codec": {"key": "klt", "value": "klt", "pilot_tokens": arguments.pilot_tokens},
            },
        }
    )  # fmt: skip
    teacher = load_teacher("t", experiment)
    head = None
    if teacher.manifest.kind == "decoder":
        head = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32).eval()
    corpus = list(itertools.islice(read_files(arguments.corpus), 4000))
    domains = {"own": corpus[: arguments.samples]}
    for name, _, path in (each.partition("=") for each in arguments.domain):
        domains[name] = list(itertools.islice(read_files(Path(path)), arguments.samples))
    texts = {name: [run_clean(teacher, head, s) for s in some] for name, some in domains.items()}
    pilot = read_pilot(teacher, corpus[arguments.samples :], 4096)
    specs = [] if arguments.only_klt else [CodecSpec(key=k, value=v) for k, v in PAIRS]
    specs += [rated(text, arguments.block_layers) for text in arguments.klt.split(",")]
    print("| K / V | bits | bases, MB | text | K error | V error | attention | KL | ΔNLL |")
    print("|---|---|---|---|---|---|---|---|---|")
    for spec in specs:
        trial = CodecTrial(teacher, spec, pilot)
        name = f"{spec.key} / {spec.value}"
        if spec.transforms:
            name = f"klt {spec.key_bits} / {spec.value_bits}"
        zarr_bits, plain_bits = bits(trial, texts["own"])
        head_of_row = (
            f"| {name} | {zarr_bits:.2f} ({plain_bits:.2f}) | {trial.basis_bytes / 1e6:.1f}"
        )
        for domain, cleans in texts.items():
            trial.squares.clear()
            print(f"{head_of_row} | {domain} | {measure(trial, cleans, head)} |", flush=True)


if __name__ == "__main__":
    main()
