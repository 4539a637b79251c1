"""Two steps and a probe of one trial, on the cluster: what is wrong with a worker shows before a study is begun."""

from __future__ import annotations

import time
from typing import Any

from amlp_ray.config import PretrainConfig, ProbeConfig, StudyConfig
from amlp_ray.data.dataset import PatchDataset
from amlp_ray.runtime.resources import worker_bundle

STEPS = 2
WAIT_S = 300.0


def dry_run(
    config: StudyConfig, dataset: PatchDataset, eval_data: PatchDataset | None
) -> dict[str, Any]:
    """Run two optimiser steps and one probe in a worker process of the cluster that Ray is joined to; keep nothing.

    Returns:
        node, device, loss of the steps, DSC of the untrained encoder, and seconds.

    Raises:
        ray.exceptions.RayTaskError: whatever went wrong there. ray.exceptions.GetTimeoutError: no room in five minutes.
    """
    import ray

    bundle = worker_bundle(config.resources)
    trial_spec = ray.remote(two_steps).options(
        num_cpus=bundle["CPU"],
        num_gpus=bundle.get("GPU", 0),
        memory=bundle.get("memory"),
        accelerator_type=config.resources.accelerator,
        max_retries=0,
    )
    run = config.trial({}, seed=0)
    answer: dict[str, Any] = ray.get(
        trial_spec.remote(
            run.model_dump(mode="json"),
            config.probe.model_dump(mode="json"),
            dataset.path,
            None if eval_data is None else eval_data.path,
            max(1, int(config.resources.cpus_per_worker)),
        ),
        timeout=WAIT_S,
    )
    return answer


def two_steps(
    config: dict[str, Any], probe: dict[str, Any], data: str, eval_data: str | None, threads: int
) -> dict[str, Any]:
    """What the worker does, from plain values."""
    import platform

    import torch

    from amlp_ray.data.loading.batches import ExampleBatches
    from amlp_ray.evaluation.linear_probe import Probe
    from amlp_ray.method.masking import TrainingStep
    from amlp_ray.training.objectives import make_objective
    from amlp_ray.training.pretrain import take_gradient
    from amlp_ray.training.train_state import TrainState

    started = time.perf_counter()
    torch.set_num_threads(threads)
    run = PretrainConfig.model_validate(config)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dataset = PatchDataset.open(data)
    batches = ExampleBatches(dataset, batch_size=run.batch_size)
    train_state = TrainState(run, batches.spec, device)
    objective, losses = make_objective(train_state.model, run, None), []
    batch = next(iter(batches.epoch(1)))
    for step in range(STEPS):
        told = take_gradient(
            train_state.model, train_state, objective, batch, TrainingStep(1, step, STEPS)
        )
        train_state.step()
        losses.append(float(told["loss"]))
    scored = Probe(
        dataset if eval_data is None else PatchDataset.open(eval_data),
        ProbeConfig.model_validate(probe),
        run.model.patch_size,
        dataset.spec,
    ).score(train_state.model.eval().encoder)
    return {
        "node": platform.node(),
        "device": device if device == "cpu" else torch.cuda.get_device_name(),
        "loss": losses,
        "dsc": scored.dsc,
        "seconds": time.perf_counter() - started,
    }
