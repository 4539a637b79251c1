"""Whether a model would wait for its data: images per second of each way to read, against the model's own."""

from __future__ import annotations

import time
from typing import Any

import torch

from amlp_ray.config import PretrainConfig
from amlp_ray.data.dataset import PatchDataset
from amlp_ray.data.loading import image_cache
from amlp_ray.data.loading.batches import ExampleBatches, Mode, open_batches, resolved
from amlp_ray.data.loading.throughput import measure_pace
from amlp_ray.errors import ConfigError, DataError
from amlp_ray.runtime.session import ray_session
from amlp_ray.training.objectives import make_objective
from amlp_ray.training.pretrain import train_epoch
from amlp_ray.training.train_state import TrainState

MODES: tuple[Mode, ...] = ("resident", "mapped", "stream")
STREAM_EPOCHS = 100  # read ahead at most
Row = dict[str, Any]


def bench(
    dataset: PatchDataset,
    config: PretrainConfig,
    *,
    batch_size: int | None = None,
    seconds: float = 5.0,
    device: str | None = None,
    modes: tuple[Mode, ...] = MODES,
) -> list[Row]:
    """Measure each way to read the training images, and the model of `settings` on images that are there already.

    A row has `mode`, `auto` (whether data=auto takes it here), `first_batch_seconds`, `images_per_second`,
    `restart_seconds`, `model_images_per_second` and `waiting`: the share of its time that the model would wait.

    Args:
        batch_size: in place of the settings'.
        seconds: to measure each for.
        device: `cpu` or `cuda`; none: a GPU where there is one.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(f"device is {device!r}, but no GPU is seen here; use cpu.")
    config = config if batch_size is None else config.model_copy(update={"batch_size": batch_size})
    eaten = model_pace(dataset, config, seconds=seconds, device=device)
    auto, rows = resolved(dataset, "train", "auto"), []
    for mode in modes:
        row: Row = {
            "mode": mode,
            "auto": "x" if mode == auto else "",
            "model_images_per_second": eaten,
        }
        try:
            rows.append(row | _pace(dataset, config, mode, seconds, device, eaten))
        except DataError as error:
            rows.append(row | {"failed": str(error)})
        image_cache.release()
    return rows


def _pace(
    dataset: PatchDataset,
    config: PretrainConfig,
    mode: Mode,
    seconds: float,
    device: str,
    eaten: float,
) -> Row:
    def opened() -> Any:
        return open_batches(
            dataset,
            batch_size=config.batch_size,
            seed=config.seed,
            mode=mode,
            epochs=STREAM_EPOCHS,
        )

    if mode == "stream":
        with ray_session():
            pace = measure_pace(opened, seconds=seconds, device=device, epochs=STREAM_EPOCHS)
    else:
        pace = measure_pace(opened, seconds=seconds, device=device)
    given = pace.images_per_second
    # A GPU computes while batches are gathered; on a CPU they take turns, also with what a stream reads beside them.
    waiting = max(0.0, 1 - given / eaten) if device != "cpu" else eaten / (eaten + given)
    return {
        "first_batch_seconds": pace.first_batch_seconds,
        "images_per_second": given,
        "restart_seconds": pace.restart_seconds,
        "waiting": waiting,
        "failed": None,
    }


def model_pace(
    dataset: PatchDataset, config: PretrainConfig, *, seconds: float, device: str
) -> float:
    """Images per second of training steps on one batch, again and again: what the model eats if it never waits."""
    batches = ExampleBatches(dataset, batch_size=config.batch_size)
    train_state = TrainState(config, batches.spec, device)
    objective = make_objective(train_state.model, config, None)

    def step() -> None:
        train_epoch(train_state.model, train_state, objective, batches, 1)

    step()  # a warm-up
    steps, started = 0, time.perf_counter()
    while steps == 0 or time.perf_counter() - started < seconds:
        step()
        steps += 1
    return steps * config.batch_size / (time.perf_counter() - started)
