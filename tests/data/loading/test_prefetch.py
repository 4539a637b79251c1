"""Reading ahead in a thread: same items, errors in their place, and no thread left."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch

from amlp_ray.data.loading.batches import Batch
from amlp_ray.data.loading.prefetch import prefetched, read_ahead


def threads() -> int:
    return sum(thread.name.startswith("amlp-prefetch") for thread in threading.enumerate())


def test_items_come_in_order_prepared_by_another_thread() -> None:
    items: list[tuple[int, str]] = list(
        read_ahead(range(20), lambda number: (number, threading.current_thread().name), depth=2)
    )
    assert items == [(number, "amlp-prefetch_0") for number in range(20)]
    assert threads() == 0


def test_it_stays_as_far_ahead_as_it_is_told() -> None:
    taken: list[int] = []
    ready = read_ahead(range(100), taken.append, depth=3)
    next(ready)
    pause = threading.Event()
    pause.wait(0.3)
    assert len(taken) <= 1 + 3 + 1  # given, waiting, and one in the thread's hands
    ready.close()
    assert threads() == 0


def test_an_error_is_raised_after_the_items_before_it() -> None:
    def source() -> Iterator[int]:
        yield 1
        yield 2
        raise OSError("disk gone")

    items: list[int] = []
    with pytest.raises(OSError, match="disk gone"):
        items.extend(read_ahead(source(), lambda number: number, depth=5))
    assert items == [1, 2]
    assert threads() == 0


def test_leaving_early_ends_the_thread_and_closes_what_it_read() -> None:
    closed = []

    def source() -> Iterator[int]:
        try:
            while True:
                yield 1
        finally:
            closed.append(threading.current_thread().name)

    ready = read_ahead(source(), lambda number: number, depth=2)
    assert next(ready) == 1
    ready.close()
    assert closed == ["amlp-prefetch_0"]
    assert threads() == 0


def test_on_a_cpu_batches_come_as_they_are() -> None:
    batches = [Batch(torch.zeros(2, 1, 4, 4), torch.arange(2)) for _ in range(3)]
    assert all(a is b for a, b in zip(prefetched(batches, "cpu"), batches, strict=True))
    assert threads() == 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_images_are_there_and_whole() -> None:
    batches = [
        Batch(torch.full((64, 3, 224, 224), i, dtype=torch.uint8).pin_memory(), torch.arange(64))
        for i in range(12)
    ]
    for i, (images, keys) in enumerate(prefetched(batches, "cuda")):
        assert images.is_cuda
        assert keys.device.type == "cpu"
        assert bool((images == i).all())
    assert threads() == 0


def test_a_source_that_fails_while_it_is_closed_does_not_hang_the_consumer() -> None:
    def source() -> Iterator[int]:
        try:
            yield 1
        finally:
            raise RuntimeError("while closing")

    def fail(item: int) -> int:
        raise ValueError("out of memory")

    with pytest.raises(ValueError, match="out of memory"):
        list(read_ahead(source(), fail, 2))


def test_an_error_of_closing_the_source_is_raised_if_there_was_no_other() -> None:
    def source() -> Iterator[int]:
        try:
            while True:
                yield 1
        finally:
            raise RuntimeError("while closing")

    ready = read_ahead(source(), lambda number: number, depth=2)
    assert next(ready) == 1
    with pytest.raises(RuntimeError, match="while closing"):
        ready.close()
    assert threads() == 0
