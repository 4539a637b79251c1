"""Fine-tune a segmenter in this process, or as one of several workers that share each batch.

The loss is of the global batch. Dice is no mean over images, so every worker sees all logits and
computes the gradient of its own. A run resumes from its checkpoint and ends as if it had not been
interrupted, on any number of workers: order, crops and flips follow from (seed, epoch, image), and
no generator has a state.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from timm.optim import param_groups_layer_decay
from torch import Tensor, nn

from amlp_ray.config import FaultToleranceConfig, ImageSpec, SegmentConfig
from amlp_ray.data.dataset import Split
from amlp_ray.errors import CheckpointError, NonFiniteLossError
from amlp_ray.evaluation.labels import Rows, empty_count
from amlp_ray.evaluation.segmenter import Segmenter
from amlp_ray.method.augment import augment, normalize
from amlp_ray.method.encoder import use_fused_attention
from amlp_ray.method.precision import autocast, autocast_type
from amlp_ray.runtime.worker_context import WorkerContext
from amlp_ray.training.checkpoint.restore import load_latest_on_all
from amlp_ray.training.loggers.metrics_file import Metrics, read_rows
from amlp_ray.training.lr_schedule import learning_rate
from amlp_ray.training.run_recorder import METRICS_FILE, RunRecorder, speed_metrics
from amlp_ray.utils import distributed
from amlp_ray.utils.event_log import EventLog


def finetune(
    model: Segmenter,
    train: Split,
    spec: ImageSpec,
    config: SegmentConfig,
    out: Path,
    *,
    worker: WorkerContext,
    fault_tolerance: FaultToleranceConfig,
    progress: Callable[[Metrics], None] = lambda metrics: None,
) -> list[Metrics]:
    """Train to the last epoch, or resume from the checkpoint in `out`.

    Args:
        model: trained in place.
        train: labeled images, with a lesion and without.
        spec: how they are normalized.
        progress: takes the metrics of every epoch, on the first worker.

    Returns:
        The metrics of all epochs on the first worker, [] on others.

    Raises:
        NonFiniteLossError: naming the epoch.
        CheckpointError: `out` holds a checkpoint of another segmenter, or only damaged ones.
        StorageError: `out` could not be written for `fault_tolerance.storage_minutes`.
    """
    device = worker.device
    events = EventLog(out, log_messages=worker.world == 1)
    model.encoder.requires_grad_(not config.freeze)
    model.encoder.pos_embed.requires_grad_(False)
    use_fused_attention(model, device != "cpu" or autocast_type(config, device) is None)
    optimizer = torch.optim.AdamW(parameter_groups(model, config), lr=config.lr)
    resumed_epoch = _resume(out, model, optimizer, events, device)
    epochs = range(resumed_epoch + 1, config.epochs + 1)
    network = distributed.wrap_ddp(model)
    model.train()
    with closing(RunRecorder(out, fault_tolerance, events)) as recorder:
        if worker.is_first:
            recorder.begin(epochs)
        for epoch in epochs:
            metrics = train_epoch(network, optimizer, train, spec, config, epoch, worker)
            if worker.is_first:
                state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
                recorder.record_epoch(metrics, state)
                progress(metrics)
        recorder.wait()
    return read_rows(out / METRICS_FILE) if worker.is_first else []


def train_epoch(
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    train: Split,
    spec: ImageSpec,
    config: SegmentConfig,
    epoch: int,
    worker: WorkerContext,
) -> Metrics:
    """Train one epoch; return its metrics, the same on every worker."""
    # Takes seconds to import; pretraining and the probe do without.
    from monai.losses import DiceCELoss

    compute_loss = DiceCELoss(sigmoid=True, batch=True)
    has_lesion = np.asarray(train.masks.any((1, 2)))
    order = epoch_order(has_lesion, config, epoch)
    steps = max(1, len(order) // config.batch_size)
    losses = []
    norms = []
    started = time.perf_counter()
    for step in range(steps):
        lr = learning_rate(config, (epoch - 1) * steps + step, config.epochs * steps)
        for group in optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        batch = order[step * config.batch_size : (step + 1) * config.batch_size]
        # Padded with its own first images, so that shares are equal; padding does not count.
        padded = np.resize(batch, math.ceil(len(batch) / worker.world) * worker.world)
        rows = padded[worker.rank :: worker.world]
        images, masks = _load_augmented(train, rows, spec, config, epoch, worker.device)
        with autocast(config, worker.device):
            logits = network(images)
        loss = compute_loss(
            distributed.gather_batch(logits.float(), len(batch)),
            distributed.gather_batch(masks[:, None].float(), len(batch)),
        )
        optimizer.zero_grad(set_to_none=True)
        # Each worker has the gradient of its own images, and DDP averages: hence times `world`.
        (loss * worker.world).backward()
        norms.append(nn.utils.clip_grad_norm_(network.parameters(), config.clip_grad))
        optimizer.step()
        losses.append(loss.detach())
    mean_loss = torch.stack(losses).mean().item()
    mean_norm = torch.stack(norms).mean().item()
    if not (np.isfinite(mean_loss) and np.isfinite(mean_norm)):
        raise NonFiniteLossError(
            f"The fine-tuning loss or its gradient is not finite at epoch {epoch}; lower lr."
        )
    speed = speed_metrics(steps * len(batch), time.perf_counter() - started)
    return {"epoch": epoch, "loss": mean_loss, "grad_norm": mean_norm, "lr": lr, **speed}


def epoch_order(has_lesion: NDArray[np.bool_], config: SegmentConfig, epoch: int) -> Rows:
    """Order the images of an epoch: all with a lesion, and `config.empty_share` without.

    The latter are spread evenly, so that each batch has its part. Dice is that of a whole batch, so
    lesion predicted in an image without one lowers it. In a batch without any lesion, which only
    small batches and large shares have, it is constant and cross-entropy alone trains.

    Args:
        has_lesion: (N,).
    """
    rng = np.random.default_rng([config.seed, epoch])
    lesion = rng.permutation(np.flatnonzero(has_lesion))
    empty = rng.permutation(np.flatnonzero(~has_lesion))
    empty = empty[: empty_count(len(lesion), len(empty), config.empty_share)]
    places = [(np.arange(len(rows)) + 0.5) / max(1, len(rows)) for rows in (lesion, empty)]
    return np.concatenate([lesion, empty])[np.argsort(np.concatenate(places), kind="stable")]


def _load_augmented(
    train: Split, rows: np.ndarray, spec: ImageSpec, config: SegmentConfig, epoch: int, device: str
) -> tuple[Tensor, Tensor]:
    """Return augmented images (n, C, H, W) and masks (n, H, W) of some rows."""
    images = torch.from_numpy(train.images)[rows].to(device)
    masks = torch.from_numpy(train.masks)[rows].to(device)
    keys = torch.from_numpy(train.keys)[rows].to(device)
    return augment(normalize(images, spec), masks, keys, config, epoch)


def parameter_groups(model: Segmenter, config: SegmentConfig) -> list[dict[str, Any]]:
    """Return the optimizer's groups, each with the `lr_scale` that `layer_decay` gives it."""
    decoder = {
        "params": list(model.decoder.parameters()),
        "lr_scale": 1.0,
        "weight_decay": config.weight_decay,
    }
    if config.freeze:
        return [decoder]
    layers = param_groups_layer_decay(
        model.encoder,
        config.weight_decay,
        weight_decay_exclude_1d=False,
        layer_decay=config.layer_decay,
    )
    # timm counts from the last block; the decoder stands above it, as a head does.
    for layer in layers:
        layer["lr_scale"] *= config.layer_decay
    return [*layers, decoder]


def _resume(
    out: Path, model: Segmenter, optimizer: torch.optim.Optimizer, events: EventLog, device: str
) -> int:
    """Load the latest checkpoint into model and optimizer; return its epoch, or 0 without one."""
    checkpoint = load_latest_on_all(out, events, device)
    if checkpoint is None:
        return 0
    state, path = checkpoint
    try:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        return int(state["epoch"])
    except (RuntimeError, KeyError, ValueError) as error:
        raise CheckpointError(
            f"{path} is no checkpoint of this segmenter ({type(error).__name__}); delete "
            f"{path.parent} to start again."
        ) from None
