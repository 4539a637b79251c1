"""Inputs of public bug reports, each made by a script beside the checkout: what users must get."""

from __future__ import annotations

import os
import runpy
import sys
from pathlib import Path

import pytest

from amlp_ray.cli import main
from amlp_ray.config import ImageSpec
from amlp_ray.data.dataset import PatchDataset
from amlp_ray.errors import CheckpointError
from amlp_ray.training.checkpoint.pretrained import load_pretrained_encoder

CASES = Path(os.environ.get("AMLP_RAY_CASES", str(Path(__file__).parents[1] / "../shared/cases")))


class Case:
    """One script: makes its input in a folder, and runs commands on it."""

    def __init__(
        self,
        folder: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        self.folder = folder
        self.monkeypatch = monkeypatch
        self.capsys = capsys

    def make(self, name: str, *arguments: str) -> Path:
        """Run the script; return the folder of images that it writes."""
        script = CASES / f"{name}.py"
        if not script.is_file():
            pytest.skip(f"there is no {script}; set AMLP_RAY_CASES to the folder of cases")
        self.monkeypatch.setattr(sys, "argv", [str(script), str(self.folder), *arguments])
        runpy.run_path(str(script), run_name="__main__")
        return self.folder / "in"

    def run(self, *arguments: object) -> tuple[int, str]:
        """Run `amlp-ray` with these arguments; return its exit code, and what it printed."""
        self.monkeypatch.setattr(sys, "argv", ["amlp-ray", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            main()
        printed = self.capsys.readouterr()
        return int(end.value.code or 0), printed.out + printed.err

    def prepare(self, *options: object) -> tuple[int, str]:
        """Run `amlp-ray data prepare`; the dataset is `self.dataset()`."""
        return self.run("data", "prepare", self.folder / "in", self.folder / "out", *options)

    def dataset(self) -> PatchDataset:
        """Open the dataset that `prepare` wrote."""
        return PatchDataset.open(self.folder / "out")

    def lesion_pixels(self) -> list[int]:
        """Count the lesion pixels of every labeled image."""
        masks = [sample.mask for sample in self.dataset()]
        return [int(mask.sum()) for mask in masks if mask is not None]


@pytest.fixture
def case(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    ray_session: None,
) -> Case:
    return Case(tmp_path, monkeypatch, capsys)


@pytest.mark.ray
def test_split_file_with_a_byte_order_mark_is_read(case: Case) -> None:
    case.make("split_file_bom")
    code, printed = case.prepare("--size", 32, "--split-file", case.folder / "split.json")
    assert code == 0, printed
    dataset = case.dataset()
    assert [dataset.count(split) for split in ("train", "val", "test")] == [5, 1, 2]


def test_weights_of_all_kinds_load_or_tell_why_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    case = Case(tmp_path, monkeypatch, capsys)  # needs no Ray
    case.make("weights_kinds")
    spec = ImageSpec(channels=1, height=32, width=32, mean=(0.0,), std=(1.0,))
    refused = {"nan.pth": "NaN or infinite", "whole_module.pth": "a whole pickled model"}
    for file in sorted((tmp_path / "weights").iterdir()):
        if file.name in refused:
            with pytest.raises(CheckpointError, match=refused.pop(file.name)):
                load_pretrained_encoder(str(file), spec, name="vit_tiny_patch16_224")
        else:
            load_pretrained_encoder(str(file), spec, name="vit_tiny_patch16_224")
    assert not refused


@pytest.mark.ray
@pytest.mark.parametrize("variant", [(), ("pad",)])
def test_background_of_a_label_map_is_no_lesion(case: Case, variant: tuple[str, ...]) -> None:
    case.make("seg_labelmap_background", *variant)
    code, printed = case.prepare("--size", 32)
    assert code == 0, printed
    assert case.lesion_pixels() == [100] * 18


@pytest.mark.ray
def test_gray_jpeg_tagged_rgb_is_one_gray_channel(case: Case) -> None:
    case.make("dicom_rgb_that_is_ycc")
    code, printed = case.prepare("--size", 32)
    assert code == 0, printed
    dataset = case.dataset()
    assert dataset.manifest.channels == 1
    assert "6 repaired" in printed
