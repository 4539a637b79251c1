"""The images of a split, decoded once per node and shared by all its trials and workers as mapped memory.

A store is one file: images (N, C, H, W) as they are, then keys (N,) int64. `resident` stores lie in shared memory and
go with their last user; `mapped` ones lie in a cache folder, stay for the next run, and make room for others, those
unused for longest first.

Who uses a store holds a shared lock of its file, which ends with the process however that ends. So whoever gets the
exclusive lock knows that nobody uses the file and may delete it, and whoever opened a file that was deleted before it
was locked sees that the name leads elsewhere, and tries again. A store is built under another name and renamed, under
the exclusive lock of that name: one process builds, others wait.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import stat
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from amlp_ray.data.parquet import image_bytes, images_of, read_part
from amlp_ray.errors import DataError

if TYPE_CHECKING:
    from amlp_ray.data.dataset import PatchDataset

Kind = Literal["resident", "mapped"]

SHARED_MEMORY = Path("/dev/shm")  # Linux: files that are memory
RESIDENT_SHARE = (
    0.5  # of the free memory that one split may take: trials and Ray's objects need the rest
)
MAPPED_SHARE = 0.8  # of the free disk
ALIGN = 64  # bytes; where keys begin
POLL_S = 0.05


class Store:
    """A split's images and keys, mapped read-only; whoever opened it keeps it alive."""

    def __init__(
        self, images: np.ndarray, keys: np.ndarray, path: Path | None, fd: int | None
    ) -> None:
        self.images = images  # (N, C, H, W), read-only
        self.keys = keys  # (N,) int64, read-only
        self.path = path  # None: private memory
        self.on_disk = path is not None and path.parent != _shared_folder()
        self._fd = fd
        self._done = (
            weakref.finalize(self, _leave, fd, path) if fd is not None and path else None
        )  # at exit, too

    def will_need(self, start: int, rows: int) -> None:
        """Tell the system that these rows are read soon, so that it fetches them from disk meanwhile."""
        if self._fd is not None and hasattr(os, "posix_fadvise"):
            each = self.images.nbytes // max(1, len(self.images))
            os.posix_fadvise(self._fd, start * each, rows * each, os.POSIX_FADV_WILLNEED)

    def close(self) -> None:
        """Stop using the store; its arrays may still be read. A resident one is deleted by its last user."""
        if self._done:
            self._done()


def open_store(dataset: PatchDataset, split: str, kind: Kind) -> Store:
    """Open a split's store, and build it first where this node has none. Waits where another process builds it.

    A resident store without shared memory, or without room there, is in this process's own memory.

    Raises:
        DataError: a part is damaged, or the cache folder has no room, cannot be written or cannot be locked.
    """
    shape, dtype, count = dataset.shape, np.dtype(dataset.manifest.dtype), dataset.count(split)
    path = store_path(dataset, split, kind)
    if not any(store.path == path for store in _kept):
        release()
    sweep(path.parent)
    try:
        fd = _open_or_build(dataset, split, path, kind)
    except OSError as error:
        if kind == "mapped":
            raise DataError(
                f"{path} cannot be used as a cache ({error.strerror or error}); "
                f"set AMLP_RAY_CACHE to a folder on a disk of this machine, or use data=stream."
            ) from None
        images = np.empty((count, *shape), dtype)
        keys = np.empty(count, np.int64)
        for start, some, names in _parts(dataset, split):
            images[start : start + len(some)], keys[start : start + len(some)] = some, names
        return Store(images, keys, None, None)
    with os.fdopen(os.dup(fd), "rb") as file:
        images = np.memmap(file, dtype, "r", 0, (count, *shape))
        keys = np.memmap(file, np.int64, "r", _keys_offset(dataset, split), (count,))
    os.utime(fd)  # last used now
    store = Store(images, keys, path, fd)
    if kind == "resident":
        _kept[:] = [store]
    return store


_kept: list[
    Store
] = []  # the last resident one: the next trial in this process need not decode it again


def release() -> None:
    """Let go of what this process keeps for a next user."""
    _kept.clear()


def store_path(dataset: PatchDataset, split: str, kind: Kind) -> Path:
    """Where a split's store is or would be: named by everything that its content follows from."""
    name = hashlib.sha256(f"1 {split} {dataset.manifest.model_dump_json()}".encode()).hexdigest()[
        :32
    ]
    folder = _shared_folder() if kind == "resident" else _cache_folder()
    return folder / f"{name}.images"


def has_store(dataset: PatchDataset, split: str, kind: Kind) -> bool:
    """Whether this node holds the store or is building it."""
    path = store_path(dataset, split, kind)
    return any(os.access(file, os.R_OK | os.W_OK) for file in (path, _partial(path)))


def fits(dataset: PatchDataset, split: str, kind: Kind) -> bool:
    """Whether there is room for a store: in free memory and shared memory, or on the disk of the cache folder."""
    size = _file_size(dataset, split)
    if kind == "resident":
        shared = _free(SHARED_MEMORY)
        return size <= RESIDENT_SHARE * (
            free_memory() if shared is None else min(free_memory(), shared)
        )
    folder = _cache_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        room = (_free(folder) or 0) + sum(map(_unused_bytes, folder.glob("*.images")))
        return os.access(folder, os.W_OK) and size <= MAPPED_SHARE * room
    except OSError:
        return False


def free_memory() -> int:
    """Bytes that this process may still take: of the machine, and of its control group where it has one."""
    free = 0
    with suppress(OSError, ValueError):
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable"))
    with suppress(ValueError, OSError, AttributeError):
        free = (
            free or os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
        )  # no /proc: not Linux
    with suppress(OSError, ValueError):
        group = Path("/sys/fs/cgroup")
        limit, used = (int((group / name).read_text()) for name in ("memory.max", "memory.current"))
        details = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        free = min(free, limit - used + int(details["inactive_file"]))
    return max(0, free)


def sweep(folder: Path | None = None) -> None:
    """Delete what processes that were killed left behind: resident stores, and unfinished ones of both kinds."""
    for place in [folder] if folder else [_shared_folder(), _cache_folder()]:
        pattern = "*" if place == _shared_folder() else "*.partial"
        for file in place.glob(pattern):
            _delete_unused(file)


@contextmanager
def swept() -> Iterator[None]:
    """Sweep at the end, however it comes: Ray ends processes without a word, and their images would stay in memory."""
    try:
        yield
    finally:
        sweep()


def _delete_unused(path: Path) -> int:
    """Delete a file that nobody has locked; return the bytes freed."""
    try:
        fd = os.open(path, os.O_RDWR)
    except OSError:
        return 0
    try:
        if _lock(fd) and _leads_to(path, fd):
            size = os.fstat(fd).st_size
            path.unlink(missing_ok=True)
            return size
    except OSError:
        pass  # cannot be locked here, or another deleted it
    finally:
        os.close(fd)
    return 0


def _leave(fd: int, path: Path) -> None:
    """Stop using a store. The last user of a resident one deletes it."""
    try:
        # Turning a shared lock into an exclusive one gives it up first: of those that leave at once, one gets it.
        if path.parent == _shared_folder() and _lock(fd) and _leads_to(path, fd):
            path.unlink(missing_ok=True)
    except OSError:
        pass
    finally:
        with suppress(OSError):
            fcntl.flock(fd, fcntl.LOCK_UN)  # arrays still in use keep the file open, and its lock
            os.close(fd)


def _open_or_build(dataset: PatchDataset, split: str, path: Path, kind: Kind) -> int:
    """A descriptor of the whole store, under a shared lock."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    if path.parent == _shared_folder() and not _is_private(path.parent):
        raise PermissionError(f"{path.parent} belongs to somebody else, or others may write there")
    partial, size = _partial(path), _file_size(dataset, split)
    while True:
        if (fd := _open_shared(path)) is not None:
            if os.fstat(fd).st_size == size:
                return fd
            path.unlink(missing_ok=True)  # cut by something else than us
            os.close(fd)
        fd, mine = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600), False
        try:
            if not _lock(fd):  # another process builds
                time.sleep(POLL_S)
            elif _leads_to(partial, fd):
                mine = True
                if path.exists():  # finished between the two looks
                    partial.unlink(missing_ok=True)
                else:
                    _build(dataset, split, fd, path, size, kind)
                    fcntl.flock(fd, fcntl.LOCK_SH)
                    if _leads_to(path, fd):
                        done, fd = fd, -1
                        return done
        except BaseException:
            if mine and _leads_to(partial, fd):  # another's may be half built
                partial.unlink(missing_ok=True)
            raise
        finally:
            if fd >= 0:
                os.close(fd)


def _is_private(folder: Path) -> bool:
    """Whether nobody but this user can write in a folder: shared memory is open to all who are on the machine."""
    status = folder.lstat()
    return (
        stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid() and not status.st_mode & 0o022
    )


def _lock(fd: int) -> bool:
    """Take the exclusive lock if nobody else has a lock of the file."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _build(dataset: PatchDataset, split: str, fd: int, path: Path, size: int, kind: Kind) -> None:
    if kind == "mapped":
        _make_room(path, size)
    os.ftruncate(fd, 0)
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(
            fd, 0, size
        )  # told now that there is no room, not by a signal in the middle of an epoch
    offset = _keys_offset(dataset, split)
    for start, images, keys in _parts(dataset, split):
        _write(fd, images, start * images[:1].nbytes)
        _write(fd, keys, offset + start * keys.itemsize)
    if kind == "mapped":
        os.fsync(fd)  # else a power cut could leave a whole file of zeros
    _partial(path).rename(path)


def _write(fd: int, array: np.ndarray, offset: int) -> None:
    data = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
    while data:
        done = os.pwrite(fd, data, offset)
        data, offset = data[done:], offset + done


def _parts(dataset: PatchDataset, split: str) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Yield (first row, images, keys) of one row group at a time."""
    from amlp_ray.data.loading.shuffle import units_of
    from amlp_ray.data.parquet import keys_of

    files = dataset.files(split)
    for unit in units_of(dataset, split):
        table = read_part(files[unit.part], ["id", "image"], unit.group)
        if len(table) != unit.rows:
            raise DataError(
                f"{files[unit.part]} is damaged: it has too few rows; prepare the dataset again."
            )
        images = images_of(table["image"], dataset.shape, dataset.manifest.dtype)
        yield unit.start, images, keys_of(table["id"].to_pylist())


def _make_room(path: Path, size: int) -> None:
    """Delete unused stores, those used longest ago first, until `size` bytes are free beside `path`."""
    folder = path.parent
    if (
        MAPPED_SHARE * ((_free(folder) or 0) + sum(map(_unused_bytes, folder.glob("*.images"))))
        < size
    ):
        return  # none of them would help
    for file in sorted(folder.glob("*.images"), key=_last_used):
        if MAPPED_SHARE * (_free(folder) or 0) >= size:
            return
        _delete_unused(file)


def _last_used(file: Path) -> float:
    with suppress(OSError):
        return file.stat().st_mtime
    return 0.0  # deleted meanwhile


def _unused_bytes(path: Path) -> int:
    """Bytes of a store that nobody uses, and that could be deleted; 0 of one that is in use."""
    try:
        fd = os.open(path, os.O_RDWR)
    except OSError:
        return 0
    try:
        return os.fstat(fd).st_size if _lock(fd) else 0
    except OSError:
        return 0
    finally:
        os.close(fd)


def _open_shared(path: Path) -> int | None:
    """A descriptor of the file at `path` under a shared lock; None where there is no file."""
    while True:
        try:
            fd = os.open(path, os.O_RDWR)
        except FileNotFoundError:
            return None
        try:
            fcntl.flock(fd, fcntl.LOCK_SH)
            if _leads_to(path, fd):
                return fd
        except OSError:
            os.close(fd)
            raise
        os.close(fd)  # deleted before it was locked


def _leads_to(path: Path, fd: int) -> bool:
    """Whether `path` still is the file opened as `fd`."""
    with suppress(OSError):
        return os.path.samestat(path.stat(), os.fstat(fd))
    return False


def _partial(path: Path) -> Path:
    return path.with_suffix(".partial")


def _keys_offset(dataset: PatchDataset, split: str) -> int:
    return (
        -(-dataset.count(split) * image_bytes(dataset.shape, dataset.manifest.dtype) // ALIGN)
        * ALIGN
    )


def _file_size(dataset: PatchDataset, split: str) -> int:
    return _keys_offset(dataset, split) + 8 * dataset.count(split)


def _free(folder: Path) -> int | None:
    """Free bytes where a folder lies; None where there is no such folder."""
    try:
        return shutil.disk_usage(folder).free
    except OSError:
        return None


def _shared_folder() -> Path:
    return SHARED_MEMORY / f"amlp_ray-{os.getuid()}"  # users cannot read each other's


def _cache_folder() -> Path:
    return Path(os.environ.get("AMLP_RAY_CACHE") or Path.home() / ".cache" / "amlp_ray").absolute()
