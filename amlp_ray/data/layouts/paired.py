"""The most common layouts of segmentation sets: a folder of images and one of masks, or masks beside their images.

    images/ISIC_01.jpg   masks/ISIC_01_segmentation.png          scan_7.png   scan_7_mask.png

A mask is named like its image, or like it with one of `MASK_ENDINGS`, and a number where an image has several. The
folders are named by one of `IMAGE_FOLDERS` and `MASK_FOLDERS`, may lie deeper (`train/images`), and may have folders
inside, alike in both. Images without a mask are unlabelled. An id is a file's path without the name of that folder
and without suffix: `ISIC_01`, `train/ISIC_01`.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from amlp_ray.config import PrepareConfig
from amlp_ray.data.layouts.item import Listing, RejectedFile, SourceImage
from amlp_ray.data.layouts.listing import Name, pictures_in, same
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
MASK_NAME = re.compile(rf"(?P<id>.+)({'|'.join(MASK_ENDINGS)})(_\d+)?", re.IGNORECASE | re.DOTALL)


class Pairs(NamedTuple):
    """Images and the masks that belong to them."""

    images: dict[str, list[Name]]  # by id; several where names differ in their suffix alone
    masks: dict[str, list[Name]]  # by the id of their image, as `same` writes it
    strays: list[Name]  # masks without an image
    by_folders: bool  # masks stand in a folder of their own


def find_paired(place: DataPath, config: PrepareConfig) -> Listing:
    """List the images of a paired folder; a mask without an image is a fault."""
    pairs = pair(pictures_in(place))
    items = [
        SourceImage(
            id=name,
            format="picture",
            images=(str(place / image.full),),
            masks=tuple(str(place / mask.full) for mask in pairs.masks.get(same(name), ())),
            source=image.full,
        )
        for name, images in pairs.images.items()
        for image in images
    ]
    reason = (
        f"is a mask without an image; it must be named like an image, or like one with {', '.join(MASK_ENDINGS)} "
        f"added, so add the image, rename the mask or remove it"
    )
    return Listing(items, [RejectedFile(mask.full, "rejected", reason) for mask in pairs.strays])


def pair(pictures: list[Name]) -> Pairs:
    """Say which pictures are images and which are masks of which."""
    homes = {folder: _home_of(folder) for folder in {picture.folder for picture in pictures}}
    by_kind: dict[str, list[Name]] = {"image": [], "mask": [], "": []}
    for picture in pictures:
        by_kind[homes[picture.folder][0]].append(picture)
    # Where a folder is named for images, pictures elsewhere are something else, such as an overview.
    candidates = by_kind["image"] or by_kind[""]

    def name_of(picture: Name) -> str:
        base = homes[picture.folder][1]
        return f"{base}/{picture.stem}" if base else picture.stem

    known = {same(name_of(picture)) for picture in candidates}
    by_folders = bool(by_kind["mask"])
    images: dict[str, list[Name]] = {}
    masks: dict[str, list[Name]] = {}
    strays: list[Name] = []
    for picture in candidates:
        if by_folders or not MASK_NAME.fullmatch(picture.stem):
            images.setdefault(name_of(picture), []).append(picture)
    for picture in by_kind["mask"] if by_folders else candidates:
        match = MASK_NAME.fullmatch(picture.stem)
        name = same(name_of(picture))
        if by_folders and name in known:
            masks.setdefault(name, []).append(picture)
        elif match:
            name = same(name_of(picture._replace(stem=match["id"])))
            (masks.setdefault(name, []) if name in known else strays).append(picture)
        elif by_folders:
            strays.append(picture)
    return Pairs(images, masks, strays, by_folders)


def _home_of(folder: str) -> tuple[str, str]:
    """Whether a folder holds images, masks or neither by name, and its path without that name."""
    parts = folder.split("/")
    for i, part in enumerate(parts):
        kind = (
            "image"
            if part.lower() in IMAGE_FOLDERS
            else "mask"
            if part.lower() in MASK_FOLDERS
            else ""
        )
        if kind:
            return kind, "/".join(parts[:i] + parts[i + 1 :])
    return "", folder
