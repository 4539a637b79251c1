"""Read unlabeled pictures in folders of any depth, or those that a text file names.

An id is the path without suffix, relative to the folder. The folder that a picture lies in is its
stratum. Files that do not claim to be pictures by their suffix are skipped.
"""

from __future__ import annotations

import posixpath
from dataclasses import replace

from amlp_ray.config import PrepareConfig
from amlp_ray.data.layouts.item import Listing, rejected, repaired
from amlp_ray.data.layouts.listing import list_pictures, picture_item, split_name
from amlp_ray.data.path import DataPath
from amlp_ray.errors import DataError
from amlp_ray.utils.text import decode_text


def find_flat(root: DataPath, config: PrepareConfig) -> Listing:
    """List all pictures below a folder, or those of `config.file_list`.

    Raises:
        DataError: the file list cannot be read or names nothing.
    """
    if config.file_list:
        return _find_listed(root, config.file_list)
    pictures = list_pictures(root)
    return Listing([picture_item(root, name, stratum=name.folder) for name in pictures], [])


def _find_listed(root: DataPath, file_list: str) -> Listing:
    """List the pictures that a text file names."""
    entry_names = set(root.names())
    items = []
    rejects = []
    listed_names = set()
    for line in _read_file_list(file_list):
        if "://" in line or line.startswith("/"):
            file = DataPath(line)
            name = str(file).removeprefix(f"{root}/")
        else:
            name = posixpath.normpath(line)
            if name not in entry_names:  # tools of Windows write backslashes
                name = posixpath.normpath(line.replace("\\", "/"))
            file = root / name
        if name in listed_names:
            rejects.append(repaired(name, f"is listed twice in {file_list}: taken once"))
        # Only files outside the folder, or hidden ones, are looked up one by one.
        elif name in entry_names or file.is_file():
            listed_names.add(name)
            item = picture_item(root, split_name(name), stratum=split_name(name).folder)
            items.append(replace(item, images=(str(file),)))
        else:
            reason = (
                f"is listed in {file_list}, but there is no such file; "
                f"paths are relative to {root} or absolute"
            )
            rejects.append(rejected(name, reason))
    return Listing(items, rejects)


def _read_file_list(file_list: str) -> list[str]:
    """Return the paths of a text file, one a line: relative, absolute or URIs; `#` comments."""
    try:
        text = decode_text(DataPath(file_list).read_bytes())
    except OSError as error:
        raise DataError(
            f"The file list {file_list} cannot be read ({error.strerror or error}); "
            "give a text file with one path a line."
        ) from None
    except UnicodeDecodeError:
        raise DataError(
            f"The file list {file_list} is not text in UTF-8 or UTF-16; save it as such, one path "
            "a line."
        ) from None
    # splitlines would also cut at characters that may stand in names.
    lines = map(str.strip, text.split("\n"))
    paths = [line for line in lines if line and not line.startswith("#")]
    if not paths:
        raise DataError(f"The file list {file_list} names no file; write one path a line.")
    return paths
