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
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from itertools import chain
from typing import Any, cast

import optuna
from optuna.trial import TrialState
from ray.tune import Stopper
from ray.tune.search import Searcher

from amlp_ray.config import COST_OBJECTIVES, StudyConfig
from amlp_ray.errors import AmlpError
from amlp_ray.launch.run_spec import RunSpec
from amlp_ray.study.execution.stop_flags import StopWhen
from amlp_ray.study.execution.stop_reason import FINAL, RESUMABLE, StopReason
from amlp_ray.study.execution.trial import SCORES, usage_so_far
from amlp_ray.study.execution.trial_queue import QueuedTrial, TrialQueue
from amlp_ray.study.search.pruning import Pruning
from amlp_ray.study.storage.budget import BudgetTracker, Usage
from amlp_ray.study.storage.study_store import StudyStore
from amlp_ray.study.storage.trial_record import TrialStats, finite, trial_records

logger = logging.getLogger(__name__)


class InterruptTune(Stopper):
    """Make Tune return after its current step, whatever still runs.

    Tune asks `stop_all` in every step of its loop. Trials that still run are killed.
    """

    def __init__(self) -> None:
        self._is_requested = False

    def request(self) -> None:
        """Ask Tune to return; callable from any thread."""
        self._is_requested = True

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        """Never stop a single trial: it is asked by its stop flag."""
        return False

    def stop_all(self) -> bool:
        """Return whether Tune should return."""
        return self._is_requested


def _keep_error(method: Callable[..., Any]) -> Callable[..., Any]:
    """Keep an error of this package in `failure`, because Tune raises another in its place."""

    @wraps(method)
    def call(self: StudySearcher, *args: Any, **kwargs: Any) -> Any:
        try:
            return method(self, *args, **kwargs)
        except AmlpError as error:
            self.failure = self.failure or error
            raise

    return call


@dataclass
class ActiveTrial:
    """A trial that Tune runs."""

    tune_id: str  # Tune's name of it
    queued: QueuedTrial
    started: float  # when Tune got it, in seconds of the monotonic clock

    @property
    def key(self) -> tuple[optuna.Study, int]:
        """The Optuna study and the number by which the trial is stored."""
        return self.queued.study, self.queued.number

    @property
    def run(self) -> RunSpec:
        return self.queued.trial_spec.run

    @property
    def is_search(self) -> bool:
        return self.queued.trial_spec.kind == "search"

    def usage(self) -> dict[str, Any]:
        """Return what it has taken by its own files, for a trial that cannot report it."""
        return usage_so_far(self.run.folder, time.monotonic() - self.started)


class StudySearcher(Searcher):
    """Serves a study's queue until its budget is used or somebody stops it.

    Tune calls it from its own loop, and the monitor's thread calls `stop` and the like. Both hold
    the lock.

    Attributes:
        stop_reason: why no more trials are started; None while they are.
        stop_details: more about it, such as which budget is used.
        failure: an error of this package that ended Tune's loop.
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
        self.failure: AmlpError | None = None

    # Called by Tune

    @_keep_error
    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        """Return the next trial; None for none now; FINISHED if nothing is left.

        While trials run, nothing is final: a lost process brings its trial back.
        """
        with self._lock:
            queued = None if self.stop_reason else self._queue.next(self._has_room)
            if queued == "wait":
                return None
            if queued is None:
                return None if self._active else Searcher.FINISHED
            self._active[trial_id] = ActiveTrial(trial_id, queued, time.monotonic())
            _log_start(queued)
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
                self._process_died(active)
            elif "failed" in result:
                self._fail(active, result["failed"], result)
            elif "ended" in result:
                self._end(active, result)
            else:  # interrupted by Tune
                self._budget.drop(trial_id)

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
                    if active.is_search:
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

    def active_trials(self) -> dict[str, float]:
        """Return the folders of the trials that Tune has, and for how many seconds."""
        now = time.monotonic()
        with self._lock:
            return {str(a.run.folder): now - a.started for a in self._active.values()}

    def has_unfinished_trials(self) -> bool:
        """Return whether trials are left that nobody runs any more."""
        return any(trial_records(study, (TrialState.RUNNING,)) for study in self._queue.studies)

    # Budget and stop requests

    def _has_room(self, started: int) -> bool:
        return self._usage(started).reached(self._config.budget) is None

    def _usage(self, started: int) -> Usage:
        return self._budget.usage(trials=started, seconds=self._seconds())

    def _ask_to_return(self, active: ActiveTrial, when: StopWhen) -> None:
        import ray

        ray.get(self._stop_flags.request.remote(str(active.run.folder), when))

    # How trials end

    def _process_died(self, active: ActiveTrial) -> None:
        """Resume a trial whose process or node died: its parameters are not at fault."""
        lost = self._store.trial(*active.key).lost + 1
        self._store.set_attrs(*active.key, lost=lost)
        max_failures = self._config.fault_tolerance.max_failures
        if lost > max_failures:
            reason = f"its process died {lost} times (fault_tolerance.max_failures={max_failures})"
            self._fail(active, reason, active.usage())
            return
        self._budget.drop(active.tune_id)
        self._queue.requeue(active.queued)
        label = active.run.label
        logger.info("%s lost its process (%d of %d retries)", label, lost, max_failures)

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
            values = self._objective_values(active, stats, score)
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

    def _objective_values(
        self, active: ActiveTrial, stats: dict[str, Any], score: float
    ) -> list[float] | None:
        """Return one value per objective; None if one is missing or not finite.

        Baselines and confirmation runs have the study's metric alone.
        """
        if not active.is_search:
            return [score]
        values = []
        for name in self._config.objectives:
            source = stats if name in COST_OBJECTIVES else stats["scores"]
            value = finite(source.get(name))
            if value is None:
                return None
            values.append(value)
        return values

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

    def _store_stats(self, active: ActiveTrial, result: dict[str, Any]) -> dict[str, Any]:
        """Store what a trial took and scored, in one attribute: each adds a line to a journal."""
        seconds = float(result.get("seconds", time.monotonic() - active.started))
        stats: dict[str, Any] = {
            "seconds": round(seconds, 2),
            "gpu_seconds": round(seconds * active.run.gpus, 2),
        }
        measured = ("memory", "epochs", "images_per_second")
        stats |= {name: result[name] for name in measured if name in result}
        stats["scores"] = {name: result[name] for name in SCORES if name in result}
        trial_stats = cast("TrialStats", stats)
        self._budget.end(active.tune_id, trial_stats)
        self._store.set_attrs(*active.key, stats=trial_stats)
        if limits := self._config.limits:
            excess = [stats[name] - limits[name] for name in limits if stats.get(name) is not None]
            self._store.set_constraints(*active.key, excess)
        return stats


def _log_start(queued: QueuedTrial) -> None:
    verb = "continues" if queued.is_resumed else "starts"
    params = ", ".join(f"{name}={_short(value)}" for name, value in queued.params.items())
    message = f"{queued.trial_spec.run.label} {verb}"
    logger.info("%s", f"{message}: {params}" if params else message)


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
