"""Whatever ends the monitor's thread ends the run, with the first cause."""

from __future__ import annotations

from typing import Any, cast

import pytest

from amlp_ray.config import StudyConfig
from amlp_ray.config.base import build
from amlp_ray.errors import ClusterLostError, ResourceError, StorageError
from amlp_ray.study.execution import monitor as module
from amlp_ray.study.execution.interrupt import InterruptTune
from amlp_ray.study.execution.monitor import StudyMonitor
from amlp_ray.study.execution.stop_reason import StopReason

SPACE = {"ratio.start": {"low": 0.1, "high": 0.6}}


class SearcherStub:
    """Stands for the searcher: keeps what it is told, and fails where a test says so."""

    def __init__(self, stop_error: Exception | None = None) -> None:
        self.interrupt = InterruptTune()
        self.failures: list[Exception] = []
        self.reasons: list[StopReason] = []
        self.waited: list[float] = []
        self._stop_error = stop_error

    def record_failure(self, error: Exception) -> None:
        self.failures.append(error)

    def stop(self, reason: StopReason) -> None:
        self.reasons.append(reason)
        if self._stop_error is not None:
            raise self._stop_error

    def waiting_times(self) -> list[float]:
        return self.waited


class LostCluster:
    """Stands for the health of a cluster: each check raises `error`."""

    def __init__(self, error: Exception) -> None:
        self._error = error

    def check_head(self) -> None:
        raise self._error


class FreshLease:
    """A lease that nobody takes over."""

    def renew(self) -> bool:
        return True


def make_monitor(searcher: SearcherStub, health: LostCluster, minutes: float = 30) -> StudyMonitor:
    values = {"name": "s", "space": SPACE, "resources": {"wait_minutes": minutes}}
    config = build(StudyConfig, values, "test")
    unused = cast(Any, None)
    return StudyMonitor(
        unused, config, cast(Any, searcher), unused, cast(Any, FreshLease()), cast(Any, health)
    )


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("stop_error", [None, RuntimeError("the trials cannot be asked")])
@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ClusterLostError("gone"), StopReason.LEASE_LOST),
        (StorageError("full"), StopReason.NO_STORAGE),
        (ResourceError("no room"), StopReason.NO_RESOURCES),
        (KeyError("a bug"), StopReason.LEASE_LOST),
    ],
)
def test_an_error_ends_the_run_also_when_stopping_fails(
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
    reason: StopReason,
    stop_error: Exception | None,
) -> None:
    monkeypatch.setattr(module, "POLL_S", 0.001)
    searcher = SearcherStub(stop_error)
    watching = make_monitor(searcher, LostCluster(error))
    watching.start()
    watching.join(10)
    assert not watching.is_alive()
    assert searcher.failures == [error]
    assert searcher.reasons == [reason]
    assert searcher.interrupt.stop_all()


@pytest.mark.parametrize(
    ("waited", "n_pending", "messages"),
    [
        ([31.0, 0.0], 1, ["1 trial waits for 1 CPU a worker; free in the cluster: 0 CPU, 0 GPU"]),
        ([31.0, 31.0], 0, []),  # both have their resources, and their processes start
        ([31.0, 31.0], 1, ["1 trial waits for 1 CPU a worker; free in the cluster: 0 CPU, 0 GPU"]),
        ([29.0], 1, []),
    ],
)
def test_only_trials_without_resources_are_said_to_wait(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    waited: list[float],
    n_pending: int,
    messages: list[str],
) -> None:
    caplog.set_level("INFO", logger="amlp_ray")
    monkeypatch.setattr(module, "count_pending_requests", lambda: n_pending)
    monkeypatch.setattr(module, "free_resources", lambda: {"CPU": 0.0})
    searcher = SearcherStub()
    searcher.waited = waited
    watching = make_monitor(searcher, LostCluster(KeyError()))
    for _ in range(2):  # once, not in every poll
        watching._check_waiting()
    assert caplog.messages == messages


def test_trials_that_all_wait_too_long_end_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "count_pending_requests", lambda: 1)
    monkeypatch.setattr(module, "free_resources", lambda: {"CPU": 0.0})
    searcher = SearcherStub()
    watching = make_monitor(searcher, LostCluster(KeyError()), minutes=1)
    searcher.waited = [61.0, 0.0]
    watching._check_waiting()
    searcher.waited = [61.0]
    with pytest.raises(ResourceError, match="No trial found 1 CPU a worker within 1 minutes"):
        watching._check_waiting()
