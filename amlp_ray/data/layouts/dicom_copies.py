"""Find copies among DICOM files: identity is content, since UIDs are reused by anonymizers."""

from __future__ import annotations

import hashlib
import warnings
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from typing import NamedTuple

from amlp_ray.data.layouts.dicom_headers import LOCAL_THREADS, REMOTE_THREADS, Slice
from amlp_ray.data.layouts.item import RejectedFile, rejected
from amlp_ray.data.path import DataPath


class UniqueSlices(NamedTuple):
    """Slices without copies."""

    slices: list[Slice]
    copies: list[RejectedFile]
    num_reused: int  # files kept though another one has their SOP Instance UID

    def describe(self) -> str:
        """Say in a sentence which files share a UID; empty if none do."""
        if not self.num_reused:
            return ""
        return (
            f"{self.num_reused} files have the SOPInstanceUID of another file and other pixels; "
            "they are kept"
        )


def drop_copies(root: DataPath, slices: Sequence[Slice]) -> UniqueSlices:
    """Reject all but the first of the files that hold the same pixels at the same place.

    Only files that share a SOP Instance UID are decoded and compared. Files without one are
    compared byte by byte, as read (see `read_headers`).
    """
    by_instance: dict[str, list[Slice]] = defaultdict(list)
    for one in slices:
        by_instance[one.instance].append(one)
    shared = [one for group in by_instance.values() if len(group) > 1 for one in group]
    digests = _hash_pixels(root, shared)
    unique: list[Slice] = []
    copies = []
    num_reused = 0
    first_names: dict[tuple[object, ...], str] = {}
    used_instances: set[str] = set()
    for one in slices:
        # Slices of air are alike, so the place counts too.
        content = (one.instance, one.number, one.position, digests.get(one.name, ""))
        first = first_names.setdefault(content, one.name)
        if first != one.name:
            reason = f"is a second copy of {first}, which is kept"
            copies.append(rejected(one.name, reason))
            continue
        num_reused += one.instance in used_instances
        used_instances.add(one.instance)
        unique.append(one)
    return UniqueSlices(unique, copies, num_reused)


def _hash_pixels(root: DataPath, slices: Sequence[Slice]) -> dict[str, str]:
    """Return a digest of the decoded pixels of files, by name."""
    threads = LOCAL_THREADS if root.is_local else REMOTE_THREADS
    names = [one.name for one in slices]
    with warnings.catch_warnings(action="ignore"), ThreadPoolExecutor(threads) as pool:
        digests = list(pool.map(lambda name: _pixel_digest(root / name), names))
    return dict(zip(names, digests, strict=True))


def _pixel_digest(file: DataPath) -> str:
    """Hash decoded pixels, so that compression does not count; else the whole file."""
    from pydicom.pixels import iter_pixels

    try:
        content = file.read_bytes()
    except OSError:
        return str(file)  # a fault that decoding reports
    digest = hashlib.sha256()
    try:
        for frame in iter_pixels(BytesIO(content), raw=True):
            digest.update(f"{frame.shape}".encode())
            number_type = "<f8" if frame.dtype.kind == "f" else "<i8"
            digest.update(frame.astype(number_type).tobytes())
    except Exception:  # decoders raise many types on damaged pixels
        return hashlib.sha256(content).hexdigest()
    return digest.hexdigest()
