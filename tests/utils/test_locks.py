"""One writer per folder."""

from __future__ import annotations

import errno
import fcntl
from pathlib import Path
from typing import Any

import pytest

from amlp_ray.errors import CheckpointError
from amlp_ray.utils.locks import only_writer


def test_a_second_writer_is_refused_and_the_next_may_begin(tmp_path: Path) -> None:
    run, told = tmp_path / "run", "is written by another process"
    with only_writer(run), pytest.raises(CheckpointError, match=told), only_writer(run, wait_s=0):
        pass
    with only_writer(run, wait_s=0):
        pass


def test_a_file_system_without_locks_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(*given: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    told = r"a file system without locks \(No locks available\)"
    with pytest.raises(CheckpointError, match=told), only_writer(tmp_path / "run"):
        pass
