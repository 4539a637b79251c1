"""What a report is about, gathered once from the study store. Nothing here draws or judges."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import optuna

from amlp_ray.config import PretrainSettings, StudySettings
from amlp_ray.study.store import StudyStore

MIN_IMPORTANCE_TRIALS = 10  # PED-ANOVA compares the top trials with all; a top of under 5 says nothing


@dataclass(frozen=True)
class Run:
    """One trial of the search, or one repeat of an arm."""

    number: int  # Optuna's, within the search or within the arms
    state: str  # COMPLETE, PRUNED, FAIL, RUNNING, WAITING
    dsc: float | None  # final DSC; at the last rung so far where the run was pruned or is not over
    rungs: dict[int, float]  # DSC by epoch
    params: dict[str, Any]
    folder: Path
    score: dict[str, Any]  # score.json without its per-image values; empty where there is none
    attributes: dict[str, Any]
    started: datetime | None
    ended: datetime | None

    @property
    def arm(self) -> str | None:
        return self.attributes.get("arm")

    @property
    def name(self) -> str:
        return f"{self.arm}-{self.attributes.get('repeat', self.number)}" if self.arm else f"trial {self.number}"

    @property
    def epochs(self) -> int | None:
        """Epochs run, as the trial says or as its rungs show."""
        said = self.attributes.get("epochs")
        return said if isinstance(said, int) else max(self.rungs, default=None)

    @property
    def finished(self) -> bool:
        return self.state == "COMPLETE" and self.dsc is not None

    def measure(self, key: str) -> float | None:
        """Return a number of score.json, None where it is missing, null or not finite."""
        return finite(self.score.get(key))

    def per_image(self) -> dict[str, float]:
        """Read the DSC of every scored image; empty where there is no score."""
        values = read_json(self.folder / "score.json").get("per_image")
        if not isinstance(values, dict):
            return {}
        return {key: number for key, value in values.items() if (number := finite(value)) is not None}


@dataclass(frozen=True)
class Facts:
    """Everything a report shows, but for curves, per-image scores and pictures, which are read when they are drawn."""

    name: str
    folder: Path
    settings: StudySettings
    search: list[Run]
    arms: list[Run]
    environment: dict[str, Any]
    importances: dict[str, float]  # sum 1, largest first; empty where `importances_gap` says why
    importances_gap: str | None

    @property
    def best(self) -> Run | None:
        return max((run for run in self.search if run.finished), key=lambda run: run.dsc or 0.0, default=None)

    @property
    def running(self) -> bool:
        return any(run.state in ("RUNNING", "WAITING") for run in [*self.search, *self.arms])

    @property
    def dataset(self) -> dict[str, Any]:
        return self._described("dataset")

    @property
    def labels(self) -> dict[str, Any]:
        """The labelled data set, where it is one apart."""
        return self._described("labels")

    def _described(self, name: str) -> dict[str, Any]:
        about = self.environment.get(name)
        return about if isinstance(about, dict) else {}

    @property
    def wall_time(self) -> timedelta | None:
        """First start to last end, pauses between two runs of the study included; None before the first start."""
        runs = [*self.search, *self.arms]
        starts = [run.started for run in runs if run.started]
        ends = [run.ended or datetime.now() for run in runs if run.started]
        return max(ends) - min(starts) if starts else None

    def parameters(self) -> list[str]:
        """Names of the searched parameters: as declared, then those that only trials know (an older space)."""
        return list(dict.fromkeys([*self.settings.space, *(name for run in self.search for name in run.params)]))

    def steps_per_epoch(self, run: Run) -> int | None:
        """Optimiser steps of one epoch, None where the environment does not say how many images there are."""
        counts = self.dataset.get("counts")
        train = counts.get("train") if isinstance(counts, dict) else None
        images = train.get("images") if isinstance(train, dict) else train
        if not isinstance(images, int):
            return None
        default = self.settings.pretrain.get("batch_size", PretrainSettings.model_fields["batch_size"].default)
        return max(1, images // int(run.params.get("batch_size", default)))


def gather(store: StudyStore) -> Facts:
    """Read the facts of a study. Missing or half-written files of trials are taken as absent."""
    storage = store.storage()
    search, arms = store.search(storage), store.arms(storage)
    importances, gap = _importances(search)
    return Facts(
        name=store.name,
        folder=store.folder,
        settings=store.settings(),
        search=_runs(store, search),
        arms=_runs(store, arms),
        environment=read_json(store.folder / "environment.json"),
        importances=importances,
        importances_gap=gap,
    )


def count_states(runs: Iterable[Run]) -> dict[str, int]:
    """Count runs by state, in the order of a trial's life."""
    counts = Counter(run.state for run in runs)
    return {state: counts[state] for state in ("COMPLETE", "PRUNED", "FAIL", "RUNNING", "WAITING") if counts[state]}


def finite(value: Any) -> float | None:
    """Return `value` as a float, None where it is no finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON mapping; empty where the file is missing, half-written or something else."""
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}


def _runs(store: StudyStore, study: optuna.Study) -> list[Run]:
    return [_run(store, trial) for trial in study.get_trials(deepcopy=False)]


def _run(store: StudyStore, trial: optuna.trial.FrozenTrial) -> Run:
    folder = _folder(store, trial)
    rungs = {epoch: dsc for epoch, dsc in sorted(trial.intermediate_values.items()) if math.isfinite(dsc)}
    value = finite(trial.value) if trial.values else None
    last = rungs[max(rungs)] if rungs else None
    score = read_json(folder / "score.json")
    return Run(
        number=trial.number,
        state=trial.state.name,
        dsc=last if value is None and trial.state.name != "FAIL" else value,
        rungs=rungs,
        params=trial.params,
        folder=folder,
        score={key: item for key, item in score.items() if key != "per_image"},  # large, and needed for a few runs only
        attributes=trial.user_attrs,
        started=trial.datetime_start,
        ended=trial.datetime_complete,
    )


def _folder(store: StudyStore, trial: optuna.trial.FrozenTrial) -> Path:
    path, arm = trial.user_attrs.get("path"), trial.user_attrs.get("arm")
    if isinstance(path, str):
        folder = (store.folder / path).resolve()
        if folder.is_relative_to(store.folder.resolve()):  # a report shows nothing from outside of its study
            return store.folder / path
    if arm:
        return store.arm_folder(str(arm), trial.user_attrs.get("repeat", trial.number))
    return store.trial_folder(trial.number)


def _importances(study: optuna.Study) -> tuple[dict[str, float], str | None]:
    complete = study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.COMPLETE,))
    if len(complete) < MIN_IMPORTANCE_TRIALS:
        few = f"{len(complete)} complete trials are too few"
        return {}, f"{few}: importances are worked out from {MIN_IMPORTANCE_TRIALS} on."
    if not any(trial.params for trial in complete):
        return {}, "No parameter was searched."
    if len({trial.value for trial in complete}) == 1:
        return {}, "All complete trials score the same, so no parameter explains a difference."
    top = min(0.5, max(0.1, 5 / len(complete)))
    evaluator = optuna.importance.PedAnovaImportanceEvaluator(target_quantile=top)
    try:
        importances = optuna.importance.get_param_importances(study, evaluator=evaluator)
    except (ValueError, RuntimeError, AssertionError) as error:  # Optuna's ways of refusing a set of trials
        return {}, f"Optuna could not work out importances: {error}"
    if len(set(importances.values())) == 1 and len(importances) > 1:
        return {}, "The best trials do not differ from the rest in any one parameter."
    return importances, None
