"""Find the best trials of a search."""

from __future__ import annotations

from collections.abc import Sequence
from operator import le
from typing import TypeVar

from amlp_ray.config import StudyConfig
from amlp_ray.errors import StudyError
from amlp_ray.study.storage.study_store import StudyStore
from amlp_ray.study.storage.trial_record import TrialRecord, trial_records

Record = TypeVar("Record", bound=TrialRecord)


def pareto_front(trials: Sequence[Record], config: StudyConfig) -> list[Record]:
    """Return the best COMPLETE trials of the search.

    Imported trials are no result of this study. A trial beyond `limits` counts only if every one
    is. Of trials with equal values the first is returned.

    Returns:
        One trial, or the Pareto front of several objectives from the best value of the first
        objective down. Empty if no trial is complete.
    """
    signs = [-1 if direction == "maximize" else 1 for direction in config.objectives.values()]
    complete = [trial for trial in trials if trial.is_complete and trial.counts_in_budget]
    complete = [trial for trial in complete if len(trial.values or ()) == len(signs)]
    candidates = [trial for trial in complete if keeps_limits(trial, config)] or complete
    costs = {}
    for trial in candidates:
        values = zip(signs, trial.values or (), strict=True)
        costs[trial.number] = tuple(sign * value for sign, value in values)
    best: list[Record] = []
    # In this order no trial is beaten by a later one.
    for trial in sorted(candidates, key=lambda trial: (costs[trial.number], trial.number)):
        cost = costs[trial.number]
        if not any(all(map(le, costs[other.number], cost)) for other in best):
            best.append(trial)
    return best


def keeps_limits(trial: TrialRecord, config: StudyConfig) -> bool:
    """Return whether a trial keeps `limits`; a cost that was not measured counts as kept."""
    return all((trial.stats.get(name) or 0.0) <= limit for name, limit in config.limits.items())


def best_trial(store: StudyStore, config: StudyConfig | None = None) -> TrialRecord:
    """Return the COMPLETE trial with the best value of the study's metric.

    With several objectives it is chosen from their front.

    Raises:
        StudyError: no trial is complete.
    """
    config = config or store.config()
    best = pareto_front(trial_records(store.search()), config)
    if not best:
        raise StudyError(
            f"Study {config.name!r} has no complete trial yet; see `amlp-ray study status`."
        )
    if config.metric not in config.objectives:
        return best[0]
    return max(
        best, key=lambda trial: (trial.objective_values(config)[config.metric], -trial.number)
    )
