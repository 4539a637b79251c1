from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers.runs import Guarded

from amlp_ray.config import PretrainConfig
from amlp_ray.data.dataset import PatchDataset
from amlp_ray.errors import ConfigError
from amlp_ray.evaluation.diagnostics import (
    Diagnostics,
    held_out,
    reference_loss,
    true_lesions,
)
from amlp_ray.method.augment import normalize
from amlp_ray.method.autoencoder import MaskedAutoencoder, build_autoencoder
from amlp_ray.method.masking import Masking
from amlp_ray.method.patches import lesion_shares

TINY = {"width": 24, "depth": 1, "heads": 2, "decoder_width": 16}


def settings_of(**overrides: Any) -> PretrainConfig:
    return PretrainConfig.model_validate({"epochs": 4, "model": TINY, **overrides})


def model_of(dataset: PatchDataset, config: PretrainConfig, seed: int = 0) -> MaskedAutoencoder:
    torch.manual_seed(seed)
    return build_autoencoder(config, dataset.spec).eval()


def test_the_reference_loss_is_the_same_whatever_the_variant_masks(
    phantom_dataset: PatchDataset,
) -> None:
    baselines = [
        settings_of(variant="mae"),
        settings_of(ratio={"start": 0.3}),
        settings_of(variant="mae", seed=5),
    ]
    losses = [
        Diagnostics(phantom_dataset, s)(model_of(phantom_dataset, baselines[0]), 2)[
            "loss_reference"
        ]
        for s in baselines
    ]
    assert losses[0] == losses[1] == losses[2]
    assert (
        losses[0]
        != Diagnostics(phantom_dataset, baselines[0])(
            model_of(phantom_dataset, baselines[0], seed=1), 2
        )["loss_reference"]
    )


def test_the_reference_loss_of_predicting_the_patch_mean_is_the_variance_inside_patches(
    phantom_dataset: PatchDataset,
) -> None:
    config = settings_of(variant="mae", loss={"norm_pix": True})
    model = model_of(phantom_dataset, config)
    torch.nn.init.zeros_(model.predict.weight)
    torch.nn.init.zeros_(model.predict.bias)
    chosen = held_out(phantom_dataset, 4)
    images = normalize(torch.from_numpy(chosen.images), phantom_dataset.spec)
    with torch.inference_mode():
        loss = reference_loss(model, images, torch.from_numpy(chosen.keys), config)
    inside = images.unfold(2, 8, 8).unfold(3, 8, 8).var((-2, -1), correction=0)
    assert 0.3 * inside.mean() < loss < 3 * inside.mean()
    assert math.isfinite(loss)


def test_a_lesion_map_of_the_truth_has_full_recall(
    phantom_dataset: PatchDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings_of(selection={"mode": "soft", "score": "blob"})
    diagnostics = Diagnostics(phantom_dataset, config)
    assert diagnostics.share is not None
    truth = diagnostics.share * 10 - 5
    monkeypatch.setattr(
        "amlp_ray.method.lesion_map.patch_score", lambda *a, **k: torch.where(truth > -5, 3.0, -1.0)
    )
    metrics = diagnostics(model_of(phantom_dataset, config), 1)
    recalls = {metrics[f"lesion_recall{part}"] for part in ("", "_small", "_large")}
    assert recalls == {1}
    assert 0 < metrics["lesion_precision"] <= 1
    assert metrics["true_lesion_masked"] > 0.5


def test_random_masks_and_unlabeled_images_are_not_judged_by_a_lesion_map(
    phantom_dataset: PatchDataset,
) -> None:
    config = settings_of(variant="mae")
    metrics = Diagnostics(phantom_dataset, config)(model_of(phantom_dataset, config), 2)
    assert set(metrics) == {"loss_reference", "true_lesion_masked"}
    assert metrics["true_lesion_masked"] == pytest.approx(0.75, abs=0.15)
    aimed = settings_of()
    blind = Diagnostics(phantom_dataset, aimed)
    blind.share = None
    assert set(blind(model_of(phantom_dataset, aimed), 1)) == {"loss_reference"}


def test_held_out_images_are_analyzed_once_per_analysis_epoch(
    phantom_dataset: PatchDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    epochs: list[int] = []
    analyze = Masking._analyze

    def counting(
        self: Masking, patches: Any, keys: Any, epoch: int, truth: Any, *, learn: bool
    ) -> Any:
        epochs.append(epoch)
        return analyze(self, patches, keys, epoch, truth, learn=learn)

    monkeypatch.setattr(Masking, "_analyze", counting)
    config = settings_of(epochs=9, selection={"analysis_interval": 3}, loss={"warmup": 0.5})
    model, diagnostics = model_of(phantom_dataset, config), Diagnostics(phantom_dataset, config)
    rows = [diagnostics(model, epoch) for epoch in range(1, 10)]
    assert epochs == [1, 4, 5, 7]
    assert rows[7] == Diagnostics(phantom_dataset, config)(
        model, 8
    )  # what is kept is what a new analysis finds


def test_lesion_shares_are_those_of_the_patches() -> None:
    masks = torch.zeros(1, 16, 24, dtype=torch.uint8)
    masks[0, 8:16, 16:20] = 255
    assert lesion_shares(masks.numpy(), 8).tolist() == [[0, 0, 0, 0, 0, 0.5]]


def test_true_lesions_are_read_for_oracles_alone_and_need_every_mask(
    phantom_dataset: PatchDataset,
) -> None:
    oracle = settings_of(selection={"mode": "soft", "score": "oracle"})
    train = phantom_dataset.load("train")
    shares = true_lesions(phantom_dataset, oracle)
    assert shares is not None
    assert set(shares) == set(train.keys.tolist())
    assert next(iter(shares.values())).shape == (8, 8)
    assert true_lesions(phantom_dataset, settings_of()) is None
    blind = Guarded.from_dataset(
        phantom_dataset, lambda name, split: replace(split, labeled=split.labeled & False)
    )
    with pytest.raises(
        ConfigError, match=f"{len(train)} of {len(train)} training images .* have no mask"
    ):
        true_lesions(blind, oracle)


def test_reference_images_are_never_of_the_test_split(phantom_dataset: PatchDataset) -> None:
    val = set(phantom_dataset.load("val").ids)
    assert set(held_out(phantom_dataset, 100).ids) <= val
