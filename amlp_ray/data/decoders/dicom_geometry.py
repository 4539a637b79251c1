"""Read where a DICOM frame lies, from the functional groups of multi-frame objects."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

from pydicom import Dataset

from amlp_ray.data.layouts.dicom_headers import read_floats

to_floats = partial(read_floats, limit=1e9)  # larger numbers are nonsense


class Geometry(NamedTuple):
    """Position, orientation and pixel spacing of a frame; None where the header has none."""

    position: tuple[float, ...] | None  # mm, of the first pixel
    orientation: tuple[float, ...] | None  # direction cosines of a row, then of a column
    spacing: tuple[float, ...] | None  # mm, down and across


def shared_groups(dataset: Dataset) -> Dataset:
    """Return the functional groups that all frames of an object share."""
    sequence = dataset.get("SharedFunctionalGroupsSequence")
    return sequence[0] if sequence else Dataset()


def group_items(frame: Dataset, shared: Dataset, name: str) -> Sequence[Dataset]:
    """Return the items of a functional group: the frame's, or those it shares with all."""
    return frame.get(name) or shared.get(name) or ()


def first_item(frame: Dataset, shared: Dataset, name: str) -> Dataset | None:
    """Return the first item of a functional group; None if there is none."""
    return next(iter(group_items(frame, shared, name)), None)


def frame_geometry(frame: Dataset, shared: Dataset) -> Geometry:
    """Return where one frame of several lies, by its functional groups."""
    plane = first_item(frame, shared, "PlanePositionSequence") or Dataset()
    direction = first_item(frame, shared, "PlaneOrientationSequence") or Dataset()
    pixels = first_item(frame, shared, "PixelMeasuresSequence") or Dataset()
    return Geometry(
        position=to_floats(plane.get("ImagePositionPatient"), 3),
        orientation=to_floats(direction.get("ImageOrientationPatient"), 6),
        spacing=to_floats(pixels.get("PixelSpacing"), 2),
    )
