"""The commands on a store, as a person or a script meets them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from kvdistill.cli import cli
from kvdistill.errors import ConfigError, ShardCorrupt, ShardNotFound
from kvdistill.store.reader import KVStore


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


def test_verify_repair_and_what_to_do_next(tmp_path: Path, build: Any) -> None:
    store, _ = build.store(tmp_path / "store", build.teacher())
    good = run("verify", tmp_path / "store")
    assert good.exit_code == 0
    assert "2 shards, nothing wrong" in good.stderr
    (store.paths.shard("tiny", "00001") / "token_ids" / "zarr.json").unlink()
    bad = run("verify", tmp_path / "store", "--json")
    assert isinstance(bad.exception, ShardCorrupt)
    (finding,) = json.loads(bad.stdout)["findings"]
    assert finding["shard_id"] == "00001"
    assert "token_ids/zarr.json: missing" in finding["problem"]
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


@pytest.mark.parametrize("command", ["inspect", "verify", "convert", "merge", "rm"])
def test_every_command_explains_itself(command: str) -> None:
    assert "Usage" in run(command, "--help").output
