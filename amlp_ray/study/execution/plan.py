"""Say before you spend: check a study and price it before its first trial."""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
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
from amlp_ray.study.execution.cost_estimate import Price, dearest_and_cheapest, price
from amlp_ray.study.rungs import prunable_rungs, rung_epochs
from amlp_ray.study.search.samplers import check_sampler
from amlp_ray.study.search_space.validate import check_space, drawn_settings
from amlp_ray.study.storage.study_store import StudyStore

KEPT_MB = 2.0  # a trial's pictures, metrics and scores, at most


@dataclass(frozen=True)
class Plan:
    """What a study will take, each a range: least where half is pruned and trials are as cheap as the space has them,
    most where nothing is pruned and all are as dear. Hours are wall hours.
    """

    study: str
    trials: int
    arm_runs: int
    epochs: int
    steps_per_trial: int
    rungs: tuple[int, ...]
    prunable_rungs: tuple[
        int, ...
    ]  # those at which a trial may be pruned; none: too short for pruner.min_steps
    workers: int
    cpus_per_trial: float
    gpus_per_trial: float
    concurrency: int
    priced_by: str
    seconds_per_trial: tuple[float, float, float]  # least, mean, most
    seconds_per_probe: float
    hours: tuple[float, float, float]
    gpu_hours: tuple[float, float, float]
    confirm_pretrain_hours: (
        float  # of `study confirm`; its fine-tuning comes on top, often as much again
    )
    disk_gb: float
    disk_free_gb: float

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def check_study(
    config: StudyConfig, dataset: PatchDataset, eval_data: PatchDataset | None = None
) -> None:
    """Raise ConfigError or DataError for what would fail only after hours: space, patch size, labels, batch.

    Args:
        labels: where they are a data set apart.
    """
    check_sampler(config)
    if config.sampler.name != "pbt":
        check_space(config)
    if eval_data is not None:
        check_fits(eval_data, dataset.spec, f"{dataset.path} holds")
    base = config.trial({}, seed=0)
    drawn = [base, *drawn_settings(config)]
    check_baselines(config, dataset)
    for trial in [*drawn, *(plan.config(0) for plan in baseline_plans(config))]:
        trial.check_image(dataset.spec)
        trial.check_workers(config.resources)
        config.confirm.finetune.check_patch_size(trial.model.patch_size)
    if _searches_truth(config) or any(trial.selection.uses_truth for trial in drawn):
        raise ConfigError(
            f"{config.name}: an oracle aims by true lesions, so no study may search it; take oracle out of "
            f"selection.rule and selection.score. Baseline oracle runs it, for diagnosis."
        )
    if "memory" in {*config.limits, *config.objectives} and not config.resources.alone:
        raise ConfigError(
            "memory, in limits or objectives, is known of trials with one worker only; drop it, or set "
            "resources.workers=1."
        )
    scored = dataset if eval_data is None else eval_data
    for patch_size in sorted({trial.model.patch_size for trial in drawn}):
        probe = Probe(
            scored, config.probe, patch_size
        )  # tells of labels, groups and folds that score nothing
        _check_sizes(config, probe)


def _check_sizes(config: StudyConfig, probe: Probe) -> None:
    """Refuse to strive for the score of lesions that no scored image has."""
    wanted = {
        name.removeprefix("dsc_")
        for name in (*config.objectives, config.metric)
        if name.startswith("dsc_")
    }
    if missing := [
        size for size, images in probe.images_by_size().items() if size in wanted and not images
    ]:
        raise ConfigError(
            f"objectives: no scored image has a {missing[0]} lesion by probe.sizes={list(config.probe.sizes)}; "
            f"change probe.sizes, or name another objective than dsc_{missing[0]}."
        )


def make_plan(
    config: StudyConfig,
    dataset: PatchDataset,
    cluster: Cluster,
    eval_data: PatchDataset | None = None,
    store: StudyStore | None = None,
) -> Plan:
    """Check the study and price it: by its own finished trials where there are enough, else by a few steps made here.

    Args:
        store: of the study, where it was begun.
    """
    check_study(config, dataset, eval_data)
    base = config.trial({}, seed=0)
    side_by_side = jobs_side_by_side(config.resources, cluster)
    images, workers = dataset.count("train"), config.resources.most_workers
    rungs = rung_epochs(base.epochs, config.pruner)
    if config.sampler.name == "pbt":
        every = config.sampler.interval
        rungs = tuple(min(base.epochs, epoch + every) for epoch in range(0, base.epochs, every))
    priced = price(config, dataset, dearest_and_cheapest(config), eval_data)
    seconds, how = _seconds_of_past(store) or (
        _range(priced, base, images, len(rungs), workers),
        "steps made now",
    )
    baselines = [plan.config(0) for plan in baseline_plans(config)]
    trained = sum(baseline.objective != "none" for baseline in baselines)

    prunable = prunable_rungs(base, config.pruner, images)
    kept = 0.5 + 0.5 * prunable[0] / base.epochs if prunable else 1.0
    if config.sampler.name == "pbt":
        kept = config.sampler.interval / base.epochs  # a trial is a segment
    limit = config.budget.hours or math.inf

    def hours(per_trial: float, share: float) -> float:
        work = (
            config.budget.trials * share * per_trial + config.baseline_seeds * trained * per_trial
        )
        return min(work / side_by_side / 3600, limit)

    most = kept if config.sampler.name == "pbt" else 1.0
    wall = (hours(seconds[0], kept), hours(seconds[1], (kept + most) / 2), hours(seconds[2], most))
    gpus = config.resources.gpus_per_worker * workers
    runs = config.budget.trials + len(baselines) * config.baseline_seeds
    again = config.confirm.seeds * (config.confirm.top + trained)
    return Plan(
        study=config.name,
        trials=config.budget.trials,
        arm_runs=len(baselines) * config.baseline_seeds,
        epochs=base.epochs,
        steps_per_trial=base.epochs * max(1, images // base.batch_size),
        rungs=rungs,
        prunable_rungs=prunable,
        workers=workers,
        cpus_per_trial=config.resources.cpus_per_worker * workers,
        gpus_per_trial=gpus,
        concurrency=side_by_side,
        priced_by=how,
        seconds_per_trial=seconds,
        seconds_per_probe=priced[0].probe,
        hours=wall,
        gpu_hours=(
            wall[0] * side_by_side * gpus,
            wall[1] * side_by_side * gpus,
            wall[2] * side_by_side * gpus,
        ),
        confirm_pretrain_hours=again * seconds[1] / side_by_side / 3600,
        disk_gb=(runs + again) * (max(p.checkpoint_mb for p in priced) + KEPT_MB) / 1000,
        disk_free_gb=shutil.disk_usage(_there(store.folder if store else Path())).free / 1e9,
    )


def _searches_truth(config: StudyConfig) -> bool:
    space = {} if isinstance(config.space, str) else config.space
    return any(
        "oracle" in parameter.choices
        for parameter in space.values()
        if isinstance(parameter, Choice)
    )


def _range(
    priced: Sequence[Price], base: PretrainConfig, images: int, rungs: int, workers: int
) -> tuple[float, float, float]:
    """Least, mean and most seconds of a trial over the settings that were timed."""
    each = [p.trial(images, rungs, workers) for p in priced]
    return min(each), fmean(each), max(each)


def _seconds_of_past(
    store: StudyStore | None, enough: int = 3
) -> tuple[tuple[float, float, float], str] | None:
    """What complete trials of this study took."""
    if store is None:
        return None
    done = store.search().get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    took = [t.user_attrs["stats"]["seconds"] for t in done if "stats" in t.user_attrs]
    if len(took) < enough:
        return None
    return (min(took), fmean(took), max(took)), f"{len(took)} trials of this study"


def _there(folder: Path) -> Path:
    """The folder, or the nearest one above it that exists."""
    folder = folder.absolute()
    return folder if folder.is_dir() else _there(folder.parent)
