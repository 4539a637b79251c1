"""How fast batches come, whoever eats them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass

from amlp_ray.data.loading.batches import Batches
from amlp_ray.data.loading.prefetch import prefetched


@dataclass(frozen=True)
class Pace:
    """What was measured of one way to read."""

    first_batch_seconds: float  # from opening on: decoding into a store, or starting a stream
    images_per_second: float  # after the first batch
    restart_seconds: (
        float | None
    )  # from asking for a next epoch to its first batch; None: the time ended before one


def measure_pace(
    opened: Callable[[], Batches], *, seconds: float, device: str = "cpu", epochs: int = 10_000
) -> Pace:
    """Open batches and take them, one epoch after the other, for about `seconds`.

    Args:
        opened: opens the batches.
        seconds: to go on for after the first batch.
        device: where images go.
        epochs: to stop after, at the latest.
    """
    started = time.perf_counter()
    batches = opened()
    images, restarts = 0, []
    first: float | None = None
    for epoch in range(1, epochs + 1):
        asked, new = time.perf_counter(), True
        with closing(prefetched(batches.epoch(epoch), device)) as source:
            for batch in source:
                now = time.perf_counter()
                if first is None:
                    first = now
                else:
                    images += len(batch.keys)
                    if new:
                        restarts.append(now - asked)
                new = False
                if now - first > seconds:
                    break
        if first is None or time.perf_counter() - first > seconds:
            break
    assert first is not None, "an epoch has at least one batch"
    _wait(device)
    spent = max(1e-9, time.perf_counter() - first)
    return Pace(first - started, images / spent, statistics.median(restarts) if restarts else None)


def _wait(device: str) -> None:
    if device.startswith("cuda"):
        import torch

        torch.cuda.synchronize()
