"""Notice that the Ray cluster is gone, which Ray itself tells the driver late or never.

Without its head, Ray ends the process after a minute, without a word about the run. Without the
raylet of this machine, Ray waits forever.
"""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Callable
from typing import Any, TypeVar

from amlp_ray.errors import ClusterLostError

CHECK_INTERVAL_S = 5.0
CONNECT_S = 2.0
# Ray gives up after 60 s. A head that is restarted with a Redis store is back in seconds.
HEAD_LOST_S = 20.0
# How long one call of an actor may take; a loaded machine takes seconds.
CALL_S = 5.0
ACTOR_LOST_S = 120.0

T = TypeVar("T")

logger = logging.getLogger(__name__)


def driver_node_options() -> dict[str, Any]:
    """Return options that place an actor on this machine's node, where it shows whether it lives.

    On another node it would die with that node, which a run survives.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    node_id = ray.get_runtime_context().get_node_id()
    return {"scheduling_strategy": NodeAffinitySchedulingStrategy(node_id, soft=False)}


class ClusterHealth:
    """Checks whether the head and this machine's part of the joined cluster answer."""

    def __init__(self, head: str, clock: Callable[[], float] = time.monotonic) -> None:
        """Set up checks; `head` is the head's `host:port`, `clock` returns seconds."""
        host, _, port = head.rpartition(":")
        self._head = head
        self._socket_address = (host.strip("[]"), int(port))
        self._clock = clock
        self._checked = clock()
        self._head_seen = clock()
        self._is_head_silent = False
        self._actor_seen = clock()

    @classmethod
    def of_joined_cluster(cls) -> ClusterHealth:
        """Watch the cluster that this process has joined."""
        import ray

        return cls(ray.get_runtime_context().gcs_address)

    def check_head(self) -> None:
        """Connect to the head, at most every few seconds.

        Raises:
            ClusterLostError: it has not answered for a while.
        """
        now = self._clock()
        if now - self._checked < CHECK_INTERVAL_S:
            return
        self._checked = now
        try:
            socket.create_connection(self._socket_address, timeout=CONNECT_S).close()
        except OSError as error:
            self._note_silence(now, error.strerror or str(error))
            return
        if self._is_head_silent:
            logger.info("the head of the Ray cluster answers again")
        self._head_seen = now
        self._is_head_silent = False

    def _note_silence(self, now: float, reason: str) -> None:
        silent = now - self._head_seen
        if silent > HEAD_LOST_S:
            raise ClusterLostError(
                f"The head of the Ray cluster at {self._head} has not answered for {silent:.0f} s "
                f"({reason}); once there is a cluster, the same command resumes the study."
            )
        if not self._is_head_silent:
            logger.warning("the head of the Ray cluster at %s does not answer", self._head)
        self._is_head_silent = True

    def call(self, reference: Any, default: T) -> T:
        """Return what a call of an actor on this node gives; `default` if it is late.

        Raises:
            ClusterLostError: the actor is dead, or has not answered for long.
        """
        import ray

        try:
            answer: T = ray.get(reference, timeout=CALL_S)
        except ray.exceptions.GetTimeoutError:
            if self._clock() - self._actor_seen < ACTOR_LOST_S:
                return default
            raise ClusterLostError(
                f"Ray on this machine has not answered for {ACTOR_LOST_S:g} s; check its memory "
                f"and load, and the same command resumes the study."
            ) from None
        except ray.exceptions.RayError:
            raise ClusterLostError(
                "Ray on this machine has stopped: its processes were killed, for example for "
                "memory, or by `ray stop`. The same command resumes the study."
            ) from None
        self._actor_seen = self._clock()
        return answer
