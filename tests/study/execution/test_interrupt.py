"""Ctrl-C and SIGTERM end Tune's loop in order once, and act as before the second time."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator

import pytest

from amlp_ray.study.execution.interrupt import SIGNALS, InterruptTune, interrupt_on_signals


def raise_interrupt(number: int, frame: object) -> None:
    received.append(number)
    raise KeyboardInterrupt


received: list[int] = []


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """Handle both signals as the command line does."""
    received.clear()
    before = {number: signal.getsignal(number) for number in SIGNALS}
    for number in SIGNALS:
        signal.signal(number, raise_interrupt)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", SIGNALS)
def test_the_first_signal_interrupts_tune_and_the_second_the_process(
    number: signal.Signals,
) -> None:
    interrupt = InterruptTune()
    with interrupt_on_signals(interrupt):
        os.kill(os.getpid(), number)
        assert interrupt.stop_all()
        assert received == [number], "the command line takes note of the signal"
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), number)
    assert signal.getsignal(number) is raise_interrupt


def test_ignored_signals_stay_ignored_and_handlers_are_put_back() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    interrupt = InterruptTune()
    with interrupt_on_signals(interrupt):
        os.kill(os.getpid(), signal.SIGINT)
    assert not interrupt.stop_all()
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    assert signal.getsignal(signal.SIGTERM) is raise_interrupt


def test_a_study_in_another_thread_leaves_signals_alone() -> None:
    failures: list[BaseException] = []

    def run() -> None:
        try:
            with interrupt_on_signals(InterruptTune()):
                assert signal.getsignal(signal.SIGINT) is raise_interrupt
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert failures == []
