"""Run two steps and a probe of one trial on the cluster, to find faults of workers early."""

from __future__ import annotations

import platform
import time
from typing import Any

import torch

from amlp_ray.config import PretrainConfig, ProbeConfig, StudyConfig
from amlp_ray.data.dataset import PatchDataset
from amlp_ray.evaluation.linear_probe import Probe
from amlp_ray.method.masking import TrainingStep
from amlp_ray.runtime.resources import worker_bundle
from amlp_ray.study.execution.cost_estimate import take_steps

NUM_STEPS = 2
WAIT_S = 300.0


def dry_run(
    config: StudyConfig, dataset: PatchDataset, eval_data: PatchDataset | None
) -> dict[str, Any]:
    """Run two optimizer steps and one probe in a worker process of the joined cluster.

    Nothing is written.

    Returns:
        node, device, loss of the steps, DSC of the untrained encoder, and seconds.

    Raises:
        ray.exceptions.RayTaskError: whatever went wrong there.
        ray.exceptions.GetTimeoutError: no room in five minutes.
    """
    import ray

    bundle = worker_bundle(config.resources)
    task = ray.remote(run_two_steps).options(
        num_cpus=bundle["CPU"],
        num_gpus=bundle.get("GPU", 0),
        memory=bundle.get("memory"),
        accelerator_type=config.resources.accelerator,
        max_retries=0,
    )
    result = task.remote(
        config.trial({}, seed=0),
        config.probe,
        dataset.path,
        None if eval_data is None else eval_data.path,
        config.resources.threads,
    )
    return ray.get(result, timeout=WAIT_S)


def run_two_steps(
    config: PretrainConfig, probe: ProbeConfig, data: str, eval_data: str | None, threads: int
) -> dict[str, Any]:
    """Run the worker's part of a dry run."""
    started = time.perf_counter()
    torch.set_num_threads(threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dataset = PatchDataset.open(data)
    steps = [TrainingStep(1, step, NUM_STEPS) for step in range(NUM_STEPS)]
    model, losses, _ = take_steps(config, dataset, device, steps)
    scored = dataset if eval_data is None else PatchDataset.open(eval_data)
    score = Probe(scored, probe, config.model.patch_size, dataset.spec).score(model.eval().encoder)
    return {
        "node": platform.node(),
        "device": device if device == "cpu" else torch.cuda.get_device_name(),
        "loss": losses,
        "dsc": score.dsc,
        "seconds": time.perf_counter() - started,
    }
