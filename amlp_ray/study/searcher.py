"""The bridge between Tune and Optuna: Optuna decides, Tune executes.

A Tune searcher on an Optuna study: asks for settings, passes on what trials report, lets Optuna's pruner decide and
tells each trial's end truthfully. It keeps no state that matters: all of it is in the Optuna storage, so a new searcher
on the same storage goes on where a killed one stopped.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FrozenTrial, Trial, TrialState
from ray.tune.search import Searcher

from amlp_ray.config import PrunerSettings, SamplerSettings, StudySettings
from amlp_ray.errors import SettingsError
from amlp_ray.study.design import arm_settings, derived_seed, first_prunable_epoch, rung_epochs
from amlp_ray.study.space import suggest
from amlp_ray.study.store import StudyStore
from amlp_ray.study.trial import Task

Notify = Callable[[str], None]


def make_sampler(settings: SamplerSettings, seed: int) -> optuna.samplers.BaseSampler:
    """Build the named Optuna sampler."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)  # chosen knowingly
        if settings.name == "random":
            return optuna.samplers.RandomSampler(seed)
        if settings.name == "gp":
            return optuna.samplers.GPSampler(seed=seed, n_startup_trials=settings.startup)
        if settings.name == "qmc":
            return optuna.samplers.QMCSampler(seed=seed)
        return optuna.samplers.TPESampler(
            seed=seed,
            n_startup_trials=settings.startup,
            multivariate=True,
            group=True,  # a conditional space has no parameters common to all trials otherwise
            constant_liar=True,  # running trials count as poor, so that parallel ones spread out
        )


def make_pruner(settings: PrunerSettings, first_rung: int) -> optuna.pruners.BasePruner:
    """Build the named Optuna pruner; `first_rung` is the first epoch at which it may prune."""
    if settings.name == "none":
        return optuna.pruners.NopPruner()
    if settings.name == "halving":
        return optuna.pruners.SuccessiveHalvingPruner(
            min_resource=max(1, first_rung), reduction_factor=settings.reduction
        )
    percentile = 50.0 if settings.name == "median" else settings.percentile
    return optuna.pruners.PercentilePruner(percentile, n_startup_trials=settings.startup, n_warmup_steps=first_rung - 1)


@dataclass
class Running:
    """A trial that Tune runs for one of the two Optuna studies."""

    study: optuna.Study
    trial: Trial
    task: Task
    started: float


class StudySearcher(Searcher):
    """Serves the baseline arms first, then the search, until the budget is used.

    Trials found RUNNING are those of a dead driver (the store's lock is held by us): they are taken over first, keep
    their number, and go on from their checkpoint.
    """

    def __init__(
        self,
        store: StudyStore,
        settings: StudySettings,
        *,
        data: str,
        labels: str | None = None,
        images: int,
        board: Any,
        notify: Notify,
    ) -> None:
        super().__init__(metric="dsc", mode="max")
        self._store, self._settings, self._images = store, settings, images
        self._data, self._labels = data, labels
        self._board, self._notify = board, notify
        storage = store.storage()
        self._search, self._arms = store.search(storage, create=True), store.arms(storage, create=True)
        first = first_prunable_epoch(settings.trial({}, seed=0), settings.pruner, images)
        self._search.pruner = make_pruner(settings.pruner, first)
        self._orphans = [(s, t) for s in (self._arms, self._search) for t in s.get_trials(states=(TrialState.RUNNING,))]
        self._running: dict[str, Running] = {}
        self._deadline = time.time() + settings.budget.hours * 3600 if settings.budget.hours else math.inf

    # Tune's side

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        """Settings of the next trial, or FINISHED where the budget is used."""
        while True:
            following = self._next()
            if following is None:
                return Searcher.FINISHED
            study, trial, resumed = following
            try:
                task = self._task(study, trial)
                break
            except SettingsError as error:  # one combination in many; the study goes on without it
                trial.set_user_attr("reason", str(error))
                study.tell(trial, state=TrialState.FAIL)
                self._notify(f"trial {trial.number} failed: {error}")
        trial.set_user_attr("tune_trial_id", trial_id)
        trial.set_user_attr("path", str(Path(task.folder).relative_to(self._store.folder)))
        trial.set_user_attr("seed", task.settings.seed)
        self._running[trial_id] = Running(study, trial, task, time.time())
        shown = ", ".join(f"{name}={_short(value)}" for name, value in trial.params.items())
        self._notify(f"{task.label} {'continues' if resumed else 'starts'}" + (f": {shown}" if shown else ""))
        return {"task": task.as_config(), "board": self._board}

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Store a rung's score and, where Optuna's pruner says so, ask the trial to return."""
        running = self._running.get(trial_id)
        if running is None or "dsc" not in result or "ended" in result or "failed" in result:
            return
        trial, task, epoch = running.trial, running.task, int(result["epoch"])
        stored = _rungs_of(running)
        if epoch not in stored and math.isfinite(result["dsc"]):
            trial.report(result["dsc"], epoch)
            self._notify(f"{task.label} epoch {epoch}: DSC {result['dsc']:.3f}")
        prunable = task.kind == "search" and epoch >= first_prunable_epoch(
            task.settings, self._settings.pruner, self._images
        )
        if prunable and epoch < task.settings.epochs and trial.should_prune():
            import ray

            ray.get(self._board.ask.remote(task.folder))

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Tell Optuna how the trial ended. One that was merely interrupted stays RUNNING, to be taken over."""
        running = self._running.pop(trial_id, None)
        if running is None:
            return
        result = result or {}
        if error or "failed" in result:
            self._fail(running, result.get("failed", "the trial's process died"), result)
        elif "ended" in result:
            self._end(running, result)

    def save(self, checkpoint_path: str) -> None:
        """Nothing to save: the Optuna storage is the only truth."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing to restore: a study is continued by a new searcher on its storage."""

    def unfinished(self) -> bool:
        """Whether trials are left that nobody runs any more: the study was interrupted."""
        return any(s.get_trials(deepcopy=False, states=(TrialState.RUNNING,)) for s in (self._arms, self._search))

    # Optuna's side

    def _next(self) -> tuple[optuna.Study, Trial, bool] | None:
        if self._orphans:
            study, frozen = self._orphans.pop(0)
            return study, self._take_over(study, frozen), True
        arms = len(self._settings.arms) * self._settings.arm_seeds
        if len(self._arms.get_trials(deepcopy=False)) < arms:
            return self._arms, self._arms.ask(), False
        asked = [t for t in self._search.get_trials(deepcopy=False) if t.state != TrialState.WAITING]
        if len(asked) >= self._settings.budget.trials or time.time() > self._deadline:
            return None
        self._search.sampler = self._sampler(len(asked))
        return self._search, self._search.ask(), False

    def _sampler(self, number: int) -> optuna.samplers.BaseSampler:
        # A fresh seed per number: a sampler rebuilt with the study's own seed would repeat itself after a restart.
        return make_sampler(self._settings.sampler, derived_seed(self._settings.seed, "sampler", number))

    def _take_over(self, study: optuna.Study, frozen: FrozenTrial) -> Trial:
        study.sampler = self._sampler(frozen.number)  # for parameters that a killed driver had not asked for yet
        return Trial(study, frozen._trial_id)

    def _task(self, study: optuna.Study, trial: Trial) -> Task:
        s = self._settings
        if study is self._arms:
            repeat, which = divmod(trial.number, len(s.arms))
            arm = s.arms[which]
            trial.set_user_attr("arm", arm)
            trial.set_user_attr("repeat", repeat)
            label, folder, kind = f"arm {arm}-{repeat}", self._store.arm_folder(arm, repeat), "arm"
            # Repeats share seeds across arms, so that arms are compared in pairs.
            settings = arm_settings(s, arm, seed=derived_seed(s.seed, "arm", repeat))
        else:
            label, folder, kind = f"trial {trial.number}", self._store.trial_folder(trial.number), "search"
            settings = s.trial(suggest(trial, s), seed=derived_seed(s.seed, "trial", trial.number))
        return Task(
            study=s.name,
            kind=kind,
            number=trial.number,
            label=label,
            folder=str(folder),
            data=self._data,
            labels=self._labels,
            settings=settings,
            probe=s.probe,
            resources=s.resources,
            rungs=(0,) if settings.objective == "none" else rung_epochs(settings.epochs, s.pruner.rungs),
        )

    def _end(self, running: Running, result: dict[str, Any]) -> None:
        values = _rungs_of(running)
        if not values:
            self._fail(running, "no rung gave a finite DSC", result)
            return
        last = max(values)
        full = last >= max(running.task.rungs)
        state = TrialState.COMPLETE if full else TrialState.PRUNED
        self._describe(running, result)
        running.study.tell(running.trial, values[last] if full else None, state=state)
        if not full:
            self._notify(f"{running.task.label} pruned at epoch {last}: DSC {values[last]:.3f}")
        else:
            self._notify(f"{running.task.label} complete: DSC {values[last]:.3f}")

    def _fail(self, running: Running, reason: str, result: dict[str, Any]) -> None:
        self._describe(running, result)
        running.trial.set_user_attr("reason", reason)
        running.study.tell(running.trial, state=TrialState.FAIL)
        self._notify(f"{running.task.label} failed: {reason}")

    def _describe(self, running: Running, result: dict[str, Any]) -> None:
        seconds = float(result.get("seconds", time.time() - running.started))
        running.trial.set_user_attr("seconds", round(seconds, 2))
        gpus = running.task.resources.gpus_per_worker * running.task.resources.workers
        running.trial.set_user_attr("gpu_seconds", round(seconds * gpus, 2))
        for name in ("epochs", "images_per_second"):
            if name in result:
                running.trial.set_user_attr(name, result[name])


def _rungs_of(running: Running) -> dict[int, float]:
    return running.study.get_trials(deepcopy=False)[running.trial.number].intermediate_values


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
