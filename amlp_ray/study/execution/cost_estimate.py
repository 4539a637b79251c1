"""Measure what a training step and a probe take on this machine, by running a few."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from amlp_ray.config import PretrainConfig, StudyConfig
from amlp_ray.data.dataset import PatchDataset
from amlp_ray.data.loading.batches import ExampleBatches
from amlp_ray.evaluation.linear_probe import Probe
from amlp_ray.method.encoder import build_encoder
from amlp_ray.method.masking import TrainingStep
from amlp_ray.study.rungs import schedule
from amlp_ray.study.search_space.validate import sample_configs
from amlp_ray.training.objectives import Model, make_objective
from amlp_ray.training.pretrain import take_gradient
from amlp_ray.training.train_state import TrainState

TIMED_STEPS = 2  # per masking ratio, after one that warms up
BYTES_PER_VALUE = 4


@dataclass(frozen=True)
class TrialCost:
    """What one config costs."""

    config: PretrainConfig
    step: float  # seconds of one training step
    probe: float  # seconds of one probe
    checkpoint_mb: float  # megabytes of a checkpoint and the exported encoder

    def seconds(self, images: int, rungs: int, workers: int) -> float:
        """Return the seconds of a whole trial.

        An analysis of the images costs about as much as a step on them (benchmarks/step.py).

        Args:
            images: number of images that it trains on.
            rungs: how often it is probed.
            workers: how many share each batch.
        """
        config = self.config
        steps = float(config.epochs * max(1, images // config.batch_size))
        interval = config.selection.analysis_interval
        if config.selection.mode != "random" and interval:
            steps += steps / interval
        return steps * self.step / workers + rungs * self.probe


def _cost_extremes(config: StudyConfig) -> list[PretrainConfig]:
    """Return the study's own settings, and those of its space that should cost least and most."""
    base = config.trial({}, seed=0)
    if not config.space:
        return [base]
    drawn = sorted(sample_configs(config), key=_relative_work)
    return [base, drawn[0], drawn[-1]]


def _relative_work(config: PretrainConfig) -> float:
    """Estimate the work of a config by its epochs, model and masking ratios."""
    ratios = schedule(config)
    visible = 1 - sum(ratios) / len(ratios)
    model = config.model
    encoder = model.depth * model.width**2 * visible
    decoder = model.decoder_depth * model.decoder_width**2
    return config.epochs * (encoder + decoder) / model.patch_size**2


def measure_costs(
    config: StudyConfig,
    dataset: PatchDataset,
    eval_data: PatchDataset | None = None,
) -> list[TrialCost]:
    """Time one probe, and a few steps of each of `_cost_extremes` over its schedule's ratios.

    Args:
        dataset: that trials train on.
        eval_data: that scores them, if not `dataset`.
    """
    runs = _cost_extremes(config)
    device = _device(config)
    with _threads_of_a_worker(config):
        patch_size = runs[0].model.patch_size
        probe = Probe(dataset if eval_data is None else eval_data, config.probe, patch_size)
        encoder = build_encoder(runs[0].model, dataset.spec).to(device)
        started = time.perf_counter()
        probe.score(encoder)
        probe_seconds = time.perf_counter() - started
        costs = []
        for run in runs:
            step_seconds, megabytes = _time_steps(run, dataset, device)
            costs.append(TrialCost(run, step_seconds, probe_seconds, megabytes))
    return costs


def _time_steps(run: PretrainConfig, dataset: PatchDataset, device: str) -> tuple[float, float]:
    """Return seconds per step, averaged over the schedule's ratios, and megabytes of the files."""
    epochs = sorted({1, (run.epochs + 1) // 2, run.epochs})
    steps = [TrainingStep(epoch) for epoch in epochs for _ in range(TIMED_STEPS + 1)]
    model, _, seconds = take_steps(run, dataset, device, steps)
    timed = [step_seconds for i, step_seconds in enumerate(seconds) if i % (TIMED_STEPS + 1)]
    # Weights and two moments in the checkpoint, and the exported encoder.
    values = sum(tensor.numel() for tensor in model.state_dict().values())
    values += 3 * sum(parameter.numel() for parameter in model.parameters())
    return sum(timed) / len(timed), values * BYTES_PER_VALUE / 1e6


def take_steps(
    config: PretrainConfig, dataset: PatchDataset, device: str, steps: Sequence[TrainingStep]
) -> tuple[Model, list[float], list[float]]:
    """Train on one batch; return the model, and the loss and seconds of each optimizer step."""
    batches = ExampleBatches(dataset, batch_size=config.batch_size)
    train_state = TrainState(config, batches.spec, device)
    model = train_state.model
    objective = make_objective(model, config, None)
    batch = next(iter(batches.epoch(1)))
    losses = []
    seconds = []
    for step in steps:
        started = time.perf_counter()
        metrics = take_gradient(model, train_state, objective, batch, step)
        train_state.step()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
        losses.append(float(metrics["loss"]))
    return model, losses, seconds


def _device(config: StudyConfig) -> str:
    return "cuda" if torch.cuda.is_available() and config.resources.gpus_per_worker else "cpu"


@contextmanager
def _threads_of_a_worker(config: StudyConfig) -> Iterator[None]:
    previous = torch.get_num_threads()
    torch.set_num_threads(config.resources.threads)
    try:
        yield
    finally:
        torch.set_num_threads(previous)
