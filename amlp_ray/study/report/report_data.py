"""What a report is about, gathered once from the study store. Nothing here draws or judges."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FrozenTrial

from amlp_ray.config import Choice, Parameter, PretrainConfig, Range, StudyConfig
from amlp_ray.study.operations.status import spent_by
from amlp_ray.study.operations.trials import STATES, note_of, state_of
from amlp_ray.study.report.importance import Importance, importance
from amlp_ray.study.storage.best_trials import front, keeps_limits
from amlp_ray.study.storage.budget import Usage
from amlp_ray.study.storage.study_store import StudyStore
from amlp_ray.training.loggers.metrics_file import read_rows
from amlp_ray.utils.files import read_json

TITLES = {  # of objectives and other measures
    "dsc": "DSC",
    "ap": "Patch AP",
    "ppv": "PPV",
    "sensitivity": "Sensitivity",
    "dsc_small": "DSC, small lesions",
    "dsc_medium": "DSC, medium lesions",
    "dsc_large": "DSC, large lesions",
    "seconds": "Seconds",
    "gpu_seconds": "GPU-seconds",
    "memory": "Memory, GB",
}


@dataclass(frozen=True)
class ReportedTrial:
    """One trial of the search, or one repeat of a baseline."""

    number: int  # Optuna's, within the search or within the baselines
    state: str  # as people are told it: RUNNING is INTERRUPTED where no process runs the study
    value: (
        float | None
    )  # by `StudyConfig.metric`; at the last rung so far where the run was pruned or is not over
    dsc: float | None  # the same where the metric is DSC
    values: dict[str, float]  # by objective, of a complete run
    rungs: dict[int, float]  # the metric by epoch
    params: dict[str, Any]
    folder: Path
    attributes: dict[str, Any]
    feasible: bool  # it keeps `limits`, as far as it measured what they are of
    note: str | None  # where it comes from, where it is not simply proposed and trained
    started: datetime | None
    ended: datetime | None

    @property
    def baseline(self) -> str | None:
        return self.attributes.get("baseline")

    @property
    def diagnosis(self) -> bool:
        """A baseline that sees true masks: shown, and compared with nothing."""
        return bool(self.attributes.get("uses_ground_truth"))

    @property
    def name(self) -> str:
        group = self.baseline or self.attributes.get("candidate")  # of a confirmation
        return (
            f"{group}-{self.attributes.get('repeat', self.number)}"
            if group
            else f"trial {self.number}"
        )

    @property
    def epochs(self) -> int | None:
        """Epochs run, as the run says at its end or as its rungs show."""
        said = self.cost("epochs")
        return max(self.rungs, default=None) if said is None else int(said)

    @property
    def until(self) -> datetime | None:
        """When it ended, or was last seen to live."""
        if self.ended or self.started is None:
            return self.ended
        if self.state == "RUNNING":
            return datetime.now()
        metrics = self.folder / "metrics.jsonl"
        return (
            max(self.started, datetime.fromtimestamp(metrics.stat().st_mtime))
            if metrics.is_file()
            else self.started
        )

    @property
    def finished(self) -> bool:
        return self.state == "COMPLETE" and self.value is not None and self.dsc is not None

    def cost(self, key: str) -> float | None:
        """What the run took: seconds, gpu_seconds, memory, epochs; None before its end."""
        return finite(self._ended_with.get(key))

    def measure(self, key: str) -> float | None:
        """Return a number of its last scoring, None where it is missing, null or not finite."""
        scores = self._ended_with.get("scores")
        if isinstance(scores, dict) and key in scores:  # no file is opened for what the store knows
            return finite(scores[key])
        return finite(self.score.get(key))

    @cached_property
    def score(self) -> dict[str, Any]:
        """`score.json` without its per-image values, which are many; empty where there is none."""
        score = read_json(self.folder / "score.json") or {}
        return {key: item for key, item in score.items() if key != "per_image"}

    def per_image(self) -> dict[str, float]:
        """Read the DSC of every scored image; empty where there is no score."""
        values = (read_json(self.folder / "score.json") or {}).get("per_image")
        if not isinstance(values, dict):
            return {}
        return {
            key: number for key, value in values.items() if (number := finite(value)) is not None
        }

    @property
    def _ended_with(self) -> dict[str, Any]:
        facts = self.attributes.get("stats")
        return facts if isinstance(facts, dict) else {}


@dataclass(frozen=True)
class ReportData:
    """Everything a report shows, but for curves, per-image scores and pictures, which are read when they are drawn."""

    name: str
    folder: Path
    config: StudyConfig
    search: list[ReportedTrial]  # trials that the study trained
    trials: list[FrozenTrial]  # the same, as stored
    copies: list[
        ReportedTrial
    ]  # numbers of the search that were answered from the store (`copy_of`)
    imported: list[
        ReportedTrial
    ]  # trials of elsewhere (`source`): they teach the sampler, and are no result of this study
    front: list[
        ReportedTrial
    ]  # complete trials within `limits` that none beats in every objective; of one objective, the best
    baselines: list[ReportedTrial]
    confirmation: list[ReportedTrial]
    driven: bool  # whether a process runs the study at this moment
    spent: Usage
    space: dict[
        str, Parameter
    ]  # as declared; of a Python function, as the trials' distributions show it
    environments: list[dict[str, Any]]  # one for each time the study was run
    importances: dict[str, Importance]  # by objective

    @property
    def best(self) -> ReportedTrial | None:
        """The best by the metric among complete trials within `limits`; with several objectives, on their front.

        Of a population, the best of its latest generation: earlier ones are parts of a training.
        """
        return max(self.front, key=lambda run: run.value or 0.0, default=None)

    @property
    def running(self) -> bool:
        return any(
            run.state in ("RUNNING", "INTERRUPTED", "WAITING")
            for run in [*self.search, *self.baselines]
        )

    @property
    def metric(self) -> str:
        """Title of the score that trials are ranked by."""
        return TITLES[self.config.metric]

    @property
    def environment(self) -> dict[str, Any]:
        """That of the latest run of the study."""
        return self.environments[-1] if self.environments else {}

    @property
    def dataset(self) -> dict[str, Any]:
        return self._described("dataset")

    @property
    def eval_data(self) -> dict[str, Any]:
        """The labelled data set, where it is one apart."""
        return self._described("eval_data")

    def _described(self, name: str) -> dict[str, Any]:
        about = self.environment.get(name)
        return about if isinstance(about, dict) else {}

    def parameters(self) -> list[str]:
        """Names of the searched parameters: as declared, then those that only trials know (an older space)."""
        declared = [
            name for name, parameter in self.space.items() if isinstance(parameter, Range | Choice)
        ]
        return list(
            dict.fromkeys([*declared, *(name for run in self.search for name in run.params)])
        )

    def full_length(self, run: ReportedTrial) -> int:
        """Epochs of a run that nothing stops early."""
        given = run.params.get("epochs", self.config.pretrain.get("epochs"))
        return int(given or PretrainConfig.model_fields["epochs"].default)

    def steps_per_epoch(self, run: ReportedTrial) -> int | None:
        """Optimiser steps of one epoch, None where the environment does not say how many images there are."""
        counts = self.dataset.get("counts")
        train = counts.get("train") if isinstance(counts, dict) else None
        images = train.get("images") if isinstance(train, dict) else train
        if not isinstance(images, int):
            return None
        default = self.config.pretrain.get(
            "batch_size", PretrainConfig.model_fields["batch_size"].default
        )
        return max(1, images // int(run.params.get("batch_size", default)))


def collect(store: StudyStore) -> ReportData:
    """Read the facts of a study. Missing or half-written files of trials are taken as absent."""
    config, driven = store.config(), store.is_run()
    studies = (store.search(), store.baselines(), store.confirmation())
    trials, baselines, confirmation = (study.get_trials(deepcopy=False) for study in studies)
    runs, arm_runs, confirm_runs = (
        [_run(store, config, trial, driven) for trial in group]
        for group in (trials, baselines, confirmation)
    )
    imported = [run for run in runs if "source" in run.attributes]
    copies = [run for run in runs if "copy_of" in run.attributes and "source" not in run.attributes]
    other = {run.number for run in [*imported, *copies]}
    own = [trial for trial in trials if trial.number not in other]
    return ReportData(
        name=store.name,
        folder=store.folder,
        config=config,
        search=[run for run in runs if run.number not in other],
        trials=own,
        copies=copies,
        imported=imported,
        front=_front(config, own, runs),
        baselines=arm_runs,
        confirmation=confirm_runs,
        driven=driven,
        spent=spent_by(store, trials, config),
        space=config.space if isinstance(config.space, dict) else _observed(own),
        environments=[
            row for row in read_rows(store.folder / "environments.jsonl") if isinstance(row, dict)
        ],
        importances=importance(own, config.objectives),
    )


def count_states(runs: Iterable[ReportedTrial]) -> dict[str, int]:
    """Count runs by state, in the order of a trial's life."""
    counts = Counter(run.state for run in runs)
    return {state: counts[state] for state in STATES if counts[state]}


def finite(value: Any) -> float | None:
    """Return `value` as a float, None where it is no finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def _run(store: StudyStore, config: StudyConfig, trial: FrozenTrial, driven: bool) -> ReportedTrial:
    rungs = {
        epoch: value
        for epoch, value in sorted(trial.intermediate_values.items())
        if math.isfinite(value)
    }
    state, metric = trial.state.name, config.metric
    values = {}
    if (
        state == "COMPLETE" and trial.values
    ):  # one per objective; a baseline has that of the metric alone
        names = config.objectives if len(trial.values) == len(config.objectives) else (metric,)
        named = zip(names, trial.values, strict=False)
        values = {name: value for name, given in named if (value := finite(given)) is not None}
    facts = trial.user_attrs.get("stats")
    scores = facts.get("scores") if isinstance(facts, dict) else None
    known = {**(scores if isinstance(scores, dict) else {}), **values}
    last = rungs[max(rungs)] if rungs and state != "FAIL" else None
    value = finite(known.get(metric)) if state in ("COMPLETE", "PRUNED") else None
    value = last if value is None else value
    return ReportedTrial(
        number=trial.number,
        state=state_of(trial, running=driven),
        feasible=keeps_limits(trial, config),
        note=note_of(trial),
        value=value,
        dsc=value if metric == "dsc" else finite(known.get("dsc")),
        values=values,
        rungs=rungs,
        params=trial.params,
        folder=_folder(store, trial),
        attributes=trial.user_attrs,
        started=trial.datetime_start,
        ended=trial.datetime_complete,
    )


def _folder(store: StudyStore, trial: FrozenTrial) -> Path:
    path, baseline = trial.user_attrs.get("path"), trial.user_attrs.get("baseline")
    if isinstance(path, str):
        folder = (store.folder / path).resolve()
        if folder.is_relative_to(
            store.folder.resolve()
        ):  # a report shows nothing from outside of its study
            return store.folder / path
    if baseline:
        return store.baseline_folder(str(baseline), trial.user_attrs.get("repeat", trial.number))
    return store.trial_folder(trial.number)


def _front(
    config: StudyConfig, trials: Sequence[FrozenTrial], runs: Sequence[ReportedTrial]
) -> list[ReportedTrial]:
    by_number = {run.number: run for run in runs}
    candidates = [trial for trial in trials if by_number[trial.number].finished]
    if config.sampler.name == "pbt":
        latest = max((trial.user_attrs.get("generation", 0) for trial in candidates), default=0)
        candidates = [
            trial for trial in candidates if trial.user_attrs.get("generation", 0) == latest
        ]
    return [by_number[trial.number] for trial in front(candidates, config)]


def _observed(trials: Sequence[FrozenTrial]) -> dict[str, Parameter]:
    """Return a space that is a Python function, as the trials were drawn from it."""
    space: dict[str, Parameter] = {}
    for trial in trials:
        for name, drawn in trial.distributions.items():
            if name in space:
                continue
            if isinstance(drawn, optuna.distributions.CategoricalDistribution):
                space[name] = Choice.model_construct(
                    choices=list(drawn.choices), default=None, when=None
                )
            elif isinstance(
                drawn, optuna.distributions.FloatDistribution | optuna.distributions.IntDistribution
            ):
                step = None if drawn.step == 1 and isinstance(drawn.low, int) else drawn.step
                space[name] = Range.model_construct(
                    low=drawn.low,
                    high=drawn.high,
                    log=drawn.log,
                    step=step,
                    default=None,
                    when=None,
                )
    return space
