"""Work on several workers: a Ray Train group, begun again when a worker or a node is lost.

Ray Train would restart a group by itself, but counts an error in the code like a lost node. Here they are told apart:
what would come again ends the run at once, what was lost is replaced, and each is noted in the run's `events.jsonl`.
"""

from __future__ import annotations

import re
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from amlp_ray.config import FaultToleranceConfig, ResourceConfig
from amlp_ray.errors import AmlpError, NonFiniteLossError, ResourceError, WorkerLostError
from amlp_ray.runtime.resources import answering_nodes, worker_bundle
from amlp_ray.runtime.worker_entry import run_member
from amlp_ray.utils.event_log import EventLog, EventTail, Kind
from amlp_ray.utils.retry import RetryPolicy

POLL_S = 0.5  # seconds between looks at a group that works on other processes
START_MINUTES = 1.0  # that Ray Train waits for room before it counts a failure
EXCHANGE_S = (
    1800  # that workers wait for each other, as Ray Train has it, while no disk is waited for
)
RECOUNT_S = 20.0  # after which Ray counts nodes anew for elastic groups
RESIZE_S = 10.0  # seconds between looks at whether nodes have joined an elastic group, which costs a restart
LOSSES: dict[Kind, str] = {
    "worker lost": "A worker was lost",
    "node lost": "A node was lost",
    "preempted": "A node was taken away",
}
MONITORED = "OOM kill reason"  # Ray's, where its own monitor killed; of any killed process it says that it may be OOM
# What the others meet when one of them is gone, by gloo, NCCL and sockets: told before the lost one is missed.
COLLATERAL = re.compile(
    r"gloo|nccl|connection (closed|reset)|broken pipe|socket|TCPStore|timed out", re.IGNORECASE
)


@dataclass(frozen=True)
class WorkerContext:
    """One worker: its place among all, and the device it computes on."""

    rank: int = 0
    world: int = 1
    device: str = "cpu"

    @property
    def is_first(self) -> bool:
        return self.rank == 0


SINGLE_WORKER = WorkerContext()


def alone() -> WorkerContext:
    """This process by itself, with its GPU if it sees one."""
    return WorkerContext(device="cuda" if torch.cuda.is_available() else "cpu")


def run_group(
    work: Callable[[WorkerContext], None],
    resources: ResourceConfig,
    fault_tolerance: FaultToleranceConfig,
    *,
    name: str,
    folder: Path,
    progress: Callable[[], int] = lambda: 0,
    poll: Callable[[], None] = lambda: None,
) -> None:
    """Run `work` on `resources.workers` Ray Train workers that torch.distributed connects; Ray must be initialised.

    It is begun again when a worker or node was lost, and must go on by itself from what it has kept.

    Args:
        work: picklable; on each worker.
        name: of the group, for Ray's dashboard.
        folder: of the run, seen by all nodes: events are noted there, and Ray Train keeps its books in `ray_train`.
        progress: what it has ended so far, such as epochs: losses in a row with none in between count together.
        poll: called in this thread every half second while the group works, and once after.

    Raises:
        AmlpError: what a worker raised on purpose. WorkerLostError: more workers or nodes in a row were lost than
        `fault_tolerance.max_failures`. StorageError: the folder was away for `fault_tolerance.storage_minutes` when it was to be begun again.
        ResourceError: the cluster had no room for `resources.wait_minutes`. Any error in the code of `work`, as it was.
    """
    events, news, lost, reached = EventLog(folder, aloud=False), EventTail(folder), 0, progress()
    patience = RetryPolicy.of(folder, fault_tolerance, events)
    held = {path.name for path in folder.glob("*")} - {
        events.path.name
    }  # which this process writes by itself

    def look() -> None:
        news.say()
        poll()

    while True:
        nodes = answering_nodes()
        failure = _attempt(work, resources, fault_tolerance, name, folder / "ray_train", look)
        if failure is None:
            shutil.rmtree(
                folder / "ray_train", ignore_errors=True
            )  # Ray Train's books, of no use any more
            return
        kind = kind_of(failure)
        if kind == "worker lost" and nodes - answering_nodes():
            kind = "node lost"
            # An elastic group that still counts the node would wait for it for a minute.
            time.sleep(RECOUNT_S if resources.elastic else 0)
        if kind not in LOSSES:
            error = own_error(failure)
            if not isinstance(error, ResourceError):
                events.note(kind, error=" ".join(str(error).split())[:300])
            raise error from failure
        now = progress()
        lost, reached = (0 if now > reached else lost) + (kind != "preempted"), now
        told = f"{LOSSES[kind]} ({_told(failure)})"
        if lost > fault_tolerance.max_failures:
            events.note(kind, told)
            raise WorkerLostError(
                f"{told}, number {lost} without progress, and fault_tolerance.max_failures={fault_tolerance.max_failures} allows no more; look at "
                f"the nodes' memory and logs and run again: it goes on from its checkpoint."
            ) from failure
        events.note(kind, f"{told}; going on from the latest checkpoint.")
        news.say()
        patience(partial(_check_there, folder, held), "a new start")
        events.flush()


def _check_there(folder: Path, held: set[str]) -> None:
    """Raise OSError where nothing is left of what a run's folder held: a run begun now would not find its checkpoint.

    A disk that was taken away may leave an empty folder, and to make one anew would hide its return.
    """
    if held and held.isdisjoint(path.name for path in folder.iterdir()):
        raise OSError("what it held is gone")


def _attempt(
    work: Callable[[WorkerContext], None],
    resources: ResourceConfig,
    fault_tolerance: FaultToleranceConfig,
    name: str,
    storage: Path,
    poll: Callable[[], None],
) -> BaseException | None:
    """Run one group to its end; return what made it fail."""
    failure: list[BaseException] = []
    trainer = _trainer(work, resources, fault_tolerance, name, storage)

    def run() -> None:
        try:
            trainer.fit()
        except BaseException as error:  # handed on below
            failure.append(error)

    thread = threading.Thread(target=run, name="amlp-group", daemon=True)
    thread.start()
    while True:
        thread.join(POLL_S)
        ended = not thread.is_alive()
        poll()
        if ended:
            return failure[0] if failure else None


def _trainer(
    work: Callable[[WorkerContext], None],
    resources: ResourceConfig,
    fault_tolerance: FaultToleranceConfig,
    name: str,
    storage: Path,
) -> Any:
    from ray import cloudpickle, train
    from ray.train.torch import TorchConfig, TorchTrainer

    elastic = {"elastic_resize_monitor_interval_s": RESIZE_S} if resources.elastic else {}
    return TorchTrainer(
        run_member,
        train_loop_config={"work": cloudpickle.dumps(_Work(work))},
        # The others wait for the first worker, who may wait for a disk: for a checkpoint and then for a line.
        torch_config=TorchConfig(
            timeout_s=EXCHANGE_S + round(2 * 60 * fault_tolerance.storage_minutes)
        ),
        scaling_config=train.ScalingConfig(
            num_workers=resources.workers,
            use_gpu=resources.gpus_per_worker > 0,
            resources_per_worker=worker_bundle(resources),
            placement_strategy=resources.placement.upper().replace("-", "_"),
            **elastic,
        ),
        run_config=train.RunConfig(
            name=name,
            storage_path=str(storage),
            failure_config=train.FailureConfig(
                max_failures=0,
                max_preemption_failures=0,
                controller_failure_limit=max(1, round(resources.wait_minutes / START_MINUTES)),
            ),
        ),
    )


@dataclass(frozen=True)
class _Work:
    """Work of a member, as a worker calls it."""

    work: Callable[[WorkerContext], None]

    def __call__(self, rank: int, world: int, device: str) -> None:
        self.work(WorkerContext(rank, world, device))


def kind_of(failure: BaseException) -> Kind:
    """What made a group fail, by what its workers ended with."""
    from ray.exceptions import OutOfMemoryError, RayActorError
    from ray.train import PreemptionError
    from ray.train.v2._internal.exceptions import (
        RayTrainError,  # a worker that hangs, or misses an exchange
    )

    causes = _causes(failure)
    died = [
        cause
        for cause in causes
        if isinstance(cause, RayActorError | OutOfMemoryError | RayTrainError)
    ]
    if isinstance(failure, PreemptionError) or any(
        getattr(cause, "preempted", False) for cause in died
    ):
        return "preempted"
    if any(isinstance(cause, NonFiniteLossError) for cause in causes):
        return "loss not finite"
    if any(isinstance(cause, AmlpError) for cause in causes):
        return "error in code"
    if died:
        return (
            "node lost" if any("node has died" in str(cause) for cause in died) else "worker lost"
        )
    return (
        "worker lost"
        if causes and all(COLLATERAL.search(str(cause)) for cause in causes)
        else "error in code"
    )


def own_error(failure: BaseException) -> BaseException:
    """What a worker raised, our own errors first; a sentence where the cluster had no room."""
    from ray.train import ControllerError
    from ray.train.v2._internal.exceptions import (
        WorkerGroupStartupFailedError,
        WorkerGroupStartupTimeoutError,
    )

    causes = _causes(failure)
    ours = [cause for cause in causes if isinstance(cause, AmlpError)]
    others = [cause for cause in causes if not COLLATERAL.search(str(cause))]
    if isinstance(failure, ControllerError):
        if isinstance(
            failure.controller_failure,
            WorkerGroupStartupTimeoutError | WorkerGroupStartupFailedError,
        ):
            return ResourceError(
                "The cluster had no room for the workers for resources.wait_minutes; free it or ask for less, and run "
                "again: it goes on from its checkpoint."
            )
        return failure.controller_failure
    return [*ours, *others, failure][0]


def _causes(failure: BaseException) -> list[BaseException]:
    """What each worker ended with, out of Ray Train's wrappings."""
    found = []
    for error in getattr(failure, "worker_failures", {}).values():
        error = getattr(error, "_base_exc", error)  # what user code raised
        found.append(
            getattr(error, "health_check_failure", error)
        )  # a worker that no longer answers
    return found


def _told(failure: BaseException) -> str:
    """A few words of what happened."""
    from ray.exceptions import OutOfMemoryError, RayActorError

    causes = _causes(failure)
    if any(isinstance(cause, OutOfMemoryError) or MONITORED in str(cause) for cause in causes):
        return "its node was out of memory"
    if any(isinstance(cause, RayActorError) for cause in causes):
        return "its process died"
    if causes:
        return "the others lost their connection to it"
    return " ".join(str(failure).split())[:160]
