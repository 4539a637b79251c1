"""Draw the lesions of an annotation file (COCO polygons and run lengths) as a mask."""

from __future__ import annotations

import json
import sys
import warnings
from contextlib import suppress
from typing import Any

import numpy as np

from amlp_ray.errors import DataError

# How far an outline may reach outside its picture, in sides of it; annotators overshoot.
MAX_OVERSHOOT = 1.0


def draw_outlines(outlines: str, shape: tuple[int, int], path: str) -> np.ndarray:
    """Rasterize outlines as pycocotools does.

    Args:
        outlines: JSON {"height", "width", "segmentations": [COCO]}; height and width may be null.
            No segmentation means no lesion.
        shape: height and width of the picture.
        path: the picture, for error messages.

    Returns:
        Mask (H, W) uint8 of 0 and 1.

    Raises:
        DataError: the outlines were drawn on a picture of another size, or are no valid polygons
            or run lengths.
    """
    height, width = shape
    drawing = json.loads(outlines)
    drawn_height = drawing.get("height") or height
    drawn_width = drawing.get("width") or width
    if (drawn_height, drawn_width) != shape:
        raise DataError(
            f"{path} has {width}x{height} pixels, but its outlines were drawn on "
            f"{drawn_width}x{drawn_height}; both must have the same size, so use the picture that "
            "was annotated."
        )
    mask = np.zeros(shape, np.uint8)
    for outline in drawing["segmentations"]:
        segmentation = _with_numbers(outline)
        problem = _find_problem(segmentation, height, width)
        if problem:
            raise DataError(
                f"{path} has an outline that {problem}; correct or remove its annotation."
            )
        try:
            mask |= _rasterize(segmentation, height, width)
        except ValueError:
            raise DataError(
                f"{path} has an outline whose run lengths are damaged; "
                "correct or remove its annotation."
            ) from None
    return mask


def _with_numbers(values: Any) -> Any:
    """Return polygons or run lengths with numbers where they were written as text or floats."""
    if isinstance(values, dict):
        size = values.get("size")
        counts = values.get("counts")
        whole = {"size": _with_whole_numbers(size), "counts": _with_whole_numbers(counts)}
        return values | whole
    if isinstance(values, list):
        return [_with_numbers(value) for value in values]
    if isinstance(values, str):
        with suppress(ValueError):
            return float(values)
    return values


def _with_whole_numbers(values: Any) -> Any:
    """Return a list with whole numbers where they were written as text or floats."""
    if not isinstance(values, list):
        return values
    numbers = _with_numbers(values)
    is_whole = all(_is_finite(n) and n == int(n) for n in numbers)
    return [int(n) for n in numbers] if is_whole else values


def _is_finite(value: Any) -> bool:
    """Return whether a value is a number that a float can hold, which JSON's need not be."""
    return isinstance(value, int | float) and abs(value) <= sys.float_info.max


def _rasterize(segmentation: Any, height: int, width: int) -> np.ndarray:
    """Return a mask (H, W) of polygons or run lengths. Raises ValueError if these are damaged."""
    from pycocotools import mask as coco

    runs = segmentation
    if isinstance(segmentation, list):
        runs = coco.merge(coco.frPyObjects(segmentation, height, width))
    elif isinstance(segmentation["counts"], list):
        runs = coco.frPyObjects(segmentation, height, width)
    # pycocotools uses what numpy 2 deprecates.
    with warnings.catch_warnings(action="ignore"):
        return np.asarray(coco.decode(runs))


def _find_problem(segmentation: Any, height: int, width: int) -> str | None:
    """Say what is wrong with a segmentation; pycocotools is C code that trusts its input."""
    if isinstance(segmentation, dict):
        return _find_run_problem(segmentation, height, width)
    if not isinstance(segmentation, list) or not segmentation:
        return "is neither a list of polygons nor run lengths"
    for polygon in segmentation:
        problem = _find_polygon_problem(polygon, height, width)
        if problem:
            return problem
    return None


def _find_run_problem(runs: dict[str, Any], height: int, width: int) -> str | None:
    counts = runs.get("counts")
    size = runs.get("size")
    if size != [height, width]:
        return f"has run lengths for the size {size}, but [{height}, {width}] is needed"
    if isinstance(counts, str):
        return None if counts.isascii() else "has damaged run lengths"
    if not isinstance(counts, list) or not all(isinstance(n, int) and n >= 0 for n in counts):
        return "has run lengths that are no whole numbers"
    if sum(counts) != height * width:
        return f"has run lengths for {sum(counts)} of {height * width} pixels"
    return None


def _find_polygon_problem(polygon: Any, height: int, width: int) -> str | None:
    if not isinstance(polygon, list) or len(polygon) < 6 or len(polygon) % 2:
        return "is no polygon of at least three points"
    if not all(map(_is_finite, polygon)):
        return "has coordinates that are no numbers"
    for values, side in ((polygon[::2], width), (polygon[1::2], height)):
        if min(values) < -MAX_OVERSHOOT * side or max(values) > (1 + MAX_OVERSHOOT) * side:
            farthest = max(map(abs, values))
            return f"reaches to {farthest:g}, far outside the picture of {width}x{height} pixels"
    return None
