"""A PostgreSQL server of one's own that can be stopped and started again in the middle of a
test."""

from __future__ import annotations

import os
import random
import shutil
import socket
import subprocess
from contextlib import suppress
from pathlib import Path


def programs() -> Path | None:
    """Folder of PostgreSQL's server programs; Debian keeps them off the path."""
    pg_ctl = shutil.which("pg_ctl")
    folders = (
        [Path(pg_ctl).resolve().parent]
        if pg_ctl
        else sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    )
    return folders[-1] if folders and (folders[-1] / "initdb").exists() else None


class Postgres:
    """Listens on a free port of the loopback; user and password are `amlp` and `secret word`."""

    password = "secret word"

    def __init__(self, folder: Path) -> None:
        bin_folder = programs()
        assert bin_folder is not None
        self._bin, self._data = bin_folder, folder / "pgdata"
        self.port = _free_port()
        folder.chmod(0o755)
        self._data.mkdir()
        word = folder / "word"
        word.write_text(self.password)
        if os.getuid() == 0:  # the server refuses root
            for path in (self._data, word):
                shutil.chown(path, "nobody")
            for parent in folder.parents:
                if (
                    parent.stat().st_uid == 0
                    and parent.is_relative_to("/tmp")
                    and parent != Path("/tmp")
                ):
                    parent.chmod(0o755)
        self._run(
            "initdb",
            "-D",
            self._data,
            "-U",
            "amlp",
            "-A",
            "scram-sha-256",
            "--pwfile",
            word,
            "-N",
            "--no-instructions",
        )
        self.start()
        self.url = f"postgresql://amlp:${{AMLP_TEST_PASSWORD}}@127.0.0.1:{self.port}/postgres"

    def start(self) -> None:
        options = (
            f"-p {self.port} -c listen_addresses=127.0.0.1 -c unix_socket_directories= -c fsync=off"
        )
        self._run(
            "pg_ctl", "-D", self._data, "-w", "-l", self._data / "log", "-o", options, "start"
        )

    def stop(self) -> None:
        self._run("pg_ctl", "-D", self._data, "-m", "immediate", "-w", "-t", "180", "stop")

    def close(self) -> None:
        """Stop it for good, if it still runs."""
        with suppress(subprocess.CalledProcessError):
            self.stop()

    def _run(self, program: str, *arguments: object) -> None:
        user = (
            {"user": "nobody", "group": "nogroup", "extra_groups": []} if os.getuid() == 0 else {}
        )
        command = [str(self._bin / program), *map(str, arguments)]
        # Nothing may be piped: the server would inherit the pipe, and reading it would wait for
        # its end.
        subprocess.run(
            command,
            check=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd="/",
            **user,
        )  # type: ignore[call-overload]


def _free_port() -> int:
    """Return a port below those that a system gives to clients.

    A client could take one of theirs while the server is stopped, even by connecting to itself.
    """
    for port in random.SystemRandom().sample(range(15_000, 32_000), 50):
        with socket.socket() as s, suppress(OSError):
            s.bind(("127.0.0.1", port))
            return port
    raise OSError("no free port among fifty")
