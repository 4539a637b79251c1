"""What TIFFs say in their tags and Pillow does not heed: planes, and which value is white."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from amlp_ray.data.decoders.image_file import decode_image_file
from amlp_ray.errors import DataError

PLANES = np.random.default_rng(0).integers(0, 60000, (10, 8, 12)).astype("<u2")
IMAGEJ = b"ImageJ=1.53t\nimages=10\nslices=10\nmode=grayscale\n\0"


def write_tiff(
    path: Path,
    planes: np.ndarray,
    description: bytes = b"none\0",
    *,
    photometric: int = 1,
    num_strip_planes: int = 1,
    depth: int = 1,
) -> str:
    """Write planes (N, H, W) one after another, with one directory that describes the first."""
    height, width = planes.shape[1:]
    kind = {"u": 1, "i": 2, "f": 3}[planes.dtype.kind]
    start = 8 + 2 + 12 * 12 + 4 + len(description)
    plane_bytes = planes[0].nbytes
    tags = (
        (256, width),
        (257, height),
        (258, planes.itemsize * 8),
        (259, 1),
        (262, photometric),
        (270, start - len(description)),
        (273, start),
        (277, 1),
        (278, height),
        (279, plane_bytes * num_strip_planes),
        (339, kind),
        (32997, depth),
    )
    entries = b""
    for tag, value in tags:
        field_type, count = (2, len(description)) if tag == 270 else (4, 1)
        entries += struct.pack("<HHII", tag, field_type, count, value)
    head = b"II*\0" + struct.pack("<IH", 8, len(tags))
    path.write_bytes(head + entries + bytes(4) + description + planes.tobytes())
    return str(path)


def read(path: str) -> bytes:
    return Path(path).read_bytes()


@pytest.mark.parametrize(
    ("description", "num_strip_planes", "depth"),
    [
        (IMAGEJ, 1, 1),
        (b'{"shape": [10, 8, 12]}\0', 1, 1),
        (b'{"shape": [2, 5, 8, 12], "axes": "TZYX"}\0', 1, 1),
        (b"shape=(10, 8, 12)\0", 1, 1),
        (b"none\0", 10, 1),
        (b"none\0", 1, 10),
    ],
    ids=["ImageJ", "tifffile", "tifffile in 4 dimensions", "old tifffile", "one strip", "depth"],
)
def test_a_stack_of_one_directory_is_refused_with_its_count(
    description: bytes, num_strip_planes: int, depth: int, tmp_path: Path
) -> None:
    path = write_tiff(
        tmp_path / "a.tif", PLANES, description, num_strip_planes=num_strip_planes, depth=depth
    )
    with pytest.raises(DataError, match=r"a\.tif holds 10 frames, but one is accepted"):
        decode_image_file(path, read)


def test_planes_of_metamorph_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "a.stk.tif"
    content = Path(write_tiff(path, PLANES)).read_bytes()
    depth = struct.pack("<HHII", 32997, 4, 1, 1)
    planes = struct.pack("<HHII", 33629, 5, 10, len(content))
    path.write_bytes(content.replace(depth, planes) + struct.pack("<20I", *[1] * 20))
    with pytest.raises(DataError, match="holds 10 frames"):
        decode_image_file(str(path), read)


@pytest.mark.parametrize("description", [IMAGEJ, b'{"shape": [10, 8, 12]}\0', b"none\0"])
def test_a_page_that_was_cut_out_of_a_stack_is_one_image(
    description: bytes, tmp_path: Path
) -> None:
    path = write_tiff(tmp_path / "a.tif", PLANES[:1], description)
    np.testing.assert_array_equal(decode_image_file(path, read).pixels[..., 0], PLANES[0])


@pytest.mark.parametrize("dtype", ["u1", "<u2"])
def test_black_is_zero_at_any_depth(dtype: str, tmp_path: Path) -> None:
    highest = np.iinfo(dtype).max
    shown = np.linspace(0, highest, 96).astype(dtype).reshape(1, 8, 12)
    path = write_tiff(tmp_path / "a.tif", highest - shown, photometric=0)
    np.testing.assert_array_equal(decode_image_file(path, read).pixels[..., 0], shown[0])


@pytest.mark.parametrize("compression", [None, "tiff_lzw"])
@pytest.mark.parametrize("mode", ["1", "L", "I;16"])
def test_no_depth_is_turned_twice(mode: str, compression: str | None, tmp_path: Path) -> None:
    shown = np.zeros((8, 12), np.uint16)
    shown[2, 3] = 65535
    stored = Image.fromarray(65535 - shown)  # Pillow turns what it writes, but not 16 bits
    if mode != "I;16":
        stored = Image.fromarray((shown >> 8).astype(np.uint8)).convert(mode)
    stored.save(tmp_path / "a.tif", compression=compression, tiffinfo={262: 0})
    pixels = decode_image_file(str(tmp_path / "a.tif"), read).pixels[..., 0]
    assert np.argwhere(pixels).tolist() == [[2, 3]]
    assert pixels[2, 3] == (65535 if mode == "I;16" else 255)


def test_white_is_zero_has_no_meaning_in_floats(tmp_path: Path) -> None:
    path = write_tiff(tmp_path / "a.tif", PLANES[:1].astype("<f4"), photometric=0)
    with pytest.raises(DataError, match=r"a\.tif says WhiteIsZero .* export it as BlackIsZero"):
        decode_image_file(path, read)


def test_a_picture_in_transparency_alone_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    picture = Image.new("RGBA", (12, 8), (255, 255, 255, 255))
    picture.putalpha(Image.fromarray((PLANES[0] >> 8).astype(np.uint8)))
    picture.save(path)
    with pytest.raises(DataError, match="shows its picture in the transparency alone"):
        decode_image_file(str(path), read)
