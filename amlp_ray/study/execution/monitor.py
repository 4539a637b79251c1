"""Watch a running study: lease, requests from other shells, budget, trials that wait for resources."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from amlp_ray.config import BudgetConfig, StudyConfig
from amlp_ray.config.base import build
from amlp_ray.errors import ResourceError, StudyError
from amlp_ray.runtime.resources import ACCELERATOR, free_resources, worker_bundle
from amlp_ray.study.execution.tune_searcher import StudySearcher
from amlp_ray.study.storage.lease import RENEW_S, Lease
from amlp_ray.study.storage.study_store import StudyStore

LOOK_S = 1.0  # between looks at the store for requests


TELL_WAIT_S = 30.0  # that a trial waits for resources before somebody is told: starting a process takes seconds


class EventLog:
    """Prints a line per change and keeps it, with its time, in `events.log`."""

    def __init__(self, folder: Path, notify: Callable[[str], None]) -> None:
        self._file, self._notify = folder / "events.log", notify

    def __call__(self, line: str) -> None:
        with (
            suppress(OSError),
            self._file.open("a") as file,
        ):  # a full disk is told of, and waited for, by the storage
            file.write(f"{datetime.now().isoformat(timespec='seconds')} {line}\n")
        self._notify(line)


class StudyMonitor(threading.Thread):
    """Renews the lease, looks for requests and budgets, and tells of trials that wait for resources.

    Ends the searcher where something calls for it; what Tune cannot be asked for, it interrupts as Ctrl-C would.
    """

    def __init__(
        self,
        store: StudyStore,
        config: StudyConfig,
        searcher: StudySearcher,
        stop_flags: Any,
        lease: Lease,
        log: EventLog,
    ) -> None:
        super().__init__(name="amlp-study-watch", daemon=True)
        self._store, self._settings, self._searcher = store, config, searcher
        self._board, self._lease, self._log = stop_flags, lease, log
        self._over = threading.Event()
        self._told_waiting = False
        self.failure: BaseException | None = None

    def run(self) -> None:
        renewed = time.monotonic()
        while not self._over.wait(LOOK_S):
            try:
                if time.monotonic() - renewed > RENEW_S:
                    renewed = time.monotonic()
                    if not self._lease.renew():
                        error = StudyError(
                            f"Study {self._store.name!r} was taken over by another process."
                        )
                        self._give_up("lease", error)
                        return
                self._look()
                self._searcher.check_budget()
                self._look_for_waiting()
            except Exception as error:  # the storage is gone for longer than the study bears
                self._give_up("lease", error)
                return

    def close(self) -> None:
        self._over.set()
        self.join()

    def _look(self) -> None:
        attributes = self._store.search().user_attrs
        if (given := attributes.get("budget")) and given != self._settings.budget.model_dump(
            mode="json"
        ):
            budget = build(BudgetConfig, given, "budget")
            self._settings = self._settings.model_copy(update={"budget": budget})
            self._searcher.change_budget(self._settings)
            self._log(
                "budget is now "
                + ", ".join(f"{k} {v:g}" for k, v in given.items() if v is not None)
            )
        request = attributes.get("request")
        if request and "answer" not in request:
            self._searcher.end(request["verb"])
            self._log(f"{request['verb']} was asked for by {request['by']}")
            answer = request | {"answer": datetime.now().isoformat(timespec="seconds")}
            self._store.search().set_user_attr("request", answer)
            if request["verb"] == "cancel":
                self._interrupt()

    def _look_for_waiting(self) -> None:
        import ray

        given = self._searcher.waiting()
        late = [folder for folder, seconds in given if seconds > TELL_WAIT_S]
        if not late:
            return
        waiting = ray.get(self._board.waiting.remote(late))
        if not waiting:
            self._told_waiting = False
            return
        bundle = worker_bundle(self._settings.resources)
        wanted = ", ".join(
            f"{amount:g} {kind}" for kind, amount in bundle.items() if ACCELERATOR not in kind
        )
        free = ", ".join(f"{free_resources().total(kind):g} {kind}" for kind in ("CPU", "GPU"))
        if not self._told_waiting:
            self._told_waiting = True
            self._log(
                f"{len(waiting)} trials wait for {wanted} a worker; free in the cluster: {free}"
            )
        longest = max(seconds for folder, seconds in given if folder in waiting)
        if len(waiting) == len(given) and longest > self._settings.resources.wait_minutes * 60:
            error = ResourceError(
                f"No trial found {wanted} a worker within {self._settings.resources.wait_minutes:g} minutes "
                f"(free: {free}); others hold the cluster. Run the study again later, or raise resources.wait_minutes."
            )
            self._give_up("resources", error)

    def _give_up(self, why: Literal["lease", "resources"], error: BaseException) -> None:
        self.failure = error
        self._searcher.end(why)
        self._interrupt()

    def _interrupt(self) -> None:
        """Make Tune return: it has no other way in than the signal of Ctrl-C, which only the main thread hears."""
        if (
            not self._over.is_set()
        ):  # else it has returned, and the signal would hit what comes after
            os.kill(os.getpid(), signal.SIGINT)
