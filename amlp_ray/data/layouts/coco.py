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
    segmentations: list[Any]
    is_complete: bool  # every lesion has an outline, and not only a box

    def merge(self, other: _Drawing) -> _Drawing:
        """Add what another file says of the picture, such as one per kind of lesion."""
        return self._replace(
            segmentations=self.segmentations + other.segmentations,
            is_complete=self.is_complete and other.is_complete,
        )


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
        reader = _DocumentReader(file, document, config.lesion_labels, rejects)
        for drawing in reader.drawings(pictures_by_base):
            name = drawing.picture.full
            drawings[name] = drawings[name].merge(drawing) if name in drawings else drawing
    if drawings:
        reason = (
            "is named in no annotation file, so nothing is known of its lesions; "
            "add it there, or use layout flat"
        )
        rejects += [rejected(p.full, reason) for p in pictures if p.full not in drawings]
    for name, drawing in drawings.items():
        if not drawing.is_complete:
            rejects.append(repaired(name, "has a box without an outline: taken as unlabelled"))
    items = [_to_item(root, drawing) for drawing in drawings.values()]
    return Listing(items, rejects)


def _to_item(root: DataPath, drawing: _Drawing) -> SourceImage:
    if not drawing.is_complete:
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
    except ValueError as error:  # damaged JSON, or not UTF-8
        rejects.append(rejected(file, f"is no valid JSON ({error}); export it again"))
        return None
    if isinstance(document, dict):
        images = document.get("images")
        annotations = document.get("annotations")
        if isinstance(images, list) and isinstance(annotations, list):
            return document
    rejects.append(rejected(file, "has no lists images and annotations, as a COCO file has"))
    return None


class _DocumentReader:
    """Reads one COCO file. What is wrong with it is added to `rejects`."""

    def __init__(
        self,
        file: str,
        document: dict[str, Any],
        lesion_labels: tuple[int, ...],
        rejects: list[RejectedFile],
    ) -> None:
        self.file = file
        self.document = document
        self.rejects = rejects
        self._segmentations: dict[Any, list[Any]] = {}  # by image id
        self._ids_with_boxes: set[Any] = set()  # images with a lesion of unknown outline
        for entry in document["images"]:
            if isinstance(entry, dict) and isinstance(entry.get("id"), int | str):
                self._segmentations[entry["id"]] = []
        stray_count = 0
        for annotation in document["annotations"]:
            image_id = annotation.get("image_id") if isinstance(annotation, dict) else None
            if not isinstance(image_id, int | str) or image_id not in self._segmentations:
                stray_count += 1
            elif not lesion_labels or annotation.get("category_id") in lesion_labels:
                self._add(image_id, annotation.get("segmentation"))
        if stray_count:
            reason = f"has {stray_count} annotations of images that it does not list: left out"
            rejects.append(repaired(file, reason))

    def _add(self, image_id: int | str, segmentation: Any) -> None:
        if not segmentation:
            self._ids_with_boxes.add(image_id)
            return
        # One polygon is sometimes written without the list around it.
        is_polygon = isinstance(segmentation, list) and isinstance(segmentation[0], int | float)
        self._segmentations[image_id].append([segmentation] if is_polygon else segmentation)

    def drawings(self, pictures_by_base: dict[str, list[FileName]]) -> Iterator[_Drawing]:
        """Yield what the file says of each picture that it names."""
        for entry in self.document["images"]:
            name = entry.get("file_name") if isinstance(entry, dict) else None
            if not isinstance(name, str) or entry.get("id") not in self._segmentations:
                reason = f"has an image without id or file_name: {str(entry)[:80]}"
                self.rejects.append(rejected(self.file, reason))
                continue
            matches = self._match(name, pictures_by_base)
            if len(matches) != 1:
                reason = f"is named in {self.file}, but {_why_not_one(matches)}"
                self.rejects.append(rejected(name, reason))
                continue
            yield _Drawing(
                picture=matches[0],
                size=(entry.get("height"), entry.get("width")),
                segmentations=self._segmentations[entry["id"]],
                is_complete=entry["id"] not in self._ids_with_boxes,
            )

    def _match(self, file_name: str, pictures_by_base: dict[str, list[FileName]]) -> list[FileName]:
        """Return the pictures that a `file_name` may mean."""
        name = file_name.replace("\\", "/")
        matches = pictures_by_base.get(name.rpartition("/")[2], [])
        # Some tools write the path on the machine where the picture was annotated. Then only its
        # last part says anything. Of other paths one must be the end of the other, since
        # train/1.png is not val/1.png.
        is_absolute = name.startswith("/") or name[1:2] == ":"
        if not is_absolute:
            matches = [picture for picture in matches if _is_end_of_other(picture.full, name)]
        name_beside_file = f"{split_name(self.file).folder}/{name}".lstrip("/")
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
