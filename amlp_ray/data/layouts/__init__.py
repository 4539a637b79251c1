"""List the images of a folder with their masks, by its layout. Nothing here decodes.

Each layout has a module with a function `find_<layout>`. Presets stand with the layout they vary.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

from amlp_ray.config import PrepareConfig
from amlp_ray.data.layouts.item import Listing, RejectedFile, SourceImage, natural_key, rejected
from amlp_ray.data.layouts.listing import (
    CachedListing,
    describe_contents,
    list_pictures,
    printable,
    such_as,
)
from amlp_ray.data.path import DataPath
from amlp_ray.errors import DataError
from amlp_ray.utils.text import counted

__all__ = ["LAYOUTS", "Listing", "RejectedFile", "SourceImage", "find_items", "natural_key"]

# What a folder must hold for each layout; shown where nothing can be used.
LAYOUTS = {
    "busi": "pictures in folders named benign, malignant, normal, with masks such as "
    "'benign (1)_mask.png' beside them",
    "paired": "pictures in a folder named images and masks of the same names in one named masks, "
    "or masks such as x_mask.png beside x.png",
    "folders": "one folder per image, which holds one picture, alone or in a folder named images, "
    "and a folder named masks with any number of masks",
    "flat": "pictures (.png, .jpg, .tif, .npy, ...) in any folders",
    "lgg": "one folder per patient with slices x.tif and masks x_mask.tif",
    "dicom": "DICOM files",
    "nifti": "NIfTI volumes (.nii, .nii.gz)",
    "decathlon": "a dataset.json with the keys training and labels, and the NIfTI volumes it names",
    "coco": "a COCO file such as instances.json with the keys images and annotations, "
    "and the pictures it names",
}
PRESET_OF = {"busi": "paired", "lgg": "paired"}


def find_items(config: PrepareConfig, source: str | Path | DataPath) -> Listing:
    """List the images below `source` with their masks, sorted naturally by id.

    Of two images with one id the first is kept. The other one, masks without an image and the like
    are listed as rejected.

    Raises:
        DataError: the folder is missing, fits no layout or several, or holds nothing usable.
    """
    root = CachedListing(source)
    if not root.is_folder():
        if root.is_file():
            raise DataError(
                f"{root} is a file, but a folder of images is needed; give the folder that "
                "holds it."
            )
        raise DataError(f"There is no folder {root}; check the path.")
    layout, reason = _choose_layout(root, config)
    # Imported on use: the DICOM reader brings packages that no other layout needs.
    module = import_module(f"amlp_ray.data.layouts.{PRESET_OF.get(layout, layout)}")
    listing: Listing = getattr(module, f"find_{layout}")(root, config)
    items, rejects = _drop_repeated(listing)
    if not items:
        first = f"; the first fault: {rejects[0].file} {rejects[0].reason}" if rejects else ""
        raise DataError(
            f"{root} holds {describe_contents(root)}, but nothing that the {layout} layout can "
            f"use{first}. It needs {LAYOUTS[layout]}; give such a folder or another layout."
        )
    remarks = [reason, listing.summary]
    if items[0].format == "picture" and not config.file_list:
        remarks.append(_describe_leftovers(root, items, listing))
    summary = "; ".join(filter(None, remarks))
    return listing._replace(items=items, rejected=rejects, summary=summary, layout=layout)


def _choose_layout(root: DataPath, config: PrepareConfig) -> tuple[str, str]:
    """Return the layout, and why it was chosen unless the user named it."""
    if config.file_list:
        return "flat", "flat: a file list was given"
    if config.layout != "auto":
        return config.layout, ""
    if config.mask_folder:
        return "paired", "paired: a mask folder was given"
    from amlp_ray.data.layouts.detect import recognize

    return recognize(root)


def _describe_leftovers(root: DataPath, items: list[SourceImage], listing: Listing) -> str:
    """Count the pictures that the layout has no place for; empty if there are none."""
    used_paths: set[str] = set()
    for item in items:
        used_paths.update(item.images, item.masks)
    listed_names = {file.file for file in listing.rejected}
    listed_names.update(item.source for item in listing.items)
    leftovers = []
    for picture in list_pictures(root):
        if picture.full not in listed_names and str(root / picture.full) not in used_paths:
            leftovers.append(picture)
    if not leftovers:
        return ""
    example = such_as(leftovers[0].full)
    count = len(leftovers)
    verbs = "has no place in it and is" if count == 1 else "have no place in it and are"
    return f"{counted(count, 'picture')} {verbs} left out, {example}"


def _drop_repeated(listing: Listing) -> tuple[list[SourceImage], list[RejectedFile]]:
    """Sort items by id, and reject those that repeat an id or whose name no dataset can hold."""
    items: list[SourceImage] = []
    rejects = [file._replace(file=printable(file.file)) for file in listing.rejected]
    for item in sorted(
        listing.items, key=lambda one: (natural_key(one.id), natural_key(one.source))
    ):
        if items and items[-1].id == item.id:
            reason = (
                f"has the id {item.id!r}, as {items[-1].source} has, but ids tell images apart; "
                "rename one"
            )
            rejects.append(rejected(item.source, reason))
        elif printable(item.source) != item.source:
            reason = "has a name that is not UTF-8; rename it"
            rejects.append(rejected(printable(item.source), reason))
        else:
            items.append(item)
    return items, rejects
