"""From a network's input back to the frame, and from frames back to the file that they came from.

    frame (H, W, C) -> fitted -> network -> restored -> (H, W) -> PNG, or a volume on the grid of its NIfTI file

The way in is `preparing.fit`'s, and so is the way back: where a frame lies in an input is told by a mask of ones that
is cut along with it, and not computed a second time.
"""

from __future__ import annotations

import gzip
import io
from collections.abc import Sequence
from typing import NamedTuple

import nibabel as nib
import numpy as np
from nibabel.orientations import apply_orientation, io_orientation, ornt_transform
from PIL import Image
from scipy import ndimage

from amlp_ray.config import PrepareConfig
from amlp_ray.data.decoders.intensity import percentile_range, to_bytes
from amlp_ray.data.decoders.nifti import AXES
from amlp_ray.data.path import read_bytes
from amlp_ray.data.prepare.crop import cut, scaled

RAS = np.array([[0, 1], [1, 1], [2, 1]])  # axes and directions, as nibabel writes orientations
OUTLINE = (255, 176, 0)
OUTLINE_SHARE = 1 / 400  # of the longer side: seen when a large image is shrunken to a screen
# What says where voxels lie; all other fields of a header, and its extensions, may name a patient.
GRID = (
    "pixdim", "xyzt_units", "qform_code", "sform_code", "quatern_b", "quatern_c", "quatern_d", "qoffset_x",
    "qoffset_y", "qoffset_z", "srow_x", "srow_y", "srow_z",
)  # fmt: skip


class Fitted(NamedTuple):
    """An input of a network, and where in it the frame lies."""

    image: np.ndarray  # (C, H', W')
    top: int
    left: int
    height: int
    width: int


def fitted(image: np.ndarray, config: PrepareConfig) -> Fitted:
    """Bring a frame (H, W, C) to what images of a dataset prepared with `settings` look like.

    With `fit=tiles` it is scaled and stays whole, for a window of `size` pixels to slide over; what is smaller than
    that is padded at its lower and right edge, as a tile is.
    """
    if config.fit != "tiles":
        whole, inside = cut(image, np.ones(image.shape[:2], np.uint8), 0, 0, config)
        assert inside is not None
        rows, columns = np.flatnonzero(inside.any(axis=1)), np.flatnonzero(inside.any(axis=0))
        return Fitted(whole, int(rows[0]), int(columns[0]), len(rows), len(columns))
    small, _ = scaled(image, None, config)
    height, width, channels = small.shape
    out = np.empty((max(height, config.size), max(width, config.size), channels), small.dtype)
    out[:] = small.min(axis=(0, 1))
    out[:height, :width] = small
    return Fitted(np.ascontiguousarray(out.transpose(2, 0, 1)), 0, 0, height, width)


def restored(values: np.ndarray, fit: Fitted, height: int, width: int) -> np.ndarray:
    """Bring values (H', W') of an input back to its frame (height, width): cut out, then bilinear; float32."""
    inner = values[fit.top : fit.top + fit.height, fit.left : fit.left + fit.width].astype(
        np.float32
    )
    if inner.shape == (height, width):
        return inner
    return np.asarray(Image.fromarray(inner).resize((width, height), Image.Resampling.BILINEAR))


def volume_bytes(planes: Sequence[np.ndarray], axis: str, source: str) -> bytes:
    """Put the slices (H, W) of a volume together again, as .nii.gz on the grid of the NIfTI file `source`.

    Args:
        planes: one per slice, in the order and orientation of `formats.nifti`, all of uint8 or float32.
        axis: they were cut across it: axial, coronal or sagittal.
        source: path or URI. Of its header the grid is taken over, and nothing else.
    """
    content = read_bytes(source)
    if content[:2] == b"\x1f\x8b":
        content = gzip.decompress(content)
    kind = nib.Nifti2Image if content[4:8] == b"n+2\0" else nib.Nifti1Image
    image = kind.from_bytes(content)
    turned = np.stack(
        [plane.T[:, ::-1] for plane in planes], axis=AXES[axis]
    )  # (X, Y, Z) in RAS axes
    volume = apply_orientation(turned, ornt_transform(RAS, io_orientation(image.affine)))
    if volume.size == np.prod(image.shape):  # of (X, Y), or (X, Y, Z, 1)
        volume = volume.reshape(image.shape)
    header = kind.header_class()
    for name in GRID:
        header[name] = image.header[name]
    header.set_data_dtype(volume.dtype)
    return gzip.compress(
        kind(np.ascontiguousarray(volume), image.affine, header).to_bytes(), mtime=0
    )


def png_bytes(pixels: np.ndarray) -> bytes:
    """Write (H, W) of uint8 or uint16, or (H, W, 3) of uint8, as PNG."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def overlay(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Draw the outline of a mask (H, W) into an image (H, W, C): (H, W, 3) uint8.

    Three channels are colours, of any others the first is shown; what is not of 8 bits is stretched by percentiles.
    """
    planes = image if image.shape[2] == 3 else image[:, :, :1]
    if planes.dtype != np.uint8:
        planes = to_bytes(planes, *percentile_range(planes))
    picture = np.array(np.broadcast_to(planes, (*mask.shape, 3)))
    thick = max(1, round(max(mask.shape) * OUTLINE_SHARE))
    lesion = mask.astype(bool)
    picture[ndimage.binary_dilation(lesion, iterations=thick) & ~lesion] = OUTLINE
    return picture
