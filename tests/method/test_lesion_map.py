from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from amlp_ray.config import SelectionConfig
from amlp_ray.method.cluster_rules import true_lesion_patches
from amlp_ray.method.lesion_map import LesionMap, TeacherView, locate_lesion
from amlp_ray.method.patch_features import dilate, tissue_mask
from amlp_ray.method.patch_scores import PATCH_SCORES, patch_score, z_score
from amlp_ray.method.patches import patchify

GRID = (8, 8)
Phantoms = tuple[Tensor, Tensor, Tensor]
GENERATOR_SEED = 3


def locate(
    images: Tensor, keys: Tensor | None = None, epoch: int = 1, seed: int = 0, **options: Any
) -> LesionMap:
    """Locate lesions among 8x8 patches; `options` are settings, or arguments of `locate_lesion`."""
    others = {k: options.pop(k) for k in ("teacher", "feedback", "truth") if k in options}
    keys = torch.arange(len(images)) if keys is None else keys
    chosen = SelectionConfig(**({"features": "raw", "clusters": 3, "rule": "smallest"} | options))
    return locate_lesion(
        patchify(images, 8), keys, GRID, images.shape[1], chosen, seed=seed, epoch=epoch, **others
    )


def some(count: int = 16) -> Tensor:
    return torch.rand(count, 64, generator=torch.Generator().manual_seed(GENERATOR_SEED))


def share_of(masks: Tensor) -> Tensor:
    return patchify(masks[:, None].float(), 8).mean(-1)


def test_a_lesion_map_survives_being_kept_as_images() -> None:
    lesion_map = LesionMap(some().round(), some(), (some() * 4).floor() - 1)
    maps = lesion_map.to_images(GRID)
    assert maps.shape == (16, 3, 8, 8)
    assert all(
        torch.equal(a, b) for a, b in zip(LesionMap.from_images(maps), lesion_map, strict=True)
    )
    assert torch.equal(maps[3, 1, 2, 5], lesion_map.score[3, 2 * 8 + 5])


def test_what_a_setting_does_not_use_is_left_at_nothing(ultrasound: Phantoms) -> None:
    images = ultrasound[0]
    by_score, by_cluster = locate(images, mode="soft"), locate(images, mode="hard")
    assert (by_score.cluster == -1).all()
    assert by_score.score.any()
    assert not by_cluster.score.any()
    assert by_cluster.cluster.max() == 2


@pytest.mark.parametrize("mode", ["hard", "parts"])
def test_the_lesion_is_one_whole_cluster_of_tissue_and_parts_are_the_clusters(
    ultrasound: Phantoms, mode: str
) -> None:
    images = ultrasound[0]
    lesion_map = locate(images, mode=mode, clusters=4)
    tissue = tissue_mask(patchify(images, 8), SelectionConfig())
    assert torch.equal(lesion_map.cluster >= 0, tissue)
    for lesion, part in zip(lesion_map.lesion > 0, lesion_map.cluster, strict=True):
        if lesion.any():
            (lesion_cluster,) = part[lesion].unique()
            assert torch.equal(part == lesion_cluster, lesion)


@pytest.mark.parametrize("mode", ["soft", "ranked"])
def test_a_score_marks_as_lesion_what_lies_one_sd_above_its_image(
    ultrasound: Phantoms, mode: str
) -> None:
    images = ultrasound[0]
    patches, chosen = patchify(images, 8), SelectionConfig()
    tissue = tissue_mask(patches, chosen)
    score = patch_score(patches, tissue, GRID, score="blob", sign="dark", center_prior=0.5)
    lesion_map = locate(images, mode=mode, score="blob", center_prior=0.5)
    assert torch.equal(lesion_map.score, score)
    assert torch.equal(lesion_map.lesion > 0, (score > 1) & tissue)


def test_hard_by_score_needs_no_clusters_and_takes_what_lies_one_sd_above_its_image(
    ultrasound: Phantoms,
) -> None:
    images = torch.cat([ultrasound[0], torch.zeros(1, 1, 64, 64)])
    lesion_map = locate(images, mode="hard", hard_by="score", score="geodesic", dilate=1)
    narrow = locate(images, mode="soft", score="geodesic").lesion > 0
    assert (lesion_map.cluster == -1).all()
    assert torch.equal(lesion_map.lesion[:16] > 0, dilate(narrow[:16], GRID, 1))
    assert not lesion_map.lesion[16].any()


@pytest.mark.parametrize("rule", PATCH_SCORES)
def test_a_rule_called_after_a_score_names_the_cluster_of_its_highest_mean(
    ultrasound: Phantoms, rule: str
) -> None:
    images = ultrasound[0]
    lesion_map = locate(
        images, rule=rule, clusters=4, max_share=1.0, min_patches=1, center_prior=0.7
    )
    tissue = tissue_mask(patchify(images, 8), SelectionConfig())
    score = patch_score(
        patchify(images, 8), tissue, GRID, score=rule, sign="dark", center_prior=0.7
    )
    for lesion, part, value in zip(lesion_map.lesion > 0, lesion_map.cluster, score, strict=True):
        means = torch.stack([value[part == k].mean() for k in range(4)])
        assert torch.equal(lesion, part == means.argmax())


def test_the_cluster_score_is_highest_in_the_cluster_lowest_on_border_and_0_where_none_is_found(
    ultrasound: Phantoms,
) -> None:
    images = torch.cat([ultrasound[0], torch.zeros(1, 1, 64, 64)])
    images[0, :, :, :16] = images[0].min()  # a border
    lesion_map = locate(images, mode="soft", score="cluster")
    hard = locate(images, mode="hard")
    assert torch.equal(lesion_map.lesion, hard.lesion)
    named = lesion_map.lesion.any(1)
    assert not named[-1]
    assert not lesion_map.score[~named].any()
    assert (lesion_map.score[0][lesion_map.cluster[0] < 0] == -20).all()
    for score, lesion in zip(lesion_map.score[named], lesion_map.lesion[named] > 0, strict=True):
        assert score[lesion].min() > score[~lesion].max()
        assert score.max() <= 0


def test_a_warmer_cluster_score_is_flatter(ultrasound: Phantoms) -> None:
    scores = [
        locate(ultrasound[0], mode="soft", score="cluster", temperature=t).score.exp()
        for t in (0.2, 1.0, 50.0)
    ]
    spreads = [float(score[score.any(1)].std(1).mean()) for score in scores]
    assert spreads[0] > spreads[1] > spreads[2]


@pytest.mark.parametrize("by", [1, 2])
def test_the_lesion_grows_by_whole_patches_and_never_onto_the_border(
    ultrasound: Phantoms, by: int
) -> None:
    images = ultrasound[0].clone()
    images[:, :, :, :16] = images.amin((1, 2, 3))[:, None, None, None]
    tissue = tissue_mask(patchify(images, 8), SelectionConfig())
    assert not tissue.all()
    narrow, wide = (locate(images, dilate=d).lesion > 0 for d in (0, by))
    assert torch.equal(wide, dilate(narrow, GRID, by) & tissue)
    assert (wide & ~narrow).any()


def test_the_oracles_aim_at_the_true_lesion(ultrasound: Phantoms) -> None:
    images, masks, _ = ultrasound
    share = share_of(masks)
    truth = true_lesion_patches(share)

    def f1(lesion: Tensor) -> float:
        return float(
            (2 * (lesion & truth).sum(1) / (lesion.sum(1) + truth.sum(1)).clamp_min(1)).mean()
        )

    oracle = locate(images, clusters=6, rule="oracle", truth=share)
    others = ("smallest", "distinct", "most_central", "darkest", "brightest", "random")
    assert all(
        f1(oracle.lesion > 0) > f1(locate(images, clusters=6, rule=rule).lesion > 0)
        for rule in others
    )
    scored = locate(images, mode="soft", score="oracle", truth=share)
    for score, patches in zip(scored.score, truth, strict=True):
        assert score[patches].min() > score[~patches].max() - 1e-6


@pytest.mark.parametrize("score", ["difficulty", "attention"])
def test_the_teacher_s_maps_are_scores_and_without_a_teacher_nothing_is_aimed_at(
    ultrasound: Phantoms, score: str
) -> None:
    images = ultrasound[0]
    lesion_map = locate(images, mode="ranked", score=score, teacher=TeacherView(**{score: some()}))
    tissue = tissue_mask(patchify(images, 8), SelectionConfig())
    assert torch.equal(lesion_map.score, z_score(some(), tissue))
    without = locate(images, mode="ranked", score=score)
    assert not without.score.any()
    assert not without.lesion.any()


def test_the_hardest_rule_follows_the_teacher_and_finds_nothing_without(
    ultrasound: Phantoms,
) -> None:
    images = ultrasound[0]
    parts = locate(images, rule="hardest", max_share=1.0).cluster
    for cluster in range(3):
        teacher = TeacherView(difficulty=(parts == cluster).float())
        lesion_map = locate(images, rule="hardest", max_share=1.0, min_patches=1, teacher=teacher)
        assert torch.equal(lesion_map.lesion > 0, parts == cluster)
    assert not locate(images, rule="hardest").lesion.any()


def test_tokens_decide_the_clusters_where_there_are_any_and_pixels_where_there_are_none(
    ultrasound: Phantoms,
) -> None:
    images = ultrasound[0]
    halves = (torch.arange(64) % 8 < 3).float()
    tokens = torch.stack([halves, 1 - halves], -1).expand(16, -1, -1)
    lesion_map = locate(
        images,
        features="tokens",
        clusters=2,
        background_filter=False,
        teacher=TeacherView(tokens=tokens),
    )
    assert torch.equal(lesion_map.lesion > 0, (halves > 0).expand(16, -1))
    raw = locate(images, features="raw")
    assert all(
        torch.equal(a, b) for a, b in zip(locate(images, features="tokens"), raw, strict=True)
    )


# Feedback


def test_feedback_moves_the_lesion_toward_the_category_and_keeps_its_size(
    ultrasound: Phantoms,
) -> None:
    images = ultrasound[0]
    teacher = TeacherView(category=some())
    before = locate(images).lesion > 0
    means = []
    for feedback in (0.0, 0.3, 0.6, 1.0):
        lesion = locate(images, teacher=teacher, feedback=feedback).lesion > 0
        assert torch.equal(lesion.sum(1), before.sum(1))
        means.append(float(some()[lesion].mean()))
    assert means[-1] > means[0] + 0.2
    assert all(b >= a - 0.02 for a, b in itertools.pairwise(means))


def test_feedback_of_1_takes_the_patches_of_highest_category(ultrasound: Phantoms) -> None:
    lesion = locate(ultrasound[0], teacher=TeacherView(category=some()), feedback=1.0).lesion > 0
    assert lesion.any(1).sum() > 8
    for where, category in zip(lesion, some(), strict=True):
        assert set(where.nonzero().flatten().tolist()) == set(
            category.topk(int(where.sum())).indices.tolist()
        )


def test_feedback_of_0_and_feedback_without_a_category_change_nothing(ultrasound: Phantoms) -> None:
    expected = locate(ultrasound[0])
    for options in ({"feedback": 0.0, "teacher": TeacherView(category=some())}, {"feedback": 1.0}):
        assert all(
            torch.equal(a, b)
            for a, b in zip(locate(ultrasound[0], **options), expected, strict=True)
        )


def test_feedback_finds_no_lesion_where_the_clusters_have_none(ultrasound: Phantoms) -> None:
    lesion_map = locate(
        ultrasound[0], min_patches=64, teacher=TeacherView(category=some()), feedback=1.0
    )
    assert not lesion_map.lesion.any()


# What a lesion map depends on

SETTINGS = [
    {"mode": "hard"},
    {"mode": "hard", "rule": "random", "features": "stats"},
    {"mode": "hard", "rule": "combined", "features": "context"},
    {"mode": "hard", "hard_by": "score", "score": "combined"},
    {"mode": "soft", "score": "geodesic"},
    {"mode": "ranked", "score": "cluster"},
    {"mode": "parts", "clusters": 6},
]


@pytest.mark.parametrize("overrides", SETTINGS, ids=str)
def test_a_lesion_map_depends_on_the_image_and_its_key_and_not_on_the_batch(
    ultrasound: Phantoms, overrides: dict[str, Any]
) -> None:
    images, _, keys = ultrasound
    whole = locate(images, keys, **overrides)
    for rows in (torch.tensor([5]), torch.tensor([3, 9, 0]), torch.arange(15, -1, -1)):
        part = locate(images[rows], keys[rows], **overrides)
        assert all(torch.equal(a, b[rows]) for a, b in zip(part, whole, strict=True))


def test_the_random_rule_names_others_with_another_key_epoch_or_seed(ultrasound: Phantoms) -> None:
    images, _, keys = ultrasound
    base = locate(images, keys, rule="random").lesion
    for other in ({"epoch": 2}, {"seed": 1}, {"keys": keys + 1}):
        assert not torch.equal(
            base, locate(images, **{"keys": keys, "rule": "random", **other}).lesion
        )


def test_nothing_in_a_lesion_map_carries_a_gradient(ultrasound: Phantoms) -> None:
    images = ultrasound[0].clone().requires_grad_()
    assert not any(part.requires_grad for part in locate(images, mode="soft"))
