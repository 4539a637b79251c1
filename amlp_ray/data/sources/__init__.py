"""One reader per folder layout. Each lists which images there are and which masks belong to them; none decodes."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

from amlp_ray.data.sources.busi import find_busi
from amlp_ray.data.sources.item import Item, natural_key
from amlp_ray.data.sources.paired import find_paired
from amlp_ray.errors import DataError

__all__ = ["LAYOUTS", "Item", "find_items", "natural_key"]

LAYOUTS = {"busi": find_busi, "paired": find_paired}


def find_items(layout: str, folder: str | Path) -> list[Item]:
    """List the images below `folder` with their masks, sorted naturally by id.

    Raises:
        DataError: the folder is missing or holds no images, two images share an id, or a mask has no image.
    """
    folder = Path(folder)
    if layout not in LAYOUTS:
        raise DataError(f"There is no layout {layout!r}; known are {', '.join(LAYOUTS)}.")
    if not folder.is_dir():
        raise DataError(f"There is no folder {folder}; check the path.")
    items = sorted(LAYOUTS[layout](folder), key=lambda item: natural_key(item.id))
    for first, second in pairwise(items):
        if first.id == second.id:
            raise DataError(
                f"{first.source} and {second.source} in {folder} are both named {first.id!r}, but names must differ "
                f"since they identify images; rename one."
            )
    return items
