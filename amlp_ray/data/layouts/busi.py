"""The layout of BUSI, the public breast ultrasound set: one folder per class, masks beside their images.

    benign/benign (1).png   benign/benign (1)_mask.png   benign/benign (1)_mask_1.png   malignant/...   normal/...

An id is a file name without suffix, such as `benign (1)`; the class is the stratum. The class folders may lie deeper,
as they do in the archive one downloads. Names hold spaces and brackets, so nothing here globs.
"""

from __future__ import annotations

import re

from amlp_ray.config import PrepareConfig
from amlp_ray.data.layouts.item import Listing, RejectedFile, SourceImage
from amlp_ray.data.layouts.listing import Name, pictures_in, same
from amlp_ray.data.path import DataPath

CLASSES = ("benign", "malignant", "normal")
MASK_NAME = re.compile(
    r"(?P<id>.+)_mask(_\d+)?", re.IGNORECASE | re.DOTALL
)  # names may hold newlines


def find_busi(place: DataPath, config: PrepareConfig) -> Listing:
    """List the images of a BUSI folder; a mask without an image is a fault."""
    images, masks = split_busi(pictures_in(place))
    known = {same(image.path) for image in images}
    faults = [
        RejectedFile(
            mask.full,
            "rejected",
            f"is a mask without an image; an image named {path.rpartition('/')[2]!r} must stand beside it, so add the "
            f"image or remove the mask",
        )
        for path, strays in masks.items()
        if path not in known
        for mask in strays
    ]
    items = [
        SourceImage(
            id=image.stem,
            format="picture",
            images=(str(place / image.full),),
            masks=tuple(str(place / mask.full) for mask in masks.get(same(image.path), ())),
            source=image.full,
            stratum=_class_of(image.folder),
        )
        for image in images
    ]
    return Listing(items, faults)


def split_busi(pictures: list[Name]) -> tuple[list[Name], dict[str, list[Name]]]:
    """Images in class folders, and masks by the path without suffix of their image, as `same` writes it."""
    images: list[Name] = []
    masks: dict[str, list[Name]] = {}
    for picture in pictures:
        if _class_of(picture.folder) not in CLASSES:
            continue
        match = MASK_NAME.fullmatch(picture.stem)
        if match:
            masks.setdefault(same(f"{picture.folder}/{match['id']}"), []).append(picture)
        else:
            images.append(picture)
    return images, masks


def _class_of(folder: str) -> str:
    return folder.rpartition("/")[2].lower()
