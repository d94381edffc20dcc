"""What makes two extractions the same: what computes, and the settings that change stored bytes.

A teacher is its parameters and buffers, the parts of its config that change numbers, tokenizer,
rendered template and settings, not how its model is spelt (``NAMES``). Writers, readers, merges and
training call ``differences``. What one side does not record (an earlier store) is no difference.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import xxhash

from kvdistill.config.base import log_once
from kvdistill.config.experiment import Experiment
from kvdistill.config.extraction import ExtractionConfig, TeacherConfig
from kvdistill.store.commit import file_record
from kvdistill.store.manifest import TeacherManifest
from kvdistill.store.reader import KVStore
from kvdistill.text import shorten

Fields = Mapping[str, Any]  # JSON values by name: settings, or fields of a manifest

NAMES: Final = ("model", "revision", "gguf_file", "tokenizer")
"""Settings that say where something is found; recorded, but never compared."""

_NO_SETTINGS: Final = {"trust_remote_code", "device_map", "tp_plan", "template_date"}
_OF_EXTRACTION: Final = (
    "long_text", "window_overlap", "max_length", "importance", "hidden_at_cue",
    "summaries", "confidence", "logits", "hidden",
)  # fmt: skip
_AT_LEAST: Final = {
    "importance": "has_importance", "hidden_at_cue": "has_hidden_at_cue",
    "summaries": "has_summaries", "confidence": "has_confidence", "logits": "num_logits",
    "hidden": "has_hidden",
}  # fmt: skip
"""Settings of which a store may have more than is asked, and the manifest's fields of what it has:
arrays beside keys and values, which nothing reads but what asks for them. Other layers, heads,
tokens or numbers would change what trains, so all other settings must be equal."""
_INFORMATIONAL: Final = {
    *("name", "format_version", "versions", "adapter_error", "model_files", "model", "revision"),
    *("settings", "extraction_fingerprint"),
}
_OPTIONAL: Final = ("template_date", "architecture", "state_fingerprint")
_NO_NUMBERS: Final = {
    *("architectures", "auto_map", "bos_token_id", "dtype", "eos_token_id", "id2label", "label2id"),
    *("name_or_path", "problem_type", "sep_token_id", "tie_word_embeddings", "tokenizer_class"),
    *("torch_dtype", "transformers_version", "use_cache"),
}
_TRAINING_ONLY: Final = {"drop", "initializer", "init_std", "output_", "aux_loss", "return_dict"}
_PARTS: Final = {"weights": "parameters", "state": "buffers, head, code", "tokenizer": "tokenizer"}
_SMALL_FILES: Final = ("*.json", "*.txt", "*.model", "*.jinja", "*.py")
_INDEX: Final = "model.safetensors.index.json"
_SETTLED_SECONDS: Final = 3.0
_REL_TOL, _ABS_TOL = 1e-5, 2e-7
"""Of measured numbers (rotary frequencies and scalings), which differ by rounding between nodes."""


def as_stored(experiment: Experiment, stored: TeacherManifest) -> Experiment:
    """The experiment, asking for all that the store has of ``_AT_LEAST``, so that it goes on.

    Of the teacher whose ``dtype`` is ``auto``, in the dtype that the store has it in.
    """
    asked = experiment.extraction
    has = {key: getattr(stored, field) for key, field in _AT_LEAST.items()}
    more = {key: value for key, value in has.items() if value > getattr(asked, key)}
    found = experiment.model_copy(update={"extraction": asked.model_copy(update=more)})
    return in_dtype(found, stored.name, stored.dtype)


def in_dtype(experiment: Experiment, name: str, dtype: str) -> Experiment:
    """The experiment, with a teacher's ``dtype: auto`` replaced."""
    teacher = experiment.teachers.get(name)
    if teacher is None or teacher.dtype != "auto":
        return experiment
    teachers = {**experiment.teachers, name: teacher.model_copy(update={"dtype": dtype})}
    return experiment.model_copy(update={"teachers": teachers})


def recorded_settings(experiment: Experiment, name: str) -> dict[str, Any]:
    """Every setting of one teacher's extraction that can change a stored byte, and ``NAMES``.

    Inner sections leave out defaults: a setting that a later version adds invalidates no store.
    """
    teacher = experiment.teachers[name]
    found = teacher.model_dump(mode="json", exclude=_NO_SETTINGS)
    found |= teacher.model_dump(mode="json", exclude=_NO_SETTINGS, exclude_defaults=True)
    found |= experiment.extraction.model_dump(mode="json", include=set(_OF_EXTRACTION))
    found |= {"long_text": experiment.long_text(name), "max_length": experiment.max_length(name)}
    return found | {"codec": experiment.codec(name).model_dump(mode="json")}


def extraction_fingerprint(settings: Fields) -> str:
    """SHA-256 of recorded settings: the id by which a commit and its manifest belong together."""
    changed = {k: v for k, v in settings.items() if v != _default(k)}
    body = {k: v for k, v in changed.items() if k not in ("model", "tokenizer", *_OF_EXTRACTION)}
    body["codec"] = settings["codec"]
    body["extraction"] = {k: v for k, v in changed.items() if k in _OF_EXTRACTION}
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _default(key: str) -> Any:
    if key == "dtype":  # what is recorded is never `auto`, and fingerprints must not change
        return "float32"
    fields = ExtractionConfig.model_fields if key in _OF_EXTRACTION else TeacherConfig.model_fields
    return fields[key].get_default(call_default_factory=True)


def number_changing(config: Fields) -> dict[str, Any]:
    """The parts of a model's config that can change what it computes, JSON-ready."""
    kept = {
        key: number_changing(value) if isinstance(value, Mapping) else value
        for key, value in ((str(key), value) for key, value in config.items())
        if not (key in _NO_NUMBERS or key[0] == "_" or any(part in key for part in _TRAINING_ONLY))
    }
    text = json.dumps(kept, default=str)
    return dict(json.loads(text, parse_constant=str))  # infinity is not JSON


def teacher_files(config: TeacherConfig, known: Fields) -> dict[str, str]:
    """Checksums of a model's ``weights`` and ``other`` files; what is not here is left out.

    Other files are config, tokenizer, templates and code. Weights whose ``stamp`` (inode, size,
    times of modification and of change) is the ``known`` one are not read: programs cannot set the
    last. Files that changed seconds ago have none, as a second change might leave the same time.
    """
    folder = _model_folder(config.model, config.revision)
    own = folder if config.tokenizer is None else _model_folder(config.tokenizer, None)
    if folder is None or own is None:
        return {}
    small = {path for place in (folder, own) for kind in _SMALL_FILES for path in place.glob(kind)}
    lines = [f"{x.name} {file_record(x).xxh3}" for x in small if x.name != _INDEX]
    found = {"other": _combined(sorted(lines))}
    weights = _weight_files(folder, config.gguf_file)
    if config.weights == "random" or not all(path.is_file() for path in weights):
        return found
    stats = [path.stat() for path in weights]
    if time.time() - max(max(x.st_mtime, x.st_ctime) for x in stats) > _SETTLED_SECONDS:
        times = [f"{x.st_ino} {x.st_size} {x.st_mtime_ns} {x.st_ctime_ns}" for x in stats]
        found["stamp"] = _combined(times)
        if found["stamp"] == known.get("stamp"):
            return found | {"weights": known["weights"]}
    return found | {"weights": _combined([file_record(path).xxh3 for path in weights])}


def _model_folder(model: str, revision: str | None) -> Path | None:
    """A model's own folder, or its snapshot in the hub's cache; None where there is neither."""
    from huggingface_hub import try_to_load_from_cache

    if Path(model).is_dir():
        return Path(model)
    with suppress(ValueError):  # a path is no id
        found = try_to_load_from_cache(model, "config.json", revision=revision)
        return Path(found).parent if isinstance(found, str) else None
    return None


def _weight_files(folder: Path, gguf_file: str | None) -> list[Path]:
    names = [gguf_file or "model.safetensors"]
    if gguf_file is None and not (folder / names[0]).exists() and (folder / _INDEX).is_file():
        index = json.loads((folder / _INDEX).read_text(encoding="utf-8"))
        names = sorted(set(index["weight_map"].values()))
    return [folder / name for name in names]


def _combined(lines: Sequence[str]) -> str:
    return f"xxh3:{xxhash.xxh3_128_hexdigest(chr(10).join(lines).encode())}"


def differences(store: KVStore, name: str, requested: Fields) -> list[str]:
    """How a stored teacher differs from a requested one, a phrase each; empty where it does not.

    ``requested`` are JSON values of a ``TeacherManifest``'s fields: all, or those that are known.
    """
    stored, settings = store.teacher(name), requested.get("settings")
    if stored.settings and settings:
        found = list(_other_settings(store, stored, settings))
        return found or list(_other_facts(store, stored, requested))
    return list(_other_facts(store, stored, requested)) or list(_unnamed(store, stored, requested))


def refusal(store: KVStore, name: str, phrases: Sequence[str]) -> str:
    """The message that refuses an extraction which differs from the stored one."""
    shown = "; ".join([shorten(phrase, 140) for phrase in phrases[:2]])
    more = f"; and {len(phrases) - 2} more" if len(phrases) > 2 else ""
    return (
        f"{shorten(store.where, 80)}: teacher {name!r} was extracted differently ({shown}"
        f"{more}); restore what the store has, or give the new extraction another name"
    )


def _phrase(what: str, stored: Any, requested: Any) -> str:
    if isinstance(stored, dict) and isinstance(requested, dict):
        same = [key for key in stored if key in requested and stored[key] == requested[key]]
        stored, requested = (
            {key: side[key] for key in side if key not in same} for side in (stored, requested)
        )
    ours, theirs = (shorten(repr(side), 50) for side in (stored, requested))
    return f"{what}: stored {ours}, requested {theirs}"


def _other_settings(store: KVStore, stored: TeacherManifest, theirs: Fields) -> Iterator[str]:
    ours = {key: _default(key) for key in theirs} | (stored.settings or {})
    for key in (key for key in theirs if key not in NAMES and ours[key] != theirs[key]):
        if not _means_the_same(key, store, stored, ours, theirs):
            yield _phrase(key, ours[key], theirs[key])


def _unnamed(store: KVStore, stored: TeacherManifest, requested: Fields) -> Iterator[str]:
    """Settings of an earlier version's store, which has a fingerprint of them all."""
    settings, known = requested.get("settings"), stored.extraction_fingerprint
    is_same = requested.get("extraction_fingerprint", known) == known
    if settings is not None:
        log_once(
            f"{store.where}: teacher {stored.name!r} was stored by an earlier version; what "
            "that did not record (buffers, the model's config) is not compared"
        )
        same, treatments = {**settings, "revision": stored.revision}, ("error", "truncate", "skip")
        own = [x for x in treatments if extraction_fingerprint({**same, "long_text": x}) == known]
        is_same = own == [same["long_text"]] or (own and not _met_limit(store, stored, same, same))
    if not is_same:
        yield "settings: another template, bos, layers, long_text or the like, stored without names"


def _means_the_same(
    key: str, store: KVStore, stored: TeacherManifest, ours: Fields, theirs: Fields
) -> bool:
    """Whether a setting's two values store the same bytes of this teacher."""
    value, config = theirs[key], stored.architecture or {}
    if key == "layers":
        every = config.get("num_hidden_layers") == len(stored.layers) + len(stored.skipped_layers)
        return every if value is None else sorted(value) == list(stored.layers)
    if key == "heads" and value is not None and stored.kept_heads is None:
        widths = {group.num_key_value_heads for group in stored.groups}
        return value == list(range(len(value))) and widths == {len(value)}
    if key == "bos":
        return stored.model_type.startswith("gemma") and "never" not in (ours[key], value)
    if key in ("long_text", "window_overlap", "max_length"):
        return not _met_limit(store, stored, ours, theirs)
    if key in ("confidence", "logits"):
        return not stored.predicts_text
    return key == "importance" and stored.stream == "cross"


def _met_limit(store: KVStore, stored: TeacherManifest, ours: Fields, theirs: Fields) -> bool:
    """Whether other treatment of long texts would have changed what is stored."""
    before, limit, name = ours["max_length"], theirs["max_length"], stored.name
    attempts = [store.commit(name, unit).attempt for unit in store.committed(name)]
    kinds = {"truncate": "truncated", "window": "windowed", "skip": "skipped"}
    if limit == before and ours.get("window_overlap") == theirs.get("window_overlap"):
        kinds.pop(theirs["long_text"], None)
    unknown = {"truncated": True, "windowed": False, "skipped": True}  # of an earlier version
    is_met = any(attempt.get(key, unknown[key]) for attempt in attempts for key in kinds.values())
    if is_met or limit in (None, before) or (isinstance(before, int) and before < limit):
        return is_met
    if stored.own_text or stored.eviction is not None or stored.stream == "decoder":
        return True  # its token tables are not what was read
    tables = (store.token_table(name, unit) for unit in store.committed(name))
    return any((table.sample_ptr[1:] - table.sample_ptr[:-1] > limit).any() for table in tables)


def _other_facts(store: KVStore, stored: TeacherManifest, requested: Fields) -> Iterator[str]:
    ours = stored.model_dump(mode="json", exclude=_INFORMATIONAL)
    for field, value in ((field, ours[field]) for field in ours if field in requested):
        other = requested[field]
        unknown = field in _OPTIONAL and None in (value, other)
        if unknown or (field == "kept_heads" and stored.settings):  # which is compared as a setting
            continue
        if field == "backend" and value != other and not store.missing(stored.name):
            continue  # nothing more is written
        if field == "architecture":
            keys = [key for key in value if key in other and value[key] != other[key]]
            yield from (_phrase(f"{k} of the model's config", value[k], other[k]) for k in keys)
        elif (part := _PARTS.get(field.removesuffix("_fingerprint"))) and value != other:
            yield f"{_phrase('model', stored.model, requested['model'])}, with other {part}"
        elif field == "transform" and value and other and value != other:
            yield "codec klt: fitted apart, so codes of one mean nothing in the other's bases"
        elif not _same(value, other):
            yield _phrase(field, value, other)
            if field == "template" and not stored.template_date and requested.get("template_date"):
                yield f"set teachers.{stored.name}.template_date to it, if it prints its first day"


def _same(ours: Any, theirs: Any) -> bool:
    """Equality of JSON values, with a tolerance for numbers that are not whole."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        return ours.keys() == theirs.keys() and all(_same(ours[k], theirs[k]) for k in ours)
    if isinstance(ours, list) and isinstance(theirs, list):
        return len(ours) == len(theirs) and all(map(_same, ours, theirs))
    if isinstance(ours, float) and isinstance(theirs, float):
        return math.isclose(ours, theirs, rel_tol=_REL_TOL, abs_tol=_ABS_TOL)
    return bool(ours == theirs)
