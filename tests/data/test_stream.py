from __future__ import annotations

import threading
from itertools import chain

import numpy as np
import pytest
import torch

import amlp_ray.data.stream as stream
import amlp_ray.data.write as write
from amlp_ray.config import ImageSpec, PrepareSettings
from amlp_ray.data.dataset import PatchDataset
from amlp_ray.data.phantoms import write_phantoms
from amlp_ray.data.prepare import prepare
from amlp_ray.data.stream import Batch, MemoryBatches, open_batches
from amlp_ray.errors import DataError, SettingsError

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def parted(ray_session: None, tmp_path_factory: pytest.TempPathFactory) -> PatchDataset:
    """48 training images in six files, and no others."""
    folder = tmp_path_factory.mktemp("parted")
    write_phantoms(folder / "source", count=48, size=32)
    settings = PrepareSettings(layout="paired", size=32, group_by="image", fractions=(1, 0, 0))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(write, "ROWS_PER_PART", 8)
        return prepare(folder / "source", folder / "out", settings)


def _keys(batches: list[Batch]) -> list[list[int]]:
    return [batch.keys.tolist() for batch in batches]


def _flat(keys: list[list[int]]) -> list[int]:
    return list(chain.from_iterable(keys))


def _memory(count: int, **values: int) -> MemoryBatches:
    images = np.random.default_rng(0).integers(0, 65536, (count, 2, 4, 5)).astype(np.uint16)
    spec = ImageSpec(channels=2, height=8, width=8, mean=(0, 0), std=(1, 1))
    return MemoryBatches(images, np.arange(count) * 10, spec, **({"batch_size": 8, "seed": 1} | values))


@pytest.mark.parametrize("world", [1, 2, 4])
def test_any_number_of_workers_sees_the_same_global_batches(phantom_dataset: PatchDataset, world: int) -> None:
    whole = open_batches(phantom_dataset, batch_size=8, seed=5)
    workers = [open_batches(phantom_dataset, batch_size=8, seed=5, rank=r, world=world) for r in range(world)]
    shares = [_keys(list(worker.epoch(3))) for worker in workers]
    assert whole.steps_per_epoch == workers[0].steps_per_epoch == 36 // 8
    for step, batch in enumerate(_keys(list(whole.epoch(3)))):
        assert [len(share[step]) for share in shares] == [8 // world] * world
        for rank in range(world):
            assert shares[rank][step] == batch[rank::world]


def test_images_come_with_their_keys_and_as_stored(phantom_dataset: PatchDataset) -> None:
    split = phantom_dataset.load("train")
    row_of = {int(key): row for row, key in enumerate(split.keys)}
    for batch in open_batches(phantom_dataset, batch_size=6, seed=0).epoch(1):
        assert batch.images.dtype == torch.uint8
        assert batch.keys.dtype == torch.int64
        rows = [row_of[key] for key in batch.keys.tolist()]
        np.testing.assert_array_equal(batch.images.numpy(), split.images[rows])


def test_16_bit_images_are_gathered_unchanged() -> None:
    batches = _memory(20)
    for images, keys in batches.epoch(1):
        assert images.dtype == torch.uint16
        np.testing.assert_array_equal(images.numpy(), batches._images[keys.numpy() // 10])


def test_epochs_differ_and_repeat_by_seed() -> None:
    first = _keys(list(_memory(40).epoch(1)))
    assert first == _keys(list(_memory(40).epoch(1)))
    assert first != _keys(list(_memory(40).epoch(2)))
    assert first != _keys(list(_memory(40, seed=2).epoch(1)))
    flat = sorted(key for batch in first for key in batch)
    assert flat == [i * 10 for i in range(40)]


def test_last_incomplete_batch_is_dropped_and_small_splits_repeat() -> None:
    assert [len(keys) for keys in _keys(list(_memory(23).epoch(1)))] == [8, 8]
    small = _memory(3)
    assert small.steps_per_epoch == 1
    (keys,) = _keys(list(small.epoch(1)))
    assert len(keys) == 8
    assert set(keys) == {0, 10, 20}


def test_wrong_requests_say_what_to_do(phantom_dataset: PatchDataset, parted: PatchDataset) -> None:
    with pytest.raises(SettingsError, match="batch_size 9 cannot be shared by 2 workers; choose a multiple of 2"):
        open_batches(phantom_dataset, batch_size=9, seed=0, world=2)
    with pytest.raises(DataError, match=r"split 'val' of .* has no images"):
        open_batches(parted, split="val", batch_size=4, seed=0)


def test_auto_streams_only_what_does_not_fit(phantom_dataset: PatchDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(open_batches(phantom_dataset, batch_size=4, seed=0), MemoryBatches)
    monkeypatch.setattr(stream, "MEMORY_LIMIT", 1000)
    assert isinstance(open_batches(phantom_dataset, batch_size=4, seed=0), stream.StreamBatches)
    assert isinstance(open_batches(phantom_dataset, batch_size=4, seed=0, mode="memory"), MemoryBatches)


def test_stream_gives_all_images_in_another_order_each_epoch(
    parted: PatchDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "SHUFFLE_ROWS", 16)
    batches = open_batches(parted, batch_size=8, seed=1, mode="stream")
    assert batches.spec == parted.spec
    split = parted.load("train")
    row_of = {int(key): row for row, key in enumerate(split.keys)}
    first = list(batches.epoch(1))
    for batch in first:
        rows = [row_of[key] for key in batch.keys.tolist()]
        np.testing.assert_array_equal(batch.images.numpy(), split.images[rows])
    again = _keys(list(open_batches(parted, batch_size=8, seed=1, mode="stream").epoch(1)))
    second = _keys(list(batches.epoch(2)))
    assert _keys(first) == again
    assert _flat(again) != _flat(second)
    assert sorted(_flat(again)) == sorted(_flat(second)) == sorted(split.keys.tolist())
    assert len(first) == batches.steps_per_epoch == 6


def test_streaming_workers_share_global_batches(parted: PatchDataset) -> None:
    whole = _keys(list(open_batches(parted, batch_size=8, seed=1, mode="stream").epoch(1)))
    share = _keys(list(open_batches(parted, batch_size=8, seed=1, mode="stream", rank=1, world=2).epoch(1)))
    assert share == [batch[1::2] for batch in whole]


def test_shards_of_one_stream_are_disjoint_and_equally_long(parted: PatchDataset) -> None:
    iterators = parted.to_ray_dataset("train", columns=["id", "image"], seed=0).streaming_split(2, equal=True)
    seen: dict[tuple[int, int], list[int]] = {}

    def work(rank: int) -> None:
        batches = open_batches(parted, batch_size=8, seed=0, rank=rank, world=2, shard=iterators[rank])
        for epoch in (1, 2):
            got = _keys(list(batches.epoch(epoch)))
            assert len(got) == batches.steps_per_epoch
            seen[rank, epoch] = _flat(got)

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for epoch in (1, 2):
        assert sorted(seen[0, epoch] + seen[1, epoch]) == sorted(parted.load("train").keys.tolist())
    assert seen[0, 1] != seen[0, 2]


def test_short_shard_is_filled_from_its_own_images() -> None:
    def rows(*keys: int) -> tuple[np.ndarray, np.ndarray]:
        return np.array(keys, np.uint8).reshape(-1, 1, 1, 1), np.array(keys)

    filled = list(stream._filled([rows(1, 2, 3), rows(4)], size=3, steps=4))
    assert [keys.tolist() for _, keys in filled] == [[1, 2, 3], [4, 1, 2], [1, 2, 3], [1, 2, 3]]
    assert all(images.ravel().tolist() == keys.tolist() for images, keys in filled)
    assert [k.tolist() for _, k in stream._filled([rows(1, 2)], size=3, steps=1)] == [[1, 2, 1]]
    with pytest.raises(DataError, match="part of the data is empty"):
        list(stream._filled([], size=3, steps=1))


def test_stream_of_fewer_images_than_a_batch_has_a_step(parted: PatchDataset) -> None:
    (keys,) = _keys(list(open_batches(parted, batch_size=64, seed=0, mode="stream").epoch(1)))
    assert len(keys) == 64
    assert set(keys) == set(parted.load("train").keys.tolist())
