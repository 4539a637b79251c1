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
from pathlib import Path
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from amlp_ray.config import PretrainSettings, SegmentSettings
from amlp_ray.data.reading.prefetch import prefetched
from amlp_ray.data.reading.stream import Batches
from amlp_ray.errors import CheckpointError, NonFiniteLossError, SettingsError
from amlp_ray.method.encoder import use_fused_attention
from amlp_ray.method.masking import Moment
from amlp_ray.method.model import build_autoencoder
from amlp_ray.method.precision import autocast_type
from amlp_ray.method.siamese import SimSiam
from amlp_ray.training.checkpoint import checkpoint_file, export_encoder, load_checkpoint, save_checkpoint
from amlp_ray.training.metrics import Metrics, append_row, drop_after
from amlp_ray.training.steps import Model, Step, step_of


@dataclass
class Hooks:
    """What a runner hands in. Each is called once per epoch, in this order.

    - `evaluate(model, epoch)`, first worker only: further metrics, such as a probe's DSC at a rung; {} at other epochs.
    - `report(metrics, checkpoint)`, every worker: the epoch's metrics, after they and the checkpoint are on disk.
    - `should_stop()`, first worker only: true asks all workers to return early, with everything saved.
    """

    evaluate: Callable[[Model, int], Metrics] = field(default=lambda model, epoch: {})
    report: Callable[[Metrics, Path], None] = field(default=lambda metrics, checkpoint: None)
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
) -> PretrainResult:
    """Pretrain, or go on from the folder's latest checkpoint. A resumed run equals an uninterrupted one.

    Writes `metrics.jsonl` (one line per epoch, `epoch` is 1-based and survives a resume), `checkpoint/latest.pt` and
    `encoder.safetensors` into `folder`.

    Args:
        truth: lesion share of every patch by image key, for settings that aim by true lesions; diagnosis only.
        until: the epoch after which to return, for a segment of a longer run: learning rate and masks span
            `settings.epochs` all the same. None is the whole run.

    Raises:
        NonFiniteLossError: naming epoch, step and the part of the loss.
        CheckpointError: where the folder holds a checkpoint of other settings, or of a later epoch than `until`.
        SettingsError: where `until` is no epoch of the run, or the settings do not fit the images.
    """
    settings.check_image(batches.spec)
    last = settings.epochs if until is None else until
    if not 1 <= last <= settings.epochs:
        raise SettingsError(f"until {last} is no epoch of a run of epochs={settings.epochs}; give 1 to that many.")
    hooks = hooks or Hooks()
    first = not dist.is_initialized() or dist.get_rank() == 0
    model, optimizer = build_model(settings, batches, device)
    done = 0
    if checkpoint_file(folder).is_file():
        done = load_checkpoint(checkpoint_file(folder), model=model, optimizer=optimizer, settings=settings)
    if done > last:
        raise CheckpointError(f"{folder} is at epoch {done} already, beyond until={last}; choose another folder.")
    if first:
        folder.mkdir(parents=True, exist_ok=True)
        kept = drop_after(folder / "metrics.jsonl", done)
    metrics: Metrics = kept[-1] if first and kept else {}
    network: nn.Module = model if not dist.is_initialized() else DistributedDataParallel(model)
    if settings.compile:
        network = cast(nn.Module, torch.compile(network, dynamic=False))
    objective = step_of(model, settings, truth)

    stopped, finished = False, done == last
    for epoch in range(done + 1, last + 1):
        metrics = train_epoch(network, objective, optimizer, batches, settings, epoch, device)
        if first:
            metrics |= _evaluated(hooks, model, epoch)
            # Metrics before checkpoint: a kill in between repeats the epoch and rewrites its line; none is missing.
            append_row(folder / "metrics.jsonl", metrics)
            save_checkpoint(folder, model=model, optimizer=optimizer, epoch=epoch, settings=settings)
        hooks.report(metrics, checkpoint_file(folder))
        done = epoch
        if _agreed(first and hooks.should_stop(), device):
            stopped = epoch < last
            break

    encoder = folder / "encoder.safetensors"
    if first and not (finished and encoder.is_file()):
        export_encoder(model.encoder, encoder, settings.model, batches.spec)
    return PretrainResult(done, stopped, metrics, model.eval(), encoder)


def build_model(settings: PretrainSettings, batches: Batches, device: str) -> tuple[Model, torch.optim.Optimizer]:
    """Create model and optimiser from the seed; the same on every worker."""
    torch.manual_seed(settings.seed)
    model: Model
    if settings.objective == "simsiam":
        model = SimSiam(settings.model, batches.spec).to(device)
    else:
        model = build_autoencoder(settings, batches.spec).to(device)
    use_fused_attention(model, device != "cpu" or autocast_type(settings, device) is None)
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() > 1], "weight_decay": settings.weight_decay},
        {"params": [p for p in trained if p.dim() <= 1], "weight_decay": 0.0},  # biases and norms are not decayed
    ]
    return model, torch.optim.AdamW(groups, lr=settings.lr, betas=(0.9, 0.95), fused=True)  # betas: MAE


def train_epoch(
    network: nn.Module,
    objective: Step,
    optimizer: torch.optim.Optimizer,
    batches: Batches,
    settings: PretrainSettings,
    epoch: int,
    device: str,
) -> Metrics:
    """Run one epoch and return its metrics, averaged over steps and workers. Nothing waits for the device in a step."""
    steps = batches.steps_per_epoch
    rows: list[Tensor] = []
    waited, started, images = 0.0, time.perf_counter(), 0
    objective.begin_epoch(epoch, steps)
    with closing(prefetched(batches.epoch(epoch), device)) as source:
        for step in range(steps):
            asked = time.perf_counter()
            batch = next(source)
            waited += time.perf_counter() - asked

            lr = learning_rate(settings, (epoch - 1) * steps + step, settings.epochs * steps)
            for group in optimizer.param_groups:
                group["lr"] = lr
            values = objective(network, batch, Moment(epoch, step, steps), device)
            optimizer.zero_grad(set_to_none=True)
            values["loss"].backward()
            values["grad_norm"] = nn.utils.clip_grad_norm_(network.parameters(), settings.clip_grad)
            rows.append(torch.stack([value.detach().float() for value in values.values()]))
            if device == "cpu":  # looking costs nothing here; on a GPU it would stall the step: the end looks
                _check_finite(rows[-1:], list(values), network, epoch, before=step)
            optimizer.step()
            images += len(batch.keys)

    _check_finite(rows, list(values), network, epoch)
    means = torch.stack(rows).mean(0)
    world = 1
    if dist.is_initialized():
        world = dist.get_world_size()
        dist.all_reduce(means)
        means /= world
    seconds = time.perf_counter() - started
    return {
        "epoch": epoch,
        **dict(zip(values, means.tolist(), strict=True)),
        "lr": lr,
        "images_per_second": images * world / seconds,
        "wait_share": waited / seconds,
        "seconds": seconds,
    }


def learning_rate(settings: PretrainSettings | SegmentSettings, step: int, steps: int) -> float:
    """Linear warm-up to `lr` over the share `warmup` of all steps, then cosine to zero; `step` counts from 0."""
    warmup = settings.warmup * steps
    if step < warmup:
        return settings.lr * (step + 1) / (warmup + 1)
    return settings.lr * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup))) / 2


def _evaluated(hooks: Hooks, model: Model, epoch: int) -> Metrics:
    started = time.perf_counter()
    model.eval()
    extra = hooks.evaluate(model, epoch)
    model.train()
    return extra | {"evaluate_seconds": time.perf_counter() - started} if extra else {}


def _check_finite(rows: list[Tensor], names: list[str], network: nn.Module, epoch: int, *, before: int = 0) -> None:
    """Raise where a step's figures, one row each, are not finite; `before` steps of the epoch came earlier."""
    finite = torch.stack(rows).isfinite()
    if bool(finite.all()):
        return
    step = int((~finite.all(1)).nonzero()[0])
    # The total holds all parts and the gradient follows from it, so the first of these to be named is the cause.
    parts = [name for name in ("loss_rec", "loss_ccl", "loss_rank", "loss", "grad_norm") if name in names]
    cause = next((name for name in parts if not finite[step, names.index(name)]), "A metric")
    lost = next((name for name, p in network.named_parameters() if not p.isfinite().all()), None)
    raise NonFiniteLossError(
        f"{cause} is not finite at epoch {epoch}, step {before + step + 1} ("
        + (f"weights of {lost} are not either" if lost else "all weights still are")
        + "); check the images, lower lr, raise warmup, or use precision=fp32."
    )


def _agreed(stop: bool, device: str) -> bool:
    """The first worker's answer, on every worker: they must leave the loop together."""
    if not dist.is_initialized():
        return stop
    flag = torch.tensor(int(stop), device=device)
    dist.broadcast(flag, src=0)
    return bool(flag.item())
