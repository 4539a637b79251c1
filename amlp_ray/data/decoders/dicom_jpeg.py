"""Decode JPEG Extended of 12 bits by gdcm, as older angiography and nuclear medicine is stored.

pydicom does not use gdcm for it, since gdcm returns garbage if the header claims 12 bits and the
JPEG has 8. That is checked here.
"""

from __future__ import annotations

import re

import numpy as np
from pydicom import Dataset
from pydicom.encaps import get_frame
from pydicom.uid import JPEGExtended12Bit

from amlp_ray.utils.silence import quiet_stderr

# Start-of-frame markers, with the bits per sample.
FRAME_HEADER = re.compile(rb"\xff[\xc0-\xc3\xc5-\xc7].{2}(?P<precision>.)", re.DOTALL)


def is_jpeg_12(dataset: Dataset) -> bool:
    """Return whether the pixels are gray JPEG Extended of more than 8 bits."""
    if dataset.file_meta.TransferSyntaxUID != JPEGExtended12Bit:
        return False
    samples = int(dataset.get("SamplesPerPixel") or 1)
    bits = int(dataset.get("BitsStored") or 0)
    return samples == 1 and bits > 8


def decode_jpeg_12(dataset: Dataset, index: int) -> np.ndarray:
    """Decode frame `index` to (H, W) uint16.

    Raises:
        ImportError: gdcm is not installed.
        ValueError: the frame is damaged.
    """
    rows = int(dataset.Rows)
    columns = int(dataset.Columns)
    frame_count = int(dataset.get("NumberOfFrames") or 1)
    encoded = get_frame(dataset.PixelData, index, number_of_frames=frame_count)
    header = FRAME_HEADER.search(encoded)
    if header is None or header["precision"] != b"\x0c":
        raise ValueError("its JPEG has not the 12 bits its header claims")
    data = _decode_by_gdcm(encoded, rows, columns)
    if len(data) != rows * columns * 2:
        raise ValueError("its JPEG is damaged")
    return np.frombuffer(data, "<u2").reshape(rows, columns).astype(np.uint16)


def _decode_by_gdcm(encoded: bytes, rows: int, columns: int) -> bytes:
    """Return little-endian pixels of 16 bits; empty if gdcm fails."""
    import gdcm  # type: ignore[import-untyped]

    fragment = gdcm.Fragment()
    fragment.SetByteStringValue(encoded)
    fragments = gdcm.SequenceOfFragments.New()
    fragments.AddFragment(fragment)
    element = gdcm.DataElement(gdcm.Tag(0x7FE0, 0x0010))
    element.SetValue(fragments.__ref__())
    gray = gdcm.PhotometricInterpretation(gdcm.PhotometricInterpretation.MONOCHROME2)
    syntax = gdcm.TransferSyntax(gdcm.TransferSyntax.GetTSType(str(JPEGExtended12Bit)))
    image = gdcm.Image()
    image.SetNumberOfDimensions(2)
    image.SetDimensions((columns, rows, 1))
    image.SetDataElement(element)
    image.SetPhotometricInterpretation(gray)
    image.SetTransferSyntax(syntax)
    image.SetPixelFormat(gdcm.PixelFormat(1, 16, 12, 11, 0))
    # gdcm prints that 12 bits are not supported, since it tries its decoder for 8 bits first.
    with quiet_stderr():
        text = image.GetBuffer()
    # gdcm returns bytes as text, and None after a failure.
    return (text or "").encode("utf-8", "surrogateescape")
