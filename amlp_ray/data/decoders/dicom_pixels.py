"""One frame of a DICOM file in the units its header means, as numbers with what else is needed to show them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from io import BytesIO
from typing import Any, NamedTuple

import numpy as np
from pydicom import Dataset, dcmread
from pydicom.dataset import FileMetaDataset
from pydicom.pixels import apply_color_lut, apply_modality_lut, apply_voi, get_decoder
from pydicom.uid import ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian

from amlp_ray.data.decoders.dicom_jpeg import decode_jpeg_12, is_jpeg_12
from amlp_ray.data.decoders.dicom_seg import floats, geometry, group
from amlp_ray.data.decoders.intensity import to_bytes
from amlp_ray.errors import DataError

with suppress(
    ImportError
):  # its C++ side writes to stderr past Python; what it complains of is raised as well
    import gdcm  # type: ignore[import-untyped]

    gdcm.Trace.WarningOff()
    gdcm.Trace.ErrorOff()
    gdcm.Trace.DebugOff()

GREY = ("MONOCHROME1", "MONOCHROME2")
EXACT = 1 << 24  # whole numbers up to this are exact in float32


class Pixels(NamedTuple):
    """A decoded frame; grey in its rescaled units, or colours of 8 bits and more."""

    values: np.ndarray  # (H, W) whole numbers or float64, or (H, W, 3) RGB
    low: float  # range the header allows, of grey in rescaled units
    high: float
    padding: np.ndarray | None  # (H, W) bool: outside of what was scanned
    is_inverted: bool  # the lowest value is meant to be shown white
    is_color: bool


class Header(NamedTuple):
    """What a frame's values and place mean: from the object, or from the functional groups of this frame."""

    slope: float
    intercept: float
    voi: Dataset  # holds window or look-up table, if any
    position: Any
    orientation: Any
    spacing: tuple[float, float] | None  # mm, down and across


def load(path: str, read: Callable[[str], bytes]) -> Dataset:
    """Read and parse a file whole. Raises DataError where it cannot be opened, is damaged or holds no pixels."""
    try:
        content = read(path)
    except OSError as error:
        raise DataError(
            f"{path} cannot be read ({error.strerror or error}); check that it is there and yours."
        ) from None
    try:
        dataset = dcmread(BytesIO(content), force=content[128:132] != b"DICM")
        rows, columns, frames = (
            int(dataset.get(tag) or 0) for tag in ("Rows", "Columns", "NumberOfFrames")
        )
    except Exception as error:  # pydicom raises many types on damaged files
        raise DataError(
            f"{path} cannot be read as DICOM ({brief(error)}); export it again or remove it."
        ) from None
    if not any(tag in dataset for tag in ("PixelData", "FloatPixelData", "DoubleFloatPixelData")):
        raise DataError(
            f"{path} holds no pixels, or ends before they do; export it again or remove it."
        )
    if rows < 1 or columns < 1 or frames < 0:
        raise DataError(
            f"{path} claims {columns}x{rows} pixels, but an image has some; export it again or remove it."
        )
    if not hasattr(dataset, "file_meta"):
        dataset.file_meta = FileMetaDataset()
    if not dataset.file_meta.get(
        "TransferSyntaxUID"
    ):  # cut out of a transfer: how it was parsed says how it is written
        implicit, little = dataset.original_encoding
        explicit = ExplicitVRLittleEndian if little else ExplicitVRBigEndian
        dataset.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian if implicit else explicit
    return dataset


def frame_count(dataset: Dataset) -> int:
    return int(dataset.get("NumberOfFrames") or 1)


def header_of(dataset: Dataset, index: int) -> Header:
    """Return what the header says of frame `index`. Raises ValueError or TypeError where it says nonsense."""
    frames = dataset.get("PerFrameFunctionalGroupsSequence") or ()
    frame = frames[index] if index < len(frames) else Dataset()
    shared = (dataset.get("SharedFunctionalGroupsSequence") or [Dataset()])[0]
    rescale = next(iter(group(frame, shared, "PixelValueTransformationSequence")), dataset)
    voi = next(iter(group(frame, shared, "FrameVOILUTSequence")), dataset)
    place = geometry(frame, shared)
    own = (
        floats(dataset.get(name), 2)
        for name in ("PixelSpacing", "ImagerPixelSpacing", "NominalScannedPixelSpacing")
    )
    spacings = [spacing for spacing in (place["spacing"], *own) if spacing and min(spacing) > 0]
    slope = rescale.get("RescaleSlope")
    return Header(
        slope=1.0 if slope is None or slope == "" else float(slope),
        intercept=float(rescale.get("RescaleIntercept") or 0),
        voi=voi,
        position=place["position"] or floats(dataset.get("ImagePositionPatient"), 3),
        orientation=place["orientation"] or floats(dataset.get("ImageOrientationPatient"), 6),
        spacing=spacings[0] if spacings else None,
    )


def decode(dataset: Dataset, index: int, header: Header) -> Pixels:
    """Decode frame `index`. Raises many types, with a reason as text, where it is damaged or of no accepted kind."""
    if is_jpeg_12(dataset):
        stored, photometric = (
            decode_jpeg_12(dataset, index),
            str(dataset.get("PhotometricInterpretation")),
        )
    else:
        stored, meta = get_decoder(dataset.file_meta.TransferSyntaxUID).as_array(
            dataset, index=index
        )
        photometric = str(meta["photometric_interpretation"])
    bits = int(dataset.get("BitsStored") or stored.dtype.itemsize * 8)
    if photometric == "PALETTE COLOR":
        return Pixels(_bytes_of(apply_color_lut(stored, dataset)), 0, 255, None, False, True)
    if (
        photometric in ("RGB", "YBR_RCT", "YBR_ICT") and stored.ndim == 3
    ):  # the JPEG 2000 kinds are RGB by now
        return Pixels(stored, 0, 2**bits - 1, None, False, True)
    if photometric not in GREY or stored.ndim != 2:
        raise ValueError(
            f"its colours are of kind {photometric or 'unknown'}, which is not supported"
        )
    low, high = _stored_range(dataset, stored, bits)
    values, low, high = _rescale(dataset, stored, low, high, header)
    return Pixels(values, low, high, _padding(dataset, stored), photometric == "MONOCHROME1", False)


def window_of(values: np.ndarray, header: Header, path: str) -> np.ndarray:
    """Map grey values to 0-255 as the header asks: by its look-up table, else its first window.

    Raises:
        DataError: the header has neither.
    """
    voi = header.voi
    if voi.get("VOILUTSequence"):
        bits = int(voi.VOILUTSequence[0].LUTDescriptor[2])
        return to_bytes(apply_voi(np.rint(values).astype(np.int64), voi, 0), 0, 2**bits - 1)
    center, width = (_first(voi.get(tag)) for tag in ("WindowCenter", "WindowWidth"))
    if center is None or width is None or width <= 0:
        raise DataError(
            f"{path} names no window in its header, so values=window needs one to be given: add --window LOW,HIGH in "
            f"the units of the images, or take values=percentile."
        )
    function = str(voi.get("VOILUTFunction") or "LINEAR")
    if function == "SIGMOID":
        with np.errstate(over="ignore"):
            return to_bytes(1 / (1 + np.exp(-4 * (values - center) / width)), 0, 1)
    if function == "LINEAR_EXACT":
        return to_bytes(values, center - width / 2, center + width / 2)
    # DICOM PS3.3 C.11.2.1.2.1: half a unit to the left, and one narrower
    return to_bytes(values, center - 0.5 - (width - 1) / 2, center - 0.5 + (width - 1) / 2)


def brief(error: BaseException) -> str:
    """The text of an error in one line."""
    return " ".join(str(error).split()).rstrip(".")[:200] or type(error).__name__


def _stored_range(dataset: Dataset, stored: np.ndarray, bits: int) -> tuple[float, float]:
    if stored.dtype.kind == "f":
        return float(stored.min()), float(stored.max())
    if dataset.get("PixelRepresentation"):
        return -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    return 0, 2**bits - 1


def _rescale(
    dataset: Dataset, stored: np.ndarray, low: float, high: float, header: Header
) -> tuple[np.ndarray, float, float]:
    """Apply look-up table, or slope and intercept; whole numbers stay whole where these are."""
    if dataset.get("ModalityLUTSequence"):
        table = dataset.ModalityLUTSequence[0]
        values = apply_modality_lut(stored, dataset)
        bits = int(table.LUTDescriptor[2])
        return values.astype(np.int64), 0, 2**bits - 1
    slope, intercept = header.slope, header.intercept
    if not np.isfinite((slope, intercept)).all() or slope == 0:
        raise ValueError(f"its rescale slope is {slope} and its intercept {intercept}")
    if stored.dtype.kind == "f" or slope != int(slope) or intercept != int(intercept):
        values = stored.astype(np.float64) * slope + intercept
    else:
        slope, intercept = int(slope), int(intercept)
        values = stored.astype(np.int64) * slope + intercept
    ends = sorted((low * slope + intercept, high * slope + intercept))
    return values, ends[0], ends[1]


def _padding(dataset: Dataset, stored: np.ndarray) -> np.ndarray | None:
    value = dataset.get("PixelPaddingValue")
    if value is None or value == "":
        return None
    limit = dataset.get("PixelPaddingRangeLimit")
    ends = [int(value), int(value if limit is None or limit == "" else limit)]
    if stored.dtype.kind == "i":  # some writers store the value of signed pixels without its sign
        half = 1 << (8 * stored.dtype.itemsize - 1)
        ends = [end - 2 * half if end >= half else end for end in ends]
    padding = (stored >= min(ends)) & (stored <= max(ends))
    return padding if padding.any() and not padding.all() else None


def _bytes_of(colors: np.ndarray) -> np.ndarray:
    """Colours of a palette as uint8. Most palettes of 16 bits hold 8 in the upper byte, a few in the lower."""
    if colors.dtype == np.uint8:
        return colors
    return (colors >> 8 if colors.max() > 255 else colors).astype(np.uint8)


def _first(value: Any) -> float | None:
    """Return a number, or the first of several, None where there is none."""
    if value is None or value == "":
        return None
    try:
        return float(
            value[0] if hasattr(value, "__getitem__") and not isinstance(value, str) else value
        )
    except (TypeError, ValueError, IndexError):
        return None
