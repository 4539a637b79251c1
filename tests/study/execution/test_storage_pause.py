"""A study whose disk takes no data pauses, resumes when it does, and ends after a bounded time."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from amlp_ray.errors import StorageError
from amlp_ray.study.execution.storage_pause import FIRST_PAUSE_S, PROBE_FILE, StoragePause

REASON = "trial 3: Could not write the checkpoint of epoch 2 to /disk/s/trials/3 (No space left)."


@contextmanager
def full_disk() -> Iterator[None]:
    """Let this process write no file of more than a block, which needs no rights."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


class Clock:
    """Seconds that a test sets."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_pause_lasts_while_the_disk_is_full_and_says_where(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="amlp_ray")
    clock = Clock()
    pause = StoragePause(tmp_path, 60, clock)
    assert not pause.is_on()
    pause.begin(REASON)
    pause.begin("another trial at the same time")
    assert pause.is_on(), "the disk is not asked at once"
    with full_disk():
        clock.now = 10 * FIRST_PAUSE_S
        assert pause.is_on()
    clock.now += FIRST_PAUSE_S
    assert not pause.is_on()
    assert not (tmp_path / PROBE_FILE).exists()
    assert caplog.messages == [
        f"the study is paused: {REASON.rstrip('.')}. It resumes when {tmp_path} can be written, "
        f"and ends after 60 minutes",
        f"{tmp_path} can be written again; the study resumes",
    ]


def test_pauses_in_a_row_grow_and_add_up_until_a_rung_is_stored(tmp_path: Path) -> None:
    clock = Clock()
    pause = StoragePause(tmp_path, 1, clock)
    for length in (15, 30):
        pause.begin(REASON)
        clock.now += length
        pause.check()
        assert not pause.is_on()
    pause.begin(REASON)
    clock.now += 14
    pause.check()
    clock.now += 2
    with pytest.raises(StorageError) as caught:
        pause.check()
    assert str(caught.value) == (
        f"{REASON} The study waited 1 minutes (fault_tolerance.pause_minutes) for {tmp_path} to "
        f"take data; make room there, and the same command resumes the study."
    )


def test_a_stored_rung_starts_the_count_anew(tmp_path: Path) -> None:
    clock = Clock()
    pause = StoragePause(tmp_path, 1, clock)
    for _ in range(8):
        pause.begin(REASON)
        clock.now += FIRST_PAUSE_S
        assert not pause.is_on()
        pause.reset()
    pause.check()
