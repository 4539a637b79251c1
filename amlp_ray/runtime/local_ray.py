"""Start Ray on this machine, in a folder that its sockets fit in."""

from __future__ import annotations

import logging
import os
import shutil
import socket
import tempfile
from pathlib import Path
from typing import Any

from amlp_ray.errors import ResourceError, describe_error

API_SERVER = "RAY_API_SERVER_ADDRESS"
RAY_FOLDER = "RAY_TMPDIR"  # Ray keeps `ray/session_<time>_<process>` in it
TEMP_FOLDER = "TMPDIR"

# The kernel's limit on the path of a socket, in bytes.
MAX_SOCKET_PATH = 107
# What is appended to a folder, at most: by Ray, and by Python in the processes of the dashboard.
RAY_SOCKET = "ray/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store.1"
PYTHON_SOCKET = "pymp-abcdefgh/listener-abcdefgh"
# Ray's logs and sockets of a session; its objects lie in shared memory.
MIN_FREE_BYTES = 50_000_000
DEFAULT_FOLDERS = (Path("/tmp"), Path("/var/tmp"))

logger = logging.getLogger(__name__)


def start_local_ray() -> Any:
    """Start Ray on this machine and return its context; start it again after a time-out.

    A machine under load may not start it within Ray's own limit of 30 s.

    The environment variables `API_SERVER`, `RAY_FOLDER` and `TEMP_FOLDER` are set, which the
    caller restores.

    Raises:
        ResourceError: Ray does not start.
    """
    import ray

    folder = choose_temp_folder()
    os.environ[RAY_FOLDER] = str(folder)
    if TEMP_FOLDER in os.environ and _problem(Path(os.environ[TEMP_FOLDER]), PYTHON_SOCKET):
        os.environ[TEMP_FOLDER] = str(folder)
    try:
        return _init_ray()
    except Exception as error:
        ray.shutdown()
        if not _is_timeout(error):
            raise ResourceError(
                f"Ray cannot start on this machine ({_reason(error)}); check space and rights of "
                f"{folder} and of ~/.ray, or join a running cluster with --address."
            ) from None
        logger.warning("Ray did not start in time (%s); starting it again", _reason(error))
    try:
        return _init_ray()
    except Exception as error:
        ray.shutdown()
        raise ResourceError(
            f"Ray did not start on this machine in two attempts ({_reason(error)}); wait until the "
            f"machine has less to do, check its memory and the space in {folder} and /dev/shm, or "
            f"join a running cluster with --address."
        ) from None


def choose_temp_folder() -> Path:
    """Return the folder for Ray's temporary files; log it if it is not the one asked for.

    It is `RAY_TMPDIR` or `TMPDIR`, as Ray has it. Where Ray could not work there, because the
    path is too long for sockets, not writable, or full, it is a folder of the system.

    Raises:
        ResourceError: no folder can be used; the message says why.
    """
    requested = os.environ.get(RAY_FOLDER) or os.environ.get(TEMP_FOLDER)
    folders = [Path(requested).absolute()] if requested else []
    problems: list[str] = []
    for folder in dict.fromkeys([*folders, *DEFAULT_FOLDERS]):
        problem = _problem(folder, RAY_SOCKET)
        if problem is None:
            if problems:
                logger.info("Ray keeps its temporary files in %s: %s", folder, problems[0])
            return folder
        problems.append(f"{folder} {problem}")
    raise ResourceError(
        f"Ray has no folder for its temporary files: {', '.join(problems)}; free space there, or "
        f"set RAY_TMPDIR to a writable folder with a short path."
    )


def _problem(folder: Path, socket_path: str) -> str | None:
    """Return why processes with a socket cannot work in a folder; None if they can."""
    length = len(os.fsencode(folder / socket_path))
    if length > MAX_SOCKET_PATH:
        limit = MAX_SOCKET_PATH - len(socket_path) - 1
        return f"is longer than the {limit} bytes that sockets leave"
    try:
        ray_folder = folder / "ray"
        ray_folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=ray_folder):
            pass
        free = shutil.disk_usage(ray_folder).free
    except OSError as error:
        return f"cannot be written to ({error.strerror})"
    if free < MIN_FREE_BYTES:
        return f"has only {free / 1e6:.0f} MB of free space"
    return None


def _init_ray() -> Any:
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


def _is_timeout(error: Exception) -> bool:
    """Return whether another attempt may succeed: Ray raises time-outs as plain exceptions."""
    if isinstance(error, OSError):
        return isinstance(error, ConnectionError | TimeoutError)
    return not isinstance(error, ValueError)


def _reason(error: Exception) -> str:
    return describe_error(error)[:160]


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])
