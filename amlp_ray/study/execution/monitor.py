"""Watch a running study: lease, requests from other shells, budget, trials that wait for room."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterable, Mapping
from typing import Any

from amlp_ray.config import BudgetConfig, StudyConfig
from amlp_ray.config.base import build
from amlp_ray.errors import ClusterLostError, ResourceError, StorageError, StudyError
from amlp_ray.runtime.cluster_health import ClusterHealth
from amlp_ray.runtime.resources import (
    ACCELERATOR,
    count_pending_requests,
    free_resources,
    worker_bundle,
)
from amlp_ray.study.execution.stop_reason import StopReason
from amlp_ray.study.execution.tune_searcher import StudySearcher
from amlp_ray.study.storage.lease import RENEW_S, Lease
from amlp_ray.study.storage.requests import Request
from amlp_ray.study.storage.study_store import StudyStore

POLL_S = 1.0  # between reads of the store for requests
# How long a trial waits for resources before it is reported: starting a process takes seconds.
REPORT_WAITING_S = 30.0

logger = logging.getLogger(__name__)


class StudyMonitor(threading.Thread):
    """Renews the lease, obeys requests and budgets, and reports trials that wait for resources.

    It tells the searcher to stop. Where running trials cannot be waited for, it interrupts Tune.
    An error of its own ends the run too, because nobody would hear requests any more.
    """

    def __init__(
        self,
        store: StudyStore,
        config: StudyConfig,
        searcher: StudySearcher,
        stop_flags: Any,
        lease: Lease,
        health: ClusterHealth,
    ) -> None:
        """Set up the thread; `start` begins to watch.

        Args:
            stop_flags: actor handle of the trials' `StopFlags`.
            health: of the cluster that runs the trials.
        """
        super().__init__(name="amlp-study-monitor", daemon=True)
        self._store = store
        self._config = config
        self._searcher = searcher
        self._stop_flags = stop_flags
        self._lease = lease
        self._closed = threading.Event()
        self._health = health
        self._n_started = 0  # trials whose start was stored
        self._has_reported_waiting = False

    def run(self) -> None:
        """Poll until `close`, or until an error ends the run."""
        renewed = time.monotonic()
        while not self._closed.wait(POLL_S):
            try:
                if time.monotonic() - renewed > RENEW_S:
                    renewed = time.monotonic()
                    if not self._lease.renew():
                        message = f"Study {self._store.name!r} was taken over by another process."
                        raise StudyError(message)
                self._health.check_head()
                self._poll_started()
                self._poll_store()
                self._searcher.check_budget()
                self._searcher.check_storage()
                self._check_waiting()
            except ResourceError as error:
                self._give_up(StopReason.NO_RESOURCES, error)
                return
            except StorageError as error:
                self._give_up(StopReason.NO_STORAGE, error)
                return
            except Exception as error:  # the lease, the storage or the cluster is lost
                self._give_up(StopReason.LEASE_LOST, error)
                return

    def close(self) -> None:
        """Stop the thread and wait for it."""
        self._closed.set()
        self.join()

    def _poll_started(self) -> None:
        """Store which trials have got their resources."""
        nothing: list[str] = []
        reference = self._stop_flags.started_since.remote(self._n_started)
        folders = self._health.call(reference, nothing)
        self._n_started += len(folders)
        if folders:
            self._searcher.mark_started(folders)

    def _poll_store(self) -> None:
        attributes = self._store.search().user_attrs
        budget = attributes.get("budget")
        if budget and budget != self._config.budget.model_dump(mode="json"):
            self._change_budget(budget)
        self._store.answer_requests(self._obey)

    def _change_budget(self, values: Mapping[str, Any]) -> None:
        budget = build(BudgetConfig, values, "budget")
        self._config = self._config.model_copy(update={"budget": budget})
        self._searcher.change_budget(self._config)
        logger.info("budget is now %s", limits_text(values))

    def _obey(self, request: Request) -> None:
        reason = StopReason(request["verb"])
        self._searcher.stop(reason)
        logger.info("%s was asked for by %s", request["verb"], request["by"])
        if reason == StopReason.CANCEL:
            self._searcher.interrupt.request()

    def _check_waiting(self) -> None:
        """Report trials that wait for resources.

        Raises:
            ResourceError: all trials have waited for too long.
        """
        waited = self._searcher.waiting_times()
        late = [seconds for seconds in waited if seconds > REPORT_WAITING_S]
        # Others have their resources, and their processes start.
        n_waiting = min(len(late), count_pending_requests()) if late else 0
        if not n_waiting:
            self._has_reported_waiting = False
            return
        bundle = worker_bundle(self._config.resources)
        needed = _amounts_text(bundle, [kind for kind in bundle if ACCELERATOR not in kind])
        free = _amounts_text(free_resources(), ("CPU", "GPU"))
        if not self._has_reported_waiting:
            self._has_reported_waiting = True
            trials = "1 trial waits" if n_waiting == 1 else f"{n_waiting} trials wait"
            logger.info("%s for %s a worker; free in the cluster: %s", trials, needed, free)
        minutes = self._config.resources.wait_minutes
        if n_waiting == len(waited) and max(late) > minutes * 60:
            raise ResourceError(
                f"No trial found {needed} a worker within {minutes:g} minutes (free: {free}); "
                f"others hold the cluster. Run the study again later, or raise "
                f"resources.wait_minutes."
            )

    def _give_up(self, reason: StopReason, error: Exception) -> None:
        """End the run with an error, also where running trials cannot be asked to return."""
        self._searcher.record_failure(error)
        if isinstance(error, ClusterLostError):
            # Ray may end this process before the error is printed.
            logger.error("%s", error)
        try:
            self._searcher.stop(reason)
        finally:
            self._searcher.interrupt.request()


def _amounts_text(amounts: Mapping[str, float], kinds: Iterable[str]) -> str:
    return ", ".join(f"{amounts.get(kind, 0.0):g} {kind}" for kind in kinds)


def limits_text(budget: Mapping[str, Any]) -> str:
    """Describe the limits of a budget, such as `trials 20, hours 8`."""
    return ", ".join(f"{name} {limit:g}" for name, limit in budget.items() if limit is not None)
