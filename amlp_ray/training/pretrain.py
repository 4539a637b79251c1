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

from amlp_ray.config import FaultToleranceConfig, PretrainConfig, ResourceConfig
from amlp_ray.data.loading.batches import Batch, Batches
from amlp_ray.data.loading.prefetch import prefetched
from amlp_ray.errors import CheckpointError, ConfigError, NonFiniteLossError
from amlp_ray.method.masking import TrainingStep
from amlp_ray.training.checkpoint.export import ENCODER, export_encoder, is_encoder
from amlp_ray.training.checkpoint.manager import CheckpointManager, checkpoints
from amlp_ray.training.checkpoint.restore import state_to_keep
from amlp_ray.training.loggers.metrics_file import Metrics, append_row, drop_after
from amlp_ray.training.loggers.mfu import MfuMeter
from amlp_ray.training.lr_schedule import learning_rate
from amlp_ray.training.objectives import Model, Objective, Values, make_objective
from amlp_ray.training.train_state import TrainState
from amlp_ray.utils import distributed
from amlp_ray.utils.event_log import EventLog, read_events
from amlp_ray.utils.retry import RetryPolicy


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
    config: PretrainConfig,
    batches: Batches,
    folder: Path,
    *,
    hooks: Hooks | None = None,
    device: str = "cpu",
    truth: Mapping[int, Tensor] | None = None,
    until: int | None = None,
    resources: ResourceConfig | None = None,
    fault_tolerance: FaultToleranceConfig | None = None,
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
        ConfigError: where `until` is no epoch of the run, or the settings do not fit the images.
        StorageError: the folder took no checkpoint for `fault_tolerance.storage_minutes`.
    """
    config.check_image(batches.spec)
    last = config.epochs if until is None else until
    if not 1 <= last <= config.epochs:
        raise ConfigError(
            f"until {last} is no epoch of a run of epochs={config.epochs}; give 1 to that many."
        )
    hooks, resources, fault_tolerance = (
        hooks or Hooks(),
        resources or ResourceConfig(),
        fault_tolerance or FaultToleranceConfig(),
    )
    first = distributed.rank() == 0
    events = EventLog(folder, log_messages=distributed.world_size() == 1)
    resumes = bool(checkpoints(folder))
    train_state = TrainState(
        config, batches.spec, device, sharding=resources.sharding, resumes=resumes
    )
    done = train_state.resume(folder, events)
    if done > last:
        raise CheckpointError(
            f"{folder} is at epoch {done} already, beyond until={last}; choose another folder."
        )
    if first and train_state.started_from:
        events.record("weights", train_state.started_from)
    metrics = _begin(folder, events, done, last) if first else {}
    network = distributed.wrap_ddp(train_state.model)
    if config.compile:
        network = cast(nn.Module, torch.compile(network, dynamic=False))
    objective = make_objective(train_state.model, config, truth)
    mfu_meter = MfuMeter(config, batches.spec, device) if first else None
    patience = RetryPolicy(folder, minutes=fault_tolerance.storage_minutes, events=events)
    checkpoint_manager = CheckpointManager(folder, patience, keep=fault_tolerance.checkpoints)

    stopped, finished = False, done == last
    try:
        for epoch in range(done + 1, last + 1):
            metrics = train_epoch(
                network, train_state, objective, batches, epoch, micro_batch=resources.micro_batch
            )
            state = train_state.gather_state()
            if mfu_meter is not None:  # the first worker's
                metrics |= mfu_meter.of(metrics) | _evaluated(hooks, train_state.eval_model, epoch)
                # The last checkpoint is safe before a line follows it: a kill repeats one ended epoch at most, and
                # rewrites its line; none is missing.
                checkpoint_manager.wait()
                patience.run(
                    partial(append_row, folder / "metrics.jsonl", metrics),
                    f"the line of epoch {epoch}",
                )
                checkpoint_manager.save(state_to_keep(state, epoch, config), epoch)
                hooks.report(metrics)
            done = epoch
            if distributed.broadcast_from_rank0(int(first and hooks.should_stop()), device):
                stopped = epoch < last
                break
        checkpoint_manager.wait()
        encoder = folder / ENCODER
        if first and not (finished and is_encoder(encoder)):
            export = partial(
                export_encoder, train_state.eval_model.encoder, encoder, config.model, batches.spec
            )
            patience.run(export, encoder.name)
    finally:
        checkpoint_manager.close()
    return PretrainResult(done, stopped, metrics, train_state.eval_model.eval(), encoder)


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
        events.record("started", told, workers=world, epoch=done, repeated=len(dropped))
    return kept[-1] if kept else {}


def train_epoch(
    network: nn.Module,
    train_state: TrainState,
    objective: Objective,
    batches: Batches,
    epoch: int,
    *,
    micro_batch: int | None = None,
) -> Metrics:
    """Run one epoch and return its metrics, averaged over images and workers. Nothing waits for the device in a step.

    Args:
        micro_batch: images that are held at once; their gradients are added up to those of the batch.
    """
    config, device, steps = train_state.config, train_state.device, batches.steps_per_epoch
    rows: list[Tensor] = []
    waited, started = 0.0, time.perf_counter()
    objective.begin_epoch(epoch, steps)
    with closing(prefetched(batches.epoch(epoch), device)) as source:
        for step in range(steps):
            asked = time.perf_counter()
            batch = next(source)
            waited += time.perf_counter() - asked

            lr = learning_rate(config, (epoch - 1) * steps + step, config.epochs * steps)
            for group in train_state.optimizer.param_groups:
                group["lr"] = lr
            values = take_gradient(
                network,
                train_state,
                objective,
                batch,
                TrainingStep(epoch, step, steps),
                micro_batch,
            )
            rows.append(torch.stack([value.float() for value in values.values()]))
            if (
                device == "cpu"
            ):  # looking costs nothing here; on a GPU it would stall the step: the end looks
                _check_finite(rows[-1:], list(values), train_state, epoch, before=step)
            train_state.step()

    _check_finite(rows, list(values), train_state, epoch)
    means = distributed.mean_over_workers(_means(rows))
    seconds, world = time.perf_counter() - started, distributed.world_size()
    speed = config.batch_size * steps / seconds
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
    train_state: TrainState,
    objective: Objective,
    batch: Batch,
    now: TrainingStep,
    micro_batch: int | None = None,
) -> Values:
    """Leave the gradient of the global batch, clipped, in the model, and return what the step knows of this share.

    A worker's share counts by its images: shares may differ by one, and the mean over workers is that over the batch.
    """
    config, world = train_state.config, distributed.world_size()
    pieces = min(
        len(batch.keys),
        math.ceil(math.ceil(config.batch_size / world) / (micro_batch or config.batch_size)),
    )
    train_state.optimizer.zero_grad(set_to_none=True)
    total: Values = {}
    parts = objective(network, batch, now, train_state.device, pieces)
    for piece in range(pieces):
        with distributed.no_grad_sync(network, unless=piece == pieces - 1):
            values, images = next(parts)
            weight = images * world / config.batch_size
            train_state.scaler.scale(values["loss"] * weight).backward()
        for name, value in values.items():
            total[name] = total.get(name, 0) + weight * value.detach()
    distributed.average_loose_gradients(train_state.model)
    train_state.scaler.unscale_(train_state.optimizer)
    total["grad_norm"] = distributed.clip_gradients(train_state.model, config.clip_grad)
    return total


def _evaluated(hooks: Hooks, model: Model, epoch: int) -> Metrics:
    started = time.perf_counter()
    model.eval()
    extra = hooks.evaluate(model, epoch)
    model.train()
    return extra | {"evaluate_seconds": time.perf_counter() - started} if extra else {}


def _check_finite(
    rows: list[Tensor], names: list[str], train_state: TrainState, epoch: int, *, before: int = 0
) -> None:
    """Raise where a step's figures, one row each, are not finite; `before` steps of the epoch came earlier."""
    finite = torch.stack(rows).isfinite()
    if (
        train_state.scaler.is_enabled()
    ):  # gradients overflow while the scale of fp16 is found, and such steps are left out
        finite[:, names.index("grad_norm")] = train_state.scaler.get_scale() >= 1
    if bool(finite.all()):
        return
    step = int((~finite.all(1)).nonzero()[0])
    # The total holds all parts and the gradient follows from it, so the first of these to be named is the cause.
    parts = [
        name for name in ("loss_rec", "loss_ccl", "loss_rank", "loss", "grad_norm") if name in names
    ]
    cause = next((name for name in parts if not finite[step, names.index(name)]), "A metric")
    lost = next(
        (name for name, p in train_state.model.named_parameters() if not p.isfinite().all()), None
    )
    raise NonFiniteLossError(
        f"{cause} is not finite at epoch {epoch}, step {before + step + 1} ("
        + (f"weights of {lost} are not either" if lost else "all weights still are")
        + "); check the images, lower lr, raise warmup, or use precision=fp32."
    )
