"""Parquet parts of a patch dataset: the columns, and arrays in and out of them.

Images are fixed-size binary, not Arrow tensors: Parquet has no 8-bit type, so tensors take four times the space
and decode ten times slower.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from amlp_ray.errors import DataError

ROWS_PER_PART = 1024
ROW_GROUP_ROWS = 256
ROW_GROUP_BYTES = 64 << 20  # bounds the writer's memory where images are large

Shape = tuple[int, int, int]  # channels, height, width


def image_bytes(shape: Shape, dtype: str) -> int:
    """Bytes of one image as stored."""
    return int(np.prod(shape)) * np.dtype(dtype).itemsize


def schema(shape: Shape, dtype: str) -> pa.Schema:
    """The columns of every part. `mask` is null where an image is unlabelled; height and width are the original's."""
    _, height, width = shape
    return pa.schema(
        [
            pa.field("id", pa.string(), nullable=False),
            pa.field("group", pa.string(), nullable=False),
            pa.field("image", pa.binary(image_bytes(shape, dtype)), nullable=False),
            pa.field("mask", pa.binary(height * width)),
            pa.field("height", pa.int32(), nullable=False),
            pa.field("width", pa.int32(), nullable=False),
            pa.field("source", pa.string(), nullable=False),
        ],
        metadata={"shape": "x".join(map(str, shape)), "dtype": dtype},
    )


def write_part(path: Path, rows: Iterable[dict[str, Any]], shape: Shape, dtype: str) -> int:
    """Write `rows` (values by column name) in row groups; return how many there were."""
    columns = schema(shape, dtype)
    group_rows = max(1, min(ROW_GROUP_ROWS, ROW_GROUP_BYTES // image_bytes(shape, dtype)))
    path.parent.mkdir(parents=True, exist_ok=True)
    written = 0
    with pq.ParquetWriter(
        path,
        columns,
        compression="zstd",  # masks and black borders shrink to nothing, speckle costs no time
        use_dictionary=False,
        write_statistics=["id", "group"],  # of binary columns they would repeat whole images in the footer
        write_page_checksum=True,
    ) as writer:
        for group in _chunks(rows, group_rows):
            writer.write_table(pa.Table.from_pylist(group, schema=columns))
            written += len(group)
    return written


def read_part(path: Path, columns: Sequence[str]) -> pa.Table:
    """Read columns of one part. Raises DataError where the file is missing or damaged."""
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            return file.read(list(columns))
    except (OSError, pa.ArrowException, KeyError) as error:
        reason = " ".join(str(error).split()).rstrip(".")[:200]
        raise DataError(f"{path} is damaged ({reason}); prepare the dataset again.") from None


def images_of(column: pa.ChunkedArray, shape: Shape, dtype: str) -> np.ndarray:
    """View an image column as (N, C, H, W). The memory is Arrow's and read-only: copy before torch gets it."""
    return _values(column, image_bytes(shape, dtype)).view(np.dtype(dtype).newbyteorder("<")).reshape(-1, *shape)


def masks_of(column: pa.ChunkedArray, shape: Shape) -> tuple[np.ndarray, np.ndarray]:
    """Return a mask column as (N, H, W) uint8, zero where null, and (N,) bool: whether there is a mask."""
    _, height, width = shape
    labelled = column.is_valid().to_numpy(zero_copy_only=False)
    if not labelled.any():  # Arrow may hold no values at all behind nulls
        return np.zeros((len(labelled), height, width), np.uint8), labelled
    masks = _values(column, height * width).reshape(-1, height, width).copy()
    masks[~labelled] = 0
    return masks, labelled


def _values(column: pa.ChunkedArray, size: int) -> np.ndarray:
    array = column.combine_chunks()
    if isinstance(array, pa.ChunkedArray):  # of several chunks too large for one, or of none
        return np.concatenate([_values(pa.chunked_array([chunk]), size) for chunk in array.chunks] or [EMPTY])
    return np.frombuffer(array.buffers()[1], np.uint8, count=len(array) * size, offset=array.offset * size)


EMPTY = np.zeros(0, np.uint8)


def _chunks(rows: Iterable[dict[str, Any]], size: int) -> Iterator[list[dict[str, Any]]]:
    chunk: list[dict[str, Any]] = []
    for row in rows:
        chunk.append(row)
        if len(chunk) == size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk
