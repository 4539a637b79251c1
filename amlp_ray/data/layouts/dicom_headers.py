"""The headers of DICOM files: what the sorting into series needs of each, read by many threads at once."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

from amlp_ray.data.layouts.item import RejectedFile
from amlp_ray.data.path import DataPath, Entry

if TYPE_CHECKING:
    from pydicom import Dataset

SUFFIXES = (
    ".dcm",
    ".dicom",
    ".ima",
    ".dc3",
    ".dic",
)  # other files are DICOM if they say so in their first bytes
TAGS = [
    *(
        "SpecificCharacterSet",
        "SOPClassUID",
        "SOPInstanceUID",
        "SeriesInstanceUID",
        "StudyInstanceUID",
        "PatientID",
    ),
    *("Modality", "Rows", "Columns", "SamplesPerPixel", "NumberOfFrames", "InstanceNumber"),
    *("ImagePositionPatient", "ImageOrientationPatient", "ReferencedSeriesSequence"),
]
SEGMENTATIONS = ("1.2.840.10008.5.1.4.1.1.66.4", "1.2.840.10008.5.1.4.1.1.66.7")
DOSE = "1.2.840.10008.5.1.4.1.1.481.2"  # has rows and pixels, and shows no patient
DIRECTORY = "1.2.840.10008.1.3.10"
HEAD_HERE, HEAD_THERE = (
    1 << 16,
    1 << 18,
)  # bytes fetched of a local and a remote file at first; few headers are longer
BATCH = 4096  # headers under way at once


class Slice(NamedTuple):
    """What is kept of an image file until the series are sorted."""

    name: str  # relative to the place
    series: str
    instance: str
    patient: str
    modality: str
    shape: tuple[int, int, int]  # rows, columns, samples
    frames: int
    number: int | None
    position: tuple[float, ...] | None  # mm
    orientation: tuple[float, ...] | None  # direction cosines of a row, then of a column


class Segmentation(NamedTuple):
    """A SEG object and what it refers to."""

    name: str
    instances: frozenset[str]
    series: frozenset[str]  # used where no instances are given


class Other(NamedTuple):
    """An object that holds no picture, such as a report; the name of its kind."""

    kind: str


Found = Slice | Segmentation | Other | RejectedFile | None


def read_headers(place: DataPath, entries: list[Entry]) -> Iterator[Found]:
    """Yield what each file is, in the order of `entries`, None if not DICOM. No file makes it raise."""
    with warnings.catch_warnings(), ThreadPoolExecutor(4 if place.is_local else 32) as pool:
        warnings.simplefilter(
            "ignore"
        )  # pydicom warns of every odd value, most of which do not matter here
        for start in range(0, len(entries), BATCH):
            yield from pool.map(lambda entry: _look(place, entry), entries[start : start + BATCH])


def _look(place: DataPath, entry: Entry) -> Found:
    """Read one header. Never raises: a damaged file must not end the listing of the others."""
    base = entry.name.rpartition("/")[2]
    if base.upper() == "DICOMDIR":
        return None
    named_so = base.lower().endswith(SUFFIXES)
    try:
        header, has_more = _read_header(place / entry.name, entry.size, named_so)
    except OSError as error:
        return RejectedFile(
            entry.name, "rejected", f"cannot be opened ({error.strerror or 'read error'})"
        )
    except Exception as error:  # pydicom raises many types on damaged files
        reason = " ".join(str(error).split()).rstrip(".")[:120] or type(error).__name__
        return RejectedFile(entry.name, "rejected", f"has a damaged DICOM header ({reason})")
    if header is None:
        if named_so:
            return RejectedFile(entry.name, "rejected", "is named like a DICOM file and is none")
        return None
    try:
        return _what(entry.name, header, has_more, place / entry.name)
    except Exception as error:
        return RejectedFile(
            entry.name, "rejected", f"has a header that makes no sense ({type(error).__name__})"
        )


def _read_header(place: DataPath, size: int, force: bool) -> tuple[Dataset | None, bool]:
    """Return the header, None where the file is not DICOM, and whether pixels follow."""
    if place.is_local:
        with place.local.open("rb", buffering=0) as file:
            head = BytesIO(file.read(HEAD_HERE))  # parsing from memory takes half the time
    else:
        with place.filesystem.open_input_file(place.path) as remote:
            head = BytesIO(bytes(remote.read(HEAD_THERE)))
    if size <= head.getbuffer().nbytes or not (force or _has_prefix(head)):
        return _parse(head, force)
    try:
        header, has_more = _parse(head, force)
    except Exception:
        has_more = False
    if has_more:  # else the header goes on after what was fetched, or is compressed
        return header, True
    if place.is_local:
        with place.local.open("rb") as whole:
            return _parse(whole, force)
    return _parse(BytesIO(place.read_bytes()), force)


def _parse(file: BinaryIO, force: bool) -> tuple[Dataset | None, bool]:
    from pydicom import dcmread

    if not _has_prefix(file):
        if not force:
            return None, False
        header = dcmread(file, stop_before_pixels=True, specific_tags=TAGS, force=True)
        return (header, bool(file.read(1))) if header.get("SOPClassUID") else (None, False)
    header = dcmread(file, stop_before_pixels=True, specific_tags=TAGS)
    deflated = (
        header.file_meta.get("TransferSyntaxUID") == "1.2.840.10008.1.2.1.99"
    )  # inflated whole: nothing is left
    return header, deflated or bool(file.read(1))


def _has_prefix(file: BinaryIO) -> bool:
    file.seek(128)
    found = file.read(4) == b"DICM"
    file.seek(0)
    return found


def _what(name: str, header: Dataset, has_more: bool, place: DataPath) -> Found:
    from pydicom.uid import UID

    kind = UID(
        _text(header, "SOPClassUID") or header.file_meta.get("MediaStorageSOPClassUID") or ""
    )
    if kind == DIRECTORY:
        return None
    if kind in SEGMENTATIONS:
        if not has_more:
            return RejectedFile(name, "rejected", "is a segmentation and holds no pixels")
        return _references(name, header, place)
    rows, columns = (int(header.get(tag) or 0) for tag in ("Rows", "Columns"))
    claims = rows > 0 and columns > 0
    if kind == DOSE or not (claims or "Image Storage" in kind.name):
        return Other(kind.name if kind and kind.name != kind else "of unknown kind")
    if not has_more or not claims:
        what = kind.name.removesuffix(" Storage") if kind.name != kind else "image"
        return RejectedFile(name, "rejected", f"claims to be a {what} and holds no pixels")
    instance = _text(header, "SOPInstanceUID") or name
    series = _text(header, "SeriesInstanceUID") or instance
    return Slice(
        name=name,
        series=sys.intern(series),
        instance=instance,
        patient=sys.intern(
            _text(header, "PatientID") or _text(header, "StudyInstanceUID") or series
        ),
        modality=sys.intern(_text(header, "Modality")),
        shape=(rows, columns, int(header.get("SamplesPerPixel") or 1)),
        frames=int(header.get("NumberOfFrames") or 1),
        number=_number(header.get("InstanceNumber")),
        position=_floats(header.get("ImagePositionPatient"), 3),
        orientation=_floats(header.get("ImageOrientationPatient"), 6),
    )


def _references(name: str, header: Dataset, place: DataPath) -> Segmentation:
    instances, series = set(), set()
    for of in header.get("ReferencedSeriesSequence") or ():
        series.add(_text(of, "SeriesInstanceUID"))
        for instance in of.get("ReferencedInstanceSequence") or ():
            instances.add(_text(instance, "ReferencedSOPInstanceUID"))
    if not instances:  # older writers name the images with each frame only; there are few of these, so read them again
        from pydicom import dcmread

        whole = dcmread(BytesIO(place.read_bytes()), stop_before_pixels=True, force=True)
        for element in whole.iterall():
            if element.keyword == "ReferencedSOPInstanceUID":
                instances.add(str(element.value))
    return Segmentation(name, frozenset(instances - {""}), frozenset(series - {""}))


def _text(header: Dataset, tag: str) -> str:
    value = header.get(tag)
    return "" if value is None else str(value).strip(" \0")


def _number(value: object) -> int | None:
    try:
        return int(str(value))
    except ValueError:
        return None


def _floats(value: Any, count: int) -> tuple[float, ...] | None:
    """Return numbers of a header, None where they are missing or none; such slices are sorted by their number."""
    try:
        numbers = tuple(float(one) for one in value)
    except (TypeError, ValueError):
        return None
    return numbers if len(numbers) == count and all(abs(one) < 1e6 for one in numbers) else None
