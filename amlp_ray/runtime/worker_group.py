"""Run a task on several workers: a Ray Train group, started again when a worker or node is lost.

Ray Train would restart a group by itself, but it counts an error in the code like a lost node.
Here the two are told apart. An error that would come again ends the run at once. What was lost is
replaced. Each is recorded in the run's `events.jsonl`.
"""

from __future__ import annotations

import re
import shutil
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from amlp_ray.config import FaultToleranceConfig, ResourceConfig
from amlp_ray.errors import AmlpError, NonFiniteLossError, ResourceError, WorkerLostError
from amlp_ray.runtime.ray_internals import is_startup_error, is_train_error, unwrap_worker_error
from amlp_ray.runtime.resources import answering_nodes, worker_bundle
from amlp_ray.runtime.worker_context import WorkerContext, WorkerTask
from amlp_ray.runtime.worker_entry import run_worker
from amlp_ray.utils.event_log import EventKind, EventLog, EventTail
from amlp_ray.utils.retry import RetryPolicy

POLL_S = 0.5  # between checks of a group that works in other processes
START_MINUTES = 1.0  # that Ray Train waits for room before it counts a failure
# How long workers wait for each other, besides waiting for a disk; Ray Train's default.
COLLECTIVE_TIMEOUT_S = 1800
RECOUNT_S = 20.0  # after which Ray counts nodes anew for elastic groups
RESIZE_S = 10.0  # between checks for new nodes of an elastic group, which cost a restart
TRAINER_FOLDER = "ray_train"  # inside the run's folder
LOSSES: dict[EventKind, str] = {
    "worker lost": "A worker was lost",
    "node lost": "A node was lost",
    "preempted": "A node was taken away",
}
# Ray's words for a process that its own memory monitor killed. Of any killed process Ray says that
# it may have been out of memory.
KILLED_BY_MONITOR = "OOM kill reason"
NODE_DIED = "node has died"
LOW_ON_MEMORY = "node running low on memory"
ACTOR_DIED = "actor died"
# The errors of gloo, NCCL and sockets on workers whose peer is gone. They often arrive before Ray
# misses the peer. torch raises most of them as plain RuntimeError, so only the message tells them
# from a bug, and a worker cannot keep them to itself: the group has to end.
PEER_LOST = re.compile(
    r"gloo|nccl|connection (closed|reset)|broken pipe|socket|TCPStore|timed out", re.IGNORECASE
)


def this_process() -> WorkerContext:
    """Return this process as the only worker, with its GPU if it has one."""
    return WorkerContext(device="cuda" if torch.cuda.is_available() else "cpu")


def run_group(
    task: WorkerTask,
    resources: ResourceConfig,
    fault_tolerance: FaultToleranceConfig,
    *,
    name: str,
    folder: Path,
    progress: Callable[[], int] = lambda: 0,
    poll: Callable[[], None] = lambda: None,
) -> None:
    """Run `task` on Ray Train workers that torch.distributed connects; Ray must be initialized.

    They are started again when a worker or node was lost. The task must resume from what it saved.

    Args:
        task: called on each worker.
        name: of the group, for Ray's dashboard.
        folder: of the run, seen by all nodes; gets events, and Ray Train's files in `ray_train`.
        progress: counts what is finished, such as epochs, so that losses in a row are known.
        poll: called in this thread every half second while the group works, and once after.

    Raises:
        WorkerLostError, StorageError: more than `fault_tolerance` allows.
        ResourceError: the cluster had no room for `resources.wait_minutes`.
        Exception: what a worker's code raised.
    """
    events = EventLog(folder, log_messages=False)
    tail = EventTail(folder)
    retry = RetryPolicy(folder, minutes=fault_tolerance.storage_minutes, events=events)
    # The event log is written by this process, so it says nothing about the disk.
    files = {path.name for path in folder.glob("*")} - {events.path.name}
    make_trainer = partial(_make_trainer, task, resources, fault_tolerance, name, folder)
    reached = progress()
    losses = 0  # without progress in between
    while True:
        nodes = answering_nodes()
        failure = _run_once(make_trainer, tail, poll)
        if failure is None:
            shutil.rmtree(folder / TRAINER_FOLDER, ignore_errors=True)
            return
        kind = failure_kind(failure)
        if kind == "worker lost" and _lost_a_node(nodes, resources):
            kind = "node lost"
        if kind not in LOSSES:
            raise _recorded(original_error(failure), kind, events) from failure
        message = f"{LOSSES[kind]} ({_loss_reason(failure)})"
        finished = progress()
        if finished > reached:
            losses = 0
        reached = finished
        losses += kind != "preempted"  # a node that was taken away costs nothing
        if losses > fault_tolerance.max_failures:
            events.record(kind, message)
            raise _too_many_losses(message, losses, fault_tolerance) from failure
        events.record(kind, f"{message}; resuming from the latest checkpoint.")
        tail.log_new()
        retry.run(partial(_check_files, folder, files), "a restart")
        events.flush()


def _lost_a_node(nodes: set[str], resources: ResourceConfig) -> bool:
    """Return whether one of `nodes` answers no more, after a wait until Ray counts without it."""
    if not nodes - answering_nodes():
        return False
    # An elastic group that still counts the node would wait for it for a minute.
    time.sleep(RECOUNT_S if resources.is_elastic else 0)
    return True


def _recorded(error: BaseException, kind: EventKind, events: EventLog) -> BaseException:
    """Record an error that ends the run; a cluster without room is no event of the run."""
    if not isinstance(error, ResourceError):
        events.record(kind, error=" ".join(str(error).split())[:300])
    return error


def _too_many_losses(
    message: str, losses: int, fault_tolerance: FaultToleranceConfig
) -> WorkerLostError:
    return WorkerLostError(
        f"{message}, number {losses} without progress, and "
        f"fault_tolerance.max_failures={fault_tolerance.max_failures} allows no more; check the "
        f"nodes' memory and logs and run again: the run resumes from its checkpoint."
    )


def _check_files(folder: Path, files: set[str]) -> None:
    """Raise OSError if none of the run's files is left.

    A disk that was taken away may leave an empty folder. A run that started there would not find
    its checkpoint.
    """
    if files and files.isdisjoint(path.name for path in folder.iterdir()):
        raise OSError("its files are gone")


def _run_once(
    make_trainer: Callable[[], Any], tail: EventTail, poll: Callable[[], None]
) -> BaseException | None:
    """Run one group to its end, logging events and polling meanwhile; return what made it fail."""
    trainer = make_trainer()
    failures: list[BaseException] = []

    def run() -> None:
        try:
            trainer.fit()
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=run, name="amlp-group", daemon=True)
    thread.start()
    while True:
        thread.join(POLL_S)
        has_ended = not thread.is_alive()
        tail.log_new()
        poll()
        if has_ended:
            return failures[0] if failures else None


def _make_trainer(
    task: WorkerTask,
    resources: ResourceConfig,
    fault_tolerance: FaultToleranceConfig,
    name: str,
    folder: Path,
) -> Any:
    from ray import cloudpickle, train
    from ray.train.torch import TorchConfig, TorchTrainer

    elastic = {"elastic_resize_monitor_interval_s": RESIZE_S} if resources.is_elastic else {}
    # The first worker may wait for a disk twice, for a checkpoint and for a line of metrics.
    disk_s = round(2 * 60 * fault_tolerance.storage_minutes)
    return TorchTrainer(
        run_worker,
        train_loop_config={"task": cloudpickle.dumps(task)},
        torch_config=TorchConfig(timeout_s=COLLECTIVE_TIMEOUT_S + disk_s),
        scaling_config=train.ScalingConfig(
            num_workers=resources.workers,
            use_gpu=resources.gpus_per_worker > 0,
            resources_per_worker=worker_bundle(resources),
            placement_strategy=resources.placement.upper().replace("-", "_"),
            **elastic,
        ),
        run_config=train.RunConfig(
            name=name,
            storage_path=str(folder / TRAINER_FOLDER),
            failure_config=train.FailureConfig(
                max_failures=0,
                max_preemption_failures=0,
                controller_failure_limit=max(1, round(resources.wait_minutes / START_MINUTES)),
            ),
        ),
    )


def failure_kind(failure: BaseException) -> EventKind:
    """Classify what made a group fail, by the errors of its workers."""
    from ray.exceptions import OutOfMemoryError, RayActorError
    from ray.train import PreemptionError

    errors = _worker_errors(failure)
    deaths: list[BaseException] = []
    for error in errors:
        if isinstance(error, RayActorError | OutOfMemoryError) or is_train_error(error):
            deaths.append(error)
    was_preempted = any(getattr(error, "preempted", False) for error in deaths)
    if was_preempted or isinstance(failure, PreemptionError):
        return "preempted"
    if any(isinstance(error, NonFiniteLossError) for error in errors):
        return "loss not finite"
    if any(isinstance(error, AmlpError) for error in errors):
        return "error in code"
    if any(NODE_DIED in str(error) for error in deaths):
        return "node lost"
    if deaths:
        return "worker lost"
    if errors and all(PEER_LOST.search(str(error)) for error in errors):
        return "worker lost"
    return "error in code"


def original_error(failure: BaseException) -> BaseException:
    """Return what a worker raised, preferring our own errors, or that the cluster had no room."""
    from ray.train import ControllerError

    if isinstance(failure, ControllerError):
        if is_startup_error(failure.controller_failure):
            return ResourceError(
                "The cluster had no room for the workers for resources.wait_minutes; free it or "
                "ask for less, and run again: the run resumes from its checkpoint."
            )
        return failure.controller_failure
    errors = _worker_errors(failure)
    own_errors = [error for error in errors if isinstance(error, AmlpError)]
    causes = [error for error in errors if not PEER_LOST.search(str(error))]
    return [*own_errors, *causes, failure][0]


def _worker_errors(failure: BaseException) -> list[BaseException]:
    """Return the error that each failed worker ended with."""
    failures = getattr(failure, "worker_failures", {})
    return [unwrap_worker_error(error) for error in failures.values()]


def death_cause(message: str) -> str:
    """Describe in a few words why a process of Ray ended, by Ray's message of many lines.

    >>> death_cause("ray::f() (pid=7)\\nTraceback ...\\nImportError: no amlp_ray")
    'ImportError: no amlp_ray'
    """
    if KILLED_BY_MONITOR in message or LOW_ON_MEMORY in message:
        return "its node was out of memory"
    if NODE_DIED in message:
        return "its node died"
    if ACTOR_DIED in message:
        return "it was killed or crashed"
    lines = [line for line in message.splitlines() if line.strip()]
    return lines[-1].strip()[:200] if lines else "it was killed or crashed"


def _loss_reason(failure: BaseException) -> str:
    """Describe a loss in a few words."""
    from ray.exceptions import OutOfMemoryError, RayActorError

    errors = _worker_errors(failure)
    for error in errors:
        if isinstance(error, OutOfMemoryError) or KILLED_BY_MONITOR in str(error):
            return "its node was out of memory"
    if any(isinstance(error, RayActorError) for error in errors):
        return "its process died"
    if errors:
        return "the others lost their connection to it"
    return " ".join(str(failure).split())[:160]
