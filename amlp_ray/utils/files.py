"""Write files so that a reader, or a run after a kill, finds the old content or the new one."""

from __future__ import annotations

import errno
import math
import os
import re
import secrets
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from amlp_ray.errors import ConfigError

# pathlib makes one slash of two.
URI = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/+(.*)")

IRREGULAR = {
    stat.S_ISFIFO: "a pipe",
    stat.S_ISSOCK: "a socket",
    stat.S_ISCHR: "a device",
    stat.S_ISBLK: "a device",
}


def local_path(path: str | Path) -> Path:
    """Return an absolute path of this machine.

    Raises:
        ConfigError: it is a URI, of which pathlib would make a folder named `s3:`.

    >>> local_path("/data/../runs").as_posix()
    '/data/../runs'
    """
    if match := URI.match(str(path)):
        uri = f"{match[1]}://{match[2]}"
        raise ConfigError(
            f"{uri} is a URI, but this must be a path of a file system; give a folder that all "
            f"nodes see, such as a mounted one. Datasets and predictions may be URIs."
        )
    return Path(path).absolute()


def open_regular(path: str | Path) -> BinaryIO:
    """Open a file to read its bytes, unless it is a pipe, socket or device.

    Reading those would wait for a writer, or never end.

    Raises:
        OSError: it is no regular file, or cannot be opened.
    """
    check_regular(path)
    # Without waiting, in case a pipe took the file's place.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    file = os.fdopen(descriptor, "rb")
    try:
        _check_kind(os.fstat(descriptor), path)
    except OSError:
        file.close()
        raise
    return file


def check_regular(path: str | Path) -> None:
    """Raise OSError if a file that a library will open is no regular file, or not there."""
    _check_kind(Path(path).stat(), path)


def _check_kind(status: os.stat_result, path: str | Path) -> None:
    for is_kind, name in IRREGULAR.items():
        if is_kind(status.st_mode):
            raise OSError(errno.EINVAL, f"it is {name}, not a regular file", str(path))
    if stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError(errno.EISDIR, "it is a folder", str(path))


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield the path of a temporary file that replaces `path` when the block ends without error.

    The temporary file lies in the same folder. Its name is unique, because a killed process on
    another machine may still write the same file. It is removed after an error: a full disk needs
    the room.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(3)}.partial")
    try:
        yield partial
        partial.replace(path)
    except BaseException as error:
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(path)  # a write to a full disk does not name the file
        partial.unlink(missing_ok=True)
        raise


def atomic_write(path: Path, content: str | bytes) -> None:
    """Replace the content of `path` in one step.

    Raises:
        OSError: the content could not be written. The old content is still there.
    """
    data = content.encode() if isinstance(content, str) else content
    with atomic_path(path) as partial:
        partial.write_bytes(data)


def append_line(path: Path, line: str) -> None:
    """Append a whole line, or nothing: what a full disk took of it is cut off again.

    After a line that lacks its end, as a power cut may leave one, a new line is begun.

    Raises:
        OSError: the line could not be written.
    """
    content = f"{line}\n".encode()
    with path.open("a+b", buffering=0) as file:
        size = file.seek(0, os.SEEK_END)
        if size:
            file.seek(size - 1)
            if file.read(1) != b"\n":
                content = b"\n" + content
        try:
            written = file.write(content)
            if written != len(content):
                reason = f"only {written} of {len(content)} bytes were written"
                raise OSError(errno.ENOSPC, reason, str(path))
        except OSError:
            file.truncate(size)
            raise


def without_nan(value: Any) -> Any:
    """Replace NaN and infinity, which JSON does not have, by None."""
    if isinstance(value, Mapping):
        return {str(key): without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
