"""What made a group fail, told from what its workers ended with; no Ray runs here."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ray.core.generated.common_pb2 import ActorDiedErrorContext, NodeDeathInfo
from ray.exceptions import ActorDiedError, OutOfMemoryError
from ray.train import ControllerError, PreemptionError, WorkerGroupError
from ray.train.v2._internal.exceptions import (
    UserExceptionWithTraceback,
    WorkerGroupStartupFailedError,
    WorkerGroupStartupTimeoutError,
    WorkerHealthCheckFailedError,
    WorkerHealthCheckTimeoutError,
)
from ray.train.v2.api.preemption import PreemptionInfo

from amlp_ray.config import FaultToleranceConfig, ResourceConfig
from amlp_ray.errors import (
    DataError,
    NonFiniteLossError,
    ResourceError,
    StorageError,
    WorkerLostError,
)
from amlp_ray.runtime import worker_group
from amlp_ray.runtime.worker_context import WorkerContext
from amlp_ray.runtime.worker_group import failure_kind, original_error, run_group
from amlp_ray.utils.event_log import EventTail, read_events

GLOO = RuntimeError(
    "[../gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:29500"
)
NCCL = RuntimeError(
    "NCCL error in: ProcessGroupNCCL.cpp:2251, remote process exited or there was a network error"
)
NAN = NonFiniteLossError("loss is not finite at epoch 3, step 2")
NO_DATA = DataError("part-00001.parquet is gone; prepare the data again.")
BUG = KeyError("a bug")


PROCESS_DIED = (
    "The actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR"
)


def died(message: str = PROCESS_DIED) -> Any:
    return ActorDiedError(
        ActorDiedErrorContext(
            class_name="RayTrainWorker", actor_id=b"0" * 16, error_message=message
        )
    )


def taken_away() -> ActorDiedError:
    node = NodeDeathInfo(reason=NodeDeathInfo.AUTOSCALER_DRAIN_PREEMPTED)
    return ActorDiedError(
        ActorDiedErrorContext(actor_id=b"0" * 16, error_message="gone", node_death_info=node)
    )


NODE = died("The actor died because its node has died. Node Id: 3f, the health check failed.")
PREEMPTION = PreemptionError(
    PreemptionInfo(deadline_ms=None, preempted_node_to_ranks={"node": [0]})
)


def ended(*errors: Exception) -> WorkerGroupError:
    """Return the failure of a group whose workers ended with these, wrapped as Ray Train does."""
    wrapped: dict[int, Exception] = {}
    for rank, error in enumerate(errors):
        if isinstance(error, ActorDiedError | OutOfMemoryError):
            wrapped[rank] = WorkerHealthCheckFailedError(
                "A worker health check failed.", failure=error
            )
        elif isinstance(error, WorkerHealthCheckTimeoutError):
            wrapped[rank] = error
        else:
            wrapped[rank] = UserExceptionWithTraceback(
                error, f"Traceback ...\n{type(error).__name__}: {error}"
            )
    return WorkerGroupError("told", wrapped)


KINDS = {
    "a worker that died": (ended(died()), "worker lost"),
    "a worker that died, and others that miss it": (ended(GLOO, died(), NCCL), "worker lost"),
    "others that miss it alone": (ended(GLOO, NCCL), "worker lost"),
    "a worker that does not answer": (
        ended(WorkerHealthCheckTimeoutError("It has been hanging.")),
        "worker lost",
    ),
    "a worker that took too much memory": (
        ended(OutOfMemoryError("The node ran low")),
        "worker lost",
    ),
    "a node": (ended(GLOO, NODE), "node lost"),
    "a node that was taken away": (ended(GLOO, taken_away()), "preempted"),
    "a node that will be": (PREEMPTION, "preempted"),
    "a loss": (ended(NAN, GLOO), "loss not finite"),
    "a loss on one, after which another died": (ended(died(), NAN), "loss not finite"),
    "what we raise": (ended(GLOO, NO_DATA), "error in code"),
    "a bug": (ended(BUG), "error in code"),
    "a bug on one, and others that miss it": (ended(GLOO, BUG), "error in code"),
    "no room": (ControllerError(WorkerGroupStartupTimeoutError(2)), "error in code"),
    "a bug of Ray's": (ControllerError(BUG), "error in code"),
    "a bug before workers": (BUG, "error in code"),
}


@pytest.mark.parametrize(("failure", "kind"), KINDS.values(), ids=KINDS.keys())
def test_what_was_lost_is_told_from_what_would_come_again(
    failure: BaseException, kind: str
) -> None:
    assert failure_kind(failure) == kind


OWN = {
    "what we raise comes first": (ended(GLOO, BUG, NO_DATA), NO_DATA),
    "a bug before those that miss its worker": (ended(GLOO, BUG), BUG),
    "a loss": (ended(GLOO, NAN), NAN),
    "a bug of Ray's": (ControllerError(BUG), BUG),
    "a bug before workers": (BUG, BUG),
}


@pytest.mark.parametrize(("failure", "error"), OWN.values(), ids=OWN.keys())
def test_the_error_of_the_worker_that_made_it_is_raised(
    failure: BaseException, error: BaseException
) -> None:
    assert original_error(failure) is error


@pytest.mark.parametrize(
    "failure", [WorkerGroupStartupTimeoutError(2), WorkerGroupStartupFailedError("no node")]
)
def test_no_room_is_told_in_a_sentence(failure: Exception) -> None:
    error = original_error(ControllerError(failure))
    assert isinstance(error, ResourceError)
    assert "no room for the workers for resources.wait_minutes" in str(error)


# Beginning again

Run = Callable[..., int]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    """Return a function that runs a group which fails in the given ways, one after another.

    It takes the epoch reached before each failure, and returns how often the group was started.
    """

    def go(
        failures: list[BaseException], epochs: list[int] | None = None, *, max_failures: int = 2
    ) -> int:
        reached = iter(epochs or [])
        now, left, begun = [0], iter(failures), [0]

        def attempt(*arguments: Any) -> BaseException | None:
            begun[0] += 1
            now[0] = next(reached, now[0])
            return next(left, None)

        monkeypatch.setattr(worker_group, "_run_once", attempt)
        monkeypatch.setattr(worker_group, "answering_nodes", lambda: {"node"})
        resources, faults = (
            ResourceConfig(workers=2),
            FaultToleranceConfig(max_failures=max_failures),
        )
        try:
            run_group(print, resources, faults, name="x", folder=tmp_path, progress=lambda: now[0])
        finally:
            assert next(left, None) is None, "it was not begun again"
        return begun[0]

    return go


def kinds(folder: Path) -> list[str]:
    return [event["event"] for event in read_events(folder)]


def test_what_was_lost_is_begun_again_and_noted(run: Run, tmp_path: Path) -> None:
    assert run([]) == 1
    assert kinds(tmp_path) == []
    assert run([ended(died()), ended(NODE)]) == 3
    assert kinds(tmp_path) == ["worker lost", "node lost"]
    assert "resuming from the latest checkpoint" in read_events(tmp_path)[0]["text"]


def test_losses_in_a_row_count_together_up_to_the_retries(run: Run, tmp_path: Path) -> None:
    with pytest.raises(
        WorkerLostError,
        match=r"number 3 without progress, and fault_tolerance\.max_failures=2 allows no more",
    ):
        run([ended(died())] * 3)
    assert kinds(tmp_path) == ["worker lost"] * 3
    with pytest.raises(
        WorkerLostError, match=r"number 1 without progress, and fault_tolerance\.max_failures=0"
    ):
        run([ended(NODE)], max_failures=0)


def test_an_epoch_that_was_ended_begins_the_count_anew(run: Run) -> None:
    assert run([ended(died())] * 6, [0, 0, 1, 1, 2, 2, 3]) == 7
    with pytest.raises(WorkerLostError, match="number 3"):
        run([ended(died())] * 4, [0, 1, 1, 1])


def test_nodes_that_are_taken_away_cost_no_retry(run: Run, tmp_path: Path) -> None:
    assert run([ended(taken_away())] * 4, max_failures=0) == 5
    assert kinds(tmp_path) == ["preempted"] * 4


@pytest.mark.parametrize("error", [NO_DATA, NAN, BUG], ids=["ours", "loss", "bug"])
def test_what_would_come_again_ends_it_at_once_as_it_was(
    run: Run, tmp_path: Path, error: Exception
) -> None:
    with pytest.raises(type(error)) as raised:
        run([ended(GLOO, error)])
    assert raised.value is error
    (event,) = read_events(tmp_path)
    assert event["event"] == ("loss not finite" if error is NAN else "error in code")
    assert event["error"] == str(error)


def test_no_room_is_no_event_of_the_run(run: Run, tmp_path: Path) -> None:
    with pytest.raises(ResourceError):
        run([ControllerError(WorkerGroupStartupTimeoutError(2))])
    assert kinds(tmp_path) == []


@pytest.mark.parametrize("left", ["nothing", "an empty folder"])
def test_a_group_begins_again_when_its_folder_is_there_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, left: str
) -> None:
    folder, away = tmp_path / "run", tmp_path / "away"
    folder.mkdir()
    (folder / "config.yaml").touch()
    begun: list[bool] = []

    def attempt(*arguments: Any) -> BaseException | None:
        begun.append((folder / "config.yaml").is_file())
        if len(begun) > 1:
            return None
        folder.rename(away)
        if left == "an empty folder":
            folder.mkdir()
        back.start()
        return ended(died())

    def bring_back() -> None:
        if folder.exists():
            folder.rename(tmp_path / "below")  # what stands where nothing is mounted
        away.rename(folder)

    back = threading.Timer(1.0, bring_back)
    monkeypatch.setattr(worker_group, "_run_once", attempt)
    monkeypatch.setattr(worker_group, "answering_nodes", lambda: {"node"})
    run_group(print, ResourceConfig(workers=2), FaultToleranceConfig(), name="x", folder=folder)
    assert begun == [True, True]
    assert kinds(folder if left == "nothing" else tmp_path / "below") == ["worker lost", "storage"]


def test_a_folder_that_stays_away_ends_the_run_and_is_not_made_anew(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.yaml").touch()

    def attempt(*arguments: Any) -> BaseException:
        shutil.rmtree(folder)
        return ended(died())

    monkeypatch.setattr(worker_group, "_run_once", attempt)
    monkeypatch.setattr(worker_group, "answering_nodes", lambda: {"node"})
    with pytest.raises(StorageError, match=r"for 0\.01 minutes"):
        run_group(
            print,
            ResourceConfig(workers=2),
            FaultToleranceConfig(storage_minutes=0.01),
            name="x",
            folder=folder,
        )
    assert not folder.exists()


@pytest.mark.parametrize("fails", [False, True])
def test_a_group_is_polled_in_the_calling_thread_while_it_works_and_once_after(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, fails: bool
) -> None:
    polled: list[tuple[bool, bool]] = []
    done = threading.Event()

    class Trainer:
        def fit(self) -> None:
            assert polled_while_it_works.wait(10)
            done.set()
            if fails:
                raise BUG

    polled_while_it_works = threading.Event()

    def poll() -> None:
        polled.append((threading.current_thread() is threading.main_thread(), done.is_set()))
        polled_while_it_works.set()

    monkeypatch.setattr(worker_group, "POLL_S", 0.01)
    failure = worker_group._run_once(Trainer, EventTail(tmp_path), poll)
    assert failure is (BUG if fails else None)
    assert (polled[0], polled[-1]) == ((True, False), (True, True))


def test_a_process_by_itself_is_the_first_of_one() -> None:
    assert worker_group.this_process() == WorkerContext(
        rank=0, world=1, device=worker_group.this_process().device
    )
    assert WorkerContext().is_first
    assert not WorkerContext(rank=1, world=2).is_first
