"""The layout of BUSI, the public breast ultrasound set: one folder per class, masks beside their images.

    benign/benign (1).png   benign/benign (1)_mask.png   benign/benign (1)_mask_1.png   malignant/...   normal/...

An id is a file name without suffix, such as `benign (1)`. Names hold spaces and brackets, so nothing here globs.
"""

from __future__ import annotations

import re
from pathlib import Path

from amlp_ray.data.sources.item import IMAGE_SUFFIXES, Item, found_in, image_files
from amlp_ray.errors import DataError

CLASSES = ("benign", "malignant", "normal")
MASK_NAME = re.compile(r"(?P<id>.+)_mask(_\d+)?", re.IGNORECASE)


def find_busi(folder: Path) -> list[Item]:
    """List the images of a BUSI folder. Raises DataError where there is none, or a mask has no image."""
    items = [item for name in CLASSES if (folder / name).is_dir() for item in _find_class(folder, name)]
    if not items:
        raise DataError(
            f"{folder} holds {found_in(folder)}, but the busi layout needs images ({', '.join(IMAGE_SUFFIXES)}) in "
            f"folders named {', '.join(CLASSES)}; give the folder that contains these, or use the paired layout."
        )
    return items


def _find_class(folder: Path, name: str) -> list[Item]:
    images: list[Path] = []
    masks: dict[str, list[Path]] = {}
    for path in image_files(folder / name):
        match = MASK_NAME.fullmatch(path.stem)
        if match:
            masks.setdefault(match["id"], []).append(path)
        else:
            images.append(path)
    stray = sorted(masks.keys() - {path.stem for path in images})
    if stray:
        raise DataError(
            f"{masks[stray[0]][0]} is a mask without an image; an image named {stray[0]!r} must stand beside it, "
            f"so add the image or remove the mask."
        )
    return [
        Item(
            id=path.stem,
            image=str(path.absolute()),
            masks=tuple(str(mask.absolute()) for mask in masks.get(path.stem, ())),
            source=f"{name}/{path.name}",
        )
        for path in images
    ]
