"""Pretrain in plain PyTorch; everything the loop does not decide itself is passed in.

The loop knows no Ray. It runs in one process, or as one of several data-parallel workers that
torch.distributed connects.
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
from amlp_ray.method.precision import autocast_type
from amlp_ray.training.checkpoint.export import ENCODER, export_encoder, is_encoder
from amlp_ray.training.checkpoint.manager import checkpoints
from amlp_ray.training.loggers.flops import utilization
from amlp_ray.training.loggers.metrics_file import Metrics
from amlp_ray.training.lr_schedule import learning_rate
from amlp_ray.training.objectives import Model, Objective, Values, make_objective
from amlp_ray.training.run_recorder import RunRecorder, speed_metrics
from amlp_ray.training.train_state import TrainState
from amlp_ray.utils import distributed
from amlp_ray.utils.event_log import EventLog


@dataclass
class Hooks:
    """Callbacks of a run; the first worker calls each once per epoch, in this order.

    Args:
        evaluate: takes the model and the epoch, and returns further metrics, such as a probe's DSC
            at a rung; {} at other epochs.
        report: takes the epoch's metrics. They are on disk, and the checkpoint is being written.
        should_stop: True makes all workers return early, with everything saved.
    """

    evaluate: Callable[[Model, int], Metrics] = field(default=lambda model, epoch: {})
    report: Callable[[Metrics], None] = field(default=lambda metrics: None)
    should_stop: Callable[[], bool] = field(default=lambda: False)


@dataclass(frozen=True)
class PretrainResult:
    """Result of a run.

    Args:
        epochs: the number of epochs trained, over all resumes.
        stopped_early: whether `should_stop` ended the run before its last epoch.
        metrics: of the last epoch.
        model: the model that is evaluated and exported.
        encoder: the file of the exported encoder.
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
    """Pretrain, or resume from the latest checkpoint in `folder`.

    A resumed run equals an uninterrupted one. Written into `folder`: `metrics.jsonl` (a row per
    epoch, counted from 1), `events.jsonl`, `checkpoint/` and `encoder.safetensors`. A kill costs
    the epoch in progress and, if its checkpoint was still being written, the one before it.

    Args:
        truth: lesion share of every patch by image key, for an oracle that masks true lesions.
        until: the epoch to return after, for a segment of a longer run. Learning rate and masks
            still span `config.epochs`. None: the whole run.
        resources: their `micro_batch` and `sharding` are used.
        fault_tolerance: how long a full or unreachable folder is retried, and how many checkpoints
            are kept.

    Raises:
        NonFiniteLossError: naming epoch, step and the part of the loss.
        CheckpointError: the folder holds a checkpoint of another config or of an epoch after
            `until`, or only damaged ones.
        ConfigError: `until` is no epoch of the run, or the config does not fit the images.
        StorageError: the folder could not be written for `fault_tolerance.storage_minutes`.
    """
    resources = resources or ResourceConfig()
    last_epoch = _last_epoch(config, batches, until)
    events = EventLog(folder, log_messages=distributed.world_size() == 1)
    train_state = TrainState(
        config,
        batches.spec,
        device,
        sharding=resources.sharding,
        resumes=bool(checkpoints(folder)),
    )
    resumed_epoch = _resume(train_state, folder, events, last_epoch)
    objective = make_objective(train_state.model, config, truth)
    epochs = range(resumed_epoch + 1, last_epoch + 1)
    recorder = RunRecorder(folder, fault_tolerance or FaultToleranceConfig(), events)
    with closing(recorder):
        return _train(
            train_state, objective, batches, epochs, recorder, hooks or Hooks(), resources
        )


def _train(
    train_state: TrainState,
    objective: Objective,
    batches: Batches,
    epochs: range,
    recorder: RunRecorder,
    hooks: Hooks,
    resources: ResourceConfig,
) -> PretrainResult:
    """Train the epochs that are left, and export the encoder."""
    config = train_state.config
    device = train_state.device
    network = distributed.wrap_ddp(train_state.model)
    if config.compile:
        network = cast(nn.Module, torch.compile(network, dynamic=False))
    is_first = distributed.rank() == 0
    epoch = epochs.start - 1
    metrics = recorder.begin(epochs) if is_first else {}
    for epoch in epochs:
        metrics = train_epoch(
            network, train_state, objective, batches, epoch, micro_batch=resources.micro_batch
        )
        state = train_state.gather_state()
        if is_first:
            metrics |= utilization(config, batches.spec, device, metrics)
            metrics |= _evaluate(hooks, train_state.eval_model, epoch)
            recorder.record_epoch(metrics, state)
            hooks.report(metrics)
        # Every worker takes part in this exchange.
        should_stop = is_first and hooks.should_stop()
        if distributed.broadcast_from_rank0(int(should_stop), device):
            break
    recorder.wait()

    model = train_state.eval_model
    encoder = recorder.folder / ENCODER
    if is_first and (epochs or not is_encoder(encoder)):
        export = partial(export_encoder, model.encoder, encoder, config.model, batches.spec)
        recorder.retries.run(export, encoder.name)
    return PretrainResult(epoch, epoch < epochs.stop - 1, metrics, model.eval(), encoder)


def _last_epoch(config: PretrainConfig, batches: Batches, until: int | None) -> int:
    """Check the config against the images; return the epoch to stop after."""
    config.check_image(batches.spec)
    last_epoch = config.epochs if until is None else until
    if not 1 <= last_epoch <= config.epochs:
        raise ConfigError(
            f"until {last_epoch} is no epoch of a run of epochs={config.epochs}; give 1 to that "
            f"many."
        )
    return last_epoch


def _resume(train_state: TrainState, folder: Path, events: EventLog, last_epoch: int) -> int:
    """Load the latest checkpoint; return its epoch, or 0 without one."""
    epoch = train_state.resume(folder, events)
    if epoch > last_epoch:
        raise CheckpointError(
            f"{folder} is at epoch {epoch} already, beyond until={last_epoch}; choose another "
            f"folder."
        )
    if distributed.rank() == 0 and train_state.initial_weights:
        events.record("weights", train_state.initial_weights)
    return epoch


def _evaluate(hooks: Hooks, model: Model, epoch: int) -> Metrics:
    """Call the evaluation hook, and add what it took."""
    started = time.perf_counter()
    model.eval()
    metrics = hooks.evaluate(model, epoch)
    model.train()
    if not metrics:
        return {}
    return metrics | {"evaluate_seconds": time.perf_counter() - started}


def train_epoch(
    network: nn.Module,
    train_state: TrainState,
    objective: Objective,
    batches: Batches,
    epoch: int,
    *,
    micro_batch: int | None = None,
) -> Metrics:
    """Train one epoch without waiting for the device; return its metrics, averaged over steps.

    Args:
        network: what a step calls; see `distributed.wrap_ddp`.
        batches: this worker's share of the images.
        micro_batch: number of images whose activations are held at once. Their gradients add up to
            that of the batch.

    Raises:
        NonFiniteLossError: naming epoch, step and the part of the loss.
    """
    config = train_state.config
    device = train_state.device
    steps = batches.steps_per_epoch
    rows: list[Tensor] = []
    waited = 0.0
    started = time.perf_counter()
    objective.begin_epoch(epoch, steps)
    with closing(prefetched(batches.epoch(epoch), device)) as source:
        for step in range(steps):
            fetch_started = time.perf_counter()
            batch = next(source)
            waited += time.perf_counter() - fetch_started

            lr = learning_rate(config, (epoch - 1) * steps + step, config.epochs * steps)
            for group in train_state.optimizer.param_groups:
                group["lr"] = lr
            training_step = TrainingStep(epoch, step, steps)
            values = take_gradient(
                network, train_state, objective, batch, training_step, micro_batch
            )
            rows.append(torch.stack([value.float() for value in values.values()]))
            # On a GPU the check would stall the step; it is made after the epoch.
            if device == "cpu":
                _check_finite(rows[-1:], list(values), train_state, epoch, steps_before=step)
            train_state.step()

    _check_finite(rows, list(values), train_state, epoch)
    means = distributed.mean_over_workers(_mean_over_steps(rows))
    seconds = time.perf_counter() - started
    return {
        "epoch": epoch,
        **dict(zip(values, means.tolist(), strict=True)),
        "lr": lr,
        "wait_share": waited / seconds,
        **speed_metrics(config.batch_size * steps, seconds),
    }


def _mean_over_steps(rows: list[Tensor]) -> Tensor:
    """Average each metric over the steps of an epoch.

    A gradient norm that overflowed in fp16 is left out; 0 stands for one that always did.
    """
    table = torch.stack(rows)
    return table.nan_to_num(nan=torch.nan, posinf=torch.nan).nanmean(0).nan_to_num()


def take_gradient(
    network: nn.Module,
    train_state: TrainState,
    objective: Objective,
    batch: Batch,
    training_step: TrainingStep,
    micro_batch: int | None = None,
) -> Values:
    """Compute the clipped gradient of the global batch, into the model's parameters.

    A worker's share counts by its number of images: shares may differ by one, and the mean over
    workers is then that over the batch.

    Returns:
        The metrics of this worker's share, as scalars.
    """
    config = train_state.config
    workers = distributed.world_size()
    largest_share = math.ceil(config.batch_size / workers)
    pieces = math.ceil(largest_share / (micro_batch or config.batch_size))
    pieces = min(len(batch.keys), pieces)
    train_state.optimizer.zero_grad(set_to_none=True)
    totals: Values = {}
    losses = objective(network, batch, training_step, train_state.device, pieces)
    for piece in range(pieces):
        with distributed.no_grad_sync(network, unless=piece == pieces - 1):
            values, images = next(losses)
            weight = images * workers / config.batch_size
            train_state.scaler.scale(values["loss"] * weight).backward()
        for name, value in values.items():
            totals[name] = totals.get(name, 0) + weight * value.detach()
    distributed.average_unsharded_gradients(train_state.model)
    train_state.scaler.unscale_(train_state.optimizer)
    totals["grad_norm"] = distributed.clip_gradients(train_state.model, config.clip_grad)
    return totals


def _check_finite(
    rows: list[Tensor],
    names: list[str],
    train_state: TrainState,
    epoch: int,
    *,
    steps_before: int = 0,
) -> None:
    """Raise NonFiniteLossError if a metric of a step is not finite.

    Args:
        rows: (metrics,) of each step, of which `steps_before` came before the first.
    """
    finite = torch.stack(rows).isfinite()
    if train_state.scaler.is_enabled():
        # Gradients overflow while the loss scale of fp16 is found, and such steps are skipped.
        finite[:, names.index("grad_norm")] = train_state.scaler.get_scale() >= 1
    if bool(finite.all()):
        return
    row = int((~finite.all(1)).nonzero()[0])
    bad_metrics = [
        name for name, is_finite in zip(names, finite[row], strict=True) if not is_finite
    ]
    # The total follows from the parts and the gradient from the total, so the first is the cause.
    order = ("loss_rec", "loss_ccl", "loss_rank", "loss", "grad_norm")
    cause = next((name for name in order if name in bad_metrics), "A metric")
    weights = "all weights still are"
    for name, parameter in train_state.model.named_parameters():
        if not parameter.isfinite().all():
            weights = f"weights of {name} are not either"
            break
    is_exact = autocast_type(train_state.config, train_state.device) is None
    or_precise = "" if is_exact else ", or use precision=fp32"
    raise NonFiniteLossError(
        f"{cause} is not finite at epoch {epoch}, step {steps_before + row + 1} ({weights}); "
        f"check the images, lower lr or raise warmup{or_precise}."
    )
