"""Cache the decoded images of a split in one file, which all processes of a machine map.

The file holds images (N, C, H, W) as stored, then keys (N,) int64 and a checksum per row group
(G,) int64, then a checksum of the keys and checksums. Its pages live in the page cache of the
operating system, which shares them between processes and drops them when memory runs short.

Each process compares a row group with its checksum when it first uses it, at 2 GB/s. A damaged file
is made anew.

Cache files lie in the folder `AMLP_RAY_CACHE`, by default `~/.cache/amlp_ray`, and stay for the
next run. The lock of the folder lets one process at a time build or delete files. A file gets its
name once it is complete. Whoever maps a file holds a shared lock on it until the process ends, so
unused files can be told apart. They are deleted when room is needed, the longest unused first.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import math
import mmap
import os
import shutil
import zlib
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

import numpy as np

from amlp_ray.data.dataset import PatchDataset
from amlp_ray.data.loading.shuffle import RowGroup, row_groups_of
from amlp_ray.data.parquet import images_of, keys_of, read_part
from amlp_ray.errors import DataError
from amlp_ray.utils.files import atomic_path
from amlp_ray.utils.locks import acquire_lock

MAX_DISK_SHARE = 0.8  # of the free disk, for one split
KEYS_ALIGNMENT = 64  # bytes

logger = logging.getLogger(__name__)


class CachedSplit:
    """Images and keys of a split, mapped read-only.

    The file counts as used until the object and its arrays are gone.
    """

    def __init__(self, file: BinaryIO, dataset: PatchDataset, split: str) -> None:
        """Map an open cache file, which may be closed afterwards."""
        self.dataset = dataset
        self.split = split
        self.file_status = os.fstat(file.fileno())
        count = dataset.count(split)
        # The mapping duplicates the descriptor, so the shared lock of `file` lives as long as it.
        self._mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        num_values = count * math.prod(dataset.shape)
        pixels = np.frombuffer(self._mapping, dataset.manifest.dtype, num_values)
        self.images = pixels.reshape(count, *dataset.shape)  # (N, C, H, W)
        self._tail = np.frombuffer(self._mapping, np.int64, offset=_keys_offset(dataset, split))
        self.keys = self._tail[:count]  # (N,)
        self._checksums = self._tail[count:-1]  # (G,)
        self._is_verified = np.zeros(len(self._checksums), bool)

    @property
    def has_intact_keys(self) -> bool:
        """Whether keys and checksums are those that were written."""
        return zlib.crc32(self._tail[:-1].data) == self._tail[-1]

    def is_intact(self, number: int, group: RowGroup) -> bool:
        """Return whether row group `number` is as it was written; it is read once."""
        if not self._is_verified[number]:
            images = self.images[group.start : group.start + group.rows]
            self._is_verified[number] = zlib.crc32(images.data) == self._checksums[number]
        return bool(self._is_verified[number])

    def prefetch(self, start: int, rows: int) -> None:
        """Let the system read `rows` images from disk in the background, from `start` on."""
        image_bytes = self.images[0].nbytes
        first_page = start * image_bytes // mmap.PAGESIZE
        first_byte = first_page * mmap.PAGESIZE
        length = (start + rows) * image_bytes - first_byte
        self._mapping.madvise(mmap.MADV_WILLNEED, first_byte, length)


def open_cached_split(dataset: PatchDataset, split: str) -> CachedSplit:
    """Map the images of a split, and decode them into the cache if it does not hold them yet.

    If another process is filling the cache, this one waits for it.

    Raises:
        DataError: a part of the dataset is damaged, or the cache folder has no room, cannot be
            written or cannot be locked.
    """
    path = cache_path(dataset, split)
    try:
        cached = _open_file(path, dataset, split)
        if cached is not None:
            return cached
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with acquire_lock(path.parent / "lock", wait_s=math.inf):
            cached = _open_file(path, dataset, split)  # another process may have built it
            if cached is None:
                if path.exists():
                    logger.warning("%s is damaged and made anew.", path)
                _build(path, dataset, split)
                cached = _open_file(path, dataset, split)
    except OSError as error:
        raise DataError(
            f"{path} cannot be used as a cache ({error.strerror or error}); set AMLP_RAY_CACHE to "
            f"a folder on a disk of this machine, or use data=stream."
        ) from None
    if cached is None:
        raise DataError(f"{path} was deleted by another program; run again.")
    return cached


def make_anew(damaged: CachedSplit) -> CachedSplit:
    """Replace a damaged cache file, unless another process did, and map the new one.

    Raises:
        DataError: see `open_cached_split`.
    """
    path = cache_path(damaged.dataset, damaged.split)
    with suppress(FileNotFoundError):
        if os.path.samestat(damaged.file_status, path.stat()):
            logger.warning("%s is damaged and made anew.", path)
            path.unlink()
    return open_cached_split(damaged.dataset, damaged.split)


def cache_path(dataset: PatchDataset, split: str) -> Path:
    """Return the path of a split's cache file, named by all that its content follows from."""
    identity = f"2 {split} {dataset.manifest.model_dump_json()}"
    name = hashlib.sha256(identity.encode()).hexdigest()[:32]
    return _cache_folder() / f"{name}.images"


def is_cached(dataset: PatchDataset, split: str) -> bool:
    """Return whether the cache holds a split, or a process is adding it."""
    path = cache_path(dataset, split)
    return path.exists() or any(path.parent.glob(f".{path.name}.*.partial"))


def has_room(dataset: PatchDataset, split: str) -> bool:
    """Return whether the disk of the cache folder can take a split."""
    folder = _cache_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        return os.access(folder, os.W_OK) and _can_take(folder, _file_size(dataset, split))
    except OSError:
        return False


def _open_file(path: Path, dataset: PatchDataset, split: str) -> CachedSplit | None:
    """Map a cache file under a shared lock; return None if there is none that is whole."""
    with suppress(FileNotFoundError), path.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        status = os.fstat(file.fileno())
        # The file may have been deleted before it was locked, or cut short by another program.
        if os.path.samestat(status, path.stat()) and status.st_size == _file_size(dataset, split):
            with suppress(OSError):
                os.utime(path)  # the time of last use; another user's file keeps its own
            cached = CachedSplit(file, dataset, split)
            return cached if cached.has_intact_keys else None
    return None


def _build(path: Path, dataset: PatchDataset, split: str) -> None:
    """Decode a split into its cache file. The caller holds the lock of the folder."""
    size = _file_size(dataset, split)
    _make_room(path.parent, size)
    with atomic_path(path) as partial:
        partial.touch(mode=0o600)  # images of patients, in a folder that others may read
        with partial.open("wb") as file:
            _write(file, dataset, split, size)


def _write(file: BinaryIO, dataset: PatchDataset, split: str, size: int) -> None:
    """Write images, keys and checksums of a split, and wait until the disk holds them."""
    parts = dataset.parts(split)
    keys = []
    checksums = []
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file.fileno(), 0, size)  # a full disk fails here, not after minutes
    for group in row_groups_of(dataset.manifest, split):
        table = read_part(parts[group.part], ["id", "image"], group.number)
        images = images_of(table["image"], dataset.shape, dataset.manifest.dtype)
        pixels = np.ascontiguousarray(images)
        file.write(pixels.data)
        checksums.append(zlib.crc32(pixels.data))
        keys.append(keys_of(table["id"].to_pylist()))
    file.seek(_keys_offset(dataset, split))
    tail = np.concatenate([*keys, np.array(checksums, np.int64)])
    file.write(tail.data)
    file.write(np.int64(zlib.crc32(tail.data)).tobytes())
    file.flush()
    os.fsync(file.fileno())  # otherwise a power cut could leave a whole file of zeros


def _make_room(folder: Path, size: int) -> None:
    """Delete what killed processes left, then unused files until `size` bytes fit."""
    for partial in folder.glob(".*.partial"):
        partial.unlink(missing_ok=True)
    if not _can_take(folder, size):
        return  # no deletion would help
    for path in sorted(folder.glob("*.images"), key=lambda path: path.stat().st_mtime):
        if size <= MAX_DISK_SHARE * _free_bytes(folder):
            return
        _unused_bytes(path, delete=True)


def _can_take(folder: Path, size: int) -> bool:
    """Return whether `size` bytes would fit if all unused files were deleted."""
    unused = sum(_unused_bytes(path) for path in folder.glob("*.images"))
    return size <= MAX_DISK_SHARE * (_free_bytes(folder) + unused)


def _unused_bytes(path: Path, *, delete: bool = False) -> int:
    """Return the size of a file that no process maps, and delete it if asked; 0 if it is used."""
    with suppress(OSError), path.open("r+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        size = os.fstat(file.fileno()).st_size
        if delete:
            path.unlink()
        return size
    return 0


def _keys_offset(dataset: PatchDataset, split: str) -> int:
    return math.ceil(dataset.bytes(split) / KEYS_ALIGNMENT) * KEYS_ALIGNMENT


def _file_size(dataset: PatchDataset, split: str) -> int:
    num_groups = len(row_groups_of(dataset.manifest, split))
    return _keys_offset(dataset, split) + 8 * (dataset.count(split) + num_groups + 1)


def _free_bytes(folder: Path) -> int:
    return shutil.disk_usage(folder).free


def _cache_folder() -> Path:
    default = Path.home() / ".cache" / "amlp_ray"
    return Path(os.environ.get("AMLP_RAY_CACHE") or default).absolute()
