"""The zarr backend, seen through zarr-python, zarrs and dask: the same bits everywhere."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import dask.array as da
import numpy as np
import pytest
import zarr

SHARD = Path("store", "teachers", "tiny", "shards", "00000")
PIPELINES = {
    "zarr-python": "zarr.core.codec_pipeline.BatchedCodecPipeline",
    "zarrs": "zarrs.ZarrsCodecPipeline",
}


@pytest.mark.parametrize("pipeline", sorted(PIPELINES))
@pytest.mark.parametrize("codec", ["bf16", "fp16", "int8", "int4", "fp8_e4m3"])
def test_every_zarr_reader_sees_the_same_bits(
    tmp_path: Path, build: Any, pipeline: str, codec: str
) -> None:
    teacher = build.teacher(
        codec={"key": codec, "value": codec}, groups=build.two_groups, has_importance=True
    )
    _, made = build.store(tmp_path / "store", teacher)
    with zarr.config.set({"codec_pipeline.path": PIPELINES[pipeline]}):
        group = zarr.open_group(tmp_path / SHARD, mode="r")
        for name, want in made["00000"].shard.arrays.items():
            array = group[name]
            assert isinstance(array, zarr.Array)
            np.testing.assert_array_equal(array[...], want)
            np.testing.assert_array_equal(array[:1, :, 60:70], want[:1, :, 60:70])
    assert group.attrs["sample_ids"] == ["s0", "s1", "s2"]
    assert group["g0/key"].metadata.dimension_names == ("layer", "head", "token", "dim")


def test_dask_opens_an_array_as_it_is(tmp_path: Path, build: Any) -> None:
    _, made = build.store(tmp_path / "store", build.teacher())
    key = da.from_zarr(str(tmp_path / SHARD), component="key")
    np.testing.assert_array_equal(key.compute(), made["00000"].shard.arrays["key"])


def test_reading_and_writing_load_neither_zarr_nor_torch() -> None:
    code = (
        "import sys, kvdistill.store.writer, kvdistill.store.reader;"
        "sys.exit(bool({'zarr', 'torch', 'transformers', 'dask'} & sys.modules.keys()))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_threads_that_read_first_import_zarr_together(tmp_path: Path, build: Any) -> None:
    build.store(tmp_path / "store", build.teacher(), num_shards=4)
    code = (
        "import sys, threading; from concurrent.futures import ThreadPoolExecutor;"
        "from kvdistill.store.reader import KVStore;"
        "sys.setswitchinterval(1e-5); store = KVStore.open(sys.argv[1]);"
        "start = threading.Barrier(4);"
        "read = lambda i: (start.wait(), store.read_shard('tiny', i))[1].tokens.num_tokens;"
        "print(list(ThreadPoolExecutor(4).map(read, store.shard_ids)))"
    )
    for _ in range(3):
        done = subprocess.run(
            [sys.executable, "-c", code, tmp_path / "store"],
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )
        assert done.stdout == "[194, 194, 194, 194]\n", done.stderr
