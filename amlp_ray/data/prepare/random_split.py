"""Draw the split of groups at random, balanced in sizes and kinds of images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from amlp_ray.data.manifest import SPLITS
from amlp_ray.errors import DataError

NUM_DRAWS = 20  # the first balanced one is taken, else the best
DRAWN_SHARE = 0.5  # of groups whose split is drawn; the others then restore the balance
# Imbalance that is accepted, since a strict search would give some groups the same split for every
# seed. 0.002 is an error of 1.5 points in each share. Few groups cannot be balanced so well.
MAX_IMBALANCE = 0.002
MAX_IMBALANCE_OF_GROUPS = 3  # divided by the square of the number of groups


class _Draws(NamedTuple):
    """Several draws of the split of each group."""

    splits: np.ndarray  # (draws, groups) int8, positions in the used splits
    shares: np.ndarray  # (draws, splits, kinds), share of the images of each kind


def split_by_group(
    groups: Sequence[str],
    counts: np.ndarray,
    fractions: tuple[float, float, float],
    seed: int,
    advice: str = "give other fractions",
) -> list[str]:
    """Draw the split of each item; cut no group.

    In a random order, half of the groups get a split at random. Each of the others gets the one
    that then lacks most, in groups and in images of every kind. The first of several draws that is
    balanced is taken. So every group can get every split, unless it is too large for it.

    Args:
        groups: group of each item.
        counts: (items, kinds), numbers of images of an item. The first kind is all images; others
            are those of a class or a site, or those with a lesion.
        fractions: shares of train, val and test.
        seed: equal seeds give equal splits.
        advice: what to do where one group is too large, for the error.

    Raises:
        DataError: one group holds over half of all images and a split has none.
    """
    names, group_of = np.unique(np.asarray(groups, dtype=object), return_inverse=True)
    used = [i for i, fraction in enumerate(fractions) if fraction > 0]
    used_fractions = np.array(fractions)[used]
    sizes = np.zeros((len(names), counts.shape[1]))
    np.add.at(sizes, group_of, counts)
    kinds = sizes[:, sizes.any(axis=0)]
    kind_shares = np.column_stack([np.ones(len(names)), kinds])
    kind_shares /= kind_shares.sum(axis=0)
    # Fractions of images count as much as everything else.
    weights = np.ones(kind_shares.shape[1])
    weights[1] = max(2, len(weights) - 2)

    draws = _draw(kind_shares, used_fractions, weights, np.random.default_rng(seed))
    chosen = _choose(draws, used_fractions, weights)
    split_of_group = [SPLITS[used[split]] for split in chosen]
    used_splits = [SPLITS[split] for split in used]
    _check_filled(names, sizes[:, 0], split_of_group, used_splits, advice)
    return [split_of_group[group] for group in group_of]


def _draw(
    kind_shares: np.ndarray,
    fractions: np.ndarray,
    weights: np.ndarray,
    rng: np.random.Generator,
) -> _Draws:
    """Draw the splits of all groups `NUM_DRAWS` times.

    Args:
        kind_shares: (groups, kinds), share of the images of each kind that a group holds.
        fractions: (splits,).
        weights: (kinds,), what an error in a kind costs.
    """
    num_groups, num_kinds = kind_shares.shape
    num_splits = len(fractions)
    orders = rng.permuted(np.tile(np.arange(num_groups), (NUM_DRAWS, 1)), axis=1)
    drawn = rng.choice(num_splits, (NUM_DRAWS, num_groups), p=fractions / fractions.sum())
    num_drawn = int(DRAWN_SHARE * num_groups)
    shares = np.zeros((NUM_DRAWS, num_splits, num_kinds))
    splits = np.zeros((NUM_DRAWS, num_groups), np.int8)
    every = np.arange(NUM_DRAWS)
    for position in range(num_groups):
        group = orders[:, position]
        added = kind_shares[group][:, None, :]
        if position < num_drawn:
            split = drawn[:, position]
        else:
            before = _imbalance(shares, fractions, weights)
            after = _imbalance(shares + added, fractions, weights)
            split = (after - before).argmin(axis=1)
        shares[every, split] += added[:, 0]
        splits[every, group] = split
    for draw in range(NUM_DRAWS):
        _fill_empty_splits(splits[draw], orders[draw], shares[draw], kind_shares)
    return _Draws(splits, shares)


def _imbalance(shares: np.ndarray, fractions: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return the mean squared error of the shares of each split, relative to its fraction."""
    errors = (shares - fractions[:, None]) ** 2 / fractions[:, None]
    mean: np.ndarray = errors @ weights / weights.sum()
    return mean


def _fill_empty_splits(
    splits: np.ndarray, order: np.ndarray, shares: np.ndarray, kind_shares: np.ndarray
) -> None:
    """Give each split without a group one of another's; only for train may that be emptied."""
    for split in range(len(shares)):
        counts = np.bincount(splits, minlength=len(shares))
        largest = counts.argmax()
        if counts[split] == 0 and (split == 0 or counts[largest] > 1):
            moved = order[splits[order] == largest][-1]
            splits[moved] = split
            shares[split] += kind_shares[moved]
            shares[largest] -= kind_shares[moved]


def _choose(draws: _Draws, fractions: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return the splits of the first draw that is balanced, or else of the best."""
    cost = _imbalance(draws.shares, fractions, weights).sum(axis=1)
    num_groups = draws.splits.shape[1]
    accepted = max(MAX_IMBALANCE, MAX_IMBALANCE_OF_GROUPS / num_groups**2)
    balanced = np.flatnonzero(cost <= accepted)
    best = balanced[0] if len(balanced) else cost.argmin()
    chosen: np.ndarray = draws.splits[best]
    return chosen


def _check_filled(
    names: np.ndarray,
    sizes: np.ndarray,
    split_of_group: list[str],
    used_splits: list[str],
    advice: str,
) -> None:
    empty = [split for split in used_splits if split not in split_of_group]
    largest = int(sizes.argmax())
    size, total = int(sizes[largest]), int(sizes.sum())
    if empty and 2 * size > total > 2:
        raise DataError(
            f"No images are left for {' and '.join(empty)}, since the group of "
            f"{names[largest]!r} holds {size} of {total} images and may not be cut; {advice}."
        )
