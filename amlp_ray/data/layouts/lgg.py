"""The layout of the LGG set of brain MRI (TCGA): one folder of TIFF slices per patient, masks beside them.

    TCGA_CS_4941_19960909/TCGA_CS_4941_19960909_1.tif   TCGA_CS_4941_19960909/TCGA_CS_4941_19960909_1_mask.tif

An id is a file name without suffix, with its folder before it where the name does not begin with that. The patient's
folder is the group: no split cuts it.
"""

from __future__ import annotations

from amlp_ray.config import PrepareConfig
from amlp_ray.data.layouts.item import Listing, RejectedFile, SourceImage
from amlp_ray.data.layouts.listing import Name, pictures_in, same
from amlp_ray.data.path import DataPath

SUFFIXES = (".tif", ".tiff")
ENDING = "_mask"


def find_lgg(place: DataPath, config: PrepareConfig) -> Listing:
    """List the slices of an LGG folder; a mask without a slice is a fault."""
    images, masks = split_lgg(pictures_in(place))
    known = {same(image.path) for image in images}
    reason = f"is a mask without an image; its name without {ENDING} must stand beside it, so add it or remove the mask"
    faults = [
        RejectedFile(mask.full, "rejected", reason)
        for path, mask in masks.items()
        if path not in known
    ]
    items = []
    for image in images:
        mask = masks.get(same(image.path))
        items.append(
            SourceImage(
                id=image.stem
                if image.stem.startswith(image.folder.rpartition("/")[2])
                else image.path,
                format="picture",
                images=(str(place / image.full),),
                masks=(str(place / mask.full),) if mask else (),
                source=image.full,
                group=image.folder,
            )
        )
    return Listing(items, faults)


def split_lgg(pictures: list[Name]) -> tuple[list[Name], dict[str, Name]]:
    """Slices, and masks by the path without suffix of their slice, as `same` writes it."""
    slices = [picture for picture in pictures if picture.suffix in SUFFIXES]
    images = [picture for picture in slices if not picture.stem.lower().endswith(ENDING)]
    masks = {same(p.path)[: -len(ENDING)]: p for p in slices if p.stem.lower().endswith(ENDING)}
    return images, masks
