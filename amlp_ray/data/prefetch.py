"""The next batches, gathered and on the device before they are asked for."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from typing import Any, NamedTuple

import torch

from amlp_ray.data.stream import Batch

DEPTH = 2  # batches ready: one is enough for even steps, a second bridges a slow one
WAIT_S = 0.1  # between looks at whether the consumer has left


class _Failure(NamedTuple):
    error: BaseException


class _End(NamedTuple):
    pass


def prefetched(batches: Iterable[Batch], device: str | torch.device = "cpu", *, depth: int = DEPTH) -> Iterator[Batch]:
    """Yield the same batches, prepared by a thread of their own up to `depth` ahead; images and keys on the device.

    For CUDA, batches are copied on a stream of their own while the device computes; keys stay on the CPU, where steps
    look images up. An error of `batches` is raised here, after the batches before it. Leaving early ends the thread.

    Args:
        batches: on the CPU; pinned, for copies that do not wait.
        device: such as `cpu` or `cuda:0`.
        depth: at least 1.
    """
    device = torch.device(device)
    copy = _Copier(device) if device.type == "cuda" else None
    ready: queue.Queue[Any] = queue.Queue(depth)
    left = threading.Event()

    def put(item: object) -> bool:
        while not left.is_set():
            try:
                ready.put(item, timeout=WAIT_S)
                return True
            except queue.Full:
                continue
        return False

    def work() -> None:
        try:
            with _closed(iter(batches)) as source:
                for batch in source:
                    if not put(copy.begin(batch) if copy else batch):
                        return
            put(_End())
        except BaseException as error:  # raised again where the consumer waits
            put(_Failure(error))

    thread = threading.Thread(target=work, name="amlp-prefetch", daemon=True)
    thread.start()
    try:
        while not isinstance(item := ready.get(), _End):
            if isinstance(item, _Failure):
                raise item.error
            yield copy.finish(item) if copy else item
    finally:
        left.set()
        thread.join()


@contextmanager
def _closed(source: Iterator[Batch]) -> Iterator[Iterator[Batch]]:
    """Close a generator in the thread that ran it: a stream behind it ends then and not when memory is collected."""
    if hasattr(source, "close"):
        with closing(source):  # type: ignore[type-var]
            yield source
    else:
        yield source


class _Copied(NamedTuple):
    batch: Batch
    source: Batch  # kept until the copy is over: pinned memory must not be written again before
    done: Any  # torch.cuda.Event


class _Copier:
    """Copies to a GPU beside its work."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)

    def begin(self, batch: Batch) -> _Copied:
        """Start copying; called by the thread, and returns at once for pinned memory."""
        with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            images = batch.images.to(self._device, non_blocking=True)
            done = torch.cuda.Event()
            done.record(self._stream)
        return _Copied(Batch(images, batch.keys), batch, done)

    def finish(self, copied: _Copied) -> Batch:
        """Make the device's work wait for the copy, not this process."""
        current = torch.cuda.current_stream(self._device)
        current.wait_event(copied.done)
        # Made on another stream: its memory must not be handed out again before this stream is done with it.
        copied.batch.images.record_stream(current)
        return copied.batch
