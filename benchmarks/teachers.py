"""Are several teachers worth more than the best one?

Three domains: English word problems (GSM8K), classical Chinese poems, Python code. Three
specialists of one small architecture, each trained by kvdistill on the text of one domain alone,
and two generalists, SmolLM2 and Gemma 3, teach students of three widths from scratch. Students see
a few hundred texts of each domain that no specialist has read; every arm takes equal steps.
Settings are searched on validation texts (``search``, one seed, middle width) and scored on test
texts (``final``: five seeds; ``narrow``, ``wide``: the arms that decide, two seeds). The score is
the mean over domains of bits per character.

    python examples/get_models.py models smollm2 gemma3
    python benchmarks/teachers.py OUTPUT --english train.jsonl --chinese poems.jsonl

``train.jsonl`` is GSM8K's (github.com/openai/grade-school-math), ``poems.jsonl`` has rows of a
``text`` (npm package ``chinese-poetry``); code comes from the standard library of this Python.
Every run is a folder; finished runs are not repeated, and the same command resumes. It has not been
run to its end yet: the settings below are those that its search starts from.
"""

from __future__ import annotations

import argparse
import ast
import json
import math
import random
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.study_files import ablate, kvdistill, write_study, write_yaml
from kvdistill.corpus.readers import read_files
from kvdistill.distill.student.build import train_tokenizer
from kvdistill.studies.statistics import crossed_test

DOMAINS: Final = ("english", "chinese", "code")
MIN_CHARACTERS: Final = 100
MAX_CHARACTERS: Final = {"english": 600, "chinese": 200, "code": 600}
SPLITS: Final = {"train": 300, "validation": 60, "test": 100}
"""Texts of each domain; what remains is read by the domain's specialist."""
STUDENT_VOCABULARY: Final = 4096
SPECIALIST_VOCABULARY: Final = 6000
WIDTHS: Final = {"narrow": 128, "final": 256, "wide": 512}
"""Hidden size of the student in each study: 1.2, 4.2 and 14 million parameters."""
SEEDS: Final = {"search": 1, "final": 5, "narrow": 2, "wide": 2}
STEPS: Final = 400
STUDENT_LAYERS: Final = 4
GENERALISTS: Final = {
    "smollm2": {"model": "models/smollm2", "layers": [5, 13, 21, 29]},
    "gemma3": {"model": "models/gemma3", "layers": [2, 7, 12, 17]},
}
TEACHERS: Final = (*GENERALISTS, *DOMAINS)
TRAINING: Final = {
    "batching": "bucketed",
    "tokens_per_batch": 768,
    "max_length": 256,
    "max_steps": STEPS,
    "epochs": 100,
    "warmup_steps": 20,
    "log_steps": 50,
    "diagnostic_steps": 10_000,
    "window_shards": 24,
    "device": "cpu",
}
RATES: Final = (1e-3, 2e-3, 4e-3)
WEIGHTS: Final = (5, 15)
ANNEAL_BY: Final = 0.6
TUNED: Final[dict[str, Any]] = {"text": 2e-3, "rate": 2e-3, "weight": 15}
"""Rates and the weight of keys and values of the final runs."""
SOFT: Final = 0.1
"""Temperature of the choice by confidence, nats per character."""
ROUTE: Final = {"english": "smollm2", "chinese": "chinese", "code": "smollm2"}
"""A teacher for each domain."""
BALANCES: Final[dict[str, dict[str, Any]]] = {
    "explained": {"fusion__balance": {"method": "explained"}},
    "gradnorm": {"fusion__balance": {"method": "gradnorm"}},
    "factor": {"fusion__balance": {"factors": {"chinese": 0.2}}},
    "curriculum": {"fusion__balance": {"spans": {"chinese": [0, 0.3], "smollm2": [0.3, 1]}}},
    "hidden": {"projection__hidden": 64},
}
BALANCE: Final = "explained"
"""The one of the final runs."""
WRONG: Final = {"english": "chinese", "chinese": "code", "code": "english"}
SCORES: Final = "eval_samples.jsonl"
"""What a finished run says of every held-out text."""
FEW_ARMS: Final = ("text", "smollm2", "chinese", "routed", "routed-balanced", "confidence")


def texts(domain: str, source: Path | None) -> list[str]:
    """All texts of a domain, without duplicates, in a fixed random order."""
    found = _functions() if source is None else (sample.text for sample in read_files(source))
    longest = MAX_CHARACTERS[domain]
    kept = sorted({text for text in found if MIN_CHARACTERS <= len(text) <= longest})
    random.Random(0).shuffle(kept)
    return kept


def _functions() -> Iterator[str]:
    """Source of functions and methods of the standard library, dedented."""
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        if "site-packages" in path.parts or "test" in path.parts or "tests" in path.parts:
            continue
        try:
            source = path.read_text(encoding="utf-8")
            tree = ast.parse(source)
        except (UnicodeDecodeError, SyntaxError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                lines = source.splitlines()[node.lineno - 1 : node.end_lineno]
                yield "\n".join(line[node.col_offset :] for line in lines)


def prepare(folder: Path, sources: dict[str, Path | None]) -> None:
    """Write each domain's splits, disjoint; validation and test texts of all domains together."""
    if (folder / "test.jsonl").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    for split in ("validation", "test"):
        (folder / f"{split}.jsonl.part").unlink(missing_ok=True)
    for domain, source in sources.items():
        found, start = texts(domain, source), 0
        for split, num in SPLITS.items():
            rows = [{"text": text, "task": domain} for text in found[start : start + num]]
            start += num
            name, mode = (
                (f"{domain}.jsonl", "w") if split == "train" else (f"{split}.jsonl.part", "a")
            )
            with (folder / name).open(mode, encoding="utf-8") as file:
                file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        rest = [json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in found[start:]]
        (folder / f"{domain}-specialist.jsonl").write_text("".join(rest), encoding="utf-8")
    for split in ("validation", "test"):
        (folder / f"{split}.jsonl.part").rename(folder / f"{split}.jsonl")


def tokenizer(folder: Path, name: str, files: Sequence[Path], vocabulary: int) -> str:
    """Train a BPE tokenizer on some files, once."""
    path = folder / "tokenizers" / name
    if not path.exists():
        found = [sample.text for file in files for sample in read_files(file)]
        train_tokenizer(found, vocabulary).save_pretrained(str(path))
    return str(path)


def llama(width: int, layers: int) -> dict[str, Any]:
    """A small Llama; half as many KV heads as heads of 32 dims."""
    return {
        "model_type": "llama",
        "hidden_size": width,
        "intermediate_size": round(width * 8 / 3 / 8) * 8,
        "num_hidden_layers": layers,
        "num_attention_heads": width // 32,
        "num_key_value_heads": width // 64,
        "head_dim": 32,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
    }


def train_specialists(folder: Path) -> None:
    """One pass over each domain's remaining texts, without a teacher."""
    for domain in DOMAINS:
        corpus = folder / f"{domain}-specialist.jsonl"
        body = {
            "name": f"specialist-{domain}",
            "store": str(folder / f"no-store-{domain}"),
            "output_dir": str(folder),
            "corpus": {"path": str(corpus), "eval_path": str(folder / "validation.jsonl")},
            "teachers": {},
            "losses": {"key": 0, "value": 0},
            "student": {
                "tokenizer": tokenizer(folder, domain, [corpus], SPECIALIST_VOCABULARY),
                "architecture": llama(256, 6),
            },
            "training": {
                **{key: value for key, value in TRAINING.items() if key != "max_steps"},
                "tokens_per_batch": 2048,
                "epochs": 1,
                "warmup_steps": 50,
                "learning_rate": 1.5e-3,
                "precision": "bfloat16",
                "save_steps": 50,
            },
        }
        kvdistill("run", write_yaml(folder / f"specialist-{domain}.yaml", body))


def experiment(folder: Path, evaluation: str, width: int) -> dict[str, Any]:
    """The experiment that all arms of a width share, with all teachers."""
    parts = {domain: {"path": str(folder / f"{domain}.jsonl")} for domain in DOMAINS}
    specialists = {
        domain: {"model": str(folder / f"specialist-{domain}/student"), "layers": [2, 3, 4, 5]}
        for domain in DOMAINS
    }
    files = [folder / f"{domain}.jsonl" for domain in DOMAINS]
    return {
        "store": str(folder / "store"),
        "output_dir": str(folder),
        "corpus": {
            "parts": parts,
            "eval_path": str(folder / f"{evaluation}.jsonl"),
            "shard_chars": 12_000,
        },
        "teachers": {**GENERALISTS, **specialists},
        "extraction": {"importance": False, "confidence": True},
        "student": {
            "tokenizer": tokenizer(folder, "student", files, STUDENT_VOCABULARY),
            "architecture": llama(width, STUDENT_LAYERS),
        },
        "losses": {"anneal_by": ANNEAL_BY},
        "training": TRAINING,
    }


def arm(
    teachers: Sequence[str],
    weight: float = TUNED["weight"],
    rate: float = TUNED["rate"],
    *,
    placebo: bool = False,
    **settings: Any,
) -> dict[str, Any]:
    """An arm with teachers; ``settings`` have ``__`` for the dot."""
    dotted = {key.replace("__", "."): value for key, value in settings.items()}
    kv = {"losses.key": weight, "losses.value": weight, "training.learning_rate": rate}
    return {"teachers": list(teachers), "settings": kv | dotted, "placebo": placebo}


def text_alone(rate: float = TUNED["text"]) -> dict[str, Any]:
    """An arm without a teacher."""
    settings = {"losses.key": 0, "losses.value": 0, "training.learning_rate": rate}
    return {"teachers": [], "settings": settings}


def routed(route: dict[str, str], **settings: Any) -> dict[str, Any]:
    """Every domain from one teacher."""
    chosen = {domain: {teacher: 1} for domain, teacher in route.items()}
    return arm(sorted(set(route.values())), fusion__by_task=chosen, **settings)


def search_arms() -> dict[str, Any]:
    """Rates of text alone; rates and weights of the best generalist and of a route; balances."""
    arms = {f"text-{rate:g}": text_alone(rate) for rate in RATES}
    for rate in RATES[1:]:
        for weight in WEIGHTS:
            name = f"{rate:g}-{weight}"
            arms[f"smollm2-{name}"] = arm(["smollm2"], weight, rate)
            arms[f"routed-{name}"] = routed(ROUTE, weight=weight, rate=rate)
    return arms | {f"balance-{name}": routed(ROUTE, **own) for name, own in BALANCES.items()}


def final_arms() -> dict[str, Any]:
    """Every way to use these teachers, and two placebos."""
    specialists = {domain: domain for domain in DOMAINS}
    return {
        "text": text_alone(),
        **{name: arm([name]) for name in TEACHERS},
        "uniform": arm(TEACHERS),
        "routed": routed(ROUTE),
        "routed-specialists": routed(specialists),
        "routed-balanced": routed(ROUTE, **BALANCES[BALANCE]),
        "confidence": arm(TEACHERS, fusion__method="confidence", fusion__temperature=SOFT),
        "router": arm(TEACHERS, fusion__method="mlp"),
        "routed-wrongly": routed(WRONG, placebo=True),
        "routed-shuffled": routed(ROUTE, placebo=True, placebo__method="shuffled"),
    }


def study(folder: Path, name: str) -> Path:
    """Write a study file and return its path."""
    evaluation = "validation" if name == "search" else "test"
    arms = search_arms() if name == "search" else final_arms()
    if name in ("narrow", "wide"):
        arms = {chosen: arms[chosen] for chosen in FEW_ARMS}
    shared = experiment(folder, evaluation, WIDTHS.get(name, WIDTHS["final"]))
    return write_study(folder, name, shared, arms, range(SEEDS[name]))


def merge_branches(folder: Path) -> None:
    """Average the students of the single teachers that the route names, and score them."""
    runs = folder / "final"
    for seed in range(SEEDS["final"]):
        branches = [runs / f"{name}-s{seed}" for name in sorted(set(ROUTE.values()))]
        target = runs / f"branches-s{seed}"
        done = (target / SCORES).exists()
        if done or not all((branch / SCORES).exists() for branch in branches):
            continue
        if not target.exists():
            kvdistill("merge-students", *map(str, branches), "--out", str(target))
        length = str(TRAINING["max_length"])
        command = ["evaluate", str(target), str(folder / "test.jsonl"), "--max-length", length]
        kvdistill(*command, "--samples", str(target / SCORES))


def scores(run: Path) -> dict[str, tuple[str, float, float]]:
    """Domain, bits and characters of every held-out text of a run."""
    found = {}
    for line in (run / SCORES).read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        found[row["sample_id"]] = (row["task"], row["nll"] / math.log(2), row["num_chars"])
    return found


def summary(runs: Path, baseline: str) -> None:
    """Bits per character by domain and their mean; the mean against ``baseline``, by seed and text.

    The macro mean is a ratio of sums in which every text of a domain is weighted by the inverse of
    the domain's characters, which is what the crossed test needs.
    """
    arms: dict[str, dict[int, Path]] = {}
    for scored in sorted(runs.glob(f"*/{SCORES}")):
        name, _, seed = scored.parent.name.rpartition("-s")
        arms.setdefault(name, {})[int(seed)] = scored.parent
    for name, folders in arms.items():
        shared = sorted(folders.keys() & arms.get(baseline, {}).keys())
        own = [macro_terms(scores(folders[seed])) for seed in sorted(folders)]
        means = np.mean([[terms[domain].sum() for domain in DOMAINS] for terms in own], axis=0)
        line = f"{runs.name} {name}: " + " ".join(f"{value:.4f}" for value in means)
        line += f" macro {means.mean():.4f} ({len(own)} seeds)"
        if name != baseline and shared:
            pairs = np.stack(
                [
                    flat(macro_terms(scores(folders[seed])))
                    - flat(macro_terms(scores(arms[baseline][seed])))
                    for seed in shared
                ]
            )
            base = np.mean(
                [flat(macro_terms(scores(arms[baseline][seed]))).sum() for seed in shared]
            )
            line += f"; {pairs.sum(1).mean() / base:+.2%} of {baseline}"
            if len(shared) > 1:
                line += f", p = {crossed_test(pairs).p:.4f}"
        print(line)


def macro_terms(rows: dict[str, tuple[str, float, float]]) -> dict[str, np.ndarray]:
    """Per domain, every text's bits over the characters of the domain."""
    found = {}
    for domain in DOMAINS:
        chosen = [(bits, num) for _, (task, bits, num) in sorted(rows.items()) if task == domain]
        found[domain] = np.array([bits for bits, _ in chosen]) / sum(num for _, num in chosen)
    return found


def flat(terms: dict[str, np.ndarray]) -> np.ndarray:
    """All texts' contributions to the macro mean."""
    return np.concatenate([terms[domain] for domain in DOMAINS]) / len(DOMAINS)


def main() -> None:
    """Texts, specialists, extraction, search, final runs, summary."""
    stages = ("specialists", "extract", *SEEDS, "branches")
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folder", type=Path, help="output folder")
    parser.add_argument("--english", type=Path, required=True, help="train.jsonl of GSM8K")
    parser.add_argument("--chinese", type=Path, required=True, help="JSONL of Chinese poems")
    parser.add_argument("--only", choices=(*stages, "summary"))
    parser.add_argument("--workers", type=int, default=1, help="parallel runs")
    asked = parser.parse_args()
    folder = asked.folder
    prepare(folder, {"english": asked.english, "chinese": asked.chinese, "code": None})

    def wanted(stage: str) -> bool:
        return asked.only in (None, stage)

    if wanted("specialists"):
        train_specialists(folder)
    if wanted("extract"):
        body = experiment(folder, "test", WIDTHS["final"])
        kvdistill("extract", write_yaml(folder / "extract.yaml", body))
    for name in SEEDS:
        if wanted(name):
            ablate(study(folder, name), asked.workers)
    if wanted("branches"):
        merge_branches(folder)
    for name in SEEDS:
        summary(folder / name, "smollm2")


if __name__ == "__main__":
    main()
