"""Read one COCO file: its images, the lesions of each, and its categories.

Tools write ids and sizes as numbers, as text, or as floats: 1, "1" and 1.0 are one id.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple

from amlp_ray.data.layouts.json_numbers import id_key, whole_number
from amlp_ray.errors import DataError
from amlp_ray.utils.text import counted

MAX_LISTED = 20  # categories that a message names


class CocoImage(NamedTuple):
    """An entry of the list `images`."""

    id: float | str  # as written
    file_name: str
    size: tuple[int | None, int | None]  # height and width
    segmentations: list[Any]  # one per lesion; None if it has only a box


class CocoFile:
    """A COCO file whose images and annotations are matched by id."""

    def __init__(self, name: str, document: dict[str, Any]) -> None:
        """Index a document with the lists `images` and `annotations`."""
        self.name = name
        self.images: list[CocoImage] = []
        self.bad_entries: list[Any] = []  # images without a name or an id
        for entry in document["images"]:
            image = _read_image(entry)
            if image is None:
                self.bad_entries.append(entry)
            else:
                self.images.append(image)
        self.annotations: list[Any] = document["annotations"]
        self.categories = _read_categories(document)
        self.shared_ids = self._find_shared_ids()

    def _find_shared_ids(self) -> set[float | str]:
        """Return the ids that several pictures have, so that annotations fit any of them."""
        names: dict[float | str, set[str]] = defaultdict(set)
        for image in self.images:
            names[image.id].add(image.file_name)
        return {id for id, file_names in names.items() if len(file_names) > 1}

    def add_lesions(self, lesion_labels: Sequence[int]) -> list[str]:
        """Give each image the outlines of its lesions; all categories are lesion if none is named.

        Returns:
            What is wrong with annotations, each as a sentence without the name of the file.

        Raises:
            DataError: not one of the annotations can be used.
        """
        lesion_categories = {str(label) for label in lesion_labels}
        by_id, by_key = self._index_images()
        num_strays = 0
        num_unsorted = 0
        for annotation in self.annotations:
            image_id = annotation.get("image_id") if isinstance(annotation, dict) else None
            image = _find(image_id, by_id, by_key)
            if image is None:
                num_strays += 1
                continue
            category = id_key(annotation.get("category_id"))
            if lesion_categories and category not in self.categories:
                num_unsorted += 1
            elif not lesion_categories or category in lesion_categories:
                image.segmentations.append(_outline_of(annotation))
        problems = []
        if num_strays:
            problems.append(f"{counted(num_strays, 'annotation')} of images that it does not list")
        if num_unsorted:
            without = counted(num_unsorted, "annotation")
            problems.append(f"{without} without a category_id that it lists")
        if problems and num_strays + num_unsorted == len(self.annotations):
            raise DataError(
                f"{self.name} has {' and '.join(problems)}, and no others, so that every picture "
                f"would count as one without lesion; the image_id of each annotation must be the "
                f"id of an image, and its category_id that of a category: correct them."
            )
        return [f"has {problem}: left out" for problem in problems]

    def _index_images(self) -> tuple[dict[Any, CocoImage], dict[str, CocoImage | None]]:
        """Return the images by id as written, and by `id_key`; None where that fits several."""
        by_id: dict[Any, CocoImage] = {}
        by_key: dict[str, CocoImage | None] = {}
        for image in self.images:
            first = by_id.setdefault(image.id, image)
            key = id_key(image.id)
            assert key is not None  # else the entry is a bad one
            by_key[key] = first if by_key.get(key, first) is first else None
        return by_id, by_key

    def describe_categories(self) -> str:
        """List the categories, such as `1 (benign), 2 (malignant)`."""
        listed = []
        for key, name in self.categories.items():
            listed.append(f"{key} ({name})" if name else key)
        more = ", ..." if len(listed) > MAX_LISTED else ""
        return ", ".join(listed[:MAX_LISTED]) + more


def check_labels(files: Sequence[CocoFile], lesion_labels: Sequence[int]) -> None:
    """Raise DataError if a wanted label is no category of any file."""
    categories: set[str] = set()
    for file in files:
        categories |= file.categories.keys()
    unknown = [label for label in lesion_labels if str(label) not in categories]
    if not files or not unknown:
        return
    listed = "; ".join(f"{file.name} has {_categories_or_none(file)}" for file in files[:3])
    advice = "give lesion_labels of these"
    if "0" in categories:
        advice += ", or number the categories from 1 if 0 is wanted"
    raise DataError(
        f"lesion_labels {', '.join(map(str, unknown))} is no category of the COCO annotations: "
        f"{listed}; {advice}."
    )


def _categories_or_none(file: CocoFile) -> str:
    return file.describe_categories() or "no categories"


def _read_image(entry: Any) -> CocoImage | None:
    """Return an entry of `images`, without lesions yet; None if it lacks a name or an id."""
    if not isinstance(entry, dict) or id_key(entry.get("id")) is None:
        return None
    name = entry.get("file_name")
    if not isinstance(name, str):
        return None
    size = (whole_number(entry.get("height")), whole_number(entry.get("width")))
    return CocoImage(entry["id"], name, size, [])


def _read_categories(document: dict[str, Any]) -> dict[str, str]:
    """Return the names of the categories by id; those that annotations use if none are listed."""
    listed = document.get("categories")
    categories: dict[str, str] = {}
    for category in listed if isinstance(listed, list) else ():
        key = id_key(category.get("id")) if isinstance(category, dict) else None
        if key is not None:
            categories[key] = str(category.get("name") or "")
    if categories:
        return categories
    counts: Counter[str] = Counter()
    for annotation in document["annotations"]:
        key = id_key(annotation.get("category_id")) if isinstance(annotation, dict) else None
        if key is not None:
            counts[key] += 1
    return dict.fromkeys(sorted(counts), "")


def _find(
    image_id: Any, by_id: dict[Any, CocoImage], by_key: dict[str, CocoImage | None]
) -> CocoImage | None:
    """Return the image of an annotation: by its id as written, else as one number of any type."""
    key = id_key(image_id)
    if key is None:
        return None
    return by_id.get(image_id) or by_key.get(key)


def _outline_of(annotation: dict[str, Any]) -> Any:
    """Return the segmentation of an annotation; None if it has only a box."""
    outline = annotation.get("segmentation") or None
    # One polygon is sometimes written without the list around it.
    if isinstance(outline, list) and isinstance(outline[0], int | float | str):
        return [outline]
    return outline
