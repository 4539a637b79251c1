"""Stop poor trials early with Optuna's pruners, which are asked at rungs.

Pruners see a study in memory that follows from the stored scores alone. Nothing of a pruner is
stored, and a new driver decides as the last one would have. A step is the index of a rung there,
not its epoch: rungs may be evenly spaced, while successive halving counts resources that multiply.
"""

from __future__ import annotations

import math
import warnings
import zlib
from bisect import bisect_right
from collections.abc import Callable, Mapping
from itertools import accumulate
from pathlib import Path
from typing import assert_never

import optuna
from optuna.pruners import (
    BasePruner,
    NopPruner,
    PatientPruner,
    PercentilePruner,
    SuccessiveHalvingPruner,
    WilcoxonPruner,
)
from optuna.trial import FrozenTrial, TrialState, create_trial

from amlp_ray.config import PrunerConfig, StudyConfig
from amlp_ray.study.rungs import first_prunable_epoch, rung_epochs
from amlp_ray.study.search.in_memory_study import InMemoryStudy, ObservedTrial, TrialDelta
from amlp_ray.study.search_space.space import SearchSpace
from amlp_ray.study.storage.trial_record import TrialRecord, finite
from amlp_ray.utils.json_files import read_json

_HALVINGS = ("halving", "hyperband")


def make_pruner(config: PrunerConfig) -> BasePruner:
    """Build the named Optuna pruner; `Pruning` decides when it may act.

    Hyperband is successive halving whose trials are assigned to brackets, each of which exempts its
    trials from some first rungs. One halving pruner serves all brackets, because each has a study
    of its own. Optuna's HyperbandPruner assigns every trial anew at each decision.
    """
    with warnings.catch_warnings():
        # Experimental pruners are chosen on purpose.
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        match config.name:
            case "median":
                return PercentilePruner(50.0, n_startup_trials=0)
            case "percentile":
                return PercentilePruner(config.percentile, n_startup_trials=0)
            case "halving" | "hyperband":
                factor = config.reduction_factor
                return SuccessiveHalvingPruner(min_resource=1, reduction_factor=factor)
            case "patient":
                return PatientPruner(None, patience=config.patience, min_delta=config.min_delta)
            case "wilcoxon":
                return WilcoxonPruner(p_threshold=config.p_threshold)
            case "none":
                return NopPruner()
            case _:
                assert_never(config.name)


class Pruning:
    """Decides which trials of the search are stopped.

    - No trial is pruned before `min_steps` optimizer steps, at its last rung, or before
      `n_startup_trials` trials are complete.
    - Median, percentile and halving ignore rungs before `min_steps`, whose scores rank nothing.
      Patient does not, because it compares a trial with itself.
    - A trial without a finite score at a rung is not pruned there. Other trials without one there
      are ignored; without any other trial nothing is pruned.
    - Trials that were answered from the store (`copy_of`) do not count again.
    """

    def __init__(
        self,
        search: optuna.Study,
        config: StudyConfig,
        images: int,
        trial_folder: Callable[[int], Path],
    ) -> None:
        """Set up pruning of a study.

        Args:
            search: Optuna study of the search.
            images: number of training images.
            trial_folder: gives the folder of a trial by its number.
        """
        self._search = search
        self._trial_folder = trial_folder
        self._config = config
        self._pruner_config = config.pruner
        self._images = images
        self._pruner = make_pruner(config.pruner)
        self._space = SearchSpace(config)
        directions = (d for name, d in config.objectives.items() if name == config.metric)
        self._direction: str = next(directions, "maximize")
        self._default_epochs = config.trial({}, seed=0).epochs
        self._studies: dict[int, InMemoryStudy] = {}  # by bracket
        self._delta = TrialDelta()
        self._complete: list[TrialRecord] = []
        # Of running trials: epochs of the rungs, and the first epoch at which they may be pruned.
        self._limits: dict[int, tuple[tuple[int, ...], int]] = {}

    def should_prune(self, number: int, epoch: int) -> bool:
        """Return whether to stop a trial of the search, after its score was reported."""
        name = self._pruner_config.name
        if name == "none":
            return False
        trials = self._search.get_trials(deepcopy=False)
        trial = TrialRecord.from_frozen(trials[number])
        rungs, first = self._rungs_of(trial)
        is_prunable = epoch in rungs and first <= epoch < rungs[-1]
        if epoch not in trial.rungs or not is_prunable:
            return False
        running = self._read_ended(trials)
        if len(self._complete) < self._pruner_config.n_startup_trials:
            return False
        if name == "wilcoxon":
            return self._is_worse_on_groups(number, rungs.index(epoch), epoch)
        if name in _HALVINGS:  # these rank running trials too
            for other in running:
                if other.number != number:
                    self._show(other)
        start = 0 if name == "patient" else first
        scores = {}
        for rung, value in trial.rungs.items():
            if rung in rungs and start <= rung <= epoch:
                scores[rungs.index(rung)] = value
        return self._ask_pruner(number, scores)

    def _ask_pruner(self, number: int, scores: Mapping[int, float]) -> bool:
        """Let the pruner judge a trial by its scores, by index of the rung, at the last of them."""
        bracket = self._bracket(number)
        last = max(scores)
        if last < bracket:  # the bracket exempts the rung
            return False
        trial = ObservedTrial(
            number,
            TrialState.RUNNING,
            intermediate_values=self._steps(scores, bracket),
            # The trial was judged at all rungs before this one.
            system_attrs={_completed_rung(rung): 0.0 for rung in range(last - bracket)},
        )
        study = self._study(bracket)
        study.put(trial)
        try:
            return bool(self._pruner.prune(study.study(), trial))
        finally:
            study.drop(number)

    def _rungs_of(self, trial: TrialRecord) -> tuple[tuple[int, ...], int]:
        """Return the epochs of a trial's rungs, and the first at which it may be pruned."""
        if trial.number not in self._limits:
            values = self._space.config_of(trial.params)
            config = self._config.trial(values, seed=0)
            first = first_prunable_epoch(config, self._pruner_config, self._images)
            rungs = rung_epochs(config.epochs, self._pruner_config)
            self._limits[trial.number] = rungs, first
        return self._limits[trial.number]

    def _rungs_by_params(self, trial: TrialRecord) -> tuple[int, ...]:
        epochs = int(trial.params.get("epochs", self._default_epochs))
        return rung_epochs(epochs, self._pruner_config)

    def _read_ended(self, trials: list[FrozenTrial]) -> list[TrialRecord]:
        """Read the trials that have ended since the last call; return those that run."""
        running = []
        for frozen in self._delta.update(trials):
            trial = TrialRecord.from_frozen(frozen)
            if trial.state == TrialState.RUNNING:
                running.append(trial)
            if not trial.is_finished:
                continue
            self._limits.pop(trial.number, None)
            if trial.is_copy:
                continue
            self._show(trial)
            if trial.is_complete:
                self._complete.append(trial)
        return running

    def _show(self, trial: TrialRecord) -> None:
        """Let the pruner compare others with a trial."""
        bracket = self._bracket(trial.number)
        rungs = self._rungs_by_params(trial)
        scores = {rungs.index(epoch): v for epoch, v in trial.rungs.items() if epoch in rungs}
        completed = {_completed_rung(r - bracket): v for r, v in scores.items() if r >= bracket}
        observed = ObservedTrial(
            trial.number,
            trial.state,
            values=[0.0] if trial.is_complete else None,  # no pruner reads it
            intermediate_values=self._steps(scores, bracket),
            system_attrs=completed,
        )
        self._study(bracket).put(observed)

    def _steps(self, scores: Mapping[int, float], bracket: int) -> dict[int, float]:
        """Return scores by Optuna's step.

        Halving judges at steps 1, r, r^2, ..., so each rung is one halving.
        """
        if self._pruner_config.name not in _HALVINGS:
            return dict(scores)
        factor = self._pruner_config.reduction_factor
        return {factor ** (rung - bracket): v for rung, v in scores.items() if rung >= bracket}

    def _study(self, bracket: int) -> InMemoryStudy:
        if bracket not in self._studies:
            self._studies[bracket] = InMemoryStudy(self._config.name, [self._direction])
        return self._studies[bracket]

    def _bracket(self, number: int) -> int:
        config = self._pruner_config
        if config.name != "hyperband":
            return 0
        factor = config.reduction_factor
        return hyperband_bracket(self._config.name, number, n_rungs=config.rungs, factor=factor)

    # Wilcoxon

    def _is_worse_on_groups(self, number: int, rung: int, epoch: int) -> bool:
        """Compare a trial with the best complete one, on the groups that both have at a rung."""
        scores = self._scores_by_group(number, epoch)
        for best in self._best_first():
            rungs = self._rungs_by_params(best)
            if rung >= len(rungs):
                continue
            best_scores = self._scores_by_group(best.number, rungs[rung])
            groups = sorted(scores.keys() & best_scores.keys())
            if groups:
                break
        else:
            return False
        # DSC of groups, whatever the metric is
        study = optuna.create_study(direction="maximize")
        reference = [best_scores[group] for group in groups]
        mean = sum(reference) / len(reference)
        study.add_trial(create_trial(value=mean, intermediate_values=dict(enumerate(reference))))
        own_scores = dict(enumerate(scores[group] for group in groups))
        trial = ObservedTrial(1, TrialState.RUNNING, intermediate_values=own_scores)
        return bool(self._pruner.prune(study, trial))

    def _best_first(self) -> list[TrialRecord]:
        """Return the complete trials that have rungs, sorted by their last score."""
        scored = [trial for trial in self._complete if trial.last_score is not None]
        is_reversed = self._direction == "maximize"
        return sorted(scored, key=lambda trial: trial.last_score or 0.0, reverse=is_reversed)

    def _scores_by_group(self, number: int, epoch: int) -> dict[str, float]:
        """Read the finite DSC by group of a rung; empty if the file is missing or damaged."""
        file = self._trial_folder(number) / "rungs" / f"{epoch}.json"
        per_group = (read_json(file) or {}).get("per_group")
        if not isinstance(per_group, dict):
            return {}
        scores = {group: finite(value) for group, value in per_group.items()}
        return {group: score for group, score in scores.items() if score is not None}


def hyperband_bracket(study: str, number: int, *, n_rungs: int, factor: int) -> int:
    """Return how many first rungs Hyperband exempts a trial from, as Optuna's own assigns it.

    Args:
        study: name of the study.
        n_rungs: number of rungs, which is the number of brackets. The last one is never pruned.
        factor: reduction factor of the halvings.
    """
    lefts = reversed(range(n_rungs))
    shares = [math.ceil(n_rungs * factor**left / (left + 1)) for left in lefts]
    draw = zlib.crc32(f"{study}_{number}".encode()) % sum(shares)
    return bisect_right(list(accumulate(shares)), draw)


def _completed_rung(rung: int) -> str:
    """Return Optuna's name of the score that a trial had at a halving."""
    return f"completed_rung_{rung}"
