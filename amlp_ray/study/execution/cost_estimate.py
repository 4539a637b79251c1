"""What a step, a look and a probe take on this machine, measured by making a few."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from amlp_ray.config import PretrainConfig, StudyConfig
from amlp_ray.data.dataset import PatchDataset
from amlp_ray.data.loading.batches import ExampleBatches
from amlp_ray.evaluation.linear_probe import Probe
from amlp_ray.study.rungs import schedule
from amlp_ray.study.search_space.validate import drawn_settings

TIMED_STEPS = 2  # per ratio, after one that warms up


@dataclass(frozen=True)
class Price:
    """Of one set of settings, in seconds and megabytes."""

    config: PretrainConfig
    step: float
    probe: float
    checkpoint_mb: float

    def trial(self, images: int, rungs: int, workers: int) -> float:
        """Seconds of a whole trial. A look at an image costs about a step on it (benchmarks/step.py)."""
        s = self.config
        steps = s.epochs * max(1, images // s.batch_size)
        looks = (
            steps / s.selection.analysis_interval
            if s.selection.mode != "random" and s.selection.analysis_interval
            else 0.0
        )
        return (steps + looks) * self.step / workers + rungs * self.probe


def dearest_and_cheapest(config: StudyConfig) -> list[PretrainConfig]:
    """The study's own settings, and of its space those that should take most and least: by epochs, size and ratio."""
    drawn = sorted(drawn_settings(config), key=_work)
    return (
        [config.trial({}, seed=0), drawn[0], drawn[-1]]
        if config.space
        else [config.trial({}, seed=0)]
    )


def _work(config: PretrainConfig) -> float:
    ratios = schedule(config)
    visible = 1 - sum(ratios) / len(ratios)
    m = config.model
    return (
        config.epochs
        * (m.depth * m.width**2 * visible + m.decoder_depth * m.decoder_width**2)
        / m.patch_size**2
    )


def price(
    config: StudyConfig,
    dataset: PatchDataset,
    runs: Sequence[PretrainConfig],
    eval_data: PatchDataset | None = None,
) -> list[Price]:
    """Time one probe, and a few steps of every one of `runs` over the ratios of its schedule."""
    from amlp_ray.method.encoder import build_encoder

    device = _device(config)
    with _threads(config):
        scored = Probe(
            dataset if eval_data is None else eval_data, config.probe, runs[0].model.patch_size
        )
        encoder = build_encoder(runs[0].model, dataset.spec).to(device)
        started = time.perf_counter()
        scored.score(encoder)
        probe = time.perf_counter() - started
        timed = [(run, _timed(run, dataset, device)) for run in runs]
    return [Price(run, step, probe, megabytes) for run, (step, megabytes) in timed]


def _timed(run: PretrainConfig, dataset: PatchDataset, device: str) -> tuple[float, float]:
    """Seconds per optimiser step, averaged over the schedule's ratios, and megabytes of a checkpoint and encoder."""
    import torch

    from amlp_ray.method.masking import TrainingStep
    from amlp_ray.training.objectives import make_objective
    from amlp_ray.training.pretrain import take_gradient
    from amlp_ray.training.train_state import TrainState

    batches = ExampleBatches(dataset, batch_size=run.batch_size)
    train_state = TrainState(run, batches.spec, device)
    model = train_state.model
    batch = next(iter(batches.epoch(1)))
    objective = make_objective(model, run, None)
    spent = []
    for epoch in sorted({1, (run.epochs + 1) // 2, run.epochs}):
        for attempt in range(TIMED_STEPS + 1):
            started = time.perf_counter()
            take_gradient(model, train_state, objective, batch, TrainingStep(epoch))
            train_state.step()
            if device == "cuda":
                torch.cuda.synchronize()
            if attempt:
                spent.append(time.perf_counter() - started)
    values = sum(p.numel() for p in model.state_dict().values()) + 3 * sum(
        p.numel() for p in model.parameters()
    )
    return sum(spent) / len(
        spent
    ), values * 4 / 1e6  # weights, two moments, and the exported encoder


def _device(config: StudyConfig) -> str:
    import torch

    return "cuda" if torch.cuda.is_available() and config.resources.gpus_per_worker else "cpu"


@contextmanager
def _threads(config: StudyConfig) -> Iterator[None]:
    """As many CPU threads as a trial will have."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(max(1, int(config.resources.cpus_per_worker)))
    try:
        yield
    finally:
        torch.set_num_threads(before)
