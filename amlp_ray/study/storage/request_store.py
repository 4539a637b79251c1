"""Ask the process that runs a study to pause, stop or cancel, and answer as that process."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager
from datetime import datetime
from typing import Any

import optuna

from amlp_ray.study.storage.change_lock import BusyStudyError
from amlp_ray.study.storage.requests import (
    Request,
    Verb,
    add_request,
    answer_requests,
    pending_requests,
    read_requests,
)
from amlp_ray.study.storage.trial_store import TrialStore

ANSWER_WAIT_S = 1.0  # the driver's thread has a lease to renew


class RequestStore(TrialStore):
    """Requests to the process that runs a study."""

    @abstractmethod
    def search(self) -> optuna.Study:
        """Return the Optuna study of the search."""

    @abstractmethod
    def transaction(self, *, wait_s: float = ...) -> AbstractContextManager[Any]:
        """Hold the study for one change."""

    @abstractmethod
    def is_run(self) -> bool:
        """Return whether a process runs this study now."""

    def request(self, verb: Verb) -> str | None:
        """Ask the process that runs the study, wherever it is; it polls every second.

        Returns:
            The request's id, for `answer`; None if nobody runs the study.
        """
        with self.transaction():
            return add_request(self.search(), verb) if self.is_run() else None

    def last_request(self) -> Request | None:
        """Return the last request to the last driver; it has an `answer` once it was received."""
        stored = read_requests(self.search())
        return stored[-1] if stored else None

    def is_answered(self, request_id: str) -> bool:
        """Return whether the driver has received a request."""
        pending = pending_requests(self.search())
        return request_id not in {request["id"] for request in pending}

    def answer_requests(self, obey: Callable[[Request], None]) -> None:
        """Obey the requests that came since, and store that they were received.

        If others change the study at this moment, they are obeyed again at the next call.
        """
        pending = pending_requests(self.search())
        if not pending:
            return
        for request in pending:
            obey(request)
        when = datetime.now().isoformat(timespec="seconds")
        try:
            with self.transaction(wait_s=ANSWER_WAIT_S):
                answer_requests(self.search(), {item["id"] for item in pending}, when)
        except BusyStudyError:
            return
