from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given
from hypothesis import settings as hypothesis
from hypothesis import strategies as st
from sklearn.metrics import cohen_kappa_score
from torch import Tensor

from amlp_ray.config import LossConfig
from amlp_ray.method.autoencoder import Prediction
from amlp_ray.method.losses import (
    Losses,
    category_consistency_loss,
    cohens_kappa,
    hard_labels,
    hard_patch_weights,
    patch_errors,
    pretraining_loss,
    ranking_loss,
    relative_difficulty,
)

B, M, P = 5, 40, 16
ALL = torch.ones(B, M, dtype=torch.bool)
OFF = {"weighting": "none", "ccl_weight": 0.0}


class Case:
    """Masked patches of five images; lesion patches are a fifth, and hard."""

    def __init__(self, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.lesion = torch.rand(B, M, generator=generator) < 0.2
        self.target = torch.randn(B, M, P, generator=generator) * (1 + self.lesion[..., None])
        self.pixels = (0.3 * torch.randn(B, M, P, generator=generator)).requires_grad_()
        self.category: Tensor | None = torch.randn(B, M, generator=generator).requires_grad_()
        self.difficulty: Tensor | None = None
        self.tissue = self.lesion | (torch.rand(B, M, generator=generator) < 0.8)

    def loss(self, *, warming_up: bool = False, **config: Any) -> Losses:
        prediction = Prediction(self.pixels, self.category, self.difficulty)
        chosen = LossConfig(**config)
        return pretraining_loss(
            prediction, self.target, self.lesion, self.tissue, chosen, warming_up=warming_up
        )

    def plain(self, **config: Any) -> Losses:
        """Without a category head."""
        prediction = Prediction(self.pixels, None, None)
        chosen = LossConfig(**OFF, **config)
        return pretraining_loss(
            prediction, self.target, self.lesion, self.tissue, chosen, warming_up=False
        )


def headless(seed: int = 0) -> Case:
    case = Case(seed)
    case.category = None
    return case


def test_the_plain_loss_is_the_mean_squared_error_of_mae() -> None:
    losses = headless().plain()
    torch.testing.assert_close(losses.total, F.mse_loss(Case().pixels, Case().target))
    assert losses.total.equal(losses.reconstruction)
    assert (float(losses.ccl), float(losses.ranking), float(losses.effective_patches)) == (0, 0, 1)


def test_l1_is_the_mean_absolute_error_of_simmim() -> None:
    torch.testing.assert_close(
        Case().plain(distance="l1").total, F.l1_loss(Case().pixels, Case().target)
    )


@pytest.mark.parametrize(("distance", "function"), [("l2", F.mse_loss), ("l1", F.l1_loss)])
def test_norm_pix_standardizes_every_target_patch_as_mae_does(distance: str, function: Any) -> None:
    target = Case().target
    scaled = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6) ** 0.5
    losses = Case().plain(norm_pix=True, distance=distance)
    torch.testing.assert_close(losses.total, function(Case().pixels, scaled))


@pytest.mark.parametrize("distance", ["l2", "l1"])
@pytest.mark.parametrize("norm_pix", [True, False])
def test_difficulty_is_the_loss_s_own_error_unless_raw_is_asked_for(
    distance: str, norm_pix: bool
) -> None:
    case = Case()
    chosen = {"norm_pix": norm_pix, "distance": distance}
    errors = patch_errors(case.pixels, case.target, LossConfig(**chosen))
    assert torch.equal(errors.difficulty, errors.loss)
    raw = patch_errors(case.pixels, case.target, LossConfig(**chosen, difficulty="raw"))
    assert torch.equal(raw.loss, errors.loss)
    assert torch.equal(raw.difficulty, errors.difficulty) is not norm_pix


@pytest.mark.parametrize("distance", ["l2", "l1"])
@pytest.mark.parametrize("norm_pix", [True, False])
def test_the_same_guess_is_as_difficult_in_the_image_s_scale_whatever_the_target(
    norm_pix: bool, distance: str
) -> None:
    target = Case().target
    mean, std = target.mean(-1, keepdim=True), (target.var(-1, keepdim=True) + 1e-6).sqrt()
    guess = 0.5 * target
    chosen = LossConfig(norm_pix=norm_pix, distance=distance, difficulty="raw")
    errors = patch_errors((guess - mean) / std if norm_pix else guess, target, chosen)
    off = (guess - target).square() if distance == "l2" else (guess - target).abs()
    torch.testing.assert_close(errors.difficulty, off.mean(-1), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("norm_pix", [True, False])
@pytest.mark.parametrize("difficulty", ["loss", "raw"])
def test_difficulty_carries_no_gradient_and_the_loss_does(norm_pix: bool, difficulty: str) -> None:
    case = Case()
    errors = patch_errors(
        case.pixels, case.target, LossConfig(norm_pix=norm_pix, difficulty=difficulty)
    )
    assert errors.loss.requires_grad
    assert not errors.difficulty.requires_grad


@pytest.mark.parametrize(
    "off",
    [
        {"weighting": "none"},
        {"weighting": "rrl", "gamma": 0.0},
        {"weighting": "rrl", "mix": 0.0},
        {"weighting": "arl", "mix": 0.0},
        {"weighting": "rrl", "clip_min": 1.0, "clip_max": 1.0},
    ],
    ids=str,
)
@pytest.mark.parametrize("norm_pix", [True, False])
def test_weighting_switched_off_in_any_way_is_the_plain_loss_to_the_bit(
    off: dict[str, Any], norm_pix: bool
) -> None:
    case = headless()
    losses, expected = case.loss(norm_pix=norm_pix, **off), case.plain(norm_pix=norm_pix)
    assert losses.total.equal(expected.total)
    assert float(losses.effective_patches) == 1
    gradient, expected_gradient = (
        torch.autograd.grad(x.total, case.pixels)[0] for x in (losses, expected)
    )
    assert torch.equal(gradient, expected_gradient)


def test_attention_of_a_large_temperature_nears_the_plain_loss() -> None:
    gaps = []
    for temperature in (0.3, 1.0, 10.0, 1e3, 1e6):
        losses = headless().loss(weighting="arl", temperature=temperature)
        gaps.append((losses.total - losses.reconstruction).item())
    assert gaps[0] > gaps[1] > gaps[2] > gaps[3] > 0
    assert abs(gaps[4]) < 1e-5


@pytest.mark.parametrize("weighting", ["rrl", "arl"])
def test_the_mix_goes_straight_from_the_plain_to_the_weighted_loss(weighting: str) -> None:
    ends = [headless().loss(weighting=weighting, mix=mix).total for mix in (0.0, 1.0)]
    torch.testing.assert_close(
        headless().loss(weighting=weighting, mix=0.3).total, 0.7 * ends[0] + 0.3 * ends[1]
    )


@given(
    st.lists(st.floats(0, 1e4), min_size=2, max_size=30),
    st.floats(0, 8),
    st.floats(0.01, 1),
    st.floats(1, 50),
    st.sampled_from(["rrl", "arl"]),
    st.floats(0.05, 100),
)
def test_weights_have_mean_1_keep_the_order_of_difficulty_and_respect_the_clip(
    errors: list[float], gamma: float, low: float, high: float, weighting: str, temperature: float
) -> None:
    e = torch.tensor([errors])
    chosen = LossConfig(
        weighting=weighting, gamma=gamma, clip_min=low, clip_max=high, temperature=temperature
    )
    weight = hard_patch_weights(e, torch.ones_like(e, dtype=torch.bool), chosen)
    assert float(weight.mean()) == pytest.approx(1, abs=1e-4)
    assert weight.min() >= 0
    ordered = weight[0, e[0].argsort()]
    assert (ordered.diff() >= -1e-5).all()
    if weighting == "rrl":
        assert weight.max() / weight.min() <= high / low * (1 + 1e-4)


def test_relative_weights_have_their_formula_and_do_not_change_with_the_scale_of_errors() -> None:
    e = torch.tensor([[1.0, 2.0, 3.0, 100.0]])
    chosen = LossConfig(gamma=0.5, clip_min=0.5, clip_max=1.5)
    clipped = [min(max(math.sqrt(v / 26.5), 0.5), 1.5) for v in (1, 2, 3, 100)]
    expected = torch.tensor([[4 * v / sum(clipped) for v in clipped]])
    tissue = torch.ones(1, 4, dtype=torch.bool)
    torch.testing.assert_close(hard_patch_weights(e, tissue, chosen), expected)
    torch.testing.assert_close(
        hard_patch_weights(0.01 * e, tissue, chosen), expected, atol=1e-3, rtol=0
    )


def test_attention_weights_have_their_formula() -> None:
    e = torch.tensor([[1.0, 2.0, 6.0]])
    powers = [math.exp(v / 3 / 0.5) for v in (1, 2, 6)]
    expected = torch.tensor([[3 * v / sum(powers) for v in powers]])
    chosen = LossConfig(weighting="arl", temperature=0.5)
    torch.testing.assert_close(
        hard_patch_weights(e, torch.ones(1, 3, dtype=torch.bool), chosen),
        expected,
        rtol=1e-4,
        atol=0,
    )


def test_a_flat_border_does_not_make_all_tissue_hard() -> None:
    e = torch.tensor([[0.0, 0, 0, 0, 1, 3]])
    tissue = torch.tensor([[False] * 4 + [True] * 2])
    torch.testing.assert_close(relative_difficulty(e, tissue)[0, 4:], torch.tensor([0.5, 1.5]))
    assert hard_labels(e, tissue, tissue, "mean").tolist() == [[False] * 5 + [True]]


def test_masked_patches_without_any_tissue_are_compared_with_each_other() -> None:
    e = torch.tensor([[1.0, 3.0]])
    torch.testing.assert_close(
        relative_difficulty(e, torch.zeros(1, 2, dtype=torch.bool)), torch.tensor([[0.5, 1.5]])
    )


@pytest.mark.parametrize("weighting", ["rrl", "arl"])
@pytest.mark.parametrize("distance", ["l2", "l1"])
def test_a_perfect_prediction_has_loss_0_and_finite_gradients(
    weighting: str, distance: str
) -> None:
    case = Case()
    case.pixels = case.target.clone().requires_grad_()
    case.difficulty = torch.zeros(B, M, requires_grad=True)
    losses = case.loss(weighting=weighting, distance=distance, ranking_weight=1.0)
    assert losses.reconstruction.item() == 0
    losses.total.backward()
    assert case.pixels.grad.isfinite().all()
    assert not case.difficulty.grad.any()


def test_effective_patches_fall_as_weights_gather_on_few() -> None:
    shares = [
        float(headless().loss(gamma=gamma, clip_max=50, clip_min=0.01).effective_patches)
        for gamma in (0, 0.5, 1, 3)
    ]
    assert shares[0] == 1
    assert all(b < a for a, b in itertools.pairwise(shares))
    assert shares[-1] > 1 / M


# A worse reconstruction must not pay


WEIGHTINGS: list[dict[str, Any]] = [
    {"weighting": "none"},
    {"weighting": "rrl"},
    {"weighting": "rrl", "gamma": 4.0, "clip_min": 0.01, "clip_max": 50.0},
    {"weighting": "arl", "temperature": 0.3},
]


def test_ccl_gives_the_prediction_no_gradient() -> None:
    case = Case()
    with_ccl = torch.autograd.grad(case.loss(ccl_weight=10.0).total, case.pixels)[0]
    without = torch.autograd.grad(case.loss(ccl_weight=0.0).total, case.pixels)[0]
    assert torch.equal(with_ccl, without)
    losses = case.loss()
    assert (
        torch.autograd.grad(losses.ccl, case.pixels, retain_graph=True, allow_unused=True)[0]
        is None
    )
    assert torch.autograd.grad(losses.ccl, case.category)[0].abs().sum() > 0


def test_ranking_gives_the_prediction_no_gradient() -> None:
    case = Case()
    case.difficulty = torch.randn(B, M, generator=torch.Generator().manual_seed(1)).requires_grad_()
    losses = case.loss(ranking_weight=1.0)
    assert (
        torch.autograd.grad(losses.ranking, case.pixels, retain_graph=True, allow_unused=True)[0]
        is None
    )
    assert torch.autograd.grad(losses.ranking, case.difficulty)[0].abs().sum() > 0


@hypothesis(max_examples=60, deadline=None)
@given(
    st.integers(0, 10**6),
    st.sampled_from(WEIGHTINGS),
    st.sampled_from(["mean", "quantile", "otsu"]),
    st.booleans(),
    st.sampled_from(["l1", "l2"]),
    st.sampled_from(["loss", "raw"]),
    st.floats(0, 1),
)
def test_what_is_trained_never_pays_for_a_worse_patch(
    seed: int,
    weighting: dict[str, Any],
    threshold: str,
    norm_pix: bool,
    distance: str,
    difficulty: str,
    eta: float,
) -> None:
    """The gradient of the total points away from every patch's target, lesion or not."""
    case = Case(seed)
    target = case.target
    if norm_pix:
        target = (target - target.mean(-1, keepdim=True)) / (
            target.var(-1, keepdim=True) + 1e-6
        ).sqrt()
    case.difficulty = torch.zeros(B, M, requires_grad=True)
    total = case.loss(
        **weighting,
        norm_pix=norm_pix,
        distance=distance,
        difficulty=difficulty,
        ccl_threshold=threshold,
        ccl_difficulty_share=eta,
        ccl_weight=10.0,
        ranking_weight=1.0,
    ).total
    (gradient,) = torch.autograd.grad(total, case.pixels)
    away = (case.pixels.detach() - target) * gradient
    assert (away.sum(-1) > 0).all()


def worse(case: Case, where: Tensor, factor: float) -> Case:
    """The same with the error of patches `where` (B, M) `factor`^2 times as large."""
    pixels = case.target + factor * (case.pixels.detach() - case.target)
    case.pixels = torch.where(where[..., None], pixels, case.pixels.detach())
    return case


@hypothesis(max_examples=50, deadline=None)
@given(st.integers(0, 10**6), st.floats(1.01, 5), st.booleans())
def test_the_unweighted_total_read_as_a_number_rises_with_the_error_of_lesion_patches(
    seed: int, factor: float, norm_pix: bool
) -> None:
    """CCL uses cluster labels alone here: difficulty labels follow the errors, and so would it."""
    chosen = {"weighting": "none", "ccl_weight": 10.0, "ccl_difficulty_share": 0.0}
    after = worse(Case(seed), Case(seed).lesion, factor).loss(**chosen)
    before = Case(seed).loss(**chosen)
    assert after.total > before.total
    assert after.ccl.equal(before.ccl)


@hypothesis(max_examples=50, deadline=None)
@given(st.integers(0, 10**6), st.floats(1.01, 5), st.sampled_from(WEIGHTINGS))
def test_weights_do_not_change_when_all_errors_of_an_image_grow_alike(
    seed: int, factor: float, weighting: dict[str, Any]
) -> None:
    one, other = headless(seed), worse(headless(seed), ALL, factor)
    totals = [case.loss(**weighting).total for case in (one, other)]
    torch.testing.assert_close(totals[1], factor**2 * totals[0], rtol=1e-3, atol=0)


@hypothesis(max_examples=100, deadline=None)
@given(
    st.lists(st.floats(0.01, 10), min_size=3, max_size=12),
    st.integers(0, 11),
    st.floats(1.001, 1.05),
)
def test_the_weighted_total_read_as_a_number_rises_with_patches_harder_than_half_the_weighted_mean(
    errors: list[float], which: int, factor: float
) -> None:
    """Weights are recomputed from the errors.

    With gamma 1 the loss is sum e^2 / sum e, which falls below that half.
    """
    e = torch.tensor([errors], dtype=torch.float64)
    chosen = LossConfig(gamma=1.0, clip_min=1e-6, clip_max=1e6)

    def weighted(e: Tensor) -> float:
        return float(
            (hard_patch_weights(e, torch.ones_like(e, dtype=torch.bool), chosen) * e).mean()
        )

    i = which % len(errors)
    assume(errors[i] >= weighted(e) / 2)
    changed = e.clone()
    changed[0, i] *= factor
    assert weighted(changed) >= weighted(e) * (1 - 1e-9)


def test_an_easy_patch_that_gets_worse_may_lower_the_number_but_is_never_pushed_there() -> None:
    """The price of weights relative to the image.

    Easy patches that get harder take weight from the hard ones.
    """
    target = torch.zeros(1, 2, 1)
    values, slopes = [], []
    for easy in (0.01, 0.3):
        pixels = torch.tensor([[[1.0], [easy]]]).requires_grad_()
        chosen = LossConfig(ccl_weight=0, clip_min=1e-3, clip_max=100)
        everywhere = torch.ones(1, 2, dtype=torch.bool)
        total = pretraining_loss(
            Prediction(pixels, None, None), target, everywhere, everywhere, chosen, warming_up=False
        ).total
        values.append(total.item())
        slopes.append(torch.autograd.grad(total, pixels)[0][0, 1, 0].item())
    assert values[1] < values[0]
    assert min(slopes) > 0


@pytest.mark.parametrize("weighting", WEIGHTINGS, ids=str)
def test_a_worse_reconstruction_of_hard_lesion_patches_raises_the_loss(
    weighting: dict[str, Any],
) -> None:
    before, after = Case(), worse(Case(), Case().lesion, 2.0)
    assert after.loss(**weighting).total > before.loss(**weighting).total


# CCL


def ccl(logits: Tensor, hard: Tensor, lesion: Tensor, share: float) -> Tensor:
    return category_consistency_loss(logits, hard, lesion, LossConfig(ccl_difficulty_share=share))


def labels(share: float, seed: int = 3) -> Tensor:
    return torch.rand(B, M, generator=torch.Generator().manual_seed(seed)) < share


def test_classes_weigh_equally_however_few_lesion_patches_there_are() -> None:
    """Logits of 0 cost log 2 whatever the balance, and the pull on both classes is as strong."""
    logits = torch.zeros(1, 100, requires_grad=True)
    lesion = torch.arange(100)[None] < 5
    value = ccl(logits, lesion.flip(1), lesion, 0.0)
    assert value.item() == pytest.approx(math.log(2), abs=1e-6)
    value.backward()
    assert logits.grad is not None
    assert float(logits.grad[lesion].sum()) == pytest.approx(
        -float(logits.grad[~lesion].sum()), abs=1e-6
    )
    assert float(logits.grad[lesion].sum()) < 0  # toward lesion


def test_always_saying_background_is_no_better_than_guessing() -> None:
    lesion = torch.arange(100)[None] < 5
    constant, guess = (ccl(torch.full((1, 100), v), lesion, lesion, 0.0) for v in (-3.0, 0.0))
    assert constant > guess


@pytest.mark.parametrize("value", [True, False])
def test_images_whose_labels_are_all_alike_contribute_nothing(value: bool) -> None:
    lesion = labels(0.2)
    lesion[0] = value
    logits = torch.randn(B, M, generator=torch.Generator().manual_seed(0)).requires_grad_()
    ccl(logits, labels(0.3, 4), lesion, 0.0).backward()
    assert logits.grad is not None
    assert not logits.grad[0].any()
    assert logits.grad[1:].abs().sum(1).gt(0).all()


def test_the_difficulty_share_mixes_the_two_labels() -> None:
    logits = torch.randn(B, M, generator=torch.Generator().manual_seed(0))
    hard, lesion = labels(0.3, 4), labels(0.2)
    by_share = [ccl(logits, hard, lesion, share) for share in (0.0, 1.0, 0.25)]
    assert by_share[0] != by_share[1]
    torch.testing.assert_close(by_share[2], 0.75 * by_share[0] + 0.25 * by_share[1])
    torch.testing.assert_close(by_share[1], ccl(logits, lesion, hard, 0.0))


def test_a_perfect_head_has_nearly_no_ccl_and_an_inverted_one_much() -> None:
    lesion = labels(0.2)
    right, wrong = (
        ccl(sign * 20 * (lesion.float() - 0.5), lesion, lesion, 0.5) for sign in (1, -1)
    )
    assert float(right) < 1e-3
    assert float(wrong) > 5


def test_quantile_marks_as_many_hardest_patches_as_the_cluster_holds() -> None:
    difficulty = torch.tensor([[5.0, 1, 4, 2, 3], [1, 2, 3, 4, 5], [1, 1, 1, 1, 1]])
    lesion = torch.tensor([[1, 1, 0, 0, 0], [0, 0, 0, 0, 0], [0, 1, 0, 1, 0]], dtype=torch.bool)
    hard = hard_labels(difficulty, lesion, torch.ones(3, 5, dtype=torch.bool), "quantile")
    assert hard[0].tolist() == [True, False, True, False, False]
    assert hard[1].tolist() == [False, False, False, True, True], (
        "without a cluster: harder than the mean"
    )
    assert int(hard[2].sum()) == 2


def test_mean_marks_patches_harder_than_their_image() -> None:
    difficulty = torch.tensor([[1.0, 2, 3, 10]])
    tissue = torch.ones(1, 4, dtype=torch.bool)
    assert hard_labels(difficulty, tissue, tissue, "mean").tolist() == [[False, False, False, True]]


@hypothesis(max_examples=100, deadline=None)
@given(st.lists(st.floats(0, 100), min_size=2, max_size=30))
def test_otsu_marks_what_lies_above_the_split_of_most_variance_between_classes(
    errors: list[float],
) -> None:
    """Brute force over all splits: least variance within both classes is most between them."""
    e = torch.tensor([errors], dtype=torch.float64)
    tissue = torch.ones_like(e, dtype=torch.bool)
    hard = hard_labels(e, tissue, tissue, "otsu")[0]
    ordered = sorted(errors)

    def within(part: list[float]) -> float:
        mean = sum(part) / len(part)
        return sum((x - mean) ** 2 for x in part)

    best = min(within(ordered[:k]) + within(ordered[k:]) for k in range(1, len(ordered)))
    assert 0 < int(hard.sum()) < len(errors)
    assert e[0, hard].min() >= e[0, ~hard].max()
    actual = within(e[0, hard].tolist()) + within(e[0, ~hard].tolist())
    assert actual == pytest.approx(best, rel=1e-6, abs=1e-6)


def test_otsu_of_a_single_masked_patch_is_finite() -> None:
    one = torch.ones(2, 1)
    assert hard_labels(one, one.bool(), one.bool(), "otsu").shape == (2, 1)


@pytest.mark.parametrize("shares", [(0.2, 0.3), (0.5, 0.5), (0.05, 0.9)])
def test_agreement_is_cohen_s_kappa(shares: tuple[float, float]) -> None:
    one, other = labels(shares[0]), labels(shares[1], 4)
    mixed = torch.where(labels(0.5, 5), one, other)
    for a, b in ((one, other), (one, mixed), (one, ~one), (one, one)):
        assert float(cohens_kappa(a, b)) == pytest.approx(
            cohen_kappa_score(a.flatten(), b.flatten()), abs=1e-5
        )


def test_agreement_of_labels_all_alike_is_0() -> None:
    assert float(cohens_kappa(ALL, ALL)) == 0


def test_the_loss_reports_the_agreement_of_lesion_and_difficulty() -> None:
    case = Case()
    errors = patch_errors(case.pixels, case.target, LossConfig())
    hard = hard_labels(errors.difficulty, case.lesion, case.tissue, "quantile")
    expected = cohen_kappa_score(hard.flatten(), case.lesion.flatten())
    assert float(case.loss().agreement) == pytest.approx(expected, abs=1e-5)
    assert expected > 0.5  # lesion patches are hard here


# Ranking


def test_ranking_loss_is_that_of_a_plain_double_loop_over_pairs() -> None:
    generator = torch.Generator().manual_seed(0)
    d = torch.randn(3, 7, generator=generator, dtype=torch.float64)
    e = torch.randint(4, (3, 7), generator=generator).double()  # with ties
    total, pairs = 0.0, 0
    for b in range(3):
        for i, j in itertools.product(range(7), range(7)):
            if e[b, i] == e[b, j]:
                continue
            sure = 1 / (1 + math.exp(-(d[b, i] - d[b, j])))
            total -= math.log(sure + 1e-6) if e[b, i] > e[b, j] else math.log(1 - sure + 1e-6)
            pairs += 1
    assert float(ranking_loss(d, e)) == pytest.approx(total / pairs, rel=1e-9)


def test_a_right_order_ranks_better_than_none_and_none_than_a_wrong_one() -> None:
    e = torch.rand(B, M, generator=torch.Generator().manual_seed(0))
    right, none, wrong = (float(ranking_loss(scale * e, e)) for scale in (50, 0, -50))
    assert right < 0.2 < none == pytest.approx(math.log(2), abs=1e-4)
    assert wrong > 5


def test_ranking_pulls_the_harder_patch_up_and_leaves_equal_ones_alone() -> None:
    d = torch.zeros(1, 3, requires_grad=True)
    ranking_loss(d, torch.tensor([[1.0, 2.0, 2.0]])).backward()
    assert d.grad is not None
    assert d.grad[0, 0] > 0 > d.grad[0, 1]
    assert d.grad[0, 1] == d.grad[0, 2]
    same = torch.randn(1, 3).requires_grad_()
    assert ranking_loss(same, torch.ones(1, 3)).item() == 0


def test_the_total_adds_ranking_by_its_weight_from_the_first_epoch_on() -> None:
    case = headless()
    case.difficulty = torch.randn(B, M, generator=torch.Generator().manual_seed(1))
    for warming_up in (True, False):
        losses = case.loss(weighting="none", ranking_weight=0.7, warming_up=warming_up)
        torch.testing.assert_close(losses.total, losses.reconstruction + 0.7 * losses.ranking)
        errors = patch_errors(case.pixels, case.target, LossConfig())
        assert losses.ranking.equal(ranking_loss(case.difficulty, errors.difficulty))


# The total


@pytest.mark.parametrize("weighting", ["none", "rrl", "arl"])
def test_warming_up_is_the_plain_loss_to_the_bit_while_the_head_still_gets_a_zero_gradient(
    weighting: str,
) -> None:
    case = Case()
    losses = case.loss(weighting=weighting, ccl_weight=0.5, warming_up=True)
    assert losses.total.equal(case.plain().total)
    assert float(losses.effective_patches) == 1
    assert losses.ccl.item() > 0  # shown, not trained
    losses.total.backward()
    assert case.category is not None
    assert case.category.grad is not None
    assert not case.category.grad.any()


def test_the_total_adds_ccl_by_its_weight() -> None:
    losses = Case().loss(weighting="none", ccl_weight=0.7)
    torch.testing.assert_close(losses.total, losses.reconstruction + 0.7 * losses.ccl)


def test_low_precision_predictions_are_scored_in_float32() -> None:
    case = Case()
    case.pixels, case.category = (
        case.pixels.detach().bfloat16(),
        case.category.detach().bfloat16(),
    )
    case.difficulty = torch.randn(B, M).bfloat16()
    losses = case.loss(ranking_weight=1.0)
    assert {value.dtype for value in losses} == {torch.float32}
    torch.testing.assert_close(losses.reconstruction, F.mse_loss(case.pixels.float(), case.target))


@hypothesis(max_examples=40, deadline=None)
@given(
    st.sampled_from([0.0, 1e-12, 1e-3, 1.0, 1e6]),
    st.sampled_from([0.0, 1e-12, 1.0, 1e6]),
    st.sampled_from(WEIGHTINGS),
    st.sampled_from(["mean", "quantile", "otsu"]),
    st.booleans(),
    st.sampled_from([0.0, 0.5, 1.0]),
)
def test_losses_and_gradients_are_finite_for_any_size_of_targets_and_errors(
    size: float,
    error: float,
    weighting: dict[str, Any],
    threshold: str,
    norm_pix: bool,
    lesions: float,
) -> None:
    case = Case()
    case.target = size * case.target
    case.pixels = (case.target + error * case.pixels.detach()).requires_grad_()
    case.lesion, case.tissue = labels(lesions), labels(1 - lesions)
    case.difficulty = (error * torch.randn(B, M)).requires_grad_()
    losses = case.loss(**weighting, ccl_threshold=threshold, norm_pix=norm_pix, ranking_weight=1.0)
    assert all(value.isfinite() for value in losses)
    losses.total.backward()
    assert all(x.grad.isfinite().all() for x in (case.pixels, case.category, case.difficulty))
