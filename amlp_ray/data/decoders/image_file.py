"""Decode a picture file to an array (H, W, C) in the file's own values.

Pillow decodes all but `.npy`. It is told which formats to try, so that no picture starts another
program, as EPS does. And it is kept from what it does in silence: cutting 16-bit colors to 8,
turning TIFFs by their orientation tag, and stretching 2- and 4-bit grays, which matters where these
are labels.
"""

from __future__ import annotations

import io
import logging
import math
import warnings
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageFile

from amlp_ray.data.decoders.frame import ReadFile
from amlp_ray.data.decoders.tiff import BITS_PER_SAMPLE, count_planes, invert, is_inverted
from amlp_ray.errors import DataError, describe_error
from amlp_ray.utils.silence import quiet_stderr

# 12000 x 12500. A small file can claim any size, and decoding one of more takes gigabytes.
MAX_PIXELS = 150_000_000
MAX_NPY_CHANNELS = 64
FORMATS = ("PNG", "JPEG", "TIFF", "BMP", "GIF", "WEBP", "PPM", "JPEG2000")
ACCEPTED = "PNG, JPEG, TIFF, BMP, GIF, WebP, PPM, JPEG 2000 or a .npy array"
COLOR_MODES = ("RGB", "RGBA", "RGBX", "P", "PA", "CMYK", "YCbCr")
# Pillow's one-channel modes of more than 8 bits.
WIDE_MODES = ("I;16", "I;16B", "I;16L", "I;16N", "I", "F")
ORIENTATION = 274  # tag number
JPEGS = ("JPEG", "MPO")
TRANSPARENCY_IGNORED = "has transparent pixels: transparency was ignored"
NPY = b"\x93NUMPY"
_SIZE_ADVICE = f"but {MAX_PIXELS:,} are the most; scale it down, cut it into parts, or remove it."

# Undo Pillow's turn by the orientation tag; all but quarter turns undo themselves.
_TURN_BACK = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}
# First bytes of pictures, and of files that stand in for pictures: (offset, bytes, name).
_PICTURES = (
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

logging.getLogger("PIL").setLevel(logging.CRITICAL)  # our sentences say what it logs


class DecodedImage(NamedTuple):
    """A decoded picture or mask."""

    file_format: str  # Pillow's name of it, or "npy"
    pixels: np.ndarray  # (H, W, C), any numeric type
    notes: tuple[str, ...] = ()  # repairs, as sentences without the file's name
    # Of masks only:
    is_one_bit: bool = False
    lossy_kind: str = ""  # such as "a JPEG", if its compression blurs values
    indices: np.ndarray | None = None  # (H, W), of a palette
    has_gray_palette: bool = False  # no entry of the palette has a color, used or not
    alpha: np.ndarray | None = None  # (H, W), 0 is transparent


def decode_image_file(path: str, read: ReadFile, *, is_mask: bool = False) -> DecodedImage:
    """Read and decode a picture. Palettes, CMYK and YCbCr become RGB, and alpha is dropped.

    Args:
        is_mask: the values may name classes. So a 1-bit picture gives 0 and 1, grays of fewer than
            8 bits are not stretched to 255, and indices of palettes and alpha come beside.

    Raises:
        DataError: the file cannot be read, is no picture or a damaged one, or holds what an array
            cannot.
    """
    content = _read(path, read)
    if content.startswith(NPY):
        return DecodedImage("npy", _decode_npy(path, content))
    try:
        with warnings.catch_warnings(action="ignore"):
            return _decode(path, content, is_mask)
    except (DataError, MemoryError):
        raise
    except Image.DecompressionBombError:
        raise DataError(f"{path} claims more than {MAX_PIXELS:,} pixels, {_SIZE_ADVICE}") from None
    except Exception as error:  # Pillow raises many types on damaged files
        raise DataError(f"{path} is {_describe_damage(content, error)}") from None


def _read(path: str, read: ReadFile) -> bytes:
    try:
        content = read(path)
    except FileNotFoundError:
        local = Path(path)
        problem = "does not exist; check the path, or prepare again if it was moved since"
        if "://" not in path and local.is_symlink():
            problem = (
                f"is a link to {local.readlink()}, which does not exist; "
                "bring the file there or remove the link"
            )
        raise DataError(f"{path} {problem}.") from None
    except PermissionError:
        raise DataError(
            f"{path} may not be read (permission denied); give yourself the right to read it."
        ) from None
    except OSError as error:
        raise DataError(
            f"{path} cannot be read ({_reason(error)}); check the disk or the link."
        ) from None
    if not content:
        raise DataError(
            f"{path} is empty (0 bytes), but a picture is needed; copy it again or remove it."
        )
    return content


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or describe_error(error)


def _describe_damage(content: bytes, error: Exception) -> str:
    """Say what a file is that no decoder could read, and what to do; comes after "is"."""
    kind = _find_signature(content, _PICTURES)
    if kind is None:
        other = _find_signature(content, _OTHERS) or "not a picture"
        return f"{other}, but {ACCEPTED} is needed; convert, replace or remove it."
    reason = _reason(error)
    if "cannot identify" in str(error):
        reason = "its header fits no kind that can be read"
    advice = " (as .npy if it has several channels of 16 bits or floats)" if kind == "TIFF" else ""
    return (
        f"a {kind} that is damaged, cut off or of a rare kind ({reason}); "
        f"copy or export it again{advice}."
    )


def _find_signature(content: bytes, signatures: tuple[tuple[int, bytes, str], ...]) -> str | None:
    for offset, first_bytes, name in signatures:
        if content.startswith(first_bytes, offset):
            return name
    return None


def _decode(path: str, content: bytes, is_mask: bool) -> DecodedImage:
    """Decode with Pillow."""
    with Image.open(io.BytesIO(content), formats=FORMATS) as image:
        if image.width * image.height > MAX_PIXELS:
            raise DataError(f"{path} has {image.width}x{image.height} pixels, {_SIZE_ADVICE}")
        notes = []
        frames = getattr(image, "n_frames", 1)
        is_tiff_inverted = False
        if image.format == "TIFF":
            frames = max(frames, count_planes(image, len(content)))
            is_tiff_inverted = is_inverted(image)
        if image.format == "MPO":  # a camera's JPEG, with a preview or depth map behind
            notes.append(f"holds {frames} pictures: the first, which viewers show, was taken")
        elif frames > 1:
            raise DataError(
                f"{path} holds {frames} frames, but one is accepted; "
                "export each frame as an image of its own."
            )
        max_value = _max_stored_value(image, content)
        if max_value > 255 and image.mode not in WIDE_MODES:
            raise DataError(
                f"{path} has several channels of {max_value.bit_length()} bits, which would be "
                "cut to 8; save it with one channel, with 8 bits a channel, or as a .npy array."
            )
        upright, orientation = _load_unturned(image)
        if orientation != 1:
            notes.append(
                f"has orientation {orientation} in its header: not applied, so that masks fit"
            )
        alpha = _alpha(upright)
        pixels = _to_array(path, upright, max_value, is_mask)
        if is_tiff_inverted:
            pixels = _invert(path, pixels)
        if alpha is not None and alpha.min() < 255 and not is_mask:
            _check_visible(path, pixels, alpha)
            notes.append(TRANSPARENCY_IGNORED)
        if upright.mode == "CMYK":
            notes.append("is CMYK: converted to RGB")
        decoded = DecodedImage(str(image.format), pixels, tuple(notes))
        return _with_mask_fields(decoded, upright, content, alpha) if is_mask else decoded


def _with_mask_fields(
    decoded: DecodedImage, image: Image.Image, content: bytes, alpha: np.ndarray | None
) -> DecodedImage:
    """Add what matters in masks."""
    indices = None
    has_gray_palette = False
    if image.mode in ("P", "PA"):
        indices = np.asarray(image.getchannel("P"))
        palette = np.asarray(image.getpalette("RGB") or [], np.uint8).reshape(-1, 3)
        has_gray_palette = bool((palette == palette[:, :1]).all())
    return decoded._replace(
        is_one_bit=image.mode == "1",
        lossy_kind=_lossy_kind(decoded.file_format, image, content),
        indices=indices,
        has_gray_palette=has_gray_palette,
        alpha=alpha,
    )


def _lossy_kind(file_format: str, image: Image.Image, content: bytes) -> str:
    """Name a compression that blurs the values of labels; empty if there is none."""
    if file_format in JPEGS:
        return "a JPEG"
    if file_format == "TIFF" and image.info.get("compression") == "jpeg":
        return "a TIFF with JPEG inside"
    # Lossless pictures are in chunks named VP8L.
    is_lossy_webp = file_format == "WEBP" and b"VP8 " in content[:4096]
    return "a lossy WebP" if is_lossy_webp else ""


def _invert(path: str, pixels: np.ndarray) -> np.ndarray:
    """Turn the values of a TIFF whose smallest is white."""
    if pixels.dtype.kind not in "iu":
        raise DataError(
            f"{path} says WhiteIsZero in its header, but real numbers have no fixed opposite; "
            "export it as BlackIsZero."
        )
    return invert(pixels)


def _check_visible(path: str, pixels: np.ndarray, alpha: np.ndarray) -> None:
    """Raise DataError if a picture is drawn in transparency alone."""
    if (pixels == pixels[:1, :1]).all() and alpha.min() < alpha.max():
        raise DataError(
            f"{path} has one color everywhere and shows its picture in the transparency alone, "
            "which is not read; export it without transparency."
        )


def _load_unturned(image: ImageFile.ImageFile) -> tuple[Image.Image, int]:
    """Load the pixels as they are stored; return them and the orientation of the header."""
    before = _orientation(image)
    # libtiff, which decodes compressed TIFFs, prints to stderr.
    is_libtiff = bool(image.tile) and image.tile[0].codec_name == "libtiff"
    with quiet_stderr() if is_libtiff else nullcontext():
        image.load()
    after = _orientation(image)
    if before != 1 and after == 1:  # Pillow turns TIFFs, and only those
        return image.transpose(_TURN_BACK[before]), before
    return image, max(before, after)


def _to_array(path: str, image: Image.Image, max_value: int, is_mask: bool) -> np.ndarray:
    """Return the pixels (H, W, C) of a loaded image whose file holds values up to `max_value`."""
    mode = image.mode
    if mode == "La":
        array = np.asarray(image.convert("LA").convert("L"))
    elif mode in ("1", "L", "LA"):
        array = np.asarray(image.convert("L"))
        if is_mask:
            array = _unstretch(array, 1 if mode == "1" else max_value, 255)
    elif mode.startswith("I;16"):
        array = np.asarray(image).astype(np.uint16)
        if image.format == "JPEG2000":  # decoded to the upper bits
            array >>= 16 - max_value.bit_length()
    elif mode == "I":
        array = np.asarray(image)
        if image.format == "PPM":
            array = _unstretch(array, max_value, 65535)
        elif max_value == 65535:
            # The only 16 bits that Pillow opens as 32 are signed ones.
            array = array.astype(np.int16)
    elif mode == "F":
        array = np.asarray(image)
    elif mode in COLOR_MODES:
        array = np.asarray(image.convert("RGB"))
    else:
        raise DataError(
            f"{path} has pixels of kind {mode!r}, but gray and RGB are accepted; convert it."
        )
    return array.reshape(*array.shape[:2], -1)


def _unstretch(array: np.ndarray, max_value: int, stretched_to: int) -> np.ndarray:
    """Undo Pillow's stretching of 0 to `max_value` to 0 to `stretched_to`."""
    dtype = np.uint16 if stretched_to > 255 else np.uint8
    if max_value >= stretched_to:
        return array.astype(dtype, copy=False)
    return np.rint(array * (max_value / stretched_to)).astype(dtype)


def _max_stored_value(image: ImageFile.ImageFile, content: bytes) -> int:
    """Return the highest value that a channel of the file can hold; called before loading."""
    bits: Any = 8
    if image.format == "PNG":
        bits = 8 if image.mode == "P" else content[24]  # IHDR stands first in every PNG
    elif image.format == "TIFF":
        bits = max(getattr(image, "tag_v2", {}).get(BITS_PER_SAMPLE, (1,)))
    elif image.format == "JPEG2000":
        # The codestream's SIZ segment; the precision stands 42 bytes on.
        start = content.find(b"\xff\x4f\xff\x51")
        if 0 <= start < len(content) - 42:
            bits = (content[start + 42] & 0x7F) + 1
    elif image.format == "PPM" and image.tile:
        codec = image.tile[0].codec_name
        args = image.tile[0].args
        if codec.startswith("ppm") and isinstance(args, tuple):
            return int(args[-1])
        bits = 16 if image.mode == "I" else 8
    return int(2 ** min(int(bits), 32)) - 1


def _orientation(image: Image.Image) -> int:
    with suppress(Exception):  # a damaged EXIF block is no reason to refuse the picture
        value = image.getexif().get(ORIENTATION, 1)
        return value if value in _TURN_BACK else 1
    return 1


def _alpha(image: Image.Image) -> np.ndarray | None:
    """Return the alpha (H, W) of a picture; None if it has none."""
    if image.mode in ("RGBA", "LA", "PA", "La"):
        channel = image.getchannel(image.getbands()[-1])
    elif "transparency" in image.info and image.mode in ("1", "L", "P", "RGB"):
        channel = image.convert("RGBA").getchannel("A")
    else:
        return None
    return np.asarray(channel)


def _decode_npy(path: str, content: bytes) -> np.ndarray:
    """Parse a .npy file without np.load, which allocates what the header claims."""
    file = io.BytesIO(content)
    try:
        version = np.lib.format.read_magic(file)
        if version == (1, 0):
            shape, is_fortran, dtype = np.lib.format.read_array_header_1_0(file)
        else:
            shape, is_fortran, dtype = np.lib.format.read_array_header_2_0(file)
    except Exception as error:  # a damaged header makes numpy's parser raise many types
        raise DataError(
            f"{path} is a damaged .npy file ({_reason(error)}); save the array again."
        ) from None
    if dtype.kind not in "biuf":
        contents = "Python objects" if dtype.hasobject else f"values of type {dtype}"
        raise DataError(
            f"{path} holds {contents}, but whole and real numbers are accepted; "
            "save it as such an array."
        )
    has_too_many = len(shape) == 3 and shape[2] > MAX_NPY_CHANNELS
    if len(shape) not in (2, 3) or min(shape) < 1 or has_too_many:
        raise DataError(
            f"{path} has the shape {shape}, but (height, width) or (height, width, channels) with "
            f"at most {MAX_NPY_CHANNELS} channels is accepted; transpose it or split it."
        )
    if math.prod(shape[:2]) > MAX_PIXELS:
        raise DataError(f"{path} has {shape[1]}x{shape[0]} pixels, {_SIZE_ADVICE}")
    size = math.prod(shape) * dtype.itemsize
    available = len(content) - file.tell()
    if size > available:
        raise DataError(
            f"{path} is cut off: {available} of {size} bytes of its array are there; copy it again."
        )
    array = np.frombuffer(content, dtype, math.prod(shape), file.tell())
    array = array.reshape(shape, order="F" if is_fortran else "C")
    native = np.ascontiguousarray(array, dtype.newbyteorder("="))
    return native.reshape(*shape[:2], -1)
