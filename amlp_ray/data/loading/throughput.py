"""Measure how fast batches come."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass

import torch

from amlp_ray.data.loading.batches import Batches
from amlp_ray.data.loading.prefetch import prefetched


@dataclass(frozen=True)
class Throughput:
    """Figures of one way to read."""

    first_batch_seconds: float  # from opening on: filling the cache, or starting a stream
    images_per_second: float  # after the first batch
    # From the start of a next epoch to its first batch; None: the time ended before one.
    restart_seconds: float | None


def measure_throughput(
    open_source: Callable[[], Batches], *, seconds: float, device: str = "cpu", epochs: int = 10_000
) -> Throughput:
    """Open batches and take them, one epoch after the other.

    Args:
        open_source: opens the batches.
        seconds: how long to go on after the first batch.
        device: where images go, such as `cpu` or `cuda:0`.
        epochs: most epochs to read.
    """
    started = time.perf_counter()
    batches = open_source()
    images = 0
    restarts = []
    first: float | None = None  # when the first batch came
    for epoch in range(1, epochs + 1):
        epoch_started = time.perf_counter()
        with closing(prefetched(batches.epoch(epoch), device)) as source:
            for step, batch in enumerate(source):
                now = time.perf_counter()
                if first is None:
                    first = now
                else:
                    images += len(batch.keys)
                    if step == 0:
                        restarts.append(now - epoch_started)
                if now - first > seconds:
                    break
        if first is None or time.perf_counter() - first > seconds:
            break
    assert first is not None, "an epoch has at least one batch"
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    elapsed = max(1e-9, time.perf_counter() - first)
    restart = statistics.median(restarts) if restarts else None
    return Throughput(first - started, images / elapsed, restart)
