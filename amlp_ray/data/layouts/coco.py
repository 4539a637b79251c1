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
from amlp_ray.data.layouts.coco_file import CocoFile, check_labels
from amlp_ray.data.layouts.item import Listing, RejectedFile, SourceImage, rejected, repaired
from amlp_ray.data.layouts.listing import FileName, list_pictures, picture_item, split_name
from amlp_ray.data.path import DataPath
from amlp_ray.utils.json_files import JsonError, parse_json

USUAL_NAME = re.compile(r"(instances|_?annotations)[^/]*\.json", re.IGNORECASE)


class _Drawing(NamedTuple):
    """What the annotation files say of a picture."""

    picture: FileName
    size: tuple[int | None, int | None]  # height and width
    segmentations: list[Any]  # one per lesion; None if it has only a box


def find_coco(root: DataPath, config: PrepareConfig) -> Listing:
    """List the pictures that the annotation files below a folder name.

    Missing pictures are rejected, and so are those that no file names.

    Raises:
        DataError: a wanted label is no category, or none of a file's annotations can be used.
    """
    pictures = list_pictures(root)
    pictures_by_base: dict[str, list[FileName]] = {}
    for picture in pictures:
        pictures_by_base.setdefault(picture.base, []).append(picture)
    rejects: list[RejectedFile] = []
    drawings: dict[str, _Drawing] = {}
    files: list[CocoFile] = []
    for name in annotation_files(root):
        document = _read_document(root, name, rejects)
        if document is not None:
            files.append(CocoFile(name, document))
    check_labels(files, config.lesion_labels)
    for file in files:
        problems = file.add_lesions(config.lesion_labels)
        rejects += [repaired(file.name, problem) for problem in problems]
        for drawing in _read_drawings(file, pictures_by_base, rejects):
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
    summary = "" if config.lesion_labels else _describe_lesions(files)
    return Listing(items, rejects, summary)


def _describe_lesions(files: list[CocoFile]) -> str:
    """Say which categories are taken as lesion without being named; empty if there is one."""
    categories = {category for file in files for category in file.categories}
    if len(categories) < 2:
        return ""
    listed = "; ".join(dict.fromkeys(file.describe_categories() for file in files))
    return f"all categories are taken as lesion, {listed}; choose some with lesion_labels"


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
        document = parse_json((root / file).read_bytes())
    except OSError as error:
        rejects.append(rejected(file, f"cannot be read ({error.strerror or error})"))
        return None
    except JsonError as error:
        rejects.append(rejected(file, f"{error}; export it again"))
        return None
    if isinstance(document, dict):
        images = document.get("images")
        annotations = document.get("annotations")
        if isinstance(images, list) and isinstance(annotations, list):
            return document
    rejects.append(rejected(file, "has no lists images and annotations, as a COCO file has"))
    return None


def _read_drawings(
    file: CocoFile, pictures_by_base: dict[str, list[FileName]], rejects: list[RejectedFile]
) -> Iterator[_Drawing]:
    """Yield what a COCO file says of each picture; what is wrong with it is added to `rejects`."""
    for entry in file.bad_entries:
        reason = f"has an image without file_name or an id (text or number): {str(entry)[:80]}"
        rejects.append(rejected(file.name, reason))
    for image in file.images:
        matches = _match(image.file_name, file.name, pictures_by_base)
        if image.id in file.shared_ids:
            reason = (
                f"has the id {image.id!r} in {file.name}, as another picture has, so that its "
                "annotations cannot be told apart; number them apart"
            )
            rejects.append(rejected(image.file_name, reason))
        elif len(matches) != 1:
            reason = f"is named in {file.name}, but {_why_not_one(matches)}"
            rejects.append(rejected(image.file_name, reason))
        else:
            yield _Drawing(matches[0], image.size, image.segmentations)


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
