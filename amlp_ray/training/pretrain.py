"""The pretraining loop: plain PyTorch, handed everything it does not decide itself.

The loop knows no Ray. It runs alone or as one of several data-parallel workers, where torch.distributed was
initialised before. It is told where to write, whom to report to and whom to ask whether to go on.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from amlp_ray.config import FaultSettings, PretrainSettings, ResourceSettings
from amlp_ray.data.loading.batches import Batch, Batches
from amlp_ray.data.loading.prefetch import prefetched
from amlp_ray.errors import CheckpointError, NonFiniteLossError, SettingsError
from amlp_ray.method.masking import Moment
from amlp_ray.training.checkpoint.export import ENCODER, export_encoder, is_encoder
from amlp_ray.training.checkpoint.manager import Keeper, checkpoints
from amlp_ray.training.checkpoint.restore import state_to_keep
from amlp_ray.training.loggers.metrics_file import Metrics, append_row, drop_after
from amlp_ray.training.loggers.mfu import Meter
from amlp_ray.training.lr_schedule import learning_rate
from amlp_ray.training.objectives import Model, Step, Values, step_of
from amlp_ray.training.train_state import Learner
from amlp_ray.utils import distributed
from amlp_ray.utils.event_log import EventLog, read_events
from amlp_ray.utils.retry import Patience


@dataclass
class Hooks:
    """What a runner hands in; the first worker calls each once per epoch, in this order.

    - `evaluate(model, epoch)`: further metrics, such as a probe's DSC at a rung; {} at other epochs.
    - `report(metrics)`: the epoch's metrics, after they are on disk; its checkpoint is on its way there.
    - `should_stop()`: true asks all workers to return early, with everything saved.
    """

    evaluate: Callable[[Model, int], Metrics] = field(default=lambda model, epoch: {})
    report: Callable[[Metrics], None] = field(default=lambda metrics: None)
    should_stop: Callable[[], bool] = field(default=lambda: False)


@dataclass(frozen=True)
class PretrainResult:
    """What a run ended with: the epochs done (over all resumes), the last metrics, the model, the exported encoder.

    `stopped_early`: it was asked to return before its own end, which is that of its segment where it is one.
    """

    epochs: int
    stopped_early: bool
    metrics: Metrics
    model: Model
    encoder: Path


def pretrain(
    settings: PretrainSettings,
    batches: Batches,
    folder: Path,
    *,
    hooks: Hooks | None = None,
    device: str = "cpu",
    truth: Mapping[int, Tensor] | None = None,
    until: int | None = None,
    resources: ResourceSettings | None = None,
    faults: FaultSettings | None = None,
) -> PretrainResult:
    """Pretrain, or go on from the folder's latest checkpoint. A resumed run equals an uninterrupted one.

    Writes `metrics.jsonl` (one line per epoch, `epoch` is 1-based and survives a resume), `events.jsonl`, `checkpoint/`
    (see `keeper.py`) and `encoder.safetensors` into `folder`. A kill costs the epoch that ran and, where its
    checkpoint was still being written, the one before it.

    Args:
        truth: lesion share of every patch by image key, for settings that aim by true lesions; diagnosis only.
        until: the epoch after which to return, for a segment of a longer run: learning rate and masks span
            `settings.epochs` all the same. None is the whole run.
        resources: `micro_batch` and `sharding` of them.
        faults: how long a folder may be full or away, and how many checkpoints are kept.

    Raises:
        NonFiniteLossError: naming epoch, step and the part of the loss.
        CheckpointError: where the folder holds a checkpoint of other settings, or of a later epoch than `until`, or
            none that is whole.
        SettingsError: where `until` is no epoch of the run, or the settings do not fit the images.
        StorageError: the folder took no checkpoint for `faults.storage_minutes`.
    """
    settings.check_image(batches.spec)
    last = settings.epochs if until is None else until
    if not 1 <= last <= settings.epochs:
        raise SettingsError(
            f"until {last} is no epoch of a run of epochs={settings.epochs}; give 1 to that many."
        )
    hooks, resources, faults = (
        hooks or Hooks(),
        resources or ResourceSettings(),
        faults or FaultSettings(),
    )
    first = distributed.rank() == 0
    events = EventLog(folder, aloud=distributed.world_size() == 1)
    resumes = bool(checkpoints(folder))
    learner = Learner(settings, batches.spec, device, sharding=resources.sharding, resumes=resumes)
    done = learner.go_on(folder, events)
    if done > last:
        raise CheckpointError(
            f"{folder} is at epoch {done} already, beyond until={last}; choose another folder."
        )
    if first and learner.started_from:
        events.note("weights", learner.started_from)
    metrics = _begin(folder, events, done, last) if first else {}
    network = distributed.as_network(learner.model)
    if settings.compile:
        network = cast(nn.Module, torch.compile(network, dynamic=False))
    objective = step_of(learner.model, settings, truth)
    meter = Meter(settings, batches.spec, device) if first else None
    patience = Patience.of(folder, faults, events)
    keeper = Keeper(folder, patience, keep=faults.checkpoints)

    stopped, finished = False, done == last
    try:
        for epoch in range(done + 1, last + 1):
            metrics = train_epoch(
                network, learner, objective, batches, epoch, micro_batch=resources.micro_batch
            )
            state = learner.refresh()
            if meter is not None:  # the first worker's
                metrics |= meter.of(metrics) | _evaluated(hooks, learner.whole, epoch)
                # The last checkpoint is safe before a line follows it: a kill repeats one ended epoch at most, and
                # rewrites its line; none is missing.
                keeper.wait()
                patience(
                    partial(append_row, folder / "metrics.jsonl", metrics),
                    f"the line of epoch {epoch}",
                )
                keeper.save(state_to_keep(state, epoch, settings), epoch)
                hooks.report(metrics)
            done = epoch
            if distributed.told_by_first(int(first and hooks.should_stop()), device):
                stopped = epoch < last
                break
        keeper.wait()
        encoder = folder / ENCODER
        if first and not (finished and is_encoder(encoder)):
            export = partial(
                export_encoder, learner.whole.encoder, encoder, settings.model, batches.spec
            )
            patience(export, encoder.name)
    finally:
        keeper.close()
    return PretrainResult(done, stopped, metrics, learner.whole.eval(), encoder)


def _begin(folder: Path, events: EventLog, done: int, last: int) -> Metrics:
    """Drop the lines of epochs that are done again; return the last one that is kept."""
    folder.mkdir(parents=True, exist_ok=True)
    kept, dropped = drop_after(folder / "metrics.jsonl", done)
    if done < last:
        world, before = (
            distributed.world_size(),
            [e for e in read_events(folder) if e["event"] == "started"],
        )
        changed = bool(before) and before[-1]["workers"] != world
        told = (
            f"Going on after epoch {done} with {world} workers instead of {before[-1]['workers']}."
            if changed
            else ""
        )
        events.note("started", told, workers=world, epoch=done, repeated=len(dropped))
    return kept[-1] if kept else {}


def train_epoch(
    network: nn.Module,
    learner: Learner,
    objective: Step,
    batches: Batches,
    epoch: int,
    *,
    micro_batch: int | None = None,
) -> Metrics:
    """Run one epoch and return its metrics, averaged over images and workers. Nothing waits for the device in a step.

    Args:
        micro_batch: images that are held at once; their gradients are added up to those of the batch.
    """
    settings, device, steps = learner.settings, learner.device, batches.steps_per_epoch
    rows: list[Tensor] = []
    waited, started = 0.0, time.perf_counter()
    objective.begin_epoch(epoch, steps)
    with closing(prefetched(batches.epoch(epoch), device)) as source:
        for step in range(steps):
            asked = time.perf_counter()
            batch = next(source)
            waited += time.perf_counter() - asked

            lr = learning_rate(settings, (epoch - 1) * steps + step, settings.epochs * steps)
            for group in learner.optimizer.param_groups:
                group["lr"] = lr
            values = take_gradient(
                network, learner, objective, batch, Moment(epoch, step, steps), micro_batch
            )
            rows.append(torch.stack([value.float() for value in values.values()]))
            if (
                device == "cpu"
            ):  # looking costs nothing here; on a GPU it would stall the step: the end looks
                _check_finite(rows[-1:], list(values), learner, epoch, before=step)
            learner.step()

    _check_finite(rows, list(values), learner, epoch)
    means = distributed.mean_over_workers(_means(rows))
    seconds, world = time.perf_counter() - started, distributed.world_size()
    speed = settings.batch_size * steps / seconds
    return {
        "epoch": epoch,
        **dict(zip(values, means.tolist(), strict=True)),
        "lr": lr,
        "images_per_second": speed,
        "images_per_second_per_worker": speed / world,
        "workers": world,
        "wait_share": waited / seconds,
        "seconds": seconds,
    }


def _means(rows: list[Tensor]) -> Tensor:
    """Means over an epoch's steps; a norm that has overflowed in fp16 counts nowhere, and 0 is left where all have."""
    figures = torch.stack(rows)
    return figures.nan_to_num(nan=torch.nan, posinf=torch.nan).nanmean(0).nan_to_num()


def take_gradient(
    network: nn.Module,
    learner: Learner,
    objective: Step,
    batch: Batch,
    now: Moment,
    micro_batch: int | None = None,
) -> Values:
    """Leave the gradient of the global batch, clipped, in the model, and return what the step knows of this share.

    A worker's share counts by its images: shares may differ by one, and the mean over workers is that over the batch.
    """
    settings, world = learner.settings, distributed.world_size()
    pieces = min(
        len(batch.keys),
        math.ceil(math.ceil(settings.batch_size / world) / (micro_batch or settings.batch_size)),
    )
    learner.optimizer.zero_grad(set_to_none=True)
    total: Values = {}
    parts = objective(network, batch, now, learner.device, pieces)
    for piece in range(pieces):
        with distributed.no_exchange(network, unless=piece == pieces - 1):
            values, images = next(parts)
            weight = images * world / settings.batch_size
            learner.scaler.scale(values["loss"] * weight).backward()
        for name, value in values.items():
            total[name] = total.get(name, 0) + weight * value.detach()
    distributed.average_loose_gradients(learner.model)
    learner.scaler.unscale_(learner.optimizer)
    total["grad_norm"] = distributed.clip_gradients(learner.model, settings.clip_grad)
    return total


def _evaluated(hooks: Hooks, model: Model, epoch: int) -> Metrics:
    started = time.perf_counter()
    model.eval()
    extra = hooks.evaluate(model, epoch)
    model.train()
    return extra | {"evaluate_seconds": time.perf_counter() - started} if extra else {}


def _check_finite(
    rows: list[Tensor], names: list[str], learner: Learner, epoch: int, *, before: int = 0
) -> None:
    """Raise where a step's figures, one row each, are not finite; `before` steps of the epoch came earlier."""
    finite = torch.stack(rows).isfinite()
    if (
        learner.scaler.is_enabled()
    ):  # gradients overflow while the scale of fp16 is found, and such steps are left out
        finite[:, names.index("grad_norm")] = learner.scaler.get_scale() >= 1
    if bool(finite.all()):
        return
    step = int((~finite.all(1)).nonzero()[0])
    # The total holds all parts and the gradient follows from it, so the first of these to be named is the cause.
    parts = [
        name for name in ("loss_rec", "loss_ccl", "loss_rank", "loss", "grad_norm") if name in names
    ]
    cause = next((name for name in parts if not finite[step, names.index(name)]), "A metric")
    lost = next(
        (name for name, p in learner.model.named_parameters() if not p.isfinite().all()), None
    )
    raise NonFiniteLossError(
        f"{cause} is not finite at epoch {epoch}, step {before + step + 1} ("
        + (f"weights of {lost} are not either" if lost else "all weights still are")
        + "); check the images, lower lr, raise warmup, or use precision=fp32."
    )
