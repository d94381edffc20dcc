"""Experiment files made to break the reader: one short line each, and quickly."""

from __future__ import annotations

import random
import string
import time
from pathlib import Path
from typing import Any

import pytest

from kvdistill.config.experiment import Experiment
from kvdistill.config.load import dump_experiment, load_experiment, parse_experiment
from kvdistill.errors import ConfigError
from tests.config.template import TEMPLATE, template
from tests.faults.verdict import MAX_MESSAGE, require_lines

BASE = TEMPLATE.read_text(encoding="utf-8")


def refused(folder: Path, text: str, *overrides: str) -> str:
    """The message with which a file is refused, within seconds."""
    path = folder / "experiment.yaml"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    start = time.process_time()
    with pytest.raises(ConfigError) as caught:
        load_experiment(path, overrides)
    assert time.process_time() - start < 10
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) <= MAX_MESSAGE + len(str(path))
    return message


def bomb(levels: int, *, mappings: bool) -> str:
    """``levels`` anchors, each nine times the one before."""
    wrap = "{{{}}}" if mappings else "[{}]"
    lines = ["x0: &x0 {a: 1}" if mappings else "x0: &x0 [1]"]
    for i in range(1, levels):
        parts = [f"k{j}: *x{i - 1}" if mappings else f"*x{i - 1}" for j in range(9)]
        lines.append(f"x{i}: &x{i} {wrap.format(', '.join(parts))}")
    return "\n".join(lines)


@pytest.mark.parametrize("mappings", [False, True])
def test_aliases_that_multiply(tmp_path: Path, mappings: bool) -> None:
    assert "aliases" in refused(tmp_path, bomb(9, mappings=mappings))


def test_an_alias_of_itself(tmp_path: Path) -> None:
    assert "itself" in refused(tmp_path, "teachers: &t {a: *t}\n")


def test_a_few_aliases_are_welcome(tmp_path: Path) -> None:
    body = template()
    del body["losses"]
    shared = dump_experiment(parse_experiment(body)).replace("losses:", "losses: &shared", 1)
    path = tmp_path / "experiment.yaml"
    path.write_text(shared, encoding="utf-8")
    assert load_experiment(path) == parse_experiment(body)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (BASE + "\nseed: 1\nseed: 2\n", ["seed", "twice"]),
        (BASE + "\nfusion: {temperature: 1.0, temperature: 2.0}\n", ["twice"]),
        ("[" * 5000 + "]" * 5000, ["nested"]),
        ("seed: " + "9" * 5000, ["YAML"]),
        ("seed: 2001-99-99", ["YAML"]),
        ("? [1]\n: 2\n", ["YAML"]),
        ("preset: [1]\n", ["preset"]),
        ("preset: {a: 1}\n", ["preset"]),
        ("name: " + "x" * 100_000, ["name"]),
        ("name: [" + "x, " * 10_000 + "]", ["name"]),
        ("x" * 900 + ": 1\n", ["unknown key"]),
        ("1: 2\n", ["1"]),
        ("~: 2\n", ["key"]),
        ("!!python/object/apply:os.system ['true']\n", ["YAML"]),
        ("- a\n- b\n", ["mapping"]),
        ("", ["mapping"]),
        ("name: \ud800\n", ["YAML"]),
        ("a\x00b: 1\n", ["YAML"]),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_malformed_files(tmp_path: Path, text: str, words: list[str]) -> None:
    message = refused(tmp_path, text)
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    ("assignment", "word"),
    [
        ("seed=" + "[" * 5000, "nested"),
        ("seed=" + "9" * 5000, "YAML"),
        ("seed={a: 1, a: 2}", "twice"),
        ("x" * 100_000, "key=value"),
        ("a.b.c.d=" + "x" * 100_000, "a"),
        ("name.x=1", "name"),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_malformed_overrides(tmp_path: Path, assignment: str, word: str) -> None:
    assert word in refused(tmp_path, BASE, assignment)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("student__architecture__num_hidden_layers", float("nan")),
        ("student__architecture__rms_norm_eps", float("inf")),
        ("training__learning_rate", 1e308),
        ("training__learning_rate", float("inf")),
        ("training__max_grad_norm", float("nan")),
        ("training__window_shards", 2**31),
        ("training__batch_size", 10**30),
        ("losses__key", float("nan")),
        ("losses__key", float("inf")),
        ("fusion__temperature", float("inf")),
        ("seed", 2**80),
        ("seed", -1),
        ("teachers__smollm2__revision", "main\x00"),
        ("teachers__smollm2__model", "a\x1b[31mb"),
        ("output_dir", "runs\x00"),
        ("corpus__path", "a\x00b"),
        ("slurm__profiles", {"p": {"partition": "gpu\n#SBATCH --uid=0"}}),
        ("slurm__profiles", {"p": {"extra": {"mem": "1\nrm -rf x"}}}),
        ("slurm__profiles", {"p": {"extra": {"a\nb": ""}}}),
        ("slurm__profiles", {"p": {"container_mounts": ["/a:/b\nrm"]}}),
        ("slurm__profiles", {"p": {"python": "python\nrm"}}),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_nonsense_values(key: str, value: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_experiment(template(**{key: value}))
    message = str(caught.value)
    assert key.split("__", maxsplit=1)[0] in message
    assert "\n" not in message
    assert len(message) <= MAX_MESSAGE


def test_lines_of_set_up_stay_lines() -> None:
    profile = {"setup": ["module load cuda\nexport A=1"]}
    experiment = parse_experiment(template(slurm__profiles={"p": profile}))
    assert experiment.slurm.profiles["p"].setup == ("module load cuda\nexport A=1",)


TOKENS = [
    "[", "]", "{", "}", ": ", "- ", "\n", "  ", "&a ", "*a", "!!int ", "~", "null", "nan", ".inf",
    "1e400", "-1", "0", "'", '"', "#", "|", ">", "%", "@", "`", "\t", "\\", "\u2028", "\x07",
    "true", "2001-01-01", "0x", "9" * 30, "<<: ",
]  # fmt: skip


def mutated(text: str, rng: random.Random) -> str:
    """One to four edits: tokens inserted, spans deleted or repeated, characters replaced."""
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(text) + 1)
        end = min(len(text), at + rng.randint(1, 40))
        token = rng.choice([*TOKENS, rng.choice(string.printable)])
        text = rng.choice(
            [
                text[:at] + token + text[at:],
                text[:at] + text[end:],
                text[:at] + text[at:end] * 3 + text[end:],
                text[:at] + token + text[end:],
            ]
        )
    return text


def fuzz(folder: Path, count: int) -> tuple[int, int]:
    """Load mutated files; how many were refused and how many had a valid meaning."""
    rng = random.Random(0)
    path = folder / "e.yaml"
    plain = dump_experiment(load_experiment(TEMPLATE))
    messages: list[str] = []
    for _ in range(count):
        path.write_bytes(mutated(rng.choice([BASE, plain]), rng).encode("utf-8", "surrogatepass"))
        try:
            assert isinstance(load_experiment(path), Experiment)
        except ConfigError as error:
            messages.append(str(error))
    require_lines(messages, path)
    return len(messages), count - len(messages)


def test_mutated_files_are_refused_in_one_line_or_mean_something(tmp_path: Path) -> None:
    failed, valid = fuzz(tmp_path, 150)
    assert failed > 30
    assert valid > 10


@pytest.mark.slow
def test_two_thousand_mutated_files(tmp_path: Path) -> None:
    failed, valid = fuzz(tmp_path, 2000)
    assert failed > 400
    assert valid > 100
