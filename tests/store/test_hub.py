"""A store in a repository of the hub, on a stand-in of its API on loopback."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from kvdistill.errors import ShardCorrupt, StoreError, StoreMismatch, StoreNotFound
from kvdistill.store.hub import Hub
from kvdistill.store.maintenance import copy_store, remove_teacher, repair_store, verify_store
from kvdistill.store.reader import KVStore
from tests.hub_server import TOKEN, HubServer, Repository
from tests.store.made import assert_equal_stores, bytes_of, make_store, make_teacher

URL = "hf://datasets/me/caches/gsm8k"


@pytest.fixture
def hub(private_cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    with HubServer() as server:
        connect(server, monkeypatch)
        yield server


@pytest.fixture
def pushed(hub: HubServer, first_push: tuple[KVStore, dict[str, Repository]]) -> KVStore:
    """A store of two shards that is at ``URL``, too."""
    store, repositories = first_push
    hub.repositories.update(copy.deepcopy(repositories))
    return store


@pytest.fixture(scope="module")
def first_push(
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[KVStore, dict[str, Repository]]:
    folder = tmp_path_factory.mktemp("hub")
    store, _ = make_store(folder / "store", make_teacher(backend="safetensors"))
    with pytest.MonkeyPatch.context() as patch, HubServer() as server:
        patch.setenv("KVDISTILL_CACHE", str(folder / "cache"))
        connect(server, patch)
        copy_store(store, URL)
        return store, server.repositories


def connect(server: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("HF_ENDPOINT", server.address)


def files_of(hub: HubServer) -> dict[str, bytes]:
    found = hub.repositories["datasets/me/caches"].files
    assert all(name.startswith("gsm8k/") for name in found)
    return {name.removeprefix("gsm8k/"): content for name, content in sorted(found.items())}


def test_a_copy_there_and_back_is_equal_byte_by_byte(
    tmp_path: Path, pushed: KVStore, hub: HubServer
) -> None:
    there = KVStore.open(URL)
    assert files_of(hub) == bytes_of(pushed.paths.root)
    assert_equal_stores(pickle.loads(pickle.dumps(there)), pushed)
    back, copied = copy_store(there, tmp_path / "back")
    assert copied == 2
    assert bytes_of(tmp_path / "back") == bytes_of(pushed.paths.root)
    assert verify_store(back) == [] == verify_store(there, ["tiny"])
    repository = hub.repositories["datasets/me/caches"]
    assert repository.private
    commits = len(repository.commits)
    assert copy_store(pushed, URL)[1] == copy_store(there, tmp_path / "back")[1] == 0
    assert len(repository.commits) <= commits + 2  # statistics alone


def test_a_shard_appears_in_one_commit(pushed: KVStore, hub: HubServer) -> None:
    """Which is what makes an interrupted push continue with the shards that are left."""
    commits = hub.repositories["datasets/me/caches"].commits
    for shard_id in pushed.shard_ids:
        folder = f"gsm8k/teachers/tiny/shards/{shard_id}/"
        (whole,) = [paths for paths in commits if any(path.startswith(folder) for path in paths)]
        names = {path.removeprefix(folder) for path in whole}
        assert names == {*pushed.commit("tiny", shard_id).files, "COMMIT.json"}


def test_commits_that_others_are_faster_than_are_repeated(
    pushed: KVStore, hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = Hub(URL)
    hub.refuse = 3
    place.put(place.paths.root / "x", b"one")
    assert files_of(hub)["x"] == b"one"
    assert hub.refuse == 0
    monkeypatch.setattr("kvdistill.store.hub._TRIES", 2)
    hub.refuse = 2
    with pytest.raises(StoreError, match=r"others commit all the time; run it again"):
        place.put(place.paths.root / "x", b"two")
    assert files_of(hub)["x"] == b"one"


def test_the_first_of_two_uploads_of_a_shard_wins(
    pushed: KVStore, hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    shard = Hub(URL).paths.shard("tiny", "00000")
    Hub(URL)._remove(shard)
    won, barrier = list[bool](), threading.Barrier(2)

    def upload() -> None:
        there = KVStore.open(URL)
        barrier.wait(60)
        with pushed.place.stored_shard("tiny", "00000") as folder:
            won.append(there.place.publish_shard(folder, pushed.commit("tiny", "00000")))

    threads = [threading.Thread(target=upload) for _ in range(2)]
    [thread.start() for thread in threads]  # type: ignore[func-returns-value]
    [thread.join() for thread in threads]  # type: ignore[func-returns-value]
    assert sorted(won) == [False, True]
    assert_equal_stores(KVStore.open(URL), pushed)


def test_another_extraction_is_refused(tmp_path: Path, build: Any, pushed: KVStore) -> None:
    other, _ = build.store(tmp_path / "other", build.teacher(extraction_fingerprint="f" * 64))
    with pytest.raises(StoreMismatch):
        copy_store(other, URL)


def test_a_damaged_file_is_one_line_and_repaired_by_a_push(pushed: KVStore, hub: HubServer) -> None:
    files = hub.repositories["datasets/me/caches"].files
    name = next(name for name in files if "/00001/" in name and "COMMIT" not in name)
    files[name] = files[name][:-1]
    there = KVStore.open(URL)
    with pytest.raises(ShardCorrupt, match=r"bytes, expected the committed \d.*repair"):
        there.read_shard("tiny", "00001")
    faults = verify_store(there, ["tiny"])
    assert [fault.shard_id for fault in faults] == ["00001"]
    repair_store(there, faults)
    assert copy_store(pushed, URL)[1] == 1
    assert_equal_stores(KVStore.open(URL), pushed)


def test_a_teacher_is_removed(pushed: KVStore, hub: HubServer) -> None:
    remove_teacher(KVStore.open(URL), "tiny")
    assert KVStore.open(URL).teachers() == []
    assert not [name for name in files_of(hub) if name.startswith("teachers/")]


def test_what_is_no_store_is_one_line(pushed: KVStore) -> None:
    for url, line in (
        ("hf://me/caches", r"hf://me/caches: expected hf://datasets/USER/NAME"),
        ("hf://datasets/me", r"expected hf://datasets/USER/NAME"),
        ("hf://datasets/me/nothing", r"no such data set, or no right to it .*hf auth login"),
        ("hf://datasets/me/caches/elsewhere", "no store at"),
    ):
        with pytest.raises((StoreError, StoreNotFound), match=line) as caught:
            KVStore.open(url)
        assert len(str(caught.value)) < 500
        assert "\n" not in str(caught.value)


def test_no_token_and_no_network_are_one_line(
    pushed: KVStore, hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_of_another")
    with pytest.raises(StoreError, match=r"no right to it .*hf auth login"):
        KVStore.open(URL)
    with pytest.raises(StoreError, match=r"no right to it .*hf auth login"):
        copy_store(pushed, "hf://datasets/me/new")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(StoreError, match="check HF_ENDPOINT and the network") as caught:
        KVStore.open(URL)
    assert "\n" not in str(caught.value)
