"""Read where the voxels of a NIfTI file lie, from its sform, its qform and the sizes in pixdim.

A header gives positions up to twice. The sform is an affine. The qform is a rotation whose scale is
pixdim. Where both agree on the size of a voxel, the sform is taken. Where they do not, the one is
taken that the rest of the header supports, with a note, or the file is refused.
"""

from __future__ import annotations

from typing import NamedTuple

import nibabel as nib
import numpy as np
from nibabel.affines import voxel_sizes
from nibabel.orientations import io_orientation
from nibabel.spatialimages import HeaderDataError

from amlp_ray.errors import DataError

GRID_TOLERANCE = 1e-3  # mm by which two affines may differ
SIZE_TOLERANCE = 0.01  # share by which two sizes of a voxel may differ; files round them
MILLIMETERS = {"meter": 1000.0, "micron": 0.001}


class Grid(NamedTuple):
    """Where the voxels of a file lie."""

    affine: np.ndarray  # (4, 4), of the file's own axes
    forms: tuple[np.ndarray, ...]  # every affine that the header gives, this one included
    sizes: tuple[float, ...]  # mm of a voxel, along the file's own axes
    note: str  # what was chosen where the header contradicts itself, else empty

    def is_same(self, other: Grid) -> bool:
        """Return whether this is the grid of another file.

        Tools keep the sform, the qform or both, so the affine of one may be either of the other's.
        """
        pairs = [(self.affine, form) for form in other.forms]
        pairs += [(form, other.affine) for form in self.forms]
        return any(np.allclose(a, b, rtol=0, atol=GRID_TOLERANCE) for a, b in pairs)

    def distance(self, other: Grid) -> float:
        """Return by how much the affines of two files differ at most."""
        return float(np.abs(self.affine - other.affine).max())


def read_grid(path: str, image: nib.Nifti1Image) -> Grid:
    """Read the grid of a file.

    Raises:
        DataError: its voxels have no direction, or two sizes with nothing to choose by.
    """
    qform = _qform(image)
    affine, note = _choose_affine(path, image, qform)
    affine = np.asarray(affine, np.float64)
    is_oriented = np.isfinite(affine).all() and np.isfinite(io_orientation(affine)).all()
    if not is_oriented:
        raise DataError(
            f"{path} has an affine that gives no direction to an axis, so left and right are "
            "unknown; repair it."
        )
    forms = [affine]
    if qform is not None:
        forms.append(qform)
    if image.header["sform_code"] > 0:
        forms.append(image.header.get_sform())
    factor = MILLIMETERS.get(image.header.get_xyzt_units()[0], 1.0)
    # Affines are float32.
    sizes = tuple(round(float(size) * factor, 6) for size in voxel_sizes(affine))
    return Grid(affine, tuple(forms), sizes, note)


def _qform(image: nib.Nifti1Image) -> np.ndarray | None:
    """Return the affine of the qform; None if there is none, or a damaged one."""
    if image.header["qform_code"] < 1:
        return None
    try:
        return np.asarray(image.header.get_qform(), np.float64)
    except HeaderDataError:
        return None


def _choose_affine(
    path: str, image: nib.Nifti1Image, qform: np.ndarray | None
) -> tuple[np.ndarray, str]:
    """Return the affine to use, and a note if the sform and pixdim contradict each other."""
    if image.header["sform_code"] < 1:
        # nibabel makes one of pixdim where there is no form at all.
        return (image.header.get_base_affine() if qform is None else qform), ""
    sform = np.asarray(image.header.get_sform(), np.float64)
    num_axes = min(3, len(image.shape))  # further sizes mean nothing
    pixdim = np.asarray(image.header["pixdim"][1:4], np.float64)
    sform_sizes = voxel_sizes(sform)
    is_degenerate = not (np.isfinite(sform_sizes).all() and sform_sizes.all())
    is_only_form = is_degenerate and qform is None  # which the caller refuses
    if is_only_form or _are_equal(sform_sizes[:num_axes], pixdim[:num_axes]):
        return sform, ""
    stated = f"its sform gives voxels of {_times(sform_sizes)} and its pixdim {_times(pixdim)}"
    # What is 1 mm in all directions was often never set.
    if _are_equal(pixdim[:num_axes], np.ones(num_axes)) and not is_degenerate:
        return sform, f"{stated}: the sform is taken"
    if qform is not None:
        return qform, f"{stated}: the qform, which agrees with pixdim, is taken"
    if _are_equal(sform_sizes[:num_axes], np.ones(num_axes)):
        scaled = sform.copy()
        scaled[:3, :3] *= pixdim / sform_sizes
        return scaled, f"{stated}: pixdim is taken, in the directions of the sform"
    raise DataError(
        f"{path} gives two sizes of a voxel, {_times(sform_sizes)} in its sform and "
        f"{_times(pixdim)} in pixdim, and has no usable qform to choose by; make them agree."
    )


def _are_equal(sizes: np.ndarray, other_sizes: np.ndarray) -> bool:
    return bool(np.allclose(sizes, other_sizes, rtol=SIZE_TOLERANCE, atol=0))


def _times(sizes: np.ndarray) -> str:
    return " x ".join(f"{size:.5g}" for size in sizes)
