"""Where the voxels of NIfTI files lie whose headers say it twice, once, or not alike."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from amlp_ray.config import PrepareConfig
from amlp_ray.data.decoders.frame import Frame
from amlp_ray.data.decoders.nifti import read_nifti
from amlp_ray.data.layouts.item import SourceImage
from amlp_ray.data.path import read_bytes
from amlp_ray.errors import DataError


def item_of(image: Path, masks: tuple[Path, ...] = ()) -> SourceImage:
    return SourceImage("i", "nifti", (str(image),), tuple(map(str, masks)), "i")


def frames_of(item: SourceImage) -> list[Frame]:
    return list(read_nifti(item, PrepareConfig(), read_bytes))


IN_PLANE_13 = np.diag([-1.3, -1.3, 10.0, 1.0])
UNIT = np.diag([-1.0, -1.0, 1.0, 1.0])
HALF = np.diag([-0.5, -0.5, 2.0, 1.0])


def write_forms(
    path: Path,
    values: np.ndarray,
    *,
    sform: np.ndarray | None = None,
    qform: np.ndarray | None = None,
    pixdim: tuple[float, ...] = (),
) -> Path:
    """Write a volume with exactly these forms, and pixdim as in the qform unless given."""
    image = nib.Nifti1Image(values, None)
    image.header.set_qform(qform, 0 if qform is None else 1)
    image.header.set_sform(sform, 0 if sform is None else 1)
    if pixdim:
        image.header["pixdim"][1:4] = pixdim
    # Written by hand: nibabel makes the forms agree.
    image.header["vox_offset"] = 352
    path.write_bytes(image.header.binaryblock + b"\0" * 4 + values.tobytes("F"))
    return path


@pytest.mark.parametrize(
    ("forms", "spacing", "note"),
    [
        ({"sform": IN_PLANE_13, "qform": IN_PLANE_13}, (1.3, 1.3), ""),
        ({"qform": IN_PLANE_13}, (1.3, 1.3), ""),
        ({"sform": IN_PLANE_13, "pixdim": (1.3, 1.3, 10)}, (1.3, 1.3), ""),
        ({"pixdim": (1.3, 1.3, 10)}, (1.3, 1.3), ""),
        (
            {"sform": UNIT, "qform": IN_PLANE_13},
            (1.3, 1.3),
            "1 x 1 x 1 .*1.3 x 1.3 x 10: the qform",
        ),
        ({"sform": HALF, "qform": IN_PLANE_13}, (1.3, 1.3), "the qform, which agrees"),
        ({"sform": np.zeros((4, 4)), "qform": IN_PLANE_13}, (1.3, 1.3), "the qform, which agrees"),
        ({"sform": UNIT, "pixdim": (1.3, 1.3, 10)}, (1.3, 1.3), "pixdim is taken"),
        ({"sform": HALF, "pixdim": (1, 1, 1)}, (0.5, 0.5), "the sform is taken"),
        ({"sform": HALF, "pixdim": (0.5001, 0.5, 2)}, (0.5, 0.5), ""),
    ],
)
def test_spacing_is_that_of_the_form_that_the_header_supports(
    forms: dict[str, Any], spacing: tuple[float, float], note: str, tmp_path: Path
) -> None:
    path = write_forms(tmp_path / "v.nii", np.ones((4, 5, 3), np.uint8), **forms)
    frame = frames_of(item_of(path))[0]
    assert frame.spacing == pytest.approx(spacing, rel=1e-5)
    assert len(frame.notes) == bool(note)
    assert re.search(note, "".join(frame.notes))


def test_two_sizes_of_a_voxel_without_a_qform_are_refused(tmp_path: Path) -> None:
    path = write_forms(
        tmp_path / "v.nii", np.ones((4, 5, 3), np.uint8), sform=HALF, pixdim=(1.3, 1.3, 10)
    )
    with pytest.raises(DataError, match=r"v\.nii gives two sizes of a voxel, 0\.5 x 0\.5 x 2 in"):
        frames_of(item_of(path))


SCANNER = np.array([[0, 0, 2.0, 4], [-0.5, 0, 0, 9], [0, -0.5, 0, 7], [0, 0, 0, 1]])
TEMPLATE = np.array([[-0.5, 0, 0, 90], [0, 0.5, 0, -126], [0, 0, 2.0, -72], [0, 0, 0, 1]])


@pytest.mark.parametrize(
    ("image_forms", "label_forms"),
    [
        ({"sform": TEMPLATE, "qform": SCANNER}, {"qform": SCANNER}),
        ({"sform": TEMPLATE, "qform": SCANNER}, {"sform": SCANNER, "qform": SCANNER}),
        ({"sform": TEMPLATE, "qform": SCANNER}, {"sform": TEMPLATE, "pixdim": (0.5, 0.5, 2)}),
        ({"sform": TEMPLATE, "qform": SCANNER}, {"sform": TEMPLATE, "pixdim": (1, 1, 1)}),
        ({"qform": SCANNER}, {"sform": SCANNER, "pixdim": (0.5, 0.5, 2)}),
        ({"sform": SCANNER, "pixdim": (0.5, 0.5, 2)}, {"qform": SCANNER}),
        ({"qform": SCANNER}, {"sform": TEMPLATE, "qform": SCANNER}),
        ({"sform": UNIT, "qform": IN_PLANE_13}, {"qform": IN_PLANE_13}),
        ({"sform": UNIT, "qform": IN_PLANE_13}, {"sform": IN_PLANE_13, "qform": IN_PLANE_13}),
        ({"sform": UNIT, "qform": IN_PLANE_13}, {"sform": UNIT, "pixdim": (1.3, 1.3, 10)}),
    ],
)
def test_label_with_either_form_of_its_image_lies_on_its_voxels(
    image_forms: dict[str, Any], label_forms: dict[str, Any], tmp_path: Path
) -> None:
    labels = np.random.default_rng(0).integers(0, 2, (4, 5, 3)).astype(np.uint8)
    image = write_forms(tmp_path / "i.nii", labels, **image_forms)
    label = write_forms(tmp_path / "l.nii", labels, **label_forms)
    for frame in frames_of(item_of(image, masks=(label,))):
        np.testing.assert_array_equal(frame.mask, frame.image[:, :, 0])


@pytest.mark.parametrize("label_forms", [{"sform": UNIT}, {"sform": HALF, "qform": SCANNER}])
def test_label_of_another_grid_is_refused(label_forms: dict[str, Any], tmp_path: Path) -> None:
    labels = np.ones((4, 5, 3), np.uint8)
    image = write_forms(tmp_path / "i.nii", labels, sform=TEMPLATE, qform=SCANNER)
    label = write_forms(tmp_path / "l.nii", labels, **label_forms)
    with pytest.raises(DataError, match=r"l\.nii lies elsewhere than"):
        frames_of(item_of(image, masks=(label,)))
