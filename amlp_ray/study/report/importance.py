"""Work out which parameters explain the difference between the best trials and the rest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState, create_trial

from amlp_ray.config.optimization import Direction

# PED-ANOVA compares the top trials with all; a top of under 5 says nothing.
MIN_TRIALS = 10


@dataclass(frozen=True)
class Importance:
    """Importances for one objective."""

    shares: dict[str, float]
    """Importance by parameter, largest first, with sum 1; empty where `gap` says why."""
    gap: str | None = None
    """Why there are none."""


def importance(
    trials: Sequence[FrozenTrial], objectives: Mapping[Any, Direction]
) -> dict[str, Importance]:
    """Work out importances for each objective by PED-ANOVA, over complete trials.

    Args:
        trials: of the search.
        objectives: directions by name, in the order of the values.
    """
    complete = [trial for trial in trials if trial.state == TrialState.COMPLETE and trial.values]
    importances = {}
    for index, (name, direction) in enumerate(objectives.items()):
        scored = [trial for trial in complete if len(trial.values) > index]
        importances[name] = _importance(scored, index, direction)
    return importances


def _importance(complete: list[FrozenTrial], index: int, direction: Direction) -> Importance:
    if len(complete) < MIN_TRIALS:
        gap = f"{len(complete)} complete trials are too few: "
        return Importance({}, f"{gap}importances are worked out from {MIN_TRIALS} on.")
    if not any(trial.params for trial in complete):
        return Importance({}, "No parameter was searched.")
    if len({trial.values[index] for trial in complete}) == 1:
        gap = "All complete trials score the same, so no parameter explains a difference."
        return Importance({}, gap)
    quantile = min(0.5, max(0.1, 5 / len(complete)))
    evaluator = optuna.importance.PedAnovaImportanceEvaluator(target_quantile=quantile)
    # A study of these trials alone: imported ones are no result.
    study = optuna.create_study(direction=direction)
    for trial in complete:
        value, params = trial.values[index], trial.params
        study.add_trial(create_trial(value=value, params=params, distributions=trial.distributions))
    try:
        shares = optuna.importance.get_param_importances(study, evaluator=evaluator)
    except (ValueError, RuntimeError, AssertionError) as error:
        return Importance({}, f"Optuna could not work out importances: {error}")
    if len(shares) > 1 and len(set(shares.values())) == 1:
        gap = "The best trials do not differ from the rest in any one parameter."
        return Importance({}, gap)
    return Importance(shares)
