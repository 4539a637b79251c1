"""List, read and write files on this machine or in an object store such as s3://bucket/images.

Everything goes through pyarrow's file systems. So any URI that pyarrow opens is accepted, and
credentials come from the environment.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from functools import cached_property, lru_cache
from pathlib import Path, PurePosixPath
from typing import BinaryIO, NamedTuple, cast

import pyarrow as pa
from pyarrow import fs

from amlp_ray.errors import DataError, describe_error
from amlp_ray.utils.files import atomic_write, open_regular

READ_ATTEMPTS = 3  # an object store drops a request now and then


class Entry(NamedTuple):
    """One file of a listing."""

    name: str  # relative to the listed folder, with forward slashes
    size: int  # bytes


class DataPath:
    """A file or folder, by path or URI.

    >>> str(DataPath("s3://bucket/set") / "train" / "part.parquet")
    's3://bucket/set/train/part.parquet'

    Raises:
        DataError: the URI holds a password.
    """

    def __init__(self, uri: str | Path | DataPath) -> None:
        text = str(uri)
        self._scheme, separator, location = text.partition("://")
        self._query = ""
        self.is_local = not separator or self._scheme == "file"
        if self.is_local:
            # abspath and not resolve(): users know a link by its own name.
            self._base = os.path.abspath(location if separator else text)  # noqa: PTH100
            return
        base, _, self._query = location.partition("?")
        if "@" in base.partition("/")[0]:
            raise DataError("A URI must not hold a password; give access keys in the environment.")
        self._base = base.rstrip("/")

    def __str__(self) -> str:
        return self._with_base(self._base)

    def __fspath__(self) -> str:
        """Return the path, for functions that take paths of this machine."""
        if not self.is_local:
            raise TypeError(f"{self} is not on this machine")
        return self._base

    def __repr__(self) -> str:
        return f"DataPath({str(self)!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, DataPath) and str(self) == str(other)

    def __hash__(self) -> int:
        return hash(str(self))

    def __truediv__(self, name: str) -> DataPath:
        return DataPath(self._with_base(self._base.rstrip("/") + "/" + name))

    def _with_base(self, base: str) -> str:
        """Return the path or URI that has another base, and the same scheme and query."""
        if self.is_local:
            return base
        query = f"?{self._query}" if self._query else ""
        return f"{self._scheme}://{base}{query}"

    @property
    def name(self) -> str:
        """The last part of the path."""
        return PurePosixPath(self._base).name

    @property
    def parent(self) -> DataPath:
        """The folder that holds this one."""
        return DataPath(self._with_base(str(PurePosixPath(self._base).parent)))

    @property
    def local(self) -> Path:
        """The path on this machine."""
        assert self.is_local, self
        return Path(self._base)

    @property
    def path(self) -> str:
        """The path within `filesystem`."""
        return self._base

    @cached_property
    def filesystem(self) -> fs.FileSystem:
        """pyarrow's file system. Raises DataError if it cannot be opened."""
        if self.is_local:
            return fs.LocalFileSystem()
        bucket = self._base.partition("/")[0]
        return _open_filesystem(self._scheme, bucket, self._query)

    def info(self) -> fs.FileInfo:
        """Return type and size. Raises DataError if the file system does not answer."""
        try:
            return self.filesystem.get_file_info(self.path)
        except (OSError, pa.ArrowException) as error:
            raise DataError(
                f"{self} cannot be reached ({describe_error(error)}); "
                "check the address and your access."
            ) from None

    def is_file(self) -> bool:
        return bool(self.info().type == fs.FileType.File)

    def is_folder(self) -> bool:
        return bool(self.info().type == fs.FileType.Directory)

    def is_empty(self) -> bool:
        """Return whether this is a folder that holds nothing, hidden files included."""
        if not self.is_folder():
            return False
        if self.is_local:
            return not any(self.local.iterdir())
        return not self.filesystem.get_file_info(fs.FileSelector(self.path))

    def open(self) -> BinaryIO:
        """Open a file to read its bytes.

        Raises:
            OSError: it cannot be opened, or is a pipe, socket or device.
        """
        if self.is_local:
            return open_regular(self.local)
        return cast(BinaryIO, self.filesystem.open_input_file(self.path))

    def read_bytes(self) -> bytes:
        """Read a file, and try again if an object store drops the request. Raises OSError."""
        if self.is_local:
            with self.open() as local:
                return bytes(local.read())
        for attempt in range(READ_ATTEMPTS):
            try:
                with self.filesystem.open_input_file(self.path) as file:
                    return bytes(file.read())
            except OSError:
                if attempt == READ_ATTEMPTS - 1 or not self.is_file():
                    raise
        raise AssertionError  # the loop returns or raises

    def atomic_write(self, content: str | bytes) -> None:
        """Replace a file in one step: a reader finds the old or the new content. Raises OSError."""
        data = content.encode() if isinstance(content, str) else content
        if not self.is_local:
            # An object appears once the stream is closed.
            with self.filesystem.open_output_stream(self.path, compression=None) as file:
                file.write(data)
            return
        self.local.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(self.local, data)

    def delete(self) -> None:
        """Delete a file, or a folder with everything in it. Do nothing if neither exists."""
        kind = self.info().type
        if kind == fs.FileType.Directory:
            self.filesystem.delete_dir(self.path)
        elif kind == fs.FileType.File:
            self.filesystem.delete_file(self.path)

    def entries(self, *, deep: bool = True) -> Iterator[Entry]:
        """Yield the files of a folder in no promised order, without hidden ones.

        Links to folders are followed once.

        Args:
            deep: list the folders inside too.

        Raises:
            DataError: the folder does not exist or cannot be listed.
        """
        if not self.is_folder():
            raise DataError(f"There is no folder {self}; check the path.")
        if self.is_local:
            yield from _walk(self.local, self.local, deep, set())
            return
        try:
            infos = self.filesystem.get_file_info(fs.FileSelector(self.path, recursive=deep))
        except (OSError, pa.ArrowException) as error:
            raise DataError(
                f"{self} cannot be listed ({describe_error(error)}); check your access."
            ) from None
        for info in infos:
            name = info.path[len(self.path) :].lstrip("/")
            is_hidden = name.startswith(".") or "/." in name
            if info.type == fs.FileType.File and not is_hidden:
                yield Entry(name, info.size)

    def names(self) -> list[str]:
        """Return the names of all files below, sorted. Raises DataError as `entries` does."""
        return sorted(entry.name for entry in self.entries())

    def join(self, names: Iterable[str]) -> tuple[str, ...]:
        """Return the paths or URIs of files inside."""
        return tuple(str(self / name) for name in names)

    def folders(self) -> list[str]:
        """Return the names of the folders directly inside, sorted, without hidden ones."""
        if self.is_local:
            names = [entry.name for entry in os.scandir(self.local) if entry.is_dir()]
        else:
            infos = self.filesystem.get_file_info(fs.FileSelector(self.path))
            names = [info.base_name for info in infos if info.type == fs.FileType.Directory]
        return sorted(name for name in names if not name.startswith("."))


def read_bytes(path: str) -> bytes:
    """Read the file at a path or URI. Raises OSError."""
    return DataPath(path).read_bytes()


def _walk(root: Path, folder: Path, deep: bool, visited: set[tuple[int, int]]) -> Iterator[Entry]:
    status = folder.stat()
    identity = status.st_dev, status.st_ino
    if identity in visited:
        return  # a link leads back here
    visited.add(identity)
    try:
        children = sorted(os.scandir(folder), key=lambda child: child.name)
    except OSError as error:
        raise DataError(
            f"{folder} cannot be listed ({error.strerror}); check its rights."
        ) from None
    for child in children:
        if child.name.startswith("."):
            continue
        path = Path(child.path)
        try:
            if child.is_dir():
                if deep:
                    yield from _walk(root, path, deep, visited)
                continue
            size = child.stat().st_size
        except OSError:
            size = 0  # a link to nothing or to itself: whoever reads the file reports it
        yield Entry(path.relative_to(root).as_posix(), size)


@lru_cache(maxsize=16)
def _open_filesystem(scheme: str, bucket: str, query: str) -> fs.FileSystem:
    uri = f"{scheme}://{bucket}" + (f"?{query}" if query else "")
    try:
        return fs.FileSystem.from_uri(uri)[0]
    except (OSError, ValueError, pa.ArrowException) as error:
        raise DataError(
            f"{uri} cannot be opened ({describe_error(error)}); paths and URIs such as "
            "s3://bucket/folder or gs://bucket/folder are accepted."
        ) from None
