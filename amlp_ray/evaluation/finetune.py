"""The loop that fine-tunes a segmenter: alone, or as one of several workers that share each batch.

The loss is of the global batch: Dice is no mean over images, so that every worker sees all logits, and computes the
gradient of its own. It goes on from its folder's checkpoint and ends as if it had not been interrupted, on any number
of workers: order, crops and flips follow from (seed, epoch, image), and no generator has a state.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from timm.optim import param_groups_layer_decay
from torch import Tensor, nn

from amlp_ray.config import FaultToleranceConfig, ImageSpec, SegmentConfig
from amlp_ray.data.dataset import Split
from amlp_ray.errors import CheckpointError, NonFiniteLossError
from amlp_ray.evaluation.segmenter import Segmenter
from amlp_ray.method.augment import augment, normalize
from amlp_ray.method.encoder import use_fused_attention
from amlp_ray.method.precision import autocast, autocast_type
from amlp_ray.runtime.worker_group import WorkerContext
from amlp_ray.training.checkpoint.manager import CheckpointManager
from amlp_ray.training.checkpoint.restore import agreed_checkpoint
from amlp_ray.training.loggers.metrics_file import Metrics, append_row, drop_after
from amlp_ray.training.lr_schedule import learning_rate
from amlp_ray.utils import distributed
from amlp_ray.utils.event_log import EventLog
from amlp_ray.utils.retry import RetryPolicy


def finetune(
    model: Segmenter,
    train: Split,
    spec: ImageSpec,
    config: SegmentConfig,
    out: Path,
    *,
    member: WorkerContext,
    fault_tolerance: FaultToleranceConfig,
    progress: Callable[[Metrics], None] = lambda metrics: None,
) -> list[Metrics]:
    """Train to the last epoch, or go on from the checkpoint in `out`; the first worker returns all epochs' metrics.

    Raises:
        NonFiniteLossError: naming the epoch. CheckpointError: of another segmenter, or none that is whole.
        StorageError: `out` took nothing for `fault_tolerance.storage_minutes`.
    """
    device, events = member.device, EventLog(out, log_messages=member.world == 1)
    model.encoder.requires_grad_(not config.freeze)
    model.encoder.pos_embed.requires_grad_(False)
    use_fused_attention(model, device != "cpu" or autocast_type(config, device) is None)
    optimizer = torch.optim.AdamW(parameter_groups(model, config), lr=config.lr)
    done = _resume(out, model, optimizer, events, device)
    network = distributed.wrap_ddp(model)
    rows: list[Metrics] = []
    if member.is_first:
        rows, dropped = drop_after(out / "metrics.jsonl", done)
        events.record("started", workers=member.world, epoch=done, repeated=len(dropped))
    patience = RetryPolicy(out, minutes=fault_tolerance.storage_minutes, events=events)
    checkpoint_manager = CheckpointManager(out, patience, keep=fault_tolerance.checkpoints)
    model.train()
    try:
        for epoch in range(done + 1, config.epochs + 1):
            metrics = train_epoch(network, optimizer, train, spec, config, epoch, member)
            if not member.is_first:
                continue
            checkpoint_manager.wait()  # as in pretraining: the last checkpoint is safe before a line follows it
            patience.run(
                partial(append_row, out / "metrics.jsonl", metrics), f"the line of epoch {epoch}"
            )
            checkpoint_manager.save(
                {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": epoch},
                epoch,
            )
            rows.append(metrics)
            progress(metrics)
        checkpoint_manager.wait()
    finally:
        checkpoint_manager.close()
    return rows


def train_epoch(
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    train: Split,
    spec: ImageSpec,
    config: SegmentConfig,
    epoch: int,
    member: WorkerContext,
) -> Metrics:
    """Run one epoch and return its metrics, the same on every worker."""
    from monai.losses import (
        DiceCELoss,  # takes seconds to import; pretraining and the probe do without
    )

    loss_of, device = DiceCELoss(sigmoid=True, batch=True), member.device
    images, masks, keys = (torch.from_numpy(x) for x in (train.images, train.masks, train.keys))
    steps = max(1, len(train) // config.batch_size)
    order = np.random.default_rng([config.seed, epoch]).permutation(len(train))
    losses, norms, started = [], [], time.perf_counter()
    for step in range(steps):
        lr = learning_rate(config, (epoch - 1) * steps + step, config.epochs * steps)
        for group in optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        batch = order[step * config.batch_size : (step + 1) * config.batch_size]
        # Filled up with its own first images, so that shares are equal; what is filled up does not count.
        rows = np.resize(batch, math.ceil(len(batch) / member.world) * member.world)[
            member.rank :: member.world
        ]
        x, y = augment(
            normalize(images[rows].to(device), spec),
            masks[rows].to(device),
            keys[rows].to(device),
            min_crop_area=config.min_crop_area,
            flip=config.flip,
            flip_vertical=config.flip_vertical,
            intensity_jitter=config.intensity_jitter,
            seed=config.seed,
            epoch=epoch,
        )
        with autocast(config, device):
            logits = network(x)
        loss = loss_of(
            *(
                whole_batch(part, len(batch), member)
                for part in (logits.float(), y[:, None].float())
            )
        )
        optimizer.zero_grad(set_to_none=True)
        # Of the loss over all workers' images, each has the gradient of its own; their average is the sum over `world`.
        (loss * member.world).backward()
        norms.append(nn.utils.clip_grad_norm_(network.parameters(), config.clip_grad))
        optimizer.step()
        losses.append(loss.detach())
    mean, norm = (torch.stack(values).mean().item() for values in (losses, norms))
    if not (np.isfinite(mean) and np.isfinite(norm)):
        raise NonFiniteLossError(
            f"The fine-tuning loss or its gradient is not finite at epoch {epoch}; lower lr."
        )
    seconds = time.perf_counter() - started
    speed = steps * len(batch) / seconds
    return {
        "epoch": epoch,
        "loss": mean,
        "grad_norm": norm,
        "lr": lr,
        "images_per_second": speed,
        "images_per_second_per_worker": speed / member.world,
        "workers": member.world,
        "seconds": seconds,
    }


def whole_batch(share: Tensor, count: int, member: WorkerContext) -> Tensor:
    """The `count` rows of a batch out of all workers' shares, rows rank::world of it, in its own order.

    The loss is of the batch and no mean over images (Dice), so all of it must be seen. Gradients flow to the own share.
    """
    if member.world == 1:
        return share
    parts = [torch.empty_like(share) for _ in range(member.world)]
    dist.all_gather(parts, share.detach().contiguous())
    parts[member.rank] = share
    return torch.stack(parts, 1).flatten(0, 1)[:count]


def parameter_groups(model: Segmenter, config: SegmentConfig) -> list[dict[str, Any]]:
    """The optimiser's groups, with the `lr_scale` that `layer_decay` gives each; the decoder's is 1."""
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
    for (
        layer
    ) in layers:  # timm counts from the last block; the decoder stands above it, as a head does
        layer["lr_scale"] *= config.layer_decay
    return [*layers, decoder]


def _resume(
    out: Path, model: Segmenter, optimizer: torch.optim.Optimizer, events: EventLog, device: str
) -> int:
    """Restore model and optimiser from the folder's latest checkpoint; return the epoch it was written after, or 0."""
    found = agreed_checkpoint(out, events, device)
    if found is None:
        return 0
    state, path = found
    try:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        return int(state["epoch"])
    except (RuntimeError, KeyError, ValueError) as error:
        raise CheckpointError(
            f"{path} is no checkpoint of this segmenter ({type(error).__name__}); delete {path.parent} to start again."
        ) from None
