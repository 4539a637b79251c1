"""Read a stored trial: its attributes by name, its scores and what it took."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path, PurePosixPath
from typing import Any, Generic, TypedDict, TypeVar, cast

import optuna
from optuna.distributions import BaseDistribution
from optuna.trial import FrozenTrial, TrialState

from amlp_ray.config import StudyConfig

T = TypeVar("T")


class TrialStats(TypedDict, total=False):
    """What a trial took and scored, stored when it ends."""

    seconds: float
    gpu_seconds: float
    memory: float | None
    epochs: int
    images_per_second: float | None
    scores: dict[str, float | None]


class TrialAttributes(TypedDict, total=False):
    """User attributes of a stored trial.

    A baseline has `baseline` and `repeat`, a confirmation run `candidate`, `repeat` and `params`.
    A step of population-based training has `generation`, `member` and `parent`.
    """

    path: str  # folder of a baseline or a confirmation run, relative to the study's
    baseline: str
    candidate: str
    repeat: int
    params: dict[str, Any]
    uses_ground_truth: bool
    generation: int
    member: int
    parent: int | None
    source: str  # where an imported trial comes from
    copy_of: int  # the trial whose scores answered this one
    retry_of: int
    outside: str  # why the trial lies outside of the changed space
    begun: bool  # whether a worker has ever run it; True where it is not stored
    waiting: bool  # whether it is RUNNING for Optuna, but waits for resources
    lost: int  # how often its process died
    gone: bool  # whether a lost storage has left nothing of it but its number
    reason: str  # why it failed or ended early
    stats: TrialStats


class _Field(Generic[T]):
    """A field of Optuna's trial."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __get__(self, record: TrialRecord, owner: type) -> T:
        return cast(T, getattr(record.frozen, self._name))


class _Attribute(Generic[T]):
    """A user attribute of `TrialAttributes`, or a default if the trial does not have it."""

    def __init__(self, name: str, default: Any = None) -> None:
        self._name = name
        self._default = default

    def __get__(self, record: TrialRecord, owner: type) -> T:
        return cast(T, record.attributes.get(self._name, self._default))


@dataclass(frozen=True)
class TrialRecord:
    """A stored trial of the search, the baselines or the confirmation."""

    frozen: FrozenTrial

    number = _Field[int]("number")  # within its study
    state = _Field[TrialState]("state")
    started = _Field[datetime | None]("datetime_start")
    ended = _Field[datetime | None]("datetime_complete")
    params = _Field[dict[str, Any]]("params")  # helpers of the search space included
    distributions = _Field[dict[str, BaseDistribution]]("distributions")
    values = _Field[list[float] | None]("values")  # one per objective
    attributes = _Field[Mapping[str, Any]]("user_attrs")

    baseline = _Attribute[str | None]("baseline")
    candidate = _Attribute[str | None]("candidate")
    # Whether the run sees true masks, so that nothing is compared with it.
    uses_ground_truth = _Attribute[bool]("uses_ground_truth", False)
    generation = _Attribute[int]("generation", 0)
    member = _Attribute[int]("member", 0)
    parent = _Attribute[int | None]("parent")
    source = _Attribute[str | None]("source")
    copy_of = _Attribute[int | None]("copy_of")
    retry_of = _Attribute[int | None]("retry_of")
    outside = _Attribute[str | None]("outside")
    begun = _Attribute[bool]("begun", True)
    waiting = _Attribute[bool]("waiting", False)
    lost = _Attribute[int]("lost", 0)
    gone = _Attribute[bool]("gone", False)
    reason = _Attribute[str | None]("reason")

    @classmethod
    def from_frozen(cls, frozen: FrozenTrial) -> TrialRecord:
        """Wrap a trial as Optuna returns it."""
        return cls(frozen)

    @property
    def is_complete(self) -> bool:
        """Return whether the trial has run its full budget."""
        return self.state == TrialState.COMPLETE

    @property
    def is_finished(self) -> bool:
        """Return whether the trial has ended, whichever way."""
        return self.state.is_finished()

    def status(self, *, is_running: bool) -> str:
        """Return the state to show.

        A RUNNING trial is INTERRUPTED in a study that nobody runs, and WAITING before it has its
        resources.
        """
        if self.state != TrialState.RUNNING:
            return self.state.name
        if not is_running:
            return "INTERRUPTED"
        return "WAITING" if self.waiting else "RUNNING"

    # Parameters

    @property
    def fixed_params(self) -> dict[str, Any]:
        """Return the parameters that an enqueued trial was given; the sampler adds the others."""
        return dict(self.frozen.system_attrs.get("fixed_params", {}))

    @property
    def is_enqueued(self) -> bool:
        """Return whether a user asked for the trial."""
        return "fixed_params" in self.frozen.system_attrs

    # Scores

    @property
    def rungs(self) -> dict[int, float]:
        """Return the score of each rung by its epoch."""
        return self.frozen.intermediate_values

    @property
    def last_score(self) -> float | None:
        """Return the score of the last rung so far; None before the first."""
        rungs = self.rungs
        return rungs[max(rungs)] if rungs else None

    @property
    def value(self) -> float | None:
        """Return what a trial of one objective is ranked by.

        That is its stored value, or the score of its last rung where there is none. None where
        it failed, still runs, has several objectives and no rung, or ended without a finite score.
        """
        if self.state not in (TrialState.COMPLETE, TrialState.PRUNED):
            return None
        values = self.values
        return finite(values[0] if values and len(values) == 1 else self.last_score)

    def objective_values(self, config: StudyConfig) -> dict[str, float]:
        """Return the values of a COMPLETE trial by objective; empty for any other.

        A baseline or a confirmation run has a value of the study's metric alone.
        """
        values = self.values
        if not self.is_complete or not values:
            return {}
        is_search = self.baseline is None and self.candidate is None
        if is_search and len(values) == len(config.objectives):
            return dict(zip(config.objectives, values, strict=True))
        return {config.metric: values[0]}

    def score(self, config: StudyConfig) -> float | None:
        """Return the score by the study's metric, at the end or at the last rung so far.

        None where it failed, or has no finite score yet.
        """
        if self.state == TrialState.FAIL:
            return None
        measured = {**self.measured, **self.objective_values(config)}
        score = None
        if self.state in (TrialState.COMPLETE, TrialState.PRUNED):
            score = finite(measured.get(config.metric))
        return finite(self.last_score) if score is None else score

    # What is stored beside

    @property
    def stats(self) -> TrialStats:
        """Return what the trial took and scored; empty before its end."""
        stats = self.attributes.get("stats")
        return cast(TrialStats, stats if isinstance(stats, dict) else {})

    @property
    def measured(self) -> Mapping[str, float | None]:
        """Return every number of its last scoring by name; empty before its end."""
        scores = self.stats.get("scores")
        return scores if isinstance(scores, dict) else {}

    def cost(self, name: str) -> float | None:
        """Return `seconds`, `gpu_seconds`, `memory` or `epochs`; None before its end."""
        return finite(self.stats.get(name))

    @property
    def folder(self) -> Path:
        """Return the trial's folder, relative to the study's and always inside of it."""
        path = self.attributes.get("path")
        if isinstance(path, str):
            parts = PurePosixPath(path)
            if not parts.is_absolute() and ".." not in parts.parts:
                return Path(path)
        if self.baseline is not None:
            return baseline_path(self.baseline, self.repeat)
        return trial_path(self.number)

    @property
    def repeat(self) -> int:
        """Return which repeat of its baseline or candidate this is; otherwise the number."""
        return int(self.attributes.get("repeat", self.number))

    @property
    def is_pbt_step(self) -> bool:
        """Return whether the trial is a step of population-based training."""
        return "generation" in self.attributes

    @property
    def is_imported(self) -> bool:
        """Return whether another study ran the trial."""
        return "source" in self.attributes

    @property
    def is_copy(self) -> bool:
        """Return whether the trial was answered from the store."""
        return "copy_of" in self.attributes

    @property
    def counts_in_budget(self) -> bool:
        """Return whether the trial uses up `budget.trials`.

        One that waits, was imported or was answered from the store does not.
        """
        has_begun = self.state != TrialState.WAITING and (self.begun or self.is_finished)
        return has_begun and not (self.is_imported or self.is_copy or self.gone)

    @property
    def note(self) -> str | None:
        """Return where the trial comes from, unless it was simply suggested and trained."""
        notes = []
        if self.is_imported:
            notes.append(f"from {self.source}")
        if self.is_copy:
            notes.append(f"same as trial {self.copy_of}")
        if self.retry_of is not None:
            notes.append(f"trial {self.retry_of} again")
        if self.parent is not None:
            notes.append(f"continues trial {self.parent}")
        if self.outside is not None:
            notes.append("outside of the space")
        return "; ".join(notes) or None


def trial_records(
    study: optuna.Study, states: Sequence[TrialState] | None = None
) -> list[TrialRecord]:
    """Read the trials of an Optuna study in order, of all states or of some."""
    trials = study.get_trials(deepcopy=False, states=states)
    return [TrialRecord.from_frozen(trial) for trial in trials]


def trial_path(number: int) -> Path:
    """Return the folder of a trial of the search, relative to the study's."""
    return Path("trials", str(number))


def baseline_path(baseline: str, repeat: int) -> Path:
    """Return the folder of one run of a baseline, relative to the study's."""
    return Path("baselines", f"{baseline}-{repeat}")


def confirm_path(candidate: str, repeat: int) -> Path:
    """Return the folder of one confirmation run, relative to the study's."""
    return Path("confirm", f"{candidate}-{repeat}")


def finite(value: Any) -> float | None:
    """Return a value as a float; None where it is no finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    with suppress(OverflowError):  # an integer of hundreds of digits
        return float(value) if math.isfinite(value) else None
    return None
