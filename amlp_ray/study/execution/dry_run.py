"""Two steps and a probe of one trial, on the cluster: what is wrong with a worker shows before a study is begun."""

from __future__ import annotations

import time
from typing import Any

from amlp_ray.config import PretrainSettings, ProbeSettings, StudySettings
from amlp_ray.data.dataset import PatchDataset
from amlp_ray.runtime.resources import worker_bundle

STEPS = 2
WAIT_S = 300.0


def dry_run(
    settings: StudySettings, dataset: PatchDataset, labels: PatchDataset | None
) -> dict[str, Any]:
    """Run two optimiser steps and one probe in a worker process of the cluster that Ray is joined to; keep nothing.

    Returns:
        node, device, loss of the steps, DSC of the untrained encoder, and seconds.

    Raises:
        ray.exceptions.RayTaskError: whatever went wrong there. ray.exceptions.GetTimeoutError: no room in five minutes.
    """
    import ray

    bundle = worker_bundle(settings.resources)
    task = ray.remote(two_steps).options(
        num_cpus=bundle["CPU"],
        num_gpus=bundle.get("GPU", 0),
        memory=bundle.get("memory"),
        accelerator_type=settings.resources.accelerator,
        max_retries=0,
    )
    run = settings.trial({}, seed=0)
    answer: dict[str, Any] = ray.get(
        task.remote(
            run.model_dump(mode="json"),
            settings.probe.model_dump(mode="json"),
            dataset.path,
            None if labels is None else labels.path,
            max(1, int(settings.resources.cpus_per_worker)),
        ),
        timeout=WAIT_S,
    )
    return answer


def two_steps(
    settings: dict[str, Any], probe: dict[str, Any], data: str, labels: str | None, threads: int
) -> dict[str, Any]:
    """What the worker does, from plain values."""
    import platform

    import torch

    from amlp_ray.data.loading.batches import ExampleBatches
    from amlp_ray.evaluation.linear_probe import Probe
    from amlp_ray.method.masking import Moment
    from amlp_ray.training.objectives import step_of
    from amlp_ray.training.pretrain import take_gradient
    from amlp_ray.training.train_state import Learner

    started = time.perf_counter()
    torch.set_num_threads(threads)
    run = PretrainSettings.model_validate(settings)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dataset = PatchDataset.open(data)
    batches = ExampleBatches(dataset, batch_size=run.batch_size)
    learner = Learner(run, batches.spec, device)
    objective, losses = step_of(learner.model, run, None), []
    batch = next(iter(batches.epoch(1)))
    for step in range(STEPS):
        told = take_gradient(learner.model, learner, objective, batch, Moment(1, step, STEPS))
        learner.step()
        losses.append(float(told["loss"]))
    scored = Probe(
        dataset if labels is None else PatchDataset.open(labels),
        ProbeSettings.model_validate(probe),
        run.model.patch_size,
        dataset.spec,
    ).score(learner.model.eval().encoder)
    return {
        "node": platform.node(),
        "device": device if device == "cpu" else torch.cuda.get_device_name(),
        "loss": losses,
        "dsc": scored.dsc,
        "seconds": time.perf_counter() - started,
    }
