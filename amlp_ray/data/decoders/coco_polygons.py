"""Lesions drawn in an annotation file (COCO polygons and run lengths) -> a mask."""

from __future__ import annotations

import json
import math
import warnings
from typing import Any

import numpy as np

from amlp_ray.errors import DataError

FAR = 1.0  # how far an outline may reach outside its picture, in sides of it; annotators overshoot


def draw_outlines(outlines: str, shape: tuple[int, int], path: str) -> np.ndarray:
    """Rasterise the outlines of an `Item` as pycocotools does: (H, W) uint8 of 0 and 1; none is no lesion.

    Args:
        outlines: JSON {"height", "width", "segmentations": [COCO]}; height and width may be null.
        shape: of the picture, (H, W).
        path: the picture, for error messages.

    Raises:
        DataError: the outlines were drawn on a picture of another size, or are no valid polygons or run lengths.
    """
    from pycocotools import mask as coco

    height, width = shape
    drawn = json.loads(outlines)
    expected = (drawn.get("height") or height, drawn.get("width") or width)
    if expected != shape:
        raise DataError(
            f"{path} has {width}x{height} pixels, but its outlines were drawn on {expected[1]}x{expected[0]}; both "
            f"must have the same size, so use the picture that was annotated."
        )
    mask = np.zeros(shape, np.uint8)
    for segmentation in drawn["segmentations"]:
        fault = _fault_of(segmentation, height, width)
        if fault:
            raise DataError(
                f"{path} has an outline that {fault}; correct or remove its annotation."
            )
        if isinstance(segmentation, dict):
            runs = segmentation
            if isinstance(runs["counts"], list):
                runs = coco.frPyObjects(runs, height, width)
        else:
            runs = coco.merge(coco.frPyObjects(segmentation, height, width))
        try:
            with warnings.catch_warnings():  # pycocotools was not told of numpy 2
                warnings.simplefilter("ignore")
                mask |= coco.decode(runs)
        except ValueError:
            raise DataError(
                f"{path} has an outline whose run lengths are damaged; correct or remove its annotation."
            ) from None
    return mask


def _fault_of(segmentation: Any, height: int, width: int) -> str | None:
    """What is wrong with a segmentation; pycocotools is C code that trusts its input."""
    if isinstance(segmentation, dict):
        counts, size = segmentation.get("counts"), segmentation.get("size")
        if size != [height, width]:
            return f"has run lengths for the size {size}, but [{height}, {width}] is needed"
        if isinstance(counts, str):
            return None if counts.isascii() else "has damaged run lengths"
        if not isinstance(counts, list) or not all(isinstance(n, int) and n >= 0 for n in counts):
            return "has run lengths that are no whole numbers"
        covered, needed = sum(counts), height * width
        return None if covered == needed else f"has run lengths for {covered} of {needed} pixels"
    if not isinstance(segmentation, list) or not segmentation:
        return "is neither a list of polygons nor run lengths"
    for polygon in segmentation:
        if not isinstance(polygon, list) or len(polygon) < 6 or len(polygon) % 2:
            return "is no polygon of at least three points"
        if not all(isinstance(n, int | float) and math.isfinite(n) for n in polygon):
            return "has coordinates that are no numbers"
        for values, side in ((polygon[::2], width), (polygon[1::2], height)):
            if min(values) < -FAR * side or max(values) > (1 + FAR) * side:
                return f"reaches to {max(map(abs, values)):g}, far outside the picture of {width}x{height} pixels"
    return None
