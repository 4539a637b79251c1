"""Assign images to train, val and test: whole groups by fractions and seed, or as a file says."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from amlp_ray.data.manifest import SPLITS
from amlp_ray.errors import DataError

SPLIT_FILE_FORM = '{"train": [ids], "val": [ids], "test": [ids]}'


def split_by_group(
    groups: Sequence[str],
    strata: Sequence[str],
    fractions: tuple[float, float, float],
    seed: int,
    images: Sequence[int] | None = None,
) -> list[str]:
    """Name the split of each item; cut no group, and meet fractions as closely as groups allow.

    Strata are served one after the other. The groups of a stratum go, largest first, to the split
    that lacks most images. So each stratum is shared by the fractions too. A group belongs to the
    stratum of its first item. A split that would stay empty gets the smallest group of the split
    that has most groups, if that has two.

    Args:
        groups: group of each item.
        strata: stratum of each item, such as its class and whether it has a lesion.
        fractions: shares of train, val and test.
        seed: decides among groups of one size.
        images: number of images of each item, such as its slices; None: one.

    Raises:
        DataError: nothing is left for train, or one group holds over half of all images and another
            split has none.
    """
    sizes: Counter[str] = Counter()
    for group, count in zip(groups, images or [1] * len(groups), strict=True):
        sizes[group] += count
    stratum_of: dict[str, str] = {}
    for group, stratum in zip(groups, strata, strict=True):
        stratum_of.setdefault(group, stratum)
    names = sorted(sizes)
    names = [names[i] for i in np.random.default_rng(seed).permutation(len(names))]
    names.sort(key=lambda name: -sizes[name])  # stable: the seed decides among equals

    shares = np.array(fractions)
    # Images that each split lacks so far; a split of share 0 never lacks any.
    lacking = np.where(shares > 0, 0.0, -np.inf)
    split_of: dict[str, str] = {}
    for stratum in sorted(set(strata)):
        members = [name for name in names if stratum_of[name] == stratum]
        lacking += shares * sum(sizes[name] for name in members)
        for name in members:
            neediest = int(np.argmax(lacking))
            lacking[neediest] -= sizes[name]
            split_of[name] = SPLITS[neediest]

    used_splits = [split for split, share in zip(SPLITS, shares, strict=True) if share > 0]
    _fill_empty_splits(split_of, sizes, used_splits)
    _check_filled(split_of, sizes, used_splits)
    return [split_of[group] for group in groups]


def _fill_empty_splits(
    split_of: dict[str, str], sizes: Counter[str], used_splits: Sequence[str]
) -> None:
    """Give each used split without a group one of another's, unless that would be emptied."""
    for split in used_splits:
        counts = Counter(split_of.values())
        largest = max(used_splits, key=lambda name: counts[name])
        if counts[split] == 0 and counts[largest] > 1:
            members = [group for group in split_of if split_of[group] == largest]
            smallest = min(members, key=lambda group: sizes[group])
            split_of[smallest] = split


def _check_filled(
    split_of: dict[str, str], sizes: Counter[str], used_splits: Sequence[str]
) -> None:
    empty = [split for split in used_splits if split not in split_of.values()]
    largest, size = max(sizes.items(), key=lambda item: item[1])
    total = sizes.total()
    if "train" in empty or (empty and 2 * size > total > 2):
        raise DataError(
            f"No images are left for {' and '.join(empty)}, since the group of {largest!r} holds "
            f"{size} of {total} images and may not be cut; give other fractions or a group_file, "
            f"or set group_by to image if these are not copies."
        )


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
        # From bytes: tools of Windows write a byte-order mark, or UTF-16.
        splits = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{path} is not valid JSON ({error}); it must hold {SPLIT_FILE_FORM}."
        ) from None
    if not isinstance(splits, dict) or not all(isinstance(x, list) for x in splits.values()):
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
            f"{path} lists {len(unknown)} images that the source does not have, such as "
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
