"""What a run raises is told apart: its disk failed, or something else."""

from __future__ import annotations

import errno
import resource
from pathlib import Path

import pytest

from amlp_ray.errors import StorageError
from amlp_ray.utils.files import atomic_write
from amlp_ray.utils.retry import storage_failure

FOLDER = Path("/runs/s/trials/3")


def os_error(number: int, file: str | None = None) -> OSError:
    return OSError(number, "why", file)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (StorageError("Could not write x to y."), "Could not write x to y."),
        (os_error(errno.ENOSPC), f"Cannot read or write {FOLDER} (why)."),
        (os_error(errno.EROFS, f"{FOLDER}/a"), f"Cannot read or write {FOLDER}/a (why)."),
        (os_error(errno.ESTALE, "/data/x"), "Cannot read or write /data/x (why)."),
        (os_error(errno.EACCES, f"{FOLDER}/a"), f"Cannot read or write {FOLDER}/a (why)."),
        (os_error(errno.EACCES, "/data/x"), None),
        (os_error(errno.ENOENT, "/data/x"), None),
        (ValueError("No space left on device"), None),
    ],
)
def test_an_error_of_the_disk_names_the_path(error: Exception, message: str | None) -> None:
    assert storage_failure(error, FOLDER) == message


def test_a_write_that_a_real_limit_cuts_off_is_an_error_of_the_disk(tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large") as caught:
            (tmp_path / "checkpoint").write_bytes(bytes(8192))
        with pytest.raises(OSError, match="File too large") as named:
            atomic_write(tmp_path / "written", bytes(8192))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert str(tmp_path / "written") == named.value.filename
    assert storage_failure(caught.value, tmp_path) == (
        f"Cannot read or write {tmp_path} (File too large)."
    )
