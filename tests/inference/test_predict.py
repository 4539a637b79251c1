"""Masks of new images, in the geometry of their files.

Tests of positions and files use a segmenter that calls a pixel lesion by its brightness, so that
the mask of an image is known. Probabilities are tested with one fine-tuned on phantoms.
"""

from __future__ import annotations

import errno
import io
import os
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from helpers.volumes import ct_series, dicom, save, turned, write_nifti
from PIL import Image
from torch import Tensor, nn

from amlp_ray.config import (
    ImageSpec,
    ModelConfig,
    PredictConfig,
    PrepareConfig,
    SegmentConfig,
)
from amlp_ray.data.dataset import PatchDataset
from amlp_ray.data.path import DataPath
from amlp_ray.errors import CheckpointError, ConfigError, DataError
from amlp_ray.evaluation.segmentation import segment
from amlp_ray.evaluation.segmenter import LoadedSegmenter, load_segmenter
from amlp_ray.inference import engine
from amlp_ray.inference.engine import choose_fitting
from amlp_ray.inference.geometry import OUTLINE
from amlp_ray.inference.predict import Predictions, predict
from amlp_ray.method.augment import normalize
from amlp_ray.method.autoencoder import MaskedAutoencoder
from amlp_ray.training.checkpoint.export import export_encoder

AFFINE = np.array([[0.5, 0.02, 0, -7], [-0.02, 0.75, 0, 11], [0, 0, 2.5, -40], [0, 0, 0, 1]])


class Bright(nn.Module):
    """Lesion is what lies above the mean of the training images."""

    def forward(self, images: Tensor) -> Tensor:
        return images[:, :1] * 20


class Left(nn.Module):
    """Lesion is the left half, whatever the image."""

    def forward(self, images: Tensor) -> Tensor:
        logits = torch.full_like(images[:, :1], -50)
        logits[..., : images.shape[-1] // 2] = 50
        return logits


class Bench:
    """A folder for everything, and a segmenter that was trained as `prepare` says."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.images, self.out = folder, folder / "images", folder / "masks"
        self.images.mkdir()
        (folder / "segmenter").mkdir()
        (folder / "segmenter" / "segmenter.safetensors").write_bytes(b"weights")
        self.monkeypatch = monkeypatch

    def train(
        self,
        model: nn.Module | None = None,
        *,
        mean: float = 100,
        channels: int = 1,
        **prepare: Any,
    ) -> None:
        config = PrepareConfig.model_validate({"size": 32} | prepare)
        spec = ImageSpec(
            channels=channels,
            height=32,
            width=32,
            mean=(mean,) * channels,
            std=(mean / 2,) * channels,
        )
        loaded = LoadedSegmenter(model or Bright(), spec, config, SegmentConfig())  # type: ignore[arg-type]
        self.monkeypatch.setattr(engine, "load_segmenter", lambda folder: loaded)

    def predict(self, *, overwrite: bool = False, **config: Any) -> Predictions:
        predict_config = PredictConfig.model_validate(config)
        return predict(
            self.images, self.folder / "segmenter", self.out, predict_config, overwrite=overwrite
        )

    def mask(self, name: str) -> np.ndarray:
        return np.asarray(Image.open(self.out / name))

    def rejects(self) -> str:
        return (self.folder / "masks.rejects.csv").read_text()


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    made = Bench(tmp_path, monkeypatch)
    made.train()
    return made


def blob(height: int, width: int) -> np.ndarray:
    """A large ellipse off the middle, (H, W) bool."""
    y, x = np.mgrid[:height, :width]
    return ((y + 0.5) / height - 0.4) ** 2 / 0.3**2 + ((x + 0.5) / width - 0.55) ** 2 / 0.25**2 < 1


def write(path: Path, height: int = 41, width: int = 67, mode: str = "L") -> np.ndarray:
    """A picture that is bright where its lesion is; the lesion."""
    lesion = blob(height, width)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.where(lesion, 180, 20).astype(np.uint8)).convert(mode).save(path)
    return lesion


def dsc(a: np.ndarray, b: np.ndarray) -> float:
    return float(2 * (a & b).sum() / (a.sum() + b.sum()))


@pytest.mark.parametrize("fit", ["stretch", "pad", "tiles"])
def test_a_picture_gets_a_mask_of_its_own_size_and_name(bench: Bench, fit: str) -> None:
    bench.train(fit=fit)
    lesions = {
        "a.png": write(bench.images / "a.png"),
        "wards/b.1.png": write(bench.images / "wards" / "b.1.jpg", 97, 31),
        "c.png": write(bench.images / "c.tif", 20, 25, "RGB"),
    }
    made = bench.predict()
    assert made == Predictions(str(bench.out), 3, 0, 0, str(bench.folder / "masks.rejects.csv"))
    assert not Path(made.rejects).exists()
    assert {p.relative_to(bench.out).as_posix() for p in bench.out.rglob("*.png")} == lesions.keys()
    for name, lesion in lesions.items():
        mask = bench.mask(name)
        assert mask.dtype == np.uint8
        assert mask.shape == lesion.shape
        assert set(np.unique(mask)) == {0, 255}
        assert dsc(mask > 0, lesion) > (0.99 if fit == "tiles" else 0.95)


def test_sixteen_bits_are_brought_to_what_the_training_images_were(bench: Bench) -> None:
    lesion = blob(50, 40)
    pixels = np.where(lesion, 40000, 900).astype(np.uint16) + np.arange(40, dtype=np.uint16)
    Image.fromarray(pixels).save(bench.images / "a.png")
    bench.train(values="percentile", fit="tiles")
    bench.predict()
    assert np.array_equal(bench.mask("a.png") > 0, lesion)
    bench.train(values="keep", fit="tiles")
    with pytest.raises(
        DataError, match=r"a\.png has the mean value .* images of mean 100 and .* another scale"
    ):
        bench.predict(overwrite=True)


@pytest.mark.parametrize("axis", ["axial", "coronal", "sagittal"])
@pytest.mark.parametrize("codes", ["RAS", "PSR", "LPI"])
def test_a_volume_gets_a_mask_on_its_own_grid(bench: Bench, codes: str, axis: str) -> None:
    bench.train(fit="tiles", axis=axis)
    lesion = np.random.default_rng(3).random((11, 9, 7)) > 0.6
    values, affine = turned(np.where(lesion, 250, 3).astype(np.int16), AFFINE, codes)
    source = nib.load(write_nifti(bench.images / "a" / "scan.nii", values, affine))
    bench.predict(probability=True, overlay=True, batch_size=4)
    made = nib.load(bench.out / "a" / "scan.nii.gz")
    assert made.shape == source.shape
    assert made.get_data_dtype() == np.uint8
    assert np.array_equal(made.affine, source.affine)
    assert made.header.get_zooms() == source.header.get_zooms()
    assert np.array_equal(np.asarray(made.dataobj), values > 100)
    shares = nib.load(bench.folder / "masks.probability" / "a" / "scan.nii.gz")
    assert shares.get_data_dtype() == np.float32
    assert np.array_equal(shares.affine, source.affine)
    assert np.array_equal(np.asarray(shares.dataobj) > 0.5, values > 100)
    count = {"axial": 7, "coronal": 9, "sagittal": 11}[axis]
    assert len(list((bench.folder / "masks.overlay" / "a" / "scan").glob("*.png"))) == count


def test_the_channels_of_a_case_get_one_mask(bench: Bench) -> None:
    bench.train(channels=2, fit="tiles")
    for case in ("x", "y"):
        for channel in ("t1", "t2"):
            volume = np.full((8, 8, 3), 200 if (case, channel) == ("y", "t1") else 10, np.uint8)
            write_nifti(bench.images / case / f"{case}_{channel}.nii.gz", volume)
    assert bench.predict().predicted == 2
    assert {p.relative_to(bench.out).as_posix() for p in bench.out.rglob("*.nii.gz")} == {
        "x/x.nii.gz",
        "y/y.nii.gz",
    }
    assert np.asarray(nib.load(bench.out / "y" / "y.nii.gz").dataobj).all()
    assert not np.asarray(nib.load(bench.out / "x" / "x.nii.gz").dataobj).any()


def test_each_file_of_a_series_and_each_frame_of_an_object_gets_a_mask(bench: Bench) -> None:
    bench.train(fit="tiles")
    lesion = np.random.default_rng(0).random((6, 30, 40)) > 0.7
    pixels = np.where(lesion, 300, 5).astype(np.int16)
    names = ["1.2.840.17", "1.2.840.9", "b.dcm"]  # by place; the numbers of a UID are no suffix
    ct_series(bench.images / "series", pixels[:3], names=names)
    save(dicom(pixels[3:5]), bench.images / "frames.dcm")
    save(dicom(pixels[5]), bench.images / "one.DCM")
    assert bench.predict().predicted == 3
    expected = dict(
        zip(
            ["series/1.2.840.17.png", "series/1.2.840.9.png", "series/b.png"],
            lesion[:3],
            strict=True,
        )
    )
    expected |= {"frames/0000.png": lesion[3], "frames/0001.png": lesion[4], "one.png": lesion[5]}
    assert {
        p.relative_to(bench.out).as_posix() for p in bench.out.rglob("*.png")
    } == expected.keys()
    for name, truth in expected.items():
        assert np.array_equal(bench.mask(name) > 0, truth), name


def test_masks_in_the_folder_are_not_even_read(bench: Bench) -> None:
    lesion = write(bench.images / "images" / "a.png")
    (bench.images / "masks").mkdir()
    (bench.images / "masks" / "a.png").write_bytes(b"no picture")
    assert bench.predict().predicted == 1
    assert dsc(bench.mask("images/a.png") > 0, lesion) > 0.95


def test_files_that_cannot_be_used_are_listed_and_the_rest_is_predicted(bench: Bench) -> None:
    write(bench.images / "good.png")
    (bench.images / "bad.png").write_bytes(b"<html>")
    write(bench.images / "twice.png")
    write(bench.images / "twice.jpg")
    made = bench.predict()
    assert (made.predicted, made.rejected) == (2, 2)
    assert "bad.png,rejected," in bench.rejects()
    assert "twice.png,rejected," in bench.rejects()
    (bench.images / "good.png").unlink()
    (bench.images / "twice.png").unlink()
    (bench.images / "twice.jpg").unlink()
    for threshold in (0.5, 0.6):
        with pytest.raises(DataError, match=r"None of 1 image can be used\. The first: .*bad\.png"):
            bench.predict(overwrite=threshold == 0.5, threshold=threshold)


def test_two_files_never_get_one_mask(bench: Bench) -> None:
    bench.train(fit="tiles")
    pixels = np.full((20, 20), 300, np.int16)
    save(dicom(pixels), bench.images / "a.dcm")
    save(dicom(pixels), bench.images / "a.IMA")
    assert bench.predict().predicted == 1
    assert "would get the mask a.png, which is that of" in bench.rejects()


def test_other_channels_than_those_of_training_are_refused(bench: Bench) -> None:
    bench.train(channels=3)
    write_nifti(bench.images / "a.nii.gz", np.full((9, 9, 3), 100, np.uint8))
    with pytest.raises(
        DataError, match=r"has 1 channels, but the segmenter was trained on 3; give the same"
    ):
        bench.predict()


def test_a_run_goes_on_where_it_stopped(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in "abc":
        write(bench.images / f"{name}.png")
    whole, written = DataPath.atomic_write, 0

    def full(self: DataPath, content: str | bytes) -> None:
        nonlocal written
        written += 1
        if written > 3:  # what the folder is of, and two masks
            raise OSError(errno.ENOSPC, "No space left on device")
        whole(self, content)

    with monkeypatch.context() as patched:
        patched.setattr(DataPath, "atomic_write", full)
        with pytest.raises(
            DataError, match=r"masks cannot be written \(No space left on device\); .* to resume"
        ):
            bench.predict()
    made = bench.predict(batch_size=2)
    assert (made.predicted, made.before) == (1, 2)
    later = (bench.out / "b.png").stat().st_mtime + 5
    os.utime(bench.images / "b.png", (later, later))
    made = bench.predict()
    assert (made.predicted, made.before) == (1, 2), "an image that changed is predicted again"


def test_images_and_masks_may_lie_in_an_object_store(bench: Bench, s3_bucket: str) -> None:
    write(bench.images / "a.png")
    (DataPath(s3_bucket) / "scans" / "a.png").atomic_write((bench.images / "a.png").read_bytes())
    save(dicom(np.full((20, 20), 300, np.int16)), bench.images / "b.dcm")
    (DataPath(s3_bucket) / "series" / "x" / "b.dcm").atomic_write(
        (bench.images / "b.dcm").read_bytes()
    )
    bench.train(fit="tiles")
    for source, name in (("scans", "a.png"), ("series", "x/b.png")):
        out = DataPath(s3_bucket) / f"masks of {source}"
        arguments = (DataPath(s3_bucket) / source, bench.folder / "segmenter", out)
        assert predict(*arguments).predicted == 1
        assert Image.open(io.BytesIO((out / name).read_bytes())).mode == "L"
        assert predict(*arguments).before == 1


def test_predictions_of_something_else_are_kept_unless_told(bench: Bench) -> None:
    write(bench.images / "a.png")
    bench.predict()
    with pytest.raises(
        DataError,
        match=r"masks holds predictions of other images, .* or --overwrite to replace them",
    ):
        bench.predict(threshold=0.9)
    (bench.out / "old.png").write_bytes(b"")
    assert bench.predict(threshold=0.9, overwrite=True).predicted == 1
    assert not (bench.out / "old.png").exists()


def test_a_folder_of_something_else_is_never_written_into(bench: Bench) -> None:
    write(bench.images / "a.png")
    bench.out.mkdir()
    (bench.out / "thesis.txt").write_text("three years")
    with pytest.raises(
        DataError, match="holds something else than predictions; give another --out"
    ):
        bench.predict(overwrite=True)
    assert [p.name for p in bench.out.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize("where", [".", "masks", ".."])
def test_masks_are_not_written_among_the_images(bench: Bench, where: str) -> None:
    write(bench.images / "a.png")
    bench.out = bench.images / where
    with pytest.raises(DataError, match="give masks a folder of their own"):
        bench.predict(overwrite=True)
    assert [p.name for p in bench.images.iterdir()] == ["a.png"]


def test_a_mirrored_look_is_turned_back(bench: Bench) -> None:
    bench.train(Left())
    write(bench.images / "a.png", 20, 30)
    bench.predict(probability=True)
    once = np.asarray(Image.open(bench.folder / "masks.probability" / "a.png"))
    bench.predict(probability=True, flip_tta=True, overwrite=True)
    twice = np.asarray(Image.open(bench.folder / "masks.probability" / "a.png"))
    assert (once[:, 0] == 65535).all()
    assert (once[:, -1] == 0).all()
    assert np.abs(twice.astype(int) - 32768).max() <= 1


def test_an_overlay_is_the_image_with_an_outline(bench: Bench) -> None:
    write(bench.images / "wards" / "a.jpg", mode="RGB")
    bench.predict(overlay=True)
    drawn = np.asarray(Image.open(bench.folder / "masks.overlay" / "wards" / "a.png"))
    ring = (drawn == OUTLINE).all(2)
    assert drawn.shape == (41, 67, 3)
    assert ring.any()
    assert not (ring & (bench.mask("wards/a.png") > 0)).any()


@pytest.mark.parametrize(
    ("trained", "tiling", "fit"),
    [
        ("stretch", "auto", "stretch"),
        ("pad", "auto", "pad"),
        ("tiles", "auto", "tiles"),
        ("stretch", "on", "tiles"),
        ("pad", "off", "pad"),
        ("tiles", "off", "pad"),
    ],
)
def test_images_are_taken_as_in_training_unless_told(trained: str, tiling: str, fit: str) -> None:
    prepare = PrepareConfig.model_validate(
        {"fit": trained, "scale": 0.5 if trained == "tiles" else 1}
    )
    way = choose_fitting(prepare, PredictConfig.model_validate({"tiling": tiling}))
    assert (way.fit, way.scale) == (fit, 0.5 if (trained, fit) == ("tiles", "tiles") else 1)
    if fit == "tiles":
        assert (
            choose_fitting(
                prepare, PredictConfig.model_validate({"tiling": tiling, "scale": 0.25})
            ).scale
            == 0.25
        )


def test_a_scale_without_tiles_is_refused(bench: Bench) -> None:
    write(bench.images / "a.png")
    with pytest.raises(
        ConfigError, match=r"scale is 0\.5, but images are taken whole here; add tiling=on"
    ):
        bench.predict(scale=0.5)


def test_tiles_for_a_segmenter_of_whole_images_come_with_a_warning(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    write(bench.images / "a.png", 70, 90)
    bench.predict(tiling="on")
    assert "trained on whole images (stretch): tiles suit it only where" in caplog.text


def test_a_segmenter_that_does_not_know_how_its_images_were_prepared_is_refused(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = ImageSpec(channels=1, height=32, width=32, mean=(0,), std=(1,))
    loaded = LoadedSegmenter(Bright(), spec, None, SegmentConfig())  # type: ignore[arg-type]
    monkeypatch.setattr(engine, "load_segmenter", lambda folder: loaded)
    with pytest.raises(CheckpointError, match="does not say how its training images were prepared"):
        bench.predict()
    assert not bench.out.exists()


@pytest.mark.real
def test_real_volumes_and_slices_keep_their_grid(bench: Bench, real_data: Path) -> None:
    bench.train(values="percentile", fit="tiles", axis="sagittal")
    bench.images = real_data / "nifti"
    made = bench.predict()
    assert (made.predicted, made.rejected) == (3, 1), "one has two channels"
    for name in ("t1/t1w", "t2/t2", "t2s/t2s"):
        source, mask = (
            nib.load(bench.images / f"{name}.nii.gz"),
            nib.load(bench.out / f"{name}.nii.gz"),
        )
        assert mask.shape == source.shape
        assert np.array_equal(mask.affine, source.affine)
        values = np.asarray(source.dataobj)
        assert 0 < np.asarray(mask.dataobj).mean() < 1
        assert (
            values[np.asarray(mask.dataobj) > 0].min()
            >= values[np.asarray(mask.dataobj) == 0].max()
        )
    bench.images, bench.out = real_data / "dicom", bench.folder / "slices"
    assert bench.predict().predicted == 2
    assert bench.mask("CT_small.png").shape == (128, 128)


@pytest.fixture(scope="module")
def tuned(phantom_dataset: PatchDataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A segmenter fine-tuned on phantoms, for two epochs."""
    folder = tmp_path_factory.mktemp("tuned")
    torch.manual_seed(3)
    model = ModelConfig(patch_size=8, width=24, depth=2, heads=2, decoder_width=16)
    encoder, spec = folder / "encoder.safetensors", phantom_dataset.spec
    export_encoder(MaskedAutoencoder(model, spec).encoder, encoder, model, spec)
    config = SegmentConfig(epochs=2, batch_size=6, decoder_width=8, lr=3e-3)
    segment(phantom_dataset, encoder, folder / "segmenter", config)
    return folder / "segmenter"


@pytest.mark.ray
def test_files_are_predicted_as_images_of_the_dataset_are(
    tuned: Path, phantom_dataset: PatchDataset, tmp_path: Path
) -> None:
    source = phantom_dataset.root.parent / "source"
    config = PredictConfig(probability=True)
    assert predict(source, tuned, tmp_path / "masks", config).predicted == len(phantom_dataset)
    loaded, val = load_segmenter(tuned), phantom_dataset.load("val")
    with torch.inference_mode():
        expected = (
            loaded.model(normalize(torch.from_numpy(val.images), loaded.spec))
            .sigmoid()[:, 0]
            .numpy()
        )
    assert expected.std() > 0
    for name, probability in zip(val.ids, expected, strict=True):
        file = tmp_path / "masks.probability" / "images" / f"{name}.png"
        assert np.abs(np.asarray(Image.open(file)) / 65535 - probability).max() < 2e-5


@pytest.mark.ray
def test_a_tile_that_is_the_whole_image_gives_what_the_whole_image_does(
    tuned: Path, phantom_dataset: PatchDataset, tmp_path: Path
) -> None:
    source = phantom_dataset.root.parent / "source"
    masks = []
    for tiling in ("on", "off"):
        config = PredictConfig.model_validate({"probability": True, "tiling": tiling})
        predict(source, tuned, tmp_path / tiling, config)
        files = sorted((tmp_path / f"{tiling}.probability").rglob("*.png"))
        masks.append(np.stack([np.asarray(Image.open(file)) for file in files]).astype(int))
    assert masks[0].shape == (len(phantom_dataset), 64, 64)
    assert np.abs(masks[0] - masks[1]).max() <= 1
