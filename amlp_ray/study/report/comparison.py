"""Compare the best trial of a search with the baselines that were trained beside it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean, stdev

import numpy as np

from amlp_ray.config import baseline_names
from amlp_ray.study.confirmation.comparison import Comparison, Sample, read_size
from amlp_ray.study.confirmation.statistics import FloatArray, compare
from amlp_ray.study.report.report_data import ReportData, ReportedTrial


@dataclass(frozen=True)
class Baseline:
    """The finished repeats of one baseline."""

    name: str
    runs: Sequence[ReportedTrial]

    @property
    def uses_ground_truth(self) -> bool:
        """Return whether it sees true masks, so that nothing is compared with it."""
        return any(run.uses_ground_truth for run in self.runs)

    @property
    def values(self) -> list[float]:
        """Return the DSC of each repeat."""
        return [run.dsc for run in self.runs if run.dsc is not None]

    @property
    def dsc(self) -> float:
        """Return the mean DSC over repeats."""
        return fmean(self.values)

    @property
    def spread(self) -> str:
        """Say how far the repeats lie apart; an SD only from three on."""
        if len(self.runs) == 1:
            return "one run"
        sd = f"SD {stdev(self.values):.3f}, " if len(self.values) > 2 else ""
        ends = f"range {min(self.values):.3f} to {max(self.values):.3f}"
        return f"mean of {len(self.runs)} runs, {sd}{ends}"

    def measure(self, key: str) -> float | None:
        """Return the mean of a number of score.json over the repeats that have it."""
        measures = [run.measure(key) for run in self.runs]
        values = [value for value in measures if value is not None]
        return fmean(values) if values else None


def finished_baselines(data: ReportData) -> list[Baseline]:
    """Return the baselines that have a finished repeat, in the order of the settings."""
    names = baseline_names(data.config.baselines)
    runs: dict[str, list[ReportedTrial]] = {name: [] for name in names}
    for run in data.baselines:
        if run.baseline and run.is_full_length:
            runs.setdefault(run.baseline, []).append(run)
    return [Baseline(name, repeats) for name, repeats in runs.items() if repeats]


def compare_with_baselines(data: ReportData, baselines: Sequence[Baseline]) -> list[Comparison]:
    """Compare the best trial, which is one run, with the mean of each baseline's repeats.

    Baselines that see true masks are left out. None is compared before there is a best trial.
    """
    best = data.best
    if best is None:
        return []
    comparisons = []
    for baseline in baselines:
        if not baseline.uses_ground_truth:
            comparisons.append(_compare(best, baseline, data.config.equivalence_margin))
    return comparisons


def _compare(best: ReportedTrial, baseline: Baseline, equivalence_margin: float) -> Comparison:
    means = [best.dsc or 0.0, baseline.dsc]
    scores = paired_scores(best.per_group(), [run.per_group() for run in baseline.runs])
    if scores.size:
        means = scores.mean(axis=(1, 2)).tolist()
    difference = compare(scores[0], scores[1])
    # Rounded so that 0.42 - 0.40 does not fall below a margin of 0.02.
    mean = round(means[0] - means[1], 6)
    return Comparison(
        candidate=best.name,
        baseline=baseline.name,
        candidate_mean=means[0],
        baseline_mean=means[1],
        # No p-value: the best trial was chosen by the same scores.
        difference=replace(difference, mean=mean, p=None, p_groups=None, effect=None),
        p=None,
        reading=read_size(mean, equivalence_margin),
        sample=Sample.from_score(best.score_file, difference.groups),
    )


def paired_scores(best: dict[str, float], repeats: Sequence[dict[str, float]]) -> FloatArray:
    """Return the DSC (2, 1, G) of the best trial and of a baseline, whose repeats are averaged.

    Args:
        best: DSC by group.
        repeats: the same of each repeat of the baseline. Groups that one of them lacks are left
            out.
    """
    groups = sorted(set(best).intersection(*repeats))
    baseline = [fmean(scores[group] for scores in repeats) for group in groups]
    return np.array([[best[group] for group in groups], baseline]).reshape(2, 1, len(groups))
