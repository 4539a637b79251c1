"""The bridge between Tune and Optuna: Optuna decides, Tune executes.

A Tune searcher over a study's queue: hands out work, passes on what trials report, lets the pruner decide and tells
each trial's end truthfully. It keeps no state that matters: all of it is in the store, so a new searcher on the same
store goes on where a killed one stopped.
"""

from __future__ import annotations

import math
import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any, Literal

from optuna.trial import TrialState
from ray.tune.search import Searcher

from amlp_ray.config import COSTS, StudyConfig
from amlp_ray.errors import AmlpError
from amlp_ray.study.execution.trial import SCORES, spent_so_far
from amlp_ray.study.execution.trial_queue import QueuedTrial, TrialQueue
from amlp_ray.study.search.pruning import Pruning
from amlp_ray.study.storage.budget import BudgetTracker, Usage
from amlp_ray.study.storage.study_store import StudyStore

Notify = Callable[[str], None]
Ending = Literal[
    "pause", "stop", "cancel", "budget", "max_identical_failures", "lease", "resources"
]


def _noted(method: Callable[..., Any]) -> Callable[..., Any]:
    """Keep an error of ours for the driver."""

    @wraps(method)
    def call(self: StudySearcher, *args: Any, **named: Any) -> Any:
        try:
            return method(self, *args, **named)
        except AmlpError as error:
            self.failure = self.failure or error
            raise

    return call


@dataclass
class ActiveTrial:
    """Work that Tune runs."""

    work: QueuedTrial
    started: float  # monotonic
    epoch: int = 0  # of the last rung

    def spent(self) -> dict[str, Any]:
        """What it has taken by its own files, take-overs included, where it cannot say so itself."""
        return spent_so_far(Path(self.work.trial_spec.folder), time.monotonic() - self.started)


class StudySearcher(Searcher):
    """Serves a study's queue until its budget is used, or somebody ends it.

    Tune calls it from its own loop; the driver's thread calls `end` and the like, so both hold `self._lock`.
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
        notify: Notify,
    ) -> None:
        """Args: seconds: how long the study has been run, all runs together. board: the trials' StopFlags."""
        super().__init__(metric=config.metric, mode="max")
        self._store, self._settings, self._queue = store, config, queue
        self._board, self._seconds, self._notify = stop_flags, seconds, notify
        self._pruning = Pruning(queue.search, config, images, store.trial_folder)
        stored = [t for study in queue.studies for t in study.get_trials(deepcopy=False)]
        self._ledger = BudgetTracker.of(
            t for t in stored if t.state.is_finished()
        )  # others are counted when they end
        self._running: dict[str, ActiveTrial] = {}
        self._first_ends: list[
            str | None
        ] = []  # the reason of each that failed, None of one that did not
        self._lock = threading.RLock()
        self.ending: Ending | None = None
        self.ending_reason = ""
        self.failure: AmlpError | None = None  # why Tune's loop had to end

    # Tune's side

    @_noted
    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        """What to run next; None: nothing now; FINISHED where nothing is left and nothing runs that could come back."""
        with self._lock:
            work = None if self.ending else self._queue.next(self._room)
            if work is None or work == "wait":
                return None if self._running or work == "wait" else Searcher.FINISHED
            self._running[trial_id] = ActiveTrial(work, time.monotonic())
            shown = ", ".join(f"{name}={_short(value)}" for name, value in work.params.items())
            verb = "continues" if work.resumed else "starts"
            self._notify(f"{work.trial_spec.label} {verb}" + (f": {shown}" if shown else ""))
            return {"trial_spec": work.trial_spec.as_config(), "stop_flags": self._board}

    @_noted
    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Store a rung's score and, where the pruner says so, ask the trial to return."""
        with self._lock:
            running = self._running.get(trial_id)
            if running is None or "epoch" not in result or "ended" in result or "failed" in result:
                return
            if (
                self.ending == "lease"
            ):  # what it says now is for the next driver to hear, and to store
                return
            trial_spec, epoch, value = (
                running.work.trial_spec,
                int(result["epoch"]),
                result.get(self._settings.metric, math.nan),
            )
            running.epoch = epoch
            self._ledger.report(
                trial_id,
                epochs=result.get("epochs", epoch),
                gpu_seconds=result.get("seconds", 0.0) * trial_spec.gpus,
            )
            if self._pruning.report(running.work.study, running.work.number, epoch, value):
                self._notify(
                    f"{trial_spec.label} epoch {epoch}: {_name(self._settings.metric)} {value:.3f}"
                )
            if epoch >= max(trial_spec.rungs):
                return
            if trial_spec.kind == "search" and self._pruning.should_prune(
                running.work.number, epoch
            ):
                self._ask(trial_spec.folder, "now")
            self.check_budget()

    @_noted
    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """Tell how the trial ended. One that was merely interrupted stays RUNNING, to be taken over."""
        with self._lock:
            running = self._running.pop(trial_id, None)
            if running is None:
                return
            result = result or {}
            if (
                self.ending == "lease"
            ):  # the store is another driver's, or gone; the next one takes the trial over
                self._ledger.drop(trial_id)
            elif error:
                self._lost(trial_id, running)
            elif "failed" in result:
                self._fail(trial_id, running, result["failed"], result)
            elif "ended" in result:
                self._end(trial_id, running, result)
            else:  # interrupted by Tune
                self._ledger.drop(trial_id)

    def save(self, checkpoint_path: str) -> None:
        """Nothing to save: the store is the only truth."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing to restore: a study is continued by a new searcher on its store."""

    def __getstate__(self) -> dict[str, Any]:
        """Nothing either for Tune's own records, which pickle a searcher whether it likes that or not."""
        return {}

    # The driver's side

    def end(self, ending: Ending, reason: str = "") -> None:
        """Begin no more trials; what happens to those that run depends on why.

        - `stop`: they finish.
        - `pause`, `lease`, `resources`: they return after their epoch, are not told, and are continued later.
        - `budget`: they return after their rung, told PRUNED.
        - `cancel`: they are told FAIL at once; baselines and confirmation runs, which nothing replaces, are not told.
        - `alike`: they return, told as what they are.
        """
        with self._lock:
            if self.ending == ending or (
                self.ending in ("cancel", "max_identical_failures")
                and ending not in ("cancel", "lease")
            ):
                return
            if (
                ending == "stop" and self.ending is not None
            ):  # running trials were asked to return already
                return
            self.ending, self.ending_reason = ending, reason
            for running in list(self._running.values()):
                if ending == "budget":
                    self._ask(running.work.trial_spec.folder, "rung")
                elif ending != "stop":
                    self._ask(running.work.trial_spec.folder, "now")
            if ending == "cancel":
                for trial_id, running in list(self._running.items()):
                    del self._running[trial_id]
                    if running.work.trial_spec.kind == "search":
                        self._fail(trial_id, running, "cancelled", running.spent())
                    else:
                        self._ledger.drop(trial_id)

    def check_budget(self) -> None:
        """End where a limit other than the number of trials is reached: that one ends by itself.

        A confirmation has no budget: it is asked for, and has an end.
        """
        with self._lock:
            if self.ending is not None or self._queue.confirmation is not None:
                return
            if reached := self._spent(0).reached(self._settings.budget, but_trials=True):
                self._notify(f"budget used: {reached}; running trials end at their next rung")
                self.end("budget", reached)

    def change_budget(self, config: StudyConfig) -> None:
        with self._lock:
            self._settings = config

    def waiting(self) -> list[tuple[str, float]]:
        """Labels of what Tune was given, and for how many seconds."""
        now = time.monotonic()
        with self._lock:
            return [(r.work.trial_spec.folder, now - r.started) for r in self._running.values()]

    def unfinished(self) -> bool:
        """Whether trials are left that nobody runs any more."""
        return any(
            s.get_trials(deepcopy=False, states=(TrialState.RUNNING,)) for s in self._queue.studies
        )

    # Ends

    def _room(self, begun: int) -> bool:
        return self._spent(begun).reached(self._settings.budget) is None

    def _spent(self, begun: int) -> Usage:
        return self._ledger.spent(trials=begun, seconds=self._seconds())

    def _ask(self, folder: str, when: Literal["now", "rung"]) -> None:
        import ray

        ray.get(self._board.ask.remote(folder, when))

    def _lost(self, trial_id: str, running: ActiveTrial) -> None:
        """A process or a node died: not the settings' fault, so the trial goes on from its checkpoint."""
        work, storage = running.work, self._store.storage()
        lost = storage.get_trial(work.trial_id).user_attrs.get("lost", 0) + 1
        storage.set_trial_user_attr(work.trial_id, "lost", lost)
        max_failures = self._settings.fault_tolerance.max_failures
        if lost > max_failures:
            why = f"its process died {lost} times (fault_tolerance.max_failures={max_failures})"
            self._fail(trial_id, running, why, running.spent())
            return
        self._ledger.drop(trial_id)
        self._queue.lost(work.study, work.number)
        self._notify(f"{work.trial_spec.label} lost its process ({lost} of {max_failures} retries)")

    def _end(self, trial_id: str, running: ActiveTrial, result: dict[str, Any]) -> None:
        work, trial_spec = running.work, running.work.trial_spec
        scores = self._store.storage().get_trial(work.trial_id).intermediate_values
        last = max(scores, default=None)
        full = last is not None and last >= max(trial_spec.rungs)
        if not full and self.ending in ("pause", "lease", "resources"):
            self._ledger.drop(trial_id)
            self._free(work)
            self._notify(f"{trial_spec.label} paused after epoch {result.get('epochs', 0)}")
            return
        if last is None:
            why = (
                f"budget used before its first rung: {self.ending_reason}"
                if self.ending == "budget"
                else ""
            )
            self._fail(
                trial_id,
                running,
                why or f"no rung gave a finite {_name(self._settings.metric)}",
                result,
            )
            return
        value = scores[last]
        facts = self._describe(trial_id, running, result)
        complete = full and (
            trial_spec.until is None or trial_spec.until >= trial_spec.config.epochs
        )
        values = self._values(work, facts, value) if complete else None
        if complete and values is None:
            self._tell_failed(work, "an objective is missing or not finite")
            return
        if not complete:
            if self.ending == "budget":
                self._store.storage().set_trial_user_attr(
                    work.trial_id, "reason", f"budget: {self.ending_reason}"
                )
            # Of several objectives, those that a part of a training has are no values of the whole.
            values = [value] if len(work.study.directions) == 1 else None
        state = TrialState.COMPLETE if complete else TrialState.PRUNED
        self._store.storage().set_trial_state_values(work.trial_id, state, values)
        self._free(work)
        self._first_ends.append(None)
        word = (
            "complete"
            if complete
            else ("ends its segment" if full else "pruned") + f" at epoch {last}"
        )
        self._notify(f"{trial_spec.label} {word}: {_name(self._settings.metric)} {value:.3f}")

    def _values(self, work: QueuedTrial, facts: dict[str, Any], value: float) -> list[float] | None:
        """One value per objective; None where one is missing. Baselines and confirmations have the metric alone."""
        if work.trial_spec.kind != "search":
            return [value]
        values = [
            facts.get(n) if n in COSTS else facts["scores"].get(n)
            for n in self._settings.objectives
        ]
        known = [float(v) for v in values if v is not None and math.isfinite(v)]
        return known if len(known) == len(values) else None

    def _fail(
        self, trial_id: str, running: ActiveTrial, reason: str, result: dict[str, Any]
    ) -> None:
        self._describe(trial_id, running, result)
        self._tell_failed(running.work, reason)

    def _tell_failed(self, work: QueuedTrial, reason: str) -> None:
        storage = self._store.storage()
        storage.set_trial_user_attr(work.trial_id, "reason", reason)
        storage.set_trial_state_values(work.trial_id, TrialState.FAIL)
        self._free(work)
        self._notify(f"{work.trial_spec.label} failed: {reason}")
        self._first_ends.append(re.sub(r"\d+", "#", reason))
        first = self._first_ends[: self._settings.fault_tolerance.max_identical_failures]
        if (
            len(first)
            == len(self._first_ends)
            == self._settings.fault_tolerance.max_identical_failures
            and len(set(first)) == 1
            and first[0]
        ):
            self.end("max_identical_failures", reason)

    def _free(self, work: QueuedTrial) -> None:
        self._queue.busy.discard((work.study.study_name, work.number))

    def _describe(
        self, trial_id: str, running: ActiveTrial, result: dict[str, Any]
    ) -> dict[str, Any]:
        """Store what the trial took and scored, in one attribute: a journal grows by a line for each."""
        work = running.work
        seconds = float(result.get("seconds", time.monotonic() - running.started))
        facts: dict[str, Any] = {
            "seconds": round(seconds, 2),
            "gpu_seconds": round(seconds * work.trial_spec.gpus, 2),
            **{
                name: result[name]
                for name in ("memory", "epochs", "images_per_second")
                if name in result
            },
            "scores": {name: result[name] for name in SCORES if name in result},
        }
        self._ledger.end(trial_id, facts)
        storage = self._store.storage()
        storage.set_trial_user_attr(work.trial_id, "stats", facts)
        if limits := self._settings.limits:
            over = [
                facts[name] - limit for name, limit in limits.items() if facts.get(name) is not None
            ]
            storage.set_trial_system_attr(
                work.trial_id, "constraints", over
            )  # Optuna's own name: dashboards show it
        return facts


def _name(metric: str) -> str:
    return metric.upper() if metric in ("dsc", "ap", "ppv") else metric


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
