from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from amlp_ray.config import LossSettings
from amlp_ray.method.losses import (
    Losses,
    category_consistency_loss,
    hard_labels,
    hard_patch_weights,
    patch_errors,
    pretraining_loss,
    relative_difficulty,
)

B, M, P = 5, 40, 16
ALL = torch.ones(B, M, dtype=torch.bool)


def case(seed: int = 0) -> dict[str, Tensor]:
    """Arguments of `pretraining_loss`; lesion patches are a fifth, and hard."""
    generator = torch.Generator().manual_seed(seed)
    lesion = torch.rand(B, M, generator=generator) < 0.2
    target = torch.randn(B, M, P, generator=generator) * (1 + lesion[..., None])
    return {
        "prediction": 0.3 * torch.randn(B, M, P, generator=generator),
        "target": target,
        "category_logits": torch.randn(B, M, generator=generator),
        "lesion": lesion,
        "tissue": lesion | (torch.rand(B, M, generator=generator) < 0.8),
    }


def loss(given: dict[str, Tensor], *, warming_up: bool = False, **settings: Any) -> Losses:
    return pretraining_loss(**given, settings=LossSettings(**settings), warming_up=warming_up)


OFF = {"weighting": "none", "ccl_weight": 0.0}


def plain(given: dict[str, Tensor], **settings: Any) -> Losses:
    return loss(given | {"category_logits": None}, **OFF, **settings)  # type: ignore[dict-item]


def test_the_plain_loss_is_the_mean_squared_error_of_mae() -> None:
    given = case()
    expected = F.mse_loss(given["prediction"], given["target"])
    found = plain(given)
    torch.testing.assert_close(found.total, expected)
    assert found.total.equal(found.reconstruction)
    assert (float(found.ccl), float(found.effective_patches)) == (0, 1)


def test_norm_pix_standardises_every_target_patch_as_mae_does() -> None:
    given = case()
    target = given["target"]
    scaled = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6) ** 0.5
    torch.testing.assert_close(plain(given, norm_pix=True).total, F.mse_loss(given["prediction"], scaled))


def test_difficulty_under_norm_pix_is_the_error_on_the_raw_scale() -> None:
    given = case()
    prediction, target = given["prediction"], given["target"]
    mean, std = target.mean(-1, keepdim=True), (target.var(-1, keepdim=True) + 1e-6).sqrt()
    direct = (prediction * std + mean - target).square().mean(-1)
    errors = patch_errors(prediction, target, norm_pix=True)
    torch.testing.assert_close(errors.difficulty, direct, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(errors.difficulty, errors.loss)


@pytest.mark.parametrize("norm_pix", [True, False])
def test_the_same_guess_is_as_difficult_with_standardised_targets_as_with_raw_ones(norm_pix: bool) -> None:
    target = case()["target"]
    mean, std = target.mean(-1, keepdim=True), (target.var(-1, keepdim=True) + 1e-6).sqrt()
    guess = 0.5 * target
    errors = patch_errors((guess - mean) / std if norm_pix else guess, target, norm_pix=norm_pix)
    torch.testing.assert_close(errors.difficulty, (guess - target).square().mean(-1), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("norm_pix", [True, False])
def test_difficulty_carries_no_gradient_and_the_loss_does(norm_pix: bool) -> None:
    given = case()
    errors = patch_errors(given["prediction"].requires_grad_(), given["target"], norm_pix=norm_pix)
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
def test_weighting_switched_off_in_any_way_is_the_plain_loss_to_the_bit(off: dict[str, Any], norm_pix: bool) -> None:
    given = case() | {"category_logits": None}  # type: ignore[dict-item]
    given["prediction"].requires_grad_()
    found, expected = loss(given, norm_pix=norm_pix, **off), plain(given, norm_pix=norm_pix)
    assert found.total.equal(expected.total)
    assert float(found.effective_patches) == 1
    ours, theirs = (torch.autograd.grad(x.total, given["prediction"])[0] for x in (found, expected))
    assert torch.equal(ours, theirs)


def test_attention_of_a_large_temperature_nears_the_plain_loss() -> None:
    given = case() | {"category_logits": None}  # type: ignore[dict-item]
    gaps = []
    for temperature in (0.3, 1.0, 10.0, 1e3, 1e6):
        found = loss(given, weighting="arl", temperature=temperature)
        gaps.append(float(found.total - found.reconstruction))
    assert gaps[0] > gaps[1] > gaps[2] > gaps[3] > 0
    assert abs(gaps[4]) < 1e-5


@pytest.mark.parametrize("weighting", ["rrl", "arl"])
def test_the_mix_goes_straight_from_the_plain_to_the_weighted_loss(weighting: str) -> None:
    given = case() | {"category_logits": None}  # type: ignore[dict-item]
    ends = [loss(given, weighting=weighting, mix=mix).total for mix in (0.0, 1.0)]
    torch.testing.assert_close(loss(given, weighting=weighting, mix=0.3).total, 0.7 * ends[0] + 0.3 * ends[1])


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
    chosen = LossSettings(weighting=weighting, gamma=gamma, clip_min=low, clip_max=high, temperature=temperature)
    weight = hard_patch_weights(e, torch.ones_like(e, dtype=torch.bool), chosen)
    assert float(weight.mean()) == pytest.approx(1, abs=1e-4)
    assert weight.min() >= 0
    ordered = weight[0, e[0].argsort()]
    assert (ordered.diff() >= -1e-5).all()
    if weighting == "rrl":
        assert weight.max() / weight.min() <= high / low * (1 + 1e-4)


def test_relative_weights_have_their_formula_and_do_not_change_with_the_scale_of_errors() -> None:
    e = torch.tensor([[1.0, 2.0, 3.0, 100.0]])
    chosen = LossSettings(gamma=0.5, clip_min=0.5, clip_max=1.5)
    clipped = [min(max(math.sqrt(v / 26.5), 0.5), 1.5) for v in (1, 2, 3, 100)]
    expected = torch.tensor([[4 * v / sum(clipped) for v in clipped]])
    tissue = torch.ones(1, 4, dtype=torch.bool)
    torch.testing.assert_close(hard_patch_weights(e, tissue, chosen), expected)
    torch.testing.assert_close(hard_patch_weights(0.01 * e, tissue, chosen), expected, atol=1e-3, rtol=0)


def test_attention_weights_have_their_formula() -> None:
    e = torch.tensor([[1.0, 2.0, 6.0]])
    powers = [math.exp(v / 3 / 0.5) for v in (1, 2, 6)]
    expected = torch.tensor([[3 * v / sum(powers) for v in powers]])
    chosen = LossSettings(weighting="arl", temperature=0.5)
    torch.testing.assert_close(
        hard_patch_weights(e, torch.ones(1, 3, dtype=torch.bool), chosen), expected, rtol=1e-4, atol=0
    )


def test_a_flat_border_does_not_make_all_tissue_hard() -> None:
    e = torch.tensor([[0.0, 0, 0, 0, 1, 3]])
    tissue = torch.tensor([[False] * 4 + [True] * 2])
    torch.testing.assert_close(relative_difficulty(e, tissue)[0, 4:], torch.tensor([0.5, 1.5]))
    assert hard_labels(e, tissue, tissue, "mean").tolist() == [[False] * 5 + [True]]


def test_masked_patches_without_any_tissue_are_compared_with_each_other() -> None:
    e = torch.tensor([[1.0, 3.0]])
    torch.testing.assert_close(relative_difficulty(e, torch.zeros(1, 2, dtype=torch.bool)), torch.tensor([[0.5, 1.5]]))


@pytest.mark.parametrize("weighting", ["rrl", "arl"])
def test_a_perfect_prediction_has_loss_0_and_finite_gradients(weighting: str) -> None:
    given = case()
    given["prediction"] = given["target"].clone().requires_grad_()
    given["category_logits"].requires_grad_()
    found = loss(given, weighting=weighting)
    assert found.reconstruction.item() == 0
    found.total.backward()
    assert given["prediction"].grad is not None
    assert given["prediction"].grad.isfinite().all()


def test_effective_patches_fall_as_weights_gather_on_few() -> None:
    given = case() | {"category_logits": None}  # type: ignore[dict-item]
    shares = [float(loss(given, gamma=gamma, clip_max=50, clip_min=0.01).effective_patches) for gamma in (0, 0.5, 1, 3)]
    assert shares[0] == 1
    assert all(b < a for a, b in itertools.pairwise(shares))
    assert shares[-1] > 1 / M


# CCL


def test_ccl_gives_the_prediction_no_gradient() -> None:
    given = case()
    given["prediction"].requires_grad_()
    with_ccl = torch.autograd.grad(loss(given, ccl_weight=10.0).total, given["prediction"])[0]
    without = torch.autograd.grad(loss(given, ccl_weight=0.0).total, given["prediction"])[0]
    assert torch.equal(with_ccl, without)
    difficulty = torch.rand(B, M, requires_grad=True)
    logits = given["category_logits"].requires_grad_()
    category_consistency_loss(logits, difficulty, given["lesion"], ALL, LossSettings()).backward()
    assert difficulty.grad is None
    assert logits.grad is not None
    assert logits.grad.abs().sum() > 0


@pytest.mark.parametrize("threshold", ["mean", "quantile"])
@pytest.mark.parametrize("weighting", ["none", "rrl", "arl"])
@pytest.mark.parametrize("norm_pix", [True, False])
def test_making_any_patch_worse_never_pays(threshold: str, weighting: str, norm_pix: bool) -> None:
    """Along the way from its target to its prediction, the total loss of each patch rises."""
    given = case()
    target = given["target"]
    if norm_pix:
        target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6).sqrt()
    given["prediction"].requires_grad_()
    chosen = {"ccl_threshold": threshold, "weighting": weighting, "norm_pix": norm_pix, "ccl_weight": 10.0}
    (gradient,) = torch.autograd.grad(loss(given, **chosen).total, given["prediction"])
    away = (given["prediction"].detach() - target) * gradient
    assert (away.sum(-1) > 0).all()


@pytest.mark.parametrize("weighting", ["none", "rrl"])
def test_a_worse_reconstruction_of_lesion_patches_raises_the_loss(weighting: str) -> None:
    given = case()
    before = loss(given, weighting=weighting, ccl_weight=0.1)
    worse = given["target"] + 2 * (given["prediction"] - given["target"])
    given["prediction"] = torch.where(given["lesion"][..., None], worse, given["prediction"])
    after = loss(given, weighting=weighting, ccl_weight=0.1)
    assert after.total > before.total


def test_classes_weigh_equally_however_few_lesion_patches_there_are() -> None:
    """Logits of 0 cost log 2 whatever the balance, and the pull on both classes is as strong."""
    logits = torch.zeros(1, 100, requires_grad=True)
    lesion = torch.arange(100)[None] < 5
    chosen = LossSettings(ccl_difficulty_share=0.0)
    value = category_consistency_loss(logits, torch.rand(1, 100), lesion, torch.ones(1, 100, dtype=torch.bool), chosen)
    assert value.item() == pytest.approx(math.log(2), abs=1e-6)
    value.backward()
    assert logits.grad is not None
    assert float(logits.grad[lesion].sum()) == pytest.approx(-float(logits.grad[~lesion].sum()), abs=1e-6)
    assert float(logits.grad[lesion].sum()) < 0  # towards lesion


def test_always_saying_background_is_no_better_than_guessing() -> None:
    lesion = torch.arange(100)[None] < 5
    chosen = LossSettings(ccl_difficulty_share=0.0)
    tissue = torch.ones(1, 100, dtype=torch.bool)
    constant, guess = (
        category_consistency_loss(torch.full((1, 100), v), torch.rand(1, 100), lesion, tissue, chosen)
        for v in (-3.0, 0.0)
    )
    assert constant > guess


@pytest.mark.parametrize("value", [True, False])
def test_images_whose_labels_are_all_alike_contribute_nothing(value: bool) -> None:
    given = case()
    lesion = given["lesion"].clone()
    lesion[0] = value
    logits = given["category_logits"].requires_grad_()
    difficulty = torch.rand(B, M, generator=torch.Generator().manual_seed(0))
    chosen = LossSettings(ccl_difficulty_share=0.0)
    category_consistency_loss(logits, difficulty, lesion, ALL, chosen).backward()
    assert logits.grad is not None
    assert not logits.grad[0].any()
    assert logits.grad[1:].abs().sum(1).gt(0).all()


def test_the_difficulty_share_mixes_the_two_labels() -> None:
    given = case()
    difficulty = torch.rand(B, M, generator=torch.Generator().manual_seed(0))
    by_share = [
        category_consistency_loss(
            given["category_logits"], difficulty, given["lesion"], ALL, LossSettings(ccl_difficulty_share=share)
        )
        for share in (0.0, 1.0, 0.25)
    ]
    assert by_share[0] != by_share[1]
    torch.testing.assert_close(by_share[2], 0.75 * by_share[0] + 0.25 * by_share[1])


def test_a_perfect_head_has_nearly_no_ccl_and_an_inverted_one_much() -> None:
    lesion = case()["lesion"]
    difficulty = lesion.float() + 0.1
    for threshold in ("mean", "quantile"):
        chosen = LossSettings(ccl_threshold=threshold)
        right, wrong = (
            category_consistency_loss(sign * 20 * (lesion.float() - 0.5), difficulty, lesion, ALL, chosen)
            for sign in (1, -1)
        )
        assert float(right) < 1e-3
        assert float(wrong) > 5


def test_quantile_marks_as_many_hardest_patches_as_the_cluster_holds() -> None:
    difficulty = torch.tensor([[5.0, 1, 4, 2, 3], [1, 2, 3, 4, 5], [1, 1, 1, 1, 1]])
    lesion = torch.tensor([[1, 1, 0, 0, 0], [0, 0, 0, 0, 0], [0, 1, 0, 1, 0]], dtype=torch.bool)
    hard = hard_labels(difficulty, lesion, torch.ones(3, 5, dtype=torch.bool), "quantile")
    assert hard[0].tolist() == [True, False, True, False, False]
    assert hard[1].tolist() == [False, False, False, True, True], "without a cluster: harder than the mean"
    assert int(hard[2].sum()) == 2


def test_mean_marks_patches_harder_than_their_image() -> None:
    difficulty = torch.tensor([[1.0, 2, 3, 10]])
    tissue = torch.ones(1, 4, dtype=torch.bool)
    assert hard_labels(difficulty, tissue, tissue, "mean").tolist() == [[False, False, False, True]]


@pytest.mark.parametrize("weighting", ["none", "rrl", "arl"])
def test_warming_up_is_the_plain_loss_to_the_bit_while_the_head_still_gets_a_zero_gradient(weighting: str) -> None:
    given = case()
    logits = given["category_logits"].requires_grad_()
    found = loss(given, weighting=weighting, ccl_weight=0.5, warming_up=True)
    assert found.total.equal(plain(given).total)
    assert float(found.effective_patches) == 1
    assert found.ccl.item() > 0  # shown, not trained
    found.total.backward()
    assert logits.grad is not None
    assert not logits.grad.any()


def test_the_total_adds_ccl_by_its_weight() -> None:
    given = case()
    found = loss(given, weighting="none", ccl_weight=0.7)
    torch.testing.assert_close(found.total, found.reconstruction + 0.7 * found.ccl)


def test_low_precision_predictions_are_scored_in_float32() -> None:
    given = case()
    given["prediction"], given["category_logits"] = given["prediction"].bfloat16(), given["category_logits"].bfloat16()
    found = loss(given)
    assert found.total.dtype == torch.float32
    expected = F.mse_loss(given["prediction"].float(), given["target"])
    torch.testing.assert_close(found.reconstruction, expected)
