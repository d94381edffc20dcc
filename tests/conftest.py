"""Fixtures that every part of the tests may use."""

from __future__ import annotations

import gc
import logging
import os
import shutil
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import pytest
import torch

from kvdistill.corpus.samples import Shard
from kvdistill.store.manifest import TeacherManifest
from kvdistill.store.reader import KVStore
from tests import preloaded
from tests.pipelines.tiny import make_extracted
from tests.store.made import (
    LENGTHS,
    TWO_GROUPS,
    Made,
    make_corpus,
    make_shard,
    make_store,
    make_teacher,
)

ROOT = Path(__file__).parents[1]
MEMORY_DISK = Path("/dev/shm")
SCRATCH_BYTES = 4 << 30

if not torch.cuda.is_available():  # read when Triton is first imported, which torch does too
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_configure(config: pytest.Config) -> None:
    """Keep scratch files in memory: every shard and checkpoint is flushed, which disks are slow at.

    `TMPDIR`, `--basetemp` and a memory disk that is small or absent leave pytest's own choice.
    """
    asked = config.option.basetemp or os.environ.get("TMPDIR")
    if asked or not MEMORY_DISK.is_dir():
        return
    if shutil.disk_usage(MEMORY_DISK).free >= SCRATCH_BYTES:
        os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(MEMORY_DISK))


@pytest.fixture(scope="session")
def real_models() -> Path:
    """Folder with ``smollm2``, ``minilm`` and ``gemma3``: what `make models` fetches."""
    folder = Path(os.environ.get("KVDISTILL_MODELS", ROOT / "models"))
    absent = [
        name
        for name in ("smollm2", "minilm", "gemma3")
        if not (folder / name / "config.json").is_file()
    ]
    if absent:
        pytest.fail(f"{folder} has no {absent}; run `make models`, or set KVDISTILL_MODELS")
    return folder


def freeze_heap() -> None:
    """Leave what is imported by now out of all later collections.

    A training makes two full ones. Over the modules of torch and transformers they would cost more
    than the steps of a tiny run, and in a forked child they would copy every page.
    """
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    """Let the interpreter collect what was frozen, or Triton's binding reports it as leaked."""
    gc.unfreeze()


@pytest.fixture(scope="module", autouse=True)
def frozen_heap() -> None:
    """``freeze_heap`` for what earlier modules have imported."""
    freeze_heap()


@pytest.fixture(scope="session")
def extracted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Path of an experiment file whose store is complete."""
    path = make_extracted(tmp_path_factory.mktemp("extracted"))
    freeze_heap()
    return path


@pytest.fixture(scope="session")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with `python` and `kvdistill` that need not import anything: see `preloaded`."""
    folder = tmp_path_factory.mktemp("programs")
    address = folder / "socket"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.preloaded", str(address)]
    with subprocess.Popen(command, cwd=ROOT, env=environment) as server:
        while not address.exists():
            assert server.poll() is None
            time.sleep(0.1)
        preloaded.write_program(folder / "kvdistill", str(address), "-m", "kvdistill.cli")
        preloaded.write_program(folder / "python", str(address))
        yield folder
        server.kill()


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """Address of an S3 server on loopback."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    yield "http://{}:{}".format(*server.get_host_and_port())
    server.stop()


@pytest.fixture
def private_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache of stores in buckets, for this test alone."""
    monkeypatch.setenv("KVDISTILL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def use_s3(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (
        ("ENDPOINT", server),
        ("ALLOW_HTTP", "true"),
        ("ACCESS_KEY_ID", "key"),
        ("SECRET_ACCESS_KEY", "secret"),
        ("REGION", "us-east-1"),
    ):
        monkeypatch.setenv(f"AWS_{name}", value)


@pytest.fixture
def bucket(s3_server: str, private_cache: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """URL of an empty place in a new bucket, which the environment gives access to."""
    use_s3(s3_server, monkeypatch)
    name = f"test-{uuid.uuid4().hex[:12]}"
    urlopen(Request(f"{s3_server}/{name}", method="PUT")).close()
    return f"s3://{name}/some/prefix"


@pytest.fixture
def refusing(
    private_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[int, str], str]]:
    """URL of a bucket that answers every request that writes with a status and code."""

    class Handler(BaseHTTPRequestHandler):
        answer = 403, "AccessDenied"

        def do_GET(self) -> None:
            self.reply(404, "NoSuchKey")

        def do_PUT(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            self.reply(*self.answer)

        def reply(self, status: int, code: str) -> None:
            body = f"<Error><Code>{code}</Code></Error>".encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    def answer(status: int, code: str) -> str:
        Handler.answer = status, code
        return "s3://bucket/prefix"

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        use_s3(f"http://127.0.0.1:{server.server_port}", monkeypatch)
        yield answer
        server.shutdown()


@pytest.fixture
def build() -> Any:
    """Builders of small teachers and shards without any model."""

    class Build:
        teacher: Callable[..., TeacherManifest] = staticmethod(make_teacher)
        shard: Callable[..., Made] = staticmethod(make_shard)
        corpus: Callable[..., list[Shard]] = staticmethod(make_corpus)
        store: Callable[..., tuple[KVStore, dict[str, Made]]] = staticmethod(make_store)
        two_groups = TWO_GROUPS
        lengths = LENGTHS

    return Build


@pytest.fixture(params=["zarr", "zarr without zarrs", "safetensors"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each store backend in turn, zarr with either of its readers."""
    if request.param == "zarr without zarrs":
        monkeypatch.setattr("kvdistill.store.backends.zarr._HAS_ZARRS", False)
    return str(request.param.partition(" ")[0])
