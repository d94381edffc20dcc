"""The commands on a store, as a person or a script meets them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from kvdistill.cli import cli
from kvdistill.errors import ConfigError, ShardCorrupt, ShardNotFound
from kvdistill.store.prototypes import hidden_summaries, prototypes, teacher_prototypes
from kvdistill.store.reader import KVStore
from kvdistill.store.writer import add_teacher, create, publish_shard


def run(*arguments: object, **options: Any) -> Result:
    return CliRunner().invoke(cli, [str(a) for a in arguments], **options)


def test_inspect_prints_tables_json_and_plots(tmp_path: Path, build: Any) -> None:
    build.store(tmp_path / "store", build.teacher(has_importance=True))
    text = run("inspect", tmp_path / "store").output
    for word in ("tiny", "int8 / int8", "2 of 2", "388", "importance", "outlier channels"):
        assert word in text
    out = run("inspect", tmp_path / "store", "--json", "--plots", tmp_path / "plots")
    (teacher,) = json.loads(out.stdout)["teachers"]
    assert teacher["tokens"] == 388
    assert 0.9 < sum(teacher["importance"]["counts"]) / (388 * 3 * 2) <= 1
    assert (tmp_path / "plots" / "tiny.png").is_file()
    assert isinstance(run("inspect", tmp_path / "store", "--teacher", "x").exception, ShardNotFound)


@pytest.mark.parametrize("backend", ["zarr", "safetensors"])
def test_a_teacher_without_tokens_is_summarised(tmp_path: Path, build: Any, backend: str) -> None:
    teacher = build.teacher(has_importance=True, backend=backend, groups=build.two_groups)
    store = create(tmp_path / "store", build.corpus(num_shards=1))
    add_teacher(store, teacher)
    made = build.shard(teacher, ("s0", "s1", "s2"), (0, 0, 0))
    assert publish_shard(store, "tiny", "00000", made.shard, made.statistics)
    out = run("inspect", tmp_path / "store", "--json", "--plots", tmp_path / "plots")
    (summary,) = json.loads(out.stdout)["teachers"]
    assert summary["tokens"] == 0
    assert summary["largest_norms"]["key"] == {"0": [0.0], "1": [0.0] * 3, "2": [0.0]}
    assert run("inspect", tmp_path / "store").exit_code == 0


def test_verify_repair_and_what_to_do_next(tmp_path: Path, build: Any) -> None:
    store, _ = build.store(tmp_path / "store", build.teacher())
    good = run("verify", tmp_path / "store")
    assert good.exit_code == 0
    assert "2 shards, no errors found" in good.stderr
    (store.paths.shard("tiny", "00001") / "token_ids" / "zarr.json").unlink()
    bad = run("verify", tmp_path / "store", "--json")
    assert isinstance(bad.exception, ShardCorrupt)
    (finding,) = json.loads(bad.stdout)["findings"]
    assert finding["shard_id"] == "00001"
    assert "token_ids/zarr.json is missing" in finding["problem"]
    mended = run("verify", tmp_path / "store", "--repair")
    assert "moved to" in mended.stdout
    assert "extract again" in str(mended.exception)
    assert run("verify", tmp_path / "store").exit_code == 0
    assert KVStore.open(tmp_path / "store").missing("tiny") == ["00001"]
    asked = run("verify", tmp_path / "store", "--against-teacher", "1").exception
    assert isinstance(asked, ConfigError)


def test_convert_merge_and_rm(tmp_path: Path, build: Any) -> None:
    build.store(tmp_path / "a", build.teacher())
    build.store(tmp_path / "b", build.teacher(name="second"))
    out = run("convert", tmp_path / "a", tmp_path / "c", "--to", "safetensors")
    assert "1 teachers in safetensors" in out.stdout
    out = run("merge", tmp_path / "c", tmp_path / "b")
    assert "2 shards copied" in out.stdout
    assert "second: complete" in out.stdout
    assert run("rm", tmp_path / "c", "--teacher", "tiny", input="n\n").exit_code == 1
    assert KVStore.open(tmp_path / "c").teachers() == ["second", "tiny"]
    out = run("rm", tmp_path / "c", "--teacher", "tiny", "--yes")
    assert "removed tiny, 2 shards; left: ['second']" in out.stdout


def test_two_halves_of_a_teacher_become_a_whole_one(tmp_path: Path, build: Any) -> None:
    teacher = build.teacher(has_summaries=True)
    whole, _ = build.store(tmp_path / "whole", teacher)
    summaries = hidden_summaries(whole, "tiny")
    for half, lost in (("a", "00001"), ("b", "00000")):
        shutil.copytree(tmp_path / "whole", tmp_path / half)
        shutil.rmtree(KVStore.open(tmp_path / half).paths.shard("tiny", lost))
    empty = create(tmp_path / "c", build.corpus())
    out = run("merge", tmp_path / "c", tmp_path / "a")
    assert "tiny: 1 shards missing; its prototypes need all of them" in out.stdout
    out = run("merge", tmp_path / "c", tmp_path / "b", "--prototypes", "2")
    assert "tiny: complete" in out.stdout
    assert empty.paths.prototypes("tiny").is_file()
    made, wanted = teacher_prototypes(empty, "tiny", 2), prototypes(*summaries, 2)
    assert made.keys() == wanted.keys()
    for name, array in wanted.items():
        np.testing.assert_array_equal(made[name], array)
    for name, statistics in whole.statistics("tiny").items():
        merged = KVStore.open(tmp_path / "c").statistics("tiny")[name]
        np.testing.assert_array_equal(merged.to_array(), statistics.to_array())


def test_inspect_and_verify_run_on_a_distributed_scheduler(tmp_path: Path, build: Any) -> None:
    distributed = pytest.importorskip("distributed")
    store, _ = build.store(tmp_path / "store", build.teacher(has_importance=True))
    alone = json.loads(run("inspect", tmp_path / "store", "--json").stdout)
    with distributed.LocalCluster(
        n_workers=1, threads_per_worker=2, processes=False, dashboard_address=None
    ) as cluster:
        address = cluster.scheduler_address
        there = run("inspect", tmp_path / "store", "--json", "--scheduler", address)
        assert json.loads(there.stdout) == alone
        good = run("verify", tmp_path / "store", "--scheduler", address)
        assert "2 shards, no errors found" in good.stderr
        path = store.paths.shard("tiny", "00001") / "key/c/0/0/0/0"
        path.write_bytes(path.read_bytes()[::-1])
        bad = run("verify", tmp_path / "store", "--json", "--scheduler", address)
    assert isinstance(bad.exception, ShardCorrupt)
    assert {finding["shard_id"] for finding in json.loads(bad.stdout)["findings"]} == {"00001"}


@pytest.mark.parametrize("command", ["inspect", "verify", "convert", "merge", "rm"])
def test_every_command_explains_itself(command: str) -> None:
    assert "Usage" in run(command, "--help").output
