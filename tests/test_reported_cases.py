"""Inputs of public bug reports, each made by a script beside the checkout: what users must get."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from amlp_ray.cli import main
from amlp_ray.config import ImageSpec, PrepareConfig
from amlp_ray.data.dataset import PatchDataset
from amlp_ray.data.decoders import read_frames
from amlp_ray.data.layouts import find_items
from amlp_ray.data.prepare import mask_rules
from amlp_ray.data.prepare.scan import ItemScan, ScannedItem, scan_item
from amlp_ray.errors import CheckpointError, DataError
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


@pytest.mark.ray
@pytest.mark.parametrize("variant", [(), ("studies",)])
def test_slices_without_patient_are_split_by_folder_and_told(
    case: Case, variant: tuple[str, ...]
) -> None:
    case.make("dicom_no_patient", *variant)
    code, printed = case.prepare("--size", 32)
    assert code == 0, printed
    assert "patients are not all known" in printed
    manifest = case.dataset().manifest
    assert manifest.group_unit == "group"
    assert sum(counts.groups for counts in manifest.counts.values()) == 4


@pytest.mark.ray
@pytest.mark.parametrize("variant", [(), ("across",)])
def test_slices_that_share_a_uid_are_kept(case: Case, variant: tuple[str, ...]) -> None:
    case.make("dicom_one_uid_for_all", *variant)
    code, printed = case.prepare("--size", 32)
    assert code == 0, printed
    assert len(case.dataset()) == 24
    assert "SOPInstanceUID of another file and other pixels; they are kept" in printed


def test_mosaics_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    case = Case(tmp_path, monkeypatch, capsys)  # needs no Ray
    case.make("dicom_mosaic")
    code, printed = case.prepare("--size", 32)
    assert code == 2
    assert "is a mosaic of slices in one picture" in printed


def test_study_with_a_relative_database_is_the_same_from_any_folder(case: Case) -> None:
    case.make("study_relative_sqlite")
    file = case.folder / "a" / "s.yaml"
    file.write_text(file.read_text().replace("arms:", "baselines:"))
    case.monkeypatch.chdir(case.folder / "a")
    code, printed = case.run("study", "enqueue", "s.yaml", "ratio.start=0.5")
    assert code == 0, printed
    runs = ("--runs", "../a/runs")
    case.monkeypatch.chdir(case.folder / "b")
    code, printed = case.run("study", "enqueue", "rel", "ratio.start=0.6", *runs)
    assert (code, printed.splitlines()[0]) == (0, "trial 1 of 'rel' waits to be run")
    assert "WAITING 2" in case.run("study", "status", "rel", *runs)[1]
    assert not list((case.folder / "b").iterdir())
    databases = [path.relative_to(case.folder) for path in case.folder.rglob("*.db")]
    assert databases == [Path("a/runs/rel/trials of 100%.db")]


@pytest.mark.ray
def test_long_folder_for_temporary_files_keeps_no_ray_from_starting(case: Case) -> None:
    folder = case.make("long_tmpdir")
    (scratch,) = case.folder.glob("job_scratch_*")
    done = subprocess.run(
        [sys.executable, "-m", "amlp_ray", "data", "prepare", folder, case.folder / "out"],
        env={**os.environ, "TMPDIR": str(scratch)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert f"Ray keeps its temporary files in /tmp: {scratch} is longer than" in done.stderr
    assert "Traceback" not in done.stderr
    assert case.dataset().count("train") == 28


@pytest.fixture
def quick_case(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Case:
    """Return a case that needs no Ray."""
    return Case(tmp_path, monkeypatch, capsys)


def scan(case: Case, config: PrepareConfig) -> list[ItemScan]:
    """List and decode the images of a case, as `prepare` does first, but without Ray."""
    scans = [scan_item(item, config) for item in find_items(config, case.folder / "in").items]
    assert not any(one.fault for one in scans)
    return scans


def lesions_of(scans: list[ItemScan]) -> list[int]:
    """Return the lesion pixels of each image before it is resized."""
    return [one.mask_area.lesion_pixels for one in scans]


def test_spacing_is_that_of_the_qform_where_the_sform_has_no_scale(quick_case: Case) -> None:
    quick_case.make("sform_unit_scale")
    for one in scan(quick_case, PrepareConfig(size=32)):
        assert one.frames[0].spacing == pytest.approx((1.3158, 1.3158), abs=1e-4)
        assert "the qform, which agrees with pixdim, is taken" in one.notes[0]


@pytest.mark.parametrize(
    ("name", "labels"), [("coco_string_category", (1,)), ("coco_image_id_text", ())]
)
def test_coco_numbers_as_text_are_matched(
    name: str, labels: tuple[int, ...], quick_case: Case
) -> None:
    quick_case.make(name)
    scans = scan(quick_case, PrepareConfig(size=32, lesion_labels=labels))
    assert lesions_of(scans) == [100] * 6


def test_coco_category_that_is_not_there_is_an_error(quick_case: Case) -> None:
    quick_case.make("coco_no_such_category")
    with pytest.raises(DataError, match=r"2 is no category .* 0 \(benign\), 1 \(malignant\)"):
        scan(quick_case, PrepareConfig(size=32, lesion_labels=(2,)))


def test_retina_vessels_are_the_lesion_and_not_the_field_of_view(quick_case: Case) -> None:
    quick_case.make("retina_fov_masks")
    assert lesions_of(scan(quick_case, PrepareConfig(size=32))) == [40] * 8


def read_masks(case: Case, config: PrepareConfig) -> list[int]:
    """Return the lesion pixels of each image under the rule of the set, without Ray."""

    def run_here(jobs: dict[int, Any], work: Callable[[Any], Any]) -> list[tuple[int, Any]]:
        return [(key, work(job)) for key, job in jobs.items()]

    case.monkeypatch.setattr(mask_rules, "run_jobs", run_here)
    items = find_items(config, case.folder / "in").items
    scanned = [ScannedItem(item, scan_item(item, config)) for item in items]
    alike, _ = mask_rules.read_masks_alike(scanned, config)
    return lesions_of([scan for _, scan in alike])


@pytest.mark.parametrize(
    ("name", "variant", "options", "pixels"),
    [
        ("palette_label_seven", (), {"lesion_labels": (7,)}, [100] * 8),
        ("jpeg_mask_small_values", (), {"lesion_threshold": 0}, [64] * 8),
        ("png_mask_from_jpeg", (), {}, [249] * 6),
        ("alpha_only_mask", (), {}, [100] * 6),
        ("alpha_only_mask", ("black",), {}, [100] * 6),
    ],
)
def test_masks_mark_the_pixels_that_were_drawn(
    name: str,
    variant: tuple[str, ...],
    options: dict[str, Any],
    pixels: list[int],
    quick_case: Case,
) -> None:
    quick_case.make(name, *variant)
    assert read_masks(quick_case, PrepareConfig(size=32, **options)) == pixels


@pytest.mark.ray
def test_prepare_writes_masks_as_the_rule_of_the_set_reads_them(case: Case) -> None:
    case.make("palette_label_seven")  # some files alone look as if their palettes were grays
    code, printed = case.prepare("--size", 32)
    assert code == 0, printed
    assert "The masks hold the values 1, 7: all are lesion" in printed
    assert sorted(case.lesion_pixels()) == [100] * 4 + [125] * 4


def test_faint_jpeg_masks_are_asked_about(quick_case: Case) -> None:
    quick_case.make("jpeg_mask_small_values")
    with pytest.raises(DataError, match=r"2 of 8 masks have faint values.*--lesion-threshold 0"):
        read_masks(quick_case, PrepareConfig(size=32))


@pytest.mark.parametrize("variant", [(), ("shaped",)])
def test_tiff_stacks_of_one_directory_are_refused(
    variant: tuple[str, ...], quick_case: Case
) -> None:
    quick_case.make("tiff_stack_one_directory", *variant)
    config = PrepareConfig(size=32)
    for item in find_items(config, quick_case.folder / "in").items:
        assert "holds 10 frames, but one is accepted" in scan_item(item, config).fault


@pytest.mark.parametrize("bits", [8, 16])
def test_tiff_whose_zero_is_white_is_dark_as_viewers_show_it(bits: int, quick_case: Case) -> None:
    quick_case.make("tiff_white_is_zero", str(bits))
    config = PrepareConfig(size=32)
    for item in find_items(config, quick_case.folder / "in").items:
        (frame,) = read_frames(item, config)
        assert frame.image.mean() / (2**bits - 1) == pytest.approx(0.106, abs=0.01)
        assert frame.image[12, 12, 0] > 0.9 * (2**bits - 1)
