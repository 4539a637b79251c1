"""Everything that this package uses of Ray's private modules.

Ray may change these in any release. So they all stand here, and
`tests/runtime/test_ray_internals.py` checks what we expect of each.
"""

from __future__ import annotations

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
