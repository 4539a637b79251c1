"""Every layout from its files through `prepare` and back, against an independent read.

Tiles are cut without resampling, so put together again they are the source to the bit, with masks.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import nibabel as nib
import numpy as np
import pydicom
import pytest
from helpers.volumes import dicom, write_nifti
from PIL import Image
from pydicom.pixels import apply_rescale

from amlp_ray.config import PrepareConfig
from amlp_ray.data.dataset import PatchDataset
from amlp_ray.data.manifest import SPLITS
from amlp_ray.data.prepare.pipeline import prepare

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_session"), pytest.mark.timeout(180)]

Picture = tuple[np.ndarray, np.ndarray | None]  # (H, W, C) and (H, W)


class Whole(NamedTuple):
    """Frames put together from their tiles, by name of the item and number of the frame."""

    frames: dict[tuple[str, int], Picture]
    dataset: PatchDataset


def round_trip(source: Path, out: Path, layout: str, **config: Any) -> Whole:
    values = {
        "layout": layout,
        "size": 32,
        "fit": "tiles",
        "min_foreground": 0,
        "fractions": (1, 0, 0),
    } | config
    dataset = prepare(source, out, PrepareConfig.model_validate(values), strict=True)
    table = dataset.table()
    frames: dict[tuple[str, int], Picture] = {}
    for row, sample in zip(table.itertuples(), dataset, strict=True):
        name = sample.id.rpartition("@")[0]
        if "/" in name and layout in ("dicom", "nifti", "decathlon"):
            name = name.rpartition("/")[0]
        at = name, row.frame
        if at not in frames:
            image = np.zeros((row.height, row.width, len(sample.image)), sample.image.dtype)
            frames[at] = (
                image,
                None if sample.mask is None else np.zeros((row.height, row.width), np.uint8),
            )
        image, mask = frames[at]
        area = slice(row.y, min(row.y + 32, row.height)), slice(row.x, min(row.x + 32, row.width))
        height, width = area[0].stop - row.y, area[1].stop - row.x
        image[area] = sample.image.transpose(1, 2, 0)[:height, :width]
        assert (mask is None) == (sample.mask is None)
        if mask is not None and sample.mask is not None:
            mask[area] = sample.mask[:height, :width]
            assert sample.mask.sum() == row.lesion
    return Whole(frames, dataset)


def same(picture: Picture, image: np.ndarray, mask: np.ndarray | None) -> None:
    np.testing.assert_array_equal(picture[0], image.reshape(*image.shape[:2], -1))
    if mask is None:
        assert picture[1] is None
    else:
        assert picture[1] is not None
        np.testing.assert_array_equal(picture[1], mask)


def noise(*shape: int, seed: int = 0, dtype: Any = np.uint8, high: int = 256) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, high, shape).astype(dtype)


def disc(height: int, width: int) -> np.ndarray:
    rows, columns = np.mgrid[:height, :width]
    return np.hypot(rows - height * 0.4, columns - width * 0.6) < 9


def test_busi(busi_folder: Path, tmp_path: Path) -> None:
    result = round_trip(busi_folder, tmp_path / "out", "busi")
    assert len(result.frames) == 18
    for (name, _), picture in result.frames.items():
        folder = busi_folder / name.split()[0]
        gray = np.asarray(Image.open(folder / f"{name}.png").convert("L"))
        union = np.zeros(gray.shape, bool)
        for path in folder.iterdir():
            if path.name.startswith(f"{name}_mask"):
                union |= np.asarray(Image.open(path).convert("RGB")).any(axis=2)
        same(picture, gray, union)


def test_paired(paired_folder: Path, tmp_path: Path) -> None:
    result = round_trip(paired_folder, tmp_path / "out", "paired")
    assert len(result.frames) == 6
    for i in range(6):
        masks = list((paired_folder / "masks").glob(f"case_{i}*"))
        mask = np.asarray(Image.open(masks[0])) if masks else None
        same(
            result.frames[f"case_{i}", 0],
            np.asarray(Image.open(paired_folder / "images" / f"case_{i}.png")),
            mask,
        )


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int16", "float32"])
def test_flat_of_every_type_and_any_channels(dtype: str, tmp_path: Path) -> None:
    arrays = {}
    for i, folder in enumerate(("a", "a/b", "c [d]/e")):
        (tmp_path / "in" / folder).mkdir(parents=True)
        values = noise(50, 70, 5, seed=i, high=30000).astype(dtype)
        values = values - values.dtype.type(200) if dtype in ("int16", "float32") else values
        np.save(tmp_path / "in" / folder / "x.npy", values)
        arrays[f"{folder}/x"] = values
    result = round_trip(tmp_path / "in", tmp_path / "out", "flat")
    assert result.dataset.manifest.dtype == dtype
    assert {name for name, _ in result.frames} == set(arrays)
    for (name, _), picture in result.frames.items():
        same(picture, arrays[name], None)


def test_lgg(tmp_path: Path) -> None:
    for patient in ("TCGA_A", "TCGA_B"):
        (tmp_path / "in" / patient).mkdir(parents=True)
        for i in (1, 2):
            color = Image.fromarray(noise(40, 60, 3, seed=i + len(patient)))
            color.save(tmp_path / "in" / patient / f"{patient}_{i}.tif")
            Image.fromarray(disc(40, 60)).save(
                tmp_path / "in" / patient / f"{patient}_{i}_mask.tif"
            )
    result = round_trip(tmp_path / "in", tmp_path / "out", "lgg")
    assert len(result.frames) == 4
    for (name, _), picture in result.frames.items():
        file = tmp_path / "in" / name[:6] / f"{name}.tif"
        same(picture, np.asarray(Image.open(file)), disc(40, 60))
    assert set(result.dataset.table()["group"]) == {"TCGA_A", "TCGA_B"}


def test_coco(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    images = []
    for i in range(3):
        Image.fromarray(noise(40, 60, 3, seed=i)).save(tmp_path / "in" / f"{i}.png")
        images.append({"id": i, "file_name": f"{i}.png", "height": 40, "width": 60})
    square = [10, 5, 30, 5, 30, 25, 10, 25]
    annotations = [
        {"id": 1, "image_id": 0, "category_id": 1, "segmentation": [square], "iscrowd": 0}
    ]
    content = {
        "images": images,
        "annotations": annotations,
        "categories": [{"id": 1, "name": "lesion"}],
    }
    (tmp_path / "in" / "instances.json").write_text(json.dumps(content))
    result = round_trip(tmp_path / "in", tmp_path / "out", "coco")
    drawn = np.zeros((40, 60), np.uint8)
    drawn[5:25, 10:30] = 1
    for i in range(3):
        mask = drawn if i == 0 else np.zeros_like(drawn)
        same(result.frames[str(i), 0], np.asarray(Image.open(tmp_path / "in" / f"{i}.png")), mask)


def test_decathlon_with_a_fourth_dimension_and_labels(tmp_path: Path) -> None:
    volume, label = noise(20, 24, 5, 2, high=900, dtype=np.int16), noise(20, 24, 5, high=4)
    for folder in ("imagesTr", "labelsTr", "imagesTs"):
        (tmp_path / "in" / folder).mkdir(parents=True)
    write_nifti(tmp_path / "in/imagesTr/a.nii.gz", volume)
    write_nifti(tmp_path / "in/labelsTr/a.nii.gz", label)
    write_nifti(tmp_path / "in/imagesTs/b.nii.gz", volume + np.int16(1))
    index = {
        "training": [{"image": "./imagesTr/a.nii.gz", "label": "./labelsTr/a.nii.gz"}],
        "test": ["./imagesTs/b.nii.gz"],
    }
    (tmp_path / "in" / "dataset.json").write_text(json.dumps(index))
    result = round_trip(tmp_path / "in", tmp_path / "out", "decathlon", lesion_labels=(1, 3))
    assert len(result.frames) == 10
    for (name, k), picture in result.frames.items():
        first = name.endswith("a")
        # With an identity affine the first axis runs to the right and the second to the front, so
        # rows run backwards.
        image = np.stack([(volume if first else volume + 1)[:, ::-1, k, c].T for c in range(2)], -1)
        same(picture, image, np.isin(label[:, ::-1, k].T, (1, 3)) if first else None)


def test_brats_modalities_become_channels_in_order(tmp_path: Path) -> None:
    for case in ("BraTS_1", "BraTS_2"):
        for i, modality in enumerate(("flair", "t1", "t1ce", "t2")):
            write_nifti(
                tmp_path / "in" / case / f"{case}_{modality}.nii.gz",
                np.full((8, 9, 3), i, np.int16),
            )
        write_nifti(tmp_path / "in" / case / f"{case}_seg.nii.gz", noise(8, 9, 3, high=5))
    result = round_trip(tmp_path / "in", tmp_path / "out", "nifti", lesion_labels=(4,))
    assert len(result.frames) == 6
    for (_, k), (image, mask) in result.frames.items():
        assert image[0, 0].tolist() == [1, 2, 3, 0]  # t1, t1ce, t2, flair
        np.testing.assert_array_equal(mask, noise(8, 9, 3, high=5)[:, ::-1, k].T == 4)
    assert result.dataset.manifest.counts["train"].labeled == 6


def test_dicom_in_hounsfield_units_with_no_name_left(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    series = pydicom.uid.generate_uid()
    for k in range(4):
        slice_ = dicom(
            noise(40, 36, seed=k, high=3000, dtype=np.int16),
            patient="Roentgen^Anna",
            SeriesInstanceUID=series,
            RescaleIntercept=-1024,
            RescaleSlope=1,
            ImagePositionPatient=[0, 0, 10 - k],
            ImageOrientationPatient=[1, 0, 0, 0, 1, 0],
            PixelSpacing=[0.5, 0.75],
        )
        slice_.save_as(tmp_path / "in" / f"Anna {k}", enforce_file_format=True)
    result = round_trip(tmp_path / "in", tmp_path / "out", "dicom")
    assert len(result.frames) == 4
    for (_, number), picture in result.frames.items():
        same(
            picture, noise(40, 36, seed=3 - number, high=3000, dtype=np.int16) - 1024, None
        )  # in order of position
    table = result.dataset.table()
    assert result.dataset.manifest.dtype == "int16"
    assert (table["spacing_y"] == 0.5).all()
    assert (table["spacing_x"] == 0.75).all()
    content = b"".join(file.read_bytes() for file in (tmp_path / "out").rglob("*.*"))
    for secret in (b"Anna", b"Roentgen", series.encode()):
        assert secret not in content
    assert b"Anna" not in b"".join(
        str(value).encode() for value in result.dataset.table().to_numpy().ravel()
    )


def _slices(folder: Path, count: int, **elements: Any) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    series = pydicom.uid.generate_uid()
    for k in range(count):
        position = {
            name: values[k] if isinstance(values, list) else values
            for name, values in (
                {"SeriesInstanceUID": series, "ImagePositionPatient": None} | elements
            ).items()
        }
        made = dicom(noise(20, 20, seed=k, high=3000, dtype=np.int16), InstanceNumber=k, **position)
        made.save_as(folder / f"{series}-{k}", enforce_file_format=True)
    return series


def test_patients_of_a_table_are_hashed_in_dicom(tmp_path: Path) -> None:
    for name in ("DOE^JOHN", "ROE^JANE", "DOE^JACK"):
        _slices(tmp_path / "in", 2, patient=name)
    lines = ["id,family", "DOE^JOHN,the Does", "ROE^JANE,the Roes", "DOE^JACK,the Does"]
    (tmp_path / "g.csv").write_text("\n".join(lines))
    groups = {"group_file": str(tmp_path / "g.csv"), "group_column": "family"}
    config = PrepareConfig.model_validate(
        {"layout": "dicom", "size": 16, "fractions": (0.5, 0.5, 0)} | groups
    )
    dataset = prepare(tmp_path / "in", tmp_path / "out", config)
    assert sorted(dataset.table().groupby("group").size()) == [2, 4]
    content = b"".join(file.read_bytes() for file in (tmp_path / "out").rglob("*.*"))
    assert not any(word in content for word in (b"DOE", b"Does", b"ROE", b"Roes"))


def test_a_screenshot_does_not_color_a_set_of_slices(tmp_path: Path) -> None:
    _slices(tmp_path / "in", 5)
    for i in range(2):
        sheet = dicom(noise(30, 30, 3), Modality="OT", SOPClassUID="1.2.840.10008.5.1.4.1.1.7")
        sheet.save_as(tmp_path / "in" / f"sheet {i}", enforce_file_format=True)
    config = PrepareConfig(layout="dicom", size=16, fractions=(1, 0, 0))
    dataset = prepare(tmp_path / "in", tmp_path / "out", config)
    assert dataset.shape[0] == 1
    assert len(dataset) == 5
    rejects = (tmp_path / "out.rejects.csv").read_text()
    assert rejects.count(',rejected,"has 3 channels, but the dataset has 1') == 2


def test_one_odd_slice_does_not_lose_a_series(tmp_path: Path) -> None:
    _slices(tmp_path / "in", 4, RescaleSlope=[1.5, 2.5, 1, 4.5], RescaleIntercept=0)
    result = round_trip(tmp_path / "in", tmp_path / "out", "dicom")
    assert result.dataset.manifest.dtype == "float32"
    for (_, k), picture in result.frames.items():
        scaled = noise(20, 20, seed=k, high=3000, dtype=np.int16) * np.float64(
            [1.5, 2.5, 1, 4.5][k]
        )
        same(picture, scaled.astype(np.float32), None)


def test_statistics_of_floats_hold_far_from_zero(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    arrays = [(1e6 + noise(32, 32, seed=i) / 512).astype(np.float32) for i in range(4)]
    for i, array in enumerate(arrays):
        np.save(tmp_path / "in" / f"{i}.npy", array)
    result = round_trip(tmp_path / "in", tmp_path / "out", "flat")
    np.testing.assert_allclose(
        result.dataset.manifest.mean[0], np.mean(arrays, dtype=np.float64), rtol=1e-12
    )
    np.testing.assert_allclose(
        result.dataset.manifest.std[0], np.std(arrays, dtype=np.float64), rtol=1e-9
    )


@pytest.mark.real
@pytest.mark.parametrize("name", ["t1", "t2", "t2s"])
@pytest.mark.parametrize(("axis", "number"), [("axial", 2), ("coronal", 1), ("sagittal", 0)])
def test_real_nifti(name: str, axis: str, number: int, real_data: Path, tmp_path: Path) -> None:
    shutil.copytree(real_data / "nifti" / name, tmp_path / "in")
    result = round_trip(tmp_path / "in", tmp_path / "out", "nifti", axis=axis)
    volumes = {
        file.name: nib.as_closest_canonical(nib.load(file))
        for file in (tmp_path / "in").glob("*.nii*")
    }
    image = next(volume for file, volume in volumes.items() if "seg" not in file)
    labels = [np.asarray(volume.dataobj) > 0 for file, volume in volumes.items() if "seg" in file]
    voxels, label = np.asarray(image.dataobj), np.logical_or.reduce(labels)
    assert len(result.frames) == voxels.shape[number]
    for (_, k), picture in result.frames.items():
        plane, marked = np.take(voxels, k, number), np.take(label, k, number)
        same(picture, np.rot90(plane), np.rot90(marked))
    assert result.dataset.manifest.dtype == voxels.dtype.name
    zooms = np.delete(image.header.get_zooms()[:3], number)
    table = result.dataset.table()
    np.testing.assert_allclose(table["spacing_x"], zooms[0], rtol=1e-6)
    np.testing.assert_allclose(table["spacing_y"], zooms[1], rtol=1e-6)


@pytest.mark.real
@pytest.mark.parametrize("name", ["CT_small.dcm", "MR_small.dcm", "MR_small_RLE.dcm"])
def test_real_dicom(name: str, real_data: Path, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    shutil.copy(real_data / "dicom" / name, tmp_path / "in")
    result = round_trip(tmp_path / "in", tmp_path / "out", "dicom")
    header = pydicom.dcmread(real_data / "dicom" / name)
    (picture,) = result.frames.values()
    same(picture, apply_rescale(header.pixel_array, header), None)


@pytest.mark.real
@pytest.mark.parametrize(("folder", "layout"), [("busi_native", "busi"), ("isic2017", "paired")])
def test_real_pictures(folder: str, layout: str, real_data: Path, tmp_path: Path) -> None:
    result = round_trip(real_data / folder, tmp_path / "out", layout)
    mode = "L" if layout == "busi" else "RGB"
    sources = dict(
        zip(
            result.dataset.table()["id"].str.rpartition("@")[0],
            result.dataset.table()["source"],
            strict=True,
        )
    )
    assert len(result.frames) == (7 if layout == "busi" else 63)
    for (name, _), picture in result.frames.items():
        file = real_data / folder / sources[name]
        stem = file.stem
        beside = file.parent if layout == "busi" else real_data / folder / "masks"
        masks = [
            path
            for path in beside.iterdir()
            if path.stem.startswith((f"{stem}_mask", f"{stem}_seg"))
        ]
        image = np.asarray(Image.open(file).convert(mode))
        union = np.logical_or.reduce(
            [np.asarray(Image.open(path).convert("RGB")).any(axis=2) for path in masks]
        )
        same(picture, image, union)


def test_unlabeled_images_stay_so_in_every_split(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for i in range(12):
        Image.fromarray(noise(32, 32, seed=i)).save(tmp_path / "in" / f"{i}.png")
    result = round_trip(tmp_path / "in", tmp_path / "out", "flat", fractions=(0.5, 0.25, 0.25))
    assert result.dataset.table()["lesion"].isna().all()
    assert [result.dataset.count(split) for split in SPLITS] == [6, 3, 3]
