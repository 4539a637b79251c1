"""Pictures with lesions outlined in COCO files.

    annotations/instances_train.json   images/0001.jpg   ...

A picture without annotations is labelled: it has no lesion. `lesion_labels` are category ids. An id is the picture's
path without suffix, relative to the folder.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from amlp_ray.config import PrepareConfig
from amlp_ray.data.layouts.item import Listing, RejectedFile, SourceImage
from amlp_ray.data.layouts.listing import Name, parts_of, pictures_in
from amlp_ray.data.path import DataPath

USUAL_NAME = re.compile(r"(instances|_?annotations)[^/]*\.json", re.IGNORECASE)


class _Drawing(NamedTuple):
    """What the annotation files say of a picture."""

    picture: Name
    size: tuple[int | None, int | None]  # height and width
    segmentations: list[Any]
    complete: bool  # no lesion is known by its box alone


def find_coco(place: DataPath, config: PrepareConfig) -> Listing:
    """List the pictures that the annotation files below a folder name; missing or unnamed pictures are faults."""
    pictures = pictures_in(place)
    by_base: dict[str, list[Name]] = {}
    for picture in pictures:
        by_base.setdefault(picture.full.rpartition("/")[2], []).append(picture)
    faults: list[RejectedFile] = []
    drawings: dict[str, _Drawing] = {}
    for file in annotation_files(place):
        document = _document(place, file, faults)
        for drawing in (
            _drawings(file, document, by_base, config.lesion_labels, faults) if document else ()
        ):
            before = drawings.get(drawing.picture.full, drawing)
            if before is not drawing:  # in several files, such as one per kind of lesion
                complete = before.complete and drawing.complete
                both = before.segmentations + drawing.segmentations
                drawing = _Drawing(drawing.picture, before.size, both, complete)
            drawings[drawing.picture.full] = drawing
    if drawings:
        reason = "is named in no annotation file, so nothing is known of its lesions; add it there, or use layout flat"
        faults += [
            RejectedFile(picture.full, "rejected", reason)
            for picture in pictures
            if picture.full not in drawings
        ]
    reason = "has a box without an outline: taken as unlabelled"
    faults += [
        RejectedFile(name, "repaired", reason)
        for name, drawing in drawings.items()
        if not drawing.complete
    ]
    return Listing([_item(place, drawing) for drawing in drawings.values()], faults)


def _item(place: DataPath, drawing: _Drawing) -> SourceImage:
    height, width = drawing.size
    outlines = {"height": height, "width": width, "segmentations": drawing.segmentations}
    return SourceImage(
        id=drawing.picture.path,
        format="picture",
        images=(str(place / drawing.picture.full),),
        masks=(),
        source=drawing.picture.full,
        outlines=json.dumps(outlines) if drawing.complete else "",
    )


def annotation_files(place: DataPath) -> list[str]:
    """Names that may be COCO files: the usual ones at any depth, else all JSON at the top."""
    names = sorted(entry.name for entry in place.entries() if entry.name.lower().endswith(".json"))
    usual = [name for name in names if USUAL_NAME.fullmatch(name.rpartition("/")[2])]
    return usual or [name for name in names if "/" not in name]


def _document(place: DataPath, file: str, faults: list[RejectedFile]) -> dict[str, Any] | None:
    try:
        document = json.loads((place / file).read_bytes())
    except OSError as error:
        faults.append(RejectedFile(file, "rejected", f"cannot be read ({error.strerror or error})"))
        return None
    except ValueError as error:  # damaged JSON, or not UTF-8
        faults.append(
            RejectedFile(file, "rejected", f"is no valid JSON ({error}); export it again")
        )
        return None
    if isinstance(document, dict) and all(
        isinstance(document.get(key), list) for key in ("images", "annotations")
    ):
        return document
    faults.append(
        RejectedFile(file, "rejected", "has no lists images and annotations, as a COCO file has")
    )
    return None


def _drawings(
    file: str,
    document: dict[str, Any],
    by_base: dict[str, list[Name]],
    wanted: tuple[int, ...],
    faults: list[RejectedFile],
) -> Iterator[_Drawing]:
    """What one COCO file says of each picture; what is wrong with the file is added to `faults`."""
    segmentations: dict[Any, list[Any]] = {}
    boxes = set()  # ids of images with a lesion of unknown outline
    for entry in document["images"]:
        if isinstance(entry, dict) and isinstance(entry.get("id"), int | str):
            segmentations[entry["id"]] = []
    strays = 0
    for annotation in document["annotations"]:
        image_id = annotation.get("image_id") if isinstance(annotation, dict) else None
        if not isinstance(image_id, int | str) or image_id not in segmentations:
            strays += 1
        elif not wanted or annotation.get("category_id") in wanted:
            drawn = annotation.get("segmentation")
            if not drawn:
                boxes.add(image_id)
            else:  # one polygon is sometimes written without the list around it
                plain = isinstance(drawn, list) and isinstance(drawn[0], int | float)
                segmentations[image_id].append([drawn] if plain else drawn)
    if strays:
        faults.append(
            RejectedFile(
                file,
                "repaired",
                f"has {strays} annotations of images that it does not list: left out",
            )
        )
    for entry in document["images"]:
        name = entry.get("file_name") if isinstance(entry, dict) else None
        if not isinstance(name, str) or entry.get("id") not in segmentations:
            faults.append(
                RejectedFile(
                    file, "rejected", f"has an image without id or file_name: {str(entry)[:80]}"
                )
            )
            continue
        picture = _picture_of(name, file, by_base)
        if isinstance(picture, str):
            faults.append(RejectedFile(name, "rejected", f"is named in {file}, but {picture}"))
            continue
        size = (entry.get("height"), entry.get("width"))
        yield _Drawing(picture, size, segmentations[entry["id"]], entry["id"] not in boxes)


def _picture_of(file_name: str, file: str, by_base: dict[str, list[Name]]) -> Name | str:
    """The picture that an annotation file means, or why it cannot be told."""
    name = file_name.replace("\\", "/")
    found = by_base.get(name.rpartition("/")[2], [])
    # Some tools write the path on the machine where the picture was annotated; then only its last part is known. Of
    # other paths one must be the end of the other, for train/1.png is not val/1.png.
    if not name.startswith("/") and name[1:2] != ":":
        found = [
            p
            for p in found
            if f"/{p.full}".endswith(f"/{name}") or f"/{name}".endswith(f"/{p.full}")
        ]
    beside = [
        picture
        for picture in found
        if picture.full == f"{parts_of(file).folder}/{name}".lstrip("/")
    ]
    found = beside or found
    if not found:
        return "there is no such picture below the folder"
    if len(found) > 1:
        return f"there are {len(found)} of this name, such as {found[0].full} and {found[1].full}; rename them apart"
    return found[0]
