"""`amlp-ray segment` from a timm checkpoint, and on a folder that is finished."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import timm
import torch

from amlp_ray.cli import main
from amlp_ray.data.dataset import PatchDataset


def run(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *words: object
) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["amlp-ray", "segment", *map(str, words)])
    with pytest.raises(SystemExit) as left:
        main()
    captured = capsys.readouterr()
    return int(left.value.code or 0), captured.out, captured.err


def test_a_timm_checkpoint_is_fine_tuned_once_and_then_told_to_be_finished(
    phantom_dataset: PatchDataset,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    name = "vit_wee_patch16_reg1_gap_256"
    torch.save(timm.create_model(name).state_dict(), tmp_path / "w.pth")
    command: list[object] = [
        phantom_dataset.path,
        "--encoder",
        tmp_path / "w.pth",
        "--out",
        tmp_path / "out",
    ]
    code, _, err = run(capsys, monkeypatch, *command)
    assert code == 2
    assert "--encoder-name" in err
    assert not (tmp_path / "out").exists()
    command += ["--encoder-name", name, "--json"]
    for setting in ("epochs=1", "num_labeled=4", "decoder=linear", "freeze=true"):
        command += ["--set", setting]
    code, first, err = run(capsys, monkeypatch, *command)
    assert code == 0, err
    assert "epoch 1/1, 0s left, loss" in err
    assert "finished before" not in err
    score = json.loads(first)
    assert {
        "dsc",
        "ppv",
        "sensitivity",
        "iou",
        "hd95",
        "hd95_unit",
        "dsc_per_group",
        "missed",
    } <= score.keys()
    code, again, err = run(capsys, monkeypatch, *command)
    assert (code, again) == (0, first)
    assert err == f"{tmp_path / 'out'} was finished before: 1 epoch.\n"
    code, _, err = run(capsys, monkeypatch, *command, "--set", "lr=0.1")
    assert code == 2
    assert "another settings.lr" in err
