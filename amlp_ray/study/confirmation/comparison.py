"""Comparison of a trial with a baseline, and what it shows, for search and confirmation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from amlp_ray.data.manifest import GroupUnit
from amlp_ray.study.confirmation.statistics import LEVEL, Difference

Reading = Literal["better", "worse", "tie", "no difference shown", "not known"]
VerdictKind = Literal["better", "tie", "worse", "open"]

# Below this the scores of single images, or patients, rule the mean.
FEW_GROUPS = 40
# Below this Wilcoxon's test gives no p under 0.05, whatever the scores are.
MIN_TESTED_GROUPS = 6


@dataclass(frozen=True)
class Sample:
    """The scored images with a lesion, and the groups that they belong to."""

    images: int
    groups: int
    unit: GroupUnit

    @classmethod
    def from_score(cls, score: Mapping[str, Any], groups: int) -> Sample:
        """Read what a score is of; `groups` is how many of its groups are compared."""
        return cls(int(score.get("images") or groups), groups, score.get("unit", "image"))

    def describe(self, split: str = "") -> str:
        """Say how many there are, such as `183 test images of 12 patients` or `63 images`."""
        images = " ".join(filter(None, (str(self.images), split, "images")))
        is_single = self.unit == "image" or self.groups == self.images
        return images if is_single else f"{images} of {self.groups} {self.unit}s"

    @property
    def unit_words(self) -> str:
        """Name what counts once, such as `patients`."""
        return "images" if self.groups == self.images else f"{self.unit}s"


@dataclass(frozen=True)
class Comparison:
    """One comparison of a candidate with a baseline, an ablation or another candidate."""

    candidate: str  # name of the trial that is judged
    baseline: str  # name of what it is compared with
    candidate_mean: float  # mean DSC of the candidate, over the seeds and groups that both have
    baseline_mean: float  # mean DSC of the baseline, over the same
    difference: Difference  # candidate minus baseline
    p: float | None  # after Holm's correction; None where no p-value counts
    reading: Reading  # what the difference shows
    sample: Sample  # what was scored


def read_size(difference: float, equivalence_margin: float) -> Literal["better", "tie", "worse"]:
    """Read a difference by its size alone: one below the margin is a tie."""
    if abs(difference) < equivalence_margin or difference == 0:
        return "tie"
    return "better" if difference > 0 else "worse"


def read_difference(difference: Difference, p: float | None, equivalence_margin: float) -> Reading:
    """Read a difference by its significance, then by its size.

    It is shown where seeds were repeated, `p` is below 0.05 and the interval excludes zero.

    Args:
        difference: candidate minus baseline.
        p: after correction; None where no p-value counts.
        equivalence_margin: a difference that is shown and smaller than this is a tie.
    """
    if p is None or difference.interval is None:
        return "not known"
    if p >= LEVEL or not difference.excludes_zero:
        return "no difference shown"
    return read_size(difference.mean, equivalence_margin)


def verdict_kind(readings: Sequence[Reading]) -> VerdictKind:
    """Judge a trial by its comparisons with plain MAE and with a random encoder.

    One that is worse decides; only better in all counts as better.
    """
    if "worse" in readings:
        return "worse"
    return "better" if set(readings) <= {"better"} else "tie"


def few_groups_caution(sample: Sample, split: str = "") -> str:
    """Warn that few images or patients were scored."""
    scored = f"Only {sample.describe(split)} have a lesion and are scored"
    if sample.groups < MIN_TESTED_GROUPS:
        return (
            f"{scored}: fewer than {MIN_TESTED_GROUPS} {sample.unit_words} can show no "
            f"difference, however large."
        )
    return f"{scored}; each of the {sample.unit_words} weighs heavily."


def unequal_budget_caution(best: str, others: Sequence[str], differing: str) -> str:
    """Warn that other runs trained for longer, for shorter or in other batches than the best."""
    return f"{best} and {', '.join(others)} {differing}: not the same budget."
