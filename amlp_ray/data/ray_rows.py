"""Read the rows of Parquet parts as a Ray dataset. Imported only where Ray is used."""

from __future__ import annotations

from collections.abc import Sequence

import pyarrow as pa
import ray.data
from ray.data.extensions import ArrowTensorArray

from amlp_ray.data.parquet import Shape, StoredPart, check_part, images_of, masks_of, schema
from amlp_ray.data.path import DataPath
from amlp_ray.data.ray_silence import silence_ray_data


def read_rows(
    parts: Sequence[StoredPart], shape: Shape, dtype: str, columns: Sequence[str] | None = None
) -> ray.data.Dataset:
    """Read parts as a Ray dataset of rows, in order.

    Args:
        parts: there may be none.
        shape: shape of an image.
        dtype: dtype of an image.
        columns: names of columns; None reads all.

    Returns:
        Rows with `image` (C, H, W) and `mask` (H, W) as arrays. A mask comes with `labeled`: an
        unlabeled image has a mask of zeros and False.
    """
    silence_ray_data()
    if not parts:
        empty = schema(shape, dtype).empty_table()
        return ray.data.from_arrow(empty.select(list(columns or empty.column_names)))
    for part in parts:
        check_part(part)
    files = [DataPath(part.file) for part in parts]
    rows = ray.data.read_parquet([file.path for file in files], filesystem=files[0].filesystem)
    if columns:
        rows = rows.select_columns(list(columns))  # Ray then reads no others
    rows = rows.map_batches(
        _decode_pixels,
        batch_format="pyarrow",
        batch_size=None,
        fn_kwargs={"shape": shape, "dtype": dtype},
    )
    # Otherwise blocks come in the order in which their tasks end.
    rows.context.execution_options.preserve_order = True
    return rows


def _decode_pixels(table: pa.Table, shape: Shape, dtype: str) -> pa.Table:
    names = [name for name in table.column_names if name not in ("image", "mask")]
    columns = {name: table[name] for name in names}
    if "image" in table.column_names:
        images = images_of(table["image"], shape, dtype)
        columns["image"] = ArrowTensorArray.from_numpy(images)
    if "mask" in table.column_names:
        masks, labeled = masks_of(table["mask"], shape)
        columns["mask"] = ArrowTensorArray.from_numpy(masks)
        columns["labeled"] = pa.array(labeled)
    return pa.table(columns)
