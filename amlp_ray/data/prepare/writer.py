"""Pass 2 of preparing: decode again, cut, and write every part; sum up the statistics on the way.

Runs in Ray Data workers, one part each. A fault comes back as a sentence, as in pass 1.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from typing import Any, NamedTuple

from amlp_ray.config import PrepareConfig
from amlp_ray.data.decoders import read_frames
from amlp_ray.data.decoders.image import to_channels
from amlp_ray.data.layouts import SourceImage
from amlp_ray.data.parquet import Shape, write_part
from amlp_ray.data.path import DataPath
from amlp_ray.data.prepare.crop import Cutting, cut, pixel_spacing, scaled
from amlp_ray.data.prepare.scan import FrameScan, Reader, item_of, item_row
from amlp_ray.data.prepare.statistics import Statistics
from amlp_ray.errors import DataError


class Row(NamedTuple):
    """An image to be written: what is cut from which frame of which item, and the names it gets."""

    item: SourceImage
    digest: str  # of the item's files when they were looked at
    frame: FrameScan
    cutting: Cutting
    id: str
    group: str
    source: str


def part_job(
    place: DataPath, rows: list[Row], config: PrepareConfig, shape: Shape, dtype: str
) -> dict[str, Any]:
    """Plain values that `write_job` makes a part of; rows of one item stand together."""
    items = []
    for _, same in groupby(rows, key=lambda row: id(row.item)):
        of_item = list(same)
        first = of_item[0]
        images = [
            [r.frame.number, r.frame.hash, r.cutting.y, r.cutting.x, r.cutting.background, r.id]
            for r in of_item
        ]
        items.append([item_row(first.item), first.digest, first.group, first.source, images])
    return {
        "place": str(place),
        "config": config.model_dump(mode="json"),
        "shape": list(shape),
        "dtype": dtype,
        "items": items,
    }


def write_job(run_spec: dict[str, Any]) -> dict[str, Any]:
    """Write one part, in a worker: {"rows", "bytes", "statistics"}, or {"fault"}, and whether it may go on."""
    place, shape = DataPath(run_spec["place"]), tuple(run_spec["shape"])
    statistics = Statistics(shape[0], run_spec["dtype"])
    try:
        rows = write_part(place, _encoded(run_spec, statistics), shape, run_spec["dtype"])
        return {"rows": rows, "bytes": place.info().size, "statistics": statistics.plain()}
    except DataError as error:
        return {"fault": str(error), "resumable": False}
    except OSError as error:
        reason = error.strerror or " ".join(str(error).split())[:200]
        return {
            "fault": f"{place} cannot be written ({reason}); check space and rights, and run the same command again "
            f"to go on.",
            "resumable": True,
        }


def _encoded(run_spec: dict[str, Any], statistics: Statistics) -> Iterator[dict[str, Any]]:
    """Yield the columns of each image, and add its values to `statistics`."""
    config = PrepareConfig.model_validate(run_spec["config"])
    for row, digest, group, source, images in run_spec["items"]:
        item, read = item_of(row), Reader()
        wanted = {
            number: list(same) for number, same in groupby(images, key=lambda image: image[0])
        }
        for frame in read_frames(item, config, read):
            if frame.number not in wanted:
                continue
            height, width = frame.image.shape[:2]
            spacing = pixel_spacing(frame.spacing, height, width, config)
            whole = scaled(to_channels(frame.image, run_spec["shape"][0]), frame.mask, config)
            for _, hashed, y, x, background, name in wanted[frame.number]:
                image, mask = cut(*whole, y, x, config)
                stored = image.astype(run_spec["dtype"], copy=False)
                statistics.add(stored)
                yield {
                    "id": name,
                    "group": group,
                    "image": stored.astype(stored.dtype.newbyteorder("<"), copy=False).tobytes(),
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
                    "hash": hashed,
                    "source": source,
                }
        if read.digest != digest:
            raise DataError(
                f"{item.images[0]} changed while the dataset was prepared; run the same command again."
            )
