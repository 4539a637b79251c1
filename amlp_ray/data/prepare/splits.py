"""Assign images to train, val and test as a file says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from amlp_ray.data.manifest import SPLITS
from amlp_ray.errors import DataError
from amlp_ray.utils.json_files import JsonError, parse_json
from amlp_ray.utils.text import counted

SPLIT_FILE_FORM = '{"train": [ids], "val": [ids], "test": [ids]}'


def _is_id_list(names: Any) -> bool:
    return isinstance(names, list) and all(isinstance(name, str | int | float) for name in names)


def read_split_file(path: str | Path, ids: Sequence[str]) -> dict[str, str]:
    """Read the split of each listed id from a JSON file; see `SPLIT_FILE_FORM`.

    Args:
        path: the file; val and test may be left out of it.
        ids: ids of all images in the source.

    Raises:
        DataError: the file is missing or no such JSON, lists an id twice, none for train, or one
            that the source does not have.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"There is no split file {path}; check the path.")
    try:
        splits = parse_json(path.read_bytes())
    except JsonError as error:
        raise DataError(f"{path} {error}; it must hold {SPLIT_FILE_FORM}.") from None
    if not isinstance(splits, dict) or not all(map(_is_id_list, splits.values())):
        raise DataError(f"{path} must hold {SPLIT_FILE_FORM}; rewrite it in that form.")
    unknown_splits = sorted(splits.keys() - set(SPLITS))
    if unknown_splits:
        raise DataError(
            f"{path} has a split named {unknown_splits[0]!r}, but splits are {', '.join(SPLITS)}; "
            f"rename it."
        )
    if not splits.get("train"):
        raise DataError(f"{path} lists no images for train, but some are needed; add them.")
    split_of: dict[str, str] = {}
    for split, names in splits.items():
        for name in map(str, names):
            if name in split_of:
                raise DataError(
                    f"{path} lists {name!r} in {split_of[name]} and in {split}; keep one."
                )
            split_of[name] = split
    unknown = sorted(split_of.keys() - set(ids))
    if unknown:
        raise DataError(
            f"{path} lists {counted(len(unknown), 'image')} that the source does not have, such as "
            f"{unknown[0]!r}; ids are file names without suffix, such as {ids[0]!r}, so correct or "
            f"remove them."
        )
    return split_of


def find_cut_groups(split_of: Mapping[str, str], groups: Mapping[str, str]) -> dict[str, list[str]]:
    """Return the splits of every group that lies in more than one; both arguments are by id."""
    splits: dict[str, set[str]] = {}
    for name, group in groups.items():
        splits.setdefault(group, set()).add(split_of[name])
    cut = {group: names for group, names in splits.items() if len(names) > 1}
    return {group: sorted(names, key=SPLITS.index) for group, names in cut.items()}
