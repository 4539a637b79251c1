"""Turn DICOM SEG objects into masks: find which of their frames lie on which slice of a series.

highdicom reads and decodes them. Its own look-up by source image is not used: it needs an optional
flag that most writers leave out, and without the flag it takes frames that lie elsewhere.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from typing import Any, NamedTuple

import highdicom
import numpy as np
from pydicom import Dataset

from amlp_ray.data.decoders.dicom_geometry import (
    Geometry,
    first_item,
    frame_geometry,
    group_items,
    shared_groups,
)
from amlp_ray.data.decoders.dicom_segments import Segments, read_segments
from amlp_ray.data.decoders.frame import ReadFile
from amlp_ray.data.decoders.masks import select_lesion
from amlp_ray.errors import DataError, describe_error

# It logs UIDs that are listed twice, which lead back to a patient.
logging.getLogger("highdicom").setLevel(logging.CRITICAL)

# mm between two planes that are one; headers round positions to some hundredths.
POSITION_TOLERANCE = 0.1
# Largest difference of direction cosines, and of spacings in relation to their size.
DIRECTION_TOLERANCE = 0.01

Numbers = Sequence[float] | None


class SourceSlice(NamedTuple):
    """A slice of a series that needs a mask."""

    instance: str  # SOP Instance UID
    frame: int | None  # number from 1, of an object of several
    shape: tuple[int, int]
    geometry: Geometry


class _Source(NamedTuple):
    """An image that a frame of a SEG object was drawn on."""

    instance: str  # SOP Instance UID
    frames: set[int]  # numbers from 1; none means all


class _Plane(NamedTuple):
    """A frame of a SEG object."""

    frame: int  # from 0
    segment: int | None  # None: its values are segment numbers
    sources: list[_Source]
    geometry: Geometry

    def frames_of(self, instance: str) -> set[int]:
        """Return the numbers of the frames of an image that this one was drawn on."""
        numbers: set[int] = set()
        for source in self.sources:
            if source.instance == instance:
                numbers |= source.frames
        return numbers


@dataclass
class _SegmentationObject:
    """A SEG object with its frames sorted by where they belong."""

    path: str
    dataset: Any  # highdicom.seg.Segmentation
    segments: Segments
    lesion_segments: frozenset[int]
    max_value: int  # means certainty in a fractional object, else 1
    by_source: dict[str, list[_Plane]]
    without_source: list[_Plane]  # name no image: found by their position
    placed: set[int] = field(default_factory=set)  # frames that lie on a slice of the series
    # Frames that name a slice of the series and do not lie on it, with whether they name no other.
    beside: dict[int, bool] = field(default_factory=dict)


class SegmentationMasks:
    """The united masks of several SEG objects, slice by slice."""

    def __init__(
        self, paths: Sequence[str], lesion_labels: tuple[int, ...], read: ReadFile
    ) -> None:
        """Read the objects. `lesion_labels` are numbers of segments; none: all but the background.

        Raises:
            DataError: one cannot be read, or is no SEG object that follows the standard.
        """
        self._objects = [_open(path, lesion_labels, read) for path in paths]
        described: set[int] = set()
        notes: dict[str, None] = {}  # without repetitions, in order
        for seg in self._objects:
            described |= seg.segments.described
            if not lesion_labels:
                notes |= dict.fromkeys(seg.segments.notes)
        _, label_notes = select_lesion(np.array(sorted(described)), lesion_labels)
        self.notes = (*notes, *label_notes)

    def mask_on(self, source: SourceSlice) -> np.ndarray:
        """Return the mask of a slice, (H, W) uint8 of 0 and 1; all zero if no frame lies on it.

        Raises:
            DataError: a frame was drawn on this slice and has another size, direction or spacing,
                or may as well belong to another one.
        """
        mask = np.zeros(source.shape, np.uint8)
        for seg in self._objects:
            for plane in _planes_on(seg, source):
                seg.placed.add(plane.frame)
                if plane.segment is None or plane.segment in seg.lesion_segments:
                    mask |= _read_plane(seg, plane)
        return mask

    def finish(self) -> None:
        """Check after the last slice that each object lay somewhere.

        The zero masks of one that lay nowhere would claim that there is no lesion.

        Raises:
            DataError: a frame lies elsewhere than the slice it was drawn on, or no frame of an
                object lies on any slice.
        """
        for seg in self._objects:
            # Slices may share a UID, so a frame is lost only if it lies on none of them.
            if any(is_alone and frame not in seg.placed for frame, is_alone in seg.beside.items()):
                raise _misfit(seg, "starts elsewhere than the slice it was drawn on", "place")
            frames = len(seg.without_source) or len(seg.beside)
            if frames and not seg.placed:
                raise DataError(
                    f"{seg.path} is a segmentation none of whose {frames} frames lies on a slice "
                    "of its series, but frames must lie on slices; export it on the grid of the "
                    "images."
                )


def _open(path: str, lesion_labels: tuple[int, ...], read: ReadFile) -> _SegmentationObject:
    try:
        dataset = highdicom.seg.segread(BytesIO(read(path)))
        planes = list(_parse_planes(dataset))
        segments = read_segments(dataset)
        is_fractional = dataset.SegmentationType == "FRACTIONAL"
        max_value = int(dataset.MaximumFractionalValue) if is_fractional else 1
    except Exception as error:  # many types on objects that break the standard
        raise _unreadable(path, error) from None
    by_source: dict[str, list[_Plane]] = defaultdict(list)
    for plane in planes:
        for source in plane.sources:
            by_source[source.instance].append(plane)
    return _SegmentationObject(
        path=path,
        dataset=dataset,
        segments=segments,
        lesion_segments=segments.lesion(lesion_labels),
        max_value=max_value,
        by_source=by_source,
        without_source=[plane for plane in planes if not plane.sources],
    )


def _unreadable(path: str, error: Exception) -> DataError:
    return DataError(
        f"{path} cannot be read as a DICOM segmentation ({describe_error(error)}); "
        "export it again, or remove it to use its series without a mask."
    )


def _parse_planes(dataset: Dataset) -> Iterator[_Plane]:
    shared = shared_groups(dataset)
    # Files cut to few frames still describe all.
    stored_count = int(dataset.get("NumberOfFrames") or 1)
    frames = (dataset.get("PerFrameFunctionalGroupsSequence") or [])[:stored_count]
    if not frames:
        raise ValueError("its frames have no places of their own, as in whole slide images")
    for index, frame in enumerate(frames):
        segment = None
        if dataset.SegmentationType != "LABELMAP":
            item = first_item(frame, shared, "SegmentIdentificationSequence")
            segment = int((item or Dataset()).ReferencedSegmentNumber)
        yield _Plane(
            frame=index,
            segment=segment,
            sources=_parse_sources(frame, shared),
            geometry=frame_geometry(frame, shared),
        )


def _parse_sources(frame: Dataset, shared: Dataset) -> list[_Source]:
    """Return the images that a frame was drawn on."""
    sources = []
    for derivation in group_items(frame, shared, "DerivationImageSequence"):
        for image in derivation.get("SourceImageSequence") or ():
            numbers = image.get("ReferencedFrameNumber")
            if numbers is None:
                numbers = []
            elif not isinstance(numbers, Sequence):
                numbers = [numbers]
            sources.append(_Source(str(image.ReferencedSOPInstanceUID), set(map(int, numbers))))
    return sources


def _read_plane(seg: _SegmentationObject, plane: _Plane) -> np.ndarray:
    """Return the lesion of a frame, (H, W) uint8 of 0 and 1."""
    try:
        values = seg.dataset.get_stored_frame(plane.frame + 1)
    except Exception as error:
        raise _unreadable(seg.path, error) from None
    if plane.segment is None:
        _check_described(seg, values)
        lesion = np.isin(values, sorted(seg.lesion_segments))
    else:
        lesion = values.astype(np.uint32) * 2 >= seg.max_value
    return lesion.astype(np.uint8)


def _check_described(seg: _SegmentationObject, values: np.ndarray) -> None:
    """Raise DataError if a label map holds a segment that it does not describe."""
    expected = {0} | seg.segments.described | seg.segments.background
    unknown = sorted(set(np.unique(values).tolist()) - expected)
    if unknown:
        raise DataError(
            f"{seg.path} is a segmentation that holds the value {unknown[0]}, but describes no "
            "such segment; export it again, or remove it to use its series without a mask."
        )


def _planes_on(seg: _SegmentationObject, source: SourceSlice) -> Iterator[_Plane]:
    """Yield the frames that lie on a slice, and check that their pixels do."""
    spacing = source.geometry.spacing
    tolerance = min(POSITION_TOLERANCE, 0.2 * min(spacing)) if spacing else POSITION_TOLERANCE
    for plane in (*seg.by_source.get(source.instance, ()), *seg.without_source):
        frames = plane.frames_of(source.instance)
        if source.frame is not None and frames and source.frame not in frames:
            continue
        if plane.geometry.position is None or source.geometry.position is None:
            if not plane.sources:
                continue
            if plane.frame in seg.placed:
                raise DataError(
                    f"{seg.path} is a segmentation with a frame that fits several slices, since it "
                    "tells no place and names no slice alone; export it with places."
                )
        elif _differ(plane.geometry.position, source.geometry.position, tolerance):
            # Some writers name all slices of the series with each frame. Then the place decides.
            if plane.sources:
                is_alone = len(plane.sources) == 1 and (source.frame is None or len(frames) == 1)
                seg.beside[plane.frame] = is_alone
            continue
        _check_grid(seg, plane, source)
        yield plane


def _check_grid(seg: _SegmentationObject, plane: _Plane, source: SourceSlice) -> None:
    """Raise DataError if the pixels of a frame are not those of its slice."""
    rows = int(seg.dataset.Rows)
    columns = int(seg.dataset.Columns)
    if (rows, columns) != source.shape:
        height, width = source.shape
        problem = f"has {columns}x{rows} pixels and its image {width}x{height}"
        raise _misfit(seg, problem, "size")
    _, direction, spacing = plane.geometry
    _, source_direction, source_spacing = source.geometry
    if _differ(direction, source_direction, DIRECTION_TOLERANCE):
        raise _misfit(seg, "runs in another direction than its image", "direction")
    if _differ(spacing, source_spacing, DIRECTION_TOLERANCE * min(source_spacing or (0,))):
        raise _misfit(seg, "has another pixel spacing than its image", "spacing")


def _misfit(seg: _SegmentationObject, problem: str, property_name: str) -> DataError:
    return DataError(
        f"{seg.path} is a segmentation that {problem}, but both must have the same "
        f"{property_name}; export it on the grid of the images."
    )


def _differ(first: Numbers, second: Numbers, tolerance: float) -> bool:
    """Return whether any two numbers differ by more than `tolerance`; unknown ones do not."""
    if first is None or second is None:
        return False
    return any(abs(a - b) > tolerance for a, b in zip(first, second, strict=True))
