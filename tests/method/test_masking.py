from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from helpers.models import AWKWARD, awkward_images, build, hidden, random_images, step, tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from amlp_ray.errors import ConfigError
from amlp_ray.method import masking as module
from amlp_ray.method.augment import apply_crop, random_crop
from amlp_ray.method.ema_teacher import update_teacher
from amlp_ray.method.lesion_map import locate_lesion
from amlp_ray.method.masking import Masking, TrainingStep
from amlp_ray.method.patch_selection import Selection
from amlp_ray.method.patches import patchify

Phantoms = tuple[Tensor, Tensor, Tensor]
STILL = {"min_crop_area": 1.0, "flip": False}  # images are not cropped
HARD = {"variant": "mps-ams", "selection": {"features": "raw", "clusters": 3, "rule": "smallest"}}
NEVER_WARMING = {"loss": {"warmup": 0.0}}


def masking_of(*layers: Mapping[str, Any], truth: Mapping[int, Tensor] | None = None) -> Masking:
    chosen = tiny(*map(dict, layers))
    return Masking(build(chosen), chosen, truth)


def drawn(masking: Masking, images: Tensor, keys: Tensor, epoch: int) -> Selection:
    return masking.mask_augmented(images, keys, keys, TrainingStep(epoch))[1]


def same(one: Selection, other: Selection) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.fixture
def analyses(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """(epoch of the analysis, image's key) of every analysis, as it happens."""
    calls: list[tuple[int, int]] = []

    def counted(patches: Tensor, keys: Tensor, *others: Any, epoch: int, **options: Any) -> Any:
        calls.extend((epoch, key) for key in keys.tolist())
        return locate_lesion(patches, keys, *others, epoch=epoch, **options)

    monkeypatch.setattr(module, "locate_lesion", counted)
    return calls


# Every mask is sound

TEACHING = [
    {},
    {"selection": {"features": "tokens"}},
    {"selection": {"rule": "hardest"}},
    {"selection": {"feedback": 0.5}, "loss": {"ccl_weight": 0.1}},
    {
        "selection": {"feedback": 0.5, "features": "tokens"},
        "loss": {"ccl_weight": 0.1},
        "precision": "bf16",
    },
    {"selection": {"mode": "ranked", "score": "difficulty"}},
    {"selection": {"mode": "ranked", "score": "difficulty"}, "loss": {"ranking_weight": 1.0}},
    {"selection": {"mode": "soft", "score": "attention"}},
    {"selection": {"mode": "soft", "score": "attention"}, "model": {"class_token": False}},
    {"selection": {"mode": "soft", "score": "attention"}, "precision": "bf16"},
    {
        "selection": {"mode": "ranked", "score": "difficulty"},
        "loss": {"ranking_weight": 1.0},
        "precision": "bf16",
    },
]
any_selection = st.fixed_dictionaries(
    {
        "mode": st.sampled_from(["random", "hard", "soft", "ranked", "parts"]),
        "analysis_interval": st.sampled_from([0, 3]),
        "features": st.sampled_from(["raw", "stats", "context"]),
        "scope": st.sampled_from(["image", "dataset"]),
        "clusters": st.sampled_from([2, 3, 7]),
        "rule": st.sampled_from(
            ["smallest", "distinct", "most_central", "darkest", "geodesic", "combined", "random"]
        ),
        "hard_by": st.sampled_from(["cluster", "score"]),
        "score": st.sampled_from(
            ["row_contrast", "blob", "border_saliency", "geodesic", "texture", "combined"]
        ),
        "dilate": st.sampled_from([0, 1]),
        "strength": st.sampled_from([0.0, 1.0, 50.0]),
        "lesion_share": st.sampled_from([0.3, 1.0]),
        "score_share_end": st.sampled_from([0.0, 0.5, 1.0]),
    }
)
any_loss = st.fixed_dictionaries(
    {
        "weighting": st.sampled_from(["none", "arl", "rrl"]),
        "norm_pix": st.booleans(),
        "distance": st.sampled_from(["l1", "l2"]),
        "difficulty": st.sampled_from(["loss", "raw"]),
        "ccl_weight": st.sampled_from([0.0, 0.1]),
        "ccl_threshold": st.sampled_from(["mean", "quantile", "otsu"]),
    }
)


@settings(max_examples=60, deadline=None)
@given(
    any_selection,
    any_loss,
    st.sampled_from(TEACHING),
    st.lists(st.sampled_from(AWKWARD), min_size=1, max_size=4),
    st.integers(1, 20),
    st.sampled_from(["all", "tissue"]),
    st.sampled_from([0.02, 0.5, 0.98]),
)
def test_any_image_in_any_mode_has_a_sound_mask_and_finite_losses_and_gradients(
    selection: dict[str, Any],
    loss: dict[str, Any],
    teaching: dict[str, Any],
    kinds: list[str],
    epoch: int,
    ratio_over: str,
    ratio: float,
) -> None:
    masking = masking_of(
        {
            "selection": selection,
            "loss": loss,
            "ratio": {"start": ratio, "end": ratio, "ratio_over": ratio_over},
        },
        teaching,
    )
    images, keys = awkward_images(kinds, epoch), torch.arange(len(kinds))
    done = step(masking, images, keys, epoch)
    masked, visible = done.chosen.masked, done.chosen.visible
    assert masked.shape[1] == min(max(round(ratio * 64), 1), 63)
    assert torch.equal(
        torch.cat([masked, visible], 1).sort(1).values, torch.arange(64).expand(len(kinds), 64)
    )
    assert not (done.chosen.lesion & ~done.chosen.tissue).any()
    assert all(value.isfinite() for value in done.losses)
    done.losses.total.backward()
    gradients = [p.grad for p in masking.model.parameters() if p.requires_grad]
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients)


MODES: list[dict[str, Any]] = [
    {"variant": "mae"},
    HARD,
    {**HARD, "selection": {"rule": "random", "features": "stats", "dilate": 1}},
    {**HARD, "selection": {"analysis_interval": 0, "features": "context"}},
    {"variant": "amlp-soft"},
    {"variant": "semmae"},
    {"variant": "amlp", **NEVER_WARMING},
    {"variant": "hpm"},
    {"variant": "attmask"},
    {**HARD, "selection": {"features": "tokens"}, **NEVER_WARMING},
    {**HARD, "selection": {"rule": "hardest"}, **NEVER_WARMING},
]


@pytest.mark.parametrize("overrides", MODES, ids=str)
def test_a_permuted_batch_has_the_same_masks_permuted(
    ultrasound: Phantoms, overrides: dict[str, Any]
) -> None:
    images, _, keys = ultrasound
    masking = masking_of(overrides)
    for epoch in (1, 12):
        whole = drawn(masking, images, keys, epoch)
        for seed in (0, 1):
            order = torch.randperm(16, generator=torch.Generator().manual_seed(seed))
            fresh = Masking(masking.model, masking.config)
            permuted = drawn(fresh, images[order], keys[order], epoch)
            assert all(
                torch.equal(actual, original[order])
                for actual, original in zip(permuted, whole, strict=True)
            )


@pytest.mark.parametrize("analysis_interval", [0, 1, 7])
def test_in_random_mode_analysis_interval_changes_nothing_and_nothing_is_analyzed(
    ultrasound: Phantoms, analyses: list[tuple[int, int]], analysis_interval: int
) -> None:
    images, _, keys = ultrasound
    plain, other = (
        masking_of({"variant": "mae", "selection": {"analysis_interval": r}})
        for r in (10, analysis_interval)
    )
    for epoch in (1, 2, 11):
        assert same(drawn(plain, images, keys, epoch), drawn(other, images, keys, epoch))
    assert analyses == []


# Lesion maps are kept


def test_whole_images_are_analyzed_once_per_analysis_epoch(
    ultrasound: Phantoms, analyses: list[tuple[int, int]]
) -> None:
    images, _, keys = ultrasound
    masking = masking_of(HARD, {"selection": {"analysis_interval": 4}, **NEVER_WARMING})
    for epoch in range(1, 10):
        for rows in torch.randperm(16, generator=torch.Generator().manual_seed(epoch)).split(4):
            drawn(masking, images[rows], keys[rows], epoch)
    assert sorted(analyses) == sorted((at, key) for at in (1, 5, 9) for key in keys.tolist())


def test_the_end_of_the_warm_up_analyzes_again_and_epochs_go_on_from_there(
    ultrasound: Phantoms, analyses: list[tuple[int, int]]
) -> None:
    images, _, keys = ultrasound
    masking = masking_of(
        HARD, {"selection": {"analysis_interval": 5}, "loss": {"warmup": 0.35}}
    )  # 7 of 20 epochs
    for epoch in range(1, 17):
        drawn(masking, images[:2], keys[:2], epoch)
    assert [at for at, key in analyses if key == int(keys[0])] == [1, 6, 8, 11, 16]


@pytest.mark.parametrize(
    ("analysis_interval", "warmup", "expected"),
    [
        (1, 0.1, [1, 2, 3, 4, 5, 6]),
        (3, 0.0, [1, 1, 1, 4, 4, 4]),
        (3, 0.1, [1, 1, 3, 4, 4, 4]),
        (10, 0.2, [1, 1, 1, 1, 5, 5]),
        (0, 0.1, [1, 2, 3, 4, 5, 6]),
    ],
)
def test_an_epoch_belongs_to_the_last_analysis(
    analysis_interval: int, warmup: float, expected: list[int]
) -> None:
    masking = masking_of(
        HARD, {"selection": {"analysis_interval": analysis_interval}, "loss": {"warmup": warmup}}
    )
    assert [masking.analysis_epoch(epoch) for epoch in range(1, 7)] == expected


def test_analysis_interval_0_analyzes_every_crop_in_every_step(
    ultrasound: Phantoms, analyses: list[tuple[int, int]]
) -> None:
    images, _, keys = ultrasound
    masking = masking_of(HARD, {"selection": {"analysis_interval": 0}})
    for epoch in (1, 2):
        for _ in range(2):
            drawn(masking, images[:3], keys[:3], epoch)
    assert analyses == [(epoch, key) for epoch in (1, 1, 2, 2) for key in keys[:3].tolist()]


def test_images_that_were_not_analyzed_yet_are_analyzed_when_they_come(
    ultrasound: Phantoms, analyses: list[tuple[int, int]]
) -> None:
    images, _, keys = ultrasound
    masking = masking_of(HARD, NEVER_WARMING)
    drawn(masking, images[:4], keys[:4], 1)
    mixed = torch.tensor([3, 9, 0])
    selection = drawn(masking, images[mixed], keys[mixed], 2)
    assert analyses[4:] == [(1, int(keys[9]))]
    assert same(selection, drawn(masking_of(HARD, NEVER_WARMING), images[mixed], keys[mixed], 2))


def test_a_key_that_a_batch_repeats_has_the_same_mask_each_time(ultrasound: Phantoms) -> None:
    images, _, keys = ultrasound
    rows = torch.tensor([2, 5, 2, 2, 7, 5])
    for baseline in (HARD, {**HARD, "selection": {"scope": "dataset"}}):
        masking = masking_of(baseline, NEVER_WARMING)
        for epoch in (1, 2):
            selection = drawn(masking, images[rows], keys[rows], epoch)
            for one, other in ((0, 2), (0, 3), (1, 5)):
                assert all(torch.equal(part[one], part[other]) for part in selection)
            assert same(drawn(masking, images[rows], keys[rows], epoch), selection)


@pytest.mark.parametrize("first", [1, 3, 16])
def test_growth_past_what_was_made_room_for_keeps_what_was_kept(
    ultrasound: Phantoms, analyses: list[tuple[int, int]], first: int
) -> None:
    images, _, keys = ultrasound
    masking = masking_of(HARD, STILL, NEVER_WARMING)
    batches = [torch.arange(first), torch.arange(16), *torch.arange(16).split(5)]
    for rows in batches:
        drawn(masking, images[rows], keys[rows], 1)
    assert len(analyses) == 16
    direct = masking.mask_whole_images(images, keys, TrainingStep(1))[2]
    selection = drawn(masking, images, keys, 1)
    assert torch.equal(selection.lesion, direct.lesion)


def test_an_analysis_is_the_same_as_one_of_whole_images_where_nothing_is_cropped(
    ultrasound: Phantoms,
) -> None:
    images, _, keys = ultrasound
    for baseline in (HARD, {"variant": "semmae"}, {"variant": "attmask"}):
        masking = masking_of(baseline, STILL)
        patches, selection = masking.mask_augmented(images, keys, keys, TrainingStep(1))
        whole, lesion_map, expected = masking.mask_whole_images(images, keys, TrainingStep(1))
        assert torch.equal(patches, whole)
        assert torch.equal(selection.lesion, expected.lesion)
        if masking.config.selection.mode != "ranked":  # scores are kept in half precision
            assert same(selection, expected)
        assert torch.equal(
            (lesion_map.lesion > 0.5) & masking.config.selection.names_lesion, expected.lesion
        )


@pytest.mark.parametrize("flip", [True, False])
def test_what_is_kept_is_cropped_along_with_its_image(flip: bool) -> None:
    """For a strong square lesion the cropped map and the map of the crop agree on most patches."""
    keys = torch.arange(40)
    images = 0.05 * torch.randn(40, 1, 64, 64, generator=torch.Generator().manual_seed(0)) + 1
    corners = torch.randint(0, 5, (40, 2), generator=torch.Generator().manual_seed(1)) * 8
    for image, (y, x) in zip(images, corners.tolist(), strict=True):
        image[:, y : y + 24, x : x + 24] -= 3
    overrides = {
        **HARD,
        "flip": flip,
        "min_crop_area": 0.5,
        "selection": {"clusters": 2, "rule": "darkest"},
        **NEVER_WARMING,
    }
    from_whole_images = drawn(masking_of(overrides), images, keys, 2)
    from_crops = drawn(
        masking_of(overrides, {"selection": {"analysis_interval": 0}}), images, keys, 2
    )
    assert (from_whole_images.lesion == from_crops.lesion).float().mean() > 0.9
    hit = (from_whole_images.lesion & from_crops.lesion).sum() / (
        from_whole_images.lesion | from_crops.lesion
    ).sum()
    assert hit > 0.7
    uncropped = drawn(masking_of(overrides, STILL), images, keys, 2)
    unmoved = (uncropped.lesion & from_crops.lesion).sum() / (
        uncropped.lesion | from_crops.lesion
    ).sum()
    assert unmoved < hit - 0.2


def test_the_lesion_of_a_crop_covers_the_true_one_cropped_alike(ultrasound: Phantoms) -> None:
    """With oracles the lesion map is the truth, so only the cropping of maps is between them."""
    images, masks, keys = ultrasound
    share = patchify(masks[:, None].float(), 8).mean(-1)
    truth = dict(zip(keys.tolist(), share.unflatten(1, (8, 8)), strict=True))
    oracle = {"mode": "soft", "score": "oracle"}
    masking = masking_of(HARD, {"selection": oracle, "min_crop_area": 0.6}, truth=truth)
    selection = drawn(masking, images, keys, 3)
    crop = random_crop(keys, masking.config, 3)
    cut = patchify(apply_crop(masks[:, None].float(), crop), 8).mean(-1)
    overlap = (selection.lesion & (cut > 0.25)).sum(1)
    f1 = 2 * overlap / (selection.lesion.sum(1) + (cut > 0.25).sum(1)).clamp_min(1)
    assert f1[(cut > 0.25).any(1)].mean() > 0.75


# A resumed run


RESUMED: list[dict[str, Any]] = [
    HARD,
    {**HARD, "selection": {"rule": "random", "features": "stats"}},
    {**HARD, "selection": {"scope": "dataset", "clusters": 5, "features": "stats"}},
    {
        **HARD,
        "selection": {
            "scope": "dataset",
            "clusters": 5,
            "features": "stats",
            "analysis_interval": 3,
        },
    },
    {**HARD, "selection": {"analysis_interval": 0}},
    {"variant": "amlp", **NEVER_WARMING},
    {"variant": "attmask"},
    {"variant": "hpm"},
]


@pytest.mark.parametrize("overrides", RESUMED, ids=str)
@pytest.mark.parametrize("resumed_after", [1, 3, 5])
def test_a_run_resumed_between_two_analyses_draws_identical_masks(
    ultrasound: Phantoms, overrides: dict[str, Any], resumed_after: int
) -> None:
    images, _, keys = ultrasound

    def epoch_of(masking: Masking, epoch: int) -> list[Selection]:
        order = torch.randperm(16, generator=torch.Generator().manual_seed(epoch))
        return [drawn(masking, images[rows], keys[rows], epoch) for rows in order.split(4)]

    masking = masking_of(overrides)
    for epoch in range(1, resumed_after + 1):
        epoch_of(masking, epoch)
    other = build(masking.config, seed=5)
    other.load_state_dict(copy.deepcopy(masking.model.state_dict()))
    resumed = Masking(other, masking.config)
    for epoch in range(resumed_after + 1, resumed_after + 5):
        for one, two in zip(epoch_of(masking, epoch), epoch_of(resumed, epoch), strict=True):
            assert same(one, two)


def test_a_resumed_run_compares_clusters_of_the_data_set_by_sizes_at_the_last_analysis() -> None:
    """In the first images dark patches are fewer than bright ones, in all together more."""
    images, keys = 0.1 * random_images((1, 64, 64), 12), torch.arange(12)
    images[:2, ..., :16, :16] -= 3  # 4 patches
    images[:2, ..., 40:, 40:] += 3  # 9 patches
    images[2:, ..., :24, :24] -= 3
    images[2:, ..., 48:, 48:] += 3
    masking = masking_of(HARD, STILL, {"selection": {"scope": "dataset"}})
    batches = torch.arange(12).split(2)
    first = [drawn(masking, images[rows], keys[rows], 1).lesion.sum(1).tolist() for rows in batches]
    assert first == [[4, 4]] + [[9, 9]] * 5  # dark throughout
    resumed = Masking(copy.deepcopy(masking.model), masking.config)
    for rows in batches:
        assert same(*(drawn(run, images[rows], keys[rows], 2) for run in (masking, resumed)))


# Oracles


@pytest.mark.parametrize("oracle", [{"rule": "oracle"}, {"mode": "soft", "score": "oracle"}])
@pytest.mark.parametrize("analysis_interval", [0, 10])
def test_an_oracle_without_true_lesions_says_so(
    ultrasound: Phantoms, oracle: dict[str, Any], analysis_interval: int
) -> None:
    images, _, keys = ultrasound
    masking = masking_of(HARD, {"selection": {**oracle, "analysis_interval": analysis_interval}})
    with pytest.raises(ConfigError, match="oracle"):
        drawn(masking, images, keys, 1)
    with pytest.raises(ConfigError, match="oracle"):
        masking.mask_whole_images(images, keys, TrainingStep(1))


@pytest.mark.parametrize(
    ("oracle", "least"),
    [
        ({"rule": "oracle", "clusters": 6}, 0.5),  # no cluster covers the whole lesion
        ({"mode": "soft", "score": "oracle", "strength": 9}, 0.9),
    ],
)
@pytest.mark.parametrize("analysis_interval", [0, 10])
def test_an_oracle_masks_the_true_lesion_first(
    ultrasound: Phantoms, oracle: dict[str, Any], least: float, analysis_interval: int
) -> None:
    images, masks, keys = ultrasound
    share = patchify(masks[:, None].float(), 8).mean(-1)
    truth = dict(zip(keys.tolist(), share.unflatten(1, (8, 8)), strict=True))
    overrides = {**HARD, **STILL, "ratio": {"start": 0.3, "end": 0.3}}
    true_patches = share >= 0.5

    def masked_share(
        *selection: dict[str, Any], truth: Mapping[int, Tensor] | None = None
    ) -> float:
        masking = masking_of(overrides, *({"selection": s} for s in selection), truth=truth)
        return float(hidden(drawn(masking, images, keys, 1))[true_patches].float().mean())

    assert masked_share({"mode": "random"}) < 0.4
    assert masked_share({**oracle, "analysis_interval": analysis_interval}, truth=truth) > least


# Ratio, and what feedback and teachers change


def test_the_ratio_of_a_moment_decides_how_many_patches_are_masked(ultrasound: Phantoms) -> None:
    images, _, keys = ultrasound
    masking = masking_of(HARD, {"ratio": {"start": 0.25, "end": 0.75, "update_per": "step"}})
    counts = []
    for epoch, i in ((1, 0), (10, 3), (20, 3)):
        now = TrainingStep(epoch, i, 4)
        counts.append(masking.mask_augmented(images, keys, keys, now)[1].masked.shape[1])
        assert counts[-1] == round(64 * masking.ratio(now))
    assert counts[0] == 16
    assert counts[2] == 48


def test_feedback_changes_nothing_while_warming_up_and_the_lesion_afterwards(
    ultrasound: Phantoms,
) -> None:
    images, _, keys = ultrasound
    shared = {"variant": "amlp", "loss": {"warmup": 0.2}}
    with_feedback, without = (
        masking_of(shared, {"selection": {"feedback": f}}) for f in (0.5, 0.0)
    )
    assert without.model.teacher is None
    for epoch in (1, 4):
        assert same(drawn(with_feedback, images, keys, epoch), drawn(without, images, keys, epoch))
    one, other = drawn(with_feedback, images, keys, 5), drawn(without, images, keys, 5)
    assert not torch.equal(one.lesion, other.lesion)


def test_a_teacher_that_moved_is_asked_again_only_at_the_next_analysis(
    ultrasound: Phantoms,
) -> None:
    images, _, keys = ultrasound
    masking = masking_of(
        {"variant": "attmask", "selection": {"analysis_interval": 4}, "ratio": {"shape": "fixed"}},
        STILL,
    )
    before = drawn(masking, images, keys, 3).lesion
    with torch.no_grad():
        for parameter in masking.model.encoder.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    update_teacher(masking.model, 0.0, previous_step=0, step=1)
    assert torch.equal(drawn(masking, images, keys, 4).lesion, before)
    assert not torch.equal(drawn(masking, images, keys, 5).lesion, before)


def test_nothing_is_kept_and_no_centroid_moves_by_looking_at_whole_images(
    ultrasound: Phantoms, analyses: list[tuple[int, int]]
) -> None:
    images, _, keys = ultrasound
    masking = masking_of({**HARD, "selection": {"scope": "dataset"}}, NEVER_WARMING)
    drawn(masking, images, keys, 1)
    before = copy.deepcopy(masking.model.state_dict())
    masking.mask_whole_images(images * 2, keys + 1, TrainingStep(2))
    assert analyses[16:] == [(1, key + 1) for key in keys.tolist()]
    assert all(
        torch.equal(value, before[name]) for name, value in masking.model.state_dict().items()
    )
