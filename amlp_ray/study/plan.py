"""Say before you spend: check a study and price it before its first trial."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

from amlp_ray.config import Choice, PretrainSettings, StudySettings
from amlp_ray.data.dataset import PatchDataset
from amlp_ray.data.reading.stream import ExampleBatches
from amlp_ray.errors import SettingsError
from amlp_ray.runtime.capacity import jobs_side_by_side
from amlp_ray.study.design import arm_settings, prunable_rungs, rung_epochs
from amlp_ray.study.space import check_space, drawn_settings
from amlp_ray.training.labelled import check_fits
from amlp_ray.training.probe import Probe


@dataclass(frozen=True)
class Plan:
    """What a study will take. Hours are wall hours: `hours_full` if nothing is pruned, `hours_pruned` if half is."""

    study: str
    trials: int
    arm_trials: int
    epochs: int
    steps_per_trial: int
    rungs: tuple[int, ...]
    prunable_rungs: tuple[int, ...]  # those at which a trial may be pruned; none: too short for pruner.min_steps
    workers: int
    cpus_per_trial: float
    gpus_per_trial: float
    concurrency: int
    seconds_per_trial: float
    seconds_per_probe: float
    hours_full: float
    hours_pruned: float
    gpu_hours_full: float

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def check_study(settings: StudySettings, dataset: PatchDataset, labels: PatchDataset | None = None) -> None:
    """Raise SettingsError or DataError for what would fail only after hours: space, patch size, labels, batch.

    Args:
        labels: where they are a data set apart.
    """
    check_space(settings)
    if labels is not None:
        check_fits(labels, dataset.spec, f"{dataset.path} holds")
    base = settings.trial({}, seed=0)
    drawn = [base, *drawn_settings(settings)]
    for trial in [*drawn, *(arm_settings(settings, arm, seed=0) for arm in settings.arms)]:
        trial.check_image(dataset.spec)
        trial.check_workers(settings.resources.workers)
    searched = [value for p in settings.space.values() if isinstance(p, Choice) for value in p.choices]
    if "oracle" in searched or any(trial.selection.uses_truth for trial in drawn):
        raise SettingsError(
            f"{settings.name}: an oracle aims by true lesions, so no study may search or score it; take oracle out of "
            f"selection.rule and selection.score. `amlp-ray pretrain` runs it, for diagnosis."
        )
    scored = dataset if labels is None else labels
    for patch_size in sorted({trial.model.patch_size for trial in drawn}):
        Probe(scored, settings.probe, patch_size)  # tells of labels, groups and folds that cannot score anything


def make_plan(
    settings: StudySettings, dataset: PatchDataset, cluster: dict[str, float], labels: PatchDataset | None = None
) -> Plan:
    """Check the study and price it by timing, here, one probe and a few steps of its base settings and of every arm."""
    check_study(settings, dataset, labels)
    base = settings.trial({}, seed=0)
    side_by_side = jobs_side_by_side(settings.resources, cluster)
    images = dataset.count("train")
    steps = base.epochs * max(1, images // base.batch_size)
    probe = _seconds_per_probe(settings, base, dataset if labels is None else labels)
    rungs = rung_epochs(base.epochs, settings.pruner.rungs)
    workers = settings.resources.workers

    def seconds(run: PretrainSettings) -> float:
        return steps * _seconds_per_step(settings, run, dataset) / workers + len(rungs) * probe

    per_trial = seconds(base)
    arms = [arm_settings(settings, arm, seed=0) for arm in settings.arms]
    trained_arms = settings.arm_seeds * sum(seconds(arm) for arm in arms if arm.objective != "none")
    prunable = prunable_rungs(base, settings.pruner, images)
    share = 0.5 + 0.5 * prunable[0] / base.epochs if prunable else 1.0
    full = (settings.budget.trials * per_trial + trained_arms) / side_by_side / 3600
    pruned = (settings.budget.trials * share * per_trial + trained_arms) / side_by_side / 3600
    limit = settings.budget.hours or math.inf
    return Plan(
        study=settings.name,
        trials=settings.budget.trials,
        arm_trials=len(settings.arms) * settings.arm_seeds,
        epochs=base.epochs,
        steps_per_trial=steps,
        rungs=rungs,
        prunable_rungs=prunable,
        workers=workers,
        cpus_per_trial=settings.resources.cpus_per_worker * workers,
        gpus_per_trial=settings.resources.gpus_per_worker * workers,
        concurrency=side_by_side,
        seconds_per_trial=per_trial,
        seconds_per_probe=probe,
        hours_full=min(full, limit),
        hours_pruned=min(pruned, limit),
        gpu_hours_full=min(full, limit) * side_by_side * settings.resources.gpus_per_worker * workers,
    )


def _seconds_per_step(settings: StudySettings, run: PretrainSettings, dataset: PatchDataset) -> float:
    """Seconds per optimiser step, averaged over the schedule's ratios; looks between steps are left out."""
    import torch

    from amlp_ray.method.masking import Moment
    from amlp_ray.training.pretrain import build_model
    from amlp_ray.training.steps import step_of

    device = _device(settings)
    with _threads(settings):
        batches = ExampleBatches(dataset, batch_size=run.batch_size)
        model, optimizer = build_model(run, batches, device)
        batch = next(iter(batches.epoch(1)))
        objective = step_of(model, run, None)
        spent = []
        for epoch in sorted({1, (run.epochs + 1) // 2, run.epochs}):
            for attempt in range(3):  # the first is a warm-up
                started = time.perf_counter()
                objective(model, batch, Moment(epoch), device)["loss"].backward()
                optimizer.step()
                optimizer.zero_grad()
                if device == "cuda":
                    torch.cuda.synchronize()
                if attempt:
                    spent.append(time.perf_counter() - started)
    return sum(spent) / len(spent)


def _seconds_per_probe(settings: StudySettings, run: PretrainSettings, dataset: PatchDataset) -> float:
    from amlp_ray.method.encoder import new_encoder

    with _threads(settings):
        probe = Probe(dataset, settings.probe, run.model.patch_size)
        encoder = new_encoder(run.model, dataset.spec).to(_device(settings))
        started = time.perf_counter()
        probe.score(encoder)
    return time.perf_counter() - started


def _device(settings: StudySettings) -> str:
    import torch

    return "cuda" if torch.cuda.is_available() and settings.resources.gpus_per_worker else "cpu"


@contextmanager
def _threads(settings: StudySettings) -> Iterator[None]:
    """As many CPU threads as a trial will have."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(max(1, int(settings.resources.cpus_per_worker)))
    try:
        yield
    finally:
        torch.set_num_threads(before)
