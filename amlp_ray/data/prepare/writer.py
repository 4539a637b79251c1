"""Pass 2 of preparing: decode again, cut, write every part, and sum up its statistics.

Ray Data workers run it, one part each. A fault comes back as a sentence, as in pass 1.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np

from amlp_ray.config import PrepareConfig
from amlp_ray.data.decoders import MaskRule, read_frames
from amlp_ray.data.decoders.image import to_channels
from amlp_ray.data.layouts import SourceImage
from amlp_ray.data.parquet import Shape, footer_digest, write_part
from amlp_ray.data.path import DataPath
from amlp_ray.data.prepare.crop import Crop, cut, pixel_spacing, scaled
from amlp_ray.data.prepare.scan import FrameScan, HashingReader, item_from_row, item_to_row
from amlp_ray.data.prepare.statistics import Statistics
from amlp_ray.errors import DataError, describe_error


class Row(NamedTuple):
    """An image to be written: what is cut from which frame of which item, and its names."""

    item: SourceImage
    digest: str  # of the item's files when they were scanned
    frame: FrameScan
    crop: Crop
    id: str
    group: str
    source: str


def part_job(
    path: str,
    rows: Sequence[Row],
    config: dict[str, Any],
    mask_rule: MaskRule,
    shape: Shape,
    dtype: str,
) -> dict[str, Any]:
    """Describe a part as plain values for `write_job`. Rows of one item are neighbors."""
    items = []
    for _, item_rows in groupby(rows, key=lambda row: id(row.item)):
        images = []
        for row in item_rows:
            y, x, background, *_ = row.crop
            images.append([row.frame.number, row.frame.hash, y, x, background, row.id])
        items.append([item_to_row(row.item), row.digest, row.group, row.source, images])
    return {
        "path": path,
        "config": config,
        "mask_rule": mask_rule,
        "shape": shape,
        "dtype": dtype,
        "items": items,
    }


def write_job(job: dict[str, Any]) -> dict[str, Any]:
    """Write one part, in a worker.

    Returns:
        "rows", "bytes", "footer" and "statistics" of the part; or a "fault", and whether it is
        "resumable".
    """
    path = DataPath(job["path"])
    channels, height, width = job["shape"]
    statistics = Statistics(channels, job["dtype"])
    try:
        rows = write_part(path, _columns(job, statistics), (channels, height, width), job["dtype"])
        return {
            "rows": rows,
            "bytes": path.info().size,
            "footer": footer_digest(path),
            "statistics": statistics.to_rows(),
        }
    except DataError as error:
        return {"fault": str(error), "resumable": False}
    except OSError as error:
        reason = error.strerror or describe_error(error)
        fault = (
            f"{path} cannot be written ({reason}); check space and rights, and run the "
            f"same command again to resume."
        )
        return {"fault": fault, "resumable": True}


def _columns(job: dict[str, Any], statistics: Statistics) -> Iterator[dict[str, Any]]:
    """Yield the columns of each image, and add its values to `statistics`."""
    config = PrepareConfig.model_validate(job["config"])
    mask_rule = MaskRule(*job["mask_rule"])
    for row, digest, group, source, images in job["items"]:
        item = item_from_row(row)
        reader = HashingReader()
        images_of_frame = {
            number: list(same) for number, same in groupby(images, key=lambda image: image[0])
        }
        for frame in read_frames(item, config, reader, mask_rule):
            if frame.number not in images_of_frame:
                continue
            height, width = frame.image.shape[:2]
            spacing = pixel_spacing(frame.spacing, height, width, config)
            pixels = to_channels(frame.image, job["shape"][0])
            whole, whole_mask = scaled(pixels, frame.mask, config)
            for _, image_hash, y, x, background, name in images_of_frame[frame.number]:
                image, mask = cut(whole, whole_mask, y, x, config)
                image = image.astype(job["dtype"], copy=False)
                statistics.add(image)
                yield {
                    "id": name,
                    "group": group,
                    "image": _to_bytes(image),
                    "mask": None if mask is None else mask.tobytes(),
                    "lesion": None if mask is None else int(mask.sum()),
                    "background": background,
                    "height": height,
                    "width": width,
                    "y": y,
                    "x": x,
                    "frame": frame.number,
                    "spacing_y": spacing and spacing[0],
                    "spacing_x": spacing and spacing[1],
                    "hash": image_hash,
                    "source": source,
                }
        if reader.digest != digest:
            raise DataError(
                f"{item.images[0]} changed while the dataset was prepared; run the same command "
                f"again."
            )


def _to_bytes(image: np.ndarray) -> bytes:
    return image.astype(image.dtype.newbyteorder("<"), copy=False).tobytes()
