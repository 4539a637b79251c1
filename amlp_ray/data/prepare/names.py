"""Names of images in a dataset: hashed where asked, and never with the folders of a machine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from amlp_ray.config import PrepareConfig
from amlp_ray.data.layouts import SourceImage
from amlp_ray.data.path import DataPath
from amlp_ray.data.prepare.assign import FILE_FIELDS
from amlp_ray.data.pseudonyms import pseudonym, salt


def name_hider(config: PrepareConfig) -> Callable[[SourceImage, str], str]:
    """Return a function that hashes names of files if asked; DICOM's are hashes already."""
    if not config.hash_names:
        return lambda item, name: name
    secret = salt()
    return lambda item, name: name if item.format == "dicom" else pseudonym(name, secret)


def salt_mark(items: Sequence[SourceImage], config: PrepareConfig) -> str | None:
    """Return a few digits that tell one salt from another and reveal neither; None: not used."""
    if config.hash_names or items[0].format == "dicom":
        return pseudonym("salt", salt())[:8]
    return None


def absolute(file: str, source: DataPath) -> str:
    """Return the path of a file that may be relative to the source."""
    is_absolute = file.startswith("/") or "://" in file
    return file if is_absolute else str(source / file)


def without_folders(config: PrepareConfig) -> PrepareConfig:
    """Name files without their folders: paths hold names of people, and differ by machine."""
    files = {name: Path(path).name for name in FILE_FIELDS if (path := getattr(config, name))}
    return config.model_copy(update=files)
