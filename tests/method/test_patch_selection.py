from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from helpers.models import AWKWARD, awkward_images, hidden
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from amlp_ray.config import SelectionConfig
from amlp_ray.data.phantoms import draw_phantom
from amlp_ray.method.lesion_map import LesionMap, locate_lesion
from amlp_ray.method.patch_features import tissue_mask
from amlp_ray.method.patch_selection import Selection, select_patches, selection_statistics
from amlp_ray.method.patches import patchify

MODES = ("random", "hard", "soft", "ranked", "parts")
Phantoms = tuple[Tensor, Tensor, Tensor]


def select(
    images: Tensor,
    count: int,
    chosen: SelectionConfig,
    *,
    keys: Tensor | None = None,
    p: int = 8,
    seed: int = 0,
    epoch: int = 1,
    **others: Any,
) -> Selection:
    """Locate lesions and select, on whole images of patches of p pixels."""
    grid = (images.shape[2] // p, images.shape[3] // p)
    keys = torch.arange(len(images)) if keys is None else keys
    patches = patchify(images, p)
    lesion_map = locate_lesion(patches, keys, grid, images.shape[1], chosen, seed=seed, epoch=epoch)
    return select_patches(
        lesion_map,
        tissue_mask(patches, chosen),
        keys,
        count,
        chosen,
        seed=seed,
        epoch=epoch,
        **others,
    )


def aimed(count: int = 16, **parts: Tensor) -> LesionMap:
    """A lesion map of 64 patches of `count` images, of which `parts` are given."""
    nothing = torch.zeros(count, 64)
    return LesionMap(**({"lesion": nothing, "score": nothing, "cluster": nothing - 1} | parts))


def select_at(
    lesion_map: LesionMap,
    count: int,
    *,
    epoch: int = 1,
    tissue: Tensor | None = None,
    **options: Any,
) -> Selection:
    others = {k: options.pop(k) for k in ("progress", "ratio_over") if k in options}
    tissue = torch.ones_like(lesion_map.lesion, dtype=torch.bool) if tissue is None else tissue
    keys = torch.arange(len(tissue))
    return select_patches(
        lesion_map, tissue, keys, count, SelectionConfig(**options), seed=0, epoch=epoch, **others
    )


def some(count: int = 16, seed: int = 0) -> Tensor:
    return torch.rand(count, 64, generator=torch.Generator().manual_seed(seed))


any_settings = st.builds(
    SelectionConfig,
    mode=st.sampled_from(MODES),
    features=st.sampled_from(["raw", "stats", "context"]),
    clusters=st.integers(2, 16),
    rule=st.sampled_from(
        ["smallest", "distinct", "most_central", "darkest", "brightest", "geodesic", "random"]
    ),
    hard_by=st.sampled_from(["cluster", "score"]),
    lesion_share=st.floats(0.05, 1),
    max_share=st.floats(0.05, 1),
    dilate=st.integers(0, 2),
    score=st.sampled_from(
        ["row_contrast", "blob", "border_saliency", "geodesic", "texture", "combined"]
    ),
    lesion_sign=st.sampled_from(["dark", "bright", "free"]),
    center_prior=st.sampled_from([0.0, 0.3, 0.8]),
    strength=st.sampled_from([0.0, 0.5, 50.0]),
    score_share_start=st.floats(0, 1),
    score_share_end=st.floats(0, 1),
    background_filter=st.booleans(),
)


@settings(max_examples=60, deadline=None)
@given(
    any_settings,
    st.lists(st.sampled_from(AWKWARD), min_size=1, max_size=4),
    st.integers(1, 63),
    st.integers(0, 99),
    st.floats(0, 1),
    st.sampled_from(["all", "tissue"]),
)
def test_any_image_has_exactly_m_masked_and_all_other_patches_visible(
    chosen: SelectionConfig, kinds: list[str], count: int, seed: int, progress: float, over: str
) -> None:
    images = awkward_images(kinds, seed)
    selection = select(images, count, chosen, seed=seed, progress=progress, ratio_over=over)
    assert selection.masked.shape == (len(kinds), count)
    assert selection.visible.shape == (len(kinds), 64 - count)
    together = torch.cat([selection.masked, selection.visible], 1).sort(1).values
    assert torch.equal(together, torch.arange(64).expand(len(kinds), 64))  # disjoint, and covering
    assert not (selection.lesion & ~selection.tissue).any()
    for name, value in selection_statistics(selection).items():
        assert 0 <= float(value) <= 1, name


# Neutral settings are random masking


@pytest.mark.parametrize("count", [1, 16, 48, 63])
@pytest.mark.parametrize(
    "neutral",
    [
        {"mode": "soft", "strength": 0},
        {"mode": "ranked", "score_share_start": 0, "score_share_end": 0},
        {"mode": "hard", "min_patches": 64},
    ],
    ids=str,
)
def test_neutral_settings_of_any_mode_are_random_masking_to_the_bit(
    ultrasound: Phantoms, neutral: dict[str, Any], count: int
) -> None:
    images, _, keys = ultrasound
    for epoch in range(1, 4):
        random = select(images, count, SelectionConfig(mode="random"), keys=keys, epoch=epoch)
        selection = select(images, count, SelectionConfig(**neutral), keys=keys, epoch=epoch)
        assert torch.equal(random.masked, selection.masked)
        assert torch.equal(random.visible, selection.visible)


@pytest.mark.parametrize("mode", ["soft", "ranked"])
def test_a_score_that_says_nothing_masks_at_random(mode: str) -> None:
    random = select_at(aimed(), 30, mode="random")
    assert torch.equal(
        select_at(aimed(), 30, mode=mode, strength=7, score_share_end=0.0).masked, random.masked
    )
    same = select_at(aimed(), 30, mode=mode, strength=7, score_share_start=1, score_share_end=1)
    assert torch.equal(hidden(same), hidden(random))


def test_images_without_a_qualified_cluster_are_masked_at_random_and_counted(
    ultrasound: Phantoms,
) -> None:
    images, _, keys = ultrasound
    images = torch.cat([images, torch.zeros(4, 1, 64, 64)])
    keys = torch.cat([keys, torch.arange(4)])
    random = select(images, 30, SelectionConfig(mode="random"), keys=keys)
    hard = select(images, 30, SelectionConfig(mode="hard"), keys=keys)
    assert hard.fallback[16:].all()
    assert torch.equal(hard.masked[hard.fallback], random.masked[hard.fallback])
    assert not hard.lesion[hard.fallback].any()
    assert not hard.fallback[:16].all()
    assert float(selection_statistics(hard)["fallback_share"]) == pytest.approx(
        float(hard.fallback.float().mean())
    )
    parts = select(images, 30, SelectionConfig(mode="parts"), keys=keys)
    assert parts.fallback.tolist() == [False] * 16 + [True] * 4
    assert torch.equal(parts.masked[16:], random.masked[16:])


@pytest.mark.parametrize("mode", ["soft", "ranked"])
def test_a_score_that_says_nothing_masks_at_random_and_is_counted(mode: str) -> None:
    score = torch.zeros(4, 64)
    score[2:, 10] = 1
    selection = select_at(aimed(4, score=score), 20, mode=mode)
    assert selection.fallback.tolist() == [True, True, False, False]


def test_random_masking_names_no_lesion_and_no_fallback(ultrasound: Phantoms) -> None:
    selection = select(ultrasound[0], 32, SelectionConfig(mode="random"))
    assert not selection.lesion.any()
    assert not selection.fallback.any()
    statistics = {name: float(value) for name, value in selection_statistics(selection).items()}
    assert statistics.pop("tissue_masked_share") == pytest.approx(0.5, abs=0.02)
    assert statistics == {"lesion_cluster_share": 0, "lesion_masked_share": 0, "fallback_share": 0}


# hard


@pytest.mark.parametrize("count", [3, 10, 30, 60])
def test_hard_masks_the_probable_lesion_before_anything_else(
    ultrasound: Phantoms, count: int
) -> None:
    selection = select(ultrasound[0], count, SelectionConfig(mode="hard"))
    named = ~selection.fallback
    masked_lesion = (hidden(selection) & selection.lesion).sum(1)
    assert torch.equal(masked_lesion[named], selection.lesion.sum(1).clamp_max(count)[named])


@pytest.mark.parametrize("share", [0.25, 0.5, 0.9])
def test_a_lesion_share_below_1_leaves_hints_visible_as_long_as_other_patches_are_left(
    ultrasound: Phantoms, share: float
) -> None:
    images = ultrasound[0]
    for count in (1, 20, 40, 63):
        selection = select(images, count, SelectionConfig(mode="hard", lesion_share=share))
        lesion, masked = (
            selection.lesion[~selection.fallback],
            hidden(selection)[~selection.fallback],
        )
        size = lesion.sum(1)
        aimed_at = (share * size).floor().long()
        others = 64 - size
        forced = (count - aimed_at - others).clamp_min(0)
        assert torch.equal((masked & lesion).sum(1), aimed_at.clamp_max(count) + forced)


def test_which_lesion_patches_stay_as_hints_changes_between_epochs() -> None:
    lesion = torch.zeros(1, 64)
    lesion[0, 20:29] = 1
    hints = set()
    for epoch in range(1, 30):
        selection = select_at(
            aimed(1, lesion=lesion), 30, epoch=epoch, mode="hard", lesion_share=0.5
        )
        left = (selection.lesion & ~hidden(selection))[0].nonzero().flatten().tolist()
        assert len(left) == 5
        hints.update(left)
    assert len(hints) == 9


def test_border_is_masked_last_in_hard_mode() -> None:
    images = torch.from_numpy(
        np.stack(
            [
                draw_phantom("mri", 64, np.random.default_rng([3, i]), lesion=True)[0]
                for i in range(8)
            ]
        )
    )[:, None].float()
    chosen = SelectionConfig(mode="hard")
    tissue = select(images, 1, chosen).tissue
    assert (~tissue).sum(1).min() > 5
    for count in (20, int(tissue.sum(1).min())):
        selection = select(images, count, chosen)
        assert not (hidden(selection) & ~tissue)[~selection.fallback].any()
    everything = select(images, 63, chosen)
    assert (hidden(everything) & tissue).sum() >= tissue.sum() - 8


def test_a_lesion_blurred_by_a_crop_counts_where_it_covers_more_than_half_of_a_tissue_patch() -> (
    None
):
    tissue = torch.ones(1, 64, dtype=torch.bool)
    tissue[0, 3] = False
    lesion = torch.zeros(1, 64)
    lesion[0, :4] = torch.tensor([0.4, 0.6, 1.0, 1.0])
    selection = select_at(aimed(1, lesion=lesion), 10, tissue=tissue, mode="hard")
    assert selection.lesion[0].nonzero().flatten().tolist() == [1, 2]


# soft


def test_soft_masks_lesions_more_the_stronger_it_is(ultrasound: Phantoms) -> None:
    images, masks, keys = ultrasound
    lesion = patchify(masks[:, None].float(), 8).mean(-1) > 0.25
    shares = []
    for strength in (0.0, 0.5, 1.0, 2.0, 20.0):
        chosen = SelectionConfig(mode="soft", strength=strength)
        hits = [
            hidden(select(images, 16, chosen, keys=keys, epoch=epoch))[lesion]
            for epoch in range(1, 11)
        ]
        shares.append(float(torch.stack(hits).float().mean()))
    assert shares[0] == pytest.approx(0.25, abs=0.06)
    assert all(b > a for a, b in itertools.pairwise(shares))


def test_a_very_strong_soft_selection_takes_the_highest_scores() -> None:
    """At strength 50 a lead of half an SD outweighs all but one Gumbel draw in 10^10."""
    score = torch.arange(64.0).expand(16, -1) / 2
    for epoch in (1, 2):
        selection = select_at(aimed(score=score), 12, epoch=epoch, mode="soft", strength=50)
        assert torch.equal(selection.masked.sort(1).values, torch.arange(52, 64).expand(16, -1))


def test_soft_draws_in_proportion_to_the_exponential_of_the_score() -> None:
    score = torch.zeros(4000, 64)
    score[:, 5] = 2.0
    selection = select_at(aimed(4000, score=score), 1, mode="soft", strength=1.5)
    expected = np.exp(3) / (np.exp(3) + 63)
    assert float((selection.masked == 5).float().mean()) == pytest.approx(
        expected, abs=0.03
    )  # SD 0.007


# ranked


@pytest.mark.parametrize("progress", [0.0, 0.25, 1.0])
def test_ranked_takes_a_share_of_the_mask_from_the_top_and_the_rest_at_random(
    progress: float,
) -> None:
    score, count = some(), 30
    selection = select_at(
        aimed(score=score),
        count,
        mode="ranked",
        score_share_start=0.2,
        score_share_end=0.8,
        progress=progress,
    )
    top = int((0.2 + 0.6 * progress) * count)
    best = score.argsort(1, descending=True)[:, :top]
    assert torch.equal(selection.masked[:, :top].sort(1).values, best.sort(1).values)
    if progress < 1:
        rest = torch.stack(
            [
                (row[found_row])
                for row, found_row in zip(score, selection.masked[:, top:], strict=True)
            ]
        )
        assert abs(float(rest.mean()) - float(score.mean())) < 0.25  # no longer the top
        again = select_at(
            aimed(score=score),
            count,
            mode="ranked",
            score_share_start=0.2,
            score_share_end=0.8,
            progress=progress,
            epoch=2,
        )
        assert not torch.equal(again.masked[:, top:], selection.masked[:, top:])


def test_ranked_with_all_of_the_mask_aimed_takes_the_top_and_may_fall_instead_of_rise() -> None:
    score = some()
    top = {tuple(sorted(row)) for row in score.topk(20).indices.tolist()}
    rising = select_at(
        aimed(score=score), 20, mode="ranked", score_share_start=0, score_share_end=1, progress=1.0
    )
    falling = select_at(
        aimed(score=score), 20, mode="ranked", score_share_start=1, score_share_end=0, progress=0.0
    )
    for selection in (rising, falling):
        assert {tuple(sorted(row)) for row in selection.masked.tolist()} == top


def test_hints_are_shown_out_of_the_very_top_alone_in_the_share_asked_for() -> None:
    score = some(400)
    selection = select_at(
        aimed(400, score=score),
        32,
        mode="ranked",
        score_share_start=1,
        score_share_end=1,
        lesion_share=0.7,
    )
    visible = ~hidden(selection)
    rank = score.argsort(1, descending=True).argsort(1)
    very_top = rank < 0.1 * 64
    assert float(visible[very_top].float().mean()) == pytest.approx(0.3, abs=0.04)  # SD 0.009
    aimed_at = (rank < 32) & ~very_top
    assert not (visible & aimed_at).any()
    assert select_at(
        aimed(400, score=score), 32, mode="ranked", score_share_start=1, score_share_end=1
    ).masked.shape == (400, 32)


# parts


def parts_of(count: int = 16) -> Tensor:
    """Four parts of 4, 12, 16 and 24 patches, and 8 patches of border."""
    row = torch.cat(
        [torch.full((size,), float(k)) for k, size in enumerate((4, 12, 16, 24))] + [-torch.ones(8)]
    )
    order = torch.stack(
        [torch.randperm(64, generator=torch.Generator().manual_seed(i)) for i in range(count)]
    )
    return row[order]


@pytest.mark.parametrize("count", [16, 32, 48])
def test_parts_begin_with_the_same_share_of_every_part(count: int) -> None:
    part = parts_of()
    masked = hidden(select_at(aimed(cluster=part), count, mode="parts", clusters=4, progress=0.0))
    for k in (-1, 0, 1, 2, 3):
        inside = part == k
        share = (masked & inside).sum(1) / inside.sum(1)
        assert (share - count / 64).abs().max() <= 1 / inside.sum(1).min() + 1e-6


@pytest.mark.parametrize("count", [10, 30, 50])
def test_parts_end_with_whole_parts_in_an_order_that_changes_and_the_border_last(
    count: int,
) -> None:
    part = parts_of(64)
    first = set()
    for epoch in (1, 2, 3):
        selection = select_at(
            aimed(64, cluster=part), count, mode="parts", clusters=4, progress=1.0, epoch=epoch
        )
        masked = hidden(selection)
        for row, clusters in zip(masked, part, strict=True):
            cut = [
                k
                for k in (0, 1, 2, 3, -1)
                if 0 < int(row[clusters == k].sum()) < int((clusters == k).sum())
            ]
            assert len(cut) <= 1  # all but one part are masked as a whole or not at all
            assert not row[clusters == -1].any()
        first |= set(part.gather(1, selection.masked[:, :1]).flatten().tolist())
    assert first == {0, 1, 2, 3}


def test_parts_go_from_one_end_to_the_other_over_training() -> None:
    """By the share of parts that are masked to more than 95 or less than 5 percent."""
    part = parts_of(64)
    whole = []
    for progress in (0.0, 0.6, 0.9, 1.0):
        masked = hidden(
            select_at(aimed(64, cluster=part), 32, mode="parts", clusters=4, progress=progress)
        )
        shares = torch.stack([(masked & (part == k)).sum(1) / (part == k).sum(1) for k in range(4)])
        whole.append(float(((shares > 0.95) | (shares < 0.05)).float().mean()))
    assert whole[0] == 0
    assert whole[1] <= whole[2] <= whole[3]
    assert whole[3] > 0.7


# over tissue


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("count", [8, 31, 56])
def test_over_tissue_the_same_share_of_tissue_and_of_border_is_masked(
    mode: str, count: int
) -> None:
    tissue = some(seed=1) < torch.linspace(0.05, 0.95, 16)[:, None]
    lesion = ((some() < 0.3) & tissue).float()
    part = torch.where(tissue, (some() * 3).floor(), -1.0)
    lesion_map = aimed(lesion=lesion, score=some(seed=2), cluster=part)
    masked = hidden(
        select_at(lesion_map, count, tissue=tissue, mode=mode, ratio_over="tissue", progress=0.5)
    )
    assert (masked.sum(1) == count).all()
    for where in (tissue, ~tissue):
        assert ((masked & where).sum(1) - where.sum(1) * count / 64).abs().max() <= 1


def test_over_tissue_each_share_is_taken_in_the_mode_s_own_order() -> None:
    tissue = some(seed=1) < 0.6
    lesion = ((some() < 0.2) & tissue).float()
    masked = hidden(
        select_at(aimed(lesion=lesion), 32, tissue=tissue, mode="hard", ratio_over="tissue")
    )
    assert (masked | (lesion == 0)).all()  # the lesion first, though less tissue is masked


def test_over_tissue_changes_nothing_where_all_is_tissue(ultrasound: Phantoms) -> None:
    images, _, keys = ultrasound
    for mode in MODES:
        chosen = SelectionConfig(mode=mode, background_filter=False)
        plain, shared = (
            select(images, 25, chosen, keys=keys, ratio_over=over) for over in ("all", "tissue")
        )
        assert torch.equal(plain.masked, shared.masked)


# What a mask depends on


@pytest.mark.parametrize("mode", MODES)
def test_a_mask_depends_on_the_image_and_its_key_and_not_on_the_batch(
    ultrasound: Phantoms, mode: str
) -> None:
    images, _, keys = ultrasound
    chosen = SelectionConfig(mode=mode)
    whole = select(images, 25, chosen, keys=keys, progress=0.5)
    for rows in (torch.tensor([5]), torch.tensor([3, 9, 0]), torch.arange(15, -1, -1)):
        part = select(images[rows], 25, chosen, keys=keys[rows], progress=0.5)
        for actual, expected in zip(part, whole, strict=True):
            assert torch.equal(actual, expected[rows])


@pytest.mark.parametrize("mode", MODES)
def test_masks_repeat_for_equal_seed_and_epoch_and_differ_for_others(
    ultrasound: Phantoms, mode: str
) -> None:
    images, _, keys = ultrasound
    chosen = SelectionConfig(mode=mode)
    base = select(images, 25, chosen, keys=keys, seed=1, epoch=2)
    assert torch.equal(base.masked, select(images, 25, chosen, keys=keys, seed=1, epoch=2).masked)
    for other in (
        select(images, 25, chosen, keys=keys, seed=2, epoch=2),
        select(images, 25, chosen, keys=keys, seed=1, epoch=3),
        select(images, 25, chosen, keys=keys + 1, seed=1, epoch=2),
    ):
        assert not torch.equal(hidden(base), hidden(other))


def test_random_masking_masks_every_patch_equally_often() -> None:
    selection = select(torch.rand(3000, 1, 16, 16), 4, SelectionConfig(mode="random"), p=4)
    share = hidden(selection).float().mean(0)
    assert (share - 0.25).abs().max() < 0.04  # SD 0.008


def test_selection_statistics_count_what_they_say() -> None:
    lesion = torch.tensor([[True, True, False, False], [False] * 4, [True, True, True, True]])
    tissue = torch.tensor([[True] * 4, [False] * 4, [True] * 4])
    selection = Selection(
        masked=torch.tensor([[0, 2], [0, 1], [0, 1]]),
        visible=torch.tensor([[1, 3], [2, 3], [2, 3]]),
        lesion=lesion,
        tissue=tissue,
        fallback=torch.tensor([False, True, False]),
    )
    statistics = {name: float(value) for name, value in selection_statistics(selection).items()}
    assert statistics["lesion_cluster_share"] == pytest.approx(6 / 12)
    assert statistics["lesion_masked_share"] == pytest.approx(
        0.5
    )  # of the two images that have a lesion
    assert statistics["tissue_masked_share"] == pytest.approx(
        0.5
    )  # of the two images that have tissue
    assert statistics["fallback_share"] == pytest.approx(1 / 3)
