"""COCO files whose ids, categories and sizes are numbers of other types, or fit nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from amlp_ray.config import PrepareConfig
from amlp_ray.data.decoders import read_frames
from amlp_ray.data.layouts import Listing, find_items
from amlp_ray.errors import DataError

SQUARE = [[4, 4, 14, 4, 14, 14, 4, 14]]  # 10 x 10 pixels
LESION = {"id": 1, "name": "lesion"}
ORGAN = {"id": 2, "name": "organ"}


def write_set(
    folder: Path,
    images: list[dict[str, Any]],
    annotations: list[dict[str, Any]],
    categories: list[dict[str, Any]] | None = None,
    encoding: str = "utf-8",
) -> Path:
    """Write a COCO file and the pictures that it names, of 32x32 pixels."""
    folder.mkdir(exist_ok=True)
    for image in images:
        Image.new("L", (32, 32)).save(folder / image["file_name"])
    document: dict[str, Any] = {"images": images, "annotations": annotations}
    if categories is not None:
        document["categories"] = categories
    (folder / "instances.json").write_bytes(json.dumps(document, indent=1).encode(encoding))
    return folder


def image(id: Any, name: str = "a.png", size: Any = 32) -> dict[str, Any]:
    return {"id": id, "file_name": name, "height": size, "width": size}


def annotation(image_id: Any, category: Any = 1, outline: Any = SQUARE) -> dict[str, Any]:
    return {"image_id": image_id, "category_id": category, "segmentation": outline}


def lesion_pixels(listing: Listing) -> dict[str, int]:
    counts = {}
    for item in listing.items:
        mask = next(iter(read_frames(item, PrepareConfig()))).mask
        assert mask is not None
        counts[item.id] = int(np.count_nonzero(mask))
    return counts


RUNS = {"size": [32, 32], "counts": [100, 100, 824]}


@pytest.mark.parametrize(
    ("image_id", "annotation_id"),
    [(3, "3"), ("3", 3), (3.0, 3), (3, "3.0"), ("003", 3), ("3", "3"), ("a b", " a b ")],
)
def test_ids_of_images_match_as_numbers_text_or_floats(
    image_id: Any, annotation_id: Any, tmp_path: Path
) -> None:
    folder = write_set(tmp_path, [image(image_id)], [annotation(annotation_id)])
    assert lesion_pixels(find_items(PrepareConfig(), folder)) == {"a": 100}


@pytest.mark.parametrize(
    ("listed", "category"), [(1, "1"), ("1", 1), ("1", "1"), (1.0, 1), (1, "1.0"), (1, "01")]
)
def test_categories_match_as_numbers_text_or_floats(
    listed: Any, category: Any, tmp_path: Path
) -> None:
    annotations = [annotation(0, category), annotation(0, 2, [[20, 20, 30, 20, 30, 30]])]
    folder = write_set(tmp_path, [image(0)], annotations, [LESION | {"id": listed}, ORGAN])
    listing = find_items(PrepareConfig(lesion_labels=(1,)), folder)
    assert lesion_pixels(listing) == {"a": 100}
    assert listing.rejected == []


@pytest.mark.parametrize(
    ("size", "outline"),
    [
        ("32", SQUARE),
        (32.0, SQUARE),
        (None, SQUARE),
        (32, SQUARE[0]),
        (32, [str(number) for number in SQUARE[0]]),
        (32, [[f"{number}.0" for number in SQUARE[0]]]),
        (32, RUNS),
        (32, {"size": ["32", 32.0], "counts": ["100", 100.0, 824]}),
    ],
)
def test_sizes_and_outlines_may_be_text_or_floats(size: Any, outline: Any, tmp_path: Path) -> None:
    folder = write_set(tmp_path, [image(0, size=size)], [annotation(0, 1, outline)])
    assert lesion_pixels(find_items(PrepareConfig(), folder)) == {"a": 100}


def test_ids_that_differ_as_written_stay_apart(tmp_path: Path) -> None:
    images = [image("1"), image(1, "b.png"), image("01", "c.png")]
    folder = write_set(tmp_path, images, [annotation("1"), annotation("1"), annotation("01")])
    listing = find_items(PrepareConfig(), folder)
    assert lesion_pixels(listing) == {"a": 100, "b": 0, "c": 100}


def test_two_pictures_of_one_id_are_rejected(tmp_path: Path) -> None:
    images = [image(1), image(1, "b.png"), image(2, "c.png")]
    listing = find_items(PrepareConfig(), write_set(tmp_path, images, [annotation(1)]))
    assert lesion_pixels(listing) == {"c": 0}
    assert [file.file for file in listing.rejected if "has the id 1" in file.reason] == [
        "a.png",
        "b.png",
    ]


@pytest.mark.parametrize(
    ("categories", "labels", "known"),
    [
        ([LESION, ORGAN], (3,), r"3 is no category .* has 1 \(lesion\), 2 \(organ\)"),
        ([LESION, ORGAN], (1, 3), r"3 is no category"),
        ([{"id": 0, "name": "benign"}], (1,), r"has 0 \(benign\); .* from 1 if 0 is wanted"),
        ([], (7,), r"7 is no category .* has 1, 2"),
        (None, (7,), r"7 is no category .* has 1, 2"),
    ],
)
def test_a_wanted_label_that_is_no_category_is_an_error(
    categories: Any, labels: tuple[int, ...], known: str, tmp_path: Path
) -> None:
    annotations = [annotation(0, "2"), annotation(0, 1)]
    folder = write_set(tmp_path, [image(0)], annotations, categories)
    with pytest.raises(DataError, match=known):
        find_items(PrepareConfig(lesion_labels=labels), folder)


@pytest.mark.parametrize(
    ("annotations", "labels", "sentence"),
    [
        ([annotation(8), annotation(9)], (), "2 annotations of images that it does not list"),
        ([annotation(0, None)], (1,), "1 annotation without a category_id that it lists"),
    ],
)
def test_annotations_of_which_none_fits_are_an_error(
    annotations: list[dict[str, Any]], labels: tuple[int, ...], sentence: str, tmp_path: Path
) -> None:
    folder = write_set(tmp_path, [image(0)], annotations, [LESION])
    with pytest.raises(DataError, match=rf"instances\.json has {sentence}, and no others"):
        find_items(PrepareConfig(lesion_labels=labels), folder)


def test_categories_that_are_united_are_named(tmp_path: Path) -> None:
    folder = write_set(tmp_path, [image(0)], [annotation(0)], [LESION, ORGAN])
    union = "all categories are taken as lesion, 1 (lesion), 2 (organ)"
    assert union in find_items(PrepareConfig(), folder).summary
    assert union not in find_items(PrepareConfig(lesion_labels=(1,)), folder).summary


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le"])
def test_files_of_windows_are_recognized_and_read(encoding: str, tmp_path: Path) -> None:
    folder = write_set(tmp_path, [image(0)], [annotation(0)], [LESION], encoding)
    listing = find_items(PrepareConfig(), folder)
    assert listing.layout == "coco"
    assert lesion_pixels(listing) == {"a": 100}
