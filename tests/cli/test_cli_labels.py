"""`--data` and `--eval-data`: paths and URIs, one sentence for what does not fit."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from helpers.datasets import write_dataset

from amlp_ray.cli import main
from amlp_ray.data.dataset import PatchDataset
from amlp_ray.utils.json_files import seal_json

TINY = {
    "name": "tiny",
    "pretrain": {
        "epochs": 1,
        "batch_size": 12,
        "model": {"width": 24, "depth": 1, "heads": 2, "decoder_width": 16},
    },
    "space": {"ratio.start": {"low": 0.2, "high": 0.5}},
    "probe": {"num_labeled": 8, "subsets": 1, "folds": 2},
    "baselines": [],
}


@pytest.fixture
def unlabeled(phantom_dataset: PatchDataset, tmp_path: Path) -> PatchDataset:
    return write_dataset(tmp_path / "unlabeled", phantom_dataset.load("train").images)


def run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: object
) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["amlp-ray", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        main()
    captured = capsys.readouterr()
    return int(end.value.code or 0), captured.out, captured.err


def plan(folder: Path, **changes: Any) -> list[object]:
    (folder / "tiny.yaml").write_text(yaml.safe_dump(TINY | changes))
    return ["study", "plan", folder / "tiny.yaml", "--runs", folder / "runs", "--json"]


def test_a_study_is_planned_with_the_labels_of_another_set(
    phantom_dataset: PatchDataset,
    unlabeled: PatchDataset,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    command = plan(tmp_path, data=unlabeled.path)
    code, _, err = run(monkeypatch, capsys, *command)
    assert code == 2
    assert "name a dataset with masks by `eval_data`" in err
    code, out, _ = run(monkeypatch, capsys, *command, "--eval-data", phantom_dataset.path)
    assert code == 0
    assert json.loads(out)["steps_per_trial"] == 3


@pytest.mark.parametrize("option", ["--data", "--eval-data"])
@pytest.mark.parametrize("path", ["nowhere/at all", "s3x://bucket/set"])
def test_a_set_that_is_not_there_is_named_as_it_was_given(
    phantom_dataset: PatchDataset,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    option: str,
    path: str,
) -> None:
    code, _, err = run(
        monkeypatch, capsys, *plan(tmp_path, data=phantom_dataset.path), option, path
    )
    assert code == 2
    assert path.partition("/set")[0] in err
    assert len(err.strip().splitlines()) == 1


def test_labels_of_another_shape_are_refused_in_one_sentence(
    phantom_dataset: PatchDataset,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    other = write_dataset(
        tmp_path / "other",
        np.zeros((3, 2, 64, 64), np.uint8) + np.arange(3, dtype=np.uint8)[:, None, None, None],
    )
    code, _, err = run(
        monkeypatch, capsys, *plan(tmp_path, data=phantom_dataset.path), "--eval-data", other.path
    )
    assert code == 2
    assert "holds 1x64x64" in err
    assert "holds 2x64x64; prepare the data alike." in err


@pytest.mark.parametrize("command", ["pretrain", "segment", "inspect"])
def test_a_uri_is_not_taken_for_a_path(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    command: str,
) -> None:
    arguments: dict[str, list[object]] = {
        "pretrain": ["s3x://bucket/set", "--out", tmp_path / "out"],
        "segment": ["s3x://bucket/set", "--encoder", tmp_path / "e", "--out", tmp_path / "out"],
        "inspect": [run_folder(tmp_path), "--data", "s3x://bucket/set"],
    }
    code, _, err = run(monkeypatch, capsys, command, *arguments[command])
    assert code == 2
    assert "s3x://bucket" in err


def run_folder(folder: Path) -> Path:
    """As much of a run as is read before its data."""
    (folder / "config.yaml").write_text("epochs: 1\n")
    (folder / "data.json").write_text(seal_json({"path": "x", "fingerprint": "y"}))
    return folder
