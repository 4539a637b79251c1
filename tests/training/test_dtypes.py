"""Every dtype and number of channels, from pretraining to pictures.

Nothing takes images for 0-255, or gray, or RGB.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.runs import discs, write
from PIL import Image

from amlp_ray.analysis.inspect_run import inspect_run
from amlp_ray.analysis.localization import bench_rules
from amlp_ray.analysis.localization_candidates import all_candidates
from amlp_ray.config import PretrainConfig, ProbeConfig, SegmentConfig
from amlp_ray.data.dataset import PatchDataset
from amlp_ray.evaluation.linear_probe import Probe
from amlp_ray.evaluation.segmentation import segment
from amlp_ray.launch.job import run_job
from amlp_ray.launch.run_spec import RunSpec
from amlp_ray.method.augment import normalize
from amlp_ray.method.visualization import to_pixels
from amlp_ray.training.loggers.metrics_file import read_rows
from amlp_ray.training.pretrain import Hooks

KINDS = [("uint8", 2), ("uint16", 1), ("int16", 1), ("int16", 4), ("float32", 3)]
SIDE = 32
MODEL = {"width": 16, "depth": 1, "heads": 2, "decoder_width": 16}
FEW = ProbeConfig(num_labeled=8, subsets=1, folds=2)


@pytest.fixture(scope="module", params=KINDS, ids=lambda kind: f"{kind[0]} of {kind[1]}")
def dataset(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> PatchDataset:
    """24 images to train on and 8 to look at."""
    dtype, channels = request.param
    splits = {
        name: discs(count, (channels, SIDE, SIDE), dtype, seed)
        for seed, (name, count) in enumerate({"train": 24, "val": 8}.items())
    }
    return write(tmp_path_factory.mktemp(f"{dtype}-{channels}"), splits)


@pytest.fixture(scope="module")
def run(dataset: PatchDataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with everything on, scored by a probe and drawn."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    overrides: dict[str, Any] = {
        "flip_vertical": True,
        "intensity_jitter": 0.7,
        "epochs": 2,
        "batch_size": 8,
        "model": MODEL,
    }
    run_job(
        RunSpec(
            config=PretrainConfig.model_validate(overrides),
            data=dataset.path,
            folder=folder,
            probe=FEW,
            rungs=(2,),
        ),
        Hooks(),
    )
    return folder


def test_a_run_is_finite_scored_and_drawn(dataset: PatchDataset, run: Path) -> None:
    rows = read_rows(run / "metrics.jsonl")
    assert len(rows) == 2
    assert all(math.isfinite(value) for row in rows for value in row.values())
    assert 0.1 < rows[-1]["loss_reference"] < 10, "in the normalized scale, whatever the stored one"
    assert 0 <= json.loads((run / "score.json").read_text())["dsc"] <= 1
    for path in (run / "pictures").iterdir():
        displayed = np.asarray(Image.open(path))[22:, :192]  # the input
        assert displayed.std() > 20, "neither black nor white"


def test_an_inspection_shows_what_the_run_met(run: Path, tmp_path: Path) -> None:
    result = inspect_run(run, count=2, out=tmp_path)
    assert result["own_data"]
    assert all(math.isfinite(result["mean"][name]) for name in ("recall", "error"))


def test_a_segmenter_is_trained_with_all_augmentation(
    dataset: PatchDataset, run: Path, tmp_path: Path
) -> None:
    overrides = {
        "epochs": 2,
        "batch_size": 6,
        "decoder_width": 8,
        "min_crop_area": 0.6,
        "intensity_jitter": 0.5,
        "flip_vertical": True,
    }
    losses: list[float] = []
    score = segment(
        dataset,
        run / "encoder.safetensors",
        tmp_path / "out",
        SegmentConfig.model_validate(overrides),
        progress=lambda metrics: losses.append(metrics["loss"]),
    )
    assert 0 <= score["dsc"] <= 1
    assert all(map(math.isfinite, losses))


def test_a_dark_disc_is_found_in_any_scale(dataset: PatchDataset) -> None:
    candidates = [
        c
        for c in all_candidates()
        if c.name in ("combined dark", "raw, 3, darkest", "random patches")
    ]
    rows = {
        row["name"]: row
        for row in bench_rules(dataset, candidates=candidates, seeds=1, patch_size=4).rows
    }
    assert rows["combined dark"]["auc"] > 0.8
    assert rows["raw, 3, darkest"]["f1"] > 2 * rows["random patches"]["f1"]


def test_a_probe_sees_normalized_patches(dataset: PatchDataset) -> None:
    batches: list[torch.Tensor] = []

    def tokens(patches: torch.Tensor) -> torch.Tensor:
        batches.append(patches)
        return patches

    Probe(dataset, FEW, 8).score_tokens(tokens)
    every = torch.cat(batches)
    assert abs(float(every.mean())) < 0.2
    assert 0.8 < float(every.std()) < 1.2


def test_a_picture_is_the_first_channel_or_rgb_scaled_to_its_own_contrast(
    dataset: PatchDataset,
) -> None:
    images = dataset.load("val").images
    x = normalize(torch.from_numpy(images), dataset.spec)
    displayed = np.stack(to_pixels(x, x, dataset.spec, (SIDE, SIDE)))
    shown_channels = 3 if images.shape[1] == 3 else 1
    stored = images[:, :shown_channels].astype(np.float64)
    low, high = np.quantile(stored, (0.005, 0.995), axis=(1, 2, 3), keepdims=True)
    expected = ((stored - low) / (high - low)).clip(0, 1) * 255
    assert np.abs(displayed.transpose(0, 3, 1, 2)[:, :shown_channels] - expected).max() <= 1.5
    if shown_channels == 1:
        assert (displayed[..., 0] == displayed[..., 2]).all()


def test_a_constant_image_of_any_scale_is_drawn_black_and_not_as_noise(
    dataset: PatchDataset,
) -> None:
    flat = np.full_like(dataset.load("val", np.array([0])).images, int(dataset.spec.mean[0]))
    x = normalize(torch.from_numpy(flat), dataset.spec)
    (displayed,) = to_pixels(x, x, dataset.spec, (SIDE, SIDE))
    assert int(displayed.max()) - int(displayed.min()) <= 1
