"""Measure whether a model would wait for its data: images per second of each way to read."""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import Any

import torch

from amlp_ray.config import PretrainConfig
from amlp_ray.data.dataset import PatchDataset
from amlp_ray.data.loading.batches import (
    Batches,
    ExampleBatches,
    Mode,
    open_batches,
    resolve_mode,
)
from amlp_ray.data.loading.throughput import Throughput, measure_throughput
from amlp_ray.errors import ConfigError, DataError
from amlp_ray.runtime.session import ray_session
from amlp_ray.training.objectives import make_objective
from amlp_ray.training.pretrain import train_epoch
from amlp_ray.training.train_state import TrainState

MODES: tuple[Mode, ...] = ("mapped", "stream")
STREAM_EPOCHS = 100  # read ahead at most
Row = dict[str, Any]


def bench_reading(
    dataset: PatchDataset,
    config: PretrainConfig,
    *,
    batch_size: int | None = None,
    seconds: float = 5.0,
    device: str | None = None,
    modes: tuple[Mode, ...] = MODES,
) -> list[Row]:
    """Measure each way to read the training images against the model's own speed.

    A row has `mode`, `auto` ("x" where data=auto chooses this mode), `first_batch_seconds`,
    `images_per_second`, `restart_seconds`, `model_images_per_second`, `waiting` (the share of its
    time that the model would wait) and `failed` (the reason, or None).

    Args:
        batch_size: overrides that of `config`.
        seconds: duration of each measurement.
        device: `cpu` or `cuda`; by default a GPU where there is one.

    Raises:
        ConfigError: there is no GPU for `device`.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(f"device is {device!r}, but no GPU is seen here; use cpu.")
    if batch_size is not None:
        config = config.model_copy(update={"batch_size": batch_size})
    model_speed = measure_model(dataset, config, seconds=seconds, device=device)
    auto_mode = resolve_mode(dataset, "train", "auto")
    rows = []
    for mode in modes:
        row: Row = {
            "mode": mode,
            "auto": "x" if mode == auto_mode else "",
            "model_images_per_second": model_speed,
        }
        try:
            throughput = _measure_mode(dataset, config, mode, seconds, device)
        except DataError as error:
            row["failed"] = str(error)
        else:
            row |= asdict(throughput)
            row["waiting"] = _waiting_share(throughput.images_per_second, model_speed, device)
            row["failed"] = None
        rows.append(row)
    return rows


def _measure_mode(
    dataset: PatchDataset, config: PretrainConfig, mode: Mode, seconds: float, device: str
) -> Throughput:
    def open_source() -> Batches:
        return open_batches(
            dataset,
            batch_size=config.batch_size,
            seed=config.seed,
            mode=mode,
            epochs=STREAM_EPOCHS,
        )

    if mode != "stream":
        return measure_throughput(open_source, seconds=seconds, device=device)
    with ray_session():
        return measure_throughput(open_source, seconds=seconds, device=device, epochs=STREAM_EPOCHS)


def _waiting_share(read_speed: float, model_speed: float, device: str) -> float:
    """Return the share of its time that the model waits, from images per second of both."""
    if device == "cpu":
        # Reading and training take turns, also with what a stream reads beside them.
        return model_speed / (model_speed + read_speed)
    # A GPU computes while batches are gathered.
    return max(0.0, 1 - read_speed / model_speed)


def measure_model(
    dataset: PatchDataset, config: PretrainConfig, *, seconds: float, device: str
) -> float:
    """Return images per second of training steps on one batch that is in memory."""
    batches = ExampleBatches(dataset, batch_size=config.batch_size)
    train_state = TrainState(config, batches.spec, device)
    objective = make_objective(train_state.model, config, None)

    def step() -> None:
        train_epoch(train_state.model, train_state, objective, batches, 1)

    step()  # warm-up
    steps = 0
    started = time.perf_counter()
    while steps == 0 or time.perf_counter() - started < seconds:
        step()
        steps += 1
    return steps * config.batch_size / (time.perf_counter() - started)
