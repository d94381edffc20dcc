"""Make the golden stores: run once per format version, never again for an old one.

    python -m tests.store.make_golden          # after raising VERSION

Each is a whole store of a few kilobytes with every codec, two geometries, importance, own text
and a sample without tokens; ``expected.json`` holds hashes of what they decode to.
"""

from __future__ import annotations

import hashlib
import json
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from kvdistill.store.reader import KVStore
from kvdistill.store.writer import create, publish_shard
from kvdistill.types import KINDS
from tests.store.made import TWO_GROUPS, make_corpus, make_shard, make_teacher, registered

GOLDEN = Path(__file__).parent / "golden"
VERSION = 3
CODECS = ("bf16", "fp16", "int8", "fp8_e4m3", "int4", "klt")
LENGTHS = (67, 0, 5)


def make(root: Path, backend: str) -> KVStore:
    """A store of one shard with a teacher per codec."""
    shards = make_corpus(1)
    store = create(root, shards)
    for seed, codec in enumerate(CODECS):
        teacher = make_teacher(
            name=codec,
            backend=backend,
            codec={"key": codec, "value": codec},
            groups=TWO_GROUPS,
            has_importance=True,
            has_hidden_at_cue=True,
            own_text=codec == "int4",
        )
        registered(store, teacher)
        one = make_shard(teacher, [s.sample_id for s in shards[0].samples], LENGTHS, seed)
        publish_shard(store, codec, "00000", one.shard, one.statistics, attempt={"host": "golden"})
    return store


def digests(store: KVStore) -> dict[str, str]:
    """SHA-256 of everything a store decodes to, by teacher and name."""
    found: dict[str, str] = {}
    for teacher in store.teachers():
        shard = store.read_shard(teacher, "00000")
        parts: dict[str, Any] = {
            "sample_ptr": shard.tokens.sample_ptr,
            "char_end": shard.tokens.char_end,
            "importance": shard.arrays["g1/importance"],
            "hidden_at_cue": shard.arrays["hidden_at_cue"],
            "statistics": store.shard_statistics(teacher, "00000")["g0/value"].to_array(),
        }
        for kind in KINDS:
            parts[f"layer 0 {kind}"] = store.read_decoded(teacher, "00000", kind, [0])
            parts[f"layer 1 {kind}"] = store.read_decoded(teacher, "00000", kind, [1])
        for name, array in parts.items():
            content = np.ascontiguousarray(array).tobytes()
            found[f"{teacher} {name}"] = hashlib.sha256(content).hexdigest()
    return found


def main() -> None:
    """Write the archives and what they decode to."""
    GOLDEN.mkdir(exist_ok=True)
    expected = {}
    for backend in ("zarr", "safetensors"):
        with tempfile.TemporaryDirectory() as folder:
            store = make(Path(folder) / "store", backend)
            expected = digests(store)
            with tarfile.open(GOLDEN / f"v{VERSION}_{backend}.tar.xz", "w:xz") as archive:
                archive.add(store.paths.root, "store")
    (GOLDEN / f"v{VERSION}_expected.json").write_text(json.dumps(expected, indent=1) + "\n")


if __name__ == "__main__":
    main()
