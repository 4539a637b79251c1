"""Read the rows of Parquet parts as a Ray dataset. Imported only where Ray is used."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pyarrow as pa
import ray.data
from ray.data.extensions import ArrowTensorArray

from amlp_ray.data.parquet import (
    COLUMNS,
    Shape,
    StoredPart,
    check_part,
    images_of,
    masks_of,
    read_part,
    schema,
)
from amlp_ray.data.ray_silence import silence_ray_data


def read_rows(
    parts: Sequence[StoredPart], shape: Shape, dtype: str, columns: Sequence[str] | None = None
) -> ray.data.Dataset:
    """Read parts as a Ray dataset of rows, in order.

    Ray's own reader is not used: it verifies no checksums.

    Args:
        parts: there may be none.
        shape: shape of an image.
        dtype: dtype of an image.
        columns: names of columns; None reads all.

    Returns:
        Rows with `image` (C, H, W) and `mask` (H, W) as arrays. A mask comes with `labeled`: an
        unlabeled image has a mask of zeros and False.

    Raises:
        DataError: a part is missing, damaged, or not what the manifest says.
    """
    silence_ray_data()
    names = list(columns or COLUMNS)
    if not parts:
        return ray.data.from_arrow(schema(shape, dtype).empty_table().select(names))
    for part in parts:
        check_part(part)
    numbers = [{"part": number} for number in range(len(parts))]
    rows = ray.data.from_items(numbers, override_num_blocks=len(numbers)).map_batches(
        _read_parts,
        batch_format="pyarrow",
        batch_size=1,
        fn_kwargs={"parts": tuple(parts), "columns": names},
    )
    # Otherwise blocks come in the order in which their tasks end.
    rows.context.execution_options.preserve_order = True
    return rows


def _read_parts(
    numbers: pa.Table, parts: Sequence[StoredPart], columns: Sequence[str]
) -> Iterator[pa.Table]:
    """Yield the row groups of parts."""
    for number in numbers["part"].to_pylist():
        part = parts[number]
        for group in range(part.num_groups):
            yield _decode_pixels(read_part(part, columns, group), part)


def _decode_pixels(table: pa.Table, part: StoredPart) -> pa.Table:
    names = [name for name in table.column_names if name not in ("image", "mask")]
    columns = {name: table[name] for name in names}
    if "image" in table.column_names:
        images = images_of(table["image"], part.shape, part.dtype)
        columns["image"] = ArrowTensorArray.from_numpy(images)
    if "mask" in table.column_names:
        masks, labeled = masks_of(table["mask"], part.shape)
        columns["mask"] = ArrowTensorArray.from_numpy(masks)
        columns["labeled"] = pa.array(labeled)
    return pa.table(columns)
