"""Batches for training: from memory where a split fits, else a Ray Data stream. Both speak `Batches`.

Batches stay on the CPU and as stored (uint8 goes to the device at a quarter of the cost of float); normalising and
cropping are the trainer's, on the device.

In memory, epoch e of seed s is one fixed order of all images, cut into global batches, of which worker r of w takes
every w-th image: any number of workers trains on the same batches. The last incomplete batch is dropped; a split
smaller than a batch repeats, so that there is always a step.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

import numpy as np
import torch

from amlp_ray.config import ImageSpec
from amlp_ray.data.dataset import PatchDataset, keys_of
from amlp_ray.data.parts import Shape, images_of
from amlp_ray.errors import DataError, SettingsError

if TYPE_CHECKING:
    import ray.data

MEMORY_LIMIT = 2 << 30  # bytes of images up to which `auto` keeps a split in memory
SHUFFLE_ROWS = 2048  # rows the stream shuffles among: two parts, since rows of a part are ordered by id
SHUFFLE_BYTES = 512 << 20


class Batch(NamedTuple):
    """One worker's share of a global batch."""

    images: torch.Tensor  # (B, C, H, W) uint8 or uint16 as stored, on the CPU, pinned where CUDA is available
    keys: torch.Tensor  # (B,) int64, identity of each image


class Batches(Protocol):
    """What a training loop needs of its data."""

    spec: ImageSpec
    steps_per_epoch: int

    def epoch(self, epoch: int) -> Iterator[Batch]:
        """Yield `steps_per_epoch` batches; `epoch` is 1-based, and the same number gives the same batches."""
        ...


def open_batches(
    dataset: PatchDataset,
    *,
    split: str = "train",
    batch_size: int,
    seed: int,
    mode: Literal["auto", "memory", "stream"] = "auto",
    rank: int = 0,
    world: int = 1,
    shard: ray.data.DataIterator | None = None,
) -> Batches:
    """Open one worker's batches of a split.

    Args:
        dataset: the patch dataset.
        split: train, val or test.
        batch_size: images per step over all workers.
        seed: of the order of images.
        mode: `auto` takes memory up to 2 GiB of images; a given `shard` is always streamed.
        rank: this worker, from 0.
        world: number of workers.
        shard: this worker's part as Ray Train hands it out. Without one, every worker that streams reads all images.

    Raises:
        SettingsError: `world` does not divide `batch_size`.
        DataError: the split is empty or damaged.
    """
    if batch_size % world:
        raise SettingsError(
            f"batch_size {batch_size} cannot be shared by {world} workers; choose a multiple of {world}."
        )
    if dataset.count(split) == 0:
        raise DataError(f"The split {split!r} of {dataset.path} has no images; prepare it with a larger fraction.")
    if shard is not None or is_streamed(dataset, split, mode):
        return StreamBatches(dataset, split, batch_size=batch_size, seed=seed, rank=rank, world=world, shard=shard)
    images, ids = dataset.load_images(split)
    return MemoryBatches(images, keys_of(ids), dataset.spec, batch_size=batch_size, seed=seed, rank=rank, world=world)


def is_streamed(dataset: PatchDataset, split: str, mode: str) -> bool:
    """Whether batches of a split come from a Ray Data stream, whose tasks need a CPU of their own."""
    return mode == "stream" or (mode == "auto" and dataset.bytes(split) > MEMORY_LIMIT)


class MemoryBatches:
    """Batches of images held in memory, (N, C, H, W) with (N,) keys."""

    def __init__(
        self,
        images: np.ndarray,
        keys: np.ndarray,
        spec: ImageSpec,
        *,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self.spec = spec
        self.steps_per_epoch = max(1, len(keys) // batch_size)
        self._images, self._keys = images, keys
        self._batch_size, self._seed, self._rank, self._world = batch_size, seed, rank, world

    def epoch(self, epoch: int) -> Iterator[Batch]:
        order = np.random.default_rng([self._seed, epoch]).permutation(len(self._keys))
        order = np.resize(order, max(len(order), self._batch_size))  # repeats only where the split is below a batch
        for step in range(self.steps_per_epoch):
            rows = order[step * self._batch_size : (step + 1) * self._batch_size][self._rank :: self._world]
            yield _batch(self._images, self._keys, rows)


class StreamBatches:
    """Batches of a Ray Data stream over Parquet files, for splits larger than memory.

    Files are shuffled, then rows among a buffer of about two files. Ray fetches and decodes ahead in the background.
    Without a shard the order depends on seed and epoch only; with one, on how Ray Train cuts the stream as well.
    """

    def __init__(
        self,
        dataset: PatchDataset,
        split: str,
        *,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world: int = 1,
        shard: ray.data.DataIterator | None = None,
    ) -> None:
        self.spec = dataset.spec
        # From the manifest, so that every worker takes equally many steps however evenly the stream was cut.
        self.steps_per_epoch = max(1, dataset.count(split) // batch_size)
        self._files = dataset.files(split)
        self._shape, self._dtype = dataset.shape, dataset.manifest.dtype
        self._batch_size, self._seed, self._rank, self._world, self._shard = batch_size, seed, rank, world, shard
        image = dataset.bytes(split) // dataset.count(split)
        self._buffer = max(batch_size, min(max(SHUFFLE_ROWS, 8 * batch_size), SHUFFLE_BYTES // image))

    def epoch(self, epoch: int) -> Iterator[Batch]:
        from amlp_ray.data.ray_data import quieten, read_files

        quieten()
        draw = np.random.default_rng([self._seed, epoch])
        if self._shard is None:
            files = [self._files[i] for i in draw.permutation(len(self._files))]
            rows: Any = read_files(files, columns=["id", "image"])
            size, keep = self._batch_size, slice(self._rank, None, self._world)
        else:
            rows, size, keep = self._shard, self._batch_size // self._world, slice(None)
        tables = rows.iter_batches(
            batch_size=size,
            batch_format="pyarrow",
            prefetch_batches=2,
            local_shuffle_buffer_size=self._buffer,
            local_shuffle_seed=int(draw.integers(2**31)),
        )
        decoded = (_decode(table, self._shape, self._dtype) for table in tables)
        for images, keys in _filled(decoded, size, self.steps_per_epoch):
            yield _batch(images, keys, np.arange(size)[keep])


Arrays = tuple[np.ndarray, np.ndarray]  # images (N, C, H, W) and keys (N,)


def _filled(batches: Iterable[Arrays], size: int, steps: int) -> Iterator[Arrays]:
    """Yield exactly `steps` batches of `size` rows, though `batches` may end early or with a short one.

    A shard that is a few rows short repeats rows of its own. Starting its iterator again would wait for the other
    workers to do the same, and stopping early would leave them waiting for this one's gradients.
    """
    first: Arrays | None = None
    given = 0
    for images, keys in batches:
        if not len(keys):
            continue
        if first is None:
            first = images.copy(), keys.copy()
        if len(keys) < size:
            images = np.concatenate([images, _cycled(first[0], size - len(keys))])
            keys = np.concatenate([keys, _cycled(first[1], size - len(keys))])
        yield images, keys
        given += 1
        if given == steps:
            return
    if first is None:
        raise DataError("A worker's part of the data is empty; use fewer workers or prepare more images.")
    for _ in range(given, steps):
        yield _cycled(first[0], size), _cycled(first[1], size)


def _cycled(array: np.ndarray, count: int) -> np.ndarray:
    return array[np.arange(count) % len(array)]


def _decode(table: Any, shape: Shape, dtype: str) -> Arrays:
    return images_of(table["image"], shape, dtype), keys_of(table["id"].to_pylist())


def _batch(images: np.ndarray, keys: np.ndarray, rows: np.ndarray) -> Batch:
    """Gather rows straight into (pinned) tensors: one copy, which Arrow's read-only memory needs anyway."""
    pinned = torch.cuda.is_available()
    kind = torch.uint16 if images.dtype == np.uint16 else torch.uint8
    out = Batch(
        torch.empty((len(rows), *images.shape[1:]), dtype=kind, pin_memory=pinned),
        torch.empty(len(rows), dtype=torch.int64, pin_memory=pinned),
    )
    # mode="clip" lets numpy write into `out`; the default first fills a buffer. Rows are always in range.
    np.take(images, rows, axis=0, out=out.images.numpy(), mode="clip")
    np.take(keys, rows, axis=0, out=out.keys.numpy(), mode="clip")
    return out
