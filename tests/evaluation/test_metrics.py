from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis.extra.numpy import arrays

from amlp_ray.evaluation.metrics import (
    best_threshold,
    dsc_by_size,
    hausdorff95,
    score_images,
    size_classes,
    summarize_scores,
)

masks = arrays(bool, (4, 5, 6))


def one(predicted: list[int], truth: list[int]) -> tuple[float, float, float, float]:
    s = score_images(np.array([[predicted]], bool), np.array([[truth]], bool))
    return s.dsc[0], s.ppv[0], s.sensitivity[0], s.empty_correct[0]


def test_scores_have_their_formulas() -> None:
    dsc, ppv, sensitivity, empty = one(
        [1, 1, 1, 0, 0, 0], [0, 1, 1, 1, 1, 0]
    )  # 2 hits, 1 false alarm, 2 missed
    assert (dsc, ppv, sensitivity) == (4 / 7, 2 / 3, 1 / 2)
    assert np.isnan(empty)


def test_a_lesion_without_any_prediction_scores_0_and_a_perfect_one_1() -> None:
    assert one([0, 0], [1, 0])[:3] == (0, 0, 0)
    assert one([1, 0], [1, 0])[:3] == (1, 1, 1)


@pytest.mark.parametrize(("predicted", "correct"), [([0, 0], 1.0), ([0, 1], 0.0)])
def test_an_image_without_a_lesion_counts_only_whether_nothing_is_predicted(
    predicted: list[int], correct: float
) -> None:
    dsc, ppv, sensitivity, empty = one(predicted, [0, 0])
    assert np.isnan([dsc, ppv, sensitivity]).all()
    assert empty == correct


@given(masks, masks)
def test_scores_equal_a_count_pixel_by_pixel(predicted: np.ndarray, truth: np.ndarray) -> None:
    scores = score_images(predicted, truth)
    for i in range(4):
        pairs = list(zip(predicted[i].flat, truth[i].flat, strict=True))
        tp, fp, fn = (
            pairs.count((True, True)),
            pairs.count((True, False)),
            pairs.count((False, True)),
        )
        if tp + fn == 0:
            assert np.isnan(
                [scores.dsc[i], scores.ppv[i], scores.sensitivity[i], scores.iou[i]]
            ).all()
            assert scores.empty_correct[i] == (fp == 0)
            continue
        assert scores.dsc[i] == pytest.approx(2 * tp / (2 * tp + fp + fn))
        assert scores.ppv[i] == pytest.approx(tp / (tp + fp) if tp + fp else 0)
        assert scores.sensitivity[i] == pytest.approx(tp / (tp + fn))
        assert scores.iou[i] == pytest.approx(tp / (tp + fp + fn))


def test_scores_equal_those_of_monai() -> None:
    import torch
    from monai.metrics import ConfusionMatrixMetric, compute_dice, compute_iou

    rng = np.random.default_rng(0)
    predicted, truth = rng.random((2, 20, 16, 16)) < np.array([0.3, 0.2])[:, None, None, None]
    scores = score_images(predicted, truth)
    p, t = (torch.from_numpy(x)[:, None].float() for x in (predicted, truth))
    np.testing.assert_allclose(scores.dsc, compute_dice(p, t)[:, 0].numpy(), rtol=1e-6)
    np.testing.assert_allclose(scores.iou, compute_iou(p, t)[:, 0].numpy(), rtol=1e-6)
    for name, value in (("precision", scores.ppv), ("sensitivity", scores.sensitivity)):
        metric = ConfusionMatrixMetric(metric_name=name, compute_sample=True, reduction="none")
        metric(p, t)
        np.testing.assert_allclose(value, metric.aggregate()[0][:, 0].numpy(), rtol=1e-6)


def outline(mask: np.ndarray) -> np.ndarray:
    """Pixels (n, 2) of a mask (H, W) beside one that is none, the image's border included."""
    padded = np.pad(mask, 1)
    inside = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    return np.argwhere(mask & ~inside)


def by_hand(predicted: np.ndarray, truth: np.ndarray, spacing: tuple[float, float]) -> float:
    one, other = (outline(mask) * spacing for mask in (predicted, truth))
    distances = np.linalg.norm(one[:, None] - other[None], axis=2)
    return max(float(np.percentile(distances.min(axis), 95)) for axis in (0, 1))


@pytest.mark.parametrize("share", [0.02, 0.1, 0.5, 0.9])
def test_hd95_is_the_larger_percentile_of_the_distances_between_outlines(share: float) -> None:
    predicted, truth = np.random.default_rng(0).random((2, 4, 5, 6)) < share
    predicted[0], truth[1] = True, True
    spacing = np.array([[1.0, 1.0], [0.5, 2.0], [3.0, 1.0], [1.0, 1.5]])
    for pixel_spacing, each in ((None, np.ones((4, 2))), (spacing, spacing)):
        distances = hausdorff95(predicted, truth, pixel_spacing)
        for i in range(4):
            if not truth[i].any():
                assert np.isnan(distances[i])
            elif not predicted[i].any():
                assert distances[i] == pytest.approx(np.hypot(5 * each[i, 0], 6 * each[i, 1])), (
                    "the diagonal"
                )
            else:
                assert distances[i] == pytest.approx(
                    by_hand(predicted[i], truth[i], tuple(each[i])), rel=1e-5
                )


def test_predicting_nothing_is_never_nearer_than_predicting_anything() -> None:
    truth = np.zeros((2, 16, 16), bool)
    truth[:, :1, :1] = True
    predicted = np.zeros_like(truth)
    predicted[0, -1, -1] = True  # as far off as can be
    far, none = hausdorff95(predicted, truth)
    assert far < none


def test_means_over_groups_count_a_patient_once_and_leave_out_images_without_a_lesion() -> None:
    nan = float("nan")
    rows = [("a", "x", 0.2), ("b", "x", 0.4), ("c", "y", 0.9), ("d", "y", nan), ("e", "z", nan)]
    table = pd.DataFrame(rows, columns=["id", "group", "dsc"])
    table = table.assign(
        ppv=table["dsc"], sensitivity=table["dsc"], iou=table["dsc"] / 2, hd95=table["dsc"] * 10,
        empty_correct=[nan, nan, nan, 1.0, 0.0], share=[0.01, 0.05, 0.2, 0, 0],
        missed=[True, False, False, False, False],
    )  # fmt: skip
    summary = summarize_scores(table, (0.02, 0.1))
    assert summary["dsc"] == pytest.approx(0.5)
    assert summary["dsc_per_group"] == pytest.approx((0.3 + 0.9) / 2)
    assert summary["hd95_per_group"] == pytest.approx(6)
    assert summary["per_group"] == pytest.approx({"x": 0.3, "y": 0.9})
    assert summary["per_image"] == {"a": 0.2, "b": 0.4, "c": 0.9}
    assert (summary["images"], summary["groups"], summary["missed"], summary["empty_correct"]) == (
        3,
        2,
        1,
        0.5,
    )
    assert (summary["dsc_small"], summary["dsc_medium"], summary["dsc_large"]) == (0.2, 0.4, 0.9)
    assert summary["images_without_lesion"] == 2
    nothing_empty = summarize_scores(table[:3], (0.02, 0.1))
    assert nothing_empty["empty_correct"] is None
    assert nothing_empty["empty_correct_per_group"] is None
    assert nothing_empty["images_without_lesion"] == 0


def test_a_patient_with_many_images_without_a_lesion_counts_once() -> None:
    nan = float("nan")
    rows = [("a", "x", 0.2, nan), *((name, "y", nan, 1.0) for name in "bcd"), ("e", "z", nan, 0.0)]
    table = pd.DataFrame(rows, columns=["id", "group", "dsc", "empty_correct"])
    scores = dict.fromkeys(("ppv", "sensitivity", "iou", "hd95"), table["dsc"])
    table = table.assign(**scores, share=0.01, missed=False)
    summary = summarize_scores(table, (0.02, 0.1))
    assert summary["empty_correct"] == pytest.approx(0.75)
    assert summary["empty_correct_per_group"] == pytest.approx(0.5)


def test_best_threshold_is_the_optimum_over_the_candidates() -> None:
    rng = np.random.default_rng(1)
    truth = rng.random((6, 12, 12)) < 0.2
    truth[0] = False  # does not count
    probability = np.clip(0.4 * truth + 0.6 * rng.random(truth.shape), 0, 1)
    candidates = np.linspace(0.05, 0.95, 19)
    threshold, dsc = best_threshold(probability, truth, candidates)
    by_hand = [np.nanmean(score_images(probability > t, truth).dsc) for t in candidates]
    assert dsc == max(by_hand)
    assert threshold == candidates[int(np.argmax(by_hand))]
    assert 0.3 < threshold < 0.7


def test_best_threshold_of_a_constant_probability_takes_everything_rather_than_nothing() -> None:
    truth = np.zeros((2, 4, 4), bool)
    truth[:, :2] = True
    threshold, dsc = best_threshold(np.full((2, 4, 4), 0.5), truth, np.array([0.3, 0.6]))
    assert threshold == 0.3
    assert dsc == pytest.approx(2 / 3)


def test_sizes_include_their_limits_in_the_middle_and_leave_out_images_without_a_lesion() -> None:
    share = np.array([0.0, 0.019, 0.02, 0.1, 0.11])
    images_by_size = {
        name: np.flatnonzero(chosen).tolist()
        for name, chosen in size_classes(share, (0.02, 0.1)).items()
    }
    assert images_by_size == {"small": [1], "medium": [2, 3], "large": [4]}


def test_scores_by_size_are_means_and_none_where_there_is_no_image() -> None:
    dsc, share = np.array([np.nan, 0.2, 0.4, 0.9]), np.array([0.0, 0.01, 0.015, 0.5])
    scores = dsc_by_size(dsc, share, (0.02, 0.1))
    assert scores == {"dsc_small": pytest.approx(0.3), "dsc_medium": None, "dsc_large": 0.9}
    assert dsc_by_size(np.array([np.nan]), np.array([0.01]), (0.02, 0.1))["dsc_small"] is None
