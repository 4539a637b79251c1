"""Copy the next batches to the device while it computes."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import lru_cache
from typing import Any, TypeVar

import torch

from amlp_ray.data.loading.batches import Batch

DEPTH = 2  # batches ready: one is enough for even steps, a second bridges a slow one

T = TypeVar("T")
_END: Any = object()


def prefetched(batches: Iterable[Batch], device: str | torch.device) -> Generator[Batch]:
    """Yield the same batches with their images on the device.

    Keys stay on the CPU, where training steps look images up.

    For CUDA, a thread gathers `DEPTH` batches ahead, and one more. It copies them on a stream of
    its own while the device computes. On a CPU there is nothing to copy, so batches come as they
    are: a thread would take more from the step's own cores than gathering a batch does (10 to 60 us
    per image against 5 to 30, measured).

    An error of `batches` is raised here. Close the generator if you leave it early: that ends the
    thread.

    Args:
        batches: batches on the CPU; pinned memory lets copies run in the background.
        device: such as `cpu` or `cuda:0`.
    """
    device = torch.device(device)
    if device.type != "cuda":
        yield from batches
        return
    stream = _copy_stream(device)

    def start_copy(batch: Batch) -> tuple[Batch, torch.cuda.Event]:
        # From pinned memory, which torch keeps until the copy's end, this is instant.
        with torch.cuda.device(device), torch.cuda.stream(stream):
            images = batch.images.to(device, non_blocking=True)
            done = torch.cuda.Event()
            done.record(stream)
        return Batch(images, batch.keys), done

    with closing(read_ahead(batches, start_copy, DEPTH)) as copies:
        for batch, done in copies:
            current = torch.cuda.current_stream(device)
            current.wait_event(done)  # the device waits, and not this process
            # The memory comes from another stream: it is not reused before this one is done.
            batch.images.record_stream(current)
            yield batch


def read_ahead(items: Iterable[Any], prepare: Callable[[Any], T], depth: int) -> Generator[T]:
    """Yield `prepare(item)` of each item in order, computed by a thread `depth` items ahead.

    An error of `items` or `prepare` is raised here, after the items before it, and so is one of
    closing `items` if there was no other. When the generator ends or is closed, the thread has
    ended and has closed `items`.
    """
    source = iter(items)

    def prepare_next() -> T:
        for item in source:
            return prepare(item)
        return _END

    with ThreadPoolExecutor(1, thread_name_prefix="amlp-prefetch") as pool:
        pending = deque(pool.submit(prepare_next) for _ in range(depth + 1))
        has_failed = False
        try:
            while (item := pending.popleft().result()) is not _END:
                pending.append(pool.submit(prepare_next))
                yield item
        except Exception:
            has_failed = True
            raise
        finally:
            for future in pending:
                future.cancel()
            if isinstance(source, Generator):
                closed = pool.submit(source.close)
                if not has_failed:  # the first error is the one that says what happened
                    closed.result()


@lru_cache
def _copy_stream(device: torch.device) -> Any:
    """Return the one stream that copies to a device.

    Memory freed on it is used again only by its next copies.
    """
    return torch.cuda.Stream(device)
