"""Temporary folders of killed processes are removed by a later run; those of living ones never."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from amlp_ray.utils import temporary_folder as module
from amlp_ray.utils.temporary_folder import LOCK, PREFIX, remove_abandoned, temporary_folder

OWNER = """
import sys, time
from amlp_ray.utils.temporary_folder import temporary_folder
with temporary_folder() as folder:
    (folder / "records").mkdir()
    print(folder, flush=True)
    time.sleep(60)
"""


@pytest.fixture(autouse=True)
def parent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    return tmp_path


def start_owner() -> tuple[subprocess.Popen[str], Path]:
    process = subprocess.Popen([sys.executable, "-c", OWNER], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    return process, Path(process.stdout.readline().strip())


def make_old(folder: Path) -> None:
    before = time.time() - 2 * module.MIN_AGE_S
    os.utime(folder / LOCK, (before, before))


def test_a_killed_owner_s_folder_is_removed_and_a_living_one_s_is_not(parent: Path) -> None:
    killed, abandoned = start_owner()
    living, used = start_owner()
    try:
        killed.send_signal(signal.SIGKILL)
        killed.wait()
        make_old(abandoned)
        make_old(used)
        with temporary_folder() as own:
            assert not abandoned.exists()
            assert (used / "records").is_dir()
            assert own.parent == parent
        assert not own.exists()
    finally:
        living.kill()
        living.wait()
    assert remove_abandoned(parent) == [used]


def test_what_may_be_in_use_or_is_not_ours_stays(parent: Path) -> None:
    young = parent / f"{PREFIX}young"
    without_lock = parent / f"{PREFIX}without"
    other = parent / "amlp-other"
    for folder in (young, without_lock, other):
        folder.mkdir()
    (young / LOCK).touch()
    (other / LOCK).touch()
    make_old(other)
    linked = parent / f"{PREFIX}linked"
    linked.symlink_to(other)
    assert remove_abandoned(parent) == []
    for folder in (young, without_lock, other):
        assert folder.is_dir()


def test_an_error_removes_the_folder_too() -> None:
    with pytest.raises(KeyboardInterrupt), temporary_folder() as folder:
        raise KeyboardInterrupt
    assert not folder.exists()
