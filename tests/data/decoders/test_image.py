from __future__ import annotations

import io
import json
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from amlp_ray.config import PrepareConfig
from amlp_ray.data.decoders import Frame, read_frames
from amlp_ray.data.decoders.image import is_gray, to_channels
from amlp_ray.data.decoders.image_file import MAX_PIXELS
from amlp_ray.data.decoders.masks import select_lesion
from amlp_ray.data.layouts import SourceImage, find_items
from amlp_ray.errors import DataError

RAMP = np.arange(24, dtype=np.uint8).reshape(4, 6) * 10
COLOR = np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8)


def frame_of(image: Path, *masks: Path, outlines: str = "", **config: Any) -> Frame:
    item = SourceImage(
        "x", "picture", (str(image),), tuple(map(str, masks)), image.name, outlines=outlines
    )
    (frame,) = read_frames(item, PrepareConfig(**config))
    return frame


def save(path: Path, pixels: np.ndarray, **options: Any) -> Path:
    if path.suffix == ".npy":
        np.save(path, pixels, allow_pickle=True)
    else:
        Image.fromarray(pixels).save(path, **options)
    return path


def tiff(path: Path, pixels: np.ndarray, order: str = "<") -> Path:
    """An uncompressed TIFF of any number type and channels; Pillow writes few of these."""
    height, width = pixels.shape[:2]
    channels = pixels.shape[2] if pixels.ndim == 3 else 1
    data = pixels.astype(pixels.dtype.newbyteorder(order)).tobytes()
    kind = {"u": 1, "i": 2, "f": 3}[pixels.dtype.kind]
    tags = (
        (256, width),
        (257, height),
        (258, pixels.itemsize * 8),
        (259, 1),
        (262, 2 if channels == 3 else 1),
    )
    tags += ((273, 8), (277, channels), (278, height), (279, len(data)), (339, kind))
    entries = b"".join(struct.pack(f"{order}HHII", tag, 4, 1, value) for tag, value in tags)
    header = struct.pack(f"{order}2sHI", b"II" if order == "<" else b"MM", 42, 8 + len(data))
    path.write_bytes(header + data + struct.pack(f"{order}H", len(tags)) + entries + bytes(4))
    return path


def png(
    path: Path, pixels: np.ndarray, bits: int, color_type: int, size: tuple[int, int] | None = None
) -> Path:
    """A PNG from rows already packed, for kinds that Pillow does not write."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        )

    height, width = size or pixels.shape[:2]
    rows = b"".join(b"\0" + row.astype(row.dtype.newbyteorder(">")).tobytes() for row in pixels)
    header = struct.pack(">IIBBBBB", width, height, bits, color_type, 0, 0, 0)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )
    return path


# Images


@pytest.mark.parametrize(
    ("mode", "channels"),
    [("L", 1), ("1", 1), ("LA", 1), ("RGB", 3), ("RGBA", 3), ("P", 3), ("I;16", 1)],
)
def test_every_mode_becomes_height_width_channels(mode: str, channels: int, tmp_path: Path) -> None:
    path = tmp_path / "a [1] (x)\n.png"
    picture = (
        Image.fromarray(RAMP.astype(np.uint16) * 256)
        if mode == "I;16"
        else Image.fromarray(RAMP).convert(mode)
    )
    picture.save(path)
    frame = frame_of(path)
    assert frame.image.shape == (4, 6, channels)
    assert frame.image.dtype == (np.uint16 if mode == "I;16" else np.uint8)
    assert frame.mask is None
    assert frame.notes == ()
    if mode != "1":
        np.testing.assert_array_equal(frame.image[..., 0] // (256 if mode == "I;16" else 1), RAMP)


@pytest.mark.parametrize("suffix", ["png", "bmp", "tif", "webp", "ppm", "jp2", "gif"])
def test_lossless_formats_are_exact(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"a.{suffix}"
    options: dict[str, Any] = {"webp": {"lossless": True}, "jp2": {"irreversible": False}}.get(
        suffix, {}
    )
    Image.fromarray(COLOR).save(path, **options)
    np.testing.assert_array_equal(frame_of(path).image, COLOR)


@pytest.mark.parametrize("suffix", ["jpg", "tif"])
def test_jpeg_is_what_pillow_makes_of_it(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(COLOR).save(path, compression="jpeg") if suffix == "tif" else Image.fromarray(
        COLOR
    ).save(path)
    with Image.open(path) as image:
        np.testing.assert_array_equal(frame_of(path).image, np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int16", "float32"])
def test_number_types_are_kept_as_stored(dtype: str, order: str, tmp_path: Path) -> None:
    pixels = (RAMP.astype(dtype) - (3 if dtype in ("int16", "float32") else 0)).astype(dtype)
    for path in (
        tiff(tmp_path / "a.tif", pixels, order),
        save(tmp_path / "a.npy", pixels.astype(order + pixels.dtype.str[1:])),
    ):
        image = frame_of(path).image
        assert image.dtype == np.dtype(dtype)
        np.testing.assert_array_equal(image[..., 0], pixels)


@pytest.mark.parametrize(
    ("values", "dtype", "expected"),
    [
        ([0, 1], "bool", "uint8"),
        ([0, 255], "int32", "uint8"),
        ([0, 256], "int64", "uint16"),
        ([-1, 256], "int32", "int16"),
        ([-1, 2], "int8", "int16"),
        ([0, 65536], "uint32", "float32"),
        ([-1, 40000], "int32", "float32"),
        ([0.5, 2], "float16", "float32"),
        ([0.1, 2], "float64", "float32"),
    ],
)
def test_other_number_types_become_the_smallest_that_holds_them(
    values: list[float], dtype: str, expected: str, tmp_path: Path
) -> None:
    image = frame_of(save(tmp_path / "a.npy", np.array([values], dtype))).image
    assert image.dtype == np.dtype(expected)
    np.testing.assert_array_equal(image[0, :, 0], np.array(values, dtype).astype(expected))


def test_32_bit_integers_that_fit_are_16_bit(tmp_path: Path) -> None:
    image = frame_of(save(tmp_path / "a.tif", RAMP.astype(np.int32) * 100)).image
    assert image.dtype == np.uint16
    np.testing.assert_array_equal(image[..., 0], RAMP.astype(int) * 100)


def test_arrays_keep_channels_and_column_order(tmp_path: Path) -> None:
    pixels = np.asfortranarray(np.arange(4 * 6 * 5, dtype=np.uint16).reshape(4, 6, 5))
    np.testing.assert_array_equal(frame_of(save(tmp_path / "a.npy", pixels)).image, pixels)


def test_12_and_16_bit_grays_come_in_their_own_values(tmp_path: Path) -> None:
    pixels = RAMP.astype(np.uint16) * 16
    (tmp_path / "a.pgm").write_bytes(b"P5 6 4 4095\n" + pixels.astype(">u2").tobytes())
    np.testing.assert_array_equal(frame_of(tmp_path / "a.pgm").image[..., 0], pixels)
    np.testing.assert_array_equal(frame_of(save(tmp_path / "a.jp2", pixels)).image[..., 0], pixels)


def test_cmyk_becomes_rgb_and_is_noted(tmp_path: Path) -> None:
    Image.fromarray(COLOR).convert("CMYK").save(tmp_path / "a.tif")
    frame = frame_of(tmp_path / "a.tif")
    np.testing.assert_array_equal(frame.image, COLOR)
    assert frame.notes == ("is CMYK: converted to RGB",)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_is_dropped_and_noted(mode: str, tmp_path: Path) -> None:
    if mode == "P":
        Image.fromarray(RAMP).convert("P").save(tmp_path / "a.png", transparency=0)
    else:
        picture = Image.fromarray(RAMP).convert(mode)
        picture.putalpha(Image.fromarray(np.where(RAMP > 90, 255, 254).astype(np.uint8)))
        picture.save(tmp_path / "a.png")
    frame = frame_of(tmp_path / "a.png")
    assert frame.notes == ("has transparent pixels: transparency was ignored",)
    np.testing.assert_array_equal(frame.image[..., 0], RAMP)


@pytest.mark.parametrize("suffix", ["png", "jpg", "tif", "webp"])
@pytest.mark.parametrize("orientation", [3, 6, 7, 8])
def test_orientation_is_noted_but_not_applied(
    suffix: str, orientation: int, tmp_path: Path
) -> None:
    exif = Image.Exif()
    exif[274] = orientation
    path = tmp_path / f"a.{suffix}"
    options: dict[str, Any] = {"tif": {"compression": "tiff_lzw"}, "webp": {"lossless": True}}.get(
        suffix, {}
    )
    Image.fromarray(COLOR).save(path, exif=exif, **options)
    frame = frame_of(path)
    assert frame.notes == (
        f"has orientation {orientation} in its header: not applied, so that masks fit",
    )
    if suffix == "jpg":
        assert frame.image.shape == COLOR.shape
    else:
        np.testing.assert_array_equal(frame.image, COLOR)


def test_the_first_picture_of_a_camera_file_is_taken(tmp_path: Path) -> None:
    first = Image.fromarray(COLOR)
    first.save(tmp_path / "a.jpg", "MPO", save_all=True, append_images=[Image.new("RGB", (3, 2))])
    frame = frame_of(tmp_path / "a.jpg")
    assert frame.image.shape == COLOR.shape
    assert frame.notes == ("holds 2 pictures: the first, which viewers show, was taken",)


# Masks


def test_masks_are_united_and_alpha_ignored(tmp_path: Path) -> None:
    bit = np.zeros((4, 6), bool)
    bit[0, 0] = True
    opaque = np.zeros((4, 6, 4), np.uint8)
    opaque[..., 3] = 255
    opaque[3, 5, 1] = 1
    masks = save(tmp_path / "bit.png", bit), save(tmp_path / "rgba.png", opaque)
    mask = frame_of(save(tmp_path / "a.png", RAMP), *masks).mask
    assert mask is not None
    assert mask.dtype == np.uint8
    assert np.argwhere(mask).tolist() == [[0, 0], [3, 5]]
    assert mask.max() == 1


def test_jpeg_noise_is_no_lesion(tmp_path: Path) -> None:
    lesion = np.zeros((64, 64), np.uint8)
    lesion[20:45, 13:50] = 255
    path = save(
        tmp_path / "m.png", lesion, format="JPEG", quality=50
    )  # named wrongly: the content decides
    with Image.open(path) as image:
        assert (np.asarray(image) > 0).sum() > 1.05 * (lesion > 0).sum()
    np.testing.assert_array_equal(frame_of(path, path).mask, lesion > 0)
    np.testing.assert_array_equal(frame_of(path, path, lesion_labels=(255,)).mask, lesion > 0)
    with pytest.raises(
        DataError, match=r"m\.png is a JPEG, which blurs label values, so lesion_labels 1, 2 cannot"
    ):
        frame_of(path, path, lesion_labels=(1, 2))


def test_an_empty_mask_is_labeled_and_no_mask_is_not(tmp_path: Path) -> None:
    image = save(tmp_path / "a.png", RAMP)
    mask = frame_of(image, save(tmp_path / "m.png", np.zeros_like(RAMP))).mask
    assert mask is not None
    assert not mask.any()
    assert frame_of(image).mask is None


LABELS = np.array([[0, 1, 2, 3]] * 4, np.uint8)


def _two_bit(path: Path) -> Path:
    return png(path, np.array([[0b00011011]] * 4, np.uint8), 2, 0, (4, 4))


def _palette(path: Path) -> Path:
    picture = Image.fromarray(LABELS).copy()
    picture.putpalette([0, 0, 0, 128, 0, 0, 0, 128, 0, 128, 128, 0])
    picture.save(path)
    return path


def _gray_palette(path: Path) -> Path:
    picture = Image.fromarray(3 - LABELS)  # the palette runs backwards, as optimizers may leave it
    picture.putpalette([value for gray in (3, 2, 1, 0) for value in (gray, gray, gray)])
    picture.save(path)
    return path


@pytest.mark.parametrize(
    "write",
    [
        lambda path: save(path, LABELS),
        lambda path: save(path, np.repeat(LABELS[:, :, None], 3, axis=2)),
        lambda path: save(path, LABELS.astype(np.uint16)),
        lambda path: save(path.with_suffix(".npy"), LABELS.astype(np.int64)),
        lambda path: save(path.with_suffix(".npy"), LABELS.astype(np.float64)),
        _two_bit,
        _palette,
        _gray_palette,
    ],
    ids=[
        "gray",
        "equal channels",
        "16 bits",
        "int64",
        "float64",
        "2 bits",
        "palette",
        "gray palette",
    ],
)
def test_lesion_labels_are_the_values_of_every_kind_of_mask(
    write: Callable[[Path], Path], tmp_path: Path
) -> None:
    image = save(tmp_path / "a.png", LABELS)
    mask = write(tmp_path / "m.png")
    frame = frame_of(image, mask, lesion_labels=(1, 3))
    np.testing.assert_array_equal(frame.mask, np.isin(LABELS, (1, 3)))
    np.testing.assert_array_equal(frame_of(image, mask).mask, LABELS > 0)
    problem = "has the values 1, 2, 3 but lesion_labels are 7, 9: counted as no lesion"
    note = f"its mask {mask.name} {problem}"
    frame = frame_of(image, mask, lesion_labels=(7, 9))
    assert frame.notes == (note,)
    assert frame.mask is not None
    assert not frame.mask.any()


@pytest.mark.parametrize("label", [1, 255])
def test_a_1_bit_mask_is_1_or_255(label: int, tmp_path: Path) -> None:
    image = save(tmp_path / "a.png", LABELS)
    mask = save(tmp_path / "m.png", LABELS > 1)
    np.testing.assert_array_equal(frame_of(image, mask, lesion_labels=(label,)).mask, LABELS > 1)


def test_labels_are_all_above_zero_or_the_wanted() -> None:
    labels = np.array([[-1, 0], [2, 7]], np.int32)
    assert select_lesion(labels, ())[0].tolist() == [[0, 0], [1, 1]]
    assert select_lesion(labels, (7,))[0].tolist() == [[0, 0], [0, 1]]
    assert select_lesion(np.zeros((2, 2)), (7,))[1] == ()
    assert select_lesion(np.arange(20), (99,))[1][0].startswith(
        "has the values 1, 2, 3, 4, 5, 6, 7, 8 and 11 more but"
    )


def test_coco_outlines_are_drawn_as_pycocotools_does(tmp_path: Path) -> None:
    from pycocotools import mask as coco

    image = save(tmp_path / "a.png", np.zeros((40, 60), np.uint8))
    polygons = [[5.0, 5.0, 30.5, 8.0, 20.0, 30.0], [40, 5, 50, 5, 50, 15, 40, 15]]
    hidden = np.zeros((40, 60), np.uint8, order="F")
    hidden[30:35, 10:12] = 1
    packed = coco.encode(hidden)
    runs = [10 * 40 + 30, 5, 35, 5, 40 * 60 - (10 * 40 + 75)]
    expected = coco.decode(coco.merge(coco.frPyObjects(polygons, 40, 60)))
    size = [40, 60]
    for extra in (
        {"size": size, "counts": packed["counts"].decode()},
        {"size": size, "counts": runs},
    ):
        outlines = json.dumps({"height": 40, "width": None, "segmentations": [polygons, extra]})
        np.testing.assert_array_equal(frame_of(image, outlines=outlines).mask, expected | hidden)
    frame = frame_of(image, outlines=json.dumps({"height": 40, "width": 60, "segmentations": []}))
    assert frame.mask is not None
    assert not frame.mask.any()


@pytest.mark.parametrize(
    ("segmentation", "reason"),
    [
        ([[1, 1, 5]], "is no polygon of at least three points"),
        ([[1, 1, 5, 1, 1, "x"]], "has coordinates that are no numbers"),
        ([[1, 1, 5, 1, 1e9, 5]], r"reaches to 1e\+09, far outside the picture of 6x4 pixels"),
        ("text", "is neither a list of polygons nor run lengths"),
        ({"size": [4, 6], "counts": [1, 2]}, "has run lengths for 3 of 24 pixels"),
        (
            {"size": [6, 4], "counts": [24]},
            r"has run lengths for the size \[6, 4\], but \[4, 6\] is needed",
        ),
        ({"size": [4, 6], "counts": "PPPPPPYa0"}, "run lengths are damaged"),
    ],
)
def test_bad_outlines_are_refused_by_name(segmentation: Any, reason: str, tmp_path: Path) -> None:
    outlines = json.dumps({"height": 4, "width": 6, "segmentations": [segmentation]})
    with pytest.raises(DataError, match=rf"a\.png has an outline .*{reason}"):
        frame_of(save(tmp_path / "a.png", RAMP), outlines=outlines)


def test_outlines_of_another_size_are_refused(tmp_path: Path) -> None:
    outlines = json.dumps({"height": 8, "width": 12, "segmentations": []})
    with pytest.raises(
        DataError, match=r"a\.png has 6x4 pixels, but its outlines were drawn on 12x8"
    ):
        frame_of(save(tmp_path / "a.png", RAMP), outlines=outlines)


# Real images


@pytest.mark.real
@pytest.mark.parametrize("folder", ["busi", "busi_native", "isic2017"])
def test_real_images_and_masks_are_what_pillow_reads(folder: str, real_data: Path) -> None:
    for item in find_items(PrepareConfig(), real_data / folder).items:
        (frame,) = read_frames(item, PrepareConfig())
        with Image.open(item.images[0]) as image:
            np.testing.assert_array_equal(frame.image, np.asarray(image))
        expected = np.zeros(frame.image.shape[:2], bool)
        for path in item.masks:
            with Image.open(path) as mask:
                expected |= np.asarray(mask.convert("RGB")).any(axis=2)
        np.testing.assert_array_equal(frame.mask, expected)
        assert frame.notes == ()


# Bad pictures: one sentence each


def _cut(path: Path, kind: str, share: float = 0.5, **options: Any) -> Path:
    pixels = np.random.default_rng(0).integers(0, 256, (50, 50, 3), dtype=np.uint8)
    save(path, pixels, format=kind, **options)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    return path


def _bytes(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def _link(path: Path) -> Path:
    path.symlink_to("nowhere.png")
    return path


def _frames(path: Path, kind: str) -> Path:
    first, *rest = (Image.new("L", (6, 4), i * 50) for i in range(3))
    first.save(path, kind, save_all=True, append_images=rest)
    return path


def _npy(path: Path, pixels: np.ndarray) -> Path:
    return save(path.with_suffix(".npy"), pixels)


def _cut_npy(path: Path) -> Path:
    _npy(path, RAMP)
    return _bytes(path, path.with_suffix(".npy").read_bytes()[:-3])


def _claiming_npy(path: Path) -> Path:
    header = b"{'descr': '|u1', 'fortran_order': False, 'shape': (%d, %d)}" % (10**6, 10**6)
    return _bytes(path, b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header)


DEEP = np.zeros((4, 6, 3), np.uint16)
BAD: dict[str, tuple[Callable[[Path], Path], str]] = {
    "text": (
        lambda p: _bytes(p, b"not an image"),
        r"is not a picture, but PNG, JPEG, .* needed; convert, replace or",
    ),
    "page": (lambda p: _bytes(p, b"<!DOCTYPE html>"), "is a web page or XML"),
    "dicom": (
        lambda p: _bytes(p, bytes(128) + b"DICM"),
        "is a DICOM file .layout dicom reads those",
    ),
    "heic": (lambda p: _bytes(p, b"\0\0\0\x18ftypheic"), "is a HEIC photograph, but PNG"),
    "lfs": (
        lambda p: _bytes(p, b"version https://git-lfs.github.com/spec/v1"),
        "is a Git LFS pointer",
    ),
    "empty": (
        lambda p: _bytes(p, b""),
        r"is empty \(0 bytes\), but a picture is needed; copy it again or remove it",
    ),
    "gone": (lambda p: p, "does not exist; check the path"),
    "link": (
        _link,
        r"is a link to nowhere\.png, which does not exist; bring the file there or remove the link",
    ),
    "folder": (lambda p: p.mkdir() or p, r"cannot be read \(it is a folder\)"),
    "cut png": (
        lambda p: _cut(p, "PNG"),
        r"is a PNG that is damaged, cut off .*\(image file is truncated",
    ),
    "cut jpg": (
        lambda p: _cut(p, "JPEG"),
        r"is a JPEG that is damaged, cut off .*\(image file is truncated",
    ),
    "cut header": (
        lambda p: _cut(p, "JPEG", 0.005),
        "is a JPEG that is damaged, cut off or of a rare kind",
    ),
    "cut tif": (lambda p: _cut(p, "TIFF"), "is a TIFF that is damaged, cut off"),
    "cut lzw": (
        lambda p: _cut(p, "TIFF", compression="tiff_lzw"),
        "is a TIFF that is damaged, cut off",
    ),
    "cut tiff-jpg": (
        lambda p: _cut(p, "TIFF", 0.999, compression="jpeg"),
        "is a TIFF that is damaged, cut off",
    ),
    "cut bmp": (lambda p: _cut(p, "BMP"), "is a BMP that is damaged, cut off"),
    "cut gif": (lambda p: _cut(p, "GIF"), "is a GIF that is damaged, cut off"),
    "cut webp": (lambda p: _cut(p, "WEBP"), "is a WebP that is damaged, cut off"),
    "cut jp2": (lambda p: _cut(p, "JPEG2000"), "is a JPEG 2000 file that is damaged, cut off"),
    "gif frames": (
        lambda p: _frames(p, "GIF"),
        "holds 3 frames, but one is accepted; export each frame",
    ),
    "tif pages": (lambda p: _frames(p, "TIFF"), "holds 3 frames, but one is accepted"),
    "apng": (lambda p: _frames(p, "PNG"), "holds 3 frames, but one is accepted"),
    "rgb16 png": (
        lambda p: png(p, DEEP, 16, 2),
        "has several channels of 16 bits, which would be cut to 8; save it",
    ),
    "la16 png": (lambda p: png(p, DEEP[..., :2], 16, 4), "has several channels of 16 bits"),
    "rgba16 png": (
        lambda p: png(p, np.zeros((4, 6, 4), np.uint16), 16, 6),
        "has several channels of 16 bits",
    ),
    "rgb16 tif": (lambda p: tiff(p, DEEP), "has several channels of 16 bits"),
    "rgb16 ppm": (
        lambda p: _bytes(p, b"P6 6 4 65535\n" + bytes(144)),
        "has several channels of 16 bits",
    ),
    "float tif": (
        lambda p: tiff(p, DEEP.astype(np.float32)),
        r"is a TIFF .*\(as \.npy if it has several channels",
    ),
    "double tif": (
        lambda p: tiff(p, RAMP.astype(np.float64)),
        r"is a TIFF .*\(as \.npy if it has several channels",
    ),
    "lab": (
        lambda p: Image.new("LAB", (6, 4)).save(p, "TIFF") or p,
        "has pixels of kind 'LAB', but gray and RGB are",
    ),
    "bomb": (
        lambda p: png(p, RAMP, 8, 0, (13000, 12000)),
        f"has 12000x13000 pixels, but {MAX_PIXELS:,} are the most",
    ),
    "huge bomb": (
        lambda p: png(p, RAMP, 8, 0, (10**5, 10**5)),
        f"claims more than {MAX_PIXELS:,} pixels, but",
    ),
    "nan tif": (
        lambda p: tiff(p, np.full((4, 6), np.nan, np.float32)),
        "has NaN or infinite values in 24 of 24 pixels",
    ),
    "inf npy": (
        lambda p: _npy(p, np.array([[np.inf, 1.0]])),
        "has NaN or infinite values in 1 of 2 pixels",
    ),
    "over npy": (
        lambda p: _npy(p, np.array([[1e300, 1.0]])),
        "has NaN or infinite values in 1 of 2 pixels",
    ),
    "big npy": (
        lambda p: _npy(p, np.array([[0, 2**24 + 1]])),
        "holds whole numbers from 0 to 16777217, but at most",
    ),
    "object npy": (
        lambda p: _npy(p, np.array([[{}]], object)),
        "holds Python objects, but whole and real numbers",
    ),
    "complex npy": (
        lambda p: _npy(p, np.zeros((2, 2), complex)),
        "holds values of type complex128",
    ),
    "4d npy": (
        lambda p: _npy(p, np.zeros((1, 2, 3, 4))),
        r"has the shape \(1, 2, 3, 4\), but \(height, width\) or",
    ),
    "chw npy": (
        lambda p: _npy(p, np.zeros((3, 100, 100))),
        r"has the shape \(3, 100, 100\).*transpose it",
    ),
    "no npy": (lambda p: _npy(p, np.zeros((0, 5))), r"has the shape \(0, 5\)"),
    "cut npy": (_cut_npy, "is cut off: 21 of 24 bytes of its array are there"),
    "npy bomb": (_claiming_npy, "has 1000000x1000000 pixels, but"),
    "npy header": (
        lambda p: _bytes(p, b"\x93NUMPY\x01\x00\x08\x00{'x': 1}"),
        r"is a damaged \.npy file",
    ),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_picture_is_one_sentence_that_names_it(
    kind: str, tmp_path: Path, capfd: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder
) -> None:
    make, expected = BAD[kind]
    path = make(tmp_path / "broken [1].png")
    with pytest.raises(DataError, match=expected) as caught:
        frame_of(path)
    message = str(caught.value)
    assert message.startswith(f"{path} ")
    assert message.endswith(".")
    assert "\n" not in message
    assert capfd.readouterr() == ("", "")
    assert not recwarn.list


def test_a_bad_mask_is_named_too(tmp_path: Path) -> None:
    image = save(tmp_path / "a.png", RAMP)
    with pytest.raises(
        DataError, match=r"wide\.png is a mask of 7x4 pixels, but its image has 6x4"
    ):
        frame_of(image, save(tmp_path / "wide.png", np.zeros((4, 7), bool)))
    with pytest.raises(DataError, match=r"m\.png is a PNG that is damaged"):
        frame_of(image, _cut(tmp_path / "m.png", "PNG"))
    with pytest.raises(DataError, match=r"n\.npy is a mask with NaN"):
        frame_of(image, save(tmp_path / "n.npy", np.full((4, 6), np.nan)))
    with pytest.raises(
        DataError, match=r"c\.png is a mask in colors, but lesion_labels need one value a pixel"
    ):
        frame_of(image, save(tmp_path / "c.png", COLOR), lesion_labels=(1,))


def test_a_file_that_may_not_be_read_is_named(tmp_path: Path) -> None:
    path = save(tmp_path / "a.png", RAMP)
    path.chmod(0)
    if os.geteuid():
        with pytest.raises(DataError, match=r"a\.png may not be read \(permission denied\)"):
            frame_of(path)

    def deny(path: str) -> bytes:  # what root meets on a network drive
        raise PermissionError(13, "Permission denied", path)

    item = SourceImage("x", "picture", (str(path),), (), "a.png")
    with pytest.raises(
        DataError, match=r"a\.png may not be read \(permission denied\); give yourself the right"
    ):
        next(read_frames(item, PrepareConfig(), deny))


def test_damaged_exif_and_unknown_tags_do_no_harm(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    content = io.BytesIO()
    Image.fromarray(RAMP).save(content, "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\xff\xff\x12\x01")
    frame = frame_of(_bytes(tmp_path / "a.jpg", content.getvalue()))
    assert frame.image.shape == (4, 6, 1)
    assert capfd.readouterr() == ("", "")


# Channels


def test_gray_allows_small_colored_marks_only() -> None:
    image = np.repeat(
        np.random.default_rng(0).integers(0, 200, (100, 100, 1), dtype=np.uint8), 3, axis=2
    )
    for scale, dtype in ((1.0, np.uint8), (257.0, np.uint16), (1 / 255, np.float32)):
        marked = image.copy()
        assert is_gray((marked * scale).astype(dtype))
        marked[:10, :9, 0] = 255
        marked[:10, :9, 1:] = 0
        assert is_gray((marked * scale).astype(dtype))  # 0.9 %: calipers
        marked[:10, :12, 0] = 255
        marked[:10, :12, 1:] = 0
        assert not is_gray((marked * scale).astype(dtype))  # 1.2 %


def test_only_three_channels_can_be_colors() -> None:
    assert is_gray(np.zeros((2, 2, 1), np.uint8))
    assert not is_gray(np.zeros((2, 2, 4), np.uint8))


def test_gray_survives_the_way_to_one_channel_and_back() -> None:
    gray = np.repeat(np.arange(256, dtype=np.uint8).reshape(16, 16, 1), 3, axis=2)
    for image in (gray, gray.astype(np.uint16) * 257, gray.astype(np.int16) - 100):
        single = to_channels(image, 1)
        assert single.dtype == image.dtype
        np.testing.assert_array_equal(single, image[..., :1])
        np.testing.assert_array_equal(to_channels(single, 3), image)


def test_luma_is_pillows() -> None:
    expected = np.asarray(Image.fromarray(COLOR).convert("L"))
    np.testing.assert_array_equal(to_channels(COLOR, 1)[..., 0], expected)
    assert np.abs(to_channels(COLOR.astype(np.float32), 1)[..., 0] - expected).max() <= 1


@pytest.mark.parametrize(("channels", "target"), [(4, 3), (4, 1), (2, 1), (1, 4), (3, 4)])
def test_other_changes_of_channels_are_refused(channels: int, target: int) -> None:
    with pytest.raises(
        DataError, match=f"image of {channels} channels cannot become one of {target}"
    ):
        to_channels(np.zeros((2, 2, channels), np.uint8), target)
