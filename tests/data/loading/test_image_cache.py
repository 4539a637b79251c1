"""Stores shared by processes: built once, deleted with their last user, swept after kills."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from helpers.noise_images import noise_dataset

import amlp_ray.data.loading.image_cache as cache
from amlp_ray.data.dataset import PatchDataset
from amlp_ray.errors import DataError

USE = """
import sys, time
from pathlib import Path
import amlp_ray.data.loading.image_cache as cache
from amlp_ray.data.dataset import PatchDataset
cache.SHARED_MEMORY = Path(sys.argv[2])
built = []
build = cache._build
cache._build = lambda *given: (built.append(1), build(*given))
store = cache.open_store(PatchDataset.open(sys.argv[1]), "train", sys.argv[3])
print(len(built), int(store.images.sum()), flush=True)
sys.stdin.readline()
"""


@pytest.fixture(autouse=True)
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Shared memory and cache folder of this test alone."""
    cache.release()
    monkeypatch.setattr(cache, "SHARED_MEMORY", tmp_path / "shm")
    monkeypatch.setenv("AMLP_RAY_CACHE", str(tmp_path / "cache"))
    (tmp_path / "shm").mkdir()
    return tmp_path


@pytest.fixture
def dataset(tmp_path: Path) -> PatchDataset:
    return noise_dataset(tmp_path / "set", 100)


def files(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.rglob("*") if file.is_file())


def start(dataset: PatchDataset, folder: Path, kind: str = "resident") -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", USE, dataset.path, str(folder / "shm"), kind],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip


def said(process: subprocess.Popen[str]) -> list[int]:
    assert process.stdout
    return [int(word) for word in process.stdout.readline().split()]


@pytest.mark.parametrize("kind", ["resident", "mapped"])
@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int16", "float32"])
def test_a_store_holds_the_images_and_keys_as_they_are(
    folders: Path, kind: cache.Kind, dtype: str
) -> None:
    dataset = noise_dataset(folders / "set", 50, shape=(2, 5, 3), dtype=dtype, part=20)
    split = dataset.load("train")
    store = cache.open_store(dataset, "train", kind)
    assert store.images.dtype == np.dtype(dtype)
    np.testing.assert_array_equal(store.images, split.images)
    np.testing.assert_array_equal(store.keys, split.keys)
    assert not store.images.flags.writeable
    assert cache.has_store(dataset, "train", kind)


def test_resident_stores_go_with_their_last_user_and_mapped_ones_stay(
    dataset: PatchDataset, folders: Path
) -> None:
    first, second = (cache.open_store(dataset, "train", "resident") for _ in range(2))
    mapped = cache.open_store(dataset, "train", "mapped")
    cache.release()
    first.close()
    assert len(files(folders / "shm")) == 1
    second.close()
    assert files(folders / "shm") == []
    assert int(second.images.sum()) == int(
        mapped.images.sum()
    )  # memory lives while somebody maps it
    mapped.close()
    assert len(files(folders / "cache")) == 1


def test_the_next_user_in_a_process_finds_it_still_there(
    dataset: PatchDataset, folders: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache.open_store(dataset, "train", "resident")
    monkeypatch.setattr(cache, "_build", lambda *given: pytest.fail("built again"))
    cache.open_store(dataset, "train", "resident")
    cache.release()
    assert files(folders / "shm") == []


def test_one_of_several_processes_builds_and_the_last_deletes(
    dataset: PatchDataset, folders: Path
) -> None:
    users = [start(dataset, folders) for _ in range(3)]
    told = [said(user) for user in users]
    assert sum(built for built, _ in told) == 1
    assert {total for _, total in told} == {int(dataset.load("train").images.sum())}
    for left, user in enumerate(users, 1):
        assert len(files(folders / "shm")) == 1
        user.communicate("\n", timeout=60)
        assert len(files(folders / "shm")) == (0 if left == 3 else 1)


def test_what_a_killed_process_leaves_is_swept_by_the_next(
    dataset: PatchDataset, folders: Path
) -> None:
    killed, other = start(dataset, folders), start(dataset, folders)
    said(killed), said(other)
    killed.send_signal(signal.SIGKILL)
    killed.wait(60)
    cache.sweep()
    assert len(files(folders / "shm")) == 1  # the other still uses it
    other.send_signal(signal.SIGKILL)
    other.wait(60)
    assert len(files(folders / "shm")) == 1
    elsewhere = noise_dataset(folders / "other", 10)
    store = cache.open_store(elsewhere, "train", "resident")
    assert files(folders / "shm") == [store.path.name if store.path else None]


@pytest.mark.parametrize("kind", ["resident", "mapped"])
def test_a_builder_that_died_is_replaced_and_one_that_lives_is_waited_for(
    dataset: PatchDataset, folders: Path, kind: cache.Kind
) -> None:
    path = cache.store_path(dataset, "train", kind)
    path.parent.mkdir(parents=True)
    partial = path.with_suffix(".partial")
    partial.write_bytes(b"half")
    with partial.open("r+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        waiting = start(dataset, folders, kind)
        time.sleep(0.5)
        assert waiting.poll() is None
        assert partial.read_bytes() == b"half"  # neither swept nor written
    assert said(waiting)[0] == 1
    waiting.communicate("\n", timeout=60)
    assert partial.name not in files(folders)


def test_sweeping_never_takes_a_store_from_under_its_users(
    dataset: PatchDataset, folders: Path
) -> None:
    """Threads open and close while others sweep: descriptors have locks of their own, as in processes."""
    total, failures = int(dataset.load("train").images.sum()), []
    until = time.monotonic() + 2

    def use() -> None:
        while time.monotonic() < until:
            path = cache.store_path(dataset, "train", "resident")
            fd = cache._open_or_build(dataset, "train", path, "resident")
            held = os.pread(fd, os.fstat(fd).st_size, 0)
            if sum(held[: dataset.bytes("train")]) != total or not cache._leads_to(path, fd):
                failures.append(len(held))
            cache._leave(fd, path)

    def disturb() -> None:
        while time.monotonic() < until:
            cache.sweep()

    threads = [threading.Thread(target=work) for work in (use, use, use, disturb, disturb)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not failures
    assert files(folders / "shm") == []


def test_mapped_stores_unused_for_longest_make_room(
    folders: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sets = [noise_dataset(folders / str(i), 40, seed=i) for i in range(4)]
    stores = [cache.open_store(some, "train", "mapped") for some in sets[:3]]
    paths = [store.path for store in stores if store.path]
    for age, path in zip((300, 200, 100), paths, strict=True):
        os.utime(path, (time.time() - age,) * 2)
    size = paths[0].stat().st_size
    del stores[:2]
    monkeypatch.setattr(cache, "MAPPED_SHARE", 1.0)
    monkeypatch.setattr(
        cache, "_free", lambda folder: size * (4 - len(list(folder.glob("*.images"))))
    )
    assert cache.fits(sets[3], "train", "mapped")
    cache.open_store(sets[3], "train", "mapped")
    assert [path.exists() for path in paths] == [True, True, True]
    more = noise_dataset(folders / "more", 40, seed=9)
    cache.open_store(more, "train", "mapped")
    assert [path.exists() for path in paths] == [False, True, True]


def test_a_store_cut_short_is_built_again(dataset: PatchDataset, folders: Path) -> None:
    cache.open_store(dataset, "train", "mapped").close()
    path = cache.store_path(dataset, "train", "mapped")
    os.truncate(path, 100)
    np.testing.assert_array_equal(
        cache.open_store(dataset, "train", "mapped").images, dataset.load("train").images
    )


def test_without_shared_memory_images_are_private_and_without_a_cache_it_is_told(
    dataset: PatchDataset, folders: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocked = folders / "file"
    blocked.touch()
    monkeypatch.setattr(cache, "SHARED_MEMORY", blocked)
    monkeypatch.setenv("AMLP_RAY_CACHE", str(blocked / "cache"))
    store = cache.open_store(dataset, "train", "resident")
    assert store.path is None
    np.testing.assert_array_equal(store.images, dataset.load("train").images)
    assert not cache.fits(dataset, "train", "mapped")
    with pytest.raises(DataError, match="set AMLP_RAY_CACHE to a folder"):
        cache.open_store(dataset, "train", "mapped")


def test_a_damaged_part_leaves_nothing_behind(dataset: PatchDataset, folders: Path) -> None:
    part = dataset.files("train")[1].local
    content = bytearray(part.read_bytes())
    content[len(content) // 2 - 200 : len(content) // 2] = bytes(200)
    part.write_bytes(content)
    for kind in ("resident", "mapped"):
        with pytest.raises(DataError, match="damaged"):
            cache.open_store(dataset, "train", kind)
    assert files(folders / "shm") == files(folders / "cache") == []


def test_free_memory_is_known() -> None:
    assert 1 << 20 < cache.free_memory() < 1 << 50


# What a review broke


@pytest.mark.parametrize("kind", ["resident", "mapped"])
def test_a_waiter_that_is_interrupted_leaves_the_builder_s_file(
    kind: cache.Kind, dataset: PatchDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = cache.store_path(dataset, "train", kind)
    path.parent.mkdir(parents=True)
    partial = path.with_suffix(".partial")
    with partial.open("w") as builder:
        fcntl.flock(builder, fcntl.LOCK_EX)
        monkeypatch.setattr(cache.time, "sleep", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            cache.open_store(dataset, "train", kind)
        assert partial.exists()


def test_a_folder_in_shared_memory_that_others_may_write_is_not_used(
    dataset: PatchDataset, folders: Path
) -> None:
    folder = cache.store_path(dataset, "train", "resident").parent
    folder.mkdir(parents=True)
    folder.chmod(0o777)
    store = cache.open_store(dataset, "train", "resident")
    assert store.path is None  # in memory of its own
    assert len(store.images) == 100
    assert files(folder) == []


def test_stores_in_use_are_no_room(
    dataset: PatchDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    used = cache.open_store(dataset, "train", "mapped")
    other = noise_dataset(tmp_path / "other", 100, seed=1)
    monkeypatch.setattr(cache, "_free", lambda _: 0)
    assert not cache.fits(other, "train", "mapped")
    used.close()
    monkeypatch.setattr(cache, "MAPPED_SHARE", 1.0)
    assert cache.fits(other, "train", "mapped")


def test_full_shared_memory_is_no_room(
    dataset: PatchDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cache.fits(dataset, "train", "resident")
    monkeypatch.setattr(cache, "_free", lambda _: 0)
    assert not cache.fits(dataset, "train", "resident")
