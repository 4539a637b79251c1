"""Stream the images of a split with Ray Data, in a repeatable order. Imported where Ray is used.

One Ray Data execution serves many epochs, because starting one takes a second and more. Its tasks
read an epoch each. The next task starts while the last batches of the epoch before still wait.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import ray
import ray.data
import ray.exceptions

from amlp_ray.data.loading.shuffle import Order, reads_to_start
from amlp_ray.data.parquet import Shape, StoredPart, image_bytes, images_of, keys_of, read_part
from amlp_ray.data.path import DataPath
from amlp_ray.data.ray_silence import silence_ray_data
from amlp_ray.errors import AmlpError

BLOCK_BYTES = 16 << 20  # a task hands images over in blocks of this size
BLOCKS_AHEAD = 4  # blocks on their way to the trainer, and as many behind them
EPOCHS_PER_EXECUTION = 256  # planning each of them takes time
LOCAL_THREADS = 2  # of a task that reads from a disk
REMOTE_THREADS = 8  # an object store is slow to answer, but answers many at once


@dataclass(frozen=True)
class SplitSource:
    """What a reading task must know of a split, as plain values."""

    parts: tuple[StoredPart, ...]
    shape: Shape
    dtype: str
    order: Order
    rank: int
    block_bytes: int  # of the images that a task hands over at once

    @property
    def image_bytes(self) -> int:
        """Bytes of one image as stored."""
        return image_bytes(self.shape, self.dtype)


class _GroupContent(NamedTuple):
    """The images of a row group."""

    images: np.ndarray  # (N, image_bytes) uint8
    keys: np.ndarray  # (N,) int64


def read_epoch(source: SplitSource, epoch: int) -> Iterator[pa.Table]:
    """Yield one worker's images of an epoch, in order.

    Each row group is read once, shortly before its first image is due, and dropped after its last.

    Yields:
        Tables of `image` and `key` with images of about `source.block_bytes`.

    Raises:
        DataError: a part is missing or damaged.
    """
    order = source.order
    rows = order.worker_rows(epoch, source.rank).ravel()
    row_group = order.group_of(rows)
    block_rows = max(1, source.block_bytes // source.image_bytes)
    num_blocks = -(-len(rows) // block_rows)
    plan = order.plan_reads(row_group, block_rows)
    last_block = dict(zip(plan.groups.tolist(), plan.last_block.tolist(), strict=True))
    is_local = all(DataPath(part.file).is_local for part in source.parts)
    threads = LOCAL_THREADS if is_local else REMOTE_THREADS
    groups: dict[int, Future[_GroupContent]] = {}
    with ThreadPoolExecutor(threads) as pool:
        try:
            upcoming = reads_to_start(plan.first_block, num_blocks, threads)
            for block, positions in enumerate(upcoming):
                for group in plan.groups[positions].tolist():
                    groups[group] = pool.submit(_read_row_group, source, group)
                in_block = slice(block * block_rows, (block + 1) * block_rows)
                block_groups = row_group[in_block]
                images = np.empty((len(block_groups), source.image_bytes), np.uint8)
                keys = np.empty(len(block_groups), np.int64)
                for group in np.unique(block_groups).tolist():
                    content = groups[group].result()
                    targets = np.flatnonzero(block_groups == group)
                    sources = rows[in_block][targets] - order.row_groups[group].start
                    images[targets] = content.images[sources]
                    keys[targets] = content.keys[sources]
                    if last_block[group] == block:
                        del groups[group], content
                yield _to_table(images, keys)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _to_table(images: np.ndarray, keys: np.ndarray) -> pa.Table:
    """Wrap images (N, bytes) and keys (N,) without a copy."""
    count, size = images.shape
    buffers = [None, pa.py_buffer(images)]
    column = pa.FixedSizeBinaryArray.from_buffers(pa.binary(size), count, buffers)
    return pa.table({"image": column, "key": pa.array(keys)})


def _read_row_group(source: SplitSource, number: int) -> _GroupContent:
    group = source.order.row_groups[number]
    table = read_part(source.parts[group.part], ["id", "image"], group.number)
    images = images_of(table["image"], source.shape, source.dtype).view(np.uint8)
    keys = keys_of(table["id"].to_pylist())
    return _GroupContent(images.reshape(group.rows, source.image_bytes), keys)


def _read_epochs(epochs: pa.Table, source: SplitSource) -> Iterator[pa.Table]:
    for epoch in epochs["epoch"].to_pylist():
        yield from read_epoch(source, epoch)


def stream_tables(source: SplitSource, epochs: range) -> Iterator[pa.Table]:
    """Yield the tables of `read_epoch`, epoch by epoch, read ahead by Ray tasks on this node.

    Raises:
        DataError: a part is missing or damaged.
    """
    silence_ray_data()
    # From items: `range` and `from_arrow` start tasks of their own, which wait for a whole CPU.
    items = [{"epoch": epoch} for epoch in epochs]
    tables = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
        _read_epochs,
        batch_size=1,
        batch_format="pyarrow",
        fn_kwargs={"source": source},
        # One task at a time. The next epoch's task begins when this one has handed over its last
        # blocks, which still wait then. A second task was no faster and took as much memory again.
        compute=ray.data.TaskPoolStrategy(size=1),
        # Any fraction of a CPU would wait forever on a node whose workers hold every CPU.
        num_cpus=0,
        label_selector={"ray.io/node-id": ray.get_runtime_context().get_node_id()},
    )
    options = tables.context.execution_options
    options.preserve_order = True
    # Without a limit, a reader that is faster than the trainer fills half of Ray's memory.
    options.resource_limits = ray.data.ExecutionResources(
        object_store_memory=2 * BLOCKS_AHEAD * source.block_bytes
    )
    # Below the size that tasks yield, so that Ray leaves blocks as they are.
    tables.context.target_max_block_size = source.block_bytes * 3 // 4
    try:
        yield from tables.iter_batches(
            batch_size=None, batch_format="pyarrow", prefetch_batches=BLOCKS_AHEAD
        )
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, AmlpError):
            # Ray appends lines of its own to the message.
            raise type(error.cause)(str(error.cause).splitlines()[0]) from None
        raise
