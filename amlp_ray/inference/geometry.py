"""Bring outputs of a network back to their frames, and frames back to their file.

    frame (H, W, C) -> fit_frame -> network -> restore -> (H, W)
    (H, W) -> PNG, or a volume on the grid of its NIfTI file

The way to the network is that of `data.prepare.crop`. The way back is not computed a second time: a
mask of ones that is cropped along with the frame says where the frame lies in an input.
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
from amlp_ray.data.decoders.nifti_geometry import read_grid
from amlp_ray.data.path import read_bytes
from amlp_ray.data.prepare.crop import cut, scaled

RAS = np.array([[0, 1], [1, 1], [2, 1]])  # axes and directions, as nibabel writes orientations
OUTLINE = (255, 176, 0)
OUTLINE_SHARE = 1 / 400  # of the longer side: visible when a large image is shrunk to a screen
# The fields of a header that say where voxels lie. All others, and extensions, may name a patient.
GRID_FIELDS = (
    "pixdim",
    "xyzt_units",
    "qform_code",
    "sform_code",
    "quatern_b",
    "quatern_c",
    "quatern_d",
    "qoffset_x",
    "qoffset_y",
    "qoffset_z",
    "srow_x",
    "srow_y",
    "srow_z",
)


class NetworkInput(NamedTuple):
    """An image (C, H', W') for the network, and the rectangle of it that the frame fills."""

    image: np.ndarray
    top: int
    left: int
    height: int
    width: int


def fit_frame(image: np.ndarray, config: PrepareConfig) -> NetworkInput:
    """Bring a frame (H, W, C) to the form of images of a dataset prepared with `config`.

    With `fit=tiles` it is scaled and stays whole, for a window of `size` pixels to slide over. A
    frame smaller than that is padded at its lower and right edge, as a tile is.
    """
    if config.fit != "tiles":
        fitted, inside = cut(image, np.ones(image.shape[:2], np.uint8), 0, 0, config)
        assert inside is not None
        rows = np.flatnonzero(inside.any(axis=1))
        columns = np.flatnonzero(inside.any(axis=0))
        return NetworkInput(fitted, int(rows[0]), int(columns[0]), len(rows), len(columns))
    small, _ = scaled(image, None, config)
    height, width, channels = small.shape
    padded_shape = (max(height, config.size), max(width, config.size), channels)
    padded = np.empty(padded_shape, small.dtype)
    padded[:] = small.min(axis=(0, 1))
    padded[:height, :width] = small
    return NetworkInput(np.ascontiguousarray(padded.transpose(2, 0, 1)), 0, 0, height, width)


def restore(values: np.ndarray, network_input: NetworkInput, height: int, width: int) -> np.ndarray:
    """Bring values (H', W') of an input back to its frame, (height, width) float32, bilinear."""
    _, top, left, inner_height, inner_width = network_input
    inner = values[top : top + inner_height, left : left + inner_width].astype(np.float32)
    if inner.shape == (height, width):
        return inner
    return np.asarray(Image.fromarray(inner).resize((width, height), Image.Resampling.BILINEAR))


def encode_volume(planes: Sequence[np.ndarray], axis: str, source: str) -> bytes:
    """Stack the slices (H, W) of a volume, as .nii.gz on the grid of the NIfTI file `source`.

    Args:
        planes: one per slice, in the order and orientation of `data.decoders.nifti`, all of uint8
            or float32.
        axis: that they were cut across: axial, coronal or sagittal.
        source: path or URI. Of its header only the grid is copied.
    """
    content = read_bytes(source)
    if content[:2] == b"\x1f\x8b":
        content = gzip.decompress(content)
    image_class = nib.Nifti2Image if content[4:8] == b"n+2\0" else nib.Nifti1Image
    image = image_class.from_bytes(content)
    ras_planes = [plane.T[:, ::-1] for plane in planes]
    ras_volume = np.stack(ras_planes, axis=AXES[axis])  # (X, Y, Z)
    affine = read_grid(source, image).affine  # as the volume was read
    volume = apply_orientation(ras_volume, ornt_transform(RAS, io_orientation(affine)))
    # The source may be (X, Y), or (X, Y, Z, 1). One of several channels has more values.
    if volume.size == np.prod(image.shape):
        volume = volume.reshape(image.shape)
    header = image_class.header_class()
    for name in GRID_FIELDS:
        header[name] = image.header[name]
    header.set_data_dtype(volume.dtype)
    encoded = image_class(np.ascontiguousarray(volume), image.affine, header).to_bytes()
    return gzip.compress(encoded, mtime=0)


def encode_png(pixels: np.ndarray) -> bytes:
    """Encode (H, W) of uint8 or uint16, or (H, W, 3) of uint8, as PNG."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def draw_overlay(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Draw the outline of a mask (H, W) into an image (H, W, C): (H, W, 3) uint8.

    Three channels are colors, of any others the first is shown. Images of other than 8 bits are
    stretched by percentiles.
    """
    planes = image if image.shape[2] == 3 else image[:, :, :1]
    if planes.dtype != np.uint8:
        planes = to_bytes(planes, *percentile_range(planes))
    picture = np.array(np.broadcast_to(planes, (*mask.shape, 3)))
    thickness = max(1, round(max(mask.shape) * OUTLINE_SHARE))
    lesion = mask.astype(bool)
    outline = ndimage.binary_dilation(lesion, iterations=thickness) & ~lesion
    picture[outline] = OUTLINE
    return picture
