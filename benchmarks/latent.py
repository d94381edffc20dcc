"""Latent reasoning on multi-step arithmetic: students with latents against a teacher that writes.

    python benchmarks/latent.py --folder /tmp/latent             # everything; run again to resume
    python benchmarks/latent.py --folder /tmp/latent --table     # results so far

A teacher is trained to write out every step but the last of ``7+3*4`` (evaluated from left to
right, modulo 10) before the answer, and extracted once. Every arm then starts from the teacher's
weights and takes the same number of steps over the same texts in the same order; arms differ only
in the settings listed in ``ARMS``. Students of one seed share data order and initial latents. There
is one JSON file per arm and seed: once the teacher exists, several processes can share the work
(``--seeds``, ``--arms``), and a restart continues where the last one stopped.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from scipy import stats

from kvdistill.config.experiment import Experiment
from kvdistill.config.load import parse_experiment
from kvdistill.corpus.readers import read_files
from kvdistill.corpus.recipes import arithmetic_samples
from kvdistill.corpus.samples import Sample
from kvdistill.distill.evaluate.held_out import generate_and_grade, latent_exact_match
from kvdistill.distill.student.build import character_tokenizer, load_student_tokenizer
from kvdistill.distill.student.latent.model import LatentStudent
from kvdistill.distill.student.latent.probes import tamper_with
from kvdistill.pipelines.extract import extract
from kvdistill.pipelines.extract_tasks import prepare_store
from kvdistill.pipelines.train import train

LATENT_LOSSES = {"losses": {"codi": 10.0}}
KAVA = {"losses": {"codi": 10.0, "key": 0.5, "value": 0.5, "layer_std": True}}
ARMS: dict[str, dict[str, Any]] = {
    "answer only": {"latent": {"method": "none"}},
    "pause tokens": {"latent": {"method": "pause"}},
    "CODI": {**LATENT_LOSSES, "latent": {"method": "codi"}},
    "PCCoT": {**LATENT_LOSSES, "latent": {"method": "pccot"}},
    "KaVa, R-KV": {**KAVA, "latent": {"eviction": {"method": "rkv"}}},
    "KaVa, random": {**KAVA, "latent": {"eviction": {"method": "random"}}},
    "KaVa, shuffled targets": {**KAVA, "latent": {"shuffle_targets": True}},
    "full CoT": {"alignment": {"time": "tokens"}, "losses": {"cross_entropy_prompt": False}},
}


CONTRASTS = [
    ("pause tokens", "answer only"),
    ("PCCoT", "pause tokens"),
    ("PCCoT", "CODI"),
    ("KaVa, R-KV", "PCCoT"),
    ("KaVa, R-KV", "KaVa, random"),
    ("KaVa, R-KV", "KaVa, shuffled targets"),
]


@dataclass(frozen=True)
class Size:
    """Size of the experiment."""

    steps: int = 2
    modulus: int = 10
    samples: int = 2800
    held_out: int = 400
    hidden: int = 64
    layers: int = 3
    teacher_steps: int = 700
    student_steps: int = 400
    batch: int = 64
    latents: int = 3
    iterations: int = 2


QUICK = Size(
    steps=2, modulus=5, samples=96, held_out=20, hidden=16, layers=2, teacher_steps=6,
    student_steps=4, batch=16, latents=3, iterations=2,
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--quick", action="store_true", help="smoke test of one minute")
    parser.add_argument("--table", action="store_true", help="only print results so far")
    for name, default in asdict(Size()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, help=f"default {default}")
    options = parser.parse_args()
    base = asdict(QUICK if options.quick else Size())
    size = Size(**{k: v if getattr(options, k) is None else getattr(options, k)
                   for k, v in base.items()})  # fmt: skip
    if not options.table:
        torch.set_num_threads(1)
        make_teacher(options.folder, size)
        for seed in options.seeds:
            for arm in options.arms:
                run_arm(options.folder, size, arm, seed)
    print(table(options.folder))


def make_teacher(folder: Path, size: Size) -> None:
    """Create corpus, tokenizer, teacher and store, each once."""
    texts = folder / "corpus.jsonl"
    if not texts.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        chains = arithmetic_samples(
            size.samples + size.held_out, steps=size.steps, modulus=size.modulus, drop_last=True
        )
        character_tokenizer(c.text for c in chains).save_pretrained(str(folder / "tokenizer"))
        (folder / "held-out.jsonl").write_text(_lines(chains[size.samples :]), encoding="utf-8")
        texts.write_text(_lines(chains[: size.samples]), encoding="utf-8")
    experiment = teacher_experiment(folder, size)
    prepare_store(experiment)
    train(experiment)
    extract(student_experiment(folder, size, "KaVa, R-KV", 0))


def teacher_experiment(folder: Path, size: Size) -> Experiment:
    """Cross-entropy on rationales and answers, with the same trainer and no teacher."""
    hidden = size.hidden
    architecture = {
        "model_type": "llama", "hidden_size": hidden, "intermediate_size": 3 * hidden,
        "num_hidden_layers": size.layers, "num_attention_heads": 4, "num_key_value_heads": 2,
        "head_dim": hidden // 4, "max_position_embeddings": 128, "tie_word_embeddings": True,
    }  # fmt: skip
    body = {
        **_common(folder, size),
        "name": "teacher",
        "student": {"architecture": architecture, "tokenizer": str(folder / "tokenizer")},
        "losses": {"key": 0, "value": 0, "cross_entropy_prompt": False},
    }
    body["training"] |= {"max_steps": size.teacher_steps, "learning_rate": 3e-3}
    return parse_experiment(body)


def student_experiment(folder: Path, size: Size, arm: str, seed: int) -> Experiment:
    """The experiment of one arm: its own settings over the common ones."""
    teacher = str(folder / "runs/teacher/student")
    own = ARMS[arm]
    body = {
        **_common(folder, size),
        "name": f"{_slug(arm)}-{seed}",
        "seed": seed,
        "teachers": {"cot": {"model": teacher}},
        "student": {"model": teacher},
        "projection": {"mode": "identity"},
        "alignment": own.get("alignment", {"time": "latent"}),
        "losses": {"key": 0, "value": 0, **own.get("losses", {})},
    }
    if "latent" in own:
        shared = {"num_latents": size.latents, "iterations": size.iterations,
                  "projector_width": 2 * size.hidden, "max_new_tokens": 6}  # fmt: skip
        body["latent"] = {**shared, **own["latent"]}
    body["training"] |= {"max_steps": size.student_steps, "learning_rate": 2e-3}
    return parse_experiment(body)


def run_arm(folder: Path, size: Size, arm: str, seed: int) -> None:
    """Train, evaluate on held-out questions, ablate the latents; skipped if the result exists."""
    result = folder / f"results/{_slug(arm)}-{seed}.json"
    if result.is_file():
        return
    experiment = student_experiment(folder, size, arm, seed)
    report = train(experiment)
    samples = read_files(folder / "held-out.jsonl")
    student = report.folder / "student"
    found = answer(student, samples, has_latents=experiment.latent is not None)
    record = {"arm": arm, "seed": seed, "size": asdict(size), **found}
    record["seconds"] = json.loads((report.folder / "run.json").read_text())["seconds"]
    result.parent.mkdir(exist_ok=True)
    staged = result.with_suffix(".tmp")
    staged.write_text(json.dumps(record, indent=1), encoding="utf-8")
    staged.rename(result)
    print(arm, seed, {k: v for k, v in record.items() if k != "size"}, flush=True)


def answer(folder: Path, samples: Sequence[Sample], *, has_latents: bool) -> dict[str, Any]:
    """Metrics of one student's answers."""
    tokenizer = load_student_tokenizer(str(folder))
    if not has_latents:
        from transformers import AutoModelForCausalLM

        student = AutoModelForCausalLM.from_pretrained(folder)
        return generate_and_grade(
            student, tokenizer, samples, max_new_tokens=64, batch_size=100
        ).to_dict()
    latent = LatentStudent.from_pretrained(folder)
    options = {"max_new_tokens": latent.config.max_new_tokens, "batch_size": 100}
    found: dict[str, Any] = latent_exact_match(latent, tokenizer, samples, **options).to_dict()
    if latent.config.positions:
        found["tampered"] = tamper_with(latent, tokenizer, samples, **options)
    return found


def table(folder: Path) -> str:
    """All results so far as Markdown: means over seeds with 95 % t intervals.

    With six contrasts over few seeds, read the widths of the intervals, not which exclude zero.
    """
    records = [json.loads(p.read_text()) for p in sorted(folder.glob("results/*.json"))]
    lines = [
        "| arm | seeds | exact match, % | 95 % | forward passes | zeroed | shuffled | swapped |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for arm in ARMS:
        rows = [record for record in records if record["arm"] == arm]
        if not rows:
            continue
        shares = [100 * row["exact_match"] for row in rows]
        passes = mean(row["forward_passes"] for row in rows)
        tampered = [
            f"{mean(100 * row['tampered'][name] for row in rows):.1f}" if "tampered" in rows[0]
            else "–"
            for name in ("zeroed", "shuffled", "swapped")
        ]  # fmt: skip
        lines.append(
            f"| {arm} | {len(rows)} | {mean(shares):.1f} | ± {half_width(shares):.1f} | "
            f"{passes:.1f} | {' | '.join(tampered)} |"
        )
    return "\n".join([*lines, "", *contrasts(records)])


def contrasts(records: Sequence[dict[str, Any]]) -> list[str]:
    """Differences of exact match in percentage points, paired by seed."""
    shares = {(row["arm"], row["seed"]): 100 * row["exact_match"] for row in records}
    lines = ["| difference | seeds | points | 95 % |", "|---|---|---|---|"]
    for arm, other in CONTRASTS:
        seeds = [s for a, s in shares if a == arm and (other, s) in shares]
        gaps = [shares[arm, seed] - shares[other, seed] for seed in seeds]
        if gaps:
            lines.append(
                f"| {arm} − {other} | {len(gaps)} | {mean(gaps):+.1f} | ± {half_width(gaps):.1f} |"
            )
    return lines


def half_width(values: Sequence[float]) -> float:
    """Half-width of the 95 % t interval of a mean."""
    if len(values) < 2:
        return float("nan")
    quantile = float(stats.t.ppf(0.975, len(values) - 1))
    return quantile * stdev(values) / len(values) ** 0.5


def _common(folder: Path, size: Size) -> dict[str, Any]:
    return {
        "store": str(folder / "store"),
        "output_dir": str(folder / "runs"),
        "corpus": {"path": str(folder / "corpus.jsonl"), "shard_chars": 20_000},
        "extraction": {"hidden_at_cue": True, "backend": "safetensors", "device": "cpu"},
        "training": {
            "batch_size": size.batch, "max_length": 64, "warmup_steps": 50,
            "log_steps": 50, "diagnostic_steps": 200, "device": "cpu", "window_shards": 8,
        },
    }  # fmt: skip


def _lines(samples: Sequence[Sample]) -> str:
    rows = ({"sample_id": s.sample_id, **dict(s.segments)} for s in samples)
    return "".join(json.dumps(row) + "\n" for row in rows)


def _slug(arm: str) -> str:
    return arm.lower().replace(",", "").replace(" ", "-")


if __name__ == "__main__":
    main()
