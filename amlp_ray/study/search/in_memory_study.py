"""A copy of a stored Optuna study in memory, which samplers and pruners may write into."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import optuna
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler, RandomSampler
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, Trial, TrialState

from amlp_ray.study.storage.optuna_internals import FixedStudy, TrialTable

T = TypeVar("T")


class TrialDelta:
    """Selects the trials of a study that may have changed since the last call.

    A trial that has ended never changes.
    """

    def __init__(self) -> None:
        self._n_seen = 0
        self._unfinished: list[int] = []  # numbers of trials that had not ended

    def update(self, trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
        """Return the trials that are new or had not ended at the last call.

        Args:
            trials: of the study, in order. A list that was read before the last call's is allowed
                and takes nothing back.
        """
        numbers = [*self._unfinished, *range(self._n_seen, len(trials))]
        changed = [trials[number] for number in numbers if number < len(trials)]
        finished = {trial.number for trial in changed if trial.state.is_finished()}
        self._unfinished = [number for number in numbers if number not in finished]
        self._n_seen = max(self._n_seen, len(trials))
        return changed


class ObservedTrial(FrozenTrial):
    """A trial as samplers and pruners see it: without user attributes and dates.

    Its parameters are sorted, because each storage has another order.

    Attributes:
        internal_params: parameters by name as Optuna computes with them.
    """

    def __init__(
        self,
        number: int,
        state: TrialState,
        *,
        params: Mapping[str, Any] | None = None,
        distributions: Mapping[str, BaseDistribution] | None = None,
        values: Sequence[float] | None = None,
        intermediate_values: Mapping[int, float] | None = None,
        system_attrs: Mapping[str, Any] | None = None,
        constraints: Mapping[str, float] | None = None,
    ) -> None:
        params = params or {}
        distributions = distributions or {}
        super().__init__(
            number=number,
            state=state,
            value=None,
            values=values,
            datetime_start=None,
            datetime_complete=None,
            params={name: params[name] for name in sorted(params)},
            distributions={name: distributions[name] for name in sorted(params)},
            user_attrs={},
            system_attrs=dict(system_attrs or {}),
            intermediate_values=dict(intermediate_values or {}),
            trial_id=number,
        )
        self.internal_params = {
            name: distribution.to_internal_repr(self.params[name])
            for name, distribution in self.distributions.items()
        }
        self._limit_excess = dict(constraints or {})

    @property
    def constraints(self) -> dict[str, float]:
        """Return by how much the trial exceeds each limit; at most 0 if it keeps it."""
        return self._limit_excess


class InMemoryStudy:
    """Trials by their numbers in the stored study; samplers ignore numbers without a trial."""

    def __init__(self, name: str, directions: Sequence[str]) -> None:
        """Create an empty study; each of `directions` is `maximize` or `minimize`."""
        self.name = name
        self._table = TrialTable()
        study_directions = [StudyDirection[direction.upper()] for direction in directions]
        self._id = self._table.create_new_study(study_directions, name)
        self._length = 0

    def put(self, trial: ObservedTrial) -> None:
        """Add a trial, or replace the one with its number."""
        while self._length <= trial.number:
            unused = ObservedTrial(self._length, TrialState.FAIL)
            self._table.create_new_trial(self._id, unused)
            self._length += 1
        self._table.replace_trial(trial)

    def drop(self, number: int) -> None:
        """Remove a trial."""
        if number < self._length:
            self.put(ObservedTrial(number, TrialState.FAIL))

    def study(self, sampler: BaseSampler | None = None) -> optuna.Study:
        """Return the Optuna study as it is now, for one suggestion or one decision."""
        return FixedStudy(self.name, self._table, sampler or RandomSampler(0))

    @property
    def system_attrs(self) -> dict[str, Any]:
        """Return what samplers have stored with the study."""
        return self._table.get_study_system_attrs(self._id)

    def set_system_attr(self, name: str, value: Any) -> None:
        """Store something with the study for samplers."""
        self._table.set_study_system_attr(self._id, name, value)

    def sample(
        self,
        number: int,
        sampler: BaseSampler,
        suggest: Callable[[Trial], T],
        *,
        fixed: Mapping[str, Any] | None = None,
    ) -> tuple[T, FrozenTrial]:
        """Let a sampler fill the trial of a number, which is removed again.

        Args:
            sampler: asked for its parameters.
            suggest: asks the trial for every parameter of a space.
            fixed: parameters that the sampler is not asked for.

        Returns:
            What `suggest` returned, and the trial with its parameters and system attributes.
        """
        attributes = {"fixed_params": dict(fixed)} if fixed else None
        self.put(ObservedTrial(number, TrialState.RUNNING, system_attrs=attributes))
        try:
            result = suggest(Trial(self.study(sampler), number))
            return result, self._table.get_trial(number)
        finally:
            self.drop(number)
