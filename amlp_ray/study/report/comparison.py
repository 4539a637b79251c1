"""Compare the best trial of a search with the baselines that were trained beside it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

import numpy as np

from amlp_ray.config import baseline_names
from amlp_ray.study.confirmation.comparison import Comparison, read_size
from amlp_ray.study.confirmation.statistics import Difference, Interval, image_interval
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
    best_dsc = best.dsc or 0.0
    best_scores = best.per_image()
    comparisons = []
    for baseline in baselines:
        if baseline.uses_ground_truth:
            continue
        interval, images = paired_interval(best_scores, [run.per_image() for run in baseline.runs])
        # Rounded so that 0.42 - 0.40 does not fall below a margin of 0.02.
        mean = round(best_dsc - baseline.dsc, 6)
        comparisons.append(
            Comparison(
                candidate=best.name,
                baseline=baseline.name,
                candidate_mean=best_dsc,
                baseline_mean=baseline.dsc,
                difference=Difference(mean, interval, None, None, None, seeds=1, images=images),
                p=None,  # the best trial was chosen by the same scores
                reading=read_size(mean, data.config.equivalence_margin),
            )
        )
    return comparisons


def paired_interval(
    best: dict[str, float], repeats: list[dict[str, float]]
) -> tuple[Interval | None, int]:
    """Bootstrap the mean difference over the images that all runs scored.

    Args:
        best: DSC by image.
        repeats: the same of each repeat of a baseline; they are averaged per image first.

    Returns:
        The 95 % interval, which is None below two images, and the number of images.
    """
    images = sorted(set(best).intersection(*repeats))
    if len(images) < 2:
        return None, len(images)
    differences = []
    for image in images:
        differences.append(best[image] - fmean(scores[image] for scores in repeats))
    return image_interval(np.array(differences)), len(images)
