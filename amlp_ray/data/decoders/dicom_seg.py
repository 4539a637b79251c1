"""DICOM SEG objects as masks: which of their frames lie on which slice of a series.

highdicom reads and decodes them. Which frame belongs to which slice is found here: highdicom's own look-up by source
image needs an optional flag that most writers leave out, and without it takes frames that lie elsewhere.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from typing import Any, NamedTuple

import highdicom
import numpy as np
from pydicom import Dataset

from amlp_ray.data.decoders.masks import lesion_of
from amlp_ray.errors import DataError

NEAR = 0.1  # mm between two planes that are one; headers round positions to some hundredths
TURN = 0.01  # largest difference of direction cosines, and of spacings in relation to their size


class SourceSlice(NamedTuple):
    """A slice that masks are wanted for."""

    instance: str  # SOP Instance UID
    frame: int | None  # number from 1, of an object of several
    shape: tuple[int, int]
    position: tuple[float, ...] | None  # mm, of the first pixel
    orientation: tuple[float, ...] | None
    spacing: tuple[float, float] | None  # mm


class _Plane(NamedTuple):
    """A frame of a SEG object."""

    frame: int  # from 0
    segment: int | None  # none: its values are segment numbers
    sources: tuple[
        tuple[str, frozenset[int]], ...
    ]  # images it was drawn on, and which frames of them, none for all
    position: tuple[float, ...] | None
    orientation: tuple[float, ...] | None
    spacing: tuple[float, float] | None


@dataclass
class _Object:
    """A SEG object with its frames sorted by where they belong."""

    path: str
    dataset: Any  # highdicom.seg.Segmentation
    wanted: frozenset[int]  # segments that are lesion
    full: int  # value that is certain in a fractional object, else 1
    by_source: dict[str, list[_Plane]]
    placed: list[_Plane]  # name no image: found by their position
    on_slices: int = field(default=0)  # frames that were found to lie on a slice of the series
    beside: int = field(default=0)  # frames that name a slice of the series and do not lie on it


class SegmentationMasks:
    """The united masks of several SEG objects, slice by slice."""

    def __init__(
        self, paths: Sequence[str], wanted: tuple[int, ...], read: Callable[[str], bytes]
    ) -> None:
        """Read the objects; `wanted` are the segment numbers that are lesion, none for all.

        Raises:
            DataError: one cannot be read, or is no SEG object that follows the standard.
        """
        self._objects = [_open(path, wanted, read) for path in paths]
        known = sorted({number for of in self._objects for number in of.dataset.segment_numbers})
        self.notes = lesion_of(np.array(known), wanted)[1] if known else ()

    def on(self, source: SourceSlice) -> np.ndarray:
        """Return the mask of a slice, (H, W) uint8 of 0 and 1; all zero where no frame lies on it.

        Raises:
            DataError: a frame was drawn on this slice and has another size, direction, place or spacing.
        """
        mask = np.zeros(source.shape, np.uint8)
        for of in self._objects:
            for plane in _planes_on(of, source):
                of.on_slices += 1
                if plane.segment is not None and plane.segment not in of.wanted:
                    continue
                try:
                    values = of.dataset.get_stored_frame(plane.frame + 1)
                except Exception as error:
                    raise DataError(_unreadable(of.path, error)) from None
                if plane.segment is None:
                    mask |= np.isin(values, sorted(of.wanted)).astype(np.uint8)
                else:
                    mask |= (values.astype(np.uint32) * 2 >= of.full).astype(np.uint8)
        return mask

    def finish(self) -> None:
        """Say after the last slice whether an object lay nowhere: its zero masks would claim there is no lesion.

        Raises:
            DataError: no frame of an object lies on any slice.
        """
        for of in self._objects:
            if not of.on_slices and (of.placed or of.beside):
                raise DataError(
                    f"{of.path} is a segmentation none of whose {len(of.placed) or of.beside} frames lies on a slice "
                    f"of its series, but frames must lie on slices; export it on the grid of the images."
                )


def _open(path: str, wanted: tuple[int, ...], read: Callable[[str], bytes]) -> _Object:
    try:
        dataset = highdicom.seg.segread(BytesIO(read(path)))
        planes = list(_planes(dataset))
        numbers = frozenset(int(number) for number in dataset.segment_numbers)
        fractional = dataset.SegmentationType == "FRACTIONAL"
        full = int(dataset.MaximumFractionalValue) if fractional else 1
    except (
        Exception
    ) as error:  # highdicom and pydicom raise many types on objects that break the standard
        raise DataError(_unreadable(path, error)) from None
    by_source: dict[str, list[_Plane]] = defaultdict(list)
    for plane in planes:
        for instance, _ in plane.sources:
            by_source[instance].append(plane)
    lesion = numbers & set(wanted) if wanted else numbers
    return _Object(
        path, dataset, lesion, full, by_source, [plane for plane in planes if not plane.sources]
    )


def _unreadable(path: str, error: Exception) -> str:
    reason = " ".join(str(error).split()).rstrip(".")[:200] or type(error).__name__
    return (
        f"{path} cannot be read as a DICOM segmentation ({reason}); export it again, or remove it to use its series "
        f"without a mask."
    )


def _planes(dataset: Dataset) -> Iterator[_Plane]:
    shared = (dataset.get("SharedFunctionalGroupsSequence") or [Dataset()])[0]
    stored = int(dataset.get("NumberOfFrames") or 1)
    frames = (dataset.get("PerFrameFunctionalGroupsSequence") or [])[
        :stored
    ]  # files cut to few frames describe all
    if not frames:
        raise ValueError("its frames have no places of their own, as in whole slide images")
    for index, frame in enumerate(frames):
        sources = []
        for derivation in group(frame, shared, "DerivationImageSequence"):
            for image in derivation.get("SourceImageSequence") or ():
                sources.append(
                    (
                        str(image.ReferencedSOPInstanceUID),
                        _numbers(image.get("ReferencedFrameNumber")),
                    )
                )
        segment = next(iter(group(frame, shared, "SegmentIdentificationSequence")), Dataset())
        labeled = dataset.SegmentationType == "LABELMAP"
        yield _Plane(
            frame=index,
            segment=None if labeled else int(segment.ReferencedSegmentNumber),
            sources=tuple(sources),
            **geometry(frame, shared),
        )


def _planes_on(of: _Object, source: SourceSlice) -> Iterator[_Plane]:
    """Yield the frames that lie on a slice, and check that their pixels do."""
    near = min(NEAR, 0.2 * min(source.spacing)) if source.spacing else NEAR
    for plane in (*of.by_source.get(source.instance, ()), *of.placed):
        frames = {
            number
            for instance, numbers in plane.sources
            if instance == source.instance
            for number in numbers
        }
        if source.frame is not None and frames and source.frame not in frames:
            continue
        known = plane.position is not None and source.position is not None
        if known and not _equal(plane.position, source.position, near):
            if len(plane.sources) == 1 and (source.frame is None or len(frames) == 1):
                raise DataError(
                    _misfit(of, "starts elsewhere than the slice it was drawn on", "place")
                )
            # Some writers name all slices of the series with each frame; then the place decides.
            of.beside += bool(plane.sources)
            continue
        if not known and not plane.sources:
            continue
        rows, columns = int(of.dataset.Rows), int(of.dataset.Columns)
        if (rows, columns) != source.shape:
            found = f"has {columns}x{rows} pixels and its image {source.shape[1]}x{source.shape[0]}"
            raise DataError(_misfit(of, found, "size"))
        if (
            plane.orientation
            and source.orientation
            and not _equal(plane.orientation, source.orientation, TURN)
        ):
            raise DataError(_misfit(of, "runs in another direction than its image", "direction"))
        if (
            plane.spacing
            and source.spacing
            and not _equal(plane.spacing, source.spacing, TURN * min(source.spacing))
        ):
            raise DataError(_misfit(of, "has another pixel spacing than its image", "spacing"))
        yield plane


def _misfit(of: _Object, found: str, what: str) -> str:
    return (
        f"{of.path} is a segmentation that {found}, but both must have the same {what}; export it on the grid of the "
        f"images."
    )


def geometry(frame: Dataset, shared: Dataset) -> dict[str, Any]:
    """Return position, orientation and spacing (down, across), mm, of one frame of several; None: unknown."""
    plane = next(iter(group(frame, shared, "PlanePositionSequence")), Dataset())
    turn = next(iter(group(frame, shared, "PlaneOrientationSequence")), Dataset())
    pixel = next(iter(group(frame, shared, "PixelMeasuresSequence")), Dataset())
    return {
        "position": floats(plane.get("ImagePositionPatient"), 3),
        "orientation": floats(turn.get("ImageOrientationPatient"), 6),
        "spacing": floats(pixel.get("PixelSpacing"), 2),
    }


def group(frame: Dataset, shared: Dataset, name: str) -> Sequence[Dataset]:
    """Return the items of a functional group, which a frame has of its own or shares with all."""
    return frame.get(name) or shared.get(name) or ()


def floats(value: Any, count: int) -> Any:
    """Return `count` finite numbers of a header as a tuple, None where there are no such."""
    try:
        numbers = tuple(float(one) for one in value)
    except (TypeError, ValueError):
        return None
    return numbers if len(numbers) == count and all(abs(one) < 1e9 for one in numbers) else None


def _equal(first: Any, second: Any, tolerance: float) -> bool:
    return all(abs(a - b) <= tolerance for a, b in zip(first, second, strict=True))


def _numbers(value: Any) -> frozenset[int]:
    if value is None:
        return frozenset()
    return frozenset(int(one) for one in (value if isinstance(value, Sequence) else [value]))
