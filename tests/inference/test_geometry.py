"""From a network's input back to the frame, and from slices back to their volume."""

from __future__ import annotations

import gzip
import io
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from helpers.volumes import turned
from PIL import Image

from amlp_ray.config import PrepareConfig
from amlp_ray.data.decoders import read_frames
from amlp_ray.data.layouts import SourceImage
from amlp_ray.data.prepare.crop import cut
from amlp_ray.inference.geometry import (
    OUTLINE,
    draw_overlay,
    encode_png,
    encode_volume,
    fit_frame,
    restore,
)

SIZES = [(181, 97), (97, 181), (63, 40), (300, 257), (32, 64), (64, 64)]


def blob(height: int, width: int) -> np.ndarray:
    """A large ellipse off the middle, (H, W) bool."""
    y, x = np.mgrid[:height, :width]
    return ((y + 0.5) / height - 0.4) ** 2 / 0.3**2 + ((x + 0.5) / width - 0.55) ** 2 / 0.25**2 < 1


def dsc(a: np.ndarray, b: np.ndarray) -> float:
    return float(2 * (a & b).sum() / (a.sum() + b.sum()))


@pytest.mark.parametrize("fit", ["stretch", "pad", "tiles"])
@pytest.mark.parametrize(("height", "width"), SIZES)
def test_what_is_found_in_an_input_lies_where_it_was_in_the_frame(
    fit: str, height: int, width: int
) -> None:
    config = PrepareConfig.model_validate({"fit": fit, "size": 64})
    lesion = blob(height, width)
    frame = fit_frame((lesion * 200).astype(np.uint8)[..., None], config)
    back = restore(frame.image[0] > 100, frame, height, width)
    assert back.shape == (height, width)
    assert dsc(back > 0.5, lesion) > 0.97
    assert np.array_equal(back > 0.5, lesion) or fit != "tiles", "nothing is resized"


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_a_mask_that_was_prepared_comes_back_too(height: int, width: int) -> None:
    config = PrepareConfig(fit="pad", size=64)
    image, lesion = np.zeros((height, width, 1), np.uint8), blob(height, width)
    _, prepared = cut(image, lesion.astype(np.uint8), 0, 0, config)
    assert prepared is not None
    assert dsc(restore(prepared, fit_frame(image, config), height, width) > 0.5, lesion) > 0.97


def test_a_frame_lies_in_the_middle_of_a_padded_input() -> None:
    frame = fit_frame(np.full((20, 64, 1), 9, np.uint8), PrepareConfig(fit="pad", size=64))
    assert frame[1:] == (22, 0, 20, 64)
    values = np.zeros((64, 64))
    values[22, 0], values[41, 63] = 1, 2
    back = restore(values, frame, 20, 64)
    assert (back[0, 0], back[-1, -1], back.sum()) == (1, 2, 3)


def test_a_frame_smaller_than_a_tile_is_padded_with_its_least_value_at_the_lower_right() -> None:
    image = np.arange(20 * 100 * 2, dtype=np.uint16).reshape(20, 100, 2) + 5
    frame = fit_frame(image, PrepareConfig(fit="tiles", size=64))
    assert frame.image.shape == (2, 64, 100)
    assert frame[1:] == (0, 0, 20, 100)
    assert np.array_equal(frame.image[:, :20], image.transpose(2, 0, 1))
    assert (frame.image[0, 20:] == 5).all()
    assert (frame.image[1, 20:] == 6).all()


def test_tiles_are_cut_at_the_scale_of_training() -> None:
    lesion = blob(121, 200)
    frame = fit_frame(
        (lesion * 200).astype(np.uint8)[..., None], PrepareConfig(fit="tiles", size=32, scale=0.5)
    )
    assert frame.image.shape == (1, 60, 100)
    assert dsc(restore(frame.image[0], frame, 121, 200) > 100, lesion) > 0.97


@pytest.mark.parametrize("axis", ["axial", "coronal", "sagittal"])
@pytest.mark.parametrize("codes", ["RAS", "LPI", "PSR", "AIL"])
def test_slices_become_the_volume_that_they_were_cut_from(
    tmp_path: Path, codes: str, axis: str
) -> None:
    affine = np.array([[0.5, 0.02, 0, -7], [-0.02, 0.75, 0, 11], [0, 0, 2.5, -40], [0, 0, 0, 1]])
    values, volume_affine = turned(
        np.random.default_rng(1).integers(0, 255, (7, 9, 5)).astype(np.uint8), affine, codes
    )
    path, image = tmp_path / "a.nii.gz", nib.Nifti1Image(values, volume_affine)
    image.header["descrip"] = b"Mustermann"
    image.header.extensions.append(nib.nifti1.Nifti1Extension("comment", b"Mustermann"))
    nib.save(image, path)
    config = PrepareConfig.model_validate({"axis": axis})
    planes = [
        f.image[..., 0]
        for f in read_frames(SourceImage("a", "nifti", (str(path),), (), "a"), config)
    ]
    (tmp_path / "b.nii.gz").write_bytes(encode_volume(planes, axis, str(path)))
    source, made = nib.load(path), nib.load(tmp_path / "b.nii.gz")
    assert np.array_equal(np.asarray(made.dataobj), values)
    assert made.get_data_dtype() == np.uint8
    assert np.array_equal(made.affine, source.affine)
    assert made.header.get_zooms() == source.header.get_zooms()
    assert made.get_sform(coded=True)[1] == source.get_sform(coded=True)[1]
    assert made.get_qform(coded=True)[1] == source.get_qform(coded=True)[1]
    assert b"Mustermann" in gzip.decompress(path.read_bytes())
    assert b"Mustermann" not in gzip.decompress((tmp_path / "b.nii.gz").read_bytes())


def test_units_and_a_fourth_axis_of_one_are_kept_and_channels_are_not(tmp_path: Path) -> None:
    for name, last, shape in (("one", 1, (4, 5, 6, 1)), ("two", 2, (4, 5, 6))):
        image = nib.Nifti1Image(np.zeros((4, 5, 6, last), np.int16), np.diag([0.1, 0.2, 0.3, 1]))
        image.header.set_xyzt_units("micron")
        nib.save(image, tmp_path / f"{name}.nii")
        planes = [np.full((5, 4), i, np.float32) for i in range(6)]
        made = nib.Nifti1Image.from_bytes(
            gzip.decompress(encode_volume(planes, "axial", str(tmp_path / f"{name}.nii")))
        )
        assert made.shape == shape
        assert made.header.get_xyzt_units()[0] == "micron"
        assert made.get_data_dtype() == np.float32
        assert np.asarray(made.dataobj).ravel(order="F")[::20].tolist() == [0, 1, 2, 3, 4, 5]


def test_an_outline_runs_around_the_mask_and_hides_nothing_of_it() -> None:
    image = np.random.default_rng(0).integers(-500, 500, (50, 70, 1)).astype(np.int16)
    mask = blob(50, 70).astype(np.uint8)
    drawn = draw_overlay(image, mask)
    assert drawn.shape == (50, 70, 3)
    ring = (drawn == OUTLINE).all(2)
    assert ring.any()
    assert not (ring & (mask > 0)).any()
    assert np.ptp(drawn[~ring], axis=1).max() == 0, "gray elsewhere"
    assert np.array_equal(
        draw_overlay(np.full((9, 9, 3), 7, np.uint8), np.zeros((9, 9), np.uint8)),
        np.full((9, 9, 3), 7),
    )


def test_png_keeps_sixteen_bits() -> None:
    pixels = np.arange(0, 65536, 97, dtype=np.uint16).reshape(26, 26)
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(encode_png(pixels)))), pixels)
