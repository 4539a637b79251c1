"""What the layouts of pictures share: a folder whose files are listed once, and which of them are pictures."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Iterator
from functools import cached_property
from typing import NamedTuple

from amlp_ray.data.path import DataPath, Entry

# What claims to be a picture; the decoder says so where it is none, or one that cannot be read, such as HEIC.
CLAIMS = "png jpg jpeg jpe jfif tif tiff bmp gif webp npy pgm ppm pnm pbm jp2 j2k heic heif"
PICTURE_SUFFIXES = frozenset(f".{suffix}" for suffix in CLAIMS.split())
LISTED = 5  # names in a message


class CachedListing(DataPath):
    """A place whose files are listed once: recognising a layout and reading it both ask, and buckets are slow."""

    @cached_property
    def _entries(self) -> list[Entry]:
        return sorted(super().entries())

    def entries(self, *, deep: bool = True) -> Iterator[Entry]:
        return (entry for entry in self._entries if deep or "/" not in entry.name)


class Name(NamedTuple):
    """The name of a file, in parts.

    >>> parts_of("benign/case.1.png")
    Name(full='benign/case.1.png', folder='benign', stem='case.1', suffix='.png')
    """

    full: str  # relative to the place
    folder: str  # empty at the top
    stem: str
    suffix: str  # with its dot, lower case

    @property
    def path(self) -> str:
        """The whole name without suffix."""
        return f"{self.folder}/{self.stem}" if self.folder else self.stem


def parts_of(name: str) -> Name:
    """Split the name of a file."""
    folder, _, base = name.rpartition("/")
    stem, dot, suffix = base.rpartition(".")
    return Name(name, folder, stem, f".{suffix.lower()}") if dot else Name(name, folder, base, "")


def pictures_in(place: DataPath) -> list[Name]:
    """The files of a place that claim to be pictures, sorted."""
    names = map(parts_of, sorted(entry.name for entry in place.entries()))
    return [name for name in names if name.suffix in PICTURE_SUFFIXES]


def same(name: str) -> str:
    """A name as it is compared: macOS writes é as two characters, others as one."""
    return unicodedata.normalize("NFC", name)


def printable(name: str) -> str:
    """A name that can be written as UTF-8: bytes of other encodings become `\\udcXX`."""
    return name.encode("utf-8", "backslashreplace").decode()


def contents_of(place: DataPath) -> str:
    """What is in a place, for a message: its folders and the suffixes of the files below."""
    folders = place.folders()
    suffixes = Counter(parts_of(entry.name).suffix for entry in place.entries())
    parts = []
    if folders:
        more = ", ..." if len(folders) > LISTED else ""
        parts.append(
            "the folders " + ", ".join(f"{printable(name)}/" for name in folders[:LISTED]) + more
        )
    if suffixes:
        counts = [
            f"{count} {suffix or 'without suffix'}"
            for suffix, count in suffixes.most_common(LISTED)
        ]
        parts.append(f"{suffixes.total()} files ({', '.join(map(printable, counts))})")
    return " and ".join(parts) or "nothing"
