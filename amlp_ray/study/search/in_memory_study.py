"""An Optuna study in memory that repeats a stored one: samplers and pruners look at it, and write into it freely."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import optuna
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler, RandomSampler
from optuna.storages import InMemoryStorage
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, Trial, TrialState

Answer = TypeVar("Answer")


class TrialDelta:
    """Picks from a stored study's trials those that may have changed since the last time: an ended one never does."""

    def __init__(self) -> None:
        self._seen = 0
        self._open: list[int] = []  # numbers of those that had not ended

    def of(self, trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
        """Return the trials that are new or had not ended at the last call.

        Args:
            trials: all of a study, in their order; what was read earlier than at the last call takes nothing back.
        """
        news = [trials[n] for n in self._open if n < len(trials)] + list(trials[self._seen :])
        later = [n for n in self._open if n >= len(trials)]
        self._open = [t.number for t in news if not t.state.is_finished()] + later
        self._seen = max(self._seen, len(trials))
        return news


class ObservedTrial(FrozenTrial):
    """A trial as samplers see it: without attributes of users and dates, and with its parameters sorted.

    Sorted, since each storage has an order of its own. `internal` holds parameters as Optuna computes with them,
    worked out once.
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
        names, of = sorted(params or {}), distributions or {}
        super().__init__(
            number=number,
            state=state,
            value=None,
            values=values,
            datetime_start=None,
            datetime_complete=None,
            params={name: (params or {})[name] for name in names},
            distributions={name: of[name] for name in names},
            user_attrs={},
            system_attrs=dict(system_attrs or {}),
            intermediate_values=dict(intermediate_values or {}),
            trial_id=number,
        )
        self.internal = {
            name: d.to_internal_repr(self.params[name]) for name, d in self.distributions.items()
        }
        self._constraints = dict(constraints or {})

    @property
    def constraints(self) -> dict[str, float]:
        """Limits by name, at most 0 where kept."""
        return self._constraints


class _Moment(optuna.Study):
    """A study that picks trials by state once: samplers ask for the same ones for each parameter."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._picked: dict[Any, list[FrozenTrial]] = {}

    def _get_trials(
        self, deepcopy: bool = True, states: Any = None, use_cache: bool = False
    ) -> list[
        FrozenTrial
    ]:  # Optuna's signature; what is picked is never copied, and the list may be changed
        key = None if states is None else tuple(states)
        if key not in self._picked:
            self._picked[key] = self._storage.get_all_trials(
                self._study_id, deepcopy=False, states=key
            )
        return list(self._picked[key])


class InMemoryStudy:
    """Trials by their numbers in the stored study; a number that is not known yet is a gap, which nothing looks at."""

    def __init__(self, name: str, directions: Sequence[str]) -> None:
        """Args: directions: `maximize` or `minimize`, one per objective."""
        self.name = name
        self.storage = InMemoryStorage()
        self.id = self.storage.create_new_study(
            [StudyDirection[d.upper()] for d in directions], name
        )
        self._length = 0

    def put(self, trial: ObservedTrial) -> None:
        """Know a trial, in the place of what was known under its number."""
        while self._length <= trial.number:
            self.storage.create_new_trial(self.id, ObservedTrial(self._length, TrialState.FAIL))
            self._length += 1
        self.storage._set_trial(trial.number, trial)

    def drop(self, number: int) -> None:
        """Know nothing of a number."""
        if number < self._length:
            self.put(ObservedTrial(number, TrialState.FAIL))

    def study(self, sampler: BaseSampler | None = None) -> optuna.Study:
        """Return the Optuna study as it is at this moment, for one suggestion or one decision."""
        return _Moment(
            self.name, self.storage, sampler or RandomSampler(0), optuna.pruners.NopPruner()
        )

    def draw(
        self,
        number: int,
        sampler: BaseSampler,
        ask: Callable[[Trial], Answer],
        *,
        fixed: Mapping[str, Any] | None = None,
    ) -> tuple[Answer, FrozenTrial]:
        """Let a sampler fill a trial; return what `ask` does and what Optuna noted. The number is a gap again after.

        Args:
            ask: asks a trial for every parameter of a space.
            fixed: parameters that are not asked of the sampler.
        """
        self.put(
            ObservedTrial(
                number,
                TrialState.RUNNING,
                system_attrs={"fixed_params": dict(fixed)} if fixed else None,
            )
        )
        try:
            return ask(Trial(self.study(sampler), number)), self.storage.get_trial(number)
        finally:
            self.drop(number)
