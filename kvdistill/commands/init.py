"""``kvdistill init``: an experiment file that runs as it is, filled in from models and a corpus."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import click
import yaml

import kvdistill.config
from kvdistill.config.corpus import CorpusColumns
from kvdistill.config.experiment import PRETRAINED
from kvdistill.corpus.readers import read_files
from kvdistill.corpus.samples import Sample
from kvdistill.errors import ConfigError, CorpusError


@click.command("init")
@click.argument("path", type=click.Path(path_type=Path), default=Path("experiment.yaml"))
@click.option(
    "--teacher", "teachers", multiple=True, metavar="MODEL", help="A hub id or folder; repeatable."
)
@click.option(
    "--student",
    metavar="MODEL",
    help="A pretrained student, hub id or folder; from scratch if not given.",
)
@click.option("--corpus", type=click.Path(path_type=Path), help="A file, or a glob of several.")
@click.option(
    "--from", "start", type=click.Choice(["texts", "chat"]), default="texts", show_default=True,
    help="What the corpus consists of; read off --corpus if that is given.",
)  # fmt: skip
@click.option("--latent", is_flag=True, help="A student that reasons in latent positions.")
@click.option("--slurm", is_flag=True, help="With a profile for a cluster.")
def init_command(
    *,
    path: Path,
    teachers: tuple[str, ...],
    student: str | None,
    corpus: Path | None,
    start: str,
    latent: bool,
    slurm: bool,
) -> None:
    """Write a commented experiment file to PATH (default: experiment.yaml) that runs as it is."""
    if path.exists():
        raise ConfigError(f"{path} already exists; choose another name, or remove it first")
    samples, columns = ([], {}) if corpus is None else _readable(corpus)
    blocks = _blocks("experiment")
    if path.stem != "experiment":  # several in one folder share no store and no runs
        blocks["name"] = blocks["name"].replace("my-experiment", _as_name(path.stem))
    is_chat = start == "chat" or any(sample.chat for sample in samples)
    models = teachers or tuple(
        teacher["model"] for teacher in yaml.safe_load(blocks["teachers"])["teachers"].values()
    )
    if latent:
        student = student or models[0]
        if is_chat or {*teachers} - {student}:
            raise ConfigError(
                "init --latent: teacher and student are one model and the corpus has rationales; "
                "give one of --teacher and --student, and no chat"
            )
        teachers = (student,)
    if teachers or is_chat:
        blocks["teachers"] = _teachers_block(teachers or models, is_chat)
    if student is not None:
        _pretrain(blocks, student, is_chat)
    elif not Path("tokenizer").exists():
        own = f"tokenizer: {json.dumps(models[0])}   "  # so that the file runs as it is
        blocks["student"] = re.sub("tokenizer: tokenizer +", lambda _: own, blocks["student"])
    for name, is_wanted in (("chat", is_chat), ("latent", latent), ("slurm", slurm)):
        blocks |= _blocks(f"start_{name}") if is_wanted else {}
    if corpus is not None:
        blocks["corpus"] = _corpus_block(blocks["corpus"], corpus, len(samples), columns)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n\n".join(blocks.values()) + "\n", encoding="utf-8")
    if columns:
        click.echo(f"guessed corpus.columns: {json.dumps(columns)}; correct them in {path}")
    click.echo(f"wrote {path}\nnext: kvdistill doctor {path}, then kvdistill run {path}")


def _corpus_block(
    template: str, corpus: Path, num_samples: int, columns: Mapping[str, list[str]]
) -> str:
    held_out = 100 if num_samples == 1000 else max(1, num_samples // 10)
    lines = [f"  columns: {json.dumps(columns)}   # guessed"] if columns else []
    lines.append(f"  path: {json.dumps(str(corpus))}")
    block = re.sub(r"(?m)^  path: \S+", lambda _: "\n".join(lines), template)
    return block.replace("eval_samples: 100 ", f"eval_samples: {held_out} ")


def _readable(corpus: Path) -> tuple[list[Sample], dict[str, list[str]]]:
    """The first samples of a corpus, and the columns by which its rows can be read."""
    columns: dict[str, list[str]] = {}
    while True:
        try:
            return read_files(corpus, limit=1000, columns=CorpusColumns(**columns)), columns
        except CorpusError as error:
            known = {name: columns.get(name, []) for name in error.columns}
            if all({*given} <= {*known[name]} for name, given in error.columns.items()):
                raise
            columns |= {name: [*known[name], *given] for name, given in error.columns.items()}


def _blocks(name: str) -> dict[str, str]:
    """The sections of a template of this package, by key, with their comments."""
    template = Path(kvdistill.config.__file__).with_name(f"{name}.yaml")
    blocks = template.read_text(encoding="utf-8").strip().split("\n\n")
    keys = (re.search(r"(?m)^(?!# [A-Z])(?:# )?(\w+):", block) for block in blocks)
    return {key[1]: block for key, block in zip(keys, blocks, strict=True) if key is not None}


def _teachers_block(models: Sequence[str], is_chat: bool) -> str:
    """Teachers under names of their own; what a local folder requires is read off its files."""
    lines, names = ["teachers:                       # each is extracted once"], set[str]()
    for model in models:
        name = _as_name(Path(model).name)
        name = name if name not in names else f"{name}-{len(names) + 1}"
        names.add(name)
        lines += [f"  {name}:", f"    model: {json.dumps(model)}"]
        if '"is_encoder_decoder": true' in _described(model):
            lines.append("    stream: encoder             # or decoder, cross")
        if is_chat and _has_template(model):
            lines.append("    chat: true                  # its tokenizer's chat template")
    return "\n".join(lines)


def _as_name(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-._") or "unnamed"


def _described(model: str) -> str:
    names = ("config.json", "tokenizer_config.json", "chat_template.jinja")
    files = [Path(model) / name for name in names]
    return "".join(x.name + x.read_text(encoding="utf-8") for x in files if x.is_file())


def _has_template(model: str) -> bool:
    """Whether a model reads chats: by a folder's files, or a hub id's name."""
    if Path(model).is_dir():
        return "chat_template" in _described(model)
    return bool(re.search("(?i)instruct|chat|-it$", model))


def _pretrain(blocks: dict[str, str], student: str, is_chat: bool) -> None:
    """Give a template a pretrained student, and the defaults that differ for it."""
    blocks["student"] = f"student:\n  model: {json.dumps(student)}   # with its own tokenizer"
    if is_chat and _has_template(student):
        blocks["student"] += "\n  chat_template: own           # or corpus: the bare turns"
    for section, defaults in PRETRAINED.items():
        for key, value in defaults.items():
            written = f"{value:.1e}" if value < 0.01 else f"{value}"
            blocks[section] = re.sub(rf"(?m)^(  {key}): \S+", rf"\1: {written}", blocks[section])
