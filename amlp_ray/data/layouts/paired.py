"""Read images with masks in a folder of their own, or beside their images.

    images/ISIC_01.jpg   masks/ISIC_01_segmentation.png          scan_7.png   scan_7_mask.png

A mask is named like its image, or like it with one of `MASK_ENDINGS`, and a number if an image has
several. The folders are named by one of `IMAGE_FOLDERS` and `MASK_FOLDERS`. They may lie deeper
(`train/images`), and may have folders inside, alike in both. Images without a mask are unlabeled.
An id is a file's path without the name of that folder and without suffix: `ISIC_01`,
`train/ISIC_01`.

Two public sets are presets of this layout, with masks beside their images.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NamedTuple

from amlp_ray.config import PrepareConfig
from amlp_ray.data.layouts.item import Listing, rejected
from amlp_ray.data.layouts.listing import FileName, list_pictures, normalize, picture_item
from amlp_ray.data.layouts.mask_folders import (
    FLAGS,
    MASK_ENDINGS,
    MASK_NAME,
    MaskMatcher,
    choose_mask_folder,
    home_of,
)
from amlp_ray.data.path import DataPath

BUSI_MASK = re.compile(r"(?P<id>.+)_mask(_\d+)?", FLAGS)
BUSI_CLASSES = ("benign", "malignant", "normal")
# Of The Cancer Genome Atlas: project, site where the tissue was taken, patient.
TCGA_SITE = re.compile(r"TCGA_(?P<site>[A-Z0-9]{2})_", FLAGS)
LGG_MASK = re.compile(r"(?P<id>.*)_mask", FLAGS)
LGG_SUFFIXES = (".tif", ".tiff")


class Pair(NamedTuple):
    """An image and its masks; none means unlabeled."""

    name: str  # which the masks refer to
    image: FileName
    masks: list[FileName]


class Pairs(NamedTuple):
    """Images with their masks, and masks without an image."""

    images: list[Pair]
    strays: list[FileName]

    def all_masks(self) -> list[FileName]:
        """Return the masks of all images, in the order of these."""
        return [mask for pair in self.images for mask in pair.masks]


def find_paired(root: DataPath, config: PrepareConfig) -> Listing:
    """List the images of a paired folder. A mask without an image is rejected.

    Raises:
        DataError: several folders hold masks of the same images, and `mask_folder` chooses none.
    """
    pictures = list_pictures(root)
    folder = choose_mask_folder(root, pictures, config.mask_folder or "")
    pairs, _ = pair_by_name(pictures, folder.name)
    items = [picture_item(root, image, masks, id=name) for name, image, masks in pairs.images]
    reason = (
        "is a mask without an image; it must be named like an image, or like one with "
        f"{', '.join(MASK_ENDINGS)} added, so add the image, rename the mask or remove it"
    )
    rejects = [rejected(mask.full, reason) for mask in pairs.strays]
    return Listing(items, rejects, folder.remark, stray_masks=tuple(rejects))


def find_busi(root: DataPath, config: PrepareConfig) -> Listing:
    """List BUSI, the public breast ultrasound set. A mask without an image is rejected.

        benign/benign (1).png   benign/benign (1)_mask.png   benign/benign (1)_mask_1.png
        malignant/...   normal/...

    An id is a file name without suffix, such as `benign (1)`. The class is the stratum. The class
    folders may lie deeper, as they do in the archive one downloads.
    """
    pairs = pair_busi(list_pictures(root))
    items = []
    for _, image, masks in pairs.images:
        stratum = busi_class(image.folder)
        items.append(picture_item(root, image, masks, id=image.stem, stratum=stratum))
    rejects = []
    for mask in pairs.strays:
        image_name = normalize(BUSI_MASK.sub(r"\g<id>", mask.stem))
        reason = (
            f"is a mask without an image; an image named {image_name!r} must stand beside it, "
            "so add the image or remove the mask"
        )
        rejects.append(rejected(mask.full, reason))
    return Listing(items, rejects, stray_masks=tuple(rejects))


def find_lgg(root: DataPath, config: PrepareConfig) -> Listing:
    """List LGG, a set of brain MRI (TCGA). A mask without a slice is rejected.

        TCGA_CS_4941_19960909/TCGA_CS_4941_19960909_1.tif
        TCGA_CS_4941_19960909/TCGA_CS_4941_19960909_1_mask.tif

    An id is a file name without suffix. If it does not begin with the name of its folder, that is
    put before it. The patient's folder is the group: no split cuts it. The site is the second part
    of TCGA's barcode.
    """
    pairs = pair_lgg(list_pictures(root))
    items = []
    for name, image, masks in pairs.images:
        patient = image.folder.rpartition("/")[2]
        id = image.stem if image.stem.startswith(patient) else name
        barcode = TCGA_SITE.match(patient)
        site = barcode["site"] if barcode else ""
        items.append(picture_item(root, image, masks, id=id, group=image.folder, site=site))
    reason = (
        "is a mask without an image; its name without _mask must stand beside it, "
        "so add it or remove the mask"
    )
    rejects = [rejected(mask.full, reason) for mask in pairs.strays]
    return Listing(items, rejects, stray_masks=tuple(rejects))


def pair_busi(pictures: list[FileName]) -> Pairs:
    """Pair the images in class folders with their masks."""
    return pair_beside([p for p in pictures if busi_class(p.folder) in BUSI_CLASSES], BUSI_MASK)


def busi_class(folder: str) -> str:
    """Return the class that a folder is named for, in lower case."""
    return folder.rpartition("/")[2].lower()


def pair_lgg(pictures: list[FileName]) -> Pairs:
    """Pair the TIFF slices with their masks."""
    return pair_beside([p for p in pictures if p.suffix in LGG_SUFFIXES], LGG_MASK)


def pair_by_name(pictures: list[FileName], mask_folder: str = "") -> tuple[Pairs, bool]:
    """Pair images with masks by the names of folders and files.

    Args:
        pictures: images and masks.
        mask_folder: the only name of folders of masks, in lower case; empty: any usual one.

    Returns:
        The pairs, and whether the masks stand in a folder of their own.
    """
    by_kind: dict[str, list[FileName]] = {"image": [], "mask": [], "unused": [], "": []}
    for picture in pictures:
        kind, _ = home_of(picture.folder, mask_folder)
        by_kind[kind].append(picture)
    # Where a folder is named for images, pictures elsewhere are something else, such as an
    # overview.
    candidates = by_kind["image"] or by_kind[""]

    def name_of(picture: FileName) -> str:
        _, folder = home_of(picture.folder, mask_folder)
        return picture._replace(folder=folder).without_suffix

    if not by_kind["mask"]:
        return pair_beside(candidates, MASK_NAME, name_of), False
    images = [(name_of(picture), picture) for picture in candidates]
    mask_names = [name_of(mask) for mask in by_kind["mask"]]
    matcher = MaskMatcher([name for name, _ in images], mask_names if mask_folder else None)
    masks = []
    for name, mask in zip(mask_names, by_kind["mask"], strict=True):
        masks.append((matcher.match(name) or normalize(name), mask))
    return _assign(images, masks), True


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
    masks = []  # each with the name of its image
    for picture in pictures:
        match = mask_name.fullmatch(picture.stem)
        if match is None:
            images.append((name_of(picture), picture))
        else:
            masks.append((normalize(name_of(picture._replace(stem=match["id"]))), picture))
    return _assign(images, masks)


def _assign(images: list[tuple[str, FileName]], masks: list[tuple[str, FileName]]) -> Pairs:
    """Give each mask to the images that it names, which are several if only suffixes differ."""
    masks_by_name: dict[str, list[FileName]] = {normalize(name): [] for name, _ in images}
    strays: list[FileName] = []
    for name, mask in masks:
        masks_by_name.get(name, strays).append(mask)
    pairs = [Pair(name, image, masks_by_name[normalize(name)]) for name, image in images]
    return Pairs(pairs, strays)
