"""Starting or joining a Ray cluster, quietly and with a dashboard whose address is known."""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from amlp_ray.errors import ResourceError

ENVIRONMENT = {
    # Seconds between looks at a Ray Train group; reports wait for the next one. Ray's default of 2 idles short epochs.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_TRAIN_ENABLE_STATE_TRACKING": "1",  # the dashboard's Train tab is empty without it
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # else workers change directory and relative paths break
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_USAGE_STATS_ENABLED": "0",  # nothing leaves a hospital's network unasked
    "RAY_AIR_NEW_OUTPUT": "0",
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # a trial's last result says how it ended and has no score
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # a study keeps its own files
}

CONNECT_S = 5.0  # seconds to wait for a cluster's head


@dataclass(frozen=True)
class RaySession:
    """A running Ray; `dashboard` is the dashboard's address, None where there is none."""

    dashboard: str | None


@contextmanager
def ray_session(address: str | None = None) -> Iterator[RaySession]:
    """Join the cluster at `address`, or start one on this machine; leave as found.

    A Ray that this process has already initialised is used as it is, as in a notebook.

    Args:
        address: such as `auto` or `head:6379`.

    Raises:
        ResourceError: where no cluster answers at `address`.
    """
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    import ray

    logging.getLogger("ray").setLevel(
        logging.ERROR
    )  # Tune warns of its own files, which are turned off
    if ray.is_initialized():
        yield RaySession(_dashboard())
        return
    before = os.environ.get("RAY_API_SERVER_ADDRESS")
    try:
        with _own_signals():
            if address is None:
                _start()
            else:
                _join(address)
        yield RaySession(_dashboard())
    finally:
        ray.shutdown()
        os.environ.pop("RAY_API_SERVER_ADDRESS", None)
        if before is not None:
            os.environ["RAY_API_SERVER_ADDRESS"] = before


def is_joined() -> bool:
    """Whether this process has a Ray already, as a notebook may."""
    ray = sys.modules.get("ray")
    return ray is not None and ray.is_initialized()


@contextmanager
def _own_signals() -> Iterator[None]:
    """Keep what this process does on SIGTERM: Ray would end it with a trace of its C++."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _start() -> None:
    import ray

    port = _free_port()
    # Ray Train frees a killed run's placement group by asking this server; it must know where it is (ray#58515).
    os.environ["RAY_API_SERVER_ADDRESS"] = f"http://127.0.0.1:{port}"
    ray.init(
        address="local",  # not whatever cluster happens to run on this machine
        include_dashboard=True,
        dashboard_port=port,
        log_to_driver=False,
        logging_level=logging.ERROR,
    )


def _join(address: str) -> None:
    import ray

    host, _, port = address.rpartition(":")
    try:
        if (
            port.isdigit() and "/" not in host
        ):  # Ray itself would try for minutes before it says that nobody answers
            socket.create_connection((host, int(port)), timeout=CONNECT_S).close()
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (OSError, ValueError) as error:
        raise ResourceError(
            f"No Ray cluster answers at {address!r} ({' '.join(str(error).split())[:120]}); "
            f"check the address, or leave --address out to start Ray here."
        ) from None


def _dashboard() -> str | None:
    from ray._private.worker import global_worker

    node = global_worker.node
    url = node.webui_url if node else None
    return f"http://{url}" if url else None


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])
