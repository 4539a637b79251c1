"""Findings about copies: across splits, across groups, to the pixel, and in another dataset."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import PurePosixPath

import numpy as np
import pandas as pd

from amlp_ray.data.check.finding import EXAMPLES, Example, Finding, Shown, counted, found, shown
from amlp_ray.data.dataset import PatchDataset
from amlp_ray.data.manifest import SPLITS
from amlp_ray.data.prepare.near_duplicates import (
    FLAT,
    MAX_DISTANCE,
    find_chains,
    near_pairs,
)

CHAIN_SHARE, CHAIN_LEAST = (
    0.1,
    20,
)  # of the images in one chain of near-copies, from which it is worth a warning

ACROSS = Finding(
    "copies-across-splits",
    "Near-copies in different splits",
    "leak",
    "Images of val or test look like images of another split, so a score on them is partly from memory.",
    "Prepare again with group_by=near-duplicates, or with a group_file that keeps patients together.",
)
SPLIT_GROUPS = Finding(
    "groups-across-splits",
    "Groups in different splits",
    "leak",
    "Images of one patient, volume or group lie in several splits.",
    "Prepare again without the split_file, or move the images of a group together in it.",
    what="groups",
)
AGAINST = Finding(
    "copies-in-other",
    "Held-out images in the other dataset",
    "leak",
    "Images that one dataset holds out, in val or test, look like images of another split of the other dataset. A "
    "model that is trained on one and scored on the other has seen them.",
    "Leave these images out of the set that you train on: file_list and split_file name what is used.",
)
SHARED = Finding(
    "shared-with-other",
    "Images shared with the other dataset",
    "note",
    "Images look like images of the same split of the other dataset: no leak, but the two sets are not independent.",
    "Count these images once where the two sets are put together.",
)
EXACT = Finding(
    "exact-copies",
    "Exact copies",
    "warning",
    "Images have the very same stored pixels as an earlier one, constant ones not counted: they weigh more in training "
    "and in scores.",
    "Delete all but one of each, and ask which label is right where they differ.",
)
EFFECTIVE = Finding(
    "near-copies",
    "Near-copies counted as independent",
    "note",
    "Images of different groups of one split look alike, so there are fewer independent images than it seems, and "
    "intervals over images are too narrow.",
    "Group by patient, or by near-duplicates; report how many groups there are.",
)
CHAIN = Finding(
    "one-chain",
    "Many images alike",
    "warning",
    "A large part of the dataset is one chain of near-copies: frames of few videos, neighbouring slices, or images of "
    "one layout (a disc on black) that the perceptual hash cannot tell apart.",
    "Group by patient or volume instead of by near-duplicates; look at the examples before you trust the finding.",
)


def findings(table: pd.DataFrame, against: PatchDataset | None = None) -> Iterator[Finding]:
    """Yield what is found about copies in a table of `measured`, and between it and another dataset."""
    hashes = table["hash"].to_numpy(np.uint64)
    yield _across(table, hashes)
    yield _split_groups(table)
    if against is not None:
        yield from _against(table, hashes, against)
    yield _exact(table)
    chain = find_chains(hashes)
    yield _effective(table, hashes, chain)
    yield _chain(table, chain)


def _across(table: pd.DataFrame, hashes: np.ndarray) -> Finding:
    split = _codes(table["split"])
    elsewhere = _linked(hashes, split)
    elsewhere[np.arange(len(table)), split] = False
    hit = elsewhere.any(axis=1) & (split > 0)
    examples = [
        _pair(table, i, table, np.flatnonzero(split != split[i]), hashes, hashes)
        for i in _spread(np.flatnonzero(hit))
    ]
    return counted(ACROSS, hit.sum(), int((split > 0).sum()), examples, what="held-out images")


def _split_groups(table: pd.DataFrame) -> Finding:
    splits = table.groupby("group")["split"].nunique()
    cut = splits.index[splits > 1]
    examples = []
    for name in cut[:EXAMPLES]:
        rows = list(table[table["group"] == name].drop_duplicates("split").itertuples())
        examples.append(Example(shown(rows[0]), f"group {name}", shown(rows[1])))
    return counted(SPLIT_GROUPS, len(cut), len(splits), examples)


def _against(table: pd.DataFrame, hashes: np.ndarray, against: PatchDataset) -> Iterator[Finding]:
    other = against.table(columns=["id", "hash"])
    other["row"] = other.groupby("split", sort=False).cumcount()
    theirs, split, there = (
        other["hash"].to_numpy(np.uint64),
        _codes(table["split"]),
        _codes(other["split"]),
    )
    linked = _linked(hashes, there, theirs)
    same = linked[np.arange(len(table)), split]
    leaks = linked.copy()
    leaks[np.arange(len(table)), split] = (
        False  # now every link that is left has val or test at one end
    )
    for about, hit, wanted in (
        (AGAINST, leaks.any(axis=1), lambda i: np.flatnonzero(there != split[i])),
        (SHARED, same, lambda i: np.flatnonzero(there == split[i])),
    ):
        rows = _spread(np.flatnonzero(hit))
        examples = [_pair(table, i, other, wanted(i), hashes, theirs, other=True) for i in rows]
        yield counted(about, hit.sum(), len(table), examples)


def _exact(table: pd.DataFrame) -> Finding:
    """Count later copies; those that contradict the first one are the first examples."""
    rows = np.flatnonzero(table["high"] > table["low"])
    _, first, inverse = np.unique(
        table["digest"].to_numpy()[rows], return_index=True, return_inverse=True
    )
    like = rows[first[inverse]]
    later, like = rows[like != rows], like[like != rows]
    folder = table["source"].map(lambda source: PurePosixPath(source).parent.name).to_numpy()
    lesion = table["lesion"].to_numpy(float)
    refiled = folder[later] != folder[like]
    remasked = np.isfinite(lesion[later] + lesion[like]) & (lesion[later] != lesion[like])
    examples = []
    for n in np.argsort(~(refiled | remasked), kind="stable")[: EXAMPLES // 2]:
        text = "identical"
        if refiled[n]:
            text += f", but {folder[later[n]]} and {folder[like[n]]}"
        elif remasked[n]:
            text += ", but other mask"
        examples.append(Example(_at(table, later[n]), text, _at(table, like[n])))
    unlike = np.count_nonzero(refiled | remasked)
    meaning = EXACT.meaning + (
        f" With another mask or folder than the first: {unlike}." if unlike else ""
    )
    return counted(EXACT, len(later), len(table), examples, meaning=meaning)


def _effective(table: pd.DataFrame, hashes: np.ndarray, chain: np.ndarray) -> Finding:
    """Count groups beyond the first of each chain, split by split; an example for each chain."""
    columns = pd.DataFrame({"split": table["split"], "chain": chain, "group": table["group"]})
    distinct = columns.drop_duplicates()
    repeated = distinct[distinct.duplicated(["split", "chain"])]
    groups = len(columns.drop_duplicates(["split", "group"]))
    examples = []
    for i in _spread(repeated.drop_duplicates("chain").index.to_numpy()):
        mates = (columns["chain"] == chain[i]) & (columns["split"] == columns["split"].iloc[i])
        others = np.flatnonzero(mates & (columns["group"] != columns["group"].iloc[i]))
        examples.append(_pair(table, i, table, others, hashes, hashes))
    return counted(EFFECTIVE, len(repeated), groups, examples, what="groups")


def _chain(table: pd.DataFrame, chain: np.ndarray) -> Finding:
    if not len(table):
        return CHAIN
    members = np.bincount(chain)
    longest = int(members.argmax())
    hit = chain == longest
    large = members[longest] >= max(CHAIN_LEAST, CHAIN_SHARE * len(table))
    if (
        not large or table["group"][hit].nunique() == 1
    ):  # slices of one volume are alike, and belong together
        hit[:] = False
    return found(CHAIN, table, hit)


def _linked(hashes: np.ndarray, codes: np.ndarray, other: np.ndarray | None = None) -> np.ndarray:
    """For each hash (N,), which splits hold a near-copy: (N, splits) bool.

    `codes` are the splits of `other` (M,), or of `hashes` themselves, which then count as copies of themselves.
    """
    values, inverse = np.unique(hashes, return_inverse=True)
    theirs, places = (values, inverse) if other is None else np.unique(other, return_inverse=True)
    present = np.zeros((len(theirs), len(SPLITS)), bool)
    present[places, codes] = True
    linked = np.zeros((len(values), len(SPLITS)), bool)
    if other is None:
        linked |= present
        linked[values == FLAT] = False
    for a, b in near_pairs(values, MAX_DISTANCE, None if other is None else theirs):
        for number in range(len(SPLITS)):
            linked[a[present[b, number]], number] = True
            if other is None:
                linked[b[present[a, number]], number] = True
    return linked[inverse]


def _pair(
    table: pd.DataFrame, i: int, others: pd.DataFrame, among: np.ndarray, mine: np.ndarray, theirs: np.ndarray,
    *, other: bool = False,
) -> Example:  # fmt: skip
    """The image at `i` with the one at the positions `among` whose hash is nearest."""
    bits = np.bitwise_count(theirs[among] ^ mine[i])
    best = int(among[int(bits.argmin())])
    return Example(
        _at(table, i),
        f"{int(bits.min())} of 64 bits differ" if bits.min() else "equal hash",
        _at(others, best, other=other),
    )


def _at(table: pd.DataFrame, position: int, *, other: bool = False) -> Shown:
    return shown(next(table.iloc[[position]].itertuples()), other=other)


def _codes(split: pd.Series) -> np.ndarray:
    return split.map({name: code for code, name in enumerate(SPLITS)}).to_numpy(np.int64)


def _spread(rows: np.ndarray, count: int = EXAMPLES // 2) -> list[int]:
    """A few of `rows`, evenly from first to last; a pair takes the place of two pictures."""
    return [
        int(rows[i])
        for i in np.unique(np.linspace(0, len(rows) - 1, min(count, len(rows))).astype(int))
    ]
