"""A head that answers no more is reported, and ends the run before Ray ends the process."""

from __future__ import annotations

import socket

import pytest

from amlp_ray.errors import ClusterLostError
from amlp_ray.runtime.cluster_health import CHECK_INTERVAL_S, HEAD_LOST_S, ClusterHealth


class Clock:
    """Seconds that a test sets."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_head_that_is_gone_is_said_at_once_and_given_up_later(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO", logger="amlp_ray")
    clock = Clock()
    with socket.socket() as head:
        head.bind(("127.0.0.1", 0))
        head.listen()
        port = head.getsockname()[1]
        address = f"127.0.0.1:{port}"
        health = ClusterHealth(address, clock)
        clock.now = 10 * HEAD_LOST_S
        health.check_head()
    clock.now += CHECK_INTERVAL_S
    health.check_head()
    clock.now += CHECK_INTERVAL_S
    health.check_head()
    silence = f"the head of the Ray cluster at {address} does not answer"
    assert caplog.messages == [silence]
    with socket.socket() as head:
        head.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        head.bind(("127.0.0.1", port))
        head.listen()
        clock.now += CHECK_INTERVAL_S
        health.check_head()
    assert caplog.messages == [silence, "the head of the Ray cluster answers again"]
    clock.now += HEAD_LOST_S + CHECK_INTERVAL_S
    with pytest.raises(ClusterLostError, match=r"has not answered for 25 s .*resumes the study"):
        health.check_head()


@pytest.mark.ray
def test_a_dead_actor_of_this_machine_means_that_ray_has_stopped(ray_session: None) -> None:
    import ray

    from amlp_ray.runtime.cluster_health import driver_node_options
    from amlp_ray.study.execution.stop_flags import StopFlags

    health = ClusterHealth.of_joined_cluster()
    health.check_head()
    actor = ray.remote(StopFlags).options(num_cpus=0, **driver_node_options()).remote()
    ray.get(actor.mark_started.remote("a"))
    assert health.call(actor.started_since.remote(0), []) == ["a"]
    ray.kill(actor)
    with pytest.raises(ClusterLostError, match="has stopped"):
        health.call(actor.started_since.remote(0), [])
