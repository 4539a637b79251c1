"""Yield the batches of a training loop, from a mapped cache file or from a Ray Data stream.

Batches stay on the CPU with pixels as stored: uint8 goes to the device at a quarter of the cost of
float. The trainer normalizes and crops there.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol

import numpy as np
import torch

from amlp_ray.config import ImageSpec
from amlp_ray.data.dataset import PatchDataset
from amlp_ray.data.loading.image_cache import (
    CachedSplit,
    has_room,
    is_cached,
    make_anew,
    open_cached_split,
)
from amlp_ray.data.loading.shuffle import Order, reads_to_start, worker_share
from amlp_ray.data.parquet import images_of
from amlp_ray.errors import ConfigError, DataError

if TYPE_CHECKING:
    import pyarrow as pa

    from amlp_ray.data.loading.ray_stream import SplitSource

Mode = Literal["auto", "mapped", "stream"]
GROUPS_AHEAD = 16  # row groups that the disk is asked for before they are needed


class Batch(NamedTuple):
    """One worker's share of a global batch."""

    # (B, C, H, W) as stored; on the CPU, pinned if CUDA is available, or on the device
    images: torch.Tensor
    keys: torch.Tensor  # (B,) int64, identity of each image; on the CPU


class Batches(Protocol):
    """What a training loop needs of its data."""

    spec: ImageSpec
    steps_per_epoch: int

    def epoch(self, epoch: int) -> Iterator[Batch]:
        """Yield the `steps_per_epoch` batches of an epoch, from 1; the same for the same number."""
        ...


def open_batches(
    dataset: PatchDataset,
    *,
    split: str = "train",
    batch_size: int,
    seed: int,
    mode: Mode = "auto",
    rank: int = 0,
    world: int = 1,
    epochs: int | None = None,
) -> Batches:
    """Open one worker's batches of a split.

    All modes and any number of workers give the same images in the same order.

    Args:
        dataset: the patch dataset.
        split: train, val or test.
        batch_size: images per step over all workers.
        seed: seed of the order of images.
        mode: see `resolve_mode`; `stream` needs Ray to be initialized.
        rank: number of this worker, from 0.
        world: number of workers.
        epochs: the last epoch that will be read; a stream reads nothing beyond it.

    Raises:
        ConfigError: `world` exceeds `batch_size`.
        DataError: the split is empty or damaged, or the cache folder has no room for it.
    """
    if batch_size < world:
        raise ConfigError(
            f"batch_size {batch_size} cannot be shared by {world} workers; raise it, or use fewer."
        )
    _check_not_empty(dataset, split)
    order = Order.from_manifest(
        dataset.manifest, split, batch_size=batch_size, seed=seed, world=world
    )
    if resolve_mode(dataset, split, mode) == "stream":
        return StreamBatches(dataset, split, order, rank=rank, epochs=epochs)
    return MappedBatches(open_cached_split(dataset, split), dataset.spec, order, rank=rank)


def resolve_mode(dataset: PatchDataset, split: str, mode: Mode) -> Literal["mapped", "stream"]:
    """Return what `auto` means on this machine.

    It is `mapped` if the cache holds the split already or its disk has room for it.
    """
    if mode != "auto":
        return mode
    can_map = is_cached(dataset, split) or has_room(dataset, split)
    return "mapped" if can_map else "stream"


class ExampleBatches:
    """Repeat the first images of a split, to time a step without opening all data."""

    steps_per_epoch = 1

    def __init__(self, dataset: PatchDataset, split: str = "train", *, batch_size: int) -> None:
        """Read up to `batch_size` images, and repeat them if the split has fewer."""
        _check_not_empty(dataset, split)
        self.spec = dataset.spec
        count = min(batch_size, dataset.count(split))
        examples = dataset.load(split, np.arange(count))
        self._batch = _gather(examples.images, examples.keys, np.arange(batch_size) % count)

    def epoch(self, epoch: int) -> Iterator[Batch]:
        """Yield the one batch."""
        yield self._batch


class MappedBatches:
    """Gather batches from a mapped cache file."""

    def __init__(
        self, cached: CachedSplit, spec: ImageSpec, order: Order, *, rank: int = 0
    ) -> None:
        """Read worker `rank`'s share of `order`."""
        self.spec = spec
        self.steps_per_epoch = order.steps
        self._cached = cached
        self._order = order
        self._rank = rank

    def epoch(self, epoch: int) -> Iterator[Batch]:
        """Yield the batches of an epoch, and have the disk read row groups ahead of use."""
        batches = self._order.worker_rows(epoch, self._rank)
        steps, share = batches.shape
        plan = self._order.plan_reads(self._order.group_of(batches.ravel()), share)
        to_prefetch = reads_to_start(plan.first_block, steps, GROUPS_AHEAD)
        to_verify = reads_to_start(plan.first_block, steps, 0)
        for rows, upcoming, needed in zip(batches, to_prefetch, to_verify, strict=True):
            for number in plan.groups[upcoming]:
                group = self._order.row_groups[number]
                self._cached.prefetch(group.start, group.rows)
            for number in plan.groups[needed]:
                self._verify(number)
            yield _gather(self._cached.images, self._cached.keys, rows)

    def _verify(self, number: int) -> None:
        """Make the cache file anew if a row group in it is damaged.

        Raises:
            DataError: it is damaged again.
        """
        group = self._order.row_groups[number]
        if self._cached.is_intact(number, group):
            return
        self._cached = make_anew(self._cached)
        if not self._cached.is_intact(number, group):
            raise DataError(
                f"The cached images of {self._cached.dataset.path} are damaged again right after "
                f"they were made anew; set AMLP_RAY_CACHE to a folder on another disk, or use "
                f"data=stream."
            )


class StreamBatches:
    """Take batches from a Ray Data execution that reads while the trainer works.

    Epochs that are read one after the other come from one execution. Any other epoch starts a new
    one.
    """

    def __init__(
        self,
        dataset: PatchDataset,
        split: str,
        order: Order,
        *,
        rank: int = 0,
        epochs: int | None = None,
    ) -> None:
        """Describe the stream; reading starts with the first epoch and ends with epoch `epochs`."""
        from amlp_ray.data.loading.ray_stream import BLOCK_BYTES, SplitSource

        self.spec = dataset.spec
        self.steps_per_epoch = order.steps
        self._last_epoch = epochs
        self._source = SplitSource(
            tuple(dataset.parts(split)),
            dataset.shape,
            dataset.manifest.dtype,
            order,
            rank,
            BLOCK_BYTES,
        )
        # A running execution, and the epoch whose first batch it yields next.
        self._running: tuple[int, Generator[Batch]] | None = None

    def epoch(self, epoch: int) -> Iterator[Batch]:
        """Yield the batches of an epoch.

        Raises:
            DataError: a part is damaged.
        """
        next_epoch, batches = self._running or (None, None)
        self._running = None
        if batches is None or next_epoch != epoch:
            batches = _stream_batches(self._source, epoch, self._last_epoch)
        for step, batch in enumerate(batches, 1):
            is_last = step == self.steps_per_epoch
            if is_last and epoch == self._last_epoch:
                batches.close()  # ends Ray's tasks
            elif is_last:
                self._running = epoch + 1, batches
            yield batch
            if is_last:
                return
        raise DataError(
            f"{self._source.parts[0].file} and the files beside it hold fewer images than the "
            f"manifest says; prepare the dataset again."
        )


# Functions and not methods: a generator that referred to its `StreamBatches` would keep it alive,
# and so read on, until the garbage collector finds the cycle.


def _stream_batches(source: SplitSource, epoch: int, last_epoch: int | None) -> Generator[Batch]:
    """Yield the batches of an epoch and of all later ones."""
    from amlp_ray.data.loading.ray_stream import EPOCHS_PER_EXECUTION, stream_tables

    while last_epoch is None or epoch <= last_epoch:
        end = epoch + EPOCHS_PER_EXECUTION
        if last_epoch is not None:
            end = min(end, last_epoch + 1)
        yield from _cut_into_batches(source, stream_tables(source, range(epoch, end)))
        epoch = end


def _cut_into_batches(source: SplitSource, tables: Iterable[pa.Table]) -> Generator[Batch]:
    """Yield batches from tables of any length."""
    share = worker_share(source.order.batch_size, source.rank, source.order.world)
    size = share.stop - share.start
    dtype = np.dtype(source.dtype)
    batch = _empty_batch(size, source.shape, dtype)
    filled = 0
    for table in tables:
        images = images_of(table["image"], source.shape, source.dtype)
        keys = table["key"].to_numpy()
        while len(keys):
            count = min(len(keys), size - filled)
            target = slice(filled, filled + count)
            batch.images.numpy()[target] = images[:count]
            batch.keys.numpy()[target] = keys[:count]
            images = images[count:]
            keys = keys[count:]
            filled += count
            if filled == size:
                yield batch
                batch = _empty_batch(size, source.shape, dtype)
                filled = 0


def _gather(images: np.ndarray, keys: np.ndarray, rows: np.ndarray) -> Batch:
    """Copy rows into new (pinned) tensors; torch needs a copy of read-only memory anyway."""
    batch = _empty_batch(len(rows), images.shape[1:], images.dtype)
    # mode="clip" lets numpy write into `out`; the default fills a buffer first. Rows are in range.
    np.take(images, rows, axis=0, out=batch.images.numpy(), mode="clip")
    np.take(keys, rows, axis=0, out=batch.keys.numpy(), mode="clip")
    return batch


def _empty_batch(size: int, shape: tuple[int, ...], dtype: np.dtype) -> Batch:
    is_pinned = torch.cuda.is_available()
    torch_dtype = getattr(torch, dtype.name)
    return Batch(
        torch.empty((size, *shape), dtype=torch_dtype, pin_memory=is_pinned),
        torch.empty(size, dtype=torch.int64, pin_memory=is_pinned),
    )


def _check_not_empty(dataset: PatchDataset, split: str) -> None:
    if dataset.count(split) == 0:
        raise DataError(
            f"The split {split!r} of {dataset.path} has no images; prepare it with a larger "
            f"fraction."
        )
