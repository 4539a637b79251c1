"""Read BUSI, the public breast ultrasound set: a folder per class, masks beside their images.

    benign/benign (1).png   benign/benign (1)_mask.png   benign/benign (1)_mask_1.png
    malignant/...   normal/...

An id is a file name without suffix, such as `benign (1)`. The class is the stratum. The class
folders may lie deeper, as they do in the archive one downloads.
"""

from __future__ import annotations

import re

from amlp_ray.config import PrepareConfig
from amlp_ray.data.layouts.item import Listing, rejected
from amlp_ray.data.layouts.listing import FileName, list_pictures, normalize, picture_item
from amlp_ray.data.layouts.paired import Pairs, pair_beside
from amlp_ray.data.path import DataPath

CLASSES = ("benign", "malignant", "normal")
MASK_NAME = re.compile(r"(?P<id>.+)_mask(_\d+)?", re.IGNORECASE | re.DOTALL)


def find_busi(root: DataPath, config: PrepareConfig) -> Listing:
    """List the images of a BUSI folder. A mask without an image is rejected."""
    pairs = pair_busi(list_pictures(root))
    items = []
    for name, image in pairs.images:
        masks = pairs.masks_of(name)
        items.append(
            picture_item(root, image, masks, id=image.stem, stratum=class_of(image.folder))
        )
    strays = []
    for mask in pairs.strays:
        image_name = normalize(MASK_NAME.sub(r"\g<id>", mask.stem))
        reason = (
            f"is a mask without an image; an image named {image_name!r} must stand beside it, "
            "so add the image or remove the mask"
        )
        strays.append(rejected(mask.full, reason))
    return Listing(items, strays)


def pair_busi(pictures: list[FileName]) -> Pairs:
    """Pair the images in class folders with their masks."""
    return pair_beside([p for p in pictures if class_of(p.folder) in CLASSES], MASK_NAME)


def class_of(folder: str) -> str:
    """Return the class that a folder is named for, in lower case."""
    return folder.rpartition("/")[2].lower()
