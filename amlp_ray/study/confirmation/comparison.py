"""Comparison of a trial with a baseline, and what it shows, for search and confirmation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from amlp_ray.study.confirmation.statistics import LEVEL, Difference

Reading = Literal["better", "worse", "tie", "no difference shown", "not known"]
VerdictKind = Literal["better", "tie", "worse", "open"]

# Below this the scores of single images rule the mean.
FEW_IMAGES = 40


@dataclass(frozen=True)
class Comparison:
    """One comparison of a candidate with a baseline, an ablation or another candidate."""

    candidate: str  # name of the trial that is judged
    baseline: str  # name of what it is compared with
    candidate_mean: float  # mean DSC of the candidate, over the seeds and images that both have
    baseline_mean: float  # mean DSC of the baseline, over the same
    difference: Difference  # candidate minus baseline
    p: float | None  # after Holm's correction; None where no p-value counts
    reading: Reading  # what the difference shows


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


def few_images_caution(images: float, which: str) -> str:
    """Warn that few images were scored; `which` names them, such as `test images`."""
    return f"Only {images:.0f} {which} with a lesion are scored; each of them weighs heavily."


def unequal_budget_caution(best: str, others: Sequence[str], differing: str) -> str:
    """Warn that other runs trained for longer, for shorter or in other batches than the best."""
    return f"{best} and {', '.join(others)} {differing}: not the same budget."
