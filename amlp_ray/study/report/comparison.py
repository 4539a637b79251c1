"""Numbers behind the verdict: baselines, differences, paired intervals, and whether early scores rank trials."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Literal

import numpy as np

from amlp_ray.config import baseline_names
from amlp_ray.study.confirmation.statistics import MIN_RANKED, RESAMPLES, spearman
from amlp_ray.study.report.report_data import ReportData, ReportedTrial, finite
from amlp_ray.study.storage.study_store import read_metrics


@dataclass(frozen=True)
class Baseline:
    """The finished repeats of one baseline."""

    name: str
    runs: tuple[ReportedTrial, ...]

    @property
    def values(self) -> list[float]:
        return [run.dsc for run in self.runs if run.dsc is not None]

    @property
    def dsc(self) -> float:
        return fmean(self.values)

    @property
    def sd(self) -> float | None:
        """SD over repeats; None below three, where the range says all there is to say."""
        return stdev(self.values) if len(self.values) > 2 else None

    def measure(self, key: str) -> float | None:
        """Mean of a number of score.json over the repeats that have it."""
        values = [value for run in self.runs if (value := run.measure(key)) is not None]
        return fmean(values) if values else None


@dataclass(frozen=True)
class Comparison:
    """The best trial against one baseline; positive differences are in favour of the trial."""

    baseline: Baseline
    difference: float
    reading: Literal["better", "equivalence_margin", "worse"]
    interval: tuple[float, float] | None  # 95 %, paired over images; None without per-image scores
    images: int  # that both have scored

    @property
    def clear(self) -> bool:
        """The interval leaves out zero."""
        return self.interval is not None and not self.interval[0] <= 0 <= self.interval[1]


@dataclass(frozen=True)
class Agreement:
    """Spearman correlations over complete trials between the first prunable rung and the last one."""

    trials: int
    epochs: tuple[int, ...]  # of that first rung; more than one where the batch size was searched
    dsc: float | None
    ap: float | None
    prunable: bool  # False: steps are unknown, and the first rung of all stands in


def finished_baselines(facts: ReportData) -> list[Baseline]:
    """Return the baselines that have a finished repeat, in the order of the settings."""
    order = dict.fromkeys(
        [
            *baseline_names(facts.config.baselines),
            *(run.baseline for run in facts.baselines if run.baseline),
        ]
    )
    grouped = {
        name: tuple(run for run in facts.baselines if run.baseline == name and run.finished)
        for name in order
    }
    return [Baseline(name, runs) for name, runs in grouped.items() if runs]


def compare(best: ReportedTrial, baseline: Baseline, equivalence_margin: float) -> Comparison:
    difference = round(
        (best.dsc or 0.0) - baseline.dsc, 6
    )  # 0.42 - 0.40 must not fall below a tie of 0.02
    interval, images = paired_interval(best.per_image(), [run.per_image() for run in baseline.runs])
    return Comparison(baseline, difference, read(difference, equivalence_margin), interval, images)


def read(
    difference: float, equivalence_margin: float
) -> Literal["better", "equivalence_margin", "worse"]:
    if abs(difference) < equivalence_margin or difference == 0:
        return "equivalence_margin"
    return "better" if difference > 0 else "worse"


def paired_interval(
    best: dict[str, float], repeats: list[dict[str, float]]
) -> tuple[tuple[float, float] | None, int]:
    """Bootstrap the mean difference over images that all runs scored; return its 95 % interval and their number.

    The repeats of a baseline are averaged per image first. The interval covers the choice of images, not the seeds.
    """
    common = sorted(set(best).intersection(*repeats))
    if len(common) < 2:
        return None, len(common)
    differences = np.array([best[key] - fmean(values[key] for values in repeats) for key in common])
    rng = np.random.default_rng(0)  # the same study gives the same report
    means = np.concatenate([  # in parts, so that memory does not grow with images times resamples
        differences[rng.integers(0, len(common), (RESAMPLES // 20, len(common)))].mean(axis=1) for _ in range(20)
    ])  # fmt: skip
    low, high = np.percentile(means, [2.5, 97.5])
    return (float(low), float(high)), len(common)


def rank_agreement(facts: ReportData) -> Agreement:
    """Correlate scores at the first rung that may prune with scores of the last rung, over complete trials."""
    rows, epochs, known = [], set(), True
    for run in facts.search:
        steps = facts.steps_per_epoch(run)
        known = known and steps is not None
        early = [
            epoch
            for epoch in run.rungs
            if steps is None or epoch * steps >= facts.config.pruner.min_steps
        ]
        if not run.finished or len(run.rungs) < 2 or not early or min(early) == max(run.rungs):
            continue
        first, last = min(early), max(run.rungs)
        ap = {
            row.get("epoch"): finite(row.get("ap"))
            for row in read_metrics(run.folder)
            if row.get("ap") is not None
        }
        rows.append((run.rungs[first], run.rungs[last], ap.get(first), ap.get(last)))
        epochs.add(first)
    return Agreement(
        trials=len(rows),
        epochs=tuple(sorted(epochs)),
        dsc=_spearman([(a, b) for a, b, _, _ in rows]),
        ap=_spearman([(a, b) for _, _, a, b in rows if a is not None and b is not None]),
        prunable=known,
    )


def _spearman(pairs: list[tuple[float, float]]) -> float | None:
    """Return the rank correlation; None for too few pairs, or where one side does not vary."""
    if len(pairs) < MIN_RANKED or any(len(set(side)) == 1 for side in zip(*pairs, strict=True)):
        return None
    return float(spearman(np.array(pairs)))
