"""Connect Tune and Optuna: Optuna decides, Tune executes.

A Tune searcher hands out the trials of a study's queue, passes on what they report, lets the
pruner decide, and stores how each trial ended. It keeps no state that matters. A new searcher on
the same store continues where a killed one stopped.

All knowledge of Tune stands here and in the driver.
"""

from __future__ import annotations

import logging
import math
import re
import threading
import time
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from functools import wraps
from itertools import chain
from typing import Any

from optuna.trial import TrialState
from ray.tune.search import Searcher

from amlp_ray.config import StudyConfig
from amlp_ray.runtime.resources import ANSWER_S
from amlp_ray.study.execution.active_trial import ActiveTrial
from amlp_ray.study.execution.interrupt import InterruptTune
from amlp_ray.study.execution.stop_flags import StopWhen
from amlp_ray.study.execution.stop_reason import FINAL, RESUMABLE, StopReason
from amlp_ray.study.execution.storage_pause import StoragePause
from amlp_ray.study.execution.trial_queue import TrialQueue
from amlp_ray.study.search.pruning import Pruning
from amlp_ray.study.storage.budget import BudgetTracker, Usage
from amlp_ray.study.storage.study_store import StudyStore
from amlp_ray.study.storage.trial_record import TrialStats, trial_records

logger = logging.getLogger(__name__)


def _keep_error(method: Callable[..., Any]) -> Callable[..., Any]:
    """Keep an error in `failure`, because Tune raises another in its place."""

    @wraps(method)
    def call(self: StudySearcher, *args: Any, **kwargs: Any) -> Any:
        try:
            return method(self, *args, **kwargs)
        except Exception as error:
            self.record_failure(error)
            raise

    return call


class StudySearcher(Searcher):
    """Serves a study's queue until its budget is used or somebody stops it.

    Tune calls it from its own loop, and the monitor's thread calls `stop` and the like. Both hold
    the lock.

    Attributes:
        stop_reason: why no more trials are started; None while they are.
        stop_details: more about it, such as which budget is used.
        failure: the first error, of any thread, that has ended the run.
        has_finished: whether nothing was left to run.
        interrupt: makes Tune return at once.
    """

    def __init__(
        self,
        store: StudyStore,
        config: StudyConfig,
        queue: TrialQueue,
        *,
        images: int,
        stop_flags: Any,
        seconds: Callable[[], float],
    ) -> None:
        """Read what the stored trials have used.

        Args:
            images: number of images that a trial trains on.
            stop_flags: actor handle of the trials' `StopFlags`.
            seconds: returns how long the study has been run, all runs together.
        """
        super().__init__(metric=config.metric, mode="max")
        is_acronym = config.metric in ("dsc", "ap", "ppv")
        self._metric_name = config.metric.upper() if is_acronym else config.metric
        self._store = store
        self._config = config
        self._queue = queue
        self._stop_flags = stop_flags
        self._seconds = seconds
        self._pruning = Pruning(queue.search, config, images, store.trial_folder)
        stored = chain.from_iterable(trial_records(study) for study in queue.studies)
        # Others are counted when they end.
        self._budget = BudgetTracker.from_trials(trial for trial in stored if trial.is_finished)
        self._active: dict[str, ActiveTrial] = {}
        # Of each trial that ended: the reason if it failed, None if it did not.
        self._failures: list[str | None] = []
        self._lock = threading.RLock()
        self.stop_reason: StopReason | None = None
        self.stop_details = ""
        self.failure: Exception | None = None
        self.has_finished = False
        self.interrupt = InterruptTune()
        self._pause = StoragePause(store.folder, config.fault_tolerance.pause_minutes)
        # What Ray said about the last process that died, by Tune's name of the trial.
        self._deaths: dict[str, str] = {}

    # Called by Tune

    @_keep_error
    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        """Return the next trial; None for none now; FINISHED if nothing is left.

        While trials run, nothing is final: a lost process brings its trial back.
        """
        with self._lock:
            if self.interrupt.is_requested:
                return Searcher.FINISHED
            if self.stop_reason is None and self._pause.is_on():
                return None
            queued = None if self.stop_reason else self._queue.next(self._has_room)
            if queued == "wait":
                return None
            if queued is None:
                self.has_finished = not self._active
                return Searcher.FINISHED if self.has_finished else None
            active = ActiveTrial(trial_id, queued)
            self._active[trial_id] = active
            active.log_start()
            return {
                "trial_spec": queued.trial_spec.model_dump(mode="json"),
                "stop_flags": self._stop_flags,
            }

    @_keep_error
    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Store a rung's score and, if the pruner says so, ask the trial to return."""
        with self._lock:
            active = self._active.get(trial_id)
            is_rung = "epoch" in result and "ended" not in result and "failed" not in result
            # After a lost lease the next driver will read and store what the trial reports.
            if active is None or not is_rung or self.stop_reason == StopReason.LEASE_LOST:
                return
            self._pause.reset()
            self._mark_started(active)
            run = active.run
            epoch = int(result["epoch"])
            value = result.get(self._config.metric, math.nan)
            self._budget.report(
                trial_id,
                epochs=result.get("epochs", epoch),
                gpu_seconds=result.get("seconds", 0.0) * run.gpus,
            )
            if self._store.report(*active.key, epoch, value):
                logger.info("%s epoch %d: %s %.3f", run.label, epoch, self._metric_name, value)
            if epoch >= max(run.rungs):
                return
            if active.is_search and self._pruning.should_prune(active.queued.number, epoch):
                self._ask_to_return(active, "now")
            self.check_budget()

    @_keep_error
    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """Store how a trial ended. One that was only interrupted stays RUNNING and is resumed."""
        with self._lock:
            active = self._active.pop(trial_id, None)
            if active is None:
                return
            result = result or {}
            if self.stop_reason == StopReason.LEASE_LOST:
                # The store belongs to another driver or is gone.
                self._budget.drop(trial_id)
            elif error:
                self._process_died(active, self._deaths.pop(trial_id, ""))
            elif result.get("storage"):
                self._storage_failed(active, result["failed"])
            elif "failed" in result:
                self._fail(active, result["failed"], result)
            elif "ended" in result:
                self._end(active, result)
            else:  # interrupted by Tune
                self._budget.drop(trial_id)

    def note_death(self, trial_id: str, cause: str) -> None:
        """Keep why the process of a trial died, which Tune does not pass to a searcher."""
        self._deaths[trial_id] = cause

    def save(self, checkpoint_path: str) -> None:
        """Save nothing: the store is the only truth."""

    def restore(self, checkpoint_path: str) -> None:
        """Restore nothing: a study is resumed by a new searcher on its store."""

    def __getstate__(self) -> dict[str, Any]:
        """Pickle nothing; Tune's own records pickle every searcher."""
        return {}

    # Called by the monitor

    def stop(self, reason: StopReason, details: str = "") -> None:
        """Start no more trials; `StopReason` says what happens to those that run."""
        with self._lock:
            if not self._replaces(reason):
                return
            self.stop_reason = reason
            self.stop_details = details
            active_trials = list(self._active.values())
            if reason != StopReason.STOP:
                when: StopWhen = "rung" if reason == StopReason.BUDGET else "now"
                for active in active_trials:
                    self._ask_to_return(active, when)
            if reason == StopReason.CANCEL:
                self._active.clear()
                for active in active_trials:
                    if active.is_search and active.started is not None:
                        self._fail(active, "cancelled", active.usage())
                    else:
                        self._budget.drop(active.tune_id)

    def _replaces(self, reason: StopReason) -> bool:
        """Return whether a new reason to stop takes the place of the one there is."""
        if self.stop_reason is None:
            return True
        if reason in (self.stop_reason, StopReason.STOP):
            return False  # running trials were asked to return already
        overrides = (StopReason.CANCEL, StopReason.LEASE_LOST)
        return self.stop_reason not in FINAL or reason in overrides

    def check_budget(self) -> None:
        """Stop if a budget other than the number of trials is used; that one ends by itself.

        A confirmation has no budget.
        """
        with self._lock:
            if self.stop_reason is not None or self._queue.confirmation is not None:
                return
            used_up = self._usage(0).reached(self._config.budget, but_trials=True)
            if used_up:
                logger.info("budget used: %s; running trials end at their next rung", used_up)
                self.stop(StopReason.BUDGET, used_up)

    def change_budget(self, config: StudyConfig) -> None:
        """Use the budget of another config from now on."""
        with self._lock:
            self._config = config

    def mark_started(self, folders: Collection[str]) -> None:
        """Store that trials have their resources, by their folders."""
        with self._lock:
            for active in self._active.values():
                if str(active.run.folder) in folders:
                    self._mark_started(active)

    def waiting_times(self) -> list[float]:
        """Return for how many seconds each trial that Tune has waits for resources; 0 if not."""
        with self._lock:
            return [active.waited for active in self._active.values()]

    def check_storage(self) -> None:
        """Raise StorageError if trials could not write their folders for too long."""
        with self._lock:
            self._pause.check()

    def record_failure(self, error: Exception) -> None:
        """Keep the first error that ends the run."""
        self.failure = self.failure or error

    # Budget and stop requests

    def _has_room(self, started: int) -> bool:
        return self._usage(started).reached(self._config.budget) is None

    def _usage(self, started: int) -> Usage:
        return self._budget.usage(trials=started, seconds=self._seconds())

    def _ask_to_return(self, active: ActiveTrial, when: StopWhen) -> None:
        import ray

        request = self._stop_flags.request.remote(str(active.run.folder), when)
        # Without the actor the trial cannot be asked. The monitor ends the run then.
        with suppress(ray.exceptions.RayError):
            ray.get(request, timeout=ANSWER_S)

    # How trials start and end

    def _mark_started(self, active: ActiveTrial) -> None:
        if active.started is not None:
            return
        active.started = time.monotonic()
        record = self._store.trial(*active.key)
        if not record.begun:
            self._store.set_attrs(*active.key, begun=True)
        if record.waiting:
            self._store.set_attrs(*active.key, waiting=False)

    def _storage_failed(self, active: ActiveTrial, reason: str) -> None:
        """Pause the study and resume the trial afterwards: its parameters are not at fault."""
        self._budget.drop(active.tune_id)
        self._queue.requeue(active.queued)
        self._pause.begin(f"{active.run.label}: {reason}")

    def _process_died(self, active: ActiveTrial, cause: str) -> None:
        """Resume a trial whose process or node died: its parameters are not at fault."""
        lost = self._store.trial(*active.key).lost + 1
        self._store.set_attrs(*active.key, lost=lost)
        max_failures = self._config.fault_tolerance.max_failures
        suffix = f": {cause}" if cause else ""
        if lost > max_failures:
            setting = f"(fault_tolerance.max_failures={max_failures})"
            reason = f"its process died {lost} times {setting}{suffix}"
            self._fail(active, reason, active.usage())
            return
        self._budget.drop(active.tune_id)
        self._queue.requeue(active.queued)
        message = f"lost its process ({lost} of {max_failures} retries){suffix}"
        logger.info("%s %s", active.run.label, message)

    def _end(self, active: ActiveTrial, result: dict[str, Any]) -> None:
        """Store a trial that returned by itself: at its end, pruned, or asked to."""
        run = active.run
        scores = self._store.trial(*active.key).rungs
        last_rung = max(scores, default=None)
        has_all_rungs = last_rung is not None and last_rung >= max(run.rungs)
        if not has_all_rungs and self.stop_reason in RESUMABLE:
            self._budget.drop(active.tune_id)
            self._queue.release(active.queued)
            logger.info("%s paused after epoch %d", run.label, result.get("epochs", 0))
            return
        if last_rung is None:
            self._fail(active, self._no_score_reason(), result)
            return
        stats = self._store_stats(active, result)
        score = scores[last_rung]
        if has_all_rungs and run.last_epoch >= run.config.epochs:
            values = active.objective_values(self._config, stats, score)
            if values is None:
                self._store_failure(active, "an objective is missing or not finite")
                return
            self._finish(active, TrialState.COMPLETE, values, "complete", score)
            return
        if self.stop_reason == StopReason.BUDGET:
            self._store.set_attrs(*active.key, reason=f"budget: {self.stop_details}")
        # The score at a rung is a value of the trial only where it is its one objective.
        is_only_objective = list(self._config.objectives) == [self._config.metric]
        partial_values = [score] if is_only_objective or not active.is_search else None
        word = "ends its step" if has_all_rungs else "pruned"
        message = f"{word} at epoch {last_rung}"
        self._finish(active, TrialState.PRUNED, partial_values, message, score)

    def _finish(
        self,
        active: ActiveTrial,
        state: TrialState,
        values: list[float] | None,
        message: str,
        score: float,
    ) -> None:
        self._store.finish(*active.key, state, values)
        self._queue.release(active.queued)
        self._failures.append(None)
        logger.info("%s %s: %s %.3f", active.run.label, message, self._metric_name, score)

    def _no_score_reason(self) -> str:
        if self.stop_reason == StopReason.BUDGET:
            return f"budget used before its first rung: {self.stop_details}"
        return f"no rung gave a finite {self._metric_name}"

    def _fail(self, active: ActiveTrial, reason: str, result: dict[str, Any]) -> None:
        self._store_stats(active, result)
        self._store_failure(active, reason)

    def _store_failure(self, active: ActiveTrial, reason: str) -> None:
        """Store a trial as failed; stop the study if all of its first trials failed alike."""
        self._store.set_attrs(*active.key, reason=reason)
        self._store.finish(*active.key, TrialState.FAIL)
        self._queue.release(active.queued)
        logger.info("%s failed: %s", active.run.label, reason)
        # Reasons that differ in numbers only, such as the epoch, are the same.
        self._failures.append(re.sub(r"\d+", "#", reason))
        limit = self._config.fault_tolerance.max_identical_failures
        if len(self._failures) == limit and self._failures[0] and len(set(self._failures)) == 1:
            self.stop(StopReason.IDENTICAL_FAILURES, reason)

    def _store_stats(self, active: ActiveTrial, result: dict[str, Any]) -> TrialStats:
        """Store what a trial took and scored, in one attribute: each adds a line to a journal."""
        stats = active.stats(result)
        self._budget.end(active.tune_id, stats)
        self._store.set_attrs(*active.key, stats=stats)
        if limits := self._config.limits:
            costs: Mapping[str, Any] = stats
            excess = [costs[name] - limits[name] for name in limits if costs.get(name) is not None]
            self._store.set_constraints(*active.key, excess)
        return stats
