"""Reading a patch dataset by Ray Data, in an order that repeats. Imported where Ray is used.

Training reads through `Stream`: one Ray Data execution over many epochs, whose tasks read an epoch each, one after the
other, in the order of `order.py`. Starting an execution takes a second and more; a next epoch takes none of it, since
its task starts while the last batches of the one before wait.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import ray
import ray.data
import ray.exceptions
from ray.data.extensions import ArrowTensorArray

from amlp_ray.data.loading.shuffle import Order, ahead
from amlp_ray.data.parquet import Shape, image_bytes, images_of, masks_of, read_part, schema
from amlp_ray.data.path import DataPath
from amlp_ray.data.ray_silence import quieten
from amlp_ray.errors import AmlpError, DataError

if TYPE_CHECKING:
    from amlp_ray.data.dataset import PatchDataset

BLOCK_BYTES = 16 << 20  # a task hands images over in blocks of this size
AHEAD = 4  # blocks on their way to the trainer, and as many behind them
EPOCHS = 256  # of one execution: planning them takes time
READERS = 2  # threads of a task that read from a disk
REMOTE_READERS = 8  # an object store answers late, but many at once


def read_rows(
    dataset: PatchDataset, split: str, columns: Sequence[str] | None = None
) -> ray.data.Dataset:
    """A split's rows as a Ray dataset in order, `image` (C, H, W) and `mask` (H, W) as arrays; all columns if None.

    A mask comes with `labelled`: an unlabelled image has a mask of zeros and False.
    """
    quieten()
    files = dataset.files(split)
    if not files:
        empty = schema(dataset.shape, dataset.manifest.dtype).empty_table()
        return ray.data.from_arrow(empty.select(list(columns or empty.column_names)))
    rows = ray.data.read_parquet([file.path for file in files], filesystem=files[0].filesystem)
    if columns:
        rows = rows.select_columns(list(columns))  # Ray reads no others then
    rows = rows.map_batches(
        _arrays,
        batch_format="pyarrow",
        batch_size=None,
        fn_kwargs={"shape": dataset.shape, "dtype": dataset.manifest.dtype},
    )
    rows.context.execution_options.preserve_order = (
        True  # else blocks come in the order their tasks end
    )
    return rows


def _arrays(table: pa.Table, shape: Shape, dtype: str) -> pa.Table:
    out = {name: table[name] for name in table.column_names if name not in ("image", "mask")}
    if "image" in table.column_names:
        out["image"] = ArrowTensorArray.from_numpy(images_of(table["image"], shape, dtype))
    if "mask" in table.column_names:
        masks, labeled = masks_of(table["mask"], shape)
        out |= {"mask": ArrowTensorArray.from_numpy(masks), "labeled": pa.array(labeled)}
    return pa.table(out)


@dataclass(frozen=True)
class SplitSource:
    """What a reading task must know of a split, as plain values."""

    files: tuple[str, ...]
    shape: Shape
    dtype: str
    order: Order
    rank: int
    block_bytes: int  # of the images that a task hands over at once

    @property
    def image_bytes(self) -> int:
        return image_bytes(self.shape, self.dtype)


def read_epoch(source: SplitSource, epoch: int) -> Iterator[pa.Table]:
    """Yield one worker's images of an epoch, in order, as tables of `image` and `key` of about `source.block_bytes`.

    Holds the row groups that the next images lie in, and no others: each is read once, shortly before its first image
    is due, and let go after its last.

    Raises:
        DataError: a part is missing or damaged.
    """
    order = source.order
    rows = order.share(epoch, source.rank).ravel()
    size = max(1, source.block_bytes // source.image_bytes)
    unit, starts = order.unit_of(rows), np.array([u.start for u in order.units])
    needed, first, last = order.uses(unit, size)
    places = [DataPath(file) for file in source.files]
    threads = READERS if all(place.is_local for place in places) else REMOTE_READERS
    blocks = range(0, len(rows), size)
    waiting: dict[int, Future[tuple[np.ndarray, np.ndarray]]] = {}
    held: dict[int, tuple[np.ndarray, np.ndarray]] = {}
    until = dict(zip(needed.tolist(), last.tolist(), strict=True))
    with ThreadPoolExecutor(threads) as pool:
        try:
            for number, (begin, coming) in enumerate(
                zip(blocks, ahead(first, len(blocks), threads), strict=True)
            ):
                for u in needed[coming].tolist():
                    waiting[u] = pool.submit(_read_unit, source, places, u)
                units, local = unit[begin : begin + size], rows[begin : begin + size]
                images = np.empty((len(local), source.image_bytes), np.uint8)
                keys = np.empty(len(local), np.int64)
                for u in np.unique(units).tolist():
                    if u not in held:
                        held[u] = waiting.pop(u).result()
                    mine = np.flatnonzero(units == u)
                    at = local[mine] - starts[u]
                    images[mine], keys[mine] = held[u][0][at], held[u][1][at]
                    if until[u] == number:
                        del held[u]
                yield pa.table(
                    {
                        "image": pa.FixedSizeBinaryArray.from_buffers(
                            pa.binary(source.image_bytes), len(keys), [None, pa.py_buffer(images)]
                        ),
                        "key": pa.array(keys),
                    }
                )
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _read_unit(
    source: SplitSource, places: Sequence[DataPath], number: int
) -> tuple[np.ndarray, np.ndarray]:
    from amlp_ray.data.parquet import keys_of

    unit = source.order.units[number]
    table = read_part(places[unit.part], ["id", "image"], unit.group)
    if len(table) != unit.rows:
        raise DataError(
            f"{places[unit.part]} is damaged: row group {unit.group} has {len(table)} rows instead of {unit.rows}; "
            f"prepare the dataset again."
        )
    images = images_of(table["image"], source.shape, source.dtype).view(np.uint8)
    return images.reshape(unit.rows, source.image_bytes), keys_of(table["id"].to_pylist())


def _read_epochs(epochs: pa.Table, source: SplitSource) -> Iterator[pa.Table]:
    for epoch in epochs["epoch"].to_pylist():
        yield from read_epoch(source, epoch)


def stream_tables(source: SplitSource, epochs: range) -> Iterator[pa.Table]:
    """Yield the tables of `read_epoch`, one epoch after the other, read ahead by Ray tasks on this node."""
    quieten()
    # Items, since `range` and `from_arrow` start tasks of their own, which wait for a whole CPU.
    rows = ray.data.from_items(
        [{"epoch": epoch} for epoch in epochs], override_num_blocks=len(epochs)
    ).map_batches(
        _read_epochs,
        batch_size=1,
        batch_format="pyarrow",
        fn_kwargs={"source": source},
        # One task at a time: the next epoch's begins when this one's has handed over its last blocks, which are still
        # waiting then. A second one was no faster and took as much memory again.
        compute=ray.data.TaskPoolStrategy(size=1),
        num_cpus=0,  # a fraction would wait where workers hold every CPU, and no batch would ever come
        label_selector={"ray.io/node-id": ray.get_runtime_context().get_node_id()},
    )
    rows.context.execution_options.preserve_order = True
    # Below what tasks yield, so that Ray leaves blocks as they are.
    rows.context.target_max_block_size = source.block_bytes * 3 // 4
    # Else a reader that is faster than the trainer fills half of Ray's memory.
    rows.context.execution_options.resource_limits = ray.data.ExecutionResources(
        object_store_memory=2 * AHEAD * source.block_bytes
    )
    try:
        yield from rows.iter_batches(
            batch_size=None, batch_format="pyarrow", prefetch_batches=AHEAD
        )
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, AmlpError):
            raise type(error.cause)(
                str(error.cause).splitlines()[0]
            ) from None  # Ray adds lines of its own
        raise
