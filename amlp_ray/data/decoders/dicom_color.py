"""Tell whether decoded color channels are RGB or YCbCr, where header and codec may disagree.

Headers are wrong about it more often than codecs: devices and converters change the pixels and
keep the tag. So the codestream is asked first, then the pixels, and then the header.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from pydicom import Dataset
from pydicom.encaps import get_frame
from pydicom.pixels import convert_color_space
from pydicom.uid import JPEGBaseline8Bit, JPEGExtended12Bit

LUMA_CHROMA = ("YBR_FULL", "YBR_FULL_422")
RGB_IDS = (b"RGB", b"rgb")  # names of components in the JPEG
START_OF_FRAME = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # JPEG markers
START_OF_SCAN = 0xDA
JPEG_START = b"\xff\xd8"
JPEG_2000_START = b"\xff\x4f\xff\x51"
CODING_STYLE = b"\xff\x52"  # JPEG 2000 marker
# Values of 8 bits. Lossy compression moves a channel that is constant by some units.
NEUTRAL = 128
NEUTRAL_TOLERANCE = 4
# Share of pixels that must agree: the rest is calipers, logos and compression errors.
GRAY_SHARE = 0.95
MIN_CONTRAST = 8  # standard deviation of the first channel, below which pixels tell nothing
# Of RGB that is read as YCbCr, dark and bright pixels lie far outside the range of RGB.
RANGE_TOLERANCE = 24
DARK = 64
BRIGHT = 192
MAX_OUTSIDE_IF_YCC = 0.005
MIN_OUTSIDE_IF_RGB = 0.05
MIN_EXTREME = 0.05  # share of dark and bright pixels, below which RGB stays inside too


class Colors(NamedTuple):
    """Colors of a frame as RGB."""

    values: np.ndarray  # (H, W, 3)
    notes: tuple[str, ...]


def to_rgb(channels: np.ndarray, photometric: str, dataset: Dataset, index: int) -> Colors:
    """Return RGB of decoded channels (H, W, 3), of which the header says `photometric`.

    A note says so if header and pixels disagree.
    """
    is_tagged_ycc = photometric in LUMA_CHROMA
    is_ycc = _codestream_is_ycc(dataset, index)
    if is_ycc is None and channels.dtype == np.uint8:
        syntax = dataset.file_meta.TransferSyntaxUID
        is_jpeg = syntax in (JPEGBaseline8Bit, JPEGExtended12Bit)
        is_ycc = _pixels_are_ycc(channels, is_tagged_ycc, is_jpeg)
    if is_ycc is None:
        is_ycc = is_tagged_ycc
    notes: tuple[str, ...] = ()
    if is_ycc != is_tagged_ycc:
        kind = "YCbCr" if is_ycc else "RGB"
        notes = (f"has colors tagged {photometric} that are {kind}; they were read as {kind}",)
    if is_ycc:
        channels = convert_color_space(channels, "YBR_FULL", "RGB")
    return Colors(channels, notes)


def _codestream_is_ycc(dataset: Dataset, index: int) -> bool | None:
    """Return what a JPEG or JPEG 2000 says of its channels once decoded; None: nothing."""
    if not dataset.file_meta.TransferSyntaxUID.is_encapsulated:
        return None
    frame_count = int(dataset.get("NumberOfFrames") or 1)
    encoded = get_frame(dataset.PixelData, index, number_of_frames=frame_count)
    if encoded.startswith(JPEG_START):
        return _jpeg_is_ycc(encoded)
    if encoded.startswith(JPEG_2000_START):
        # The decoder undoes the transform that the codestream names.
        style = encoded.find(CODING_STYLE)
        return False if style >= 0 and encoded[style + 8 : style + 9] == b"\x01" else None
    return None


def _jpeg_is_ycc(encoded: bytes) -> bool | None:
    adobe_transform: int | None = None
    is_jfif = False
    for marker, payload in _segments(encoded):
        if marker == 0xE0 and payload.startswith(b"JFIF\0"):
            is_jfif = True
        elif marker == 0xEE and payload.startswith(b"Adobe") and len(payload) > 11:
            adobe_transform = payload[11]
        elif marker in START_OF_FRAME and len(payload) >= 15:
            if payload[6:15:3] in RGB_IDS:
                return False
            sampling = payload[7:16:3]
            if sampling[0] != sampling[1]:  # only chroma is stored at a lower resolution
                return True
    if is_jfif:
        return True
    return None if adobe_transform is None else adobe_transform == 1


def _segments(encoded: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield marker and content of the segments of a JPEG before its pixels."""
    start = len(JPEG_START)
    while start + 4 <= len(encoded) and encoded[start] == 0xFF:
        marker = encoded[start + 1]
        if marker == 0xFF:  # fill byte
            start += 1
            continue
        length = int.from_bytes(encoded[start + 2 : start + 4], "big")
        if marker == START_OF_SCAN or length < 2:
            return
        yield marker, encoded[start + 4 : start + 2 + length]
        start += 2 + length


def _pixels_are_ycc(channels: np.ndarray, is_tagged_ycc: bool, is_jpeg: bool) -> bool | None:
    """Return what only one of both color spaces explains; None: both do.

    Lossy JPEG is YCbCr unless told otherwise, so colors that fit YCbCr are evidence there.
    """
    values = channels.astype(np.float32)
    if values[..., 0].std() < MIN_CONTRAST:
        return None
    chroma = np.abs(values[..., 1:] - NEUTRAL).max(axis=2)
    if (chroma <= NEUTRAL_TOLERANCE).mean() >= GRAY_SHARE:
        return True
    spread = values.max(axis=2) - values.min(axis=2)
    if (spread <= 2 * NEUTRAL_TOLERANCE).mean() >= GRAY_SHARE:
        return False
    outside = _share_outside_rgb(values)
    if is_tagged_ycc:
        return False if outside > MIN_OUTSIDE_IF_RGB else None
    if not is_jpeg:
        return None
    extreme = (values[..., 0] < DARK) | (values[..., 0] > BRIGHT)
    is_ycc = outside < MAX_OUTSIDE_IF_YCC and extreme.mean() >= MIN_EXTREME
    return True if is_ycc else None


def _share_outside_rgb(values: np.ndarray) -> float:
    """Return the share of pixels that are no color if read as YCbCr."""
    luma = values[..., 0]
    blue = luma + 1.772 * (values[..., 1] - NEUTRAL)
    red = luma + 1.402 * (values[..., 2] - NEUTRAL)
    lowest = np.minimum(red, blue)
    highest = np.maximum(red, blue)
    is_outside = (lowest < -RANGE_TOLERANCE) | (highest > 255 + RANGE_TOLERANCE)
    return float(is_outside.mean())
