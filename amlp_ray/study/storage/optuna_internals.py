"""Use the private members of Optuna that its public interface has no counterpart for.

Nothing outside of this file names one. `tests/study/storage/test_optuna_internals.py` states what
each must do, so that a release of Optuna that changes one is noticed there.
"""

from __future__ import annotations

import heapq
from collections.abc import Container, Mapping, Sequence
from operator import attrgetter, itemgetter
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution
from optuna.samplers import TPESampler
from optuna.samplers._tpe.sampler import (
    _split_trials,
    default_gamma,
    default_gamma_multiobjective,
)
from optuna.search_space.group_decomposed import _GroupDecomposedSearchSpace
from optuna.storages import InMemoryStorage
from optuna.storages.journal._storage import JournalOperation
from optuna.study import Study, StudyDirection
from optuna.trial import FrozenTrial, TrialState

# Lines of a journal about a trial that still runs: scores of rungs and attributes.
RUNNING_TRIAL_OPERATIONS = frozenset(
    {
        JournalOperation.SET_TRIAL_INTERMEDIATE_VALUE,
        JournalOperation.SET_TRIAL_USER_ATTR,
        JournalOperation.SET_TRIAL_SYSTEM_ATTR,
    }
)


def trial_id_of(trial: FrozenTrial) -> int:
    """Return the id of a trial within its storage, which is unique over all studies."""
    return trial._trial_id


def contains(distribution: BaseDistribution, value: Any) -> bool:
    """Return whether a distribution can yield a value, as a trial has it."""
    try:
        return distribution._contains(distribution.to_internal_repr(value))
    except ValueError:  # not one of the choices
        return False


class TrialTable(InMemoryStorage):
    """Storage in memory whose trials can be replaced."""

    def replace_trial(self, trial: FrozenTrial) -> None:
        """Put a trial in the place of the one with its number. Its id must be its number."""
        self._set_trial(trial.number, trial)


class FixedStudy(Study):
    """A study whose trials do not change, so that they are selected by state only once.

    Samplers select the same trials for each parameter. With 10,000 trials each selection takes
    milliseconds.
    """

    def __init__(
        self, name: str, storage: TrialTable, sampler: optuna.samplers.BaseSampler
    ) -> None:
        super().__init__(name, storage, sampler, optuna.pruners.NopPruner())
        self._selected: dict[Any, list[FrozenTrial]] = {}

    def _get_trials(
        self,
        deepcopy: bool = True,
        states: Container[TrialState] | None = None,
        use_cache: bool = False,
    ) -> list[FrozenTrial]:
        # Optuna passes a sequence, although it declares less.
        key: tuple[TrialState, ...] | None = None
        if states is not None:
            key = tuple(states)  # type: ignore[arg-type]
        if key not in self._selected:
            self._selected[key] = self._storage.get_all_trials(
                self._study_id, deepcopy=False, states=key
            )
        return list(self._selected[key])  # callers may change the list


internal_params = attrgetter("internal_params")
constraints = attrgetter("constraints")


class FastTPESampler(TPESampler):
    """Optuna's TPE, which suggests the same to the digit in less than half the time.

    Measured with 10,000 trials of six parameters: 115 ms a suggestion instead of 253 ms. Trials
    are split into good and poor once per suggestion instead of once per group of parameters, and
    each trial's parameters are converted once for all suggestions. Trials therefore need an
    attribute `internal_params`: parameters by name as Optuna computes with them.

    Running trials count as poor ones, so that parallel trials spread out.
    """

    def __init__(
        self, *, seed: int, n_startup_trials: int, multivariate: bool, group: bool
    ) -> None:
        super().__init__(
            seed=seed,
            n_startup_trials=n_startup_trials,
            multivariate=multivariate,
            group=group,
            constant_liar=True,
        )
        self._split: tuple[list[FrozenTrial], list[FrozenTrial]] | None = None
        if group:
            self._group_decomposed_search_space = _GroupsOfNames(True)

    def _sample(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        if self._split is None:
            self._split = _split(study, trial.number)
        good, poor = self._split
        below = self._build_parzen_estimator(study, search_space, good, handle_below=True)
        above = self._build_parzen_estimator(study, search_space, poor, handle_below=False)
        samples = below.sample(self._rng.rng, self._n_ei_candidates)
        best = self._compare(samples, self._compute_acquisition_func(samples, below, above))
        return {name: d.to_external_repr(best[name]) for name, d in search_space.items()}

    def _get_internal_repr(
        self, trials: Sequence[FrozenTrial], search_space: Mapping[str, Any], study: Study
    ) -> dict[str, np.ndarray]:
        names = list(search_space)
        select, first = itemgetter(*names), names[0]
        # The first name is looked up alone: comparing sets of names takes three times as long.
        rows = [
            select(params)
            for params in map(internal_params, trials)
            if first in params and search_space.keys() <= params.keys()
        ]
        columns = np.array(rows, dtype=float).reshape(len(rows), len(names))
        return {name: columns[:, i] for i, name in enumerate(names)}


def _split(study: Study, number: int) -> tuple[list[FrozenTrial], list[FrozenTrial]]:
    """Split all trials but one into good and poor ones, as Optuna does."""
    states = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.RUNNING)
    trials = [t for t in study.get_trials(deepcopy=False, states=states) if t.number != number]
    gamma = default_gamma_multiobjective if len(study.directions) > 1 else default_gamma
    n_good = gamma(sum(trial.state is not TrialState.RUNNING for trial in trials))
    complete = [trial for trial in trials if trial.state is TrialState.COMPLETE]
    if len(study.directions) > 1 or len(complete) < n_good or any(map(constraints, trials)):
        return _split_trials(study, trials, n_good)
    # Enough complete trials are good, so the pruned ones need no order.
    sign = -1.0 if study.direction == StudyDirection.MAXIMIZE else 1.0
    best = heapq.nsmallest(n_good, complete, key=lambda trial: sign * trial.values[0])
    numbers = {trial.number for trial in best}
    good = [trial for trial in complete if trial.number in numbers]
    return good, [trial for trial in trials if trial.number not in numbers]


class _GroupsOfNames(_GroupDecomposedSearchSpace):
    """Groups of parameters that always come together; equal sets of names are added once."""

    def calculate(self, study: Study, use_cache: bool = False) -> Any:
        seen: set[tuple[str, ...]] = set()
        states = (TrialState.COMPLETE, TrialState.PRUNED)
        for trial in study._get_trials(False, states, use_cache):
            names = tuple(trial.distributions)
            if names not in seen:
                seen.add(names)
                self._search_space.add_distributions(trial.distributions)
        return self._search_space
