"""Check a study and estimate its cost before its first trial."""

from __future__ import annotations

import math
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from optuna.trial import TrialState

from amlp_ray.config import Choice, PretrainConfig, StudyConfig
from amlp_ray.data.dataset import PatchDataset
from amlp_ray.errors import ConfigError
from amlp_ray.evaluation.labels import check_fits
from amlp_ray.evaluation.linear_probe import Probe
from amlp_ray.runtime.resources import Cluster, jobs_side_by_side
from amlp_ray.study.baselines import baseline_plans, check_baselines
from amlp_ray.study.execution.cost_estimate import measure_costs
from amlp_ray.study.rungs import prunable_rungs, rung_epochs
from amlp_ray.study.search.samplers import check_sampler
from amlp_ray.study.search_space.validate import check_space, sample_configs
from amlp_ray.study.storage.study_store import StudyStore
from amlp_ray.study.storage.trial_record import trial_records
from amlp_ray.utils.text import counted

OTHER_FILES_MB = 2.0  # a trial's pictures, metrics and scores, at most
MIN_PAST_TRIALS = 3  # for an estimate from the study's own trials

Range3 = tuple[float, float, float]  # least, expected, most


@dataclass(frozen=True)
class Plan:
    """What a study will take.

    A range is least, expected, most. The least is if half is pruned and trials are as cheap as the
    space allows. The most is if nothing is pruned and all are as expensive.
    """

    study: str
    trials: int
    """Number of trials of the search."""
    baseline_runs: int
    """Number of baselines times their seeds."""
    epochs: int
    """Epochs of a full trial."""
    steps_per_trial: int
    """Optimizer steps of a full trial."""
    rungs: tuple[int, ...]
    """Epochs at which a trial is scored."""
    prunable_rungs: tuple[int, ...]
    """Rungs at which a trial may be pruned; empty if all are too short for pruner.min_steps."""
    workers: int
    """Workers of a trial."""
    cpus_per_trial: float
    """CPUs of all its workers."""
    gpus_per_trial: float
    """GPUs of all its workers."""
    concurrency: int
    """Number of trials at the same time."""
    estimated_from: str
    """What the estimate rests on: steps run now, or the study's own trials."""
    seconds_per_trial: Range3
    seconds_per_probe: float
    hours: Range3
    """Hours that the search takes."""
    gpu_hours: Range3
    confirm_pretrain_hours: float
    """Hours of pretraining for `study confirm`. Fine-tuning comes on top, often as much."""
    disk_gb: float
    """GB that all trials and the confirmation take."""
    disk_free_gb: float
    """GB free where the study lies."""

    def as_dict(self) -> dict[str, Any]:
        """Return the plan as plain values."""
        return asdict(self)


def check_study(
    config: StudyConfig, dataset: PatchDataset, eval_data: PatchDataset | None = None
) -> None:
    """Raise ConfigError or DataError for what would fail only after hours.

    Space, baselines, patch size, labels and batch size are checked.

    Args:
        dataset: that trials train on.
        eval_data: that scores them, if not `dataset`.
    """
    check_sampler(config)
    if config.sampler.name != "pbt":
        check_space(config)
    if eval_data is not None:
        check_fits(eval_data, dataset.spec, f"{dataset.path} holds")
    drawn = [config.trial({}, seed=0), *sample_configs(config)]
    check_baselines(config, dataset)
    baselines = [plan.config(0) for plan in baseline_plans(config)]
    for trial in [*drawn, *baselines]:
        trial.check_image(dataset.spec)
        trial.check_workers(config.resources)
        config.confirm.finetune.check_patch_size(trial.model.patch_size)
    if _searches_oracle(config) or any(trial.selection.uses_ground_truth for trial in drawn):
        raise ConfigError(
            f"{config.name}: an oracle uses true lesions, so no study may search it; take "
            f"oracle out of selection.rule and selection.score. Baseline oracle runs it, for "
            f"diagnosis."
        )
    needs_memory = "memory" in {*config.limits, *config.objectives}
    if needs_memory and not config.resources.is_single_worker:
        raise ConfigError(
            "memory, in limits or objectives, is known of trials with one worker only; drop it, "
            "or set resources.workers=1."
        )
    scored = dataset if eval_data is None else eval_data
    for patch_size in sorted({trial.model.patch_size for trial in drawn}):
        # Raises for labels, groups and folds that score nothing.
        probe = Probe(scored, config.probe, patch_size)
        _check_lesion_sizes(config, probe)


def _searches_oracle(config: StudyConfig) -> bool:
    space = config.space if isinstance(config.space, dict) else {}
    return any(isinstance(p, Choice) and "oracle" in p.choices for p in space.values())


def _check_lesion_sizes(config: StudyConfig, probe: Probe) -> None:
    """Refuse an objective for a size of lesions that no scored image has."""
    objectives = {*config.objectives, config.metric}
    for size, images in probe.images_by_size().items():
        if f"dsc_{size}" in objectives and not images:
            raise ConfigError(
                f"objectives: no scored image has a {size} lesion by "
                f"probe.sizes={list(config.probe.sizes)}; change probe.sizes, or name another "
                f"objective than dsc_{size}."
            )


def make_plan(
    config: StudyConfig,
    dataset: PatchDataset,
    cluster: Cluster,
    eval_data: PatchDataset | None = None,
    store: StudyStore | None = None,
) -> Plan:
    """Check a study and estimate what it takes.

    Its own finished trials give the figures if there are enough, else a few steps run here.

    Args:
        dataset: that trials train on.
        cluster: that they will run on.
        eval_data: that scores them, if not `dataset`.
        store: of the study, if it was begun.
    """
    check_study(config, dataset, eval_data)
    base = config.trial({}, seed=0)
    side_by_side = jobs_side_by_side(config.resources, cluster)
    images = dataset.count("train")
    workers = config.resources.max_workers
    gpus = config.resources.gpus_per_worker * workers
    rungs = _rungs(config, base)
    costs = measure_costs(config, dataset, eval_data)
    past = _past_seconds(store)
    seconds = _range(past or [cost.seconds(images, len(rungs), workers) for cost in costs])
    baselines = [plan.config(0) for plan in baseline_plans(config)]
    trained = sum(baseline.objective != "none" for baseline in baselines)
    baseline_runs = len(baselines) * config.baseline_seeds
    confirm_runs = config.confirm.seeds * (config.confirm.top + trained)
    prunable = prunable_rungs(base, config.pruner, images)
    hours = _hours(config, seconds, _trained_shares(config, base, prunable), trained, side_by_side)
    checkpoint_mb = max(cost.checkpoint_mb for cost in costs)
    runs = config.budget.trials + baseline_runs + confirm_runs
    return Plan(
        study=config.name,
        trials=config.budget.trials,
        baseline_runs=baseline_runs,
        epochs=base.epochs,
        steps_per_trial=base.epochs * max(1, images // base.batch_size),
        rungs=rungs,
        prunable_rungs=prunable,
        workers=workers,
        cpus_per_trial=config.resources.cpus_per_worker * workers,
        gpus_per_trial=gpus,
        concurrency=side_by_side,
        estimated_from=f"{counted(len(past), 'trial')} of this study" if past else "steps run now",
        seconds_per_trial=seconds,
        seconds_per_probe=costs[0].probe,
        hours=hours,
        gpu_hours=_scale(hours, side_by_side * gpus),
        confirm_pretrain_hours=confirm_runs * seconds[1] / side_by_side / 3600,
        disk_gb=runs * (checkpoint_mb + OTHER_FILES_MB) / 1000,
        disk_free_gb=_free_gb(store.folder if store else Path()),
    )


def _rungs(config: StudyConfig, base: PretrainConfig) -> tuple[int, ...]:
    if config.sampler.name != "pbt":
        return rung_epochs(base.epochs, config.pruner)
    starts = range(0, base.epochs, config.sampler.interval)
    return tuple(min(base.epochs, start + config.sampler.interval) for start in starts)


def _trained_shares(config: StudyConfig, base: PretrainConfig, prunable: tuple[int, ...]) -> Range3:
    """Return what share of a full trial is trained on average: least, expected, most."""
    if config.sampler.name == "pbt":
        share = config.sampler.interval / base.epochs  # a trial is one step of a member
        return share, share, share
    least = 0.5 + 0.5 * prunable[0] / base.epochs if prunable else 1.0
    return least, (least + 1.0) / 2, 1.0


def _hours(
    config: StudyConfig, seconds: Range3, shares: Range3, trained: int, side_by_side: int
) -> Range3:
    """Return the wall hours of search and baselines, within `budget.hours`."""
    limit = config.budget.hours or math.inf

    def hours(i: int) -> float:
        search = config.budget.trials * shares[i] * seconds[i]
        baselines = config.baseline_seeds * trained * seconds[i]
        return min((search + baselines) / side_by_side / 3600, limit)

    return hours(0), hours(1), hours(2)


def _past_seconds(store: StudyStore | None) -> list[float]:
    """Return the seconds of this study's complete trials; none if there are too few."""
    if store is None:
        return []
    records = trial_records(store.search(), (TrialState.COMPLETE,))
    seconds = [record.stats["seconds"] for record in records if "seconds" in record.stats]
    return seconds if len(seconds) >= MIN_PAST_TRIALS else []


def _range(values: list[float]) -> Range3:
    return min(values), fmean(values), max(values)


def _scale(values: Range3, factor: float) -> Range3:
    return values[0] * factor, values[1] * factor, values[2] * factor


def _free_gb(folder: Path) -> float:
    """Return the free disk space at a folder, or at the nearest one above that exists."""
    folder = folder.absolute()
    while not folder.is_dir():
        folder = folder.parent
    return shutil.disk_usage(folder).free / 1e9
