from __future__ import annotations

import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from helpers.volumes import ct_series, save, segmentation

from amlp_ray.config import PrepareConfig
from amlp_ray.data.decoders.dicom import read_dicom
from amlp_ray.data.layouts.dicom import find_dicom
from amlp_ray.data.path import DataPath, read_bytes
from amlp_ray.data.pseudonyms import pseudonym, salt
from amlp_ray.errors import DataError

# Elements that name a patient, beside names and UIDs.
NAMING = ("PatientID", "AccessionNumber", "StudyDate", "PatientBirthDate", "InstitutionName")


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A configuration folder of its own, and no salt in the environment."""
    monkeypatch.delenv("AMLP_RAY_SALT", raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    return tmp_path / "config" / "amlp_ray"


def test_salt_of_the_environment_comes_first_and_makes_no_file(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AMLP_RAY_SALT", "ours")
    assert salt() == b"ours"
    assert not home.exists()


def test_salt_is_made_once_and_is_its_owners_alone(home: Path) -> None:
    first = salt()
    assert len(first) == 32
    assert salt() == first
    assert stat.S_IMODE((home / "salt").stat().st_mode) == 0o600
    assert [path.name for path in home.iterdir()] == ["salt"]


def test_processes_that_start_together_agree_on_a_salt(home: Path) -> None:
    with ThreadPoolExecutor(16) as pool:
        assert len(set(pool.map(lambda _: salt(), range(64)))) == 1


def test_without_the_variable_the_home_folder_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("AMLP_RAY_SALT", raising=False)
    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    salt()
    assert (tmp_path / ".config" / "amlp_ray" / "salt").is_file()


def test_damaged_salt_is_an_error_that_tells_what_a_new_one_means(home: Path) -> None:
    home.mkdir(parents=True)
    (home / "salt").write_bytes(b"short")
    with pytest.raises(DataError, match=r"salt holds 5 bytes.*all patients get new names"):
        salt()


def test_salt_that_cannot_be_kept_names_the_variable(home: Path) -> None:
    home.parent.write_text("a file where a folder must be")
    with pytest.raises(DataError, match="AMLP_RAY_SALT"):
        salt()


def test_pseudonyms_depend_on_text_and_salt() -> None:
    names = {
        pseudonym(text, key) for text in ("0815", "0816", "Müller", "") for key in (b"a", b"b")
    }
    assert len(names) == 8
    assert all(len(name) == 16 and set(name) <= set("0123456789abcdef") for name in names)
    assert pseudonym("0815", b"a") == pseudonym("0815", b"a")


def test_nothing_that_names_a_patient_reaches_items_or_frames(tmp_path: Path, home: Path) -> None:
    volume = np.random.default_rng(0).integers(-1000, 1000, (4, 16, 16)).astype(np.int16)
    slices = ct_series(tmp_path / "in", volume)
    seg = segmentation(slices, np.ones((4, 16, 16), np.uint8))
    save(seg, tmp_path / "in" / "seg")
    listing = find_dicom(DataPath(tmp_path / "in"), PrepareConfig())
    frames = [
        frame for item in listing.items for frame in read_dicom(item, PrepareConfig(), read_bytes)
    ]
    assert len(frames) == 4
    output = repr(listing) + repr([(frame.spacing, frame.notes, frame.number) for frame in frames])
    for dataset in (*slices, seg):
        for element in dataset.iterall():
            if element.VR in ("UI", "PN") or element.keyword in NAMING:
                values = element.value if element.VM > 1 else [element.value]
                for value in filter(None, map(str, values)):
                    assert value not in output, element.keyword
    assert salt().hex() not in output


def test_one_patient_has_one_group_over_runs_and_series(
    tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    volume = np.zeros((2, 8, 8), np.int16)
    for name, patient in (("a", "7"), ("b", "7"), ("c", "8")):
        ct_series(tmp_path / "in" / name, volume, patient=patient)
    ct_series(tmp_path / "in" / "d", volume, patient="", StudyInstanceUID="1.2.3")
    first = find_dicom(DataPath(tmp_path / "in"), PrepareConfig()).items
    assert (
        len({item.group for item in first}) == 3
    )  # 7, 8, and the study of the one without a number
    assert find_dicom(DataPath(tmp_path / "in"), PrepareConfig()).items == first
    monkeypatch.setenv("AMLP_RAY_SALT", "another")
    assert not {item.group for item in first} & {
        i.group for i in find_dicom(DataPath(tmp_path / "in"), PrepareConfig()).items
    }
