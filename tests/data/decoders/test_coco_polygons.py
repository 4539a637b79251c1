"""Outlines whose numbers no picture has."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from amlp_ray.data.decoders.coco_polygons import draw_outlines
from amlp_ray.errors import DataError

TRIANGLE = [1, 1, 10, 1, 10, 10]


def draw(segmentation: Any) -> int:
    """Return the lesion pixels of an outline on a picture of 32 x 32 pixels."""
    outlines = {"height": 32, "width": 32, "segmentations": [segmentation]}
    return int(draw_outlines(json.dumps(outlines), (32, 32), "a.png").sum())


@pytest.mark.parametrize("number", [math.nan, math.inf, 1e308, 10**30, 10**400, -(10**400)])
def test_a_number_outside_of_every_picture_is_one_sentence(number: float) -> None:
    assert draw([TRIANGLE]) > 30
    for segmentation in (
        [[number, *TRIANGLE[1:]]],
        {"counts": [number, 20], "size": [32, 32]},
    ):
        with pytest.raises(DataError, match=r"^a\.png has an outline that .*annotation\.$"):
            draw(segmentation)
