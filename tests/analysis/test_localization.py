"""The localization benchmark measures what lesion maps find, and only oracles read labels."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.datasets import write_dataset
from sklearn.metrics import roc_auc_score

from amlp_ray.analysis.localization import bench_rules
from amlp_ray.analysis.localization_candidates import CENTER, RANDOM, Candidate, all_candidates
from amlp_ray.config import PretrainConfig, SelectionConfig
from amlp_ray.config.yaml_file import write_yaml
from amlp_ray.data.dataset import PatchDataset
from amlp_ray.errors import CheckpointError, ConfigError, DataError
from amlp_ray.method.augment import normalize
from amlp_ray.method.autoencoder import MaskedAutoencoder, build_autoencoder
from amlp_ray.method.ema_teacher import predict_complementary_halves
from amlp_ray.method.lesion_map import locate_lesion
from amlp_ray.method.patches import patchify
from amlp_ray.training.checkpoint.export import export_encoder
from amlp_ray.training.checkpoint.manager import checkpoints, write_checkpoint

SIDE, IMAGES = 48, 8
TINY = {"width": 24, "depth": 1, "heads": 2, "decoder_width": 16, "decoder_heads": 2}


Stored = Callable[..., PatchDataset]


@pytest.fixture
def stored(tmp_path_factory: pytest.TempPathFactory) -> Stored:
    """Write images (N, C, H, W) and masks (N, H, W) as a train split, three to a part."""

    def write(
        images: np.ndarray, masks: np.ndarray, labeled: np.ndarray | None = None
    ) -> PatchDataset:
        known_masks = [
            mask if labeled is None or labeled[i] else None for i, mask in enumerate(masks)
        ]
        return write_dataset(
            tmp_path_factory.mktemp("stored"), images, known_masks, rows_per_part=3
        )

    return write


def discs(
    *, at: tuple[float, float] = (0.5, 0.5), radii: tuple[int, ...] = (6, 9), seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Noise with one dark, rougher disc per image, and its mask."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:SIDE, :SIDE]
    images, masks = [], []
    for i in range(IMAGES):
        mask = (y - at[0] * SIDE) ** 2 + (x - at[1] * SIDE) ** 2 < radii[i % len(radii)] ** 2
        noise = rng.normal(0, 1, (SIDE, SIDE))
        images.append(
            np.where(mask, 60 + 12 * noise, 140 + 6 * noise).clip(0, 255).astype(np.uint8)
        )
        masks.append(mask.astype(np.uint8))
    return np.stack(images)[:, None], np.stack(masks)


def named(*names: str) -> list[Candidate]:
    """Some of the candidates: all of them take seconds."""
    candidates = {c.name: c for c in all_candidates(encoder=True, decoder=True)}
    return [candidates[name] for name in names]


def rows_of(dataset: PatchDataset, *names: str, **overrides: Any) -> dict[str, dict[str, Any]]:
    return {
        row["name"]: row
        for row in bench_rules(
            dataset, **{"seeds": 1, "candidates": named(*names), **overrides}
        ).rows
    }


def test_a_dark_disc_is_found_by_dark_rules_and_by_nearness_to_the_center_only_in_the_center(
    stored: Stored,
) -> None:
    names = ("combined dark", "raw, 3, darkest", CENTER)
    middle, aside = (
        rows_of(stored(*discs()), *names),
        rows_of(stored(*discs(at=(0.3, 0.3))), *names),
    )
    for rows in (middle, aside):
        assert rows["combined dark"]["auc"] > 0.95
        assert rows["raw, 3, darkest"]["f1"] > 0.5
    assert middle[CENTER]["auc"] > 0.97
    assert aside[CENTER]["auc"] < 0.85


def test_random_patches_hit_lesions_at_the_base_rate(stored: Stored) -> None:
    row = rows_of(stored(*discs()), RANDOM, seeds=60)[RANDOM]
    assert row["precision"] == pytest.approx(row["base_rate"], abs=0.03)
    assert row["recall"] == pytest.approx(0.15, abs=0.03)
    assert row["auc"] == pytest.approx(0.5, abs=0.03)


@pytest.mark.parametrize("ending", ["", ", dataset"])
def test_no_rule_beats_the_best_possible_cluster_of_its_clustering(
    stored: Stored, ending: str
) -> None:
    rules = ("smallest", "distinct", "most_central", "by combined dark", "random", "oracle")
    rows = rows_of(stored(*discs()), *(f"stats, 3, {rule}{ending}" for rule in rules))
    best = rows.pop(f"stats, 3, oracle{ending}")["f1"]
    assert 0 < max(row["f1"] for row in rows.values()) <= best + 1e-9


def test_figures_of_a_rule_are_those_of_the_lesion_map_counted_by_hand(stored: Stored) -> None:
    images, masks = discs()
    data = stored(images, masks)
    patches = patchify(normalize(torch.from_numpy(images), data.spec), 8)
    smallest = SelectionConfig(features="raw", clusters=3, rule="smallest")
    lesion_map = locate_lesion(
        patches, torch.from_numpy(data.load("train").keys), (6, 6), 1, smallest, seed=0, epoch=1
    )
    share = masks.reshape(-1, 6, 8, 6, 8).mean((2, 4)).reshape(-1, 36)
    f1, size, small = [], [], []
    for i in range(IMAGES):
        predicted, true = (
            set(np.flatnonzero(lesion_map.lesion[i].numpy())),
            set(np.flatnonzero(share[i] >= 0.25)),
        )
        f1.append(2 * len(predicted & true) / (len(predicted) + len(true)))
        size.append(len(predicted) / 36)
        small.append(masks[i].sum() <= np.median(masks.sum((1, 2))))
    row = rows_of(data, "raw, 3, smallest")["raw, 3, smallest"]
    assert row["f1"] == pytest.approx(np.mean(f1))
    assert row["f1_se"] == pytest.approx(np.std(f1, ddof=1) / IMAGES**0.5)
    assert row["f1_small"] == pytest.approx(np.mean(np.array(f1)[small]))
    assert row["size"] == pytest.approx(np.mean(size))


def test_labels_change_no_lesion_map_but_the_oracles(stored: Stored) -> None:
    images, masks = discs()
    once = [c for c in all_candidates() if c.selection is None or c.selection.features == "raw"]
    true, false = (
        {
            row["name"]: row["size"]
            for row in bench_rules(stored(images[:4], m), seeds=1, candidates=once).rows
        }
        for m in (masks[:4], np.roll(masks[:4], 20, 2))
    )
    moved = [name for name in true if true[name] != false[name]]
    assert moved
    assert all("oracle" in name for name in moved)


def test_images_without_a_lesion_or_without_a_label_are_not_scored(stored: Stored) -> None:
    images, masks = discs()
    masks[0] = 0
    labeled = np.ones(IMAGES, bool)
    labeled[1] = False
    data = stored(images, masks, labeled)
    assert rows_of(data, RANDOM)[RANDOM]["images"] == IMAGES - 2
    assert rows_of(data, RANDOM, images=3)[RANDOM]["images"] == 3


@pytest.mark.parametrize(
    ("overrides", "message"),
    [({"split": "test"}, "last look"), ({"patch_size": 7}, "--patch-size 7 does not divide")],
)
def test_test_images_and_patches_that_do_not_divide_are_refused(
    stored: Stored, overrides: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        bench_rules(stored(*discs()), **overrides)


def test_a_dataset_without_masks_is_refused(stored: Stored) -> None:
    images, masks = discs()
    with pytest.raises(DataError, match=r"No image of train in .* has a lesion mask"):
        bench_rules(stored(images, np.zeros_like(masks), np.zeros(IMAGES, bool)))


@pytest.fixture
def run(stored: Stored, tmp_path: Path) -> tuple[Path, PretrainConfig, MaskedAutoencoder]:
    """A run's folder with an untrained model."""
    config = PretrainConfig.model_validate({"variant": "mae", "model": TINY})
    torch.manual_seed(3)
    model = build_autoencoder(config, stored(*discs()).spec).eval()
    write_checkpoint(tmp_path, {"model": model.state_dict(), "epoch": 1}, 1)
    write_yaml(config, tmp_path / "config.yaml")
    export_encoder(model.encoder, tmp_path / "encoder.safetensors", config.model, model.spec)
    return tmp_path, config, model


def test_a_run_adds_what_its_model_finds_hard_raw_and_per_variance(
    stored: Stored, run: tuple[Path, PretrainConfig, MaskedAutoencoder]
) -> None:
    folder, config, model = run
    images, masks = discs()
    data = stored(images, masks)
    rules = (
        "difficulty",
        "difficulty / patch variance",
        "raw, 3, hardest",
        "tokens, 3, smallest, dataset",
    )
    rows = rows_of(data, *rules, teacher=folder)
    patches = patchify(normalize(torch.from_numpy(images), data.spec), 8)
    with torch.inference_mode():
        error, _ = predict_complementary_halves(
            model, patches, torch.from_numpy(data.load("train").keys), config, 1
        )
    truth = masks.reshape(-1, 6, 8, 6, 8).mean((2, 4)).reshape(-1, 36) >= 0.25
    for name, value in (
        ("difficulty", error),
        ("difficulty / patch variance", error / (patches.var(-1) + 1e-6)),
    ):
        auc = [roc_auc_score(t, v) for t, v in zip(truth, value.numpy(), strict=True)]
        assert rows[name]["auc"] == pytest.approx(np.mean(auc), abs=1e-3)
    assert rows["raw, 3, hardest"]["fallback"] == 0
    assert rows["tokens, 3, smallest, dataset"]["size"] > 0


def test_an_encoder_alone_finds_what_the_whole_run_finds_with_it(
    stored: Stored, run: tuple[Path, PretrainConfig, MaskedAutoencoder]
) -> None:
    data, names = stored(*discs()), ("attention", "tokens, 4, most_central")
    alone = rows_of(data, *names, teacher=run[0] / "encoder.safetensors")
    whole = rows_of(data, *names, teacher=run[0])
    assert alone["tokens, 4, most_central"]["f1"] == whole["tokens, 4, most_central"]["f1"] > 0
    assert alone["attention"]["auc"] == whole["attention"]["auc"] > 0


def test_rows_that_ask_a_model_are_there_only_with_one_and_every_name_occurs_once() -> None:
    without, encoder, whole = (
        all_candidates(),
        all_candidates(encoder=True),
        all_candidates(encoder=True, decoder=True),
    )
    names = [c.name for c in whole]
    assert len(set(names)) == len(names)
    assert not any(
        c.selection and PretrainConfig(selection=c.selection).needs_teacher for c in without
    )
    assert all(
        "tokens" in name or name == "attention"
        for name in {c.name for c in encoder} - {c.name for c in without}
    )
    assert all("hardest" in n or "difficulty" in n for n in set(names) - {c.name for c in encoder})


def test_a_teacher_of_other_patches_other_images_or_nowhere_is_refused(
    stored: Stored, run: tuple[Path, PretrainConfig, MaskedAutoencoder], tmp_path: Path
) -> None:
    folder, config, model = run
    data = stored(*discs())
    with pytest.raises(CheckpointError, match="use --patch-size 8"):
        bench_rules(data, teacher=folder, patch_size=16)
    with pytest.raises(CheckpointError, match="no encoder file"):
        bench_rules(data, teacher=tmp_path / "absent.safetensors")
    other = model.spec.model_copy(update={"mean": (1.0,)})
    export_encoder(model.encoder, tmp_path / "other.safetensors", config.model, other)
    with pytest.raises(ConfigError, match="trained on values around 1 "):
        bench_rules(data, teacher=tmp_path / "other.safetensors")
    checkpoints(folder)[0].write_bytes(b"damaged")
    with pytest.raises(CheckpointError, match=r"All checkpoints in .* are damaged"):
        bench_rules(data, teacher=folder)
    write_yaml(
        PretrainConfig.model_validate({"variant": "scratch", "model": TINY}),
        folder / "config.yaml",
    )
    with pytest.raises(CheckpointError, match="rebuilds no images"):
        bench_rules(data, teacher=folder)
