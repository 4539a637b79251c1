from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from amlp_ray.study.confirmation import statistics
from amlp_ray.study.confirmation.statistics import (
    compare,
    correlate_candidates,
    effect_words,
    holm,
    rank_correlation,
    seed_noise,
)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer resamples, for many simulations."""
    monkeypatch.setattr(statistics, "RESAMPLES", 600)


def scores(
    rng: np.random.Generator,
    seeds: int,
    images: int,
    *,
    true: float,
    of_seeds: float,
    of_images: float,
    rest: float,
) -> tuple[np.ndarray, np.ndarray]:
    """Draw scores (S, I) of two candidates whose means differ by `true`.

    The other numbers are SDs of their paired differences by source.
    """
    difficulty = rng.uniform(0.2, 0.8, (1, images))
    noise = rng.normal(0, of_seeds, (seeds, 1)) + rng.normal(0, of_images, (1, images))
    return difficulty + true + noise + rng.normal(0, rest, (seeds, images)), difficulty.repeat(
        seeds, 0
    )


def rates(count: int, true: float, seeds: int = 3, **sd: float) -> tuple[float, float]:
    """Simulate: how often the interval covers the truth, and how often a difference is shown."""
    rng = np.random.default_rng(4)
    comparisons = [compare(*scores(rng, seeds, 60, true=true, **sd), seed=i) for i in range(count)]
    covers = [
        d.interval is not None and d.interval[0] <= true <= d.interval[1] for d in comparisons
    ]
    return float(np.mean(covers)), float(
        np.mean([d.p is not None and d.p < 0.05 for d in comparisons])
    )


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    "sd",
    [
        {"of_seeds": 0.0, "of_images": 0.15, "rest": 0.05},
        {"of_seeds": 0.015, "of_images": 0.1, "rest": 0.1},
        {"of_seeds": 0.03, "of_images": 0.05, "rest": 0.02},
    ],
    ids=["images", "both", "seeds"],
)
def test_without_a_true_difference_none_is_shown_in_about_95_percent(sd: dict[str, float]) -> None:
    covered, significant = rates(250, 0.0, **sd)
    assert covered > 0.90
    assert significant < 0.10


@pytest.mark.usefixtures("quick")
def test_images_alone_would_show_differences_that_are_only_those_of_seeds() -> None:
    rng = np.random.default_rng(0)
    sd = {"of_seeds": 0.03, "of_images": 0.05, "rest": 0.02}
    comparisons = [compare(*scores(rng, 3, 60, true=0.0, **sd), seed=i) for i in range(100)]
    assert np.mean([d.p_groups < 0.05 for d in comparisons if d.p_groups is not None]) > 0.3
    assert np.mean([d.p < 0.05 for d in comparisons if d.p is not None]) < 0.15


@pytest.mark.usefixtures("quick")
def test_a_true_difference_of_005_is_found() -> None:
    covered, significant = rates(100, 0.05, of_seeds=0.005, of_images=0.06, rest=0.05)
    assert covered > 0.88
    assert significant > 0.95


def test_without_seed_noise_an_interval_equals_that_of_a_t_test_over_images() -> None:
    rng = np.random.default_rng(1)
    candidate, baseline = scores(rng, 1, 200, true=0.02, of_seeds=0.0, of_images=0.1, rest=0.0)
    d = compare(candidate, baseline)
    by_t = stats.ttest_1samp((candidate - baseline)[0], 0).confidence_interval()
    assert d.interval == pytest.approx(tuple(by_t), abs=0.002)
    assert d.p_groups == stats.wilcoxon((candidate - baseline)[0]).pvalue
    assert d.effect == pytest.approx(
        (candidate - baseline).mean() / (candidate - baseline).std(ddof=1)
    )
    assert (d.seeds, d.groups) == (1, 200)


def test_seeds_that_disagree_widen_the_interval_and_images_that_agree_do_not_narrow_it() -> None:
    by_seed = np.array([[0.00], [0.04], [0.08]])
    candidate, baseline = by_seed + np.zeros((3, 400)), np.zeros((3, 400))
    d = compare(candidate + np.random.default_rng(0).normal(0, 1e-6, candidate.shape), baseline)
    low, high = stats.ttest_1samp(by_seed[:, 0], 0).confidence_interval()
    assert d.mean == pytest.approx(0.04, abs=1e-6)
    assert d.interval is not None
    assert d.interval == pytest.approx((low, high), abs=0.012)
    assert d.p_groups is not None
    assert d.p_groups < 1e-10
    assert d.p is not None
    assert d.p > 0.05


def test_a_comparison_repeats_exactly_and_turns_with_its_sides() -> None:
    candidate, baseline = scores(
        np.random.default_rng(2), 3, 40, true=0.03, of_seeds=0.01, of_images=0.1, rest=0.05
    )
    d, again, turned = (
        compare(candidate, baseline),
        compare(candidate, baseline),
        compare(baseline, candidate),
    )
    assert d == again
    assert turned.mean == -d.mean
    assert turned.p == pytest.approx(d.p)
    assert turned.interval is not None
    assert d.interval == pytest.approx((-turned.interval[1], -turned.interval[0]), abs=0.003)


def test_pairs_are_kept_so_a_constant_gain_on_hard_and_easy_images_has_no_spread() -> None:
    baseline = np.random.default_rng(0).uniform(0, 0.9, (3, 50))
    d = compare(baseline + 0.03, baseline)
    assert d.interval == pytest.approx((0.03, 0.03))
    assert d.p is not None
    assert d.p < 1e-6


def test_an_image_that_one_run_did_not_score_is_left_out_for_all() -> None:
    candidate, baseline = scores(
        np.random.default_rng(3), 2, 30, true=0.1, of_seeds=0.01, of_images=0.1, rest=0.05
    )
    lacking = candidate.copy()
    lacking[1, 4] = math.nan
    scored = np.delete(np.arange(30), 4)
    assert compare(lacking, baseline) == compare(candidate[:, scored], baseline[:, scored])


@pytest.mark.parametrize(("seeds", "images"), [(0, 10), (3, 0), (3, 1), (1, 1)])
def test_too_little_has_neither_interval_nor_p(seeds: int, images: int) -> None:
    d = compare(np.ones((seeds, images)), np.zeros((seeds, images)))
    assert (d.interval, d.p, d.p_groups, d.effect) == (None, None, None, None)
    assert math.isnan(d.mean) == (seeds * images == 0)


def test_equal_scores_differ_by_nothing() -> None:
    d = compare(np.full((3, 20), 0.5), np.full((3, 20), 0.5))
    assert (d.mean, d.interval, d.p, d.effect) == (0.0, (0.0, 0.0), 1.0, None)


def test_arrays_of_other_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"one shape, not \(2, 3\) and \(2, 4\)"):
        compare(np.zeros((2, 3)), np.zeros((2, 4)))


def test_holm_keeps_order_counts_only_comparisons_and_never_falls() -> None:
    assert holm([0.02, 0.01, 0.04]) == pytest.approx([0.04, 0.03, 0.04])
    assert holm([0.02, None]) == [0.02, None]
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    assert holm([0.01, 0.011, 0.9]) == pytest.approx([0.03, 0.03, 0.9])
    assert holm([]) == []


def test_holm_keeps_the_rate_of_any_false_alarm() -> None:
    rng = np.random.default_rng(0)
    alarms = [
        min(p for p in holm(list(rng.uniform(size=6))) if p is not None) < 0.05 for _ in range(2000)
    ]
    assert np.mean(alarms) == pytest.approx(0.05, abs=0.015)


@pytest.mark.parametrize(
    ("effect", "word"),
    [
        (0.0, "negligible"),
        (-0.19, "negligible"),
        (0.2, "small"),
        (0.5, "medium"),
        (-0.8, "large"),
        (None, "not known"),
    ],
)
def test_effects_have_words(effect: float | None, word: str) -> None:
    assert effect_words(effect) == word


def test_rank_correlation_has_known_values() -> None:
    x = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]
    assert rank_correlation(x, [v**3 for v in x]).value == pytest.approx(1)
    assert rank_correlation(x, x[::-1]).value == pytest.approx(-1)
    correlation = rank_correlation(x, [0.2, 0.1, 0.4, 0.3, 0.6, 0.5])
    assert correlation.value == pytest.approx(
        stats.spearmanr(range(6), [1, 0, 3, 2, 5, 4]).statistic
    )
    assert correlation.interval is not None
    assert correlation.interval[0] < correlation.value <= correlation.interval[1]


@pytest.mark.parametrize(
    ("x", "y", "n"),
    [
        ([1, 2, 3, 4], [1, 2, 3, 4], 4),
        ([1, 2, 3, 4, math.nan], [1, 2, 3, 4, 5], 4),
        ([1, 2, 3, 4, 5], [7, 7, 7, 7, 7], 5),
        ([], [], 0),
    ],
    ids=["few", "few finite", "constant", "none"],
)
def test_rank_correlation_of_too_little_is_not_known(
    x: list[float], y: list[float], n: int
) -> None:
    correlation = rank_correlation(x, y)
    assert (correlation.value, correlation.interval, correlation.n) == (None, None, n)


def test_a_seed_that_is_good_for_all_candidates_is_no_agreement() -> None:
    """Single runs correlate by -0.7 here, since seeds help one score and harm the other."""
    rng = np.random.default_rng(5)
    of_seed = rng.normal(0, 0.1, (1, 5))
    of_candidate = np.linspace(0.3, 0.34, 6)[:, None]
    x = of_candidate + of_seed + rng.normal(0, 0.001, (6, 5))
    y = of_candidate - of_seed + rng.normal(0, 0.001, (6, 5))
    single_runs = rank_correlation(x.ravel().tolist(), y.ravel().tolist())
    assert single_runs.value is not None
    assert single_runs.value < -0.7
    by_candidate = correlate_candidates(x, y)
    assert by_candidate.value == pytest.approx(1)
    assert by_candidate.p == pytest.approx(2 / math.factorial(6))
    assert by_candidate.n == 6


def test_ranks_of_candidates_without_relation_are_shown_to_agree_in_at_most_5_percent() -> None:
    rng = np.random.default_rng(6)
    p_values = []
    for seed in range(200):
        x, y = rng.normal(size=(2, 6, 1)) + rng.normal(0, 0.5, (2, 6, 3))
        p_values.append(correlate_candidates(x, y, seed=seed).p)
    assert np.mean([p is not None and p < 0.05 for p in p_values]) < 0.08


def test_the_interval_of_a_correlation_covers_candidates_and_seeds() -> None:
    rng = np.random.default_rng(7)
    level = rng.normal(size=(8, 1))
    exact = correlate_candidates(*(level + np.zeros((2, 8, 4))))
    noisy = correlate_candidates(*(level + rng.normal(0, 0.7, (2, 8, 4))))
    assert exact.interval == (1.0, 1.0)
    assert noisy.interval is not None
    assert noisy.interval[0] < 0.8
    assert correlate_candidates(np.ones((4, 3)), np.ones((4, 3))).value is None  # four are few


def test_the_p_of_a_permutation_is_that_of_scipy_where_all_are_taken() -> None:
    x, y = [3.0, 1.0, 2.0, 5.0, 4.0, 6.0], [1.0, 2.0, 3.0, 4.0, 6.0, 5.0]
    expected = stats.permutation_test(
        (x,),
        lambda order: stats.spearmanr(order, y).statistic,
        permutation_type="pairings",
        n_resamples=np.inf,
    )
    assert rank_correlation(x, y).p == pytest.approx(expected.pvalue)


def test_seed_noise_pools_what_repeats_differ_by_and_not_what_candidates_do() -> None:
    assert seed_noise([[0.1, 0.3], [0.8, 0.8, 0.8]]) == pytest.approx(math.sqrt(0.02 / 3))
    assert seed_noise([[0.1], [0.5]]) is None
    rng = np.random.default_rng(0)
    many = [list(level + rng.normal(0, 0.02, 4)) for level in np.linspace(0, 1, 200)]
    assert seed_noise(many) == pytest.approx(0.02, rel=0.05)
