"""Phantoms of patients: slices of one patient are alike, patients differ, and lgg is recognized."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from amlp_ray.config import PrepareConfig
from amlp_ray.data.layouts import find_items
from amlp_ray.data.path import DataPath
from amlp_ray.data.phantom_patients import write_phantom_patients
from amlp_ray.errors import ConfigError


def read(folder: Path, ending: str) -> dict[str, np.ndarray]:
    return {file.name: np.asarray(Image.open(file)) for file in folder.rglob(f"*{ending}.tif")}


def test_slices_of_a_patient_are_alike_and_patients_differ(tmp_path: Path) -> None:
    write_phantom_patients(tmp_path, count=40, slices=8, size=64, seed=1)
    patients = sorted(tmp_path.iterdir())
    sizes = [len(list(folder.glob("*_mask.tif"))) for folder in patients]
    assert sum(sizes) == 40
    assert all(4 <= size <= 12 for size in sizes[:-1])
    assert len(set(sizes)) > 1

    def picture(patient: Path, number: int) -> np.ndarray:
        file = patient / f"{patient.name}_{number}.tif"
        return np.asarray(Image.open(file), float).ravel()

    first, second = patients[:2]
    alike = np.corrcoef(picture(first, 3), picture(first, 4))[0, 1]
    other = np.corrcoef(picture(first, 3), picture(second, 3))[0, 1]
    assert alike > 0.9 > other


def test_the_layout_knows_patients_and_masks(tmp_path: Path) -> None:
    write_phantom_patients(tmp_path, count=30, slices=6, size=48)
    listing = find_items(PrepareConfig(), DataPath(tmp_path))
    assert listing.layout == "lgg"
    assert not listing.rejected
    assert len(listing.items) == 30
    assert {item.group for item in listing.items} == {p.name for p in tmp_path.iterdir()}


@pytest.mark.parametrize(("share", "expected"), [(0.0, 1.0), (1.0, 0.0), (0.65, 0.35)])
def test_the_share_of_slices_without_lesion_is_met(
    tmp_path: Path, share: float, expected: float
) -> None:
    write_phantom_patients(tmp_path, count=400, slices=20, size=32, empty_share=share)
    has_lesion = [mask.any() for mask in read(tmp_path, "_mask").values()]
    assert np.mean(has_lesion) == pytest.approx(expected, abs=0.12)


def test_slices_below_one_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="at least 1 slice, not 0"):
        write_phantom_patients(tmp_path, count=3, slices=0)
