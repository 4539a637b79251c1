"""What this package expects of Ray's private modules; a new Ray that changes them fails here."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
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
    draining_nodes,
    is_startup_error,
    is_train_error,
    keep_cloud_keys_out_of_runtime_env,
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
