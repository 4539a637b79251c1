"""What stops poor trials early: Optuna's pruners, asked at our rungs.

Pruners look at a study in memory that follows from the stored scores alone, so nothing of a pruner is stored and a new
driver decides as the last one would have. There, a rung is known by its place among the rungs, not by its epoch: ours
may be evenly apart, while successive halving counts resources that multiply.
"""

from __future__ import annotations

import json
import math
import warnings
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import optuna
from optuna.pruners import (
    BasePruner,
    NopPruner,
    PatientPruner,
    PercentilePruner,
    SuccessiveHalvingPruner,
    WilcoxonPruner,
)
from optuna.trial import FixedTrial, FrozenTrial, TrialState, create_trial

from amlp_ray.config import PrunerConfig, StudyConfig
from amlp_ray.study.rungs import first_prunable_epoch, rung_epochs
from amlp_ray.study.search.in_memory_study import InMemoryStudy, ObservedTrial, TrialDelta
from amlp_ray.study.search_space.validate import suggest

_HALVINGS = ("halving", "hyperband")


def make_pruner(config: PrunerConfig) -> BasePruner:
    """Build the named Optuna pruner for steps as `Pruning` gives them; when it may act at all is decided there.

    Hyperband is halving whose trials are dealt into brackets, each of which spares its trials the first so many rungs;
    one halving pruner serves them all, since each sees the trials of one bracket only.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)  # chosen knowingly
        match config.name:
            case "median":
                return PercentilePruner(50.0, n_startup_trials=0)
            case "percentile":
                return PercentilePruner(config.percentile, n_startup_trials=0)
            case "halving" | "hyperband":
                return SuccessiveHalvingPruner(
                    min_resource=1, reduction_factor=config.reduction_factor
                )
            case "patient":
                return PatientPruner(None, patience=config.patience, min_delta=config.min_delta)
            case "wilcoxon":
                return WilcoxonPruner(p_threshold=config.p_threshold)
    return NopPruner()


class Pruning:
    """Stores the scores of rungs and says which trials are not worth going on with.

    No trial is pruned before `min_steps` optimiser steps, at its last rung, or before `startup` trials are complete.
    Scores of rungs before `min_steps` rank nothing, so median, percentile and halving leave them out; patient, which
    compares a trial with itself, does not.

    A score that is missing, NaN or infinite is not stored, and a trial without a score at a rung is not pruned there.
    Others without one at that rung are passed over; with none left to compare with, nothing is pruned. Trials answered
    from the store (`copy_of`) do not count again.
    """

    def __init__(
        self,
        study: optuna.Study,
        config: StudyConfig,
        images: int,
        folder: Callable[[int], Path],
    ) -> None:
        """Args: images: that a trial trains on. folder: of a trial, by number."""
        self._study, self._settings, self._images, self._folder = study, config, images, folder
        self._rules = config.pruner
        self._pruner = make_pruner(config.pruner)
        self._direction = config.objectives.get(config.metric, "maximize")  # type: ignore[call-overload]
        self._full = config.trial({}, seed=0).epochs
        self._mirrors: dict[int, InMemoryStudy] = {}  # by bracket
        self._news = TrialDelta()
        self._complete: list[FrozenTrial] = []
        self._limits: dict[
            int, tuple[tuple[int, ...], int]
        ] = {}  # of trials that run: see `_rungs_of`

    def report(self, study: optuna.Study, number: int, epoch: int, value: float | None) -> bool:
        """Store a rung's score; whether there was one and it is new. Trials of several objectives have them too."""
        if value is None or not math.isfinite(value):
            return False
        storage = study._storage
        trial_id = storage.get_trial_id_from_study_id_trial_number(study._study_id, number)
        if epoch in storage.get_trial(trial_id).intermediate_values:
            return False
        storage.set_trial_intermediate_value(trial_id, epoch, float(value))
        return True

    def should_prune(self, number: int, epoch: int) -> bool:
        """Whether to stop a trial of the search, after its score at this epoch was reported."""
        if self._rules.name == "none":
            return False
        trials = self._study.get_trials(deepcopy=False)
        trial = trials[number]
        rungs, first = self._rungs_of(trial)
        if (
            epoch not in trial.intermediate_values
            or not first <= epoch < rungs[-1]
            or epoch not in rungs
        ):
            return False
        beside = self._take_in(trials)
        if len(self._complete) < self._rules.n_startup_trials:
            return False
        scores = {
            at: value
            for at, value in trial.intermediate_values.items()
            if at in rungs and at <= epoch
        }
        if self._rules.name == "wilcoxon":
            return self._is_worse_on_images(number, rungs.index(epoch), epoch)
        if self._rules.name != "patient":
            scores = {at: value for at, value in scores.items() if at >= first}
        for other in (
            beside if self._rules.name in _HALVINGS else ()
        ):  # which rank those that run too
            if other.number != number:
                self._show(other)
        return self._ask(number, {rungs.index(at): value for at, value in scores.items()})

    def _ask(self, number: int, scores: Mapping[int, float]) -> bool:
        """Let the pruner judge a trial by its scores, by place of the rung; the last of them is the one in question."""
        bracket = self._bracket(number)
        if max(scores) < bracket:  # hyperband spares this bracket
            return False
        trial = ObservedTrial(
            number, TrialState.RUNNING, intermediate_values=self._steps(scores, bracket)
        )
        trial.system_attrs = {
            _passed(at): 0.0 for at in range(max(scores) - bracket)
        }  # judged there before
        mirror = self._mirror(bracket)
        mirror.put(trial)
        try:
            return bool(self._pruner.prune(mirror.study(), trial))
        finally:
            mirror.drop(number)

    def _rungs_of(self, trial: FrozenTrial) -> tuple[tuple[int, ...], int]:
        """Epochs of its rungs, and the first epoch at which it may be pruned."""
        if trial.number not in self._limits:
            values = suggest(FixedTrial(dict(trial.params)), self._settings)  # type: ignore[arg-type]  # asks the same
            own = self._settings.trial(values, seed=0)
            first = first_prunable_epoch(own, self._rules, self._images)
            self._limits[trial.number] = rung_epochs(own.epochs, self._rules), first
        return self._limits[trial.number]

    def _take_in(self, trials: list[FrozenTrial]) -> list[FrozenTrial]:
        """Know the trials that ended since the last time; return those that run."""
        news = self._news.of(trials)
        for trial in news:
            if trial.state.is_finished() and "copy_of" not in trial.user_attrs:
                self._show(trial)
                if trial.state == TrialState.COMPLETE:
                    self._complete.append(trial)
            if trial.state.is_finished():
                self._limits.pop(trial.number, None)
        return [trial for trial in news if trial.state == TrialState.RUNNING]

    def _show(self, trial: FrozenTrial) -> None:
        rungs = rung_epochs(int(trial.params.get("epochs", self._full)), self._rules)
        scores = {rungs.index(at): v for at, v in trial.intermediate_values.items() if at in rungs}
        bracket = self._bracket(trial.number)
        known = ObservedTrial(
            trial.number,
            trial.state,
            values=[0.0] if trial.state == TrialState.COMPLETE else None,  # no pruner here reads it
            intermediate_values=self._steps(scores, bracket),
            system_attrs={
                _passed(at - bracket): value for at, value in scores.items() if at >= bracket
            },
        )
        self._mirror(bracket).put(known)

    def _steps(self, scores: Mapping[int, float], bracket: int) -> dict[int, float]:
        """Scores by step: halving asks at steps 1, r, r^2, ..., which makes each rung one halving."""
        if self._rules.name in _HALVINGS:
            return {
                self._rules.reduction_factor ** (at - bracket): v
                for at, v in scores.items()
                if at >= bracket
            }
        return dict(scores)

    def _mirror(self, bracket: int) -> InMemoryStudy:
        return self._mirrors.setdefault(
            bracket, InMemoryStudy(self._settings.name, [self._direction])
        )

    def _bracket(self, number: int) -> int:
        if self._rules.name != "hyperband":
            return 0
        return bracket(self._settings.name, number, self._rules.rungs, self._rules.reduction_factor)

    # Wilcoxon

    def _is_worse_on_images(self, number: int, place: int, epoch: int) -> bool:
        """Signed-rank test against the best complete trial, on the images that both have at the same rung."""
        own = self._per_image(number, epoch)
        for best in self._best_first():
            rungs = rung_epochs(int(best.params.get("epochs", self._full)), self._rules)
            theirs = self._per_image(best.number, rungs[place]) if place < len(rungs) else {}
            images = sorted(own.keys() & theirs.keys())
            if images:
                break
        else:
            return False
        study = optuna.create_study(direction="maximize")  # DSC of images, whatever the metric is
        scores = [theirs[image] for image in images]
        study.add_trial(
            create_trial(
                value=sum(scores) / len(scores), intermediate_values=dict(enumerate(scores))
            )
        )
        trial = ObservedTrial(
            1,
            TrialState.RUNNING,
            intermediate_values={i: own[image] for i, image in enumerate(images)},
        )
        return bool(self._pruner.prune(study, trial))

    def _best_first(self) -> list[FrozenTrial]:
        """Complete trials by their last score, best first; an imported one has no images and is passed over."""
        scored = [t for t in self._complete if t.intermediate_values]
        last = {t.number: t.intermediate_values[max(t.intermediate_values)] for t in scored}
        return sorted(scored, key=lambda t: last[t.number], reverse=self._direction == "maximize")

    def _per_image(self, number: int, epoch: int) -> dict[str, float]:
        """DSC by image at a rung; empty where the file is missing. Images without a finite one are left out."""
        try:
            given: dict[str, Any] = json.loads(
                (self._folder(number) / "rungs" / f"{epoch}.json").read_text()
            )
        except (OSError, json.JSONDecodeError):
            return {}
        scores = given.get("per_image") or {}
        return {
            image: float(v) for image, v in scores.items() if v is not None and math.isfinite(v)
        }


def bracket(study: str, number: int, rungs: int, reduction: int) -> int:
    """Return how many first rungs Hyperband spares a trial: by its number, in Optuna's own proportions.

    A study of r rungs has r brackets, the last of which is never pruned.
    """
    shares = [math.ceil(rungs * reduction**left / (left + 1)) for left in reversed(range(rungs))]
    draw = zlib.crc32(f"{study}_{number}".encode()) % sum(shares)
    for at, share in enumerate(shares):
        draw -= share
        if draw < 0:
            return at
    raise AssertionError("shares add up to more than any draw")


def _passed(rung: int) -> str:
    return f"completed_rung_{rung}"  # Optuna's name for the score with which a trial stood at a halving
