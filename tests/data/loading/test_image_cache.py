"""Cache files shared by processes: built once, kept, deleted for room only while unused."""

from __future__ import annotations

import fcntl
import math
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from helpers.datasets import noise_dataset

import amlp_ray.data.loading.image_cache as cache
from amlp_ray.data.dataset import PatchDataset
from amlp_ray.data.loading.batches import open_batches
from amlp_ray.errors import DataError
from amlp_ray.utils.locks import acquire_lock

USE = """
import sys
import amlp_ray.data.loading.image_cache as cache
from amlp_ray.data.dataset import PatchDataset
builds = []
build = cache._build
cache._build = lambda *args: (builds.append(1), build(*args))
cached = cache.open_cached_split(PatchDataset.open(sys.argv[1]), "train")
print(len(builds), int(cached.images.sum()), flush=True)
sys.stdin.readline()
"""


@pytest.fixture(autouse=True)
def cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache folder of this test alone."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("AMLP_RAY_CACHE", str(folder))
    return folder


@pytest.fixture
def dataset(tmp_path: Path) -> PatchDataset:
    return noise_dataset(tmp_path / "set", 100)


def files(folder: Path) -> list[str]:
    """The files of the cache, without its lock."""
    return sorted(file.name for file in folder.rglob("*") if file.is_file() and file.name != "lock")


def start(dataset: PatchDataset) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", USE, dataset.path],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def read_numbers(process: subprocess.Popen[str]) -> list[int]:
    assert process.stdout
    return [int(word) for word in process.stdout.readline().split()]


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int16", "float32"])
def test_the_cache_holds_images_and_keys_as_they_are(tmp_path: Path, dtype: str) -> None:
    dataset = noise_dataset(tmp_path / "set", 50, shape=(2, 5, 3), dtype=dtype, part=20)
    split = dataset.load("train")
    assert not cache.is_cached(dataset, "train")
    cached = cache.open_cached_split(dataset, "train")
    assert cached.images.dtype == np.dtype(dtype)
    np.testing.assert_array_equal(cached.images, split.images)
    np.testing.assert_array_equal(cached.keys, split.keys)
    assert not cached.images.flags.writeable
    assert cache.is_cached(dataset, "train")


def test_only_its_user_can_read_a_cache_file(dataset: PatchDataset) -> None:
    cache.open_cached_split(dataset, "train")
    assert cache.cache_path(dataset, "train").stat().st_mode & 0o777 == 0o600


def test_any_rows_can_be_prefetched(dataset: PatchDataset) -> None:
    cached = cache.open_cached_split(dataset, "train")
    cached.prefetch(0, 100)
    cached.prefetch(99, 1)
    cached.prefetch(37, 20)
    np.testing.assert_array_equal(cached.images, dataset.load("train").images)


def test_a_file_stays_for_the_next_run(
    dataset: PatchDataset, cache_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = cache.open_cached_split(dataset, "train")
    del first
    assert len(files(cache_folder)) == 1
    monkeypatch.setattr(cache, "_build", lambda *args: pytest.fail("built again"))
    second = cache.open_cached_split(dataset, "train")
    np.testing.assert_array_equal(second.images, dataset.load("train").images)


def test_arrays_outlive_the_object_and_its_file(dataset: PatchDataset) -> None:
    images = cache.open_cached_split(dataset, "train").images
    cache.cache_path(dataset, "train").unlink()
    np.testing.assert_array_equal(images, dataset.load("train").images)


def test_one_of_several_processes_builds(dataset: PatchDataset, cache_folder: Path) -> None:
    users = [start(dataset) for _ in range(3)]
    numbers = [read_numbers(user) for user in users]
    assert sum(builds for builds, _ in numbers) == 1
    assert {total for _, total in numbers} == {int(dataset.load("train").images.sum())}
    for user in users:
        user.communicate("\n", timeout=60)
    assert files(cache_folder) == [cache.cache_path(dataset, "train").name]


def test_a_builder_that_died_is_replaced_and_one_that_lives_is_waited_for(
    dataset: PatchDataset, cache_folder: Path
) -> None:
    cache_folder.mkdir()
    partial = cache_folder / f".{cache.cache_path(dataset, 'train').name}.1-abc.partial"
    partial.write_bytes(b"half")
    assert cache.is_cached(dataset, "train")  # so that all workers take the same mode
    with acquire_lock(cache_folder / "lock"):
        waiting = start(dataset)
        time.sleep(2)
        assert waiting.poll() is None
        assert partial.read_bytes() == b"half"
    assert read_numbers(waiting)[0] == 1
    waiting.communicate("\n", timeout=60)
    assert files(cache_folder) == [cache.cache_path(dataset, "train").name]


def test_a_killed_user_holds_nothing(dataset: PatchDataset) -> None:
    user = start(dataset)
    read_numbers(user)
    path = cache.cache_path(dataset, "train")
    assert cache._unused_bytes(path) == 0
    user.send_signal(signal.SIGKILL)
    user.communicate(timeout=60)
    assert cache._unused_bytes(path) == path.stat().st_size


def test_deleting_never_takes_a_file_from_under_a_user(
    dataset: PatchDataset, cache_folder: Path
) -> None:
    """Threads open while others delete: descriptors have locks of their own, as in processes."""
    expected = dataset.load("train").images
    path = cache.cache_path(dataset, "train")
    deleted: list[int] = []
    deadline = time.monotonic() + 2

    def use() -> None:
        while time.monotonic() < deadline:
            cached = cache.open_cached_split(dataset, "train")
            assert path.exists()
            np.testing.assert_array_equal(cached.images, expected)
            del cached
            time.sleep(0.002)

    def delete() -> None:
        while time.monotonic() < deadline:
            with acquire_lock(cache_folder / "lock", wait_s=math.inf):
                deleted.append(cache._unused_bytes(path, delete=True))

    cache_folder.mkdir()
    with ThreadPoolExecutor() as pool:
        for future in [pool.submit(work) for work in (use, use, delete, delete)]:
            future.result(60)
    assert any(deleted)


def test_files_unused_for_longest_make_room(
    tmp_path: Path, cache_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets = [noise_dataset(tmp_path / str(i), 40, seed=i) for i in range(4)]
    opened = [cache.open_cached_split(dataset, "train") for dataset in datasets[:3]]
    paths = [cache.cache_path(dataset, "train") for dataset in datasets[:3]]
    for age, path in zip((300, 200, 100), paths, strict=True):
        os.utime(path, (time.time() - age,) * 2)
    size = paths[0].stat().st_size
    del opened[:2]
    monkeypatch.setattr(cache, "MAX_DISK_SHARE", 1.0)
    monkeypatch.setattr(
        cache, "_free_bytes", lambda folder: size * (4 - len(list(folder.glob("*.images"))))
    )
    assert cache.has_room(datasets[3], "train")
    cache.open_cached_split(datasets[3], "train")
    assert [path.exists() for path in paths] == [True, True, True]
    more = noise_dataset(tmp_path / "more", 40, seed=9)
    cache.open_cached_split(more, "train")
    assert [path.exists() for path in paths] == [False, True, True]


def test_files_in_use_are_no_room(
    dataset: PatchDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    used = cache.open_cached_split(dataset, "train")
    other = noise_dataset(tmp_path / "other", 100, seed=1)
    monkeypatch.setattr(cache, "_free_bytes", lambda folder: 0)
    assert not cache.has_room(other, "train")
    del used
    monkeypatch.setattr(cache, "MAX_DISK_SHARE", 1.0)
    assert cache.has_room(other, "train")


def test_a_file_cut_short_is_built_again(dataset: PatchDataset) -> None:
    cached = cache.open_cached_split(dataset, "train")
    del cached
    os.truncate(cache.cache_path(dataset, "train"), 100)
    np.testing.assert_array_equal(
        cache.open_cached_split(dataset, "train").images, dataset.load("train").images
    )


def test_a_cache_folder_that_cannot_be_written_is_reported(
    dataset: PatchDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("AMLP_RAY_CACHE", str(tmp_path / "file" / "cache"))
    assert not cache.has_room(dataset, "train")
    with pytest.raises(DataError, match="set AMLP_RAY_CACHE to a folder"):
        cache.open_cached_split(dataset, "train")


def test_a_full_disk_is_reported_and_leaves_nothing(
    dataset: PatchDataset, cache_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_space(*args: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", no_space)
    with pytest.raises(DataError, match=r"No space left on device.*data=stream"):
        cache.open_cached_split(dataset, "train")
    assert files(cache_folder) == []


def test_a_damaged_part_leaves_nothing_behind(dataset: PatchDataset, cache_folder: Path) -> None:
    part = dataset.files("train")[1].local
    content = bytearray(part.read_bytes())
    content[len(content) // 2 - 200 : len(content) // 2] = bytes(200)
    part.write_bytes(content)
    with pytest.raises(DataError, match="damaged"):
        cache.open_cached_split(dataset, "train")
    assert files(cache_folder) == []


def test_a_waiter_that_is_interrupted_leaves_the_file_of_the_builder(
    dataset: PatchDataset, cache_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache_folder.mkdir()
    partial = cache_folder / f".{cache.cache_path(dataset, 'train').name}.1-abc.partial"
    partial.touch()

    def interrupt(path: Path, *, wait_s: float) -> None:
        assert wait_s == math.inf
        raise KeyboardInterrupt

    monkeypatch.setattr(cache, "acquire_lock", interrupt)
    with pytest.raises(KeyboardInterrupt):
        cache.open_cached_split(dataset, "train")
    assert partial.exists()


def test_a_folder_without_locks_is_reported(
    dataset: PatchDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_locks(*args: object) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with pytest.raises(DataError, match=r"Function not implemented.*set AMLP_RAY_CACHE"):
        cache.open_cached_split(dataset, "train")


@pytest.mark.parametrize("place", [5, 3000, -3, -30], ids=["first", "middle", "last", "keys"])
def test_a_flipped_bit_is_told_and_the_file_made_anew(
    dataset: PatchDataset, place: int, caplog: pytest.LogCaptureFixture
) -> None:
    """Two workers of one machine read the same damaged file."""

    def read(rank: int) -> list[np.ndarray]:
        batches = open_batches(dataset, batch_size=10, seed=0, mode="mapped", rank=rank, world=2)
        return [batch.images.numpy().copy() for batch in batches.epoch(1)]

    expected = [read(0), read(1)]
    path = cache.cache_path(dataset, "train")
    content = path.read_bytes()
    damaged = bytearray(content)
    damaged[place] ^= 4
    path.write_bytes(damaged)
    first = open_batches(dataset, batch_size=10, seed=0, mode="mapped", rank=0, world=2)
    np.testing.assert_array_equal(read(1), expected[1])
    images = [batch.images.numpy().copy() for batch in first.epoch(1)]
    np.testing.assert_array_equal(images, expected[0])
    assert path.read_bytes() == content
    assert caplog.messages == [f"{path} is damaged and made anew."]


def test_a_disk_that_damages_a_file_again_is_an_error(
    dataset: PatchDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches = open_batches(dataset, batch_size=10, seed=0, mode="mapped")
    monkeypatch.setattr(cache.CachedSplit, "is_intact", lambda *args: False)
    with pytest.raises(DataError, match="damaged again right after they were made anew; set AMLP"):
        next(batches.epoch(1))
