"""Images without a lesion in fine-tuning: which are drawn, in which order, and what is learned."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from helpers.runs import Guarded, Rows, discs, write
from safetensors.torch import load_file

from amlp_ray.config import ModelConfig, SegmentConfig
from amlp_ray.config.base import build
from amlp_ray.data.dataset import PatchDataset, Split
from amlp_ray.errors import ConfigError
from amlp_ray.evaluation.finetune import epoch_order, parameter_groups, train_epoch
from amlp_ray.evaluation.labels import EMPTY_POOL, empty_count, empty_rows, train_rows
from amlp_ray.evaluation.segmentation import segment
from amlp_ray.evaluation.segmenter import Segmenter
from amlp_ray.method.augment import normalize
from amlp_ray.method.autoencoder import MaskedAutoencoder
from amlp_ray.runtime.worker_context import WorkerContext
from amlp_ray.training.checkpoint.export import export_encoder
from amlp_ray.utils.json_files import read_json

MODEL = ModelConfig(patch_size=8, width=16, depth=1, heads=2, decoder_width=16)
SHARES = (0.0, 0.1, 0.5, 1.0)


def config_of(**overrides: Any) -> SegmentConfig:
    small = {"epochs": 2, "batch_size": 6, "decoder_width": 8, "lr": 3e-3}
    return SegmentConfig.model_validate(small | overrides)


def dataset_of(folder: Path, *, normal: int, unlabeled: int = 0) -> PatchDataset:
    """40 images to fit on and 12 to score; each `normal`-th is without a lesion (0: none is)."""
    train = discs(40, seed=1, normal=normal)
    train = train._replace(labeled=np.arange(40) >= unlabeled)
    return write(folder, {"train": train, "val": discs(12, seed=2, normal=2)})


def run(dataset: PatchDataset, out: Path, **overrides: Any) -> dict[str, Any]:
    torch.manual_seed(3)
    encoder = out.parent / "encoder.safetensors"
    if not encoder.exists():
        export_encoder(MaskedAutoencoder(MODEL, dataset.spec).encoder, encoder, MODEL, dataset.spec)
    return segment(dataset, encoder, out, config_of(**overrides))


# The order of an epoch


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("count", [1, 7, 100])
def test_without_empty_images_the_order_is_a_plain_permutation(count: int, share: float) -> None:
    for seed, epoch in ((0, 1), (3, 20)):
        order = epoch_order(np.ones(count, bool), config_of(empty_share=share, seed=seed), epoch)
        expected = np.random.default_rng([seed, epoch]).permutation(count)
        np.testing.assert_array_equal(order, expected)


@pytest.mark.parametrize(
    ("share", "expected"), [(0.0, 0), (0.1, 7), (0.25, 20), (0.5, 60), (0.8, 140), (1.0, 140)]
)
def test_an_epoch_has_every_lesion_once_and_its_share_without(share: float, expected: int) -> None:
    has_lesion = np.arange(200) % 10 < 3
    config = config_of(empty_share=share)
    orders = [epoch_order(has_lesion, config, epoch) for epoch in (1, 2)]
    for order in orders:
        assert len(set(order)) == len(order) == 60 + expected
        assert has_lesion[order].sum() == 60
    if 0 < expected < 140:
        assert set(orders[0]) != set(orders[1])


@pytest.mark.parametrize("share", [0.1, 0.25, 0.5, 0.75])
@pytest.mark.parametrize("batch_size", [4, 12, 32])
def test_every_batch_has_its_part_of_images_without_a_lesion(batch_size: int, share: float) -> None:
    has_lesion = np.arange(400) % 4 == 0
    order = epoch_order(has_lesion, config_of(empty_share=share), 1)
    for start in range(0, len(order) - batch_size + 1, batch_size):
        empty = int((~has_lesion[order[start : start + batch_size]]).sum())
        assert abs(empty - batch_size * share) <= 1


# Which images are drawn


def test_unlabeled_images_are_not_taken_for_images_without_a_lesion(tmp_path: Path) -> None:
    dataset = dataset_of(tmp_path / "set", normal=2, unlabeled=10)
    rows = empty_rows(dataset, config_of(empty_share=1))
    assert rows.tolist() == list(range(10, 40, 2))


@pytest.mark.parametrize("share", SHARES)
def test_no_more_images_are_read_than_epochs_can_use(tmp_path: Path, share: float) -> None:
    images = discs(60, seed=1, normal=0)
    masks = images.masks.copy()
    masks[4:] = 0
    rows = Rows(images.images, masks)
    dataset = write(tmp_path / "set", {"train": rows, "val": discs(4, seed=2, normal=0)})
    taken = empty_count(4, 56, share)
    assert len(empty_rows(dataset, config_of(empty_share=share))) == min(56, EMPTY_POOL * taken)
    # A number of labels is what was annotated: not four times as many.
    few = config_of(empty_share=share, num_labeled=4)
    assert len(empty_rows(dataset, few)) == taken


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_share_of_the_labels_takes_no_image_of_another_patient(tmp_path: Path, seed: int) -> None:
    def regroup(name: str, split: Split) -> Split:
        # Ten patients with a lesion and ten without any.
        patients = np.arange(len(split)) // 4 + 20 * (np.arange(len(split)) % 4 == 0)
        return replace(split, groups=patients.astype(str))

    dataset = Guarded.from_dataset(dataset_of(tmp_path / "set", normal=2), regroup)
    groups = dataset.table("train")["group"].to_numpy()
    before: set[int] = set()
    for share in (0.1, 0.5, 1.0):
        config = config_of(empty_share=1, label_share=share, seed=seed)
        rows = set(empty_rows(dataset, config))
        lesion_patients = set(groups[train_rows(dataset, config)])
        healthy = {groups[row] for row in rows} - lesion_patients
        assert all(int(name) >= 20 for name in healthy)
        assert len(healthy) == round(10 * share)
        assert {row for row in range(40) if row % 2 == 0 and groups[row] in lesion_patients} <= rows
        assert before <= rows
        before = rows


@pytest.mark.parametrize("share", [-0.1, 1.5, "half"])
def test_a_share_outside_0_to_1_is_refused(share: object) -> None:
    with pytest.raises(ConfigError, match="empty_share is"):
        build(SegmentConfig, {"empty_share": share}, "here")


# Training and scores


def test_where_all_images_have_a_lesion_the_share_changes_nothing(tmp_path: Path) -> None:
    dataset = dataset_of(tmp_path / "set", normal=0)
    scores = [run(dataset, tmp_path / f"{share}", empty_share=share) for share in (0.0, 0.5)]
    assert {**scores[0], "seconds": 0} == {**scores[1], "seconds": 0}
    weights = [load_file(tmp_path / f"{share}" / "segmenter.safetensors") for share in (0.0, 0.5)]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


def test_a_batch_without_any_lesion_has_a_finite_loss_and_teaches_silence(tmp_path: Path) -> None:
    images = discs(12, seed=1, normal=0)
    masks = images.masks.copy()
    masks[1:] = 0
    dataset = write(tmp_path / "set", {"train": Rows(images.images, masks)})
    train = dataset.load("train")
    config = config_of(empty_share=1, batch_size=1, warmup=0)
    torch.manual_seed(3)
    model = Segmenter(MaskedAutoencoder(MODEL, dataset.spec).encoder, dataset.spec, config)
    optimizer = torch.optim.AdamW(parameter_groups(model, config), lr=config.lr)
    normalized = normalize(torch.from_numpy(train.images), dataset.spec)
    before = model(normalized).detach().sigmoid().mean()
    metrics = train_epoch(model, optimizer, train, dataset.spec, config, 1, WorkerContext())
    assert np.isfinite([metrics["loss"], metrics["grad_norm"]]).all()
    assert model(normalized).detach().sigmoid().mean() < 0.8 * before


def test_both_kinds_of_images_are_scored_side_by_side(tmp_path: Path) -> None:
    dataset = dataset_of(tmp_path / "set", normal=2)
    score = run(dataset, tmp_path / "out", empty_share=0.3)
    assert list(score)[:2] == ["dsc", "empty_correct"]
    assert (score["images"], score["images_without_lesion"]) == (6, 6)
    assert (score["num_labeled"], score["num_empty_per_epoch"]) == (20, 9)
    table = pd.read_csv(tmp_path / "out" / "per_image.csv")
    empty = table[table["lesion_pixels"] == 0]
    assert score["empty_correct"] == pytest.approx((empty["predicted_pixels"] == 0).mean())
    assert score == read_json(tmp_path / "out" / "score.json")
