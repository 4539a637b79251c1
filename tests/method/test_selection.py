from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from amlp_ray.config import SelectionSettings
from amlp_ray.data.phantoms import draw_phantom
from amlp_ray.method.patches import patchify
from amlp_ray.method.selection import Selection, select_patches, selection_statistics

MODES = ("random", "hard", "soft")
GRID = (8, 8)


def select(
    images: Tensor,
    count: int,
    chosen: SelectionSettings,
    *,
    keys: Tensor | None = None,
    p: int = 8,
    seed: int = 0,
    epoch: int = 1,
) -> Selection:
    grid = (images.shape[2] // p, images.shape[3] // p)
    keys = torch.arange(len(images)) if keys is None else keys
    return select_patches(patchify(images, p), keys, count, grid, images.shape[1], chosen, seed=seed, epoch=epoch)


def awkward_image(kind: str, generator: torch.Generator) -> Tensor:
    """(1, 64, 64) images that break naive code."""
    noise = torch.rand(1, 64, 64, generator=generator)
    lesion = torch.zeros(1, 64, 64)
    lesion[:, 24:40, 24:40] = 1
    return {
        "noise": noise,
        "tiny noise": 1e-7 * noise,
        "black": torch.zeros(1, 64, 64),
        "constant": torch.full((1, 64, 64), 3.2),
        "one lesion": 1 - lesion,
        "one bright patch": lesion * (noise > 0.99),
        "saturated": (noise > 0.5).float() * 255,
        "mostly border": torch.where(lesion > 0, 1 + noise, 0.0),
        "huge": 1e6 * noise,
    }[kind]


AWKWARD = ("noise", "tiny noise", "black", "constant", "one lesion", "one bright patch", "saturated", "mostly border",
           "huge")  # fmt: skip
any_settings = st.builds(
    SelectionSettings,
    mode=st.sampled_from(MODES),
    features=st.sampled_from(["raw", "stats", "context"]),
    clusters=st.integers(2, 16),
    rule=st.sampled_from(["smallest", "distinct", "most_central", "darkest", "brightest", "random"]),
    lesion_share=st.floats(0.05, 1),
    max_share=st.floats(0.05, 1),
    score=st.sampled_from(["row_contrast", "blob", "border_saliency", "combined"]),
    lesion_sign=st.sampled_from(["dark", "bright", "free"]),
    centre_prior=st.sampled_from([0.0, 0.3, 0.8]),
    strength=st.sampled_from([0.0, 0.5, 50.0]),
    background_filter=st.booleans(),
)


@settings(max_examples=60, deadline=None)
@given(any_settings, st.lists(st.sampled_from(AWKWARD), min_size=1, max_size=4), st.integers(1, 63), st.integers(0, 99))
def test_any_image_has_exactly_m_masked_and_all_other_patches_visible(
    chosen: SelectionSettings, kinds: list[str], count: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    images = torch.stack([awkward_image(kind, generator) for kind in kinds])
    found = select(images, count, chosen, seed=seed)
    assert found.masked.shape == (len(kinds), count)
    assert found.visible.shape == (len(kinds), 64 - count)
    together = torch.cat([found.masked, found.visible], 1).sort(1).values
    assert torch.equal(together, torch.arange(64).expand(len(kinds), 64))  # disjoint, and covering
    assert not (found.lesion & ~found.tissue).any()
    for name, value in selection_statistics(found).items():
        assert 0 <= float(value) <= 1, name


@pytest.mark.parametrize("count", [1, 16, 48, 63])
def test_soft_selection_of_strength_0_is_random_masking_to_the_bit(
    ultrasound: tuple[Tensor, Tensor, Tensor], count: int
) -> None:
    images, _, keys = ultrasound
    for epoch in range(1, 6):
        random = select(images, count, SelectionSettings(mode="random"), keys=keys, epoch=epoch)
        soft = select(images, count, SelectionSettings(mode="soft", strength=0), keys=keys, epoch=epoch)
        assert torch.equal(random.masked, soft.masked)
        assert torch.equal(random.visible, soft.visible)


def test_images_without_a_qualified_cluster_are_masked_at_random_and_counted(
    ultrasound: tuple[Tensor, Tensor, Tensor],
) -> None:
    images, _, keys = ultrasound
    images = torch.cat([images, torch.zeros(4, 1, 64, 64)])
    keys = torch.cat([keys, torch.arange(4)])
    random = select(images, 30, SelectionSettings(mode="random"), keys=keys)
    hard = select(images, 30, SelectionSettings(mode="hard"), keys=keys)
    assert hard.fallback[16:].all()
    assert torch.equal(hard.masked[hard.fallback], random.masked[hard.fallback])
    assert not hard.lesion[hard.fallback].any()
    assert not hard.fallback[:16].all()
    assert float(selection_statistics(hard)["fallback_share"]) == pytest.approx(float(hard.fallback.float().mean()))
    none = select(images, 30, SelectionSettings(mode="hard", min_patches=64), keys=keys)
    assert none.fallback.all()
    assert not none.lesion.any()
    assert torch.equal(none.masked, random.masked)


def test_random_masking_names_no_lesion_and_no_fallback(ultrasound: tuple[Tensor, Tensor, Tensor]) -> None:
    found = select(ultrasound[0], 30, SelectionSettings(mode="random"))
    assert not found.lesion.any()
    assert not found.fallback.any()
    statistics = {name: float(value) for name, value in selection_statistics(found).items()}
    assert statistics == {"lesion_cluster_share": 0, "lesion_masked_share": 0, "fallback_share": 0}


def hidden(found: Selection) -> Tensor:
    return torch.zeros_like(found.lesion).scatter(1, found.masked, True)


@pytest.mark.parametrize("count", [3, 10, 30, 60])
def test_hard_masks_the_probable_lesion_before_anything_else(
    ultrasound: tuple[Tensor, Tensor, Tensor], count: int
) -> None:
    found = select(ultrasound[0], count, SelectionSettings(mode="hard"))
    named = ~found.fallback
    masked_lesion = (hidden(found) & found.lesion).sum(1)
    assert torch.equal(masked_lesion[named], found.lesion.sum(1).clamp_max(count)[named])


@pytest.mark.parametrize("share", [0.25, 0.5, 0.9])
def test_a_lesion_share_below_1_leaves_hints_visible_as_long_as_other_patches_are_left(
    ultrasound: tuple[Tensor, Tensor, Tensor], share: float
) -> None:
    images = ultrasound[0]
    for count in (1, 20, 40, 63):
        found = select(images, count, SelectionSettings(mode="hard", lesion_share=share))
        lesion, masked = found.lesion[~found.fallback], hidden(found)[~found.fallback]
        size = lesion.sum(1)
        aimed_at = (share * size).floor().long()
        others = 64 - size
        forced = (count - aimed_at - others).clamp_min(0)
        assert torch.equal((masked & lesion).sum(1), aimed_at.clamp_max(count) + forced)


def test_which_lesion_patches_stay_as_hints_changes_between_epochs(ultrasound: tuple[Tensor, Tensor, Tensor]) -> None:
    image = torch.rand(1, 1, 64, 64, generator=torch.Generator().manual_seed(0)) * 0.1 + 1
    image[..., 16:40, 16:40] -= 0.9  # 9 patches, the smallest of two clusters whatever the seeding
    chosen = SelectionSettings(mode="hard", clusters=2, lesion_share=0.5)
    hints = set()
    for epoch in range(1, 30):
        found = select(image, 30, chosen, epoch=epoch)
        assert int(found.lesion.sum()) == 9
        left = (found.lesion & ~hidden(found))[0].nonzero().flatten().tolist()
        assert len(left) == 5
        hints.update(left)
    assert len(hints) == 9


def test_border_is_masked_last_in_hard_mode() -> None:
    images = torch.from_numpy(
        np.stack([draw_phantom("mri", 64, np.random.default_rng([3, i]), lesion=True)[0] for i in range(8)])
    )[:, None].float()
    chosen = SelectionSettings(mode="hard")
    tissue = select(images, 1, chosen).tissue
    assert (~tissue).sum(1).min() > 5
    for count in (20, int(tissue.sum(1).min())):
        found = select(images, count, chosen)
        assert not (hidden(found) & ~tissue)[~found.fallback].any()
    everything = select(images, 63, chosen)
    assert (hidden(everything) & tissue).sum() >= tissue.sum() - 8


def test_soft_masks_lesions_more_the_stronger_it_is_and_border_less(ultrasound: tuple[Tensor, Tensor, Tensor]) -> None:
    images, masks, keys = ultrasound
    lesion = patchify(masks[:, None].float(), 8).mean(-1) > 0.25
    shares = []
    for strength in (0.0, 0.5, 1.0, 2.0, 20.0):
        hits = [
            hidden(select(images, 16, SelectionSettings(mode="soft", strength=strength), keys=keys, epoch=epoch))[
                lesion
            ]
            for epoch in range(1, 11)
        ]
        shares.append(float(torch.stack(hits).float().mean()))
    assert shares[0] == pytest.approx(0.25, abs=0.06)
    assert all(b > a for a, b in itertools.pairwise(shares))


def test_a_very_strong_soft_selection_takes_the_highest_scores(ultrasound: tuple[Tensor, Tensor, Tensor]) -> None:
    """At strength 50 a lead of half an SD outweighs all but one Gumbel draw in 10^10."""
    images = ultrasound[0]
    first = select(images, 12, SelectionSettings(mode="soft", strength=50), epoch=1)
    second = select(images, 12, SelectionSettings(mode="soft", strength=50), epoch=2)
    assert (hidden(first) & hidden(second)).sum() > 0.9 * 12 * 16


@pytest.mark.parametrize("mode", MODES)
def test_a_mask_depends_on_the_image_and_its_key_and_not_on_the_batch(
    ultrasound: tuple[Tensor, Tensor, Tensor], mode: str
) -> None:
    images, _, keys = ultrasound
    chosen = SelectionSettings(mode=mode)
    whole = select(images, 25, chosen, keys=keys)
    for rows in (torch.tensor([5]), torch.tensor([3, 9, 0]), torch.arange(15, -1, -1)):
        part = select(images[rows], 25, chosen, keys=keys[rows])
        for ours, theirs in zip(part, whole, strict=True):
            assert torch.equal(ours, theirs[rows])


@pytest.mark.parametrize("mode", MODES)
def test_masks_repeat_for_equal_seed_and_epoch_and_differ_for_others(
    ultrasound: tuple[Tensor, Tensor, Tensor], mode: str
) -> None:
    images, _, keys = ultrasound
    chosen = SelectionSettings(mode=mode)
    base = select(images, 25, chosen, keys=keys, seed=1, epoch=2)
    assert torch.equal(base.masked, select(images, 25, chosen, keys=keys, seed=1, epoch=2).masked)
    for other in (
        select(images, 25, chosen, keys=keys, seed=2, epoch=2),
        select(images, 25, chosen, keys=keys, seed=1, epoch=3),
        select(images, 25, chosen, keys=keys + 1, seed=1, epoch=2),
    ):
        assert not torch.equal(hidden(base), hidden(other))


def test_random_masking_masks_every_patch_equally_often() -> None:
    found = select(torch.rand(3000, 1, 16, 16), 4, SelectionSettings(mode="random"), p=4)
    share = hidden(found).float().mean(0)
    assert (share - 0.25).abs().max() < 0.04  # SD 0.008


def test_selection_statistics_count_what_they_say() -> None:
    lesion = torch.tensor([[True, True, False, False], [False] * 4, [True, True, True, True]])
    found = Selection(
        masked=torch.tensor([[0, 2], [0, 1], [0, 1]]),
        visible=torch.tensor([[1, 3], [2, 3], [2, 3]]),
        lesion=lesion,
        tissue=torch.ones(3, 4, dtype=torch.bool),
        fallback=torch.tensor([False, True, False]),
    )
    statistics = {name: float(value) for name, value in selection_statistics(found).items()}
    assert statistics["lesion_cluster_share"] == pytest.approx(6 / 12)
    assert statistics["lesion_masked_share"] == pytest.approx(0.5)  # of the two images that have a lesion
    assert statistics["fallback_share"] == pytest.approx(1 / 3)
