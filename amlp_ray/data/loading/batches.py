"""Batches for training, from images that are resident, mapped or streamed. All speak `Batches`, in the same order.

Batches stay on the CPU and as stored (uint8 goes to the device at a quarter of the cost of float); normalising and
cropping are the trainer's, on the device. `order.py` says which image comes when, `cache.py` keeps images for all
processes of a node, `ray_data.py` reads ahead what is too large to keep.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol

import numpy as np
import torch

from amlp_ray.config import ImageSpec
from amlp_ray.data.dataset import PatchDataset
from amlp_ray.data.loading.image_cache import Store, fits, has_store, open_store
from amlp_ray.data.loading.shuffle import Order, ahead, share_of
from amlp_ray.data.parquet import images_of
from amlp_ray.errors import ConfigError, DataError

if TYPE_CHECKING:
    import pyarrow as pa

    from amlp_ray.data.loading.ray_stream import SplitSource

Mode = Literal["auto", "resident", "mapped", "stream"]
MAPPED_AHEAD = 16  # row groups that a disk is told of before they are needed


class Batch(NamedTuple):
    """One worker's share of a global batch."""

    images: (
        torch.Tensor
    )  # (B, C, H, W) as stored; on the CPU, pinned where CUDA is available, or on the device
    keys: torch.Tensor  # (B,) int64, identity of each image; on the CPU


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
    mode: Mode = "auto",
    rank: int = 0,
    world: int = 1,
    epochs: int | None = None,
) -> Batches:
    """Open one worker's batches of a split. All modes and numbers of workers give the same images in the same order.

    Args:
        dataset: the patch dataset.
        split: train, val or test.
        batch_size: images per step over all workers.
        seed: of the order of images.
        mode: see `resolved`; `stream` needs Ray to be initialised.
        rank: this worker, from 0.
        world: number of workers.
        epochs: the last epoch that will be asked for, so that a stream reads nothing beyond it.

    Raises:
        ConfigError: `world` exceeds `batch_size`.
        DataError: the split is empty or damaged, or has no room in the cache folder.
    """
    if batch_size < world:
        raise ConfigError(
            f"batch_size {batch_size} cannot be shared by {world} workers; raise it, or use fewer."
        )
    if dataset.count(split) == 0:
        raise DataError(
            f"The split {split!r} of {dataset.path} has no images; prepare it with a larger fraction."
        )
    order = Order.of(dataset, split, batch_size=batch_size, seed=seed, world=world)
    chosen = resolved(dataset, split, mode)
    if chosen == "stream":
        return StreamBatches(dataset, split, order, rank=rank, epochs=epochs)
    return StoredBatches(open_store(dataset, split, chosen), dataset.spec, order, rank=rank)


def resolved(
    dataset: PatchDataset, split: str, mode: Mode
) -> Literal["resident", "mapped", "stream"]:
    """What `auto` means here: resident if half of the free memory holds the split, mapped if the cache's disk does.

    A store that this node has already costs nothing more, and is taken.
    """
    if mode != "auto":
        return mode
    for kind in ("resident", "mapped"):
        if has_store(dataset, split, kind) or fits(dataset, split, kind):
            return kind
    return "stream"


def is_streamed(dataset: PatchDataset, split: str, mode: Mode) -> bool:
    """Whether batches of a split come from a Ray Data stream."""
    return resolved(dataset, split, mode) == "stream"


class ExampleBatches:
    """The first images of a split, again and again: for timing a step without opening all data."""

    steps_per_epoch = 1

    def __init__(self, dataset: PatchDataset, split: str = "train", *, batch_size: int) -> None:
        if dataset.count(split) == 0:
            raise DataError(
                f"The split {split!r} of {dataset.path} has no images; prepare it with a larger fraction."
            )
        self.spec = dataset.spec
        some = dataset.load(split, np.arange(min(batch_size, dataset.count(split))))
        self._batch = _batch(some.images, some.keys, np.resize(np.arange(len(some)), batch_size))

    def epoch(self, epoch: int) -> Iterator[Batch]:
        yield self._batch


class StoredBatches:
    """Batches of a split that is resident or mapped."""

    def __init__(self, store: Store, spec: ImageSpec, order: Order, *, rank: int = 0) -> None:
        self.spec = spec
        self.steps_per_epoch = order.steps
        self._store, self._order, self._rank = store, order, rank

    def epoch(self, epoch: int) -> Iterator[Batch]:
        shares = self._order.share(epoch, self._rank)
        images, keys = self._store.images, self._store.keys
        if not self._store.on_disk:
            for rows in shares:
                yield _batch(images, keys, rows)
            return
        each, units = shares.shape[1], self._order.units
        needed, first, _ = self._order.uses(self._order.unit_of(shares.ravel()), each)
        for rows, coming in zip(shares, ahead(first, len(shares), MAPPED_AHEAD), strict=True):
            for unit in needed[coming]:
                self._store.will_need(units[unit].start, units[unit].rows)
            yield _batch(images, keys, rows)


class StreamBatches:
    """Batches of a split that Ray Data reads while the trainer works.

    Epochs asked for one after the other come from one execution; another epoch starts a new one.
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
        from amlp_ray.data.loading.ray_stream import BLOCK_BYTES, SplitSource

        self.spec = dataset.spec
        self.steps_per_epoch = order.steps
        self._last = epochs
        files = tuple(str(file) for file in dataset.files(split))
        self._source = SplitSource(
            files, dataset.shape, dataset.manifest.dtype, order, rank, BLOCK_BYTES
        )
        self._running: tuple[int, Generator[Batch]] | None = (
            None  # the epoch whose first batch comes next
        )

    def epoch(self, epoch: int) -> Iterator[Batch]:
        running, self._running = self._running, None
        batches = (
            running[1]
            if running and running[0] == epoch
            else _streamed(self._source, epoch, self._last)
        )
        for number, batch in enumerate(batches, 1):
            if number == self.steps_per_epoch:
                if epoch == self._last:
                    batches.close()  # ends Ray's tasks
                else:
                    self._running = epoch + 1, batches
            yield batch
            if number == self.steps_per_epoch:
                return
        raise DataError(
            f"{self._source.files[0]} and its neighbours gave fewer images than the manifest says."
        )


# Functions, not methods: a generator that knew its `StreamBatches` would live, and read on, until memory is collected.


def _streamed(source: SplitSource, epoch: int, last: int | None) -> Generator[Batch]:
    """Yield the batches of an epoch and all later ones, up to the last."""
    from amlp_ray.data.loading.ray_stream import EPOCHS, stream_tables

    while last is None or epoch <= last:
        until = epoch + EPOCHS if last is None else min(epoch + EPOCHS, last + 1)
        yield from _sliced(source, stream_tables(source, range(epoch, until)))
        epoch = until


def _sliced(source: SplitSource, tables: Iterable[pa.Table]) -> Generator[Batch]:
    """Cut tables of any length into batches."""
    mine = share_of(source.order.batch_size, source.rank, source.order.world)
    size, dtype = mine.stop - mine.start, np.dtype(source.dtype)
    batch, filled = _empty(size, source.shape, dtype), 0
    for table in tables:
        images = images_of(table["image"], source.shape, source.dtype)
        keys = table["key"].to_numpy()
        taken = 0
        while taken < len(keys):
            some = min(size - filled, len(keys) - taken)
            batch.images.numpy()[filled : filled + some] = images[taken : taken + some]
            batch.keys.numpy()[filled : filled + some] = keys[taken : taken + some]
            filled, taken = filled + some, taken + some
            if filled == size:
                yield batch
                batch, filled = _empty(size, source.shape, dtype), 0


def _batch(images: np.ndarray, keys: np.ndarray, rows: np.ndarray) -> Batch:
    """Gather rows straight into (pinned) tensors: one copy, which read-only memory needs anyway."""
    out = _empty(len(rows), images.shape[1:], images.dtype)
    # mode="clip" lets numpy write into `out`; the default first fills a buffer. Rows are always in range.
    np.take(images, rows, axis=0, out=out.images.numpy(), mode="clip")
    np.take(keys, rows, axis=0, out=out.keys.numpy(), mode="clip")
    return out


def _empty(size: int, shape: tuple[int, ...], dtype: np.dtype) -> Batch:
    pinned = torch.cuda.is_available()
    kind = getattr(torch, dtype.name)
    return Batch(
        torch.empty((size, *shape), dtype=kind, pin_memory=pinned),
        torch.empty(size, dtype=torch.int64, pin_memory=pinned),
    )
