"""Handles of a store in other processes, and system calls that read less than was asked for."""

from __future__ import annotations

import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvdistill.store.reader import KVStore

FORK_WHILE_A_THREAD_READS = """
import os, signal, sys, threading
from collections import OrderedDict
from kvdistill.store.reader import KVStore

inside, may_leave = threading.Event(), threading.Event()
parent = os.getpid()

class Slow(OrderedDict):
    def move_to_end(self, *args, **kwargs):
        if os.getpid() == parent:
            inside.set()
            may_leave.wait()
        super().move_to_end(*args, **kwargs)

store = KVStore.open(sys.argv[1])
store.read_shard("tiny", "00000")
store._open = Slow(store._open)
thread = threading.Thread(target=store.read_shard, args=("tiny", "00000"))
thread.start()
inside.wait()
child = os.fork()
if child == 0:
    signal.alarm(20)
    ok = store.read_shard("tiny", "00000").tokens.num_tokens == 194
    ok &= store.read("tiny", "s3", 0, 0, "key").shape == (130, 8)
    os._exit(0 if ok else 1)
status = os.waitpid(child, 0)[1]
may_leave.set()
thread.join()
print(status)
"""

SHORT_READS = r"""
#define _GNU_SOURCE
#include <string.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>
static size_t cut(int fd, size_t n) {
  char link[64] = "/proc/self/fd/", path[512] = "";
  int digits = 14; char reversed[12]; int k = 0;
  do reversed[k++] = '0' + fd % 10; while (fd /= 10);
  while (k) link[digits++] = reversed[--k];
  if (syscall(SYS_readlink, link, path, 511) < 0 || !strstr(path, "/shards/")) return n;
  return n > 777 ? 777 : n;
}
ssize_t read(int f, void *b, size_t n) { return syscall(SYS_read, f, b, cut(f, n)); }
ssize_t pread(int f, void *b, size_t n, off_t o) {
  return syscall(SYS_pread64, f, b, cut(f, n), o);
}
ssize_t pread64(int f, void *b, size_t n, off_t o) { return pread(f, b, n, o); }
ssize_t preadv(int f, const struct iovec *v, int c, off_t o) {
  return pread(f, v->iov_base, v->iov_len, o);
}
ssize_t preadv64(int f, const struct iovec *v, int c, off_t o) { return preadv(f, v, c, o); }
ssize_t readv(int f, const struct iovec *v, int c) { return read(f, v->iov_base, v->iov_len); }
"""

VERIFY = """
import sys
import kvdistill.store.backends.zarr as zarr
from kvdistill.store.maintenance import verify_store
from kvdistill.store.reader import KVStore

zarr._HAS_ZARRS &= sys.argv[2] == "True"
store = KVStore.open(sys.argv[1])
tokens = [store.read_shard("tiny", i).tokens.num_tokens for i in store.shard_ids]
print(list(verify_store(store)), tokens)
"""


def run(code: str, *arguments: Any, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        env={**os.environ, **environment},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("kind", ["zarr", "safetensors"])
def test_a_child_reads_whatever_the_parents_threads_were_doing(
    tmp_path: Path, build: Any, kind: str
) -> None:
    build.store(tmp_path / "store", build.teacher(backend=kind))
    assert run(FORK_WHILE_A_THREAD_READS, tmp_path / "store") == "0\n"


def test_a_pickled_handle_does_not_depend_on_the_folder(
    tmp_path: Path, build: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    build.store(tmp_path / "store", build.teacher())
    monkeypatch.chdir(tmp_path)
    pickled = pickle.dumps(KVStore.open("store"))
    monkeypatch.chdir("/")
    assert pickle.loads(pickled).read_shard("tiny", "00000").tokens.num_tokens == 194


def test_a_short_pread_is_no_damage(
    tmp_path: Path, build: Any, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, made = build.store(tmp_path / "store", build.teacher(backend=backend))
    whole = os.pread
    monkeypatch.setattr(os, "pread", lambda file, size, start: whole(file, min(size, 99), start))
    found = store.read_shard("tiny", "00000", store.teacher("tiny").layers[-1:], [1])
    np.testing.assert_array_equal(found.arrays["key"], made["00000"].shard.arrays["key"][-1:, 1:2])


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
def test_short_reads_are_no_damage(tmp_path: Path, build: Any, backend: str) -> None:
    """A read may return less than asked for; only the end of a file is damage."""
    from kvdistill.store.backends import zarr

    build.store(tmp_path / "store", build.teacher(backend=backend, has_importance=True))
    (tmp_path / "short.c").write_text(SHORT_READS)
    library = tmp_path / "short.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, tmp_path / "short.c"], check=True)
    seen = run(VERIFY, tmp_path / "store", zarr._HAS_ZARRS, LD_PRELOAD=str(library))
    assert seen == "[] [194, 194]\n"
