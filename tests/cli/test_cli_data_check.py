"""amlp-ray data check: a table for people, JSON for programs, an exit code for pipelines."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import typer
from helpers.datasets import write_dataset
from PIL import Image

from amlp_ray.cli.data_check import check
from amlp_ray.data.dataset import PatchDataset
from amlp_ray.errors import AmlpError


def dataset(folder: Path, *, leak: bool = False, unlabeled: bool = False) -> PatchDataset:
    """40 images of 64 pixels; the last of test is the first of train if there is to be a leak."""
    rng = np.random.default_rng(0)
    coarse = rng.normal(110, 30, (40, 8, 8)).clip(20, 200).astype(np.uint8)
    images = np.stack(
        [np.asarray(Image.fromarray(c).resize((64, 64), Image.Resampling.BICUBIC)) for c in coarse]
    )
    mask = np.zeros((64, 64), np.uint8)
    mask[20:40, 20:40] = 1
    if leak:
        images[-1] = images[0] // 2 + 60
    masks = [None if unlabeled else mask] * 40
    return write_dataset(
        folder, images[:, None], masks, split=["train"] * 28 + ["test"] * 12, background=0.0
    )


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of the command."""
    app = typer.Typer()
    app.command()(check)
    code = app([str(argument) for argument in arguments], standalone_mode=False)
    out = capsys.readouterr()
    return code or 0, out.out, out.err


def test_a_leak_is_shown_and_only_strict_fails(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dataset(tmp_path / "d", leak=True)
    code, out, err = run(capsys, tmp_path / "d")
    assert (code, err) == (0, "")
    row = next(line for line in out.splitlines() if line.strip().startswith("leak"))
    assert "Near-copies in different splits" in row
    assert "1 of 12 held-out images" in row
    assert "image 39" in row
    assert "Not checked: burned-in text" in out
    assert (tmp_path / "d.check" / "check.html").is_file()
    assert (tmp_path / "d.check" / "check.png").is_file()
    assert PatchDataset.open(tmp_path / "d").manifest.counts["train"].images == 28
    assert run(capsys, tmp_path / "d", "--strict", "--out", tmp_path / "x")[0] == 1
    assert (tmp_path / "x" / "check.html").is_file()


def test_a_clean_dataset_and_notes_pass_strict(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dataset(tmp_path / "d")
    code, out, _ = run(capsys, tmp_path / "d", "--strict")
    assert code == 0
    assert out.startswith("Nothing was found.")
    dataset(tmp_path / "u", unlabeled=True)
    code, out, _ = run(capsys, tmp_path / "u", "--strict")
    assert code == 0
    assert "Unlabeled images" in out


def test_json_holds_findings_and_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dataset(tmp_path / "d", leak=True)
    dataset(tmp_path / "u", unlabeled=True)
    code, out, _ = run(
        capsys, tmp_path / "u", "--against", tmp_path / "d", "--json", "--out", tmp_path / "o"
    )
    report = json.loads(out)
    assert code == 0
    assert report["against"] == str(tmp_path / "d")
    assert [f["key"] for f in report["findings"]] == [
        "copies-in-other",
        "unlabeled",
        "shared-with-other",
    ]
    assert report["findings"][0]["count"] == 1  # image 0, whose copy is in the other's test
    assert [Path(file).name for file in report["files"]] == ["check.html", "check.png"]


def test_what_is_no_dataset_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(AmlpError, match="There is no patch dataset") as error:
        check(str(tmp_path / "absent"))
    assert error.value.exit_code == 2
    dataset(tmp_path / "d")
    (tmp_path / "file").write_text("")
    with pytest.raises(AmlpError, match=r"file cannot be written .*--out"):
        check(str(tmp_path / "d"), None, tmp_path / "file")
