"""Decide what a study runs next: trials to resume, baselines, then the search; or a confirmation.

All of it follows from the stored trials, so a study that was killed continues where it stopped. A
trial is stored in one step with its parameters. No trial ever has a number and no parameters.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import product
from pathlib import Path
from typing import Any, Literal

import optuna
from optuna.trial import FrozenTrial, TrialState, create_trial

from amlp_ray.config import PretrainConfig, SegmentConfig, StudyConfig
from amlp_ray.errors import ConfigError
from amlp_ray.launch.run_spec import RunSpec
from amlp_ray.study.baselines import BaselinePlan, baseline_plans
from amlp_ray.study.confirmation.confirm import confirm_seed, confirmation_plan, finetuning
from amlp_ray.study.execution.active_trial import QueuedTrial
from amlp_ray.study.rungs import rung_epochs, with_schedule
from amlp_ray.study.search.in_memory_study import TrialDelta
from amlp_ray.study.search.pbt import Population
from amlp_ray.study.search.suggester import Duplicate, Suggester, Suggestion
from amlp_ray.study.seeds import baseline_seed, derived_seed
from amlp_ray.study.storage.study_store import StudyStore
from amlp_ray.study.storage.trial_record import (
    TrialAttributes,
    TrialRecord,
    baseline_path,
    confirm_path,
    trial_records,
)
from amlp_ray.study.trial_spec import TrialKind, TrialSpec

Phase = Literal["search", "confirm"]
Wait = Literal["wait"]

logger = logging.getLogger(__name__)


class TrialQueue:
    """Hands out the trials of a study, one by one.

    Attributes:
        search, baselines, confirmation: the Optuna studies; no confirmation in a search.
    """

    def __init__(
        self,
        store: StudyStore,
        config: StudyConfig,
        *,
        data: str,
        eval_data: str | None,
        suggest_ahead: int,
        phase: Phase = "search",
    ) -> None:
        """Read what is stored; nothing is written yet.

        Args:
            data: patch dataset that trials train on.
            eval_data: another one that scores them.
            suggest_ahead: how many suggestions are made while trials run.
        """
        self._store = store
        self._config = config
        self._data = data
        self._eval_data = eval_data
        self.search = store.search()
        self.baselines = store.baselines(create=True)
        self.confirmation = store.confirmation(create=True) if phase == "confirm" else None
        self._suggester = Suggester(config, self.search.directions)
        self._population = Population(config) if config.sampler.name == "pbt" else None
        # Trials of the search that may have changed, and how many that ended use up budget.
        self._delta = TrialDelta()
        self._n_ended = 0
        self._baselines_left = self._missing_baselines() if phase == "search" else []
        self._suggest_ahead = suggest_ahead
        self._sampler_thread = ThreadPoolExecutor(1, "amlp-sampler")
        # Suggestions made ahead, each with the trial number that it was made for.
        self._suggestions: list[tuple[int, Future[Suggestion | None]]] = []
        # The trials that are being run, as (name of the Optuna study, number).
        self._busy: set[tuple[str, int]] = set()
        self._interrupted: list[tuple[optuna.Study, TrialRecord]] = []
        for study in self.studies:
            for record in trial_records(study, (TrialState.RUNNING,)):
                self._interrupted.append((study, record))

    @property
    def studies(self) -> list[optuna.Study]:
        """The Optuna studies that the queue serves."""
        return [self.baselines, self.search] if self.confirmation is None else [self.confirmation]

    def requeue(self, queued: QueuedTrial) -> None:
        """Take back a trial whose process died; it will resume from its checkpoint."""
        self.release(queued)
        record = self._store.trial(queued.study, queued.number)
        self._interrupted.append((queued.study, record))

    def release(self, queued: QueuedTrial) -> None:
        """Mark a trial as no longer run."""
        self._busy.discard((queued.study.study_name, queued.number))

    def close(self) -> None:
        """Stop making suggestions ahead."""
        self._sampler_thread.shutdown(wait=False, cancel_futures=True)

    def next(self, has_room: Callable[[int], bool]) -> QueuedTrial | Wait | None:
        """Return the next trial to run.

        Args:
            has_room: whether the budget allows one more trial, given how many trials of the
                search have been started.

        Returns:
            `wait` while it depends on trials that run; None if nothing is left to do.
        """
        while self._interrupted:
            study, record = self._interrupted.pop(0)
            if queued := self._queue(study, record, is_resumed=True):
                return queued
        if self.confirmation is not None:
            return self._next_confirmation(self.confirmation)
        return self._next_baseline() or self._next_of_search(has_room)

    # Baselines and confirmation

    def _missing_baselines(self) -> list[tuple[BaselinePlan, int]]:
        stored = {(record.baseline, record.repeat) for record in trial_records(self.baselines)}
        pairs = product(range(self._config.baseline_seeds), baseline_plans(self._config))
        return [(plan, repeat) for repeat, plan in pairs if (plan.name, repeat) not in stored]

    def _next_baseline(self) -> QueuedTrial | None:
        while self._baselines_left:
            plan, repeat = self._baselines_left.pop(0)
            attributes = TrialAttributes(
                baseline=plan.name,
                repeat=repeat,
                uses_ground_truth=plan.uses_ground_truth,
                path=str(baseline_path(plan.name, repeat)),
            )
            if queued := self._start(self.baselines, user_attrs=attributes):
                return queued
        return None

    def _next_confirmation(self, study: optuna.Study) -> QueuedTrial | None:
        stored = {(record.candidate, record.repeat) for record in trial_records(study)}
        for repeat in range(self._config.confirm.seeds):
            for candidate in confirmation_plan(self._store, self._config):
                if (candidate.name, repeat) in stored:
                    continue
                attributes = TrialAttributes(
                    candidate=candidate.name,
                    repeat=repeat,
                    uses_ground_truth=candidate.uses_ground_truth,
                    params=dict(candidate.params),
                    path=str(confirm_path(candidate.name, repeat)),
                )
                if queued := self._start(study, user_attrs=attributes):
                    return queued
        return None

    # Search

    def _next_of_search(self, has_room: Callable[[int], bool]) -> QueuedTrial | Wait | None:
        while True:
            trials = self.search.get_trials(deepcopy=False)
            changed = [TrialRecord.from_frozen(trial) for trial in self._delta.update(trials)]
            if not has_room(self._count_started(changed)):
                return None
            if self._population is not None:
                step = self._population.next_step(trials)
                if step is None or step == "wait":
                    return step
                queued = self._start(
                    self.search,
                    params=step.params,
                    distributions=step.distributions,
                    user_attrs=step.attributes,
                )
            elif waiting := [record for record in changed if record.state == TrialState.WAITING]:
                queued = self._start_enqueued(waiting[0], trials)
            else:
                suggestion = self._next_suggestion(trials)
                if suggestion == "wait":
                    return "wait"
                if suggestion is None:
                    if self._busy:
                        return "wait"  # what runs now may fail, which frees its parameters
                    logger.info("every combination of the search space was tried")
                    return None
                queued = self._start(
                    self.search,
                    params=suggestion.params,
                    distributions=suggestion.distributions,
                    system_attrs=suggestion.system_attrs,
                )
            if queued is not None:
                return queued

    def _count_started(self, changed: list[TrialRecord]) -> int:
        """Count the trials that use up the budget or will, from those that may have changed."""
        n_running = sum(record.state == TrialState.RUNNING for record in changed)
        self._n_ended += sum(record.is_finished and record.counts_in_budget for record in changed)
        return self._n_ended + n_running

    def _next_suggestion(self, trials: list[FrozenTrial]) -> Suggestion | Wait | None:
        """Return the next suggestion, made ahead if `sampler.suggest_ahead` allows it."""
        number = len(trials)
        if not self._suggest_ahead:
            return self._suggest(number, trials)
        if self._suggestions and self._suggestions[0][0] != number:
            # A trial was enqueued meanwhile, so these were made for numbers that are taken.
            for made_for, future in self._suggestions:
                future.result()
                self._suggester.discard(made_for)
            self._suggestions.clear()
        if not self._suggestions:
            self._suggest_in_thread(number, trials)
        _, future = self._suggestions[0]
        if not future.done() and self._busy:
            return "wait"  # trials that report must not wait for a suggestion
        suggestion = future.result()
        self._suggestions.pop(0)
        while len(self._suggestions) < self._suggest_ahead:
            self._suggest_in_thread(number + 1 + len(self._suggestions), trials)
        return suggestion

    def _suggest_in_thread(self, number: int, trials: list[FrozenTrial]) -> None:
        future = self._sampler_thread.submit(self._suggest, number, trials)
        self._suggestions.append((number, future))

    def _suggest(self, number: int, trials: list[FrozenTrial]) -> Suggestion | None:
        self._suggester.update(trials)
        suggestion = self._suggester.suggest(number)
        # Only enqueued values lead to duplicates.
        return suggestion if isinstance(suggestion, Suggestion) else None

    def _start_enqueued(
        self, enqueued: TrialRecord, trials: list[FrozenTrial]
    ) -> QueuedTrial | None:
        """Start a trial that a user enqueued.

        What it leaves open is sampled. One that was run before is answered from the store.
        """
        number = enqueued.number
        self._suggester.update(trials)
        try:
            suggestion = self._suggester.suggest(number, fixed=enqueued.fixed_params)
        except ConfigError as error:
            self._fail(self.search, number, str(error))
            return None
        if suggestion is None:
            self._fail(self.search, number, "what was enqueued leaves nothing of the space to try")
            return None
        if isinstance(suggestion, Duplicate):
            original = TrialRecord.from_frozen(trials[suggestion.number])
            if enqueued.retry_of is None:
                self._copy_result(number, original)
                return None
            params, distributions = original.params, original.distributions
        else:
            params, distributions = suggestion.params, suggestion.distributions
        self._store.set_attrs(self.search, number, begun=False, waiting=True)
        record = self._store.start_enqueued(self.search, number, params, distributions)
        return self._queue(self.search, record)

    def _copy_result(self, number: int, original: TrialRecord) -> None:
        """Give an enqueued trial the stored scores of a trial with the same parameters."""
        study = self.search
        self._store.set_params(study, number, original.params, original.distributions)
        for epoch, value in original.rungs.items():
            self._store.report(study, number, epoch, value)
        self._store.set_attrs(study, number, copy_of=original.number)
        self._store.finish(study, number, original.state, original.values)
        message = "trial %d has the settings of trial %d; answered from the store"
        logger.info(message, number, original.number)

    # Storing

    def _start(self, study: optuna.Study, **parts: Any) -> QueuedTrial | None:
        """Store a new trial of these parts (see `create_trial`) as RUNNING and queue it.

        It waits for its resources until the searcher says otherwise.
        """
        attributes = {**parts.pop("user_attrs", {}), "begun": False, "waiting": True}
        trial = create_trial(state=TrialState.RUNNING, user_attrs=attributes, **parts)
        return self._queue(study, self._store.add_trial(study, trial))

    def _queue(
        self, study: optuna.Study, record: TrialRecord, *, is_resumed: bool = False
    ) -> QueuedTrial | None:
        try:
            trial_spec = self._trial_spec(study, record)
        except ConfigError as error:
            # One combination of many is not allowed; the study continues without it.
            self._fail(study, record.number, str(error))
            return None
        self._busy.add((study.study_name, record.number))
        if is_resumed and not record.waiting:
            self._store.set_attrs(study, record.number, waiting=True)
        return QueuedTrial(study, record.number, trial_spec, record.params, is_resumed)

    def _fail(self, study: optuna.Study, number: int, reason: str) -> None:
        self._store.set_attrs(study, number, reason=reason)
        self._store.finish(study, number, TrialState.FAIL)
        logger.info("trial %d failed: %s", number, reason)

    # Specifications; for a resumed trial they come out the same

    def _trial_spec(self, study: optuna.Study, record: TrialRecord) -> TrialSpec:
        if study is self.baselines:
            return self._baseline_spec(record)
        if study is self.confirmation:
            return self._confirmation_spec(record)
        return self._search_spec(record)

    def _baseline_spec(self, record: TrialRecord) -> TrialSpec:
        plans = {plan.name: plan for plan in baseline_plans(self._config)}
        if (plan := plans.get(record.baseline or "")) is None:
            raise ConfigError(
                f"it was interrupted, and baselines does not name {record.baseline} any more."
            )
        # Repeats share seeds across baselines, so that baselines are compared in pairs.
        config = plan.config(baseline_seed(self._config.seed, record.repeat))
        label = f"baseline {record.baseline}-{record.repeat}"
        return self._make_spec("baseline", record, label, config)

    def _confirmation_spec(self, record: TrialRecord) -> TrialSpec:
        plan = confirmation_plan(self._store, self._config)
        candidates = {candidate.name: candidate for candidate in plan}
        if (candidate := candidates.get(record.candidate or "")) is None:
            raise ConfigError(
                f"it was interrupted, and {record.candidate} is not confirmed any more."
            )
        return self._make_spec(
            "confirm",
            record,
            f"confirm {record.candidate}-{record.repeat}",
            candidate.config(confirm_seed(self._config, record.repeat)),
            finetune=finetuning(self._config, record.repeat),
        )

    def _search_spec(self, record: TrialRecord) -> TrialSpec:
        number = record.number
        until = None
        fork = None
        if self._population is None:
            values = self._suggester.config_of(record.params)
            seed = derived_seed(self._config.seed, "trial", number)
        else:
            step = self._population.step_of(self.search.get_trials(deepcopy=False), number)
            values = step.values
            seed = step.seed
            until = step.until
            if step.parent is not None:
                fork = self._store.trial_folder(step.parent)
        config = with_schedule(self._config.trial(values, seed=seed), self._config.pruner)
        return self._make_spec("search", record, f"trial {number}", config, until=until, fork=fork)

    def _make_spec(
        self,
        kind: TrialKind,
        record: TrialRecord,
        label: str,
        config: PretrainConfig,
        *,
        until: int | None = None,
        fork: Path | None = None,
        finetune: SegmentConfig | None = None,
    ) -> TrialSpec:
        run = RunSpec(
            config=config,
            data=self._data,
            folder=self._store.folder_of(record),
            probe=self._config.probe,
            rungs=self._rungs(config, until),
            resources=self._config.resources,
            fault_tolerance=self._config.fault_tolerance.for_trial(),
            tracking=self._config.tracking,
            study=self._config.name,
            label=label,
            eval_data=self._eval_data,
            until=until,
            fork=fork,
        )
        return TrialSpec(kind=kind, number=record.number, run=run, finetune=finetune)

    def _rungs(self, config: PretrainConfig, until: int | None) -> tuple[int, ...]:
        if config.objective == "none":
            return (0,)
        if until is not None:
            return (until,)
        return rung_epochs(config.epochs, self._config.pruner)
