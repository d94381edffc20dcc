"""What should a byte of the store hold: keys and values, at which rate, hidden states, predictions?

SmolLM2 teaches the student of ``quality.py`` from stores of 50 to 3,000 bytes a token: keys and
values of the four layers that the student reads in fp16, int8, int4 and ``klt`` at four rates; its
8, 32 or 128 most likely tokens; both; and the outputs of the four layers in int8 and int4. Every
arm takes equal steps. Weights and rates are searched on validation texts under one seed with the
same number of runs for each kind of target (``search``), and scored on test texts unseen by the
search (``final``, three seeds). The rate that the search selects turned out to be at the edge of
stability, so keys and values are also run at the rate of ``quality.py`` (``steady``, five seeds).

    make models
    python benchmarks/frontier.py frontier-output            # everything; prints tables
    python benchmarks/frontier.py frontier-output --only summary --plot frontier.png

Bytes of keys and values are those on disk, scales and checksums included, over the store's tokens;
of k predictions, 6k + 2: one store of the most serves the runs with fewer. Tables have the mean
log-perplexity of the test texts in nats per token, its difference from text alone at 2e-3, which
is text alone's best rate there, and that difference's p-value over seeds and texts. Every run is a
folder; finished runs are not repeated, and the same command resumes.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
from matplotlib import pyplot
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import quality
from benchmarks.quality import arm, text_alone
from benchmarks.study_files import ablate, write_study
from kvdistill.store.reader import KVStore
from kvdistill.studies.statistics import crossed_test

LAYERS: Final = (2, 11, 20, 29)
"""Teacher layers that the student's four layers learn from."""
RATES: Final = {
    "klt-4": (4.0, 4.4),
    "klt-2": (1.7, 2.5),
    "klt-1": (0.8, 1.3),
    "klt-quarter": (0.2, 0.3),
}
"""Bits per element of keys and of values."""
CODECS: Final[dict[str, dict[str, Any]]] = {
    **{codec: {"key": codec, "value": codec} for codec in ("fp16", "int8", "int4")},
    **{
        name: {"key": "klt", "value": "klt", "key_bits": key, "value_bits": value}
        for name, (key, value) in RATES.items()
    },
}
NUM_LOGITS: Final = (8, 32, 128)
HIDDEN: Final = ("int8", "int4")
"""Codecs of hidden states."""
KV_WEIGHTS: Final = (2, 5, 10, 20)
LOGIT_WEIGHTS: Final = (0.5, 1, 2, 4)
HIDDEN_WEIGHTS: Final = (1, 3, 10, 30)
TEXT_RATES: Final = (1e-3, 2e-3, 4e-3, 6e-3)
OTHER_RATES: Final = (2e-3, 6e-3)
TUNED: Final[dict[str, Any]] = {
    "text": 6e-3,
    "kv": (5, 6e-3),
    "logits": (1, 4e-3),
    "hidden": (3, 4e-3),
}
"""The rate of text alone, and weight and rate of the others, as the search selected them."""
SHUFFLED: Final = {"placebo": True, "placebo__method": "shuffled"}
SEEDS: Final = {"search": 1, "final": 3, "steady": 5}
STEADY: Final = 4e-3
"""The rate of ``steady``."""
BOTH: Final = 32
"""Predictions in the arm that has keys and values as well, at the rate ``klt-1``."""


def teacher(codec: str) -> dict[str, Any]:
    """SmolLM2 with the four layers in a codec."""
    return {"model": "models/smollm2", "layers": list(LAYERS), "codec": CODECS[codec]}


def logits_alone(weight: float, **settings: Any) -> dict[str, Any]:
    """An arm that learns from predictions."""
    return arm("smollm2", weight=0, losses__logits=weight, **settings)


def hidden_alone(codec: str, weight: float, **settings: Any) -> dict[str, Any]:
    """An arm that learns from the outputs of the four layers."""
    return arm(f"hidden-{codec}", weight=0, losses__hidden=weight, **settings)


def by_codec(rate: float) -> dict[str, Any]:
    """An arm per codec, and a placebo."""
    weight, _ = TUNED["kv"]
    arms = {name: arm(name, weight=weight, **at_rate(rate)) for name in CODECS}
    return arms | {"int8-shuffled": arm("int8", weight=weight, **at_rate(rate), **SHUFFLED)}


def at_rate(rate: float) -> dict[str, float]:
    """Another learning rate than ``quality.py``'s."""
    return {"training__learning_rate": rate}


def study(
    folder: Path,
    name: str,
    arms: dict[str, Any],
    *,
    store: str,
    teachers: dict[str, Any],
    layers: Sequence[int] = LAYERS,
    **extraction: Any,
) -> Path:
    """Write a study over one store, of a search or final; returns its path."""
    stage = name.partition("-")[0]
    body = quality.experiment(folder, "search" if stage == "search" else "final")
    body |= {"store": str(folder / store), "extraction": {"importance": False, **extraction}}
    body["alignment"] = {
        "layers": "explicit",
        "explicit_layers": {known: list(layers) for known in teachers},
    }
    return write_study(folder, name, body | {"teachers": teachers}, arms, range(SEEDS[stage]))


def studies(folder: Path) -> dict[str, list[Path]]:
    """Study files by stage."""
    kv_store = {"store": "kv", "teachers": {name: teacher(name) for name in CODECS}, "logits": 0}
    predicted = {
        k: {"store": "predictions", "teachers": {"smollm2": teacher("klt-1")}, "logits": k}
        for k in sorted(NUM_LOGITS, reverse=True)  # the first one extracts
    }
    rates = {f"text-{rate:g}": text_alone(rate) for rate in TEXT_RATES}
    search = {f"int8-{weight}": arm("int8", weight=weight) for weight in KV_WEIGHTS}
    search |= {f"int8-5-{rate:g}": arm("int8", weight=5, **at_rate(rate)) for rate in OTHER_RATES}
    by_logits = {f"logits-{weight:g}": logits_alone(weight) for weight in LOGIT_WEIGHTS}
    by_logits |= {f"logits-1-{rate:g}": logits_alone(1, **at_rate(rate)) for rate in OTHER_RATES}
    weight, rate = TUNED["kv"]
    text = {"text": text_alone(2e-3)}
    final = text | {"text-fast": text_alone(TUNED["text"])} | by_codec(rate)
    found = {
        "search": [
            study(folder, "search-kv", rates | search, **kv_store),
            study(folder, "search-logits", by_logits, **predicted[128]),
        ],
        "final": [study(folder, "final-kv", final, **kv_store)],
        "steady": [study(folder, "steady-kv", text | by_codec(STEADY), **kv_store)],
    }
    of_logits, logits_rate = TUNED["logits"]
    alone = at_rate(logits_rate)
    for k, store in predicted.items():
        arms = {f"logits-{k}": logits_alone(of_logits, **alone)}
        if k == BOTH:
            arms["both"] = arm("smollm2", weight=weight, losses__logits=of_logits, **at_rate(rate))
            arms["logits-shuffled"] = logits_alone(of_logits, **alone, **SHUFFLED)
        found["final"].append(study(folder, f"final-{k}", arms, **store))
    return found


def hidden_studies(folder: Path) -> dict[str, list[Path]]:
    """Study files of hidden states, by stage."""
    teachers = {
        f"hidden-{codec}": {**teacher("int4"), "codec": {**CODECS["int4"], "hidden": codec}}
        for codec in HIDDEN
    }
    store: dict[str, Any] = {"store": "hidden", "teachers": teachers, "hidden": True}
    search = {f"hidden-{weight}": hidden_alone("int8", weight) for weight in HIDDEN_WEIGHTS}
    for rate in OTHER_RATES:
        search[f"hidden-10-{rate:g}"] = hidden_alone("int8", 10, **at_rate(rate))
    weight, rate = TUNED["hidden"]
    final = {f"hidden-{codec}": hidden_alone(codec, weight, **at_rate(rate)) for codec in HIDDEN}
    return {
        "search": [study(folder, "search-hidden", search, **store)],
        "final": [study(folder, "final-hidden", final, **store)],
    }


def bytes_per_token(store: Path, name: str, kinds: tuple[str, ...] = ("key", "value")) -> float:
    """Bytes on disk per token of what a teacher's store holds of some kinds."""
    opened = KVStore.open(store)
    size = sum(
        file.stat().st_size
        for shard_id in opened.shard_ids
        for array in opened.paths.shard(name, shard_id).iterdir()
        if array.is_dir() and array.name.startswith(kinds)
        if "statistics" not in array.name
        for file in array.rglob("*")
        if file.is_file()
    )
    return size / sum(opened.token_table(name, i).num_tokens for i in opened.shard_ids)


def held_bytes(folder: Path, name: str) -> float:
    """Bytes per token of what an arm reads; 0 for text alone."""
    if name.startswith("text"):
        return 0.0
    known, _, k = name.partition("-")
    predictions = 6 * (int(k) if k.isdecimal() else BOTH) + 2
    if known == "logits":
        return predictions
    if name == "both":
        return predictions + bytes_per_token(folder / "predictions", "smollm2")
    if known == "hidden":
        return bytes_per_token(folder / "hidden", name, ("hidden",))
    return bytes_per_token(folder / "kv", name.removesuffix("-shuffled"))


def losses(run: Path) -> NDArray[np.float64]:
    """Negative log-likelihood and tokens of every test text, ``[N, 2]``."""
    lines = (run / "eval_samples.jsonl").read_text(encoding="utf-8").splitlines()
    rows = sorted(map(json.loads, lines), key=lambda row: str(row["sample_id"]))
    return np.array([(row["nll"], row["num_tokens"]) for row in rows])


def scored(folder: Path, stage: str) -> dict[str, dict[int, NDArray[np.float64]]]:
    """``losses`` of every finished run of a stage, by arm and seed."""
    found: dict[str, dict[int, NDArray[np.float64]]] = {}
    for path in sorted(folder.glob(f"{stage}-*/*/eval_samples.jsonl")):
        name, _, seed = path.parent.name.rpartition("-s")
        found.setdefault(name, {})[int(seed)] = losses(path.parent)
    return found


def mean_nats(runs: Mapping[int, NDArray[np.float64]]) -> float:
    """Mean over seeds of nats per token."""
    return float(np.mean([rows[:, 0].sum() / rows[:, 1].sum() for rows in runs.values()]))


def summary(folder: Path, stage: str) -> None:
    """Print the table of a stage's runs."""
    runs = scored(folder, stage)
    base = runs.get("text", {})
    print(f"\n{stage}\n\n| arm | bytes a token | nats a token | against text | p | seeds |")
    print("|---|---|---|---|---|---|")
    for held, name in sorted((held_bytes(folder, name), name) for name in runs):
        found = runs[name]
        line = f"| {name} | {held:,.0f} | {mean_nats(found):.4f} | "
        if name == "text" or len(shared := sorted(found.keys() & base.keys())) < 2:
            print(line + f"| | {len(found)} |")
            continue
        test = crossed_test(
            np.stack([found[i][:, 0] - base[i][:, 0] for i in shared]), base[shared[0]][:, 1]
        )
        print(line + f"{test.estimate:+.4f} | {test.p:.4f} | {len(shared)} |")


def plot(folder: Path, path: Path) -> None:
    """Perplexity of the student over bytes per token of what it learns from."""
    final, steady = scored(folder, "final"), scored(folder, "steady")
    shown = {
        "keys and values": {name: runs for name, runs in steady.items() if name in CODECS},
        "hidden states": {n: r for n, r in final.items() if n.startswith("hidden")},
        "predictions": {f"logits-{k}": final[f"logits-{k}"] for k in NUM_LOGITS},
    }
    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for (label, arms), marker in zip(shown.items(), "osD", strict=True):
        if not arms:
            continue
        points = sorted((held_bytes(folder, name), name) for name in arms)
        means = [np.exp(mean_nats(arms[name])) for _, name in points]
        axes.plot([held for held, _ in points], means, marker=marker, label=label)
        for i, ((held, name), mean) in enumerate(zip(points, means, strict=True)):
            place = {"xytext": (0, (8, -15)[i % 2]), "textcoords": "offset points", "ha": "center"}
            axes.annotate(name, (held, mean), **place)
    levels = {"text": ("text alone", "--"), "int8-shuffled": ("int8 of other texts (placebo)", ":")}
    for name, (label, style) in levels.items():
        level = np.exp(mean_nats(steady[name]))
        axes.axhline(level, color="0.5", linestyle=style, label=label)
    axes.set(xscale="log", xlabel="bytes per token", ylabel="perplexity of test texts")
    axes.set_ylim(bottom=110)
    axes.legend(frameon=False, loc="center left")
    figure.savefig(path, dpi=150)


def main() -> None:
    """Search, final and steady runs, tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folder", type=Path, help="output folder")
    parser.add_argument("--only", choices=(*SEEDS, "summary"))
    parser.add_argument("--plot", type=Path, help="draw the runs' figures to this file")
    parser.add_argument("--workers", type=int, default=1, help="parallel runs")
    asked = parser.parse_args()
    quality.prepare(asked.folder)
    hidden = hidden_studies(asked.folder)
    for name, paths in studies(asked.folder).items():
        for path in (*paths, *hidden.get(name, ())) if asked.only in (None, name) else ():
            ablate(path, asked.workers, "--extract")
    for name in ("final", "steady"):
        summary(asked.folder, name)
    if asked.plot is not None:
        plot(asked.folder, asked.plot)


if __name__ == "__main__":
    main()
