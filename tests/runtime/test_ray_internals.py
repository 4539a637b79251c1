"""What this package expects of Ray's private modules; a new Ray that changes them fails here."""

from __future__ import annotations

import inspect
import re
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import pytest
from ray._raylet import AuthenticationTokenLoader
from ray.core.generated.gcs_service_pb2 import GetClusterIdReply
from ray.core.generated.gcs_service_pb2_grpc import (
    NodeInfoGcsServiceServicer,
    add_NodeInfoGcsServiceServicer_to_server,
)
from ray.exceptions import RayActorError
from ray.train import ControllerError, WorkerGroupError
from ray.train.v2._internal.exceptions import (
    UserExceptionWithTraceback,
    WorkerGroupStartupFailedError,
    WorkerGroupStartupTimeoutError,
    WorkerHealthCheckFailedError,
    WorkerHealthCheckTimeoutError,
)
from ray.train.v2._internal.execution.failure_handling.default import RETRYABLE_CONTROLLER_ERRORS

import amlp_ray
from amlp_ray.runtime import ray_internals
from amlp_ray.runtime.ray_internals import (
    CLOUD_KEYS,
    HeadAnswer,
    ask_head,
    draining_nodes,
    is_startup_error,
    is_train_error,
    keep_cloud_keys_out_of_runtime_env,
    silence_daemon_messages,
    unwrap_worker_error,
)

BUG = KeyError("a bug")
DEATH = RayActorError()


def test_only_one_file_names_private_modules_of_ray() -> None:
    package = Path(amlp_ray.__file__).parent
    private = re.compile(r"\bray\.(\w+\.)*_")
    files = [path for path in package.rglob("*.py") if private.search(path.read_text())]
    assert files == [Path(ray_internals.__file__)]


def test_tune_hands_no_cloud_keys_to_trials(monkeypatch: pytest.MonkeyPatch) -> None:
    from ray.tune.execution import class_cache

    by_default = set(class_cache.ENV_VARS_TO_PROPAGATE)
    monkeypatch.setattr(class_cache, "ENV_VARS_TO_PROPAGATE", by_default | CLOUD_KEYS)
    for name in CLOUD_KEYS:
        monkeypatch.setenv(name, "planted")
    handed = class_cache._ActorClassCache().get(type("Trial", (), {}))
    assert "planted" in str(handed._default_options["runtime_env"])
    keep_cloud_keys_out_of_runtime_env()
    handed = class_cache._ActorClassCache().get(type("Trial", (), {}))
    assert "planted" not in str(handed._default_options["runtime_env"])


def test_messages_of_daemons_are_printed_by_a_thread_that_can_be_replaced(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from ray._private import worker

    monkeypatch.setattr(worker, "listen_error_messages", worker.listen_error_messages)
    parameters = list(inspect.signature(worker.listen_error_messages).parameters)
    assert parameters == ["worker", "threads_stopped"]
    assert "target=listen_error_messages" in inspect.getsource(worker.connect)
    silence_daemon_messages()
    worker.listen_error_messages(worker=None, threads_stopped=None)


@pytest.mark.ray
def test_no_node_of_a_healthy_cluster_is_draining(ray_session: None) -> None:
    assert draining_nodes() == set()


def test_a_worker_s_error_is_found_inside_what_ray_train_wraps_it_in() -> None:
    wrapped = UserExceptionWithTraceback(BUG, "Traceback ...")
    assert unwrap_worker_error(wrapped) is BUG
    unhealthy = WorkerHealthCheckFailedError("A worker health check failed.", failure=DEATH)
    assert unwrap_worker_error(unhealthy) is DEATH
    assert unwrap_worker_error(BUG) is BUG


def test_a_group_s_failure_holds_the_errors_by_rank() -> None:
    wrapped = UserExceptionWithTraceback(BUG, "Traceback ...")
    assert WorkerGroupError("message", {1: wrapped}).worker_failures == {1: wrapped}
    assert ControllerError(BUG).controller_failure is BUG


def test_a_worker_that_hangs_is_an_error_of_ray_train() -> None:
    assert is_train_error(WorkerHealthCheckTimeoutError("It hangs."))
    assert not is_train_error(BUG)
    assert not is_train_error(DEATH)


def test_no_room_is_told_by_the_errors_after_which_ray_train_tries_to_start_again() -> None:
    assert is_startup_error(WorkerGroupStartupTimeoutError(2))
    assert is_startup_error(WorkerGroupStartupFailedError("no node"))
    assert set(RETRYABLE_CONTROLLER_ERRORS) == {
        WorkerGroupStartupFailedError,
        WorkerGroupStartupTimeoutError,
    }
    assert not is_startup_error(BUG)


class Head(NodeInfoGcsServiceServicer):  # type: ignore[misc]
    """A head that answers only those who send a token."""

    def GetClusterId(self, request: Any, context: Any) -> Any:
        """Answer as Ray's own head does."""
        if ("authorization", "Bearer right") not in context.invocation_metadata():
            context.abort(grpc.StatusCode.UNAUTHENTICATED, "InvalidAuthToken: missing")
        return GetClusterIdReply(cluster_id=b"id")


@pytest.fixture
def head() -> Iterator[str]:
    server = grpc.server(ThreadPoolExecutor(1))
    add_NodeInfoGcsServiceServicer_to_server(Head(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"127.0.0.1:{port}"
    server.stop(None)


@pytest.mark.parametrize(
    ("token", "answer"),
    [
        (None, HeadAnswer.WANTS_TOKEN),
        ("wrong", HeadAnswer.REFUSES_TOKEN),
        ("right", HeadAnswer.ACCEPTS),
    ],
)
def test_a_head_says_whether_it_takes_our_token(
    token: str | None, answer: HeadAnswer, head: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    loader = SimpleNamespace(
        has_token=lambda: token is not None,
        get_token_for_http_header=lambda: {"authorization": f"Bearer {token}"},
    )
    assert all(hasattr(AuthenticationTokenLoader.instance(), name) for name in vars(loader))
    monkeypatch.setattr(
        "ray._raylet.AuthenticationTokenLoader", SimpleNamespace(instance=lambda: loader)
    )
    assert ask_head(head, 5.0, use_stored_token=False)[0] == answer


@pytest.mark.parametrize(
    ("address", "reason"),
    [("127.0.0.1:9", "Connection refused"), ("no-host.invalid:6379", "Domain name not found")],
)
def test_an_address_without_a_head_is_told_within_seconds(address: str, reason: str) -> None:
    started = time.monotonic()
    assert ask_head(address, 5.0, use_stored_token=False) == (HeadAnswer.NONE, reason)
    assert time.monotonic() - started < 5


def test_what_listens_but_is_no_head_is_given_up() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        assert ask_head(address, 0.5, use_stored_token=False)[0] == HeadAnswer.NONE
