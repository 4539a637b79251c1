"""One reader per folder layout. Each lists which images there are and which masks belong to them; none decodes."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pathlib import Path

from amlp_ray.config import PrepareConfig
from amlp_ray.data.layouts.item import Listing, RejectedFile, SourceImage, natural_key
from amlp_ray.data.layouts.listing import CachedListing, contents_of, pictures_in, printable
from amlp_ray.data.path import DataPath
from amlp_ray.errors import DataError

__all__ = ["LAYOUTS", "Fault", "Item", "Listing", "find_items", "natural_key"]


def _reader(name: str) -> Callable[[DataPath, PrepareConfig], Listing]:
    def find(place: DataPath, config: PrepareConfig) -> Listing:
        # Imported on use: the DICOM reader brings packages that no other needs.
        module = import_module(f"amlp_ray.data.layouts.{name}")
        listing: Listing = getattr(module, f"find_{name}")(place, config)
        return listing

    return find


# What a folder must hold for each layout; told where nothing was found.
LAYOUTS = {
    "busi": "pictures in folders named benign, malignant, normal, with masks such as 'benign (1)_mask.png' beside them",
    "paired": "pictures in a folder named images and masks of the same names in one named masks, or masks such as "
    "x_mask.png beside x.png",
    "flat": "pictures (.png, .jpg, .tif, .npy, ...) in any folders",
    "lgg": "one folder per patient with slices x.tif and masks x_mask.tif",
    "dicom": "DICOM files",
    "nifti": "NIfTI volumes (.nii, .nii.gz)",
    "decathlon": "a dataset.json with the keys training and labels, and the NIfTI volumes it names",
    "coco": "a COCO file such as instances.json with the keys images and annotations, and the pictures it names",
}


def find_items(config: PrepareConfig, source: str | Path | DataPath) -> Listing:
    """List the images below `source` with their masks, sorted naturally by id.

    Of two images with one id the first is kept. It, masks without an image and the like are told as faults.

    Raises:
        DataError: the folder is missing, fits no layout or several, or nothing in it can be used.
    """
    place = CachedListing(source)
    if not place.is_folder():
        if place.is_file():
            raise DataError(
                f"{place} is a file, but a folder of images is needed; give the folder that holds it."
            )
        raise DataError(f"There is no folder {place}; check the path.")
    layout, why = (
        ("flat", "flat: a file list was given") if config.file_list else (config.layout, "")
    )
    if layout == "auto":
        from amlp_ray.data.layouts.detect import recognize

        layout, why = recognize(place)
    found = _reader(layout)(place, config)
    items, faults = _unique(found.items, found.faults)
    if not items:
        first = f"; the first fault: {faults[0].file} {faults[0].reason}" if faults else ""
        raise DataError(
            f"{place} holds {contents_of(place)}, but nothing that the {layout} layout can use{first}. It needs "
            f"{LAYOUTS[layout]}; give such a folder or another layout."
        )
    passed = (
        _passed_over(place, items, found)
        if items[0].format == "picture" and not config.file_list
        else ""
    )
    return Listing(items, faults, "; ".join(filter(None, (why, found.why, passed))), layout)


def _passed_over(place: DataPath, items: list[SourceImage], found: Listing) -> str:
    """What is told of pictures that the layout has no place for; nothing if there are none."""
    taken = {path for item in items for path in (*item.images, *item.masks)}
    told = {fault.file for fault in found.faults} | {item.source for item in found.items}
    rest = [
        n.full
        for n in pictures_in(place)
        if n.full not in told and str(place / n.full) not in taken
    ]
    return (
        f"{len(rest)} pictures have no place in it and are left out, such as {printable(rest[0])!r}"
        if rest
        else ""
    )


def _unique(
    found: list[SourceImage], faults: list[RejectedFile]
) -> tuple[list[SourceImage], list[RejectedFile]]:
    """Sort items by id and turn those that repeat one, or whose name no dataset can hold, into faults."""
    items: list[SourceImage] = []
    faults = [fault._replace(file=printable(fault.file)) for fault in faults]
    for item in sorted(found, key=lambda item: (natural_key(item.id), natural_key(item.source))):
        if items and items[-1].id == item.id:
            reason = f"has the id {item.id!r}, as {items[-1].source} has, but ids tell images apart; rename one"
            faults.append(RejectedFile(item.source, "rejected", reason))
        elif printable(item.source) != item.source:
            reason = "has a name that is not UTF-8; rename it"
            faults.append(RejectedFile(printable(item.source), "rejected", reason))
        else:
            items.append(item)
    return items, faults
