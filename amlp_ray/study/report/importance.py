"""Which parameters explain the difference between the best trials and the rest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

MIN_TRIALS = 10  # PED-ANOVA compares the top trials with all; a top of under 5 says nothing


@dataclass(frozen=True)
class Importance:
    shares: dict[str, float]  # by parameter: sum 1, largest first; empty where `gap` says why
    gap: str | None = None


def importance(
    trials: Sequence[FrozenTrial], objectives: Mapping[Any, str]
) -> dict[str, Importance]:
    """Work out importances for each objective by PED-ANOVA, over complete trials.

    Args:
        objectives: directions (`maximize`, `minimize`) by name, in the order of the trials' values.
    """
    complete = [trial for trial in trials if trial.state == TrialState.COMPLETE and trial.values]
    return {
        name: _importance(
            [trial for trial in complete if len(trial.values) > i], i, direction == "maximize"
        )
        for i, (name, direction) in enumerate(objectives.items())
    }


def _importance(complete: list[FrozenTrial], index: int, maximize: bool) -> Importance:
    if len(complete) < MIN_TRIALS:
        few = f"{len(complete)} complete trials are too few"
        return Importance({}, f"{few}: importances are worked out from {MIN_TRIALS} on.")
    if not any(trial.params for trial in complete):
        return Importance({}, "No parameter was searched.")
    if len({trial.values[index] for trial in complete}) == 1:
        return Importance(
            {}, "All complete trials score the same, so no parameter explains a difference."
        )
    sign = -1 if maximize else 1  # the evaluator looks for low values of a target
    evaluator = optuna.importance.PedAnovaImportanceEvaluator(
        target_quantile=min(0.5, max(0.1, 5 / len(complete)))
    )
    study = (
        optuna.create_study()
    )  # of these trials alone: imported ones are no result of this study
    study.add_trials(
        optuna.trial.create_trial(
            params=trial.params, distributions=trial.distributions, value=sign * trial.values[index]
        )
        for trial in complete
    )
    try:
        shares = optuna.importance.get_param_importances(study, evaluator=evaluator)
    except (
        ValueError,
        RuntimeError,
        AssertionError,
    ) as error:  # Optuna's ways of refusing a set of trials
        return Importance({}, f"Optuna could not work out importances: {error}")
    if len(set(shares.values())) == 1 and len(shares) > 1:
        return Importance({}, "The best trials do not differ from the rest in any one parameter.")
    return Importance(shares)
