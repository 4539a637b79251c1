"""Running a study on Tune: from its lock to its end, with an ear for those who want it paused, stopped or extended."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from amlp_ray.config import BudgetSettings, StudySettings
from amlp_ray.errors import FailedStudyError, InterruptedStudyError, ResourceError, StudyError
from amlp_ray.runtime.capacity import ACCELERATOR, DRIVER_CPU, free_resources, worker_bundle
from amlp_ray.settings import build
from amlp_ray.study.keeping.lease import RENEW_S, Lease
from amlp_ray.study.keeping.store import StudyStore
from amlp_ray.study.running.queue import Phase, WorkQueue
from amlp_ray.study.running.searcher import StudySearcher
from amlp_ray.study.running.trial import StopBoard, amlp_trial

Outcome = Literal["done", "budget", "paused", "stopped", "cancelled"]
LOOK_S = 1.0  # between looks at the store for requests
TELL_WAIT_S = 30.0  # that a trial waits for resources before somebody is told: starting a process takes seconds


class EventLog:
    """Prints a line per change and keeps it, with its time, in `events.log`."""

    def __init__(self, folder: Path, notify: Callable[[str], None]) -> None:
        self._file, self._notify = folder / "events.log", notify

    def __call__(self, line: str) -> None:
        with suppress(OSError), self._file.open("a") as file:  # a full disk is told of, and waited for, by the storage
            file.write(f"{datetime.now().isoformat(timespec='seconds')} {line}\n")
        self._notify(line)


class Watch(threading.Thread):
    """Renews the lease, looks for requests and budgets, and tells of trials that wait for resources.

    Ends the searcher where something calls for it; what Tune cannot be asked for, it interrupts as Ctrl-C would.
    """

    def __init__(
        self,
        store: StudyStore,
        settings: StudySettings,
        searcher: StudySearcher,
        board: Any,
        lease: Lease,
        log: EventLog,
    ) -> None:
        super().__init__(name="amlp-study-watch", daemon=True)
        self._store, self._settings, self._searcher = store, settings, searcher
        self._board, self._lease, self._log = board, lease, log
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
                        error = StudyError(f"Study {self._store.name!r} was taken over by another process.")
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
        if (given := attributes.get("budget")) and given != self._settings.budget.model_dump(mode="json"):
            budget = build(BudgetSettings, given, "budget")
            self._settings = self._settings.model_copy(update={"budget": budget})
            self._searcher.change_budget(self._settings)
            self._log("budget is now " + ", ".join(f"{k} {v:g}" for k, v in given.items() if v is not None))
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
        wanted = ", ".join(f"{amount:g} {kind}" for kind, amount in bundle.items() if ACCELERATOR not in kind)
        free = ", ".join(f"{free_resources().total(kind):g} {kind}" for kind in ("CPU", "GPU"))
        if not self._told_waiting:
            self._told_waiting = True
            self._log(f"{len(waiting)} trials wait for {wanted} a worker; free in the cluster: {free}")
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
        if not self._over.is_set():  # else it has returned, and the signal would hit what comes after
            os.kill(os.getpid(), signal.SIGINT)


def run_on_tune(
    store: StudyStore,
    settings: StudySettings,
    lease: Lease,
    log: EventLog,
    *,
    data: str,
    labels: str | None,
    images: int,
    side_by_side: int,
    phase: Phase = "search",
    trainable: Callable[[dict[str, Any]], dict[str, Any]] = amlp_trial,
) -> Outcome:
    """Run what the study's queue holds until it is empty or somebody ends it; Ray is initialised, the lock held.

    Args:
        trainable: what Tune runs for each piece of work.

    Raises:
        InterruptedStudyError: Ctrl-C. FailedStudyError: the first trials failed alike. ResourceError: no room came
            free. StudyError: the storage is gone, or another process took the study over.
    """
    import ray

    board = ray.remote(StopBoard).options(num_cpus=0).remote()
    ahead = settings.sampler.ahead
    queue = WorkQueue(
        store,
        settings,
        data=data,
        labels=labels,
        ahead=(1 if side_by_side > 1 else 0) if ahead is None else ahead,
        phase=phase,
        notify=log,
    )
    searcher = StudySearcher(
        store, settings, queue, images=images, board=board, seconds=lambda: lease.seconds, notify=log
    )
    watch = Watch(store, settings, searcher, board, lease, log)
    watch.start()
    try:
        _fit(settings, searcher, side_by_side, trainable)
    except Exception:
        if watch.failure is None and searcher.failure is None:  # Tune wraps what its searcher raised in its own words
            raise
    finally:
        watch.close()
        queue.close()
        ray.kill(board)
    if failure := watch.failure or searcher.failure:
        raise failure
    if searcher.ending == "alike":
        raise FailedStudyError(
            f"The first {settings.faults.alike} trials of {settings.name!r} failed alike, so the study was stopped: "
            f"{searcher.ending_reason}"
        )
    if searcher.ending == "pause":
        return "paused"
    if searcher.ending == "cancel":
        return "cancelled"
    if searcher.unfinished():  # Tune takes Ctrl-C for itself and returns as if all were done
        raise InterruptedStudyError(
            f"Study {settings.name!r} was interrupted; the same command goes on where it stopped."
        )
    return {"stop": "stopped", "budget": "budget"}.get(searcher.ending or "", "done")  # type: ignore[return-value]


def _fit(
    settings: StudySettings,
    searcher: StudySearcher,
    side_by_side: int,
    trainable: Callable[[dict[str, Any]], dict[str, Any]],
) -> None:
    from ray import tune
    from ray.tune.trainable import wrap_function

    alone = settings.resources.alone
    bundle = worker_bundle(settings.resources) if alone else {"CPU": DRIVER_CPU}
    scratch = tempfile.mkdtemp(prefix="amlp-ray-")  # Tune's own records; the store has everything that matters
    wrapped = wrap_function(tune.with_resources(trainable, tune.PlacementGroupFactory([bundle])))
    wrapped.__name__ = wrapped.__qualname__ = "AmlpTrial"  # what processes and actors are called in the dashboard
    try:
        tune.Tuner(
            wrapped,
            tune_config=tune.TuneConfig(
                search_alg=searcher,
                num_samples=-1,  # the searcher ends the study
                max_concurrent_trials=side_by_side,
                reuse_actors=True,  # importing torch anew costs seconds per trial
                trial_name_creator=lambda trial: _trial_name(trial.config),
                trial_dirname_creator=lambda trial: _trial_name(trial.config),
            ),
            run_config=tune.RunConfig(name=settings.name, storage_path=scratch, verbose=0),
        ).fit()
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _trial_name(config: dict[str, Any]) -> str:
    task = config["task"]
    return f"{task['study']}-{task['label'].replace(' ', '-')}"
