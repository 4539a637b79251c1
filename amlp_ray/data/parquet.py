"""Write and read the Parquet parts of a patch dataset: columns to arrays and back.

Images are fixed-size binary and not Arrow tensors. Parquet has no 8-bit type, so tensors take four
times the space and decode ten times slower.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from amlp_ray.data.path import DataPath
from amlp_ray.errors import DataError, describe_error
from amlp_ray.utils.files import atomic_path

PART_ROWS = 1024
# A part of large images holds fewer: a killed run writes its last part again.
PART_BYTES = 256 << 20
GROUP_ROWS = 256
GROUP_BYTES = 16 << 20  # bounds a writer's and a reader's memory where images are large

FOOTER_BYTES = 64 << 10  # read at once; the footer of a part is smaller
ARROW_SCHEMA = b"ARROW:schema"
EXTENSION = b"ARROW:extension"
UNDECODABLE = b"?"

Shape = tuple[int, int, int]  # channels, height, width


class StoredPart(NamedTuple):
    """A part, and what the manifest of its dataset says of it."""

    file: str  # path or URI
    rows: int
    group_rows: int  # rows of every row group but the last
    footer: str  # SHA-256 of its footer
    shape: Shape  # of its images
    dtype: str

    @property
    def num_groups(self) -> int:
        """Number of row groups."""
        return -(-self.rows // self.group_rows)


COLUMNS = {
    "id": "the image's name, unique in the dataset",
    "group": "patient, volume or cluster of near-duplicates; no split cuts one",
    "image": "pixels, channels x height x width, little-endian",
    "mask": "height x width bytes of 0 and 1; null where unlabeled",
    "lesion": "lesion pixels of the mask; null where unlabeled",
    "background": "share of air, black border and padding",
    "height": "of the original, in pixels",
    "width": "of the original, in pixels",
    "y": "where a tile begins in the (scaled) original",
    "x": "where a tile begins in the (scaled) original",
    "frame": "slice or frame of its file or series, from 0",
    "spacing_y": "millimeters of a stored pixel, down; null where not known",
    "spacing_x": "millimeters of a stored pixel, across",
    "hash": "perceptual hash of the original, 64 bits",
    "source": "file below the source folder; a salted hash for DICOM",
}
# Columns without pixels: a table of all images fits in memory.
LIGHT = tuple(name for name in COLUMNS if name not in ("image", "mask"))
NULLABLE = ("mask", "lesion", "spacing_y", "spacing_x")


def image_bytes(shape: Shape, dtype: str) -> int:
    """Return the bytes of one image as stored."""
    return int(np.prod(shape)) * np.dtype(dtype).itemsize


def part_rows(shape: Shape, dtype: str) -> int:
    """Return the rows of every part of a split but the last."""
    return max(1, min(PART_ROWS, PART_BYTES // image_bytes(shape, dtype)))


def group_rows(shape: Shape, dtype: str) -> int:
    """Return the rows of every row group of a part but the last."""
    return max(1, min(GROUP_ROWS, GROUP_BYTES // image_bytes(shape, dtype)))


def schema(shape: Shape, dtype: str) -> pa.Schema:
    """Return the schema of every part, see `COLUMNS`."""
    _, height, width = shape
    types = {
        "id": pa.string(),
        "group": pa.string(),
        "image": pa.binary(image_bytes(shape, dtype)),
        "mask": pa.binary(height * width),
        "background": pa.float32(),
        "spacing_y": pa.float32(),
        "spacing_x": pa.float32(),
        "hash": pa.uint64(),
        "source": pa.string(),
    }
    fields = [
        pa.field(name, types.get(name, pa.int32()), nullable=name in NULLABLE) for name in COLUMNS
    ]
    return pa.schema(fields, metadata={"shape": "x".join(map(str, shape)), "dtype": dtype})


def write_part(file: DataPath, rows: Iterable[dict[str, Any]], shape: Shape, dtype: str) -> int:
    """Write rows, values by column name, to a part, a row group at a time; return their number.

    On this machine the part appears once it is complete. In an object store a part that was cut
    short stays, but no manifest names it.

    Raises:
        OSError: the part cannot be written.
    """
    if not file.is_local:
        return _write(file.path, file.filesystem, rows, shape, dtype)
    file.local.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(file.local) as partial:
        return _write(str(partial), file.filesystem, rows, shape, dtype)


def _write(
    path: str, filesystem: Any, rows: Iterable[dict[str, Any]], shape: Shape, dtype: str
) -> int:
    columns = schema(shape, dtype)
    written = 0
    with pq.ParquetWriter(
        path,
        columns,
        filesystem=filesystem,
        compression="zstd",  # shrinks masks and black borders to nothing, and costs no time
        use_dictionary=False,
        # Statistics of binary columns would repeat whole images in the footer.
        write_statistics=["id", "group"],
        write_page_checksum=True,
    ) as writer:
        remaining = iter(rows)
        while group := list(islice(remaining, group_rows(shape, dtype))):
            writer.write_table(pa.Table.from_pylist(group, schema=columns))
            written += len(group)
    return written


def footer_digest(file: DataPath) -> str:
    """Return the SHA-256 of a part's footer. Raises OSError."""
    with file.filesystem.open_input_file(file.path) as source:
        return hashlib.sha256(_footer(source)).hexdigest()


@contextmanager
def open_part(part: StoredPart) -> Iterator[pq.ParquetFile]:
    """Open a part to read its row groups. Raises OSError or pyarrow's errors.

    Pages have checksums, but the footer that says where they lie and of what type they are has
    none: Arrow reads changed ones as other values without a word.

    Raises:
        DataError: the part is not what the manifest says, or a column has a type that may run code.
    """
    path = DataPath(part.file)
    with path.filesystem.open_input_file(path.path) as source:
        footer = _footer(source)
        _check_types(footer, path)
        if hashlib.sha256(footer).hexdigest() != part.footer:
            raise DataError(
                f"{path} is damaged (its footer is not the one that was written); prepare the "
                f"dataset again."
            )
        opened = pq.ParquetFile(source, page_checksum_verification=True)
        _check_content(opened, part)
        yield opened


def check_part(part: StoredPart) -> None:
    """Raise DataError if a part that a library will read is damaged or may run code."""
    with _damage_told(part), open_part(part):
        pass


def _check_content(opened: pq.ParquetFile, part: StoredPart) -> None:
    """Raise DataError if a part holds other images than the manifest says."""
    rows = opened.metadata.num_rows
    if rows != part.rows:
        raise DataError(
            f"{part.file} is damaged: it has {rows} rows instead of {part.rows}; prepare the "
            f"dataset again."
        )
    if opened.num_row_groups != part.num_groups:
        raise DataError(
            f"{part.file} is damaged: it has {opened.num_row_groups} row groups instead of "
            f"{part.num_groups}; prepare the dataset again."
        )
    if not opened.schema_arrow.equals(schema(part.shape, part.dtype), check_metadata=True):
        stored = opened.schema_arrow.metadata or {}
        images = b" ".join((stored.get(b"shape", b"other"), stored.get(b"dtype", b"")))
        raise DataError(
            f"{part.file} holds {images.decode(errors='replace').strip()} images or other columns, "
            f"but the manifest says {'x'.join(map(str, part.shape))} {part.dtype}; prepare the "
            f"dataset again."
        )


def _check_types(footer: bytes, file: DataPath) -> None:
    """Refuse a Parquet file with Arrow extension types, before Arrow reads its schema.

    Where Ray is imported, Arrow knows types of Ray's whose metadata or values are unpickled, and
    so run whatever code a dataset's author wrote. Our parts have plain types only. Arrow keeps its
    schema in the footer as a base64 text under the name ARROW:schema, which is read here.

    Raises:
        DataError: there is an extension type, or a schema that cannot be read.
    """
    for text in _arrow_schemas(footer):
        try:
            schema_bytes = base64.b64decode(text, validate=True)
        except ValueError:
            schema_bytes = EXTENSION
        if EXTENSION in schema_bytes:
            raise DataError(
                f"{file} has columns of types that may run code, which no patch dataset has; do "
                f"not read it, and ask where it comes from."
            )


def _footer(source: pa.NativeFile) -> bytes:
    """Return the metadata at the end of a Parquet file; empty if it is none."""
    size = source.size()
    tail = source.read_at(min(size, FOOTER_BYTES), max(0, size - FOOTER_BYTES))
    if tail[-4:] != b"PAR1":
        return b""
    length = int.from_bytes(tail[-8:-4], "little") + 8
    if length > len(tail):
        tail = source.read_at(min(length, size), max(0, size - length))
    return tail[-length:-8]


def _arrow_schemas(footer: bytes) -> Iterator[bytes]:
    """Yield the value after every ARROW:schema in a footer; something undecodable if it has none.

    In Thrift's compact protocol a text of the next field is 0x18, its length in groups of seven
    bits, and its bytes. A zero ends the pair of name and value: in a longer one a later value would
    replace the one that is read here.
    """
    for match in re.finditer(re.escape(ARROW_SCHEMA), footer):
        header = re.match(rb"\x18([\x80-\xff]{0,4}[\x00-\x7f])", footer[match.end() :][:6])
        if header is None:
            yield UNDECODABLE
            continue
        length = sum((byte & 0x7F) << 7 * i for i, byte in enumerate(header[1]))
        start = match.end() + header.end()
        end = start + length
        yield footer[start:end] if footer[end : end + 1] == b"\x00" else UNDECODABLE


def read_part(part: StoredPart, columns: Sequence[str], group: int | None = None) -> pa.Table:
    """Read columns of a part, or of its row group number `group`.

    Raises:
        DataError: the part is missing, damaged, or not what the manifest says.
    """
    with _damage_told(part), open_part(part) as opened:
        if group is None:
            return opened.read(list(columns))
        return opened.read_row_group(group, list(columns))


@contextmanager
def _damage_told(part: StoredPart) -> Iterator[None]:
    """Turn errors of reading a part into a DataError."""
    try:
        yield
    except (OSError, pa.ArrowException, KeyError, ValueError) as error:
        raise DataError(
            f"{part.file} is damaged ({describe_error(error)}); prepare the dataset again."
        ) from None


def images_of(column: pa.ChunkedArray, shape: Shape, dtype: str) -> np.ndarray:
    """View an image column as (N, C, H, W).

    The memory is Arrow's and read-only: copy it before torch gets it.
    """
    stored_dtype = np.dtype(dtype).newbyteorder("<")
    pixels = _bytes_of_column(column, image_bytes(shape, dtype))
    return pixels.view(stored_dtype).reshape(-1, *shape)


def masks_of(column: pa.ChunkedArray, shape: Shape) -> tuple[np.ndarray, np.ndarray]:
    """Copy a mask column.

    Returns:
        Masks (N, H, W) uint8, zero where null, and whether there is a mask (N,) bool.
    """
    _, height, width = shape
    labeled = column.is_valid().to_numpy(zero_copy_only=False)
    if not labeled.any():  # Arrow may hold no values at all behind nulls
        return np.zeros((len(labeled), height, width), np.uint8), labeled
    masks = _bytes_of_column(column, height * width).reshape(-1, height, width).copy()
    masks[~labeled] = 0
    return masks, labeled


def _bytes_of_column(column: pa.ChunkedArray, size: int) -> np.ndarray:
    """View the values of a fixed-size binary column as flat uint8."""
    array = column.combine_chunks()
    data = array.buffers()[1]
    return np.frombuffer(data, np.uint8, len(array) * size, offset=array.offset * size)


def key_of(name: str) -> int:
    """Hash an id to a stable non-negative 63-bit number, to seed random numbers on a device.

    >>> key_of("benign (1)") == key_of("benign (1)") != key_of("benign (2)")
    True
    """
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") >> 1


def keys_of(ids: Sequence[str]) -> np.ndarray:
    """Hash ids to (N,) int64, see `key_of`."""
    return np.fromiter(map(key_of, ids), np.int64, len(ids))
