"""``kvdistill init``: every file it writes is valid, and one of each kind runs as it is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner, Result

from kvdistill.cli import cli
from kvdistill.config.corpus import CorpusConfig
from kvdistill.config.load import load_experiment
from kvdistill.corpus.readers import load_corpus
from kvdistill.pipelines.run_folder import RunFolder
from tests.slurm.experiment import CORPUS, write_models

TURNS = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello there"}]
TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def init(*options: str) -> dict[str, Any]:
    """The written file, which `config show` accepts."""
    done = CliRunner().invoke(cli, ["init", "new.yaml", *options])
    assert done.exit_code == 0, done.output
    shown = CliRunner().invoke(cli, ["config", "show", "new.yaml"])
    assert shown.exit_code == 0, shown.exception
    body: dict[str, Any] = yaml.safe_load(Path("new.yaml").read_text(encoding="utf-8"))
    Path("new.yaml").unlink()
    return body


@pytest.mark.parametrize("student", [[], ["--student", "org/small"]])
@pytest.mark.parametrize("slurm", [[], ["--slurm"]])
@pytest.mark.parametrize(
    "start", [[], ["--from", "chat"], ["--latent"], ["--teacher", "org/a", "--teacher", "b/A"]]
)
def test_every_combination_is_valid(
    folder: Path, start: list[str], slurm: list[str], student: list[str]
) -> None:
    body = init(*start, *slurm, *student)
    assert ("slurm" in body) == bool(slurm)
    assert ("latent" in body) == ("--latent" in start)
    assert body["training"]["learning_rate"] == (1e-4 if student or "--latent" in start else 1e-3)
    if "--latent" in start:
        assert body["losses"]["key"] == 0.5
        assert [t["model"] for t in body["teachers"].values()] == [body["student"]["model"]]
    elif not student:
        assert body["student"]["tokenizer"] == next(iter(body["teachers"].values()))["model"]
    if "--teacher" in start:
        assert [t["model"] for t in body["teachers"].values()] == ["org/a", "b/A"]
    if "chat" in start:
        assert [t.get("chat") for t in body["teachers"].values()] == [True, None]


def test_names_are_distinct_and_local_folders_are_looked_into(folder: Path) -> None:
    for name, config in (("x/m", {"is_encoder_decoder": True}), ("y/m", {}), ("it", {})):
        (folder / name).mkdir(parents=True)
        (folder / name / "config.json").write_text(json.dumps(config))
    (folder / "y/m/chat_template.jinja").write_text(TEMPLATE)
    (folder / "tokenizer").mkdir()
    options = [x for name in ("x/m", "y/m", "it") for x in ("--teacher", name)]
    body = init("--from", "chat", *options)
    assert body["teachers"] == {
        "m": {"model": "x/m", "stream": "encoder"},
        "m-2": {"model": "y/m", "chat": True},
        "it": {"model": "it"},
    }
    assert body["student"]["tokenizer"] == "tokenizer"


def test_experiments_in_one_folder_share_no_store(folder: Path) -> None:
    found = {}
    for name in ("experiment.yaml", "my chats.yaml", "b/.yaml"):
        done = CliRunner().invoke(cli, ["init", name])
        assert done.exit_code == 0, done.output
        body = load_experiment(Path(name))
        found[body.name] = body.store
    assert found == {
        "my-experiment": Path("stores/my-experiment"),
        "my-chats": Path("stores/my-chats"),
        "yaml": Path("stores/yaml"),
    }


def test_a_corpus_decides_what_is_held_out_and_whether_it_is_a_chat(folder: Path) -> None:
    rows = [json.dumps({"messages": TURNS})] * 30
    (folder / "a-0.jsonl").write_text("\n".join(rows))
    body = init("--corpus", "a-*.jsonl")
    assert body["corpus"] == {"path": "a-*.jsonl", "eval_samples": 3}
    assert body["teachers"]["SmolLM2-135M-Instruct"]["chat"] is True
    (folder / "base-instruct").mkdir()  # a folder's files count, not its name
    for student, chat_template in (("org/small-it", "own"), ("base-instruct", None)):
        body = init("--corpus", "a-*.jsonl", "--student", student, "--teacher", student)
        assert body["student"].get("chat_template") == chat_template
        assert [x.get("chat") for x in body["teachers"].values()] == [chat_template and True]
    rows = [{"problem": "a", "solution": "b"}, {"problem": "c", "solution": "d", "url": "e"}]
    (folder / "b.jsonl").write_text("\n".join(map(json.dumps, rows)))
    body = init("--corpus", "b.jsonl")
    columns = {"prompt": ["problem"], "answer": ["solution"], "ignore": ["url"]}
    assert body["corpus"] == {"path": "b.jsonl", "columns": columns, "eval_samples": 1}
    assert len(load_corpus(CorpusConfig(**body["corpus"])).train) == 1
    (folder / "c.jsonl").write_text('{"body": 3}\n')
    done = CliRunner().invoke(cli, ["init", "new.yaml", "--corpus", "c.jsonl"])
    assert "got the keys 'body'" in str(done.exception)
    assert not (folder / "new.yaml").exists()


@pytest.mark.parametrize(
    "options", [["--teacher", "a", "--student", "b"], ["--teacher", "a", "--teacher", "b"],
                ["--from", "chat"]]
)  # fmt: skip
def test_a_latent_student_is_its_own_teacher(folder: Path, options: list[str]) -> None:
    done = CliRunner().invoke(cli, ["init", "new.yaml", "--latent", *options])
    assert "one model" in str(done.exception)
    assert not (folder / "new.yaml").exists()


def run(folder: Path, *sets: str) -> Result:
    toy = [f"training.{x}" for x in ("max_steps=2", "batch_size=2", "max_length=64")]
    options = [x for assignment in (*toy, *sets) for x in ("--set", assignment)]
    done = CliRunner().invoke(cli, ["run", "new.yaml", *options])
    assert done.exit_code == 0, (done.output, done.exception)
    assert RunFolder(folder / "runs/new").read_record()["finished"]
    return done


def test_a_chat_and_ones_own_models_run_to_the_end(folder: Path) -> None:
    write_models(folder / "models")
    (folder / "models/llama/chat_template.jinja").write_text(TEMPLATE)
    rows = [json.dumps({"messages": [*TURNS, {"role": "user", "content": f"{i}?"}, TURNS[1]]})
            for i in range(30)]  # fmt: skip
    (folder / "chat.jsonl").write_text("\n".join(rows))
    options = ["--teacher", "models/llama", "--teacher", "models/bert", "--corpus", "chat.jsonl"]
    done = CliRunner().invoke(cli, ["init", "new.yaml", *options])
    assert done.exit_code == 0, done.output
    assert load_experiment(folder / "new.yaml").teachers["llama"].chat
    assert "held-out bits per character" in run(folder).stdout


@pytest.mark.slow
def test_a_latent_start_runs_to_the_end(folder: Path) -> None:
    write_models(folder / "models")
    (folder / "gsm8k.jsonl").write_text("".join(CORPUS.open(encoding="utf-8").readlines()[:20]))
    options = ["--latent", "--student", "models/llama", "--corpus", "gsm8k.jsonl"]
    assert CliRunner().invoke(cli, ["init", "new.yaml", *options]).exit_code == 0
    run(folder, "latent.max_new_tokens=4")
