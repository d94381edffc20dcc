"""Chat templates that print today's date: one date per teacher, whenever its shards are read."""

from __future__ import annotations

from datetime import date, datetime
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer
from transformers.utils import chat_template_utils

from kvdistill.attention import prompt_template
from kvdistill.attention.prompt_template import chat_template
from kvdistill.config.experiment import Experiment
from kvdistill.errors import ConfigError, StoreMismatch, TeacherError
from kvdistill.pipelines import extract as pipeline
from kvdistill.pipelines.extract import extract
from kvdistill.pipelines.extract_tasks import other_extraction
from kvdistill.pipelines.reextract import reextract
from kvdistill.store.reader import KVStore
from tests.extract.models import save_teacher, tiny_tokenizer
from tests.pipelines.test_teachers import CORPUS, make

TURNS = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}"
LLAMA_3_2 = (
    "{%- if not date_string is defined %}{%- if strftime_now is defined %}"
    "{%- set date_string = strftime_now('%d %b %Y') %}{%- else %}"
    "{%- set date_string = '26 Jul 2024' %}{%- endif %}{%- endif %}"
    "Today Date: {{ date_string }}\n" + TURNS
)
LLAMA_3_1 = (
    "{%- if not date_string is defined %}{%- set date_string = '26 Jul 2024' %}{%- endif %}"
    "Today Date: {{ date_string }}\n" + TURNS
)
GPT_OSS = "Current date: {{ strftime_now('%Y-%m-%d') }}\n" + TURNS
TEMPLATES = {
    "Llama 3.2": (LLAMA_3_2, "27 Nov 2026", "31 Jan 2026"),
    "gpt-oss": (GPT_OSS, "2026-11-27", "2026-01-31"),
    "Llama 3.1": (LLAMA_3_1, "26 Jul 2024", "31 Jan 2026"),
}


@pytest.fixture
def today(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Set the date that transformers and this package take for today's."""

    def set_today(iso: str) -> None:
        class Clock(datetime):
            @classmethod
            def now(cls, tz: Any = None) -> Any:
                return cls.fromisoformat(iso)

            @classmethod
            def today(cls) -> Any:
                return cls.fromisoformat(iso).date()

        monkeypatch.setattr(chat_template_utils, "datetime", Clock)
        today_is = type("Date", (date,), {"today": Clock.today})
        monkeypatch.setattr(prompt_template, "date", today_is, raising=False)

    set_today("2026-11-27")
    return set_today


def dated(folder: Path, template: str = LLAMA_3_2, **teacher: Any) -> Experiment:
    """A teacher with a chat template, and a corpus of two shards."""
    if not (folder / "t").exists():
        save_teacher(folder / "t")
    tokenizer = AutoTokenizer.from_pretrained(folder / "t")
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder / "t")
    experiment = make(folder, {"chat": True, **teacher}, CORPUS)
    corpus = experiment.corpus.model_copy(update={"shard_chars": 30})
    return experiment.model_copy(update={"corpus": corpus})


def lose_last_shard(store: KVStore) -> None:
    store.paths.shard("t", store.shard_ids[-1]).rename(store.paths.root / "lost")


def test_an_extraction_that_crosses_midnight_continues(tmp_path: Path, today: Any) -> None:
    experiment = dated(tmp_path)
    assert extract(experiment).complete
    store = KVStore.open(experiment.store)
    before = store.read_shard("t", store.shard_ids[-1]).tokens.token_ids
    lose_last_shard(store)
    today("2026-11-28")
    assert extract(experiment).complete
    store = KVStore.open(experiment.store)
    assert store.teacher("t").template_date == "2026-11-27"
    assert (store.read_shard("t", store.shard_ids[-1]).tokens.token_ids == before).all()
    assert reextract(store, experiment, "t", 2).agrees


def test_two_tasks_that_start_around_midnight_agree(
    tmp_path: Path, today: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    experiment = dated(tmp_path)
    load, started = pipeline.load_teacher, []

    def slowly(*args: Any) -> Any:
        """While the first task loads its teacher, another one begins and registers it."""
        started.append(args)
        teacher = load(*args)
        if len(started) == 1:
            today("2026-11-28")
            assert extract(experiment).complete
        return teacher

    monkeypatch.setattr(pipeline, "load_teacher", slowly)
    assert extract(experiment).complete
    store = KVStore.open(experiment.store)
    assert store.teacher("t").template_date == "2026-11-28"


@pytest.mark.parametrize("kind", TEMPLATES)
def test_the_config_sets_the_date(tmp_path: Path, today: Any, kind: str) -> None:
    template, by_default, chosen = TEMPLATES[kind]
    experiment = dated(tmp_path, template, template_date="2026-01-31")
    assert extract(experiment).complete
    manifest = KVStore.open(experiment.store).teacher("t")
    assert manifest.template_date == "2026-01-31"
    assert f": {chosen}\n" in str(manifest.template)
    (tmp_path / "store").rename(tmp_path / "first")
    free = dated(tmp_path, template)
    assert extract(free).complete
    manifest = KVStore.open(free.store).teacher("t")
    assert f": {by_default}\n" in str(manifest.template)
    assert (manifest.template_date is None) == (kind == "Llama 3.1")


def test_another_date_is_another_teacher(tmp_path: Path, today: Any) -> None:
    experiment = dated(tmp_path)
    assert extract(experiment).complete
    store = KVStore.open(experiment.store)
    other = dated(tmp_path, template_date="2026-01-31")
    assert other_extraction(store, other, "t") is not None
    assert other_extraction(store, dated(tmp_path, template_date="2026-11-27"), "t") is None
    message = "template_date: stored '2026-11-27', requested '2026-01-31'"
    with pytest.raises(StoreMismatch, match=message):
        extract(other)


def test_a_store_that_does_not_record_its_date_continues_with_the_date_set(
    tmp_path: Path, today: Any
) -> None:
    experiment = dated(tmp_path)
    assert extract(experiment).complete
    store = KVStore.open(experiment.store)
    path = store.paths.teacher_manifest("t")
    path.write_text(store.teacher("t").model_copy(update={"template_date": None}).to_json())
    lose_last_shard(store)
    today("2026-11-28")
    with pytest.raises(StoreMismatch, match=r"set teachers\.t\.template_date to it"):
        extract(experiment)
    assert extract(dated(tmp_path, template_date="2026-11-27")).complete


def test_a_date_that_is_not_printed_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TeacherError, match=r"prints no date; remove teachers\.t\.template_date"):
        extract(dated(tmp_path, TURNS, template_date="2026-01-31"))
    with pytest.raises(ConfigError, match="`template_date` needs `chat: true`"):
        make(tmp_path, {"template_date": "2026-01-31"})


def test_a_template_that_refuses_a_system_message_is_one_line() -> None:
    tokenizer = tiny_tokenizer()
    refusal = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    tokenizer.chat_template = refusal + TURNS
    assert chat_template(tokenizer).date is None
    with pytest.raises(TeacherError, match="refuses these turns: no system; change `system`"):
        chat_template(tokenizer, "Be brief.")
    assert chat_template_utils.datetime is datetime
