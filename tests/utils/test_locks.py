"""Lock files are held by one process at a time."""

from __future__ import annotations

import fcntl
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from amlp_ray.utils.locks import acquire_lock, lock_owner

HOLD = """
import sys, time
from pathlib import Path
from amlp_ray.utils.locks import acquire_lock

lock = acquire_lock(Path(sys.argv[1]), owner="process of the test")
print("held", flush=True)
time.sleep(60)
"""


def test_a_second_holder_is_refused_until_the_first_closes_its_file(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with acquire_lock(path), pytest.raises(BlockingIOError):
        acquire_lock(path)
    acquire_lock(path).close()


def test_a_lock_names_its_owner_and_is_free_after_a_kill(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    assert lock_owner(path) is None
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(path)], stdout=subprocess.PIPE)
    assert holder.stdout is not None
    assert holder.stdout.readline() == b"held\n"
    assert lock_owner(path) == "process of the test"
    with pytest.raises(BlockingIOError):
        acquire_lock(path, wait_s=0.2)
    holder.kill()
    acquire_lock(path, wait_s=10).close()
    assert lock_owner(path) is None
    holder.wait()


def test_readers_take_each_other_for_no_holder_and_a_lock_waits_for_them(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    path.write_text("process of a dead driver")
    with path.open() as reader:
        fcntl.flock(reader, fcntl.LOCK_SH)  # as `lock_owner` does for a moment
        assert lock_owner(path) is None
        threading.Timer(0.2, reader.close).start()
        acquire_lock(path, wait_s=5).close()
