"""What a step, a look and a probe take on this machine, measured by making a few."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from amlp_ray.config import PretrainSettings, StudySettings
from amlp_ray.data.dataset import PatchDataset
from amlp_ray.data.loading.batches import ExampleBatches
from amlp_ray.evaluation.linear_probe import Probe
from amlp_ray.study.rungs import schedule
from amlp_ray.study.search_space.validate import drawn_settings

TIMED_STEPS = 2  # per ratio, after one that warms up


@dataclass(frozen=True)
class Price:
    """Of one set of settings, in seconds and megabytes."""

    settings: PretrainSettings
    step: float
    probe: float
    checkpoint_mb: float

    def trial(self, images: int, rungs: int, workers: int) -> float:
        """Seconds of a whole trial. A look at an image costs about a step on it (benchmarks/step.py)."""
        s = self.settings
        steps = s.epochs * max(1, images // s.batch_size)
        looks = (
            steps / s.selection.refresh
            if s.selection.mode != "random" and s.selection.refresh
            else 0.0
        )
        return (steps + looks) * self.step / workers + rungs * self.probe


def dearest_and_cheapest(settings: StudySettings) -> list[PretrainSettings]:
    """The study's own settings, and of its space those that should take most and least: by epochs, size and ratio."""
    drawn = sorted(drawn_settings(settings), key=_work)
    return (
        [settings.trial({}, seed=0), drawn[0], drawn[-1]]
        if settings.space
        else [settings.trial({}, seed=0)]
    )


def _work(settings: PretrainSettings) -> float:
    ratios = schedule(settings)
    visible = 1 - sum(ratios) / len(ratios)
    m = settings.model
    return (
        settings.epochs
        * (m.depth * m.width**2 * visible + m.decoder_depth * m.decoder_width**2)
        / m.patch_size**2
    )


def price(
    settings: StudySettings,
    dataset: PatchDataset,
    runs: Sequence[PretrainSettings],
    labels: PatchDataset | None = None,
) -> list[Price]:
    """Time one probe, and a few steps of every one of `runs` over the ratios of its schedule."""
    from amlp_ray.method.encoder import new_encoder

    device = _device(settings)
    with _threads(settings):
        scored = Probe(
            dataset if labels is None else labels, settings.probe, runs[0].model.patch_size
        )
        encoder = new_encoder(runs[0].model, dataset.spec).to(device)
        started = time.perf_counter()
        scored.score(encoder)
        probe = time.perf_counter() - started
        timed = [(run, _timed(run, dataset, device)) for run in runs]
    return [Price(run, step, probe, megabytes) for run, (step, megabytes) in timed]


def _timed(run: PretrainSettings, dataset: PatchDataset, device: str) -> tuple[float, float]:
    """Seconds per optimiser step, averaged over the schedule's ratios, and megabytes of a checkpoint and encoder."""
    import torch

    from amlp_ray.method.masking import Moment
    from amlp_ray.training.objectives import step_of
    from amlp_ray.training.pretrain import take_gradient
    from amlp_ray.training.train_state import Learner

    batches = ExampleBatches(dataset, batch_size=run.batch_size)
    learner = Learner(run, batches.spec, device)
    model = learner.model
    batch = next(iter(batches.epoch(1)))
    objective = step_of(model, run, None)
    spent = []
    for epoch in sorted({1, (run.epochs + 1) // 2, run.epochs}):
        for attempt in range(TIMED_STEPS + 1):
            started = time.perf_counter()
            take_gradient(model, learner, objective, batch, Moment(epoch))
            learner.step()
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
