"""Parquet parts of a patch dataset: the columns, and arrays in and out of them.

Images are fixed-size binary, not Arrow tensors: Parquet has no 8-bit type, so tensors take four times the space
and decode ten times slower.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from amlp_ray.data.path import DataPath
from amlp_ray.errors import DataError

PART_ROWS = 1024
PART_BYTES = (
    256 << 20
)  # a part of large images holds fewer: it is what a run that was killed writes again
GROUP_ROWS = 256
GROUP_BYTES = 16 << 20  # bounds a writer's and a reader's memory where images are large

Shape = tuple[int, int, int]  # channels, height, width

COLUMNS = {
    "id": "the image's name, unique in the dataset",
    "group": "patient, volume or cluster of near-duplicates; no split cuts one",
    "image": "pixels, channels x height x width, little-endian",
    "mask": "height x width bytes of 0 and 1; null where unlabelled",
    "lesion": "lesion pixels of the mask; null where unlabelled",
    "background": "share of air, black border and padding",
    "height": "of the original, in pixels",
    "width": "of the original, in pixels",
    "y": "where a tile begins in the (scaled) original",
    "x": "where a tile begins in the (scaled) original",
    "frame": "slice or frame of its file or series, from 0",
    "spacing_y": "millimetres of a stored pixel, down; null where not known",
    "spacing_x": "millimetres of a stored pixel, across",
    "hash": "perceptual hash of the original, 64 bits",
    "source": "file below the source folder; a salted hash for DICOM",
}
LIGHT = tuple(
    name for name in COLUMNS if name not in ("image", "mask")
)  # a table of all images fits in memory


def image_bytes(shape: Shape, dtype: str) -> int:
    """Bytes of one image as stored."""
    return int(np.prod(shape)) * np.dtype(dtype).itemsize


def part_rows(shape: Shape, dtype: str) -> int:
    """Rows of every part of a split but the last."""
    return max(1, min(PART_ROWS, PART_BYTES // image_bytes(shape, dtype)))


def group_rows(shape: Shape, dtype: str) -> int:
    """Rows of every row group of a part but the last."""
    return max(1, min(GROUP_ROWS, GROUP_BYTES // image_bytes(shape, dtype)))


def schema(shape: Shape, dtype: str) -> pa.Schema:
    """The columns of every part, see `COLUMNS`."""
    _, height, width = shape
    kinds = {
        "image": pa.binary(image_bytes(shape, dtype)),
        "mask": pa.binary(height * width),
        "background": pa.float32(),
        "spacing_y": pa.float32(),
        "spacing_x": pa.float32(),
        "hash": pa.uint64(),
    } | dict.fromkeys(("id", "group", "source"), pa.string())
    nullable = ("mask", "lesion", "spacing_y", "spacing_x")
    return pa.schema(
        [
            pa.field(name, kinds.get(name, pa.int32()), nullable=name in nullable)
            for name in COLUMNS
        ],
        metadata={"shape": "x".join(map(str, shape)), "dtype": dtype},
    )


def write_part(place: DataPath, rows: Iterable[dict[str, Any]], shape: Shape, dtype: str) -> int:
    """Write `rows` (values by column name) in row groups; return how many there were. Raises OSError.

    On this machine the part appears when it is complete; in an object store, a cut one is what nobody refers to.
    """
    if not place.is_local:
        return _write(place.path, place.filesystem, rows, shape, dtype)
    place.local.parent.mkdir(parents=True, exist_ok=True)
    # A name of its own: a worker of a run that was killed may still be writing the same part, to the same bytes.
    partial = place.local.with_name(f".{place.name}.{os.getpid()}.partial")
    try:
        written = _write(str(partial), place.filesystem, rows, shape, dtype)
        partial.replace(place.local)
    finally:
        partial.unlink(missing_ok=True)
    return written


def _write(
    path: str, filesystem: Any, rows: Iterable[dict[str, Any]], shape: Shape, dtype: str
) -> int:
    columns = schema(shape, dtype)
    written = 0
    with pq.ParquetWriter(
        path,
        columns,
        filesystem=filesystem,
        compression="zstd",  # masks and black borders shrink to nothing, speckle costs no time
        use_dictionary=False,
        write_statistics=[
            "id",
            "group",
        ],  # of binary columns they would repeat whole images in the footer
        write_page_checksum=True,
    ) as writer:
        for group in _chunks(rows, group_rows(shape, dtype)):
            writer.write_table(pa.Table.from_pylist(group, schema=columns))
            written += len(group)
    return written


def open_part(place: DataPath) -> pq.ParquetFile:
    """Open a part for reading its row groups. Raises OSError or pyarrow's errors."""
    return pq.ParquetFile(place.path, filesystem=place.filesystem, page_checksum_verification=True)


def read_part(place: DataPath | Path, columns: Sequence[str], group: int | None = None) -> pa.Table:
    """Read columns of one part, or of one of its row groups. Raises DataError where it is missing or damaged."""
    place = DataPath(place)
    try:
        with open_part(place) as file:
            return (
                file.read(list(columns))
                if group is None
                else file.read_row_group(group, list(columns))
            )
    except (OSError, pa.ArrowException, KeyError) as error:
        reason = " ".join(str(error).split()).rstrip(".")[:200]
        raise DataError(f"{place} is damaged ({reason}); prepare the dataset again.") from None


def images_of(column: pa.ChunkedArray, shape: Shape, dtype: str) -> np.ndarray:
    """View an image column as (N, C, H, W). The memory is Arrow's and read-only: copy before torch gets it."""
    return (
        _values(column, image_bytes(shape, dtype))
        .view(np.dtype(dtype).newbyteorder("<"))
        .reshape(-1, *shape)
    )


def masks_of(column: pa.ChunkedArray, shape: Shape) -> tuple[np.ndarray, np.ndarray]:
    """Return a mask column as (N, H, W) uint8, zero where null, and (N,) bool: whether there is a mask."""
    _, height, width = shape
    labeled = column.is_valid().to_numpy(zero_copy_only=False)
    if not labeled.any():  # Arrow may hold no values at all behind nulls
        return np.zeros((len(labeled), height, width), np.uint8), labeled
    masks = _values(column, height * width).reshape(-1, height, width).copy()
    masks[~labeled] = 0
    return masks, labeled


def _values(column: pa.ChunkedArray, size: int) -> np.ndarray:
    array = column.combine_chunks()
    if isinstance(array, pa.ChunkedArray):  # of several chunks too large for one, or of none
        return np.concatenate(
            [_values(pa.chunked_array([chunk]), size) for chunk in array.chunks] or [EMPTY]
        )
    return np.frombuffer(
        array.buffers()[1], np.uint8, count=len(array) * size, offset=array.offset * size
    )


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


def key_of(name: str) -> int:
    """Hash an id to a stable non-negative 63-bit number: the identity of an image, for seeds on a device.

    >>> key_of("benign (1)") == key_of("benign (1)") != key_of("benign (2)")
    True
    """
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") >> 1


def keys_of(ids: Sequence[str]) -> np.ndarray:
    """Hash ids to (N,) int64, see `key_of`."""
    return np.fromiter((key_of(name) for name in ids), np.int64, len(ids))
