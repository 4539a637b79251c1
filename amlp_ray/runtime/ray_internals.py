"""Everything that this package uses of Ray's private modules.

Ray may change these in any release. So they all stand here, and
`tests/runtime/test_ray_internals.py` checks what we expect of each.
"""

from __future__ import annotations

from enum import Enum
from typing import Any

# What Tune would copy from this process into the runtime_env of every trial.
CLOUD_KEYS = frozenset(
    {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SECURITY_TOKEN", "AWS_SESSION_TOKEN"}
)


def keep_cloud_keys_out_of_runtime_env() -> None:
    """Stop Tune from handing this process's cloud keys to trials.

    A runtime_env shows in the list of processes and in logs that everybody can read. Workers
    inherit the keys of their node instead. Private because Tune has no option for it.
    """
    from ray.tune.execution import class_cache

    class_cache.ENV_VARS_TO_PROPAGATE.difference_update(CLOUD_KEYS)


def silence_daemon_messages() -> None:
    """Stop Ray from printing what its daemons report; call it before Ray is initialized.

    After a killed process these are dozens of lines of a daemon's state, also of other jobs of the
    cluster. Private because Ray has no option for it: `log_to_driver` is about workers only.
    """
    from ray._private import worker

    worker.listen_error_messages = _ignore_messages


def _ignore_messages(worker: object, threads_stopped: object) -> None:
    """Take the place of the thread that prints the messages."""


def draining_nodes() -> set[str]:
    """Return ids of nodes that will soon be taken away and accept no more work.

    Private because `ray.nodes()` counts them as alive, and the State API does not list draining.
    """
    from ray._private.state import state

    return set(state.get_draining_nodes())


def is_train_error(error: BaseException) -> bool:
    """Whether Ray Train itself found a worker at fault: it hangs or missed a collective call.

    Private because Ray Train exports only the errors of a whole group, not of one worker.
    """
    from ray.train.v2._internal.exceptions import RayTrainError

    return isinstance(error, RayTrainError)


def is_startup_error(error: BaseException) -> bool:
    """Whether a group of workers could not start because the cluster had no room.

    Private because Ray Train exports only `ControllerError`, which holds this error or a bug.
    """
    from ray.train.v2._internal.exceptions import (
        WorkerGroupStartupFailedError,
        WorkerGroupStartupTimeoutError,
    )

    return isinstance(error, WorkerGroupStartupFailedError | WorkerGroupStartupTimeoutError)


def unwrap_worker_error(error: BaseException) -> BaseException:
    """Return what a worker's code raised, or what Ray found when it checked the worker.

    Private because the public `WorkerGroupError.worker_failures` holds only Ray Train's wrappers.
    """
    from ray.train.v2._internal.exceptions import (
        UserExceptionWithTraceback,
        WorkerHealthCheckFailedError,
    )

    if isinstance(error, UserExceptionWithTraceback):
        return error._base_exc
    if isinstance(error, WorkerHealthCheckFailedError):
        return error.health_check_failure
    return error


def local_clusters() -> list[str]:
    """Return the addresses of the clusters that have a node on this machine, sorted.

    Private because Ray's `auto` takes any of several.
    """
    from ray._private.services import find_gcs_addresses
    from ray._private.utils import read_ray_address

    find_gcs_addresses.cache_clear()
    # Processes of a container cannot be seen from another, so the last `ray start` counts too.
    return sorted(find_gcs_addresses()) or [a for a in [read_ray_address(None)] if a]


class HeadAnswer(Enum):
    """What an address answers when it is asked for its cluster's id."""

    ACCEPTS = "accepts"
    NONE = "none"
    """Nobody answers, or it is no head of a Ray cluster."""
    WANTS_TOKEN = "wants a token"
    """It wants a token, and Ray would send none from this process."""
    REFUSES_TOKEN = "refuses the token"


def ask_head(address: str, timeout_s: float, *, use_stored_token: bool) -> tuple[HeadAnswer, str]:
    """Ask the head of a cluster for the cluster's id, as a process that joins does first.

    Private because `ray.init` asks for 20 s, and raises the same error whatever the answer is.

    Args:
        use_stored_token: whether Ray sends the token in ~/.ray without being told to. It does to
            clusters on this machine.

    Returns:
        The answer, and its reason in words.
    """
    import grpc
    from ray._private.authentication.authentication_token_setup import (
        maybe_enable_token_auth_if_token_available,
    )
    from ray._raylet import AuthenticationTokenLoader  # type: ignore[attr-defined]  # not in its stub
    from ray.core.generated.gcs_service_pb2 import GetClusterIdRequest
    from ray.core.generated.gcs_service_pb2_grpc import NodeInfoGcsServiceStub

    if use_stored_token:
        maybe_enable_token_auth_if_token_available(warn_if_disabled=False)
    loader = AuthenticationTokenLoader.instance()
    header = loader.get_token_for_http_header() if loader.has_token() else {}
    with grpc.insecure_channel(address, options=[("grpc.enable_http_proxy", 0)]) as channel:
        try:
            NodeInfoGcsServiceStub(channel).GetClusterId(
                GetClusterIdRequest(),
                timeout=timeout_s,
                metadata=tuple((name.lower(), value) for name, value in header.items()),
            )
        except grpc.RpcError as error:
            if error.code() == grpc.StatusCode.UNAUTHENTICATED:
                answer = HeadAnswer.REFUSES_TOKEN if header else HeadAnswer.WANTS_TOKEN
                return answer, "no valid token"
            return HeadAnswer.NONE, _grpc_reason(error)
    return HeadAnswer.ACCEPTS, ""


def _grpc_reason(error: Any) -> str:
    """Shorten gRPC's message to its last cause, such as `Connection refused`."""
    details = " ".join(str(error.details()).split())
    return details.rpartition(": ")[2].strip("[]")[:120] or error.code().name
