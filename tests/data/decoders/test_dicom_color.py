"""Colors of DICOM files whose header and codec disagree: what was drawn must come out."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from helpers.volumes import dicom, save
from PIL import Image
from pydicom import Dataset
from pydicom.encaps import encapsulate
from pydicom.pixels import convert_color_space
from pydicom.uid import JPEG2000Lossless, JPEGBaseline8Bit

from amlp_ray.config import PrepareConfig
from amlp_ray.data.decoders.dicom import read_dicom
from amlp_ray.data.decoders.frame import Frame
from amlp_ray.data.decoders.image import is_gray
from amlp_ray.data.layouts.item import SourceImage
from amlp_ray.data.path import read_bytes

MARKERS = {
    "none": b"",
    "jfif": b"\xff\xe0\x00\x10JFIF\0\x01\x01\0\0\x01\0\x01\0\0",
    "adobe-ycc": b"\xff\xee\x00\x0eAdobe\0\x64\0\0\0\0\x01",
    "adobe-rgb": b"\xff\xee\x00\x0eAdobe\0\x64\0\0\0\0\x00",
}


def picture(is_gray_picture: bool) -> np.ndarray:
    """A smooth picture (64, 64, 3) with dark and bright parts."""
    channels = 1 if is_gray_picture else 3
    coarse = np.random.default_rng(7).integers(0, 256, (5, 5, channels)).astype(np.uint8)
    coarse = np.broadcast_to(coarse, (5, 5, 3))
    return np.asarray(Image.fromarray(coarse.copy()).resize((64, 64), Image.Resampling.BICUBIC))


def jpeg(pixels: np.ndarray, kind: str, *, marker: str = "none", subsampling: int = 0) -> bytes:
    """Encode as YCbCr or RGB with one application marker, and components named 1, 2, 3."""
    buffer = BytesIO()
    Image.fromarray(pixels).save(
        buffer, "JPEG", quality=95, keep_rgb=kind == "RGB", subsampling=subsampling
    )
    encoded = buffer.getvalue()
    result = bytearray(encoded[:2] + MARKERS[marker])
    start = 2
    while True:
        code = encoded[start + 1]
        end = start + 2 + int.from_bytes(encoded[start + 2 : start + 4], "big")
        segment = bytearray(encoded[start:end])
        if code == 0xC0:
            segment[10:19:3] = bytes([1, 2, 3])
        if code == 0xDA:
            segment[5:11:2] = bytes([1, 2, 3])
        if not 0xE0 <= code <= 0xEF:
            result += segment
        start = end
        if code == 0xDA:
            return bytes(result) + encoded[start:]


def tagged(encoded: bytes, photometric: str, syntax: str = JPEGBaseline8Bit) -> Dataset:
    """Make an ultrasound image of encoded pixels."""
    dataset = dicom(np.zeros((64, 64, 3), np.uint8), PhotometricInterpretation=photometric)
    dataset.file_meta.TransferSyntaxUID = syntax
    dataset.PixelData = encapsulate([encoded + b"\0" * (len(encoded) % 2)])
    dataset["PixelData"].VR = "OB"
    dataset["PixelData"].is_undefined_length = True
    return dataset


def frame_of(dataset: Dataset, folder: Path) -> Frame:
    path = str(save(dataset, folder / "one.dcm"))
    item = SourceImage("i", "dicom", (path,), (), "i")
    (frame,) = read_dicom(item, PrepareConfig(), read_bytes)
    return frame


@pytest.mark.parametrize("is_gray_picture", [True, False])
@pytest.mark.parametrize("photometric", ["RGB", "YBR_FULL_422"])
@pytest.mark.parametrize(
    ("kind", "marker", "subsampling"),
    [
        ("YCbCr", "none", 0),
        ("YCbCr", "none", 2),
        ("YCbCr", "jfif", 0),
        ("YCbCr", "adobe-ycc", 0),
        ("RGB", "none", 0),
        ("RGB", "adobe-rgb", 0),
    ],
)
def test_a_jpeg_is_read_as_it_was_drawn_whatever_its_tag(
    kind: str,
    marker: str,
    subsampling: int,
    photometric: str,
    is_gray_picture: bool,
    tmp_path: Path,
) -> None:
    drawn = picture(is_gray_picture)
    encoded = jpeg(drawn, kind, marker=marker, subsampling=subsampling)
    frame = frame_of(tagged(encoded, photometric), tmp_path)
    error = np.abs(frame.image.astype(int) - drawn)
    assert error.mean() < 4
    assert is_gray(frame.image) == is_gray_picture
    is_tag_right = photometric.startswith("YBR") == (kind == "YCbCr")
    if marker != "jfif":  # pydicom corrects the tag itself
        assert [f"that are {kind}; they were" in note for note in frame.notes] == [True] * (
            not is_tag_right
        )


def test_jpeg_2000_that_was_transformed_is_rgb_once_decoded(tmp_path: Path) -> None:
    drawn = picture(False)
    buffer = BytesIO()
    Image.fromarray(drawn).save(buffer, "JPEG2000", mct=1, irreversible=False, no_jp2=True)
    frame = frame_of(tagged(buffer.getvalue(), "YBR_FULL", JPEG2000Lossless), tmp_path)
    np.testing.assert_array_equal(frame.image, drawn)


def test_uncompressed_gray_as_ycbcr_under_the_tag_rgb_is_gray(tmp_path: Path) -> None:
    drawn = picture(True)
    stored = convert_color_space(drawn.copy(), "RGB", "YBR_FULL")
    frame = frame_of(dicom(stored), tmp_path)
    np.testing.assert_array_equal(frame.image, drawn)


@pytest.mark.parametrize("color", [(200, 30, 30), (20, 120, 120), (128, 128, 128), (0, 0, 0)])
def test_a_picture_of_one_color_stays_as_its_header_says(
    color: tuple[int, int, int], tmp_path: Path
) -> None:
    pixels = np.full((16, 16, 3), color, np.uint8)
    frame = frame_of(dicom(pixels), tmp_path)
    np.testing.assert_array_equal(frame.image, pixels)
    assert frame.notes == ()
