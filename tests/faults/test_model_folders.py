"""Model folders that cannot be loaded: one line with a remedy, as teacher and as student."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kvdistill.attention.prompt_template import chat_template
from kvdistill.config.extraction import TeacherConfig
from kvdistill.config.training import StudentConfig
from kvdistill.distill.student.build import build_student, check_student, load_student_tokenizer
from kvdistill.distill.student.latent.model import LatentStudent
from kvdistill.errors import StudentError, TeacherError
from kvdistill.extract.extract_shard import extract_samples
from kvdistill.extract.loading import load_teacher_tokenizer
from kvdistill.extract.teacher import load_teacher
from kvdistill.pipelines.fetch import fetch
from tests.attention.test_families import SAMPLES
from tests.distill.student.latent.thinkers import thinker
from tests.extract.models import save_teacher, tiny_tokenizer
from tests.faults.verdict import MAX_MESSAGE
from tests.pipelines.test_teachers import make

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12345\n"


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_teacher(tmp_path_factory.mktemp("good") / "t")


def refusals(folder: Path, *, of_model: bool = True) -> Iterator[str]:
    """What the teacher, the student and their tokenizers say."""
    source = str(folder / "t")
    loaders: list[Callable[[], Any]] = (
        [
            lambda: load_teacher("t", make(folder, {"model": source})),
            lambda: build_student(StudentConfig(model=source), tiny_tokenizer(), 0),
        ]
        if of_model
        else [
            lambda: load_teacher_tokenizer("t", TeacherConfig(model=source)),
            lambda: load_student_tokenizer(source),
        ]
    )
    for loader in loaders:
        with pytest.raises((TeacherError, StudentError)) as caught:
            loader()
        message = str(caught.value)
        assert "\n" not in message
        assert len(message) <= MAX_MESSAGE + len(source)
        assert source in message
        yield message


def damage(folder: Path, name: str, content: bytes | None) -> None:
    (folder / name).unlink()
    if content is not None:
        (folder / name).write_bytes(content)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("config.json", None, ["has no config.json", "save_pretrained"]),
        ("config.json", b"{", ["config.json is not JSON", "again"]),
        ("config.json", b'{"a": "\xe9"}', ["config.json is not JSON", "again"]),
        ("config.json", b"{}", ["model_type", "config.json"]),
        ("config.json", LFS, ["config.json is a Git LFS pointer", "git lfs pull"]),
        ("model.safetensors", None, ["model.safetensors"]),
        ("model.safetensors", b"", ["model.safetensors is empty", "again"]),
        ("model.safetensors", LFS, ["model.safetensors is a Git LFS pointer", "git lfs pull"]),
        ("model.safetensors", b"\xff" * 99, ["model.safetensors is not JSON", "again"]),
    ],
)
def test_damaged_files(
    good: Path, tmp_path: Path, name: str, content: bytes | None, words: list[str]
) -> None:
    shutil.copytree(good, tmp_path / "t")
    damage(tmp_path / "t", name, content)
    for message in refusals(tmp_path):
        for word in words:
            assert word in message


@pytest.mark.parametrize("kept", [4, 40, 5000])
def test_truncated_weights(good: Path, tmp_path: Path, kept: int) -> None:
    shutil.copytree(good, tmp_path / "t")
    damage(tmp_path / "t", "model.safetensors", (good / "model.safetensors").read_bytes()[:kept])
    for message in refusals(tmp_path):
        assert "model.safetensors" in message
        assert "again" in message
        assert kept < 5000 or "5,000 bytes" in message


@pytest.mark.parametrize(
    ("setting", "value", "words"),
    [
        ("num_key_value_heads", 4, ["k_proj.weight: [16, 32], not [32, 32]", "config.json"]),
        ("vocab_size", 290, ["embed_tokens.weight: [300, 32], not [290, 32]", "config.json"]),
        ("num_attention_heads", 5, ["not a multiple", "(5)", "config.json"]),
        ("num_attention_heads", 0, ["ZeroDivisionError", "config.json"]),
        ("num_attention_heads", "four", ["num_attention_heads", "'four'", "config.json"]),
    ],
)
def test_a_config_that_does_not_fit(
    good: Path, tmp_path: Path, setting: str, value: Any, words: list[str]
) -> None:
    shutil.copytree(good, tmp_path / "t")
    config = json.loads((good / "config.json").read_text()) | {setting: value}
    (tmp_path / "t/config.json").write_text(json.dumps(config))
    for message in refusals(tmp_path):
        for word in words:
            assert word in message


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, ["has no tokenizer.json"]),
        (b"{", ["tokenizer.json is not JSON", "again"]),
        (LFS, ["tokenizer.json is a Git LFS pointer", "git lfs pull"]),
    ],
)
def test_tokenizers(good: Path, tmp_path: Path, content: bytes | None, words: list[str]) -> None:
    shutil.copytree(good, tmp_path / "t")
    damage(tmp_path / "t", "tokenizer.json", content)
    for message in refusals(tmp_path, of_model=False):
        for word in words:
            assert word in message


@pytest.mark.parametrize("source", ["./no/model", "a/b/c", "/no/model", "~/model", "../model"])
def test_paths_that_are_not_there(tmp_path: Path, source: str) -> None:
    loaders: list[Callable[[], Any]] = [
        lambda: load_teacher("t", make(tmp_path, {"model": source})),
        lambda: load_teacher_tokenizer("t", TeacherConfig(model=source)),
        lambda: load_student_tokenizer(source),
        lambda: build_student(StudentConfig(model=source), tiny_tokenizer(), 0),
        lambda: fetch(make(tmp_path, {"model": source})),
    ]
    for loader in loaders:
        with pytest.raises((TeacherError, StudentError)) as caught:
            loader()
        assert source in str(caught.value)
        assert "there is no such folder (check the path)" in str(caught.value)


def test_a_file_instead_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "t").write_text("x")
    for of_model in (True, False):
        for message in refusals(tmp_path, of_model=of_model):
            assert "it is a file" in message


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ({"num_attention_heads": 3}, "not a multiple"),
        ({"num_attention_heads": 0}, "ZeroDivisionError"),
        ({"hidden_size": -1}, "hidden"),
    ],
)
def test_an_architecture_with_a_bad_head_count(setting: dict[str, int], words: str) -> None:
    architecture = {
        "model_type": "llama", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, **setting,
    }  # fmt: skip
    with pytest.raises(StudentError, match=words) as caught:
        check_student(StudentConfig(architecture=architecture, tokenizer="t"), tiny_tokenizer())
    assert "student.architecture" in str(caught.value)


TURNS = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{% if %}", "Expected an expression"),
        ("{{ messages", "unexpected end"),
        ("{{ messages + 1 }}", "can only concatenate"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ undefined.attribute }}", "undefined"),
        (TURNS + "{{ raise_exception('no\n' * 900) }}", "no no"),
        (TURNS.replace("in messages", "in messages if m.role != 'system'"), "system turn; remove"),
        ("{{ messages[1].content }}" + TURNS, "exactly once"),
    ],
)
def test_chat_templates(tmp_path: Path, template: str, words: str) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.name_or_path = "models/chatty"
    tokenizer.chat_template = template
    with pytest.raises(TeacherError) as caught:
        chat_template(tokenizer, "Be good.")
    message = str(caught.value)
    assert words in message
    assert "models/chatty" in message
    assert "`template` instead of `chat`" in message
    assert "\n" not in message
    assert len(message) <= MAX_MESSAGE


@pytest.mark.parametrize("positions", [-1, 0])
def test_a_config_without_a_length_limits_nothing(
    good: Path, tmp_path: Path, positions: int
) -> None:
    shutil.copytree(good, tmp_path / "t")
    config = json.loads((good / "config.json").read_text())
    config["max_position_embeddings"] = positions
    (tmp_path / "t/config.json").write_text(json.dumps(config))
    teacher = load_teacher("t", make(tmp_path, {}))
    shard = extract_samples(teacher, SAMPLES, batch_tokens=4096).shard
    assert len(shard.tokens.sample_ids) == len(SAMPLES)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("latent.json", b"{", "latent.json is not JSON"),
        ("latent.json", b"\xe9", "latent.json is not JSON"),
        ("latent.json", b"[]", "LatentConfig"),
        ("latent.json", b'{"method": "none", "x": 1}', "x"),
        ("latent.safetensors", None, "latent.safetensors"),
        ("latent.safetensors", b"", "latent.safetensors is empty"),
        ("latent.safetensors", LFS, "git lfs pull"),
        ("model.safetensors", b"\xff" * 99, "model.safetensors is not JSON"),
        ("config.json", b"{", "config.json is not JSON"),
    ],
)
def test_latent_students(tmp_path: Path, name: str, content: bytes | None, words: str) -> None:
    thinker(method="pause").save_pretrained(tmp_path)
    damage(tmp_path, name, content)
    with pytest.raises(StudentError) as caught:
        LatentStudent.from_pretrained(tmp_path)
    message = str(caught.value)
    assert words in message
    assert str(tmp_path) in message
    assert "\n" not in message
    assert len(message) <= MAX_MESSAGE + len(str(tmp_path))
