"""A folder on this machine or in an object store, such as s3://bucket/images: listing, reading, writing.

All through pyarrow's file systems, so whatever pyarrow opens by URI works, with its credentials from the environment.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import cached_property, lru_cache
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import pyarrow as pa
from pyarrow import fs

from amlp_ray.errors import DataError

RETRIES = 3  # an object store drops a request now and then


class Entry(NamedTuple):
    """A file below a place."""

    name: str  # relative to the place, with forward slashes
    size: int  # bytes


class DataPath:
    """A folder, by path or URI.

    >>> str(Place("s3://bucket/set") / "train" / "part.parquet")
    's3://bucket/set/train/part.parquet'
    """

    def __init__(self, uri: str | Path | DataPath) -> None:
        text = str(uri)
        self._scheme, separator, rest = text.partition("://")
        self.is_local = not separator or self._scheme == "file"
        if self.is_local:
            path = rest if separator else text
            # Not resolve(): what a link is called is what users know it by.
            self._base, self._query = os.path.abspath(path), ""  # noqa: PTH100
        else:
            base, _, query = rest.partition("?")
            if "@" in base.partition("/")[0]:
                raise DataError(
                    "A URI must not hold a password; give access keys in the environment."
                )
            self._base, self._query = base.rstrip("/"), query

    def __str__(self) -> str:
        if self.is_local:
            return self._base
        return f"{self._scheme}://{self._base}" + (f"?{self._query}" if self._query else "")

    def __fspath__(self) -> str:
        """The path, for whatever takes paths of this machine."""
        if not self.is_local:
            raise TypeError(f"{self} is not on this machine")
        return self._base

    def __repr__(self) -> str:
        return f"Place({str(self)!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, DataPath) and str(self) == str(other)

    def __hash__(self) -> int:
        return hash(str(self))

    def __truediv__(self, name: str) -> DataPath:
        child = self._base.rstrip("/") + "/" + name
        return DataPath(
            child
            if self.is_local
            else f"{self._scheme}://{child}" + (f"?{self._query}" if self._query else "")
        )

    @property
    def name(self) -> str:
        """The last part of the path."""
        return PurePosixPath(self._base).name

    @property
    def parent(self) -> DataPath:
        parent = str(PurePosixPath(self._base).parent)
        return DataPath(
            parent
            if self.is_local
            else f"{self._scheme}://{parent}" + (f"?{self._query}" if self._query else "")
        )

    @property
    def local(self) -> Path:
        """The path of a place on this machine."""
        assert self.is_local, self
        return Path(self._base)

    @cached_property
    def filesystem(self) -> fs.FileSystem:
        """pyarrow's file system. Raises DataError where the URI's scheme is not known or its server not there."""
        return (
            fs.LocalFileSystem()
            if self.is_local
            else _file_system(self._scheme, self._base.partition("/")[0], self._query)
        )

    @property
    def path(self) -> str:
        """The path within `filesystem`."""
        return self._base

    def info(self) -> fs.FileInfo:
        """Type and size of what is here. Raises DataError where the place cannot be asked."""
        try:
            return self.filesystem.get_file_info(self.path)
        except (OSError, pa.ArrowException) as error:
            raise DataError(
                f"{self} cannot be reached ({_brief(error)}); check the address and your access."
            ) from None

    def is_file(self) -> bool:
        return bool(self.info().type == fs.FileType.File)

    def is_folder(self) -> bool:
        return bool(self.info().type == fs.FileType.Directory)

    def is_empty(self) -> bool:
        """Whether a folder is there and holds nothing, hidden files included."""
        if not self.is_folder():
            return False
        if self.is_local:
            return not any(self.local.iterdir())
        return not self.filesystem.get_file_info(fs.FileSelector(self.path))

    def read_bytes(self) -> bytes:
        """The content of a file. Raises OSError."""
        if self.is_local:
            return self.local.read_bytes()
        for attempt in range(RETRIES):
            try:
                with self.filesystem.open_input_file(self.path) as file:
                    return bytes(file.read())
            except OSError:
                if attempt == RETRIES - 1 or not self.is_file():
                    raise
        raise AssertionError  # the loop returns or raises

    def write_whole(self, content: str | bytes) -> None:
        """Replace the content of a file in one step: a reader finds the old or the new. Raises OSError."""
        data = content.encode() if isinstance(content, str) else content
        if self.is_local:
            self.local.parent.mkdir(parents=True, exist_ok=True)
            partial = self.local.with_name(f".{self.name}.{os.getpid()}.partial")
            try:
                partial.write_bytes(data)
                partial.replace(self.local)
            finally:
                partial.unlink(missing_ok=True)
            return
        with self.filesystem.open_output_stream(
            self.path, compression=None
        ) as file:  # appears when complete
            file.write(data)

    def delete(self) -> None:
        """Delete a folder with all in it, or a file; nothing there is no fault."""
        info = self.info()
        if info.type == fs.FileType.Directory:
            self.filesystem.delete_dir(self.path)
        elif info.type == fs.FileType.File:
            self.filesystem.delete_file(self.path)

    def entries(self, *, deep: bool = True) -> Iterator[Entry]:
        """Yield the files below, hidden ones left out, in no promised order; links to folders are followed once.

        Raises:
            DataError: the folder is not there or cannot be listed.
        """
        info = self.info()
        if info.type != fs.FileType.Directory:
            raise DataError(f"There is no folder {self}; check the path.")
        if self.is_local:
            yield from _walk(self.local, self.local, deep, set())
            return
        try:
            found = self.filesystem.get_file_info(fs.FileSelector(self.path, recursive=deep))
        except (OSError, pa.ArrowException) as error:
            raise DataError(
                f"{self} cannot be listed ({_brief(error)}); check your access."
            ) from None
        for entry in found:
            name = entry.path[len(self.path) :].lstrip("/")
            if entry.type == fs.FileType.File and not any(
                part.startswith(".") for part in name.split("/")
            ):
                yield Entry(name, entry.size)

    def folders(self) -> list[str]:
        """Names of the folders directly inside, sorted, hidden ones left out."""
        if self.is_local:
            return sorted(
                e.name for e in os.scandir(self.local) if e.is_dir() and not e.name.startswith(".")
            )
        found = self.filesystem.get_file_info(fs.FileSelector(self.path))
        names = (PurePosixPath(e.path).name for e in found if e.type == fs.FileType.Directory)
        return sorted(name for name in names if not name.startswith("."))


def read_bytes(path: str) -> bytes:
    """The content of a file by path or URI. Raises OSError."""
    return DataPath(path).read_bytes()


def _walk(root: Path, folder: Path, deep: bool, visited: set[tuple[int, int]]) -> Iterator[Entry]:
    status = folder.stat()
    if (status.st_dev, status.st_ino) in visited:
        return  # a link that leads back
    visited.add((status.st_dev, status.st_ino))
    try:
        listed = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        raise DataError(
            f"{folder} cannot be listed ({error.strerror}); check its rights."
        ) from None
    for entry in listed:
        if entry.name.startswith("."):
            continue
        path = Path(entry.path)
        try:
            if entry.is_dir():
                if deep:
                    yield from _walk(root, path, deep, visited)
                continue
            size = entry.stat().st_size
        except OSError:
            size = 0  # a link to nothing or to itself: the reader of the file will say so
        yield Entry(path.relative_to(root).as_posix(), size)


@lru_cache(maxsize=16)
def _file_system(scheme: str, bucket: str, query: str) -> fs.FileSystem:
    uri = f"{scheme}://{bucket}" + (f"?{query}" if query else "")
    try:
        return fs.FileSystem.from_uri(uri)[0]
    except (OSError, ValueError, pa.ArrowException) as error:
        raise DataError(
            f"{uri} cannot be opened ({_brief(error)}); paths and URIs such as s3://bucket/folder or "
            f"gs://bucket/folder are accepted."
        ) from None


def _brief(error: BaseException) -> str:
    return " ".join(str(error).split()).rstrip(".")[:200] or type(error).__name__
