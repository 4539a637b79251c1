from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.runs import Guarded
from torch import Tensor

from amlp_ray.config import ModelConfig, ProbeConfig
from amlp_ray.data.dataset import PatchDataset, Split
from amlp_ray.errors import DataError
from amlp_ray.evaluation.linear_probe import Probe
from amlp_ray.evaluation.metrics import ProbeScore
from amlp_ray.method.autoencoder import MaskedAutoencoder

FEW = {"num_labeled": 8, "subsets": 2, "folds": 3}


def probe_of(dataset: PatchDataset, **overrides: Any) -> Probe:
    return Probe(
        Guarded.from_dataset(dataset), ProbeConfig.model_validate(FEW | overrides), patch_size=8
    )


def model_of(dataset: PatchDataset, seed: int = 0) -> MaskedAutoencoder:
    torch.manual_seed(seed)
    config = ModelConfig(patch_size=8, width=24, depth=1, heads=2, decoder_width=16)
    return MaskedAutoencoder(config, dataset.spec).eval()


def telling_tokens(probe: Probe, noise: float) -> ProbeScore:
    """Score tokens that hold the lesion share of their patch, under noise."""
    generator = torch.Generator().manual_seed(0)
    shares = torch.from_numpy(probe.share).float()
    rows = iter(shares.split(64))  # images come in this order, 64 at a time

    def tokens(patches: Tensor) -> Tensor:
        share = next(rows)
        assert len(share) == len(patches)
        return torch.cat(
            [share[..., None], torch.zeros(*share.shape, 3)], -1
        ) + noise * torch.randn(*share.shape, 4, generator=generator)

    return probe.score_tokens(tokens)


@pytest.mark.parametrize("scoring", ["val", "cross-validation"])
def test_tokens_that_know_the_lesion_score_far_above_those_that_do_not_and_above_the_floor(
    phantom_dataset: PatchDataset, scoring: str
) -> None:
    probe = probe_of(phantom_dataset, scoring=scoring)
    clear, blurred = telling_tokens(probe, 0.05), telling_tokens(probe, 0.5)
    generator = torch.Generator().manual_seed(1)
    nothing = probe.score_tokens(
        lambda patches: torch.randn(*patches.shape[:2], 4, generator=generator)
    )
    assert clear.dsc > 0.6
    assert clear.ap > 0.9
    assert clear.dsc > blurred.dsc > nothing.dsc
    assert clear.dsc > clear.mean_mask_dsc + 0.2
    assert nothing.dsc < nothing.mean_mask_dsc + 0.05
    assert clear.mean_mask_dsc == nothing.mean_mask_dsc  # the floor knows no tokens


def test_a_random_encoder_s_score_repeats_exactly_and_test_images_are_never_read(
    phantom_dataset: PatchDataset,
) -> None:
    model = model_of(phantom_dataset)
    first = probe_of(phantom_dataset).score(model.encoder)
    torch.manual_seed(123)
    np.random.seed(5)
    assert probe_of(phantom_dataset).score(model.encoder) == first
    assert probe_of(phantom_dataset).score(model_of(phantom_dataset, seed=1).encoder) != first


def test_another_seed_takes_other_subsets(phantom_dataset: PatchDataset) -> None:
    a, b = (probe_of(phantom_dataset, seed=seed, scoring="val") for seed in (0, 1))
    chosen = [[sorted(p.data.ids[i] for i in subset) for subset in p.plan[0][0]] for p in (a, b)]
    assert chosen[0] != chosen[1]


def lesion_ids(dataset: PatchDataset, *names: str) -> set[str]:
    splits = [dataset.load(name) for name in names]
    return {s.ids[i] for s in splits for i in range(len(s)) if s.labeled[i] and s.masks[i].any()}


def test_cross_validation_scores_every_labeled_lesion_image_of_train_and_val_once(
    phantom_dataset: PatchDataset,
) -> None:
    probe = probe_of(phantom_dataset, scoring="cross-validation")
    scored = [probe.data.ids[i] for _, rows in probe.plan for i in rows]
    assert len(scored) == len(set(scored))
    score = probe.score(model_of(phantom_dataset).encoder)
    assert set(score.per_image) == lesion_ids(phantom_dataset, "train", "val")
    assert score.images == len(score.per_image)
    assert score.dsc == pytest.approx(np.mean(list(score.per_image.values())), abs=1e-5)
    assert score.scoring == "cross-validation"


def test_no_image_or_group_is_scored_by_a_head_that_was_fitted_on_it(
    phantom_dataset: PatchDataset,
) -> None:
    def pair_up(name: str, split: Split) -> Split:
        return replace(split, groups=np.array([f"{name}-{i // 2}" for i in range(len(split))]))

    dataset = Guarded.from_dataset(phantom_dataset, pair_up)
    for scoring in ("val", "cross-validation"):
        probe = Probe(dataset, ProbeConfig.model_validate(FEW | {"scoring": scoring}), 8)
        groups = probe.data.groups
        for subsets, scored in probe.plan:
            for subset in subsets:
                assert len(subset) == 8
                assert not set(groups[subset]) & set(groups[scored])
                assert len(set(groups[subset])) == 8  # near-copies only when nothing else is left
                assert probe.data.masks[subset].any((1, 2)).all()


def test_val_scoring_fits_on_train_and_scores_val_alone(phantom_dataset: PatchDataset) -> None:
    probe = probe_of(phantom_dataset, scoring="val")
    score = probe.score(model_of(phantom_dataset).encoder)
    assert set(score.per_image) == lesion_ids(phantom_dataset, "val")
    val = phantom_dataset.load("val")
    normals = len(val) - len(score.per_image)
    assert normals > 0
    assert score.empty_correct is not None
    assert 0 <= score.empty_correct <= 1
    assert {probe.data.ids[i] for s in probe.plan[0][0] for i in s} <= lesion_ids(
        phantom_dataset, "train"
    )


def test_auto_takes_val_from_40_lesion_images_on(phantom_dataset: PatchDataset) -> None:
    assert probe_of(phantom_dataset).scoring == "cross-validation"

    for size, scoring in ((39, "cross-validation"), (40, "val")):

        def enlarge(name: str, split: Split, size: int = size) -> Split:
            if name != "val":
                return split
            return split.take(np.resize(np.flatnonzero(split.masks.any((1, 2))), size))

        assert (
            Probe(
                Guarded.from_dataset(phantom_dataset, enlarge), ProbeConfig.model_validate(FEW), 8
            ).scoring
            == scoring
        )


def test_too_few_labels_are_refused_with_the_number_found(phantom_dataset: PatchDataset) -> None:
    result = len(lesion_ids(phantom_dataset, "train"))
    with pytest.raises(
        DataError,
        match=rf"has {result} labeled training images .* probe.num_labeled={result + 1}; lower",
    ):
        probe_of(phantom_dataset, num_labeled=result + 1)


def test_val_scoring_without_a_val_lesion_is_refused(phantom_dataset: PatchDataset) -> None:
    def normals_only(name: str, split: Split) -> Split:
        return split.take(np.flatnonzero(~split.masks.any((1, 2)))) if name == "val" else split

    with pytest.raises(
        DataError, match=r"no val image with a lesion; use probe\.scoring=cross-validation"
    ):
        Probe(
            Guarded.from_dataset(phantom_dataset, normals_only),
            ProbeConfig.model_validate(FEW | {"scoring": "val"}),
            8,
        )


def test_fewer_groups_than_folds_are_refused_in_one_sentence(phantom_dataset: PatchDataset) -> None:
    """As with all frames from two patients."""

    def two_patients(name: str, split: Split) -> Split:
        return replace(split, groups=np.array(["a", "b"])[np.arange(len(split)) % 2])

    with pytest.raises(DataError, match=r"2 groups.*probe.folds=3"):
        Probe(
            Guarded.from_dataset(phantom_dataset, two_patients), ProbeConfig.model_validate(FEW), 8
        )


def test_labels_from_a_single_group_are_refused_in_one_sentence(
    phantom_dataset: PatchDataset,
) -> None:
    def one_patient(name: str, split: Split) -> Split:
        return replace(split, groups=np.full(len(split), name))

    with pytest.raises(DataError, match="group"):
        Probe(
            Guarded.from_dataset(phantom_dataset, one_patient),
            ProbeConfig.model_validate(FEW | {"scoring": "val"}),
            8,
        )


def test_unlabeled_images_are_neither_fitted_nor_scored(phantom_dataset: PatchDataset) -> None:
    def unlabel(name: str, split: Split) -> Split:
        labeled = split.labeled.copy()
        labeled[::3] = False
        return replace(split, labeled=labeled)

    probe = Probe(
        Guarded.from_dataset(phantom_dataset, unlabel), ProbeConfig.model_validate(FEW), 8
    )
    splits = [unlabel(name, phantom_dataset.load(name)) for name in ("train", "val")]
    labeled = {s.ids[i] for s in splits for i in range(len(s)) if s.labeled[i]}
    assert set(probe.data.ids) <= labeled
    assert set(probe.score(model_of(phantom_dataset).encoder).per_image) <= labeled


def test_the_probe_works_where_the_test_split_is_gone(
    phantom_dataset: PatchDataset, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(phantom_dataset.path, copy)
    dataset = PatchDataset.open(copy)
    shutil.rmtree(copy / "test")
    Probe(dataset, ProbeConfig.model_validate(FEW), 8).score(model_of(dataset).encoder)


def test_the_spread_over_one_subset_is_not_known(phantom_dataset: PatchDataset) -> None:
    encoder = model_of(phantom_dataset).encoder
    assert probe_of(phantom_dataset, subsets=1, scoring="val").score(encoder).dsc_sd is None
    spread = probe_of(phantom_dataset, subsets=3, scoring="val").score(encoder).dsc_sd
    assert spread is not None
    assert spread > 0


def test_the_score_of_a_group_is_the_mean_of_its_images(phantom_dataset: PatchDataset) -> None:
    score = probe_of(phantom_dataset, scoring="val").score(model_of(phantom_dataset).encoder)
    table = phantom_dataset.table("val").set_index("id")
    by_group: dict[str, list[float]] = {}
    for image, dsc in score.per_image.items():
        by_group.setdefault(table.loc[image, "group"], []).append(dsc)
    expected = {group: np.mean(values) for group, values in by_group.items()}
    assert score.per_group == pytest.approx(expected, abs=1e-5)


class TestIsVal(PatchDataset):
    """A dataset whose test split holds the images of val."""

    __test__ = False

    def load(self, split: str, rows: np.ndarray | None = None) -> Split:
        return super().load("val" if split == "test" else split, rows)

    def table(self, *splits: str, columns: Any = ("id",)) -> Any:
        return super().table(
            *("val" if split == "test" else split for split in splits), columns=columns
        )


def test_heads_that_are_scored_on_test_are_those_that_are_scored_on_val(
    phantom_dataset: PatchDataset,
) -> None:
    dataset = TestIsVal(phantom_dataset.root, phantom_dataset.manifest)
    probe = Probe(dataset, ProbeConfig.model_validate(FEW | {"scoring": "val"}), 8)
    encoder = model_of(phantom_dataset).encoder
    val, test = probe.score(encoder), probe.score(encoder, "test")
    assert test.scoring == "test"
    assert test.per_image == val.per_image
    for name in (
        "dsc",
        "ppv",
        "sensitivity",
        "ap",
        "dsc_sd",
        "empty_correct",
        "images",
        "mean_mask_dsc",
    ):
        assert getattr(test, name) == pytest.approx(getattr(val, name)), name


@pytest.mark.parametrize("scoring", ["val", "cross-validation"])
def test_on_test_every_labeled_lesion_is_scored_by_every_head(
    phantom_dataset: PatchDataset, scoring: str
) -> None:
    probe = Probe(phantom_dataset, ProbeConfig.model_validate(FEW | {"scoring": scoring}), 8)
    before = probe.score(model_of(phantom_dataset).encoder)
    score = probe.score(model_of(phantom_dataset).encoder, "test")
    assert set(score.per_image) == lesion_ids(phantom_dataset, "test")
    assert score.dsc == pytest.approx(np.mean(list(score.per_image.values())), abs=1e-5)
    assert probe.score(model_of(phantom_dataset).encoder) == before  # test has left no trace


def test_a_test_split_without_a_lesion_is_refused(phantom_dataset: PatchDataset) -> None:
    class Healthy(TestIsVal):
        def table(self, *splits: str, columns: Any = ("id",)) -> Any:
            result = super().table(*splits, columns=columns)
            return result.assign(lesion=0.0) if splits == ("test",) else result

    dataset = Healthy(phantom_dataset.root, phantom_dataset.manifest)
    probe = Probe(dataset, ProbeConfig.model_validate(FEW | {"scoring": "val"}), 8)
    with pytest.raises(DataError, match="no labeled test image with a lesion"):
        probe.score(model_of(phantom_dataset).encoder, "test")


def test_sizes_part_the_scored_images(phantom_dataset: PatchDataset) -> None:
    probe = probe_of(phantom_dataset, scoring="val", sizes=(0.04, 0.08))
    score = probe.score(model_of(phantom_dataset).encoder)
    val = phantom_dataset.load("val")
    shares = dict(zip(val.ids, val.masks.mean((1, 2)), strict=True))
    classes = {
        "small": [i for i in score.per_image if shares[i] < 0.04],
        "medium": [i for i in score.per_image if 0.04 <= shares[i] <= 0.08],
        "large": [i for i in score.per_image if shares[i] > 0.08],
    }
    assert {name: len(ids) for name, ids in classes.items()} == probe.images_by_size()
    assert sum(len(ids) for ids in classes.values()) == score.images
    for name, ids in classes.items():
        mean = np.mean([score.per_image[i] for i in ids]) if ids else None
        assert getattr(score, f"dsc_{name}") == (
            None if mean is None else pytest.approx(mean, abs=1e-5)
        ), name


def test_a_size_that_no_image_has_has_no_score(phantom_dataset: PatchDataset) -> None:
    score = probe_of(phantom_dataset, scoring="val", sizes=(0.9, 0.95)).score(
        model_of(phantom_dataset).encoder
    )
    assert score.dsc_small == pytest.approx(score.dsc)
    assert (score.dsc_medium, score.dsc_large) == (None, None)
