"""Start or join a Ray cluster, quietly and with a dashboard whose address is known."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from amlp_ray.errors import ResourceError, describe_error
from amlp_ray.runtime.local_ray import API_SERVER, RAY_FOLDER, TEMP_FOLDER, start_local_ray
from amlp_ray.runtime.ray_internals import (
    HeadAnswer,
    ask_head,
    local_clusters,
    silence_daemon_messages,
)

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
    # A study says in one line that a process died, and why.
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
    # A study handles Ctrl-C like SIGTERM.
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    # A study writes its own files.
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
}
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
        ResourceError: Ray cannot start here, no cluster answers at `address`, it wants a token, or
            `auto` could mean several clusters.
    """
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    import ray

    # Tune warns about its own files, which are turned off.
    logging.getLogger("ray").setLevel(logging.ERROR)
    # It reports as an error that trials were lost or interrupted, which a study says itself.
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
    if ray.is_initialized():
        yield _dashboard(ray.init(ignore_reinit_error=True, configure_logging=False))
        return
    silence_daemon_messages()
    with _keep_environment(API_SERVER, RAY_FOLDER, TEMP_FOLDER):
        try:
            with _keep_signal_handler():
                context = start_local_ray() if address is None else _join(address)
            yield _dashboard(context)
        finally:
            ray.shutdown()


def is_joined() -> bool:
    """Whether this process has initialized Ray, as a notebook may."""
    ray = sys.modules.get("ray")
    return ray is not None and ray.is_initialized()


@contextmanager
def _keep_environment(*names: str) -> Iterator[None]:
    """Restore environment variables afterwards."""
    previous = {name: os.environ.get(name) for name in names}
    try:
        yield
    finally:
        for name, value in previous.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


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


def _join(address: str) -> Any:
    """Join a cluster, after its head was asked: Ray itself tries for 20 s before it gives up."""
    import ray

    is_auto = address == "auto" and not os.environ.get("RAY_ADDRESS")
    head = _find_cluster() if is_auto else _explicit_address(address)
    if "://" not in head:  # that of a Ray client is served by another protocol
        _check_head(head, use_stored_token=is_auto)
    try:
        return ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except Exception as error:
        ray.shutdown()
        raise ResourceError(
            f"The Ray cluster at {head!r} cannot be joined ({describe_error(error)}); check the "
            f"address, that this machine is one of the cluster's nodes, and that both have the "
            f"same versions of Ray and Python."
        ) from None


def _find_cluster() -> str:
    """Return the address of the only cluster on this machine."""
    addresses = local_clusters()
    if not addresses:
        raise ResourceError(
            "No Ray cluster runs on this machine; start one with `ray start --head`, give the "
            "address of one such as --address head:6379, or leave --address out to start Ray here."
        )
    if len(addresses) > 1:
        raise ResourceError(
            f"--address auto could mean {len(addresses)} Ray clusters on this machine: "
            f"{', '.join(addresses)}; give one of these addresses."
        )
    return addresses[0]


def _explicit_address(address: str) -> str:
    """Return the address to join; RAY_ADDRESS replaces `auto`."""
    return os.environ["RAY_ADDRESS"] if address == "auto" else address


def _check_head(address: str, *, use_stored_token: bool) -> None:
    """Raise ResourceError unless the head of a cluster answers and accepts our token."""
    answer, reason = ask_head(address, CONNECT_S, use_stored_token=use_stored_token)
    if answer == HeadAnswer.NONE:
        raise _no_answer(address, reason)
    if answer == HeadAnswer.WANTS_TOKEN:
        raise ResourceError(
            f"The Ray cluster at {address!r} wants a token; set RAY_AUTH_MODE=token and "
            f"RAY_AUTH_TOKEN to the one that `ray get-auth-token` prints on its head, or put it in "
            f"~/.ray/auth_token."
        )
    if answer == HeadAnswer.REFUSES_TOKEN:
        raise ResourceError(
            f"The Ray cluster at {address!r} wants another token than yours; set RAY_AUTH_TOKEN, "
            f"or the content of ~/.ray/auth_token, to the one that `ray get-auth-token` prints on "
            f"its head."
        )


def _no_answer(address: str, reason: str) -> ResourceError:
    return ResourceError(
        f"No Ray cluster answers at {address!r} ({reason}); check the address, or leave --address "
        f"out to start Ray here."
    )


def _dashboard(context: Any) -> str | None:
    url = context.dashboard_url
    return f"http://{url}" if url else None
