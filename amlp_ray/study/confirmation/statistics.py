"""Paired comparison of scores, rank correlation, and correction for several tests. Numbers only.

Scores of a candidate are an array (S, G): S seeds, G groups. A group is a patient where patients
are known, else near-duplicates, else one image. Its score is the mean over its images, since images
of one patient are no independent samples. Row s of two candidates was trained from one seed and
column g is one group, so everything is compared in pairs. Seeds and groups are both samples:
others would have given another difference, and an interval must cover both. S is small, and a
bootstrap of three seeds knows too little of their spread. `compare` widens it.

NaN marks a group that a run did not score. Such a group is left out for all. Too little data gives
None, never a number that means nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

FloatArray = NDArray[np.floating[Any]]
Interval = tuple[float, float]

# The ends of a 95 % interval then move by about 0.001 DSC from one random seed to another.
RESAMPLES = 4000
# Resamples held in memory at a time; each is as long as there are groups.
RESAMPLES_PER_PART = 200
# A rank correlation of fewer pairs is close to a coin toss.
MIN_RANKED = 5
# Pairs drawn in all for a rank correlation. The interval of many pairs is narrow, so that fewer
# resamples are enough.
MAX_DRAWN_PAIRS = 500_000
# Permutations of a test of ranks; seven pairs have 5,040.
PERMUTATIONS = 5040
# A difference is shown below this p-value.
LEVEL = 0.05
# Cohen's words for an effect below each limit.
EFFECT_WORDS = ((0.2, "negligible"), (0.5, "small"), (0.8, "medium"), (math.inf, "large"))


@dataclass(frozen=True)
class Difference:
    """Difference of the mean scores of two candidates; positive is in favor of the first."""

    mean: float  # mean over seeds and groups
    # 95 %. Over groups alone where there is one seed; None below two groups.
    interval: Interval | None
    # Two-sided, before any correction; None where there is no interval or no test was made.
    p: float | None
    p_groups: float | None  # Wilcoxon's signed rank over groups alone, which knows nothing of seeds
    # Cohen's d of pairs, mean over SD of the groups' differences; None where these do not vary.
    effect: float | None
    seeds: int  # number of seeds that both have
    groups: int  # number of groups that both have scored

    @property
    def excludes_zero(self) -> bool:
        """Whether there is an interval and zero lies outside of it."""
        return self.interval is not None and not self.interval[0] <= 0 <= self.interval[1]


@dataclass(frozen=True)
class Correlation:
    """Spearman's rank correlation of n pairs."""

    value: float | None  # None where there are too few pairs or one side does not vary
    interval: Interval | None  # 95 %, by bootstrap
    p: float | None  # two-sided, by permutation
    n: int  # number of pairs


def compare(candidate: FloatArray, baseline: FloatArray, *, seed: int = 0) -> Difference:
    """Compare the scores of two candidates in pairs.

    The interval is a hierarchical bootstrap: seeds and groups are drawn anew, and pairs stay
    together. It is then scaled to the width that a two-way analysis of variance asks for, with
    Student's t at Satterthwaite's degrees of freedom: a bootstrap of S seeds sees (S - 1)/S of
    their variance and takes that for the truth. In simulations (`benchmarks/verdicts.py`) the
    interval covers the truth in 93 to 97 % of cases, whatever the sizes of the groups. Bootstraps
    of whole groups that keep the mean over images cover it in 79 to 93 % where groups are few and
    of unequal size, which is why a group counts once.

    `p` is the larger of two: Wilcoxon's over groups, which assumes no normal distribution and
    knows no seeds, and that of the t-test over both. With one seed nothing is known of seeds, and
    interval and `p` are of groups alone.

    Args:
        candidate: scores (S, G).
        baseline: scores (S, G) from the same seeds on the same groups.
        seed: of the bootstrap.

    Raises:
        ValueError: the two are not of one shape.
    """
    if candidate.shape != baseline.shape or candidate.ndim != 2:
        raise ValueError(
            f"scores must be two arrays (seeds, groups) of one shape, "
            f"not {candidate.shape} and {baseline.shape}"
        )
    differences = np.asarray(candidate, float) - np.asarray(baseline, float)
    differences = differences[:, np.isfinite(differences).all(0)]
    seeds, groups = differences.shape
    mean = float(differences.mean()) if differences.size else math.nan
    if seeds == 0 or groups < 2:
        return Difference(mean, None, None, None, None, seeds, groups)
    by_group = differences.mean(0)
    sd = float(by_group.std(ddof=1))
    p_groups = float(stats.wilcoxon(by_group).pvalue) if by_group.any() else 1.0
    error, freedom = _standard_error(differences)
    p_both = float(mean == 0)
    if error > 0:
        p_both = float(2 * stats.t.sf(abs(mean) / error, freedom))
    return Difference(
        mean=mean,
        interval=_hierarchical_interval(differences, mean, error, freedom, seed),
        p=max(p_groups, p_both),
        p_groups=p_groups,
        effect=mean / sd if sd > 0 else None,
        seeds=seeds,
        groups=groups,
    )


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Correct p-values of comparisons made together (Holm 1979); None stands for no comparison.

    >>> holm([0.01, None, 0.04, 0.03])
    [0.03, None, 0.06, 0.06]
    """
    ordered = sorted((p, index) for index, p in enumerate(p_values) if p is not None)
    corrected: list[float | None] = [None] * len(p_values)
    previous = 0.0
    for rank, (p, index) in enumerate(ordered):
        previous = max(previous, min(1.0, p * (len(ordered) - rank)))
        corrected[index] = previous
    return corrected


def effect_words(effect: float | None) -> str:
    """Name the size of an effect in Cohen's words.

    >>> effect_words(-0.6)
    'medium'
    """
    if effect is None:
        return "not known"
    return next(word for limit, word in EFFECT_WORDS if abs(effect) < limit)


def spearman(pairs: FloatArray) -> FloatArray:
    """Compute Spearman's rank correlation of pairs (..., n, 2), for each leading index.

    The same as scipy's `spearmanr`, for many samples at once. NaN where one side does not vary.
    """
    ranks = stats.rankdata(pairs, axis=-2)
    ranks -= ranks.mean(axis=-2, keepdims=True)
    x, y = ranks[..., 0], ranks[..., 1]
    with np.errstate(invalid="ignore"):
        return np.asarray((x * y).sum(-1) / np.sqrt((x * x).sum(-1) * (y * y).sum(-1)))


def rank_correlation(x: Sequence[float], y: Sequence[float], *, seed: int = 0) -> Correlation:
    """Correlate the ranks of two scores of the same runs; pairs that are not finite are left out.

    Args:
        x: one score of each run.
        y: the other score of each run.
        seed: of the bootstrap.
    """
    pairs = np.column_stack([np.asarray(x, float), np.asarray(y, float)]).reshape(-1, 2)
    pairs = pairs[np.isfinite(pairs).all(axis=1)]
    if not _can_be_ranked(pairs):
        return Correlation(None, None, None, len(pairs))
    values = _resampled_correlations(pairs, seed)
    return Correlation(
        float(spearman(pairs)), _percentile_interval(values), _permutation_p(pairs), len(pairs)
    )


def correlate_candidates(x: FloatArray, y: FloatArray, *, seed: int = 0) -> Correlation:
    """Correlate the ranks of candidates by the means of two scores over the same seeds.

    A seed is good or bad for all candidates at once. Correlating single runs would show that
    effect, which says nothing of the candidates. So means are correlated, and the interval draws
    candidates and seeds anew.

    Args:
        x: one score (C, S) of C candidates and S seeds.
        y: the other score (C, S).
        seed: of the bootstrap.
    """
    scores = np.stack([x, y], axis=-1)
    candidates, seeds = scores.shape[:2]
    means = scores.mean(1) if scores.size else np.empty((0, 2))
    if not _can_be_ranked(means):
        return Correlation(None, None, None, candidates)
    rng = np.random.default_rng(seed)
    resamples = RESAMPLES // 4
    rows = rng.integers(0, candidates, (resamples, candidates))
    columns = rng.integers(0, seeds, (resamples, seeds))
    values = spearman(scores[rows[:, :, None], columns[:, None, :]].mean(2))
    interval = _percentile_interval(values[np.isfinite(values)])
    return Correlation(float(spearman(means)), interval, _permutation_p(means), candidates)


def seed_noise(scores: Sequence[Sequence[float]]) -> float | None:
    """Pool the SD over seeds of several candidates' scores; None where none has two seeds."""
    repeated = [np.asarray(values, float) for values in scores if len(values) > 1]
    freedom = sum(len(values) - 1 for values in repeated)
    if not freedom:
        return None
    squares = sum(((values - values.mean()) ** 2).sum() for values in repeated)
    return math.sqrt(squares / freedom)


def _percentile_interval(values: FloatArray) -> Interval:
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)


def _resampled_correlations(pairs: FloatArray, seed: int) -> FloatArray:
    """Correlate samples of pairs that are drawn one by one."""
    count = len(pairs)
    resamples = max(200, min(RESAMPLES // 4, MAX_DRAWN_PAIRS // count))
    indices = np.random.default_rng(seed).integers(0, count, (resamples, count))
    values = spearman(pairs[indices])
    return values[np.isfinite(values)]


def _can_be_ranked(pairs: FloatArray) -> bool:
    """Return whether there are enough pairs (n, 2), and both sides vary."""
    return len(pairs) >= MIN_RANKED and not (pairs == pairs[0]).all(0).any()


def _permutation_p(pairs: FloatArray) -> float:
    """Test by permutation that the ranks of pairs (n, 2) are unrelated, two-sided.

    A bootstrap of five to ten pairs is too sure of itself. All permutations are taken where they
    are few.
    """
    count = len(pairs)
    if math.factorial(count) <= PERMUTATIONS:
        orders = np.array(list(permutations(range(count))))
    else:
        drawn = np.random.default_rng(0).permuted(
            np.tile(np.arange(count), (PERMUTATIONS - 1, 1)), axis=1
        )
        orders = np.vstack([np.arange(count), drawn])
    ranks = stats.rankdata(pairs, axis=0)
    ranks -= ranks.mean(0)
    products = ranks[orders, 1] @ ranks[:, 0]
    return float((np.abs(products) >= abs(products[0]) - 1e-9).mean())


def _standard_error(differences: FloatArray) -> tuple[float, float]:
    """Return the standard error of the mean of differences (S, G), and its degrees of freedom.

    Two-way random effects without repetition: the variance of the mean is
    (MS_seeds + MS_groups - MS_rest) / (S G). It is never taken to be less than either part alone.
    """
    seeds, groups = differences.shape
    by_seed = differences.mean(1, keepdims=True)
    by_group = differences.mean(0, keepdims=True)
    ms_groups = seeds * float(by_group.var(ddof=1))
    if seeds == 1:
        return math.sqrt(ms_groups / groups), groups - 1
    ms_seeds = groups * float(by_seed.var(ddof=1))
    freedom_rest = (seeds - 1) * (groups - 1)
    rest = differences - by_seed - by_group + differences.mean()
    ms_rest = float((rest**2).sum()) / freedom_rest
    total = max(ms_seeds + ms_groups - ms_rest, ms_seeds, ms_groups)
    error = math.sqrt(total / (seeds * groups))
    spread = ms_seeds**2 / (seeds - 1) + ms_groups**2 / (groups - 1) + ms_rest**2 / freedom_rest
    return error, total**2 / spread if spread > 0 else float(groups - 1)


def _hierarchical_interval(
    differences: FloatArray, mean: float, error: float, freedom: float, seed: int
) -> Interval:
    seeds, groups = differences.shape
    rng = np.random.default_rng(seed)
    parts = []
    for _ in range(RESAMPLES // RESAMPLES_PER_PART):
        seed_weights = rng.multinomial(seeds, [1 / seeds] * seeds, RESAMPLES_PER_PART) / seeds
        group_weights = rng.multinomial(groups, [1 / groups] * groups, RESAMPLES_PER_PART) / groups
        parts.append(((seed_weights @ differences) * group_weights).sum(1))
    means = np.concatenate(parts)
    low, high = _percentile_interval(means)
    sd = float(means.std())
    scale = 1.0
    if sd > 0:
        scale = error / sd * float(stats.t.ppf(0.975, freedom) / stats.norm.ppf(0.975))
    return mean - (mean - low) * scale, mean + (high - mean) * scale
