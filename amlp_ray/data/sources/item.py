"""What a source reader returns, and what all readers share."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

DIGITS = "0123456789"
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff")


@dataclass(frozen=True)
class Item:
    """One image and its masks. No mask file means unlabelled; an all-zero mask means labelled, without a lesion."""

    id: str  # unique in the set
    image: str  # absolute path
    masks: tuple[str, ...]  # absolute paths; several are united
    source: str  # file name relative to the folder, with forward slashes


def natural_key(text: str) -> tuple[list[tuple[bool, int, str]], str]:
    """Sort key under which `benign (9)` comes before `benign (10)`, and digits before letters.

    >>> sorted(["a10", "a9", "a", "7"], key=natural_key)
    ['7', 'a', 'a9', 'a10']
    """
    # A number is compared by its length without zeros, then its digits: no number is too long for that.
    parts = [part for part in re.split(r"([0-9]+)", text) if part]
    key = [(False, len(part.lstrip("0")), part.lstrip("0")) if part[0] in DIGITS else (True, 0, part) for part in parts]
    return key, text


def image_files(folder: Path) -> list[Path]:
    """List the image files directly inside `folder`; hidden files, such as macOS `._` twins, are none."""
    return sorted(
        path for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".")
    )


def found_in(folder: Path, limit: int = 5) -> str:
    """Name a few entries of `folder`, for messages that say what was found instead."""
    names = sorted(path.name + "/" * path.is_dir() for path in folder.iterdir() if not path.name.startswith("."))
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more if names else "nothing"
