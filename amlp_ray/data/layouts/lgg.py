"""Read LGG, a set of brain MRI (TCGA): a folder of TIFF slices per patient, masks beside them.

    TCGA_CS_4941_19960909/TCGA_CS_4941_19960909_1.tif
    TCGA_CS_4941_19960909/TCGA_CS_4941_19960909_1_mask.tif

An id is a file name without suffix. If it does not begin with the name of its folder, that is put
before it. The patient's folder is the group: no split cuts it.
"""

from __future__ import annotations

import re

from amlp_ray.config import PrepareConfig
from amlp_ray.data.layouts.item import Listing, rejected
from amlp_ray.data.layouts.listing import FileName, list_pictures, picture_item
from amlp_ray.data.layouts.paired import Pairs, pair_beside
from amlp_ray.data.path import DataPath

SUFFIXES = (".tif", ".tiff")
MASK_NAME = re.compile(r"(?P<id>.*)_mask", re.IGNORECASE | re.DOTALL)


def find_lgg(root: DataPath, config: PrepareConfig) -> Listing:
    """List the slices of an LGG folder. A mask without a slice is rejected."""
    pairs = pair_lgg(list_pictures(root))
    items = []
    for name, image in pairs.images:
        patient = image.folder.rpartition("/")[2]
        items.append(
            picture_item(
                root,
                image,
                pairs.masks_of(name),
                id=image.stem if image.stem.startswith(patient) else name,
                group=image.folder,
            )
        )
    reason = (
        "is a mask without an image; its name without _mask must stand beside it, "
        "so add it or remove the mask"
    )
    return Listing(items, [rejected(mask.full, reason) for mask in pairs.strays])


def pair_lgg(pictures: list[FileName]) -> Pairs:
    """Pair the TIFF slices with their masks."""
    return pair_beside([p for p in pictures if p.suffix in SUFFIXES], MASK_NAME)
