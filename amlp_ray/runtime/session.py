"""Start or join a Ray cluster, quietly and with a dashboard whose address is known."""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from amlp_ray.errors import ResourceError

ENVIRONMENT = {
    # Seconds between checks of a Ray Train group; reports wait for the next one.
    # Ray's default of 2 makes short epochs wait.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    # The dashboard's Train tab is empty without it.
    "RAY_TRAIN_ENABLE_STATE_TRACKING": "1",
    # Otherwise workers change their directory and relative paths break.
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    # Nothing leaves a hospital's network unasked.
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
    # A trial's last result says how it ended and has no score.
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
    # A study writes its own files.
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
}
API_SERVER = "RAY_API_SERVER_ADDRESS"

CONNECT_S = 5.0  # to wait for a cluster's head


@contextmanager
def ray_session(address: str | None = None) -> Iterator[str | None]:
    """Join the cluster at `address`, or start one on this machine, and leave it afterwards.

    A Ray that this process has initialized before, as in a notebook, is used and left running.

    Args:
        address: such as `auto` or `head:6379`.

    Yields:
        The address of the dashboard; None without one.

    Raises:
        ResourceError: no cluster answers at `address`.
    """
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    import ray

    # Tune warns about its own files, which are turned off.
    logging.getLogger("ray").setLevel(logging.ERROR)
    if ray.is_initialized():
        yield _dashboard(ray.init(ignore_reinit_error=True, configure_logging=False))
        return
    previous = os.environ.get(API_SERVER)
    try:
        with _keep_signal_handler():
            context = _start() if address is None else _join(address)
        yield _dashboard(context)
    finally:
        ray.shutdown()
        os.environ.pop(API_SERVER, None)
        if previous is not None:
            os.environ[API_SERVER] = previous


def is_joined() -> bool:
    """Whether this process has initialized Ray, as a notebook may."""
    ray = sys.modules.get("ray")
    return ray is not None and ray.is_initialized()


@contextmanager
def _keep_signal_handler() -> Iterator[None]:
    """Keep this process's handler of SIGTERM; Ray's would end it with a C++ trace."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, handler)


def _start() -> Any:
    import ray

    port = _free_port()
    # Ray Train frees the placement group of a killed run by asking this server, so it must know
    # where it is (ray#58515).
    os.environ[API_SERVER] = f"http://127.0.0.1:{port}"
    return ray.init(
        address="local",  # not whatever cluster happens to run on this machine
        include_dashboard=True,
        dashboard_port=port,
        log_to_driver=False,
        logging_level=logging.ERROR,
    )


def _join(address: str) -> Any:
    import ray

    host, _, port = address.rpartition(":")
    try:
        if port.isdigit() and "/" not in host:
            # Ray itself would try for minutes before it says that nobody answers.
            socket.create_connection((host, int(port)), timeout=CONNECT_S).close()
        return ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:120]
        raise ResourceError(
            f"No Ray cluster answers at {address!r} ({reason}); check the address, or leave "
            f"--address out to start Ray here."
        ) from None


def _dashboard(context: Any) -> str | None:
    url = context.dashboard_url
    return f"http://{url}" if url else None


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])
