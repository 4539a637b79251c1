"""Groups, copies and tiled pictures of DICOM files as anonymizers and converters leave them."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.volumes import ct_series, dicom, save, segmentation
from pydicom.uid import RLELossless

from amlp_ray.config import PrepareConfig
from amlp_ray.data.decoders.dicom import read_dicom
from amlp_ray.data.layouts.dicom import find_dicom
from amlp_ray.data.layouts.item import Listing
from amlp_ray.data.path import DataPath, read_bytes
from amlp_ray.errors import DataError

NUM_PATIENTS = 4
NUM_SLICES = 5


@pytest.fixture(autouse=True)
def _salt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AMLP_RAY_SALT", "a secret of the tests")


def find(folder: Path) -> Listing:
    return find_dicom(DataPath(folder), PrepareConfig())


def write_patients(
    folder: Path, elements: Callable[[int, int], dict[str, Any]], *, folders: bool = False
) -> None:
    """Write slices of patients; `elements` of patient and slice replace those of the header."""
    rng = np.random.default_rng(1)
    for patient in range(NUM_PATIENTS):
        for z in range(NUM_SLICES):
            header: dict[str, Any] = {
                "InstanceNumber": z + 1,
                "ImagePositionPatient": [0, 0, 5.0 * z],
                "ImageOrientationPatient": [1, 0, 0, 0, 1, 0],
                "PatientID": None,
                "StudyInstanceUID": None,
                "SeriesInstanceUID": None,
                "FrameOfReferenceUID": None,
            }
            pixels = rng.integers(0, 999, (8, 8)).astype(np.int16)
            name = f"p{patient}/{z}.dcm" if folders else f"{patient}-{z}.dcm"
            save(dicom(pixels, **(header | elements(patient, z))), folder / name)


def is_grouped_by_patient(listing: Listing) -> bool:
    """Return whether there are as many groups as patients, and all slices are there."""
    num_slices = sum(len(item.images) for item in listing.items)
    groups = {item.group for item in listing.items}
    return num_slices == NUM_PATIENTS * NUM_SLICES and len(groups) == NUM_PATIENTS


def uid(*numbers: int) -> str:
    return ".".join(map(str, ("1.2.3", *numbers)))


@pytest.mark.parametrize(
    ("elements", "folders", "kind", "sentence"),
    [
        (lambda p, z: {"PatientID": f"P{p}"}, False, "patient", ""),
        (
            lambda p, z: {"PatientID": "", "StudyInstanceUID": uid(p)},
            False,
            "study",
            r"20 of 20 files have no PatientID .* groups are 4 studies",
        ),
        (
            lambda p, z: {"PatientID": "ANONYMOUS", "StudyInstanceUID": uid(p)},
            False,
            "study",
            "groups are 4 studies",
        ),
        (
            lambda p, z: {"StudyInstanceUID": "1.2.9", "FrameOfReferenceUID": uid(p)},
            False,
            "frame of reference",
            "StudyInstanceUID is the same in all files.*groups are 4 frames of reference",
        ),
        (
            lambda p, z: {
                "StudyInstanceUID": uid(p, z),
                "FrameOfReferenceUID": "1.2.840.10008.1.4.1.1",
                "SeriesInstanceUID": uid(p),
            },
            False,
            "series",
            "StudyInstanceUID is new in every file.*groups are 4 series",
        ),
        (lambda p, z: {}, True, "folder", "are missing.*groups are 4 folders"),
        (
            lambda p, z: {"StudyInstanceUID": uid(p, z), "SeriesInstanceUID": uid(9, p, z)},
            True,
            "folder",
            "StudyInstanceUID and SeriesInstanceUID are new in every file.*groups are 4 folders",
        ),
        (
            lambda p, z: {"StudyInstanceUID": "1.2.9", "SeriesInstanceUID": "1.2.8"},
            True,
            "folder",
            "SeriesInstanceUID are the same in all files.*groups are 4 folders",
        ),
        (
            # Every other slice lost its PatientID.
            lambda p, z: {"PatientID": f"P{p}" if z % 2 else "", "StudyInstanceUID": uid(p)},
            False,
            "patient",
            "12 of 20 files have no PatientID .*; other files with their UIDs name their patients",
        ),
        (
            # UIDs that all patients share do not join them.
            lambda p, z: {
                "PatientID": f"P{p}",
                "StudyInstanceUID": "1.2.9",
                "SeriesInstanceUID": "1.2.8",
                "SOPInstanceUID": "1.2.7",
            },
            False,
            "patient",
            "19 files have the SOPInstanceUID of another file and other pixels; they are kept",
        ),
    ],
)
def test_groups_are_patients_or_what_comes_next_and_it_is_told(
    elements: Any, folders: bool, kind: str, sentence: str, tmp_path: Path
) -> None:
    write_patients(tmp_path, elements, folders=folders)
    listing = find(tmp_path)
    assert is_grouped_by_patient(listing)
    assert {item.group_kind for item in listing.items} == {kind}
    assert re.search(sentence, listing.summary), listing.summary
    assert ("patients are not" in listing.summary) == ("groups are" in sentence)


@pytest.mark.parametrize("folders", [False, True])
def test_slices_that_nothing_tells_apart_have_no_group(folders: bool, tmp_path: Path) -> None:
    names = ("benign", "malignant", "normal", "test")
    write_patients(tmp_path, lambda p, z: {}, folders=folders)
    if folders:
        for patient, name in enumerate(names):
            (tmp_path / f"p{patient}").rename(tmp_path / name)
    listing = find(tmp_path)
    assert {item.group for item in listing.items} == {""}
    assert "near-duplicates among 20 items that nothing tells apart" in listing.summary


def test_one_patient_id_for_all_is_told(tmp_path: Path) -> None:
    write_patients(tmp_path, lambda p, z: {"PatientID": "X7", "SeriesInstanceUID": uid(p)})
    listing = find(tmp_path)
    assert len({item.group for item in listing.items}) == 1
    assert "all files have one PatientID, so they are one patient" in listing.summary
    assert "X7" not in listing.summary


def test_the_same_pixels_at_the_same_place_are_a_copy_whatever_the_compression(
    tmp_path: Path,
) -> None:
    series = ct_series(tmp_path / "a", np.arange(192, dtype=np.int16).reshape(3, 8, 8))
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    series[0].compress(RLELossless, generate_instance_uid=False)
    save(series[0], tmp_path / "c.dcm")
    listing = find(tmp_path)
    (item,) = listing.items
    assert len(item.images) == 3
    assert sorted(file.file for file in listing.rejected) == [
        "b/IM0000",
        "b/IM0001",
        "b/IM0002",
        "c.dcm",
    ]
    assert all("is a second copy of a/IM" in file.reason for file in listing.rejected)
    assert "other pixels" not in listing.summary


def test_copies_without_a_uid_are_found_and_air_is_no_copy(tmp_path: Path) -> None:
    air = np.zeros((8, 8), np.int16)
    for z in range(3):
        header = {"SOPInstanceUID": None, "InstanceNumber": z, "SeriesInstanceUID": "1.2"}
        save_without_uid = dicom(air, **header)
        save_without_uid.file_meta.MediaStorageSOPInstanceUID = "1.2.3"
        save_without_uid.save_as(tmp_path / f"{z}.dcm", enforce_file_format=True)
    shutil.copy(tmp_path / "1.dcm", tmp_path / "copy.dcm")
    listing = find(tmp_path)
    assert [len(item.images) for item in listing.items] == [3]
    assert [file.file for file in listing.rejected] == ["copy.dcm"]


def test_a_segmentation_lies_on_its_slices_though_all_have_one_uid(tmp_path: Path) -> None:
    masks = np.zeros((3, 8, 8), np.uint8)
    for z in range(3):
        masks[z, z + 1 : z + 4, 2:6] = 1
    for patient in range(2):
        folder = tmp_path / f"p{patient}"
        slices = ct_series(
            folder,
            np.random.default_rng(patient).integers(0, 99, (3, 8, 8)).astype(np.int16),
            PatientID=f"P{patient}",
        )
        seg = segmentation(slices, masks * (1 - patient) + masks[::-1] * patient)
        one_uid_for_all(seg)
        save(seg, folder / "seg.dcm")
        for number, one in enumerate(slices):
            one.SOPInstanceUID = one.file_meta.MediaStorageSOPInstanceUID = "1.2.3.4"
            save(one, folder / f"IM{(7 * number + 3) % 3:04d}")
    items = find(tmp_path).items
    assert [len(item.masks) for item in items] == [1, 1]
    for item in items:
        frames = list(read_dicom(item, PrepareConfig(), read_bytes))
        is_first = "/p0/" in item.images[0]
        drawn = masks if is_first else masks[::-1]
        np.testing.assert_array_equal(np.stack([frame.mask for frame in frames]), drawn)


def one_uid_for_all(dataset: Any) -> None:
    """Replace the UIDs of all images that a SEG object refers to."""
    for element in dataset.iterall():
        if element.keyword == "ReferencedSOPInstanceUID":
            element.value = "1.2.3.4"


@pytest.mark.parametrize(
    ("image_type", "modality", "is_tiled"),
    [
        (["ORIGINAL", "PRIMARY", "M", "ND", "MOSAIC"], "MR", True),
        (["ORIGINAL", "PRIMARY", "FMRI", "NONE", "ND", "MOSAIC "], "", True),
        (["DERIVED", "SECONDARY", "MONTAGE"], "CT", True),
        (["ORIGINAL", "PRIMARY", "M", "VFRAME"], "MR", True),
        (["DERIVED", "PRIMARY", "MONTAGE"], "OP", False),
        (["ORIGINAL", "PRIMARY", "M", "ND"], "MR", False),
        ("ORIGINAL", "MR", False),
        (None, "MR", False),
    ],
)
def test_a_mosaic_is_refused_in_a_sentence(
    image_type: Any, modality: str, is_tiled: bool, tmp_path: Path
) -> None:
    pixels = np.random.default_rng(2).integers(0, 99, (24, 24)).astype(np.int16)
    save(dicom(pixels, ImageType=image_type, Modality=modality), tmp_path / "tiled.dcm")
    save(dicom(pixels, Modality="MR"), tmp_path / "plain.dcm")
    listing = find(tmp_path)
    assert len(listing.items) == 1 + (not is_tiled)
    reasons = [f"{file.file} {file.reason}" for file in listing.rejected]
    sentence = "tiled.dcm is a mosaic of slices in one picture; convert it to a volume, as dcm2niix"
    assert [reason.startswith(sentence) for reason in reasons] == [True] * is_tiled
    (tmp_path / "plain.dcm").unlink()
    if is_tiled:
        with pytest.raises(DataError, match=r"no DICOM image .* is a mosaic of slices"):
            find(tmp_path)
