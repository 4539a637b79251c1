"""JPEG Extended of 12 bits, as older angiography and nuclear medicine is stored: gdcm decodes it, pydicom does not ask.

pydicom refuses since gdcm returns garbage for what is said to have 12 bits and has 8; that is checked here.
"""

from __future__ import annotations

import re

import numpy as np
from pydicom import Dataset
from pydicom.encaps import get_frame
from pydicom.uid import JPEGExtended12Bit

from amlp_ray.utils.silence import quiet_stderr

FRAME_HEADER = re.compile(
    rb"\xff[\xc0-\xc3\xc5-\xc7].{2}(?P<precision>.)", re.DOTALL
)  # SOF markers


def is_jpeg_12(dataset: Dataset) -> bool:
    """Say whether the pixels are grey JPEG Extended of more than 8 bits."""
    syntax, samples = dataset.file_meta.TransferSyntaxUID, int(dataset.get("SamplesPerPixel") or 1)
    return bool(
        syntax == JPEGExtended12Bit and samples == 1 and int(dataset.get("BitsStored") or 0) > 8
    )


def decode_jpeg_12(dataset: Dataset, index: int) -> np.ndarray:
    """Decode frame `index` to (H, W) uint16. Raises ImportError without gdcm, ValueError where the frame is damaged."""
    import gdcm  # type: ignore[import-untyped]

    rows, columns, frames = (
        int(dataset.Rows),
        int(dataset.Columns),
        int(dataset.get("NumberOfFrames") or 1),
    )
    source = get_frame(dataset.PixelData, index, number_of_frames=frames)
    header = FRAME_HEADER.search(source)
    if header is None or header["precision"] != b"\x0c":
        raise ValueError("its JPEG has not the 12 bits its header claims")
    fragment = gdcm.Fragment()
    fragment.SetByteStringValue(source)
    fragments = gdcm.SequenceOfFragments.New()
    fragments.AddFragment(fragment)
    element = gdcm.DataElement(gdcm.Tag(0x7FE0, 0x0010))
    element.SetValue(fragments.__ref__())
    image = gdcm.Image()
    image.SetNumberOfDimensions(2)
    image.SetDimensions((columns, rows, 1))
    image.SetDataElement(element)
    image.SetPhotometricInterpretation(
        gdcm.PhotometricInterpretation(gdcm.PhotometricInterpretation.MONOCHROME2)
    )
    image.SetTransferSyntax(
        gdcm.TransferSyntax(gdcm.TransferSyntax.GetTSType(str(JPEGExtended12Bit)))
    )
    image.SetPixelFormat(gdcm.PixelFormat(1, 16, 12, 11, 0))
    with (
        quiet_stderr()
    ):  # gdcm says that 12 bits are not supported, as its decoder for 8 tries first
        content = image.GetBuffer()
    data = (content or "").encode(
        "utf-8", "surrogateescape"
    )  # gdcm returns bytes as text, and None for a failure
    if len(data) != rows * columns * 2:
        raise ValueError("its JPEG is damaged")
    return np.frombuffer(data, "<u2").reshape(rows, columns).astype(np.uint16)
