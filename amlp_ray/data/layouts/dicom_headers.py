"""Read from DICOM headers what sorting into series needs, in many threads."""

from __future__ import annotations

import hashlib
import re
import sys
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

from amlp_ray.data.layouts.item import RejectedFile, rejected
from amlp_ray.data.path import DataPath, Entry
from amlp_ray.errors import describe_error

if TYPE_CHECKING:
    from pydicom import Dataset

# Other files are DICOM if they say so in their first bytes.
SUFFIXES = (".dcm", ".dicom", ".ima", ".dc3", ".dic")
TAGS = [
    "SpecificCharacterSet",
    "SOPClassUID",
    "SOPInstanceUID",
    "SeriesInstanceUID",
    "StudyInstanceUID",
    "FrameOfReferenceUID",
    "PatientID",
    "ImageType",
    "Modality",
    "Rows",
    "Columns",
    "SamplesPerPixel",
    "NumberOfFrames",
    "InstanceNumber",
    "ImagePositionPatient",
    "ImageOrientationPatient",
    "ReferencedSeriesSequence",
]
SEGMENTATIONS = ("1.2.840.10008.5.1.4.1.1.66.4", "1.2.840.10008.5.1.4.1.1.66.7")
DOSE = "1.2.840.10008.5.1.4.1.1.481.2"  # has rows and pixels, and shows no patient
DIRECTORY = "1.2.840.10008.1.3.10"
DEFLATED = "1.2.840.10008.1.2.1.99"
# What anonymizers write into PatientID, without all but letters and digits.
PLACEHOLDER = re.compile(
    r"anonym(?:ous|i[sz]ed?)?(?:patient|id|subject)?|anon|de?identified|noname|unknown|undefined|"
    r"none|null|na|nan|nil|no|noid|empty|blank|removed|deleted|redacted|hidden|masked|dummy|"
    r"default|test|patient|patientid|id|pid|subject|0+|([a-z])\1{2,}"
)
SEPARATOR = re.compile(r"[\W_]")
# ImageType of pictures that show many slices, of Siemens, United Imaging and of exports. In other
# modalities, the same words mean an image that was stitched together.
TILED_TYPES = ("MOSAIC", "VFRAME", "MONTAGE")
STITCHED_MODALITIES = ("OP", "OPT", "SM", "GM", "ES", "XC", "DX", "CR")
# Bytes read at first; few headers are longer.
LOCAL_HEAD_BYTES = 1 << 16
REMOTE_HEAD_BYTES = 1 << 18
LOCAL_THREADS = 4
REMOTE_THREADS = 32
BATCH = 4096  # headers that are read at once
MAX_COORDINATE = 1e6  # mm; larger ones are nonsense, and slices are sorted by their number


class Slice(NamedTuple):
    """What sorting needs of an image file."""

    name: str  # relative to the folder
    series: str  # UIDs are empty if the header has none
    study: str
    frame_of_reference: str
    instance: str  # SOP Instance UID, else a digest of the file
    patient: str  # PatientID; empty if none or a placeholder
    modality: str
    shape: tuple[int, int, int]  # rows, columns, samples
    frames: int
    number: int | None
    position: tuple[float, ...] | None  # mm
    orientation: tuple[float, ...] | None  # direction cosines of a row, then of a column


class Segmentation(NamedTuple):
    """A SEG object and what it refers to."""

    name: str
    patient: str  # as in `Slice`
    instances: frozenset[str]
    series: frozenset[str]  # alone if no instances are given


class Other(NamedTuple):
    """An object that holds no picture, such as a report."""

    kind: str


ParsedFile = Slice | Segmentation | Other | RejectedFile | None  # None: not DICOM


def read_headers(root: DataPath, entries: list[Entry]) -> Iterator[ParsedFile]:
    """Yield what each file is, in the order of `entries`. No file makes it raise."""
    threads = LOCAL_THREADS if root.is_local else REMOTE_THREADS
    # pydicom warns of every odd value, and most of them do not matter here.
    with warnings.catch_warnings(action="ignore"), ThreadPoolExecutor(threads) as pool:
        for start in range(0, len(entries), BATCH):
            batch = entries[start : start + BATCH]
            yield from pool.map(lambda entry: _parse_file(root, entry), batch)


def _parse_file(root: DataPath, entry: Entry) -> ParsedFile:
    """Read one header. Never raises: a damaged file must not end the listing of the others."""
    name = entry.name
    base = name.rpartition("/")[2]
    if base.upper() == "DICOMDIR":
        return None
    has_suffix = base.lower().endswith(SUFFIXES)
    try:
        header, has_pixels = _read_header(root / name, entry.size, has_suffix)
    except OSError as error:
        return rejected(name, f"cannot be opened ({error.strerror or 'read error'})")
    except Exception as error:  # pydicom raises many types on damaged files
        return rejected(name, f"has a damaged DICOM header ({describe_error(error)})")
    if header is None:
        if has_suffix:
            return rejected(name, "is named like a DICOM file and is none")
        return None
    try:
        return _classify(name, header, has_pixels, root / name)
    except Exception as error:
        return rejected(name, f"has a header that makes no sense ({type(error).__name__})")


def _read_header(file: DataPath, size: int, force: bool) -> tuple[Dataset | None, bool]:
    """Return the header, None if the file is not DICOM, and whether pixels follow."""
    with file.open() as stream:
        head_bytes = LOCAL_HEAD_BYTES if file.is_local else REMOTE_HEAD_BYTES
        head = BytesIO(stream.read(head_bytes))  # parsing from memory takes half the time
    is_whole_file = size <= head.getbuffer().nbytes
    if is_whole_file or not (force or _has_prefix(head)):
        return _parse(head, force)
    try:
        header, has_pixels = _parse(head, force)
    except Exception:
        has_pixels = False
    if has_pixels:
        return header, True
    # The header is compressed, or goes on after what was read.
    if file.is_local:
        with file.open() as whole:
            return _parse(whole, force)
    return _parse(BytesIO(file.read_bytes()), force)


def _parse(file: BinaryIO, force: bool) -> tuple[Dataset | None, bool]:
    from pydicom import dcmread

    has_prefix = _has_prefix(file)
    if not (has_prefix or force):
        return None, False
    header = dcmread(file, stop_before_pixels=True, specific_tags=TAGS, force=force)
    if not (has_prefix or header.get("SOPClassUID")):
        return None, False
    # A deflated file is inflated whole, so nothing is left to read.
    is_deflated = header.file_meta.get("TransferSyntaxUID") == DEFLATED
    return header, is_deflated or bool(file.read(1))


def _has_prefix(file: BinaryIO) -> bool:
    file.seek(128)
    prefix = file.read(4)
    file.seek(0)
    return prefix == b"DICM"


def _classify(name: str, header: Dataset, has_pixels: bool, file: DataPath) -> ParsedFile:
    """Return what a DICOM file is, by its SOP class and its claims."""
    from pydicom.uid import UID

    media_class = header.file_meta.get("MediaStorageSOPClassUID")
    sop_class = UID(_text(header, "SOPClassUID") or media_class or "")
    has_known_name = sop_class.name != sop_class
    if sop_class == DIRECTORY:
        return None
    if sop_class in SEGMENTATIONS:
        if not has_pixels:
            return rejected(name, "is a segmentation and holds no pixels")
        return _read_references(name, header, file)
    rows = int(header.get("Rows") or 0)
    columns = int(header.get("Columns") or 0)
    claims_pixels = rows > 0 and columns > 0
    is_image = claims_pixels or "Image Storage" in sop_class.name
    if sop_class == DOSE or not is_image:
        return Other(sop_class.name if sop_class and has_known_name else "of unknown kind")
    if not has_pixels or not claims_pixels:
        kind = sop_class.name.removesuffix(" Storage") if has_known_name else "image"
        return rejected(name, f"claims to be a {kind} and holds no pixels")
    if _is_tiled(header):
        return rejected(
            name, "is a mosaic of slices in one picture; convert it to a volume, as dcm2niix does"
        )
    samples = int(header.get("SamplesPerPixel") or 1)
    return _to_slice(name, header, (rows, columns, samples), file)


def _is_tiled(header: Dataset) -> bool:
    """Return whether a picture shows several slices side by side, by its ImageType."""
    kinds = header.get("ImageType") or ()
    kinds = [kinds] if isinstance(kinds, str) else kinds
    is_tiled = any(str(kind).strip().upper() in TILED_TYPES for kind in kinds)
    return is_tiled and _text(header, "Modality") not in STITCHED_MODALITIES


def _to_slice(name: str, header: Dataset, shape: tuple[int, int, int], file: DataPath) -> Slice:
    instance = _text(header, "SOPInstanceUID")
    return Slice(
        name=name,
        series=sys.intern(_text(header, "SeriesInstanceUID")),
        study=sys.intern(_text(header, "StudyInstanceUID")),
        frame_of_reference=sys.intern(_text(header, "FrameOfReferenceUID")),
        instance=instance or hashlib.sha256(file.read_bytes()).hexdigest(),
        patient=sys.intern(_patient(header)),
        modality=sys.intern(_text(header, "Modality")),
        shape=shape,
        frames=int(header.get("NumberOfFrames") or 1),
        number=_number(header.get("InstanceNumber")),
        position=read_floats(header.get("ImagePositionPatient"), 3, MAX_COORDINATE),
        orientation=read_floats(header.get("ImageOrientationPatient"), 6, MAX_COORDINATE),
    )


def _read_references(name: str, header: Dataset, file: DataPath) -> Segmentation:
    """Return which images and series a SEG object refers to."""
    instances = set()
    series = set()
    for reference in header.get("ReferencedSeriesSequence") or ():
        series.add(_text(reference, "SeriesInstanceUID"))
        for instance in reference.get("ReferencedInstanceSequence") or ():
            instances.add(_text(instance, "ReferencedSOPInstanceUID"))
    if not instances:
        # Older writers name the images with each frame only. There are few such files, so they
        # are read again.
        from pydicom import dcmread

        dataset = dcmread(BytesIO(file.read_bytes()), stop_before_pixels=True, force=True)
        for element in dataset.iterall():
            if element.keyword == "ReferencedSOPInstanceUID":
                instances.add(str(element.value))
    return Segmentation(
        name, _patient(header), frozenset(instances - {""}), frozenset(series - {""})
    )


def _patient(header: Dataset) -> str:
    patient = _text(header, "PatientID")
    return "" if is_placeholder(patient) else patient


def is_placeholder(patient: str) -> bool:
    """Return whether a PatientID names nobody.

    >>> [is_placeholder(one) for one in ("", "ANONYMOUS", "xxxx", "000", "7", "anon_012")]
    [True, True, True, True, False, False]
    """
    letters = SEPARATOR.sub("", patient).lower()
    return not letters or PLACEHOLDER.fullmatch(letters) is not None


def _text(header: Dataset, tag: str) -> str:
    value = header.get(tag)
    return "" if value is None else str(value).strip(" \0")


def _number(value: object) -> int | None:
    try:
        return int(str(value))
    except ValueError:
        return None


def read_floats(value: Any, count: int, limit: float) -> tuple[float, ...] | None:
    """Return `count` numbers of a header of less than `limit`; None if it has no such."""
    try:
        numbers = tuple(map(float, value))
    except (TypeError, ValueError):
        return None
    is_valid = len(numbers) == count and all(abs(one) < limit for one in numbers)
    return numbers if is_valid else None
