"""Which image goes to train, val and test: whole groups by fractions and seed, or as a file says."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from amlp_ray.data.manifest import SPLITS
from amlp_ray.errors import DataError


def split_by_group(
    groups: Sequence[str],
    strata: Sequence[str],
    fractions: tuple[float, float, float],
    seed: int,
    images: Sequence[int] | None = None,
) -> list[str]:
    """Name the split of each item so that no group is cut and fractions are met as closely as groups allow.

    One stratum (class, with or without lesion) after the other, its groups go, largest first, to the split that lacks
    most images. So each stratum is shared by the fractions too. A group counts to the stratum of its first item.
    A split that would stay empty gets the smallest group of the split that has most of them, if that has two.

    Args:
        images: of each item, such as its slices; None: one.

    Raises:
        DataError: nothing is left for train, or one group holds over half of all images and another split has none.
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

    share = np.array(fractions)
    lack = np.where(
        share > 0, 0.0, -np.inf
    )  # images each split lacks so far; never any for a split of share 0
    assigned: dict[str, str] = {}
    for stratum in sorted(set(strata)):
        members = [name for name in names if stratum_of[name] == stratum]
        lack += share * sum(sizes[name] for name in members)
        for name in members:
            to = int(np.argmax(lack))
            lack[to] -= sizes[name]
            assigned[name] = SPLITS[to]

    _fill(assigned, sizes, [name for name, part in zip(SPLITS, share, strict=True) if part > 0])
    largest, size = max(sizes.items(), key=lambda item: item[1])
    empty = [
        name
        for name, part in zip(SPLITS, share, strict=True)
        if part > 0 and name not in assigned.values()
    ]
    if "train" in empty or (empty and 2 * size > sizes.total() > 2):
        raise DataError(
            f"No images are left for {' and '.join(empty)}, since the group of {largest!r} holds {size} of "
            f"{sizes.total()} images and may not be cut; give other fractions or a group_file, or set group_by to "
            f"image if these are not copies."
        )
    return [assigned[group] for group in groups]


def _fill(assigned: dict[str, str], sizes: Counter[str], wanted: Sequence[str]) -> None:
    """Give each wanted split that has no group one of another's, as long as no other is emptied by that."""
    for split in wanted:
        counts = Counter(assigned.values())
        richest = max(wanted, key=lambda name: counts[name])
        if counts[split] == 0 and counts[richest] > 1:
            smallest = min(
                (name for name in assigned if assigned[name] == richest),
                key=lambda name: sizes[name],
            )
            assigned[smallest] = split


def read_split_file(path: str | Path, known: Sequence[str]) -> dict[str, str]:
    """Read {"train": [ids], "val": [ids], "test": [ids]} as the split of each listed id; val and test may be left out.

    Raises:
        DataError: the file is missing or no such JSON, lists an id twice, none for train, or one that is not `known`.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"There is no split file {path}; check the path.")
    form = '{"train": [ids], "val": [ids], "test": [ids]}'
    try:
        given = json.loads(path.read_text())
    except ValueError as error:
        raise DataError(f"{path} is not valid JSON ({error}); it must hold {form}.") from None
    if not isinstance(given, dict) or not all(isinstance(ids, list) for ids in given.values()):
        raise DataError(f"{path} must hold {form}; rewrite it in that form.")
    odd = sorted(given.keys() - set(SPLITS))
    if odd:
        raise DataError(
            f"{path} has a split named {odd[0]!r}, but splits are {', '.join(SPLITS)}; rename it."
        )
    if not given.get("train"):
        raise DataError(f"{path} lists no images for train, but some are needed; add them.")
    split_of: dict[str, str] = {}
    for split, ids in given.items():
        for name in map(str, ids):
            if name in split_of:
                raise DataError(
                    f"{path} lists {name!r} in {split_of[name]} and in {split}; keep one."
                )
            split_of[name] = split
    unknown = sorted(split_of.keys() - set(known))
    if unknown:
        raise DataError(
            f"{path} lists {len(unknown)} images that the source does not have, such as {unknown[0]!r}; ids are file "
            f"names without suffix, such as {known[0]!r}, so correct or remove them."
        )
    return split_of


def groups_cut(split_of: Mapping[str, str], groups: Mapping[str, str]) -> dict[str, list[str]]:
    """Return the splits of every group that lies in more than one; both arguments are by id."""
    splits: dict[str, set[str]] = {}
    for name, group in groups.items():
        splits.setdefault(group, set()).add(split_of[name])
    return {
        group: sorted(where, key=SPLITS.index) for group, where in splits.items() if len(where) > 1
    }
