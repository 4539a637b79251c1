"""Watch a running study: lease, requests from other shells, budget, trials that wait for room."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterable, Mapping
from datetime import datetime
from typing import Any

from amlp_ray.config import BudgetConfig, StudyConfig
from amlp_ray.config.base import build
from amlp_ray.errors import ResourceError, StudyError
from amlp_ray.runtime.resources import ACCELERATOR, free_resources, worker_bundle
from amlp_ray.study.execution.stop_reason import StopReason
from amlp_ray.study.execution.tune_searcher import InterruptTune, StudySearcher
from amlp_ray.study.storage.lease import RENEW_S, Lease
from amlp_ray.study.storage.study_store import StudyStore

POLL_S = 1.0  # between reads of the store for requests
# How long a trial waits for resources before it is reported: starting a process takes seconds.
REPORT_WAITING_S = 30.0

logger = logging.getLogger(__name__)


class StudyMonitor(threading.Thread):
    """Renews the lease, obeys requests and budgets, and reports trials that wait for resources.

    It tells the searcher to stop. Where running trials cannot be waited for, it interrupts Tune.

    Attributes:
        failure: why the run has to end with an error; None while it need not.
    """

    def __init__(
        self,
        store: StudyStore,
        config: StudyConfig,
        searcher: StudySearcher,
        interrupt: InterruptTune,
        stop_flags: Any,
        lease: Lease,
    ) -> None:
        """Set up the thread; `start` begins to watch.

        Args:
            stop_flags: actor handle of the trials' `StopFlags`.
        """
        super().__init__(name="amlp-study-monitor", daemon=True)
        self._store = store
        self._config = config
        self._searcher = searcher
        self._interrupt = interrupt
        self._stop_flags = stop_flags
        self._lease = lease
        self._closed = threading.Event()
        self._has_reported_waiting = False
        self.failure: BaseException | None = None

    def run(self) -> None:
        """Poll until `close`, or until the lease or the storage is lost."""
        renewed = time.monotonic()
        while not self._closed.wait(POLL_S):
            try:
                if time.monotonic() - renewed > RENEW_S:
                    renewed = time.monotonic()
                    if not self._lease.renew():
                        message = f"Study {self._store.name!r} was taken over by another process."
                        raise StudyError(message)
                self._poll_store()
                self._searcher.check_budget()
                self._check_waiting()
            except Exception as error:  # the lease is lost, or the storage for too long
                self._give_up(StopReason.LEASE_LOST, error)
                return

    def close(self) -> None:
        """Stop the thread and wait for it."""
        self._closed.set()
        self.join()

    def _poll_store(self) -> None:
        attributes = self._store.search().user_attrs
        budget = attributes.get("budget")
        if budget and budget != self._config.budget.model_dump(mode="json"):
            self._change_budget(budget)
        request = attributes.get("request")
        if request and "answer" not in request:
            self._obey(request)

    def _change_budget(self, values: Mapping[str, Any]) -> None:
        budget = build(BudgetConfig, values, "budget")
        self._config = self._config.model_copy(update={"budget": budget})
        self._searcher.change_budget(self._config)
        logger.info("budget is now %s", limits_text(values))

    def _obey(self, request: Mapping[str, Any]) -> None:
        reason = StopReason(request["verb"])
        self._searcher.stop(reason)
        logger.info("%s was asked for by %s", request["verb"], request["by"])
        answer = {**request, "answer": datetime.now().isoformat(timespec="seconds")}
        self._store.search().set_user_attr("request", answer)
        if reason == StopReason.CANCEL:
            self._interrupt.request()

    def _check_waiting(self) -> None:
        """Report trials that wait for resources; give up if all of them have waited too long."""
        import ray

        seconds = self._searcher.active_trials()
        late = [folder for folder, waited in seconds.items() if waited > REPORT_WAITING_S]
        if not late:
            return
        waiting = ray.get(self._stop_flags.waiting.remote(late))
        if not waiting:
            self._has_reported_waiting = False
            return
        bundle = worker_bundle(self._config.resources)
        needed = _amounts_text(bundle, [kind for kind in bundle if ACCELERATOR not in kind])
        free = _amounts_text(free_resources(), ("CPU", "GPU"))
        if not self._has_reported_waiting:
            self._has_reported_waiting = True
            message = "%d trials wait for %s a worker; free in the cluster: %s"
            logger.info(message, len(waiting), needed, free)
        longest = max(seconds[folder] for folder in waiting)
        minutes = self._config.resources.wait_minutes
        if len(waiting) == len(seconds) and longest > minutes * 60:
            error = ResourceError(
                f"No trial found {needed} a worker within {minutes:g} minutes (free: {free}); "
                f"others hold the cluster. Run the study again later, or raise "
                f"resources.wait_minutes."
            )
            self._give_up(StopReason.NO_RESOURCES, error)

    def _give_up(self, reason: StopReason, error: BaseException) -> None:
        self.failure = error
        self._searcher.stop(reason)
        self._interrupt.request()


def _amounts_text(amounts: Mapping[str, float], kinds: Iterable[str]) -> str:
    return ", ".join(f"{amounts.get(kind, 0.0):g} {kind}" for kind in kinds)


def limits_text(budget: Mapping[str, Any]) -> str:
    """Describe the limits of a budget, such as `trials 20, hours 8`."""
    return ", ".join(f"{name} {limit:g}" for name, limit in budget.items() if limit is not None)
