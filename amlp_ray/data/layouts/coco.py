"""Read pictures with lesions outlined in COCO files.

    annotations/instances_train.json   images/0001.jpg   ...

A picture without annotations is labeled: it has no lesion. `lesion_labels` are category ids. An id
is the picture's path without suffix, relative to the folder.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from amlp_ray.config import PrepareConfig
from amlp_ray.data.layouts.item import Listing, RejectedFile, SourceImage, rejected, repaired
from amlp_ray.data.layouts.listing import FileName, list_pictures, picture_item, split_name
from amlp_ray.data.path import DataPath

USUAL_NAME = re.compile(r"(instances|_?annotations)[^/]*\.json", re.IGNORECASE)


class _Drawing(NamedTuple):
    """What the annotation files say of a picture."""

    picture: FileName
    size: tuple[int | None, int | None]  # height and width
    segmentations: list[Any]  # one per lesion; None if it has only a box


def find_coco(root: DataPath, config: PrepareConfig) -> Listing:
    """List the pictures that the annotation files below a folder name.

    Missing pictures are rejected, and so are those that no file names.
    """
    pictures = list_pictures(root)
    pictures_by_base: dict[str, list[FileName]] = {}
    for picture in pictures:
        pictures_by_base.setdefault(picture.base, []).append(picture)
    rejects: list[RejectedFile] = []
    drawings: dict[str, _Drawing] = {}
    for file in annotation_files(root):
        document = _read_document(root, file, rejects)
        if document is None:
            continue
        labels = config.lesion_labels
        for drawing in _read_drawings(file, document, labels, pictures_by_base, rejects):
            # Other files add to the first one, as where there is one per kind of lesion.
            first = drawings.setdefault(drawing.picture.full, drawing)
            if first is not drawing:
                union = first.segmentations + drawing.segmentations
                drawings[drawing.picture.full] = first._replace(segmentations=union)
    if drawings:
        reason = (
            "is named in no annotation file, so nothing is known of its lesions; "
            "add it there, or use layout flat"
        )
        rejects += [rejected(p.full, reason) for p in pictures if p.full not in drawings]
    for name, drawing in drawings.items():
        if None in drawing.segmentations:
            rejects.append(repaired(name, "has a box without an outline: taken as unlabeled"))
    items = [_to_item(root, drawing) for drawing in drawings.values()]
    return Listing(items, rejects)


def _to_item(root: DataPath, drawing: _Drawing) -> SourceImage:
    if None in drawing.segmentations:
        return picture_item(root, drawing.picture)
    height, width = drawing.size
    outlines = {"height": height, "width": width, "segmentations": drawing.segmentations}
    return picture_item(root, drawing.picture, outlines=json.dumps(outlines))


def annotation_files(root: DataPath) -> list[str]:
    """Return possible COCO files: those of usual names at any depth, else all JSON at the top."""
    names = [name for name in root.names() if name.lower().endswith(".json")]
    usual = [name for name in names if USUAL_NAME.fullmatch(name.rpartition("/")[2])]
    return usual or [name for name in names if "/" not in name]


def _read_document(root: DataPath, file: str, rejects: list[RejectedFile]) -> dict[str, Any] | None:
    """Return the content of a COCO file; None if it is none, which is added to `rejects`."""
    try:
        document = json.loads((root / file).read_bytes())
    except OSError as error:
        rejects.append(rejected(file, f"cannot be read ({error.strerror or error})"))
        return None
    except (ValueError, RecursionError) as error:  # damaged JSON, or nested without end
        rejects.append(rejected(file, f"is no valid JSON ({error}); export it again"))
        return None
    if isinstance(document, dict):
        images = document.get("images")
        annotations = document.get("annotations")
        if isinstance(images, list) and isinstance(annotations, list):
            return document
    rejects.append(rejected(file, "has no lists images and annotations, as a COCO file has"))
    return None


def _read_drawings(
    file: str,
    document: dict[str, Any],
    lesion_labels: tuple[int, ...],
    pictures_by_base: dict[str, list[FileName]],
    rejects: list[RejectedFile],
) -> Iterator[_Drawing]:
    """Yield what a COCO file says of each picture; what is wrong with it is added to `rejects`."""
    segmentations = _segmentations_by_image(file, document, lesion_labels, rejects)
    for entry in document["images"]:
        name = entry.get("file_name") if isinstance(entry, dict) else None
        if not isinstance(name, str) or not _is_id(entry.get("id")):
            reason = f"has an image without file_name or an id (text or number): {str(entry)[:80]}"
            rejects.append(rejected(file, reason))
            continue
        matches = _match(name, file, pictures_by_base)
        if len(matches) != 1:
            reason = f"is named in {file}, but {_why_not_one(matches)}"
            rejects.append(rejected(name, reason))
            continue
        size = (entry.get("height"), entry.get("width"))
        yield _Drawing(matches[0], size, segmentations[entry["id"]])


def _segmentations_by_image(
    file: str,
    document: dict[str, Any],
    lesion_labels: tuple[int, ...],
    rejects: list[RejectedFile],
) -> dict[float | str, list[Any]]:
    """Return the lesions of each image id, as in `_Drawing`."""
    segmentations: dict[float | str, list[Any]] = {}
    for entry in document["images"]:
        if isinstance(entry, dict) and _is_id(entry.get("id")):
            segmentations[entry["id"]] = []
    stray_count = 0
    unsorted_count = 0
    for annotation in document["annotations"]:
        image_id = annotation.get("image_id") if isinstance(annotation, dict) else None
        if not _is_id(image_id) or image_id not in segmentations:
            stray_count += 1
        elif lesion_labels and not _is_id(annotation.get("category_id")):
            unsorted_count += 1
        elif not lesion_labels or annotation["category_id"] in lesion_labels:
            outline = annotation.get("segmentation") or None
            # One polygon is sometimes written without the list around it.
            if isinstance(outline, list) and isinstance(outline[0], int | float):
                outline = [outline]
            segmentations[image_id].append(outline)
    if stray_count:
        reason = f"has {stray_count} annotations of images that it does not list: left out"
        rejects.append(repaired(file, reason))
    if unsorted_count:
        reason = (
            f"has {unsorted_count} annotations without a category_id (text or number): left out"
        )
        rejects.append(repaired(file, reason))
    return segmentations


def _is_id(value: Any) -> bool:
    return isinstance(value, int | float | str) and not isinstance(value, bool)


def _match(
    file_name: str, annotation_file: str, pictures_by_base: dict[str, list[FileName]]
) -> list[FileName]:
    """Return the pictures that a `file_name` may mean."""
    name = file_name.replace("\\", "/")
    matches = pictures_by_base.get(name.rpartition("/")[2], [])
    # Some tools write the path on the machine where the picture was annotated. Then only its last
    # part says anything. Of other paths one must be the end of the other, since train/1.png is not
    # val/1.png.
    is_absolute = name.startswith("/") or name[1:2] == ":"
    if not is_absolute:
        matches = [picture for picture in matches if _is_end_of_other(picture.full, name)]
    name_beside_file = f"{split_name(annotation_file).folder}/{name}".lstrip("/")
    beside = [picture for picture in matches if picture.full == name_beside_file]
    return beside or matches


def _is_end_of_other(first: str, second: str) -> bool:
    return f"/{first}".endswith(f"/{second}") or f"/{second}".endswith(f"/{first}")


def _why_not_one(matches: list[FileName]) -> str:
    if not matches:
        return "there is no such picture below the folder"
    return (
        f"there are {len(matches)} of this name, such as {matches[0].full} and "
        f"{matches[1].full}; rename them apart"
    )
