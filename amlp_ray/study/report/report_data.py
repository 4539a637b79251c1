"""Collect what a report shows from the study store. Nothing here draws or judges."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from amlp_ray.config import Choice, Parameter, PretrainConfig, Range, StudyConfig
from amlp_ray.study.operations.status import study_usage
from amlp_ray.study.operations.trials import STATES
from amlp_ray.study.report.importance import Importance, importance
from amlp_ray.study.search_space.space import as_parameter
from amlp_ray.study.storage.best_trials import keeps_limits, pareto_front
from amlp_ray.study.storage.budget import Usage
from amlp_ray.study.storage.study_store import StudyStore
from amlp_ray.study.storage.trial_record import TrialRecord, finite, trial_records
from amlp_ray.utils.json_files import read_json, read_json_lines

Key = TypeVar("Key")

# Titles of objectives and other measures.
TITLES = {
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
class ReportedTrial(TrialRecord):
    """A trial of the search, a baseline run or a confirmation run, as a report shows it."""

    config: StudyConfig
    state_name: str  # RUNNING is INTERRUPTED where no process runs the study
    path: Path  # absolute path of its folder, always inside of the study's
    is_feasible: bool  # whether it keeps `limits`, as far as it measured what they are of

    @property
    def name(self) -> str:
        """Return `trial 7` of the search, `mae-0` of a baseline or a confirmation."""
        group = self.baseline or self.candidate
        return f"{group}-{self.repeat}" if group else f"trial {self.number}"

    @property
    def is_full_length(self) -> bool:
        """Return whether it ran its full budget and has a score."""
        return self.is_complete and self.metric_value is not None and self.dsc is not None

    @cached_property
    def rungs(self) -> dict[int, float]:
        """The study's metric by epoch, where it is finite."""
        return _finite_values(dict(sorted(super().rungs.items())))

    @cached_property
    def metric_value(self) -> float | None:
        """The study's metric, at the last rung so far where the run was pruned or is not over."""
        return self.score(self.config)

    @property
    def sort_value(self) -> float:
        """Return the metric to rank trials by, with 0 for one that has none."""
        return self.metric_value or 0.0

    @property
    def rank(self) -> tuple[bool, float]:
        """Return a key that sorts the best by the metric first, and those without it last."""
        return self.metric_value is None, -self.sort_value

    @property
    def dsc(self) -> float | None:
        """Return the DSC, which is the metric unless the study has another."""
        if self.config.metric == "dsc":
            return self.metric_value
        return finite({**self.measured, **self.objectives}.get("dsc"))

    @cached_property
    def objectives(self) -> dict[str, float]:
        """Finite values by objective, of a complete run."""
        return _finite_values(self.objective_values(self.config))

    @property
    def epochs(self) -> int | None:
        """Return the epochs run, as stored at its end or as its rungs show."""
        epochs = self.cost("epochs")
        return max(self.rungs, default=None) if epochs is None else int(epochs)

    @property
    def last_seen(self) -> datetime | None:
        """Return when it ended, or when it was last known to run."""
        if self.ended or self.started is None:
            return self.ended
        if self.state_name == "RUNNING":
            return datetime.now()
        metrics = self.path / "metrics.jsonl"
        if not metrics.is_file():
            return self.started
        return max(self.started, datetime.fromtimestamp(metrics.stat().st_mtime))

    def measure(self, key: str) -> float | None:
        """Return a number of its last scoring; None where it is missing or not finite."""
        if key in self.measured:  # no file is opened for what the store holds
            return finite(self.measured[key])
        return finite(self.score_file.get(key))

    @cached_property
    def score_file(self) -> dict[str, Any]:
        """`score.json` without the values of single images, which are many; empty without one."""
        score = read_json(self.path / "score.json") or {}
        score.pop("per_image", None)
        score.pop("per_group", None)
        return score

    def per_group(self) -> dict[str, float]:
        """Read the DSC of every scored group; empty where there is no score."""
        values = (read_json(self.path / "score.json") or {}).get("per_group")
        return _finite_values(values) if isinstance(values, dict) else {}


@dataclass(frozen=True)
class ReportData:
    """What a report shows; curves, per-image scores and pictures are read when they are drawn."""

    name: str
    folder: Path
    config: StudyConfig
    search: list[ReportedTrial]  # trials that the study trained
    copies: list[ReportedTrial]  # trials of the search that were answered from the store
    imported: list[ReportedTrial]  # trials of elsewhere, which are no result
    # Complete trials within `limits` that none beats in every objective; with one objective, the
    # best.
    front: list[ReportedTrial]
    baselines: list[ReportedTrial]  # runs of baselines
    confirmation: list[ReportedTrial]  # runs of the confirmation
    usage: Usage  # what was spent of the budget
    # As declared; of a Python function, as the trials' distributions show it.
    space: dict[str, Parameter]
    environments: list[dict[str, Any]]  # one for each time the study was run
    importances: dict[str, Importance]  # by objective

    @property
    def best(self) -> ReportedTrial | None:
        """Return the best complete trial by the metric; with several objectives, on their front.

        Of population-based training, the best of its latest generation: earlier steps are parts of
        a training.
        """
        return max(self.front, key=lambda trial: trial.sort_value, default=None)

    @property
    def has_open_trials(self) -> bool:
        """Return whether trials run or wait, so that numbers can change."""
        open_states = ("RUNNING", "INTERRUPTED", "WAITING")
        return any(trial.state_name in open_states for trial in [*self.search, *self.baselines])

    @property
    def metric(self) -> str:
        """Return the title of the score that trials are ranked by."""
        return TITLES[self.config.metric]

    @property
    def environment(self) -> dict[str, Any]:
        """Return the environment of the latest run of the study."""
        return self.environments[-1] if self.environments else {}

    def dataset(self, name: str) -> dict[str, Any]:
        """Return what the environment says of `dataset` or `eval_data`; empty where it does not."""
        description = self.environment.get(name)
        return description if isinstance(description, dict) else {}

    def parameter_names(self) -> list[str]:
        """Return names of searched parameters: as declared, then those that only trials have."""
        searched = Range | Choice
        names = [name for name, declared in self.space.items() if isinstance(declared, searched)]
        for trial in self.search:
            names += trial.params
        return list(dict.fromkeys(names))

    def full_length(self, trial: ReportedTrial) -> int:
        """Return the epochs of a trial that nothing stops early."""
        epochs = trial.params.get("epochs", self.config.pretrain.get("epochs"))
        return int(epochs or PretrainConfig.model_fields["epochs"].default)

    def is_prunable(self, trial: ReportedTrial, epoch: int) -> bool:
        """Return whether a pruner may act at an epoch; True where the steps are unknown."""
        steps = self.steps_per_epoch(trial)
        return steps is None or epoch * steps >= self.config.pruner.min_steps

    def steps_per_epoch(self, trial: ReportedTrial) -> int | None:
        """Return the optimizer steps of an epoch; None where the number of images is unknown."""
        counts = self.dataset("dataset").get("counts")
        images = counts.get("train") if isinstance(counts, dict) else None
        if isinstance(images, dict):
            images = images.get("images")
        if not isinstance(images, int):
            return None
        default = PretrainConfig.model_fields["batch_size"].default
        shared = self.config.pretrain.get("batch_size", default)
        return max(1, images // int(trial.params.get("batch_size", shared)))


def collect(store: StudyStore) -> ReportData:
    """Collect the data of a report; missing or half-written files of trials count as absent."""
    config = store.config()
    is_running = store.is_run()

    def reported(records: Sequence[TrialRecord]) -> list[ReportedTrial]:
        return [_reported_trial(store, config, record, is_running) for record in records]

    records = trial_records(store.search())
    trials = reported(records)
    search = [trial for trial in trials if not trial.is_imported and not trial.is_copy]
    environments = read_json_lines(store.folder / "environments.jsonl")
    return ReportData(
        name=store.name,
        folder=store.folder,
        config=config,
        search=search,
        copies=[trial for trial in trials if trial.is_copy and not trial.is_imported],
        imported=[trial for trial in trials if trial.is_imported],
        front=_front(config, search),
        baselines=reported(trial_records(store.baselines())),
        confirmation=reported(trial_records(store.confirmation())),
        usage=study_usage(store, records),
        space=config.space if isinstance(config.space, dict) else _observed_space(search),
        environments=environments,
        importances=importance([trial.frozen for trial in search], config.objectives),
    )


def count_states(trials: Iterable[ReportedTrial]) -> dict[str, int]:
    """Count trials by state, in the order of STATES."""
    counts = Counter(trial.state_name for trial in trials)
    return {state: counts[state] for state in STATES if counts[state]}


def states_text(states: Mapping[str, int]) -> str:
    """List counts by state, such as `4 COMPLETE, 1 FAIL`; empty where there are none."""
    return ", ".join(f"{count} {state}" for state, count in states.items())


def _reported_trial(
    store: StudyStore, config: StudyConfig, record: TrialRecord, is_running: bool
) -> ReportedTrial:
    return ReportedTrial(
        frozen=record.frozen,
        config=config,
        state_name=record.status(is_running=is_running),
        path=store.folder_of(record),
        is_feasible=keeps_limits(record, config),
    )


def _finite_values(values: Mapping[Key, Any]) -> dict[Key, float]:
    numbers = {key: finite(value) for key, value in values.items()}
    return {key: number for key, number in numbers.items() if number is not None}


def _front(config: StudyConfig, search: Sequence[ReportedTrial]) -> list[ReportedTrial]:
    candidates = [trial for trial in search if trial.is_full_length]
    if config.sampler.name == "pbt":
        latest = max((trial.generation for trial in candidates), default=0)
        candidates = [trial for trial in candidates if trial.generation == latest]
    return pareto_front(candidates, config)


def _observed_space(trials: Sequence[ReportedTrial]) -> dict[str, Parameter]:
    """Return a space that is a Python function, as the trials were sampled from it."""
    space: dict[str, Parameter] = {}
    for trial in trials:
        for name, distribution in trial.distributions.items():
            if name not in space:
                space[name] = as_parameter(distribution)
    return space
