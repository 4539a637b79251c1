"""Which trials of a search are its best."""

from __future__ import annotations

from collections.abc import Sequence

from optuna.trial import FrozenTrial, TrialState

from amlp_ray.config import StudyConfig
from amlp_ray.errors import StudyError
from amlp_ray.study.storage.budget import counts_in_budget
from amlp_ray.study.storage.study_store import StudyStore


def front(trials: Sequence[FrozenTrial], config: StudyConfig) -> list[FrozenTrial]:
    """The best COMPLETE trials of the search: one, or the Pareto front of several objectives; none where none is done.

    What was imported is no result of this study, and a trial beyond `limits` counts only where every one is. Of equals
    the first stands for all; a front goes from the best value of the first objective down.
    """
    signs = [-1 if direction == "maximize" else 1 for direction in config.objectives.values()]
    done = [
        t
        for t in trials
        if t.state == TrialState.COMPLETE and counts_in_budget(t) and len(t.values) == len(signs)
    ]
    done = [t for t in done if keeps_limits(t, config)] or done
    if not done or len(signs) == 1:
        return sorted(done, key=lambda t: (signs[0] * t.values[0], t.number))[:1]
    costs = {
        t.number: tuple(s * value for s, value in zip(signs, t.values, strict=True)) for t in done
    }
    kept: list[FrozenTrial] = []
    for trial in sorted(
        done, key=lambda t: (costs[t.number], t.number)
    ):  # who comes later beats none of those before
        cost = costs[trial.number]
        if not any(
            all(a <= b for a, b in zip(costs[other.number], cost, strict=True)) for other in kept
        ):
            kept.append(trial)
    return kept


def keeps_limits(trial: FrozenTrial, config: StudyConfig) -> bool:
    """Whether a trial keeps `limits`; one that did not measure a cost is taken to."""
    facts = trial.user_attrs.get("stats") or {}
    return all((facts.get(name) or 0.0) <= limit for name, limit in config.limits.items())


def best_trial(store: StudyStore, config: StudyConfig | None = None) -> FrozenTrial:
    """The COMPLETE trial with the best value of the study's metric; with several objectives, of those on their front.

    Raises:
        StudyError: where none is complete.
    """
    config = config or store.config()
    best = front(store.search().get_trials(deepcopy=False), config)
    if not best:
        raise StudyError(
            f"Study {config.name!r} has no complete trial yet; see `amlp-ray study status`."
        )
    if config.metric not in config.objectives:
        return best[0]
    place = list(config.objectives).index(config.metric)
    return max(best, key=lambda trial: (trial.values[place], -trial.number))
