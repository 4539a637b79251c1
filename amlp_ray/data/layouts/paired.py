"""Read images with masks in a folder of their own, or beside their images.

    images/ISIC_01.jpg   masks/ISIC_01_segmentation.png          scan_7.png   scan_7_mask.png

A mask is named like its image, or like it with one of `MASK_ENDINGS`, and a number if an image has
several. The folders are named by one of `IMAGE_FOLDERS` and `MASK_FOLDERS`. They may lie deeper
(`train/images`), and may have folders inside, alike in both. Images without a mask are unlabeled.
An id is a file's path without the name of that folder and without suffix: `ISIC_01`,
`train/ISIC_01`.

The layouts `busi` and `lgg` are presets: other names of folders and masks, and known classes or
patients.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

from amlp_ray.config import PrepareConfig
from amlp_ray.data.layouts.item import Listing, rejected
from amlp_ray.data.layouts.listing import FileName, list_pictures, normalize, picture_item
from amlp_ray.data.path import DataPath

IMAGE_FOLDERS = ("images", "image", "imgs", "img")  # in any case
MASK_FOLDERS = (
    "masks",
    "mask",
    "labels",
    "label",
    "annotations",
    "annotation",
    "groundtruth",
    "ground_truth",
    "gt",
    "segmentations",
    "segmentation",
)
MASK_ENDINGS = ("_mask", "_segmentation", "_seg", "_labels", "_label", "_gt")
# DOTALL, since names may hold newlines.
MASK_NAME = re.compile(rf"(?P<id>.+)({'|'.join(MASK_ENDINGS)})(_\d+)?", re.IGNORECASE | re.DOTALL)


class Pairs(NamedTuple):
    """Images and the masks that belong to them."""

    images: list[tuple[str, FileName]]  # name of each image, which its masks refer to
    masks: dict[str, list[FileName]]  # by the normalized name of their image
    strays: list[FileName]  # masks without an image

    def masks_of(self, image_name: str) -> list[FileName]:
        """Return the masks of an image; none means unlabeled."""
        return self.masks.get(normalize(image_name), [])

    def all_masks(self) -> list[FileName]:
        """Return the masks of all images, in the order of these."""
        return [mask for name, _ in self.images for mask in self.masks_of(name)]


def find_paired(root: DataPath, config: PrepareConfig) -> Listing:
    """List the images of a paired folder. A mask without an image is rejected."""
    pairs, _ = pair_by_name(list_pictures(root))
    items = []
    for name, image in pairs.images:
        items.append(picture_item(root, image, pairs.masks_of(name), id=name))
    reason = (
        "is a mask without an image; it must be named like an image, or like one with "
        f"{', '.join(MASK_ENDINGS)} added, so add the image, rename the mask or remove it"
    )
    return Listing(items, [rejected(mask.full, reason) for mask in pairs.strays])


def pair_beside(
    pictures: list[FileName],
    mask_name: re.Pattern[str],
    name_of: Callable[[FileName], str] = lambda picture: picture.without_suffix,
) -> Pairs:
    """Pair images with masks beside them.

    Args:
        pictures: images and masks.
        mask_name: matches the stem of a mask; its group `id` is the stem of the image.
        name_of: names a picture; the mask of an image gets the name of that image.
    """
    images = []
    masks: list[tuple[str, FileName]] = []  # each with the name of its image
    for picture in pictures:
        match = mask_name.fullmatch(picture.stem)
        if match is None:
            images.append((name_of(picture), picture))
        else:
            masks.append((normalize(name_of(picture._replace(stem=match["id"]))), picture))
    return _assign(images, masks)


def pair_by_name(pictures: list[FileName]) -> tuple[Pairs, bool]:
    """Pair images with masks by the names of folders and files.

    Returns:
        The pairs, and whether the masks stand in a folder of their own.
    """
    by_kind: dict[str, list[FileName]] = {"image": [], "mask": [], "": []}
    for picture in pictures:
        kind, _ = _home_of(picture.folder)
        by_kind[kind].append(picture)
    # Where a folder is named for images, pictures elsewhere are something else, such as an
    # overview.
    candidates = by_kind["image"] or by_kind[""]

    def name_of(picture: FileName) -> str:
        _, folder = _home_of(picture.folder)
        return f"{folder}/{picture.stem}" if folder else picture.stem

    if not by_kind["mask"]:
        return pair_beside(candidates, MASK_NAME, name_of), False
    images = [(name_of(picture), picture) for picture in candidates]
    image_names = _normalized_names(images)
    masks = []
    for mask in by_kind["mask"]:
        name = normalize(name_of(mask))
        match = MASK_NAME.fullmatch(mask.stem)
        if name not in image_names and match:
            name = normalize(name_of(mask._replace(stem=match["id"])))
        masks.append((name, mask))
    return _assign(images, masks), True


def _assign(images: list[tuple[str, FileName]], masks: list[tuple[str, FileName]]) -> Pairs:
    """Give each mask to the image that it names."""
    image_names = _normalized_names(images)
    masks_by_image: dict[str, list[FileName]] = {}
    strays = []
    for name, mask in masks:
        if name in image_names:
            masks_by_image.setdefault(name, []).append(mask)
        else:
            strays.append(mask)
    return Pairs(images, masks_by_image, strays)


def _normalized_names(images: list[tuple[str, FileName]]) -> set[str]:
    return {normalize(name) for name, _ in images}


@lru_cache(maxsize=1024)
def _home_of(folder: str) -> tuple[str, str]:
    """Return whether a folder is named for images, masks or neither, and its path without that."""
    parts = folder.split("/")
    for i, part in enumerate(parts):
        rest = "/".join(parts[:i] + parts[i + 1 :])
        if part.lower() in IMAGE_FOLDERS:
            return "image", rest
        if part.lower() in MASK_FOLDERS:
            return "mask", rest
    return "", folder
