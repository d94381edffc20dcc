"""Run folders as training leaves them, of made-up figures: a whole ablation in milliseconds."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

NUM_LAYERS = 4
STEPS = (100, 200, 300)


@dataclass(frozen=True)
class MadeUp:
    """An arm: how many bits per character it is better than the baseline, and by what means."""

    name: str
    gain: float = 0.0
    teachers: tuple[str, ...] = ("smollm2", "minilm")
    method: str = "fixed"
    placebo: bool = False
    description: str = ""
    losses: float = 1.0


ARMS = (
    MadeUp("cross-entropy", teachers=(), description="no teacher"),
    MadeUp("both", 0.25, description="two teachers, equal weights"),
    MadeUp("shuffled", 0.0, placebo=True, description="another text's keys and values"),
)


def write_ablation(
    folder: Path,
    arms: Sequence[MadeUp] = ARMS,
    seeds: Sequence[int] = (0, 1, 2),
    *,
    num_texts: int = 40,
    samples: bool = True,
) -> Path:
    """An ablation folder, complete."""
    entries = []
    for arm in arms:
        runs = []
        for seed in seeds:
            name = f"{arm.name}-s{seed}"
            write_run(folder / name, arm, seed, num_texts=num_texts, samples=samples)
            runs.append({"seed": seed, "path": name})
        about = {"description": arm.description, "placebo": arm.placebo}
        entries.append({"name": arm.name, "runs": runs, **about})
    body = {"name": "made-up", "baseline": arms[0].name, "arms": entries}
    (folder / "ablation.json").write_text(json.dumps(body))
    return folder


def write_run(
    folder: Path, arm: MadeUp, seed: int, *, num_texts: int = 40, samples: bool = True
) -> Path:
    """One finished run."""
    folder.mkdir(parents=True)
    rows = _texts(arm, seed, num_texts)
    metrics = _metrics(rows)
    (folder / "config.yaml").write_text(yaml.safe_dump(_config(folder, arm, seed)))
    (folder / "diagnostics.json").write_text(json.dumps(_diagnostics(arm, seed)))
    lines = [json.dumps(row) for row in _logs(arm, seed, metrics)]
    (folder / "training_log.jsonl").write_text("\n".join(lines))
    if samples:
        (folder / "eval_samples.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    attempt = {
        "command": f"kvdistill train {arm.name}.yaml --set seed={seed}",
        "started": "2026-11-21T12:00:00+00:00",
        "git_commit": "0123456789abcdef0123456789abcdef01234567",
        "versions": {"python": "3.11.7", "kvdistill": "0.1.0", "torch": "2.13.0"},
    }
    record = {"name": folder.name, "seed": seed, "finished": True, "attempts": [attempt]}
    sure = [i / 15 + 1 / 30 for i in range(15)]
    bins = [{"num_tokens": 90, "confidence": c, "accuracy": c**1.2} for c in sure]
    record |= {
        "calibration": bins,
        "metrics": metrics,
        "steps": STEPS[-1],
        "seconds": 80.0 + 20 * len(arm.teachers),
    }
    (folder / "run.json").write_text(json.dumps(record))
    return folder


def rewrite(run: Path, **changes: Any) -> None:
    """Change fields of a run's record."""
    path = run / "run.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def _texts(arm: MadeUp, seed: int, num_texts: int) -> list[dict[str, Any]]:
    common = np.random.default_rng(0)
    chars = common.integers(200, 800, num_texts)
    hard = common.normal(2.0, 0.2, num_texts)
    own = np.random.default_rng([seed, sum(map(ord, arm.name))])
    bits = hard - arm.gain + 0.01 * own.normal() + 0.03 * own.normal(size=num_texts)
    return [
        {
            "sample_id": f"text-{i}",
            "nll": float(bits[i] * chars[i] * math.log(2)),
            "num_tokens": int(chars[i] // 4),
            "num_chars": int(chars[i]),
            "correct": bool(own.random() < 0.1 + arm.gain),
        }
        for i in range(num_texts)
    ]


def _metrics(rows: list[dict[str, Any]]) -> dict[str, float]:
    nll, tokens, chars = (sum(r[key] for r in rows) for key in ("nll", "num_tokens", "num_chars"))
    return {
        "eval_perplexity": math.exp(nll / tokens),
        "eval_bits_per_character": nll / math.log(2) / chars,
        "eval_calibration_error": 0.04,
        "eval_exact_match": sum(r["correct"] for r in rows) / len(rows),
        "eval_num_answers": len(rows),
        "eval_nll": nll,
        "eval_num_tokens": tokens,
        "eval_num_chars": chars,
        "eval_num_samples": len(rows),
        "epoch": 3.0,
    }


def _logs(arm: MadeUp, seed: int, metrics: dict[str, float]) -> list[dict[str, float]]:
    own = np.random.default_rng(seed)
    rows = []
    for step in STEPS:
        left = math.exp(-step / 100) + 0.02 * own.normal()
        row = {"step": step, "epoch": step / 100, "loss_cross_entropy": 3 + 2 * left - arm.gain}
        if arm.teachers:
            row |= {"loss_key": 0.5 + 0.4 * left, "loss_value": 0.6 + 0.3 * left}
        for idx, name in enumerate(arm.teachers):
            weight = 0.5 + (0.3 if idx == 0 else -0.3) * (1 - left)
            row[f"weight_{name}"] = weight if len(arm.teachers) > 1 else 1.0
        rows.append(row)
        bits = metrics["eval_bits_per_character"]
        rows.append({"step": step, "eval_bits_per_character": bits + left - math.exp(-3)})
    return rows


def _config(folder: Path, arm: MadeUp, seed: int) -> dict[str, Any]:
    return {
        "name": folder.name,
        "seed": seed,
        "store": str(folder.parent / "store"),
        "output_dir": str(folder.parent),
        "teachers": {name: {"model": f"models/{name}"} for name in arm.teachers},
        "fusion": {"method": arm.method, "weights": None},
        "losses": {"key": arm.losses if arm.teachers else 0.0},
        "placebo": {"method": "shuffled" if arm.placebo else "none", "teachers": None},
        "slurm": {"profile": f"of-{seed}"},
    }


def _diagnostics(arm: MadeUp, seed: int) -> dict[str, Any]:
    if not arm.teachers:
        return {}
    own = np.random.default_rng(seed)
    errors = {k: (0.5 + 0.1 * own.random(NUM_LAYERS)).tolist() for k in ("key", "value")}
    share = 1 / len(arm.teachers)
    even = dict.fromkeys(arm.teachers, share)
    tokens = ["The", " cat", " costs", " $5", "."]
    example = {"student_tokens": tokens, "teacher_tokens": tokens, "weights": np.eye(5).tolist()}
    return {
        "error_by_layer": errors,
        "weights": {
            "by_layer": {name: [share] * NUM_LAYERS for name in arm.teachers},
            "by_task": {"": even, "sums": even},
        },
        "spectra": {f"{name} key heads": [3.0, 1.0, 0.1] for name in arm.teachers},
        "teachers": {
            name: {"layer_map": [0.0, 7.5, 15.0, 22.5], "alignment": example}
            for name in arm.teachers
        },
    }
