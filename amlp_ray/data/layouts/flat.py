"""Unlabelled pictures in folders of any depth, or those that a text file names.

An id is the path without suffix, relative to the folder; the folder a picture lies in is its stratum. Files that do not
claim to be pictures by their suffix are passed over.
"""

from __future__ import annotations

import posixpath

from amlp_ray.config import PrepareConfig
from amlp_ray.data.layouts.item import Listing, RejectedFile, SourceImage
from amlp_ray.data.layouts.listing import Name, parts_of, pictures_in
from amlp_ray.data.path import DataPath
from amlp_ray.errors import DataError


def find_flat(place: DataPath, config: PrepareConfig) -> Listing:
    """List all pictures below a folder, or those of `settings.file_list`.

    Raises:
        DataError: the file list cannot be read or names nothing.
    """
    if config.file_list:
        return _of_list(place, config.file_list)
    return Listing([_item(str(place / name.full), name) for name in pictures_in(place)], [])


def _of_list(place: DataPath, file_list: str) -> Listing:
    """The pictures that a text file names, one path a line: relative to `place`, absolute or a URI; `#` comments."""
    known = {entry.name for entry in place.entries()}
    items, faults, taken = [], [], set()
    for line in _lines(file_list):
        if "://" in line or line.startswith("/"):
            file = DataPath(line)
            name = str(file).removeprefix(f"{place}/")
        else:
            name = posixpath.normpath(line)
            file = place / name
        if name in taken:
            faults.append(
                RejectedFile(name, "repaired", f"is listed twice in {file_list}: taken once")
            )
        elif (
            name in known or file.is_file()
        ):  # only files outside, or hidden ones, are asked for one by one
            taken.add(name)
            items.append(_item(str(file), parts_of(name)))
        else:
            reason = f"is listed in {file_list}, but there is no such file; paths are relative to {place} or absolute"
            faults.append(RejectedFile(name, "rejected", reason))
    return Listing(items, faults)


def _lines(file_list: str) -> list[str]:
    try:
        text = DataPath(file_list).read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise DataError(
            f"The file list {file_list} cannot be read ({error.strerror or error}); give a text file with one path a "
            f"line."
        ) from None
    except UnicodeDecodeError:
        raise DataError(
            f"The file list {file_list} is not UTF-8 text; save it as such, one path a line."
        ) from None
    # splitlines would also cut at characters that may stand in names.
    lines = (line.strip() for line in text.split("\n"))
    named = [line for line in lines if line and not line.startswith("#")]
    if not named:
        raise DataError(f"The file list {file_list} names no file; write one path a line.")
    return named


def _item(path: str, name: Name) -> SourceImage:
    return SourceImage(
        id=name.path,
        format="picture",
        images=(path,),
        masks=(),
        source=name.full,
        stratum=name.folder,
    )
