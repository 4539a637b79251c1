"""Choose the rule that finds lesions best on labeled images, and estimate its gain honestly."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

FOLDS = 5
RESAMPLES = 2000
MIN_GROUPS = 6  # below this an interval over groups says nothing
FloatArray = np.ndarray


class RuleChoice(NamedTuple):
    """The rule that would be chosen here, compared with the default."""

    name: str
    f1: float  # mean over groups of the mean over their images, as the next
    default: str
    default_f1: float
    difference: float | None  # on groups that had no part in the choice; None with one group
    interval: tuple[float, float] | None  # of 95 %, over groups; None with fewer than MIN_GROUPS
    groups: int
    times_chosen: int  # of `folds`, in which the same rule is chosen
    folds: int


def choose_rule(
    f1: Mapping[str, FloatArray], groups: Sequence[str] | FloatArray, default: str, *, seed: int = 0
) -> RuleChoice:
    """Choose the rule of highest F1, and estimate its gain over the default without optimism.

    The best of hundreds of rules looks better than it is. So groups are dealt into folds, a rule is
    chosen on all folds but one, and its gain is measured on that one. The interval resamples
    groups.

    Args:
        f1: F1 of each image, (images,), by name of the rule.
        groups: group of each image, such as its patient.
        default: name of the default rule.
        seed: of the folds and of the resampling.
    """
    names = list(f1)
    _, group_of = np.unique(np.asarray(groups, dtype=object), return_inverse=True)
    sizes = np.bincount(group_of)
    sums = [np.bincount(group_of, weights=f1[name]) for name in names]
    by_group = np.stack(sums, axis=1) / sizes[:, None]  # (groups, rules)
    means = by_group.mean(axis=0)
    best = int(means.argmax())

    num_groups = len(sizes)
    rng = np.random.default_rng(seed)
    num_folds = min(FOLDS, num_groups)
    fold = rng.permutation(num_groups) % num_folds
    gains = by_group - by_group[:, [names.index(default)]]
    held_out_gain = np.zeros(num_groups)
    times_chosen = 0
    for number in range(num_folds if num_groups > 1 else 0):
        is_held_out = fold == number
        chosen = int(by_group[~is_held_out].mean(axis=0).argmax())
        held_out_gain[is_held_out] = gains[is_held_out, chosen]
        times_chosen += chosen == best
    interval = None
    if num_groups >= MIN_GROUPS:
        resampled = held_out_gain[rng.integers(0, num_groups, (RESAMPLES, num_groups))].mean(axis=1)
        low, high = np.percentile(resampled, [2.5, 97.5])
        interval = (float(low), float(high))
    return RuleChoice(
        name=names[best],
        f1=float(means[best]),
        default=default,
        default_f1=float(means[names.index(default)]),
        difference=float(held_out_gain.mean()) if num_groups > 1 else None,
        interval=interval,
        groups=num_groups,
        times_chosen=times_chosen,
        folds=num_folds,
    )
