"""Batches in every mode: the same images in the same order, to the byte."""

from __future__ import annotations

import hashlib
import signal
from collections.abc import Iterable, Iterator
from itertools import chain, islice
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from helpers.datasets import noise_dataset

import amlp_ray.data.loading.image_cache as cache
import amlp_ray.data.loading.shuffle as order
from amlp_ray.data.dataset import PatchDataset
from amlp_ray.data.loading.batches import (
    Batch,
    ExampleBatches,
    MappedBatches,
    Mode,
    StreamBatches,
    open_batches,
    resolve_mode,
)
from amlp_ray.data.path import DataPath
from amlp_ray.errors import ConfigError, DataError

MODES: tuple[Mode, ...] = ("mapped", "stream")


@pytest.fixture(autouse=True)
def _cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AMLP_RAY_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def lanes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make splits above 1000 bytes large; the windows of all lanes hold 15 images of 64 bytes."""
    monkeypatch.setattr(order, "WINDOW", 1000)


@pytest.fixture(scope="module")
def parted(ray_session: None, tmp_path_factory: pytest.TempPathFactory) -> PatchDataset:
    """500 images in parts of 24."""
    return noise_dataset(tmp_path_factory.mktemp("parted") / "set", 500, part=24)


def _keys(batches: Iterable[Batch]) -> list[list[int]]:
    return [batch.keys.tolist() for batch in batches]


def _digest(batches: Iterable[Batch]) -> str:
    digest = hashlib.sha256()
    for images, keys in batches:
        digest.update(images.numpy().tobytes())
        digest.update(keys.numpy().tobytes())
    return digest.hexdigest()


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_any_number_of_workers_sees_the_same_global_batches(tmp_path: Path, world: int) -> None:
    dataset = noise_dataset(tmp_path / "set", 36)
    whole = open_batches(dataset, batch_size=8, seed=5)
    workers = [
        open_batches(dataset, batch_size=8, seed=5, rank=r, world=world) for r in range(world)
    ]
    shares = [_keys(worker.epoch(3)) for worker in workers]
    assert whole.steps_per_epoch == workers[0].steps_per_epoch == 36 // 8
    for step, batch in enumerate(_keys(whole.epoch(3))):
        assert [key for share in shares for key in share[step]] == batch
        assert {len(share[step]) for share in shares} <= {8 // world, 8 // world + 1}


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int16", "float32"])
def test_images_come_with_their_keys_and_as_stored(tmp_path: Path, dtype: str) -> None:
    dataset = noise_dataset(tmp_path / "set", 20, shape=(2, 8, 9), dtype=dtype)
    split = dataset.load("train")
    row_of = {int(key): row for row, key in enumerate(split.keys)}
    for batch in open_batches(dataset, batch_size=6, seed=0).epoch(1):
        assert batch.images.dtype == getattr(torch, dtype)
        assert batch.keys.dtype == torch.int64
        rows = [row_of[key] for key in batch.keys.tolist()]
        np.testing.assert_array_equal(batch.images.numpy(), split.images[rows])


def test_the_order_of_a_small_split_is_what_it_always_was(tmp_path: Path) -> None:
    dataset = noise_dataset(tmp_path / "set", 23)
    keys = dataset.load("train").keys
    first = _keys(open_batches(dataset, batch_size=8, seed=1).epoch(1))
    drawn = np.random.default_rng([1, 1]).permutation(23)
    assert first == [keys[drawn[:8]].tolist(), keys[drawn[8:16]].tolist()]
    assert first != _keys(open_batches(dataset, batch_size=8, seed=1).epoch(2))
    assert first != _keys(open_batches(dataset, batch_size=8, seed=2).epoch(1))


@pytest.mark.ray
@pytest.mark.parametrize("mode", MODES)
def test_a_split_smaller_than_a_batch_has_a_step(
    parted: PatchDataset, tmp_path: Path, mode: Mode
) -> None:
    small = noise_dataset(tmp_path / "set", 3)
    batches = open_batches(small, batch_size=8, seed=0, mode=mode, epochs=2)
    for epoch in (1, 2):
        (keys,) = _keys(batches.epoch(epoch))
        assert len(keys) == 8
        assert set(keys) == set(small.load("train").keys.tolist())


@pytest.mark.ray
@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("world", [1, 2])
def test_all_modes_give_the_same_bytes(
    parted: PatchDataset, request: pytest.FixtureRequest, large: bool, world: int
) -> None:
    if large:
        request.getfixturevalue("lanes")
    digests = {}
    for mode in MODES:
        for rank in range(world):
            batches = open_batches(
                parted, batch_size=16, seed=4, mode=mode, rank=rank, world=world, epochs=3
            )
            assert isinstance(batches, StreamBatches if mode == "stream" else MappedBatches)
            digests[mode, rank] = [_digest(batches.epoch(epoch)) for epoch in (1, 2, 3)]
    for rank in range(world):
        assert digests["mapped", rank] == digests["stream", rank]
    assert len(set(chain(*digests.values()))) == 3 * world


@pytest.mark.usefixtures("lanes")
def test_workers_share_a_large_split_without_overlap(tmp_path: Path) -> None:
    dataset = noise_dataset(tmp_path / "set", 500)
    whole = _keys(open_batches(dataset, batch_size=16, seed=0).epoch(1))
    shares = [
        _keys(open_batches(dataset, batch_size=16, seed=0, rank=r, world=4).epoch(1))
        for r in range(4)
    ]
    assert [list(chain(*parts)) for parts in zip(*shares, strict=True)] == whole
    flat = list(chain(*whole))
    assert len(set(flat)) == len(flat) == 500 // 16 * 16


@pytest.mark.ray
def test_epochs_in_sequence_come_from_one_execution(
    parted: PatchDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    import amlp_ray.data.loading.ray_stream as ray_data

    requested: list[range] = []
    begin = ray_data.stream_tables

    def counted(source: ray_data.SplitSource, epochs: range) -> Iterator[object]:
        requested.append(epochs)
        return begin(source, epochs)

    monkeypatch.setattr(ray_data, "stream_tables", counted)
    monkeypatch.setattr(ray_data, "EPOCHS_PER_EXECUTION", 3)
    expected = open_batches(parted, batch_size=64, seed=0, mode="mapped")
    streamed = open_batches(parted, batch_size=64, seed=0, mode="stream", epochs=8)
    for epoch in (1, 2, 3, 4):
        assert _digest(streamed.epoch(epoch)) == _digest(expected.epoch(epoch))
    assert requested == [range(1, 4), range(4, 7)]
    assert len(list(islice(streamed.epoch(5), 2))) == 2  # left early
    assert _digest(streamed.epoch(7)) == _digest(expected.epoch(7))  # as after a resume
    assert _digest(streamed.epoch(8)) == _digest(expected.epoch(8))
    assert _digest(streamed.epoch(2)) == _digest(expected.epoch(2))
    assert requested == [range(1, 4), range(4, 7), range(7, 9), range(2, 5)]


@pytest.mark.ray
def test_a_reader_that_dies_is_replaced_and_the_order_stays(
    ray_session: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import amlp_ray.data.loading.ray_stream as ray_data

    dataset = noise_dataset(tmp_path / "set", 2000, part=50)
    monkeypatch.setattr(order, "WINDOW", 1000)
    monkeypatch.setattr(
        ray_data, "BLOCK_BYTES", 1000
    )  # so that the reader has most of its way before it
    expected = _digest(open_batches(dataset, batch_size=8, seed=0, mode="mapped").epoch(1))
    batches = open_batches(dataset, batch_size=8, seed=0, mode="stream", epochs=1).epoch(1)
    first = next(batches)
    readers = [
        process
        for process in psutil.Process().children(recursive=True)
        if "_read_epochs" in process.name()
        or any("_read_epochs" in word for word in process.cmdline())
    ]
    assert readers
    for reader in readers:
        reader.send_signal(signal.SIGKILL)
    assert _digest(chain([first], batches)) == expected


@pytest.mark.ray
def test_a_stream_runs_where_workers_hold_every_cpu(parted: PatchDataset) -> None:
    import ray

    @ray.remote(num_cpus=2)
    class Worker:
        def ready(self) -> bool:
            return True

    worker = Worker.remote()
    ray.get(worker.ready.remote(), timeout=60)
    try:
        assert (
            len(
                _keys(
                    open_batches(parted, batch_size=100, seed=0, mode="stream", epochs=1).epoch(1)
                )
            )
            == 5
        )
    finally:
        ray.kill(worker)


@pytest.mark.ray
def test_a_dataset_in_an_object_store_gives_the_same_bytes(
    parted: PatchDataset, s3_bucket: str
) -> None:
    remote_folder = DataPath(s3_bucket) / "streamed"
    for entry in parted.root.entries():
        (remote_folder / entry.name).atomic_write((parted.root / entry.name).read_bytes())
    remote = PatchDataset.open(remote_folder)
    expected = _digest(open_batches(parted, batch_size=50, seed=0, mode="mapped").epoch(1))
    for mode in MODES:
        assert (
            _digest(open_batches(remote, batch_size=50, seed=0, mode=mode, epochs=1).epoch(1))
            == expected
        )


@pytest.mark.ray
def test_a_part_damaged_meanwhile_is_told_by_name(ray_session: None, tmp_path: Path) -> None:
    dataset = noise_dataset(tmp_path / "set", 100)
    batches = open_batches(dataset, batch_size=10, seed=0, mode="stream", epochs=1)
    dataset.files("train")[1].local.write_bytes(b"not parquet")
    with pytest.raises(
        DataError, match=r"^\S+part-00001.parquet is damaged .*; prepare the dataset again.$"
    ):
        list(batches.epoch(1))


def test_reading_tasks_load_no_torch() -> None:
    import subprocess
    import sys

    code = (
        "import sys, amlp_ray.data.loading.ray_stream, amlp_ray.data.dataset\n"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout.strip() == "False"


def test_wrong_requests_say_what_to_do(tmp_path: Path) -> None:
    dataset = noise_dataset(tmp_path / "set", 10)
    with pytest.raises(ConfigError, match="batch_size 9 cannot be shared by 10 workers; raise it"):
        open_batches(dataset, batch_size=9, seed=0, world=10)
    with pytest.raises(DataError, match=r"split 'val' of .* has no images"):
        open_batches(dataset, split="val", batch_size=4, seed=0)


def test_auto_maps_if_the_disk_has_room_or_the_cache_holds_the_split(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = noise_dataset(tmp_path / "set", 20)
    assert resolve_mode(dataset, "train", "auto") == "mapped"
    monkeypatch.setattr(cache, "MAX_DISK_SHARE", 0.0)
    assert resolve_mode(dataset, "train", "auto") == "stream"
    assert resolve_mode(dataset, "train", "mapped") == "mapped"
    open_batches(dataset, batch_size=4, seed=0, mode="mapped")
    assert resolve_mode(dataset, "train", "auto") == "mapped"


def test_example_batches_open_nothing(tmp_path: Path) -> None:
    dataset = noise_dataset(tmp_path / "set", 20)
    (batch,) = ExampleBatches(dataset, batch_size=32).epoch(1)
    assert batch.images.shape == (32, 1, 8, 8)
    assert not (tmp_path / "cache").exists()
