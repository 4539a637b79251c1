"""The content of a picture file -> an array (H, W, C) in the file's own values, or one sentence why not.

Pillow decodes all but `.npy`. It is told which formats to try, so that no picture starts another program (EPS does),
and kept from what it does in silence: cutting 16-bit colours to 8, turning TIFFs by their orientation tag, and
stretching 2- and 4-bit greys, which matters where these are labels.
"""

from __future__ import annotations

import io
import logging
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageFile

from amlp_ray.errors import DataError
from amlp_ray.utils.silence import quiet_stderr

MAX_PIXELS = 150_000_000  # 12000 x 12500; a small file can claim any size, and decoding one of more takes gigabytes
FORMATS = ("PNG", "JPEG", "TIFF", "BMP", "GIF", "WEBP", "PPM", "JPEG2000")
ACCEPTED = "PNG, JPEG, TIFF, BMP, GIF, WebP, PPM, JPEG 2000 or a .npy array"
COLOUR_MODES = ("RGB", "RGBA", "RGBX", "P", "PA", "CMYK", "YCbCr")
WIDE_MODES = (
    "I;16",
    "I;16B",
    "I;16L",
    "I;16N",
    "I",
    "F",
)  # Pillow's one-channel modes of more than 8 bits
ORIENTATION = 274  # tag number
NPY = b"\x93NUMPY"
_BOMB_ADVICE = f"but {MAX_PIXELS:,} are the most; scale it down, cut it into parts, or remove it."

# What turns a picture back that Pillow turned by its orientation tag; all but quarter turns undo themselves.
_TURN_BACK = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}
# Starts of files that stand in for pictures in practice, as (offset, bytes, name).
_KNOWN = (
    (0, b"\x89PNG", "PNG"),
    (0, b"\xff\xd8\xff", "JPEG"),
    (0, b"II*\0", "TIFF"),
    (0, b"MM\0*", "TIFF"),
    (0, b"II+\0", "TIFF"),
    (0, b"GIF8", "GIF"),
    (0, b"BM", "BMP"),
    (0, b"\0\0\0\x0cjP", "JPEG 2000 file"),
    (8, b"WEBP", "WebP"),
)
_OTHERS = (
    (128, b"DICM", "a DICOM file (layout dicom reads those)"),
    (344, b"n+1\0", "a NIfTI file (layout nifti reads those)"),
    (4, b"ftypheic", "a HEIC photograph"),
    (4, b"ftypmif1", "a HEIC photograph"),
    (4, b"ftypavif", "an AVIF picture"),
    (0, b"%PDF", "a PDF file"),
    (0, b"PK\x03\x04", "a ZIP file"),
    (0, b"\x1f\x8b", "a gzip file"),
    (0, b"version https://git-lfs", "a Git LFS pointer, not the picture itself"),
    (0, b"<", "a web page or XML, as a failed download leaves"),
)

logging.getLogger("PIL").setLevel(logging.CRITICAL)  # what it logs is said in our sentences


class Raster(NamedTuple):
    """A decoded picture or mask."""

    kind: str  # Pillow's name of the format, or "npy"
    pixels: np.ndarray  # (H, W, C), any numeric type
    notes: tuple[
        str, ...
    ] = ()  # what was repaired or left out, as sentences without the file's name
    is_bit: bool = False  # one bit a pixel


def read_raster(path: str, read: Callable[[str], bytes], *, labels: bool = False) -> Raster:
    """Read and decode a picture. Alpha is dropped; palettes, CMYK and YCbCr become RGB.

    Args:
        labels: the values name classes, so a coloured palette gives its indices, a 1-bit picture 0 and 1, and greys of
            fewer than 8 bits are not stretched to 255.

    Raises:
        DataError: the file cannot be read, is no picture or a damaged one, or holds what an array here cannot.
    """
    content = _content(path, read)
    if content.startswith(NPY):
        return Raster("npy", _npy(path, content))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return _pillow(path, content, labels)
    except (DataError, MemoryError):
        raise
    except Image.DecompressionBombError:
        raise DataError(f"{path} claims more than {MAX_PIXELS:,} pixels, {_BOMB_ADVICE}") from None
    except (
        Exception
    ) as error:  # Pillow's readers raise many types on damaged files, and all mean the same here
        raise DataError(f"{path} is {_fault_of(content, error)}") from None


def _content(path: str, read: Callable[[str], bytes]) -> bytes:
    try:
        content = read(path)
    except FileNotFoundError:
        local = Path(path)
        if "://" not in path and local.is_symlink():
            found = f"is a link to {local.readlink()}, which does not exist; bring the file there or remove the link"
        else:
            found = "does not exist; check the path, or prepare again if it was moved since"
        raise DataError(f"{path} {found}.") from None
    except PermissionError:
        raise DataError(
            f"{path} may not be read (permission denied); give yourself the right to read it."
        ) from None
    except OSError as error:
        raise DataError(
            f"{path} cannot be read ({_brief(error)}); check the disk or the link."
        ) from None
    if not content:
        raise DataError(
            f"{path} is empty (0 bytes), but a picture is needed; copy it again or remove it."
        )
    return content


def _fault_of(content: bytes, error: Exception) -> str:
    """What a file is that no decoder could read, and what to do, after "is"."""
    kind = next((name for at, start, name in _KNOWN if content.startswith(start, at)), None)
    if kind is None:
        other = next(
            (name for at, start, name in _OTHERS if content.startswith(start, at)), "not a picture"
        )
        return f"{other}, but {ACCEPTED} is needed; convert, replace or remove it."
    reason = (
        "its header fits no kind that can be read"
        if "cannot identify" in str(error)
        else _brief(error)
    )
    advice = " (as .npy if it has several channels of 16 bits or floats)" if kind == "TIFF" else ""
    return f"a {kind} that is damaged, cut off or of a rare kind ({reason}); copy or export it again{advice}."


def _pillow(path: str, content: bytes, labels: bool) -> Raster:
    with Image.open(io.BytesIO(content), formats=FORMATS) as image:
        if image.width * image.height > MAX_PIXELS:
            raise DataError(f"{path} has {image.width}x{image.height} pixels, {_BOMB_ADVICE}")
        kind, notes = str(image.format), []
        frames = getattr(image, "n_frames", 1)
        if kind == "MPO":  # a camera's JPEG, with a preview or depth map behind
            notes.append(f"holds {frames} pictures: the first, which viewers show, was taken")
        elif frames > 1:
            raise DataError(
                f"{path} holds {frames} frames, but one is accepted; export each frame as an image of its own."
            )
        top = _stored_top(image, content)
        if top > 255 and image.mode not in WIDE_MODES:
            raise DataError(
                f"{path} has several channels of {top.bit_length()} bits, which would be cut to 8; save it with one "
                f"channel, with 8 bits a channel, or as a .npy array."
            )
        before = _orientation(image)
        with _quiet_libtiff(image):
            image.load()
        after = _orientation(image)
        if before != 1 and after == 1:  # Pillow turns TIFFs, and only those
            turned: Image.Image = image.transpose(_TURN_BACK[before])
        else:
            turned = image
        if max(before, after) != 1:
            notes.append(
                f"has orientation {max(before, after)} in its header: not applied, so that masks fit"
            )
        if _is_transparent(turned):
            notes.append("has transparent pixels: transparency was ignored")
        if turned.mode == "CMYK":
            notes.append("is CMYK: converted to RGB")
        return Raster(kind, _array(path, turned, top, labels), tuple(notes), turned.mode == "1")


def _array(path: str, image: Image.Image, top: int, labels: bool) -> np.ndarray:
    """The pixels (H, W, C) of a loaded image whose file holds values up to `top`."""
    mode = image.mode
    if labels and mode == "P" and not _is_gray_palette(image):
        array = np.asarray(image)
    elif mode == "La":
        array = np.asarray(image.convert("LA").convert("L"))
    elif mode in ("1", "L", "LA"):
        array = np.asarray(image.convert("L"))
        if labels:
            array = _unstretch(array, 1 if mode == "1" else top, 255)
    elif mode.startswith("I;16"):
        array = np.asarray(image).astype(np.uint16)
        if image.format == "JPEG2000":  # decoded to the upper bits
            array >>= 16 - top.bit_length()
    elif mode == "I":
        array = np.asarray(image)
        if image.format == "PPM":
            array = _unstretch(array, top, 65535)
        elif top == 65535:
            array = array.astype(
                np.int16
            )  # the only 16 bits that Pillow opens as 32 are signed ones
    elif mode == "F":
        array = np.asarray(image)
    elif mode in COLOUR_MODES:
        array = np.asarray(image.convert("RGB"))
    else:
        raise DataError(
            f"{path} has pixels of kind {mode!r}, but grey and RGB are accepted; convert it."
        )
    return array.reshape(*array.shape[:2], -1)


def _unstretch(array: np.ndarray, top: int, full: int) -> np.ndarray:
    """Undo Pillow's stretching of 0 to `top` to 0 to `full`."""
    if top >= full:
        return array.astype(np.uint16) if full > 255 else array
    return np.rint(array * (top / full)).astype(np.uint16 if full > 255 else np.uint8)


def _stored_top(image: ImageFile.ImageFile, content: bytes) -> int:
    """The highest value that a channel of the file can hold; called before loading."""
    bits: Any = 8
    if image.format == "PNG":
        bits = 8 if image.mode == "P" else content[24]  # IHDR stands first in every PNG
    elif image.format == "TIFF":
        bits = max(getattr(image, "tag_v2", {}).get(258, (1,)))
    elif image.format == "JPEG2000":
        start = content.find(
            b"\xff\x4f\xff\x51"
        )  # the codestream's SIZ segment; precision stands 42 bytes on
        bits = (content[start + 42] & 0x7F) + 1 if 0 <= start < len(content) - 42 else 8
    elif image.format == "PPM" and image.tile:
        codec, args = image.tile[0].codec_name, image.tile[0].args
        if codec.startswith("ppm") and isinstance(args, tuple):
            return int(args[-1])
        bits = 16 if image.mode == "I" else 8
    return int(2 ** min(int(bits), 32)) - 1


def _orientation(image: Image.Image) -> int:
    with suppress(Exception):  # a damaged EXIF block is no reason to refuse the picture
        value = image.getexif().get(ORIENTATION, 1)
        return value if value in _TURN_BACK else 1
    return 1


def _is_transparent(image: Image.Image) -> bool:
    if image.mode in ("RGBA", "LA", "PA", "La"):
        alpha = image.getchannel(image.getbands()[-1])
    elif "transparency" in image.info and image.mode in ("1", "L", "P", "RGB"):
        alpha = image.convert("RGBA").getchannel("A")
    else:
        return False
    return bool(np.asarray(alpha).min() < 255)


def _is_gray_palette(image: Image.Image) -> bool:
    """Whether the used entries of a palette are greys: then these are the values, else the indices are."""
    used = np.unique(np.asarray(image))
    palette = np.asarray(image.getpalette("RGB") or [], np.uint8).reshape(-1, 3)
    if not len(palette) or used[-1] >= len(palette):
        return False
    colors = palette[used]
    return bool((colors == colors[:, :1]).all())


@contextmanager
def _quiet_libtiff(image: ImageFile.ImageFile) -> Iterator[None]:
    """Keep libtiff, which decodes compressed TIFFs, from printing."""
    if not image.tile or image.tile[0].codec_name != "libtiff":
        yield
        return
    with quiet_stderr():
        yield


def _npy(path: str, content: bytes) -> np.ndarray:
    """Parse a .npy file without np.load, which allocates what the header claims."""
    file = io.BytesIO(content)
    try:
        version = np.lib.format.read_magic(file)
        header = (
            np.lib.format.read_array_header_1_0
            if version == (1, 0)
            else np.lib.format.read_array_header_2_0
        )
        shape, by_columns, dtype = header(file)
    except Exception as error:  # a damaged header makes numpy's parser raise many types
        raise DataError(
            f"{path} is a damaged .npy file ({_brief(error)}); save the array again."
        ) from None
    if dtype.kind not in "biuf":
        what = "Python objects" if dtype.hasobject else f"values of type {dtype}"
        raise DataError(
            f"{path} holds {what}, but whole and real numbers are accepted; save it as such an array."
        )
    if len(shape) not in (2, 3) or min(shape) < 1 or (len(shape) == 3 and shape[2] > 64):
        raise DataError(
            f"{path} has the shape {shape}, but (height, width) or (height, width, channels) with at most 64 channels "
            f"is accepted; transpose it or split it."
        )
    if math.prod(shape[:2]) > MAX_PIXELS:
        raise DataError(f"{path} has {shape[1]}x{shape[0]} pixels, {_BOMB_ADVICE}")
    needed, there = math.prod(shape) * dtype.itemsize, len(content) - file.tell()
    if needed > there:
        raise DataError(
            f"{path} is cut off: {there} of {needed} bytes of its array are there; copy it again."
        )
    array = np.frombuffer(content, dtype, math.prod(shape), file.tell())
    array = array.reshape(shape, order="F" if by_columns else "C")
    return np.ascontiguousarray(array, dtype.newbyteorder("=")).reshape(*shape[:2], -1)


def _brief(error: BaseException) -> str:
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(text.split()).rstrip(".")[:200] or type(error).__name__
