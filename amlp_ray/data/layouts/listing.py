"""What the layouts share: a folder that is listed once, its pictures, and names in messages."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import cached_property
from typing import NamedTuple

from amlp_ray.data.layouts.item import SourceImage
from amlp_ray.data.path import DataPath, Entry
from amlp_ray.utils.text import counted

# Suffixes that claim a picture. The decoder reports those that are none, or cannot be read as HEIC.
CLAIMS = "png jpg jpeg jpe jfif tif tiff bmp gif webp npy pgm ppm pnm pbm jp2 j2k heic heif"
PICTURE_SUFFIXES = frozenset(f".{suffix}" for suffix in CLAIMS.split())
MAX_NAMED = 5  # names in a message


class CachedListing(DataPath):
    """A folder that is listed once. Detecting and reading a layout both list, and buckets are slow.

    Listing comes sorted by name.
    """

    @cached_property
    def _entries(self) -> list[Entry]:
        return sorted(super().entries())

    def entries(self, *, deep: bool = True) -> Iterator[Entry]:
        return (entry for entry in self._entries if deep or "/" not in entry.name)


class FileName(NamedTuple):
    """A file's name relative to the listed folder, in parts.

    >>> split_name("benign/case.1.png")
    FileName(full='benign/case.1.png', folder='benign', stem='case.1', suffix='.png')
    """

    full: str
    folder: str  # empty at the top
    stem: str
    suffix: str  # with its dot, lower case

    @property
    def base(self) -> str:
        """The last part, with its suffix."""
        return self.full.rpartition("/")[2]

    @property
    def without_suffix(self) -> str:
        return f"{self.folder}/{self.stem}" if self.folder else self.stem


def split_name(name: str) -> FileName:
    """Split the name of a file into its parts."""
    folder, _, base = name.rpartition("/")
    stem, dot, suffix = base.rpartition(".")
    if not dot:
        return FileName(name, folder, base, "")
    return FileName(name, folder, stem, f".{suffix.lower()}")


def list_pictures(root: DataPath) -> list[FileName]:
    """Return the files of a folder that claim to be pictures, sorted."""
    return [name for name in map(split_name, root.names()) if name.suffix in PICTURE_SUFFIXES]


def picture_item(
    root: DataPath,
    picture: FileName,
    masks: Iterable[FileName] = (),
    *,
    id: str = "",
    group: str = "",
    stratum: str = "",
    site: str = "",
    outlines: str = "",
) -> SourceImage:
    """Describe a picture below a folder; its id is its name without suffix unless given."""
    return SourceImage(
        id=id or picture.without_suffix,
        format="picture",
        images=(str(root / picture.full),),
        masks=root.join(mask.full for mask in masks),
        source=picture.full,
        group=group,
        stratum=stratum,
        site=site,
        outlines=outlines,
    )


def normalize(name: str) -> str:
    """Return a name as it is compared: macOS writes é as two characters, others as one."""
    return unicodedata.normalize("NFC", name)


def printable(name: str) -> str:
    """Return a name that UTF-8 can hold: bytes of other encodings become `\\udcXX`."""
    return name.encode("utf-8", "backslashreplace").decode()


def such_as(name: str) -> str:
    """Name an example in a message."""
    return f"such as {printable(name)!r}"


def describe_contents(root: DataPath) -> str:
    """Say what a folder holds, for a message: its folders, and the suffixes of all files below."""
    parts = []
    folders = root.folders()
    if folders:
        names = ", ".join(f"{printable(name)}/" for name in folders[:MAX_NAMED])
        more = ", ..." if len(folders) > MAX_NAMED else ""
        parts.append(f"the folders {names}{more}")
    suffixes = Counter(split_name(name).suffix for name in root.names())
    if suffixes:
        counts = []
        for suffix, count in suffixes.most_common(MAX_NAMED):
            counts.append(printable(f"{count} {suffix or 'without suffix'}"))
        parts.append(f"{counted(suffixes.total(), 'file')} ({', '.join(counts)})")
    return " and ".join(parts) or "nothing"
