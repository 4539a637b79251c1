"""What a study does next: trials to take over, baseline baselines, then the search; or a confirmation.

All of it follows from the stored trials, so a study that was killed goes on where it stopped. A trial is stored in one
step, with its settings: there is no moment in which it has a number and no settings.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

import optuna
from optuna.trial import FrozenTrial, TrialState

from amlp_ray.config import PretrainConfig, StudyConfig
from amlp_ray.errors import ConfigError
from amlp_ray.study.baselines import BaselinePlan, baseline_plans
from amlp_ray.study.confirmation.confirm import confirm_seed, confirmation_plan, finetuning
from amlp_ray.study.rungs import rung_epochs, with_schedule
from amlp_ray.study.search.in_memory_study import TrialDelta
from amlp_ray.study.search.pbt import WAIT, PbtStep, Population
from amlp_ray.study.search.suggester import Duplicate, Suggester, Suggestion
from amlp_ray.study.seeds import derived_seed
from amlp_ray.study.storage.budget import counts_in_budget
from amlp_ray.study.storage.study_store import StudyStore
from amlp_ray.study.trial_spec import TrialSpec

Phase = Literal["search", "confirm"]
Wait = Literal["wait"]


@dataclass(frozen=True)
class QueuedTrial:
    """A stored trial that is to be run."""

    study: optuna.Study  # one of the three
    trial_id: int
    number: int
    trial_spec: TrialSpec
    params: Mapping[str, Any]  # for a person
    resumed: bool = False


class TrialQueue:
    """Hands out work; `busy` says which trials of the store are being run, as (Optuna study, number)."""

    def __init__(
        self,
        store: StudyStore,
        config: StudyConfig,
        *,
        data: str,
        eval_data: str | None,
        suggest_ahead: int,
        phase: Phase = "search",
        notify: Callable[[str], None],
    ) -> None:
        self._store, self._settings, self._notify = store, config, notify
        self._data, self._labels = data, eval_data
        self.search, self.baselines = store.search(), store.baselines(create=True)
        self.confirmation = store.confirmation(create=True) if phase == "confirm" else None
        self._proposer = Suggester(config, self.search.directions)
        self._news, self._begun = (
            TrialDelta(),
            0,
        )  # what may have changed in the search; trials of it that count and ended
        self._arms_left = self._missing_arms() if phase == "search" else []
        self._population = Population(config) if config.sampler.name == "pbt" else None
        self._suggest_ahead = suggest_ahead
        self._thread = ThreadPoolExecutor(1, "amlp-sampler")
        self._suggestions: list[
            tuple[int, Future[Suggestion | None]]
        ] = []  # by the number they were made for
        self.busy: set[tuple[str, int]] = set()
        self._left = [
            (s, t) for s in self.studies for t in s.get_trials(states=(TrialState.RUNNING,))
        ]

    @property
    def studies(self) -> list[optuna.Study]:
        return [self.baselines, self.search] if self.confirmation is None else [self.confirmation]

    def lost(self, study: optuna.Study, number: int) -> None:
        """Take back a trial whose process died: it goes on from its checkpoint."""
        self.busy.discard((study.study_name, number))
        self._left.append((study, study.get_trials(deepcopy=False)[number]))

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)

    def next(self, trials_left: Callable[[int], bool]) -> QueuedTrial | Wait | None:
        """The next work; `wait` while it depends on trials that run; None where nothing is left to do.

        Args:
            trials_left: whether the budget has room for one more, given how many trials of the search were begun.
        """
        while self._left:  # of a driver or a process that died: same number, from its checkpoint
            study, trial = self._left.pop(0)
            if work := self._work(study, trial._trial_id, trial, resumed=True):
                return work
        if self.confirmation is not None:
            return self._next_confirmation(self.confirmation)
        return self._next_arm() or self._next_trial(trials_left)

    # Baselines and confirmation

    def _missing_arms(self) -> list[tuple[BaselinePlan, int]]:
        there = {
            (t.user_attrs["baseline"], t.user_attrs["repeat"])
            for t in self.baselines.get_trials(deepcopy=False)
        }
        plans, repeats = baseline_plans(self._settings), range(self._settings.baseline_seeds)
        return [
            (plan, repeat)
            for repeat in repeats
            for plan in plans
            if (plan.name, repeat) not in there
        ]

    def _next_arm(self) -> QueuedTrial | None:
        while self._arms_left:
            plan, repeat = self._arms_left.pop(0)
            about = {"baseline": plan.name, "repeat": repeat, "uses_ground_truth": plan.diagnosis}
            path = self._relative(self._store.baseline_folder(plan.name, repeat))
            if work := self._begin(self.baselines, attributes=about | {"path": path}):
                return work
        return None

    def _next_confirmation(self, study: optuna.Study) -> QueuedTrial | None:
        there = {
            (t.user_attrs["candidate"], t.user_attrs["repeat"])
            for t in study.get_trials(deepcopy=False)
        }
        for repeat in range(self._settings.confirm.seeds):
            for candidate in confirmation_plan(self._store, self._settings):
                if (candidate.name, repeat) not in there:
                    path = self._relative(self._store.confirm_folder(candidate.name, repeat))
                    about = {
                        "candidate": candidate.name,
                        "repeat": repeat,
                        "uses_ground_truth": candidate.diagnosis,
                        "params": dict(candidate.params),
                        "path": path,
                    }
                    if work := self._begin(study, attributes=about):
                        return work
        return None

    # Search

    def _next_trial(self, trials_left: Callable[[int], bool]) -> QueuedTrial | Wait | None:
        while True:
            trials = self.search.get_trials(deepcopy=False)
            news = self._news.of(trials)
            self._begun += sum(counts_in_budget(t) for t in news if t.state.is_finished())
            if not trials_left(
                self._begun + sum(counts_in_budget(t) for t in news if not t.state.is_finished())
            ):
                return None
            if self._population is not None:
                segment = self._population.next(trials)
                if segment is None or segment is WAIT:
                    return None if segment is None else "wait"
                if work := self._begin_segment(segment):
                    return work
                continue
            waiting = next((t for t in news if t.state == TrialState.WAITING), None)
            if waiting is not None:
                if work := self._begin_enqueued(waiting, trials):
                    return work
                continue
            proposal = self._suggestion(trials)
            if proposal == "wait":
                return "wait"
            if proposal is None:
                if self.busy:
                    return "wait"  # what runs now may fail, and its settings be free again
                self._notify("every combination of the search space was tried")
                return None
            work = self._begin(
                self.search,
                params=proposal.params,
                distributions=proposal.distributions,
                system=proposal.system_attrs,
            )
            if work is not None:
                return work

    def _suggestion(self, trials: list[FrozenTrial]) -> Suggestion | Wait | None:
        """The next suggestion, made beforehand where it may be: see `sampler.suggest_ahead`."""
        number = len(trials)
        if not self._suggest_ahead:
            return self._propose(number, trials)
        if (
            self._suggestions and self._suggestions[0][0] != number
        ):  # somebody enqueued a trial meanwhile
            for made_for, made in self._suggestions:
                made.result()
                self._proposer.forget(made_for)
            self._suggestions.clear()
        if not self._suggestions:
            self._suggest(number, trials)
        _, made = self._suggestions[0]
        if not made.done() and self.busy:
            return "wait"  # never stand in the way of trials that report
        proposal = made.result()
        self._suggestions.pop(0)
        while len(self._suggestions) < self._suggest_ahead:
            self._suggest(number + 1 + len(self._suggestions), trials)
        return proposal

    def _suggest(self, number: int, trials: list[FrozenTrial]) -> None:
        self._suggestions.append((number, self._thread.submit(self._propose, number, trials)))

    def _propose(self, number: int, trials: list[FrozenTrial]) -> Suggestion | None:
        self._proposer.sync(trials)
        proposal = self._proposer.propose(number)
        return (
            proposal if isinstance(proposal, Suggestion) else None
        )  # duplicates come of enqueued values only

    def _begin_enqueued(
        self, waiting: FrozenTrial, trials: list[FrozenTrial]
    ) -> QueuedTrial | None:
        """A trial that a user asked for: what it leaves open is sampled; what was run before is answered by that."""
        storage, trial_id = self._store.storage(), waiting._trial_id
        self._proposer.sync(trials)
        try:
            found = self._proposer.propose(
                waiting.number, fixed=waiting.system_attrs.get("fixed_params", {})
            )
        except ConfigError as error:
            self.fail(self.search, trial_id, str(error))
            return None
        known = trials[found.number] if isinstance(found, Duplicate) else None
        asked = found if isinstance(found, Suggestion) else known
        if asked is None:
            self.fail(self.search, trial_id, "what was enqueued leaves nothing of the space to try")
            return None
        for name, distribution in asked.distributions.items():
            storage.set_trial_param(
                trial_id, name, distribution.to_internal_repr(asked.params[name]), distribution
            )
        if known is not None and "retry_of" not in waiting.user_attrs:
            for epoch, value in known.intermediate_values.items():
                storage.set_trial_intermediate_value(trial_id, epoch, value)
            storage.set_trial_user_attr(trial_id, "copy_of", known.number)
            storage.set_trial_state_values(trial_id, known.state, known.values)
            self._notify(
                f"trial {waiting.number} has the settings of trial {known.number}; answered from the store"
            )
            return None
        storage.set_trial_state_values(trial_id, TrialState.RUNNING)
        return self._work(self.search, trial_id, storage.get_trial(trial_id))

    def _begin_segment(self, segment: PbtStep) -> QueuedTrial | None:
        return self._begin(
            self.search,
            params=segment.params,
            distributions=segment.distributions,
            attributes=segment.user_attrs,
        )

    # Storing

    def _begin(
        self,
        study: optuna.Study,
        *,
        params: Mapping[str, Any] | None = None,
        distributions: Mapping[str, Any] | None = None,
        attributes: Mapping[str, Any] | None = None,
        system: Mapping[str, Any] | None = None,
    ) -> QueuedTrial | None:
        storage = self._store.storage()
        template = _template(params or {}, distributions or {}, attributes or {}, system or {})
        trial_id = storage.create_new_trial(study._study_id, template)
        return self._work(study, trial_id, storage.get_trial(trial_id))

    def _work(
        self, study: optuna.Study, trial_id: int, trial: FrozenTrial, *, resumed: bool = False
    ) -> QueuedTrial | None:
        try:
            trial_spec = self._task(study, trial)
        except ConfigError as error:  # one combination in many; the study goes on without it
            self.fail(study, trial_id, str(error))
            return None
        self.busy.add((study.study_name, trial.number))
        return QueuedTrial(study, trial_id, trial.number, trial_spec, trial.params, resumed)

    def fail(self, study: optuna.Study, trial_id: int, reason: str) -> None:
        """Tell that a trial failed, and why."""
        storage = self._store.storage()
        storage.set_trial_user_attr(trial_id, "reason", reason)
        storage.set_trial_state_values(trial_id, TrialState.FAIL)
        self._notify(f"trial {storage.get_trial(trial_id).number} failed: {reason}")

    def _relative(self, folder: Path) -> str:
        return str(folder.relative_to(self._store.folder))

    def _task(self, study: optuna.Study, trial: FrozenTrial) -> TrialSpec:
        """What the trial is told; worked out again, to the same, for one that is taken over."""
        s, about = self._settings, trial.user_attrs
        until, fork = None, None
        if study is self.baselines:
            plan = next(
                (plan for plan in baseline_plans(s) if plan.name == about["baseline"]), None
            )
            if plan is None:
                raise ConfigError(
                    f"it was interrupted, and baselines does not name {about['baseline']} any more."
                )
            label, kind = f"baseline {about['baseline']}-{about['repeat']}", "baseline"
            folder = self._store.baseline_folder(about["baseline"], about["repeat"])
            # Repeats share seeds across baselines, so that baselines are compared in pairs.
            config = plan.config(derived_seed(s.seed, "baseline", about["repeat"]))
        elif study is self.confirmation:
            plan_of = {c.name: c for c in confirmation_plan(self._store, s)}
            if about["candidate"] not in plan_of:
                raise ConfigError(
                    f"it was interrupted, and {about['candidate']} is not confirmed any more."
                )
            label, kind = f"confirm {about['candidate']}-{about['repeat']}", "confirm"
            folder = self._store.confirm_folder(about["candidate"], about["repeat"])
            config = plan_of[about["candidate"]].config(confirm_seed(s, about["repeat"]))
        else:
            label, kind, folder = (
                f"trial {trial.number}",
                "search",
                self._store.trial_folder(trial.number),
            )
            if self._population is not None:
                segment = self._population.segment(
                    self.search.get_trials(deepcopy=False), trial.number
                )
                values, until, seed = segment.values, segment.until, segment.seed
                fork = (
                    None
                    if segment.parent is None
                    else str(self._store.trial_folder(segment.parent))
                )
            else:
                values = self._proposer.values(trial.params)
                seed = derived_seed(s.seed, "trial", trial.number)
            config = with_schedule(s.trial(values, seed=seed), s.pruner)
        return TrialSpec(
            study=s.name,
            kind=kind,
            number=trial.number,
            label=label,
            folder=str(folder),
            data=self._data,
            eval_data=self._labels,
            config=config,
            probe=s.probe,
            resources=s.resources,
            fault_tolerance=s.fault_tolerance.for_trial(),
            tracking=s.tracking,
            rungs=self._rungs(config, until),
            until=until,
            fork=fork,
            finetune=finetuning(s, about["repeat"]) if kind == "confirm" else None,
        )

    def _rungs(self, config: PretrainConfig, until: int | None) -> tuple[int, ...]:
        if config.objective == "none":
            return (0,)
        if until is not None:
            return (until,)
        return rung_epochs(config.epochs, self._settings.pruner)


def _template(
    params: Mapping[str, Any],
    distributions: Mapping[str, Any],
    attributes: Mapping[str, Any],
    system: Mapping[str, Any],
) -> FrozenTrial:
    """A running trial, as it is to be stored; the storage gives it a number."""
    return FrozenTrial(
        number=-1,
        trial_id=-1,
        state=TrialState.RUNNING,
        value=None,
        datetime_start=datetime.now(),
        datetime_complete=None,
        params=dict(params),
        distributions=dict(distributions),
        user_attrs=dict(attributes),
        system_attrs=dict(system),
        intermediate_values={},
    )
