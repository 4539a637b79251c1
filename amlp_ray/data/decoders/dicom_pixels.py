"""Decode one frame of a DICOM file to the units that its header means."""

from __future__ import annotations

from contextlib import suppress
from io import BytesIO
from typing import Any, NamedTuple

import numpy as np
from pydicom import Dataset, dcmread
from pydicom.dataset import FileMetaDataset
from pydicom.pixels import apply_color_lut, apply_modality_lut, apply_voi, get_decoder
from pydicom.uid import ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian

from amlp_ray.data.decoders.dicom_color import LUMA_CHROMA, to_rgb
from amlp_ray.data.decoders.dicom_geometry import (
    Geometry,
    first_item,
    frame_geometry,
    shared_groups,
    to_floats,
)
from amlp_ray.data.decoders.dicom_jpeg import decode_jpeg_12, is_jpeg_12
from amlp_ray.data.decoders.frame import ReadFile, read_content
from amlp_ray.data.decoders.intensity import to_bytes
from amlp_ray.errors import DataError, describe_error

# gdcm's C++ side writes to stderr past Python; what it complains of is raised as well.
with suppress(ImportError):
    import gdcm  # type: ignore[import-untyped]

    gdcm.Trace.WarningOff()
    gdcm.Trace.ErrorOff()
    gdcm.Trace.DebugOff()

GRAY = ("MONOCHROME1", "MONOCHROME2")
RGB = ("RGB", "YBR_RCT", "YBR_ICT")  # the JPEG 2000 kinds are RGB once decoded
PIXEL_TAGS = ("PixelData", "FloatPixelData", "DoubleFloatPixelData")
SPACING_TAGS = ("PixelSpacing", "ImagerPixelSpacing", "NominalScannedPixelSpacing")


class Pixels(NamedTuple):
    """A decoded frame: gray in its rescaled units, or colors of 8 bits and more."""

    values: np.ndarray  # (H, W) whole numbers or float64, or (H, W, 3) RGB
    low: float  # range that the header allows, of gray in rescaled units
    high: float
    padding: np.ndarray | None = None  # (H, W) bool: outside of what was scanned
    is_inverted: bool = False  # the lowest value is meant to be shown white
    is_color: bool = False
    notes: tuple[str, ...] = ()  # repairs, as sentences without the file's name


class Header(NamedTuple):
    """What a frame's values and place mean, by its functional groups or else by the object."""

    slope: float
    intercept: float
    voi: Dataset  # holds window or look-up table, if any
    geometry: Geometry


def load(path: str, read: ReadFile) -> Dataset:
    """Read and parse a whole file.

    Raises:
        DataError: the file cannot be opened, is damaged or holds no pixels.
    """
    content = read_content(path, read)
    try:
        dataset = dcmread(BytesIO(content), force=content[128:132] != b"DICM")
        rows = int(dataset.get("Rows") or 0)
        columns = int(dataset.get("Columns") or 0)
        frames = int(dataset.get("NumberOfFrames") or 0)
    except Exception as error:  # pydicom raises many types on damaged files
        raise DataError(
            f"{path} cannot be read as DICOM ({describe_error(error)}); "
            "export it again or remove it."
        ) from None
    if not any(tag in dataset for tag in PIXEL_TAGS):
        raise DataError(
            f"{path} holds no pixels, or ends before they do; export it again or remove it."
        )
    if rows < 1 or columns < 1 or frames < 0:
        raise DataError(
            f"{path} claims {columns}x{rows} pixels, but an image has some; "
            "export it again or remove it."
        )
    if not hasattr(dataset, "file_meta"):
        dataset.file_meta = FileMetaDataset()
    if not dataset.file_meta.get("TransferSyntaxUID"):
        # Cut out of a transfer: how it was parsed says how it is written.
        is_implicit, is_little_endian = dataset.original_encoding
        explicit = ExplicitVRLittleEndian if is_little_endian else ExplicitVRBigEndian
        syntax = ImplicitVRLittleEndian if is_implicit else explicit
        dataset.file_meta.TransferSyntaxUID = syntax
    return dataset


def frame_count(dataset: Dataset) -> int:
    """Return the number of frames of a file."""
    return int(dataset.get("NumberOfFrames") or 1)


def read_header(dataset: Dataset, index: int) -> Header:
    """Return what the header says of frame `index`. Raises ValueError or TypeError on nonsense."""
    frames = dataset.get("PerFrameFunctionalGroupsSequence") or ()
    frame = frames[index] if index < len(frames) else Dataset()
    shared = shared_groups(dataset)
    rescale = first_item(frame, shared, "PixelValueTransformationSequence")
    if rescale is None:
        rescale = dataset
    voi = first_item(frame, shared, "FrameVOILUTSequence")
    slope = rescale.get("RescaleSlope")
    return Header(
        slope=1.0 if slope is None or slope == "" else float(slope),
        intercept=float(rescale.get("RescaleIntercept") or 0),
        voi=dataset if voi is None else voi,
        geometry=_read_geometry(dataset, frame, shared),
    )


def _read_geometry(dataset: Dataset, frame: Dataset, shared: Dataset) -> Geometry:
    """Return where a frame lies, by its functional groups or else by the object."""
    geometry = frame_geometry(frame, shared)
    candidates = [geometry.spacing]
    candidates += [to_floats(dataset.get(tag), 2) for tag in SPACING_TAGS]
    spacings = [spacing for spacing in candidates if spacing and min(spacing) > 0]
    position = to_floats(dataset.get("ImagePositionPatient"), 3)
    orientation = to_floats(dataset.get("ImageOrientationPatient"), 6)
    return Geometry(
        position=geometry.position or position,
        orientation=geometry.orientation or orientation,
        spacing=spacings[0] if spacings else None,
    )


def decode(dataset: Dataset, index: int, header: Header) -> Pixels:
    """Decode frame `index`.

    Raises:
        Exception: of many types, with a reason as text, if the frame is damaged or of no accepted
            kind.
    """
    if is_jpeg_12(dataset):
        stored = decode_jpeg_12(dataset, index)
        photometric = str(dataset.get("PhotometricInterpretation"))
    else:
        decoder = get_decoder(dataset.file_meta.TransferSyntaxUID)
        stored, meta = decoder.as_array(dataset, index=index, as_rgb=False)
        photometric = str(meta["photometric_interpretation"])
    bits = int(dataset.get("BitsStored") or stored.dtype.itemsize * 8)
    if photometric == "PALETTE COLOR":
        palette_colors = _palette_to_bytes(apply_color_lut(stored, dataset))
        return Pixels(palette_colors, 0, 255, is_color=True)
    if photometric in (*RGB, *LUMA_CHROMA) and stored.ndim == 3:
        colors, notes = to_rgb(stored, photometric, dataset, index)
        return Pixels(colors, 0, 2**bits - 1, is_color=True, notes=notes)
    if photometric not in GRAY or stored.ndim != 2:
        kind = photometric or "unknown"
        raise ValueError(f"its colors are of kind {kind}, which is not supported")
    values, low, high = _rescale(dataset, stored, bits, header)
    return Pixels(
        values=values,
        low=low,
        high=high,
        padding=_find_padding(dataset, stored),
        is_inverted=photometric == "MONOCHROME1",
    )


def apply_window(values: np.ndarray, header: Header, path: str) -> np.ndarray:
    """Map gray values to 0-255 by the header's look-up table, else by its first window.

    Raises:
        DataError: the header has neither.
    """
    voi = header.voi
    if voi.get("VOILUTSequence"):
        bits = int(voi.VOILUTSequence[0].LUTDescriptor[2])
        looked_up = apply_voi(np.rint(values).astype(np.int64), voi, 0)
        return to_bytes(looked_up, 0, 2**bits - 1)
    center = _first_number(voi.get("WindowCenter"))
    width = _first_number(voi.get("WindowWidth"))
    if center is None or width is None or width <= 0:
        raise DataError(
            f"{path} names no window in its header, so values=window needs one to be given: "
            "add --window LOW,HIGH in the units of the images, or take values=percentile."
        )
    function = str(voi.get("VOILUTFunction") or "LINEAR")
    if function == "SIGMOID":
        with np.errstate(over="ignore"):
            return to_bytes(1 / (1 + np.exp(-4 * (values - center) / width)), 0, 1)
    if function == "LINEAR_EXACT":
        return to_bytes(values, center - width / 2, center + width / 2)
    # DICOM PS3.3 C.11.2.1.2.1: half a unit to the left, and one narrower.
    return to_bytes(values, center - 0.5 - (width - 1) / 2, center - 0.5 + (width - 1) / 2)


def _stored_range(dataset: Dataset, stored: np.ndarray, bits: int) -> tuple[float, float]:
    """Return the least and greatest value that the stored type allows."""
    if stored.dtype.kind == "f":
        return float(stored.min()), float(stored.max())
    if dataset.get("PixelRepresentation"):
        return -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    return 0, 2**bits - 1


def _rescale(
    dataset: Dataset, stored: np.ndarray, bits: int, header: Header
) -> tuple[np.ndarray, float, float]:
    """Return rescaled values, and the least and greatest that the header allows.

    Whole numbers stay whole if slope and intercept are.
    """
    if dataset.get("ModalityLUTSequence"):
        table_bits = int(dataset.ModalityLUTSequence[0].LUTDescriptor[2])
        values = apply_modality_lut(stored, dataset)
        return values.astype(np.int64), 0, 2**table_bits - 1
    slope = header.slope
    intercept = header.intercept
    if not np.isfinite((slope, intercept)).all() or slope == 0:
        raise ValueError(f"its rescale slope is {slope} and its intercept {intercept}")
    if stored.dtype.kind == "f" or slope != int(slope) or intercept != int(intercept):
        values = stored.astype(np.float64) * slope + intercept
    else:
        slope = int(slope)
        intercept = int(intercept)
        values = stored.astype(np.int64) * slope + intercept
    ends = [end * slope + intercept for end in _stored_range(dataset, stored, bits)]
    return values, min(ends), max(ends)


def _find_padding(dataset: Dataset, stored: np.ndarray) -> np.ndarray | None:
    """Return which pixels (H, W) lie outside of what was scanned; None if none or all do."""
    value = dataset.get("PixelPaddingValue")
    if value is None or value == "":
        return None
    limit = dataset.get("PixelPaddingRangeLimit")
    ends = [int(value), int(value if limit is None or limit == "" else limit)]
    if stored.dtype.kind == "i":
        # Some writers store the value of signed pixels without its sign.
        half = 1 << (8 * stored.dtype.itemsize - 1)
        ends = [end - 2 * half if end >= half else end for end in ends]
    padding = (stored >= min(ends)) & (stored <= max(ends))
    return padding if padding.any() and not padding.all() else None


def _palette_to_bytes(colors: np.ndarray) -> np.ndarray:
    """Return the colors of a palette as uint8; most hold 8 bits in the upper byte of 16."""
    if colors.dtype == np.uint8:
        return colors
    return (colors >> 8 if colors.max() > 255 else colors).astype(np.uint8)


def _first_number(value: Any) -> float | None:
    """Return a number, or the first of several; None if there is none."""
    if value is None or value == "":
        return None
    is_sequence = hasattr(value, "__getitem__") and not isinstance(value, str)
    try:
        return float(value[0] if is_sequence else value)
    except (TypeError, ValueError, IndexError):
        return None
