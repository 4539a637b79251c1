"""The most common layout of segmentation sets: a folder of images and a folder of masks.

    images/ISIC_01.jpg   masks/ISIC_01_segmentation.png

A mask is named like its image, or like it with one of `MASK_ENDINGS`. Images without a mask are unlabelled.
"""

from __future__ import annotations

from pathlib import Path

from amlp_ray.data.sources.item import IMAGE_SUFFIXES, Item, found_in, image_files
from amlp_ray.errors import DataError

MASK_ENDINGS = ("_segmentation", "_mask", "_seg")


def find_paired(folder: Path) -> list[Item]:
    """List the images of a paired folder. Raises DataError where there is none, or a mask has no image."""
    image_folder, mask_folder = folder / "images", folder / "masks"
    images = image_files(image_folder) if image_folder.is_dir() else []
    if not images:
        where = image_folder if image_folder.is_dir() else folder
        raise DataError(
            f"{where} holds {found_in(where)}, but the paired layout needs images ({', '.join(IMAGE_SUFFIXES)}) in "
            f"a folder named images, with masks in masks; give the folder that contains these."
        )
    masks: dict[str, list[str]] = {path.stem: [] for path in images}
    for mask in image_files(mask_folder) if mask_folder.is_dir() else []:
        name = _image_name(mask.stem, masks)
        if name is None:
            raise DataError(
                f"{mask} is a mask without an image; it must be named like a file in {image_folder}, or like it with "
                f"{', '.join(MASK_ENDINGS)} added, so add the image, rename the mask or remove it."
            )
        masks[name].append(str(mask.absolute()))
    return [
        Item(id=path.stem, image=str(path.absolute()), masks=tuple(masks[path.stem]), source=f"images/{path.name}")
        for path in images
    ]


def _image_name(mask_name: str, known: dict[str, list[str]]) -> str | None:
    if mask_name in known:
        return mask_name
    names = (mask_name.removesuffix(ending) for ending in MASK_ENDINGS if mask_name.endswith(ending))
    return next((name for name in names if name in known), None)
