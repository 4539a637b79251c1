"""Find copies: across splits, across groups, to the pixel, and in another dataset."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import PurePosixPath

import numpy as np
import pandas as pd

from amlp_ray.data.check.finding import (
    MAX_EXAMPLES,
    Example,
    Finding,
    image_ref,
    spread,
)
from amlp_ray.data.dataset import PatchDataset
from amlp_ray.data.manifest import SPLITS, GroupUnit
from amlp_ray.data.prepare.near_duplicates import FLAT, MAX_DISTANCE, find_chains, near_pairs

# A chain of near-copies is worth a warning from this share of all images on, and this number.
MIN_CHAIN_SHARE = 0.1
MIN_CHAIN_IMAGES = 20
# Different patients are alike if their images differ less than those of others in train do: so many
# bits as at most this share of the training images, of which so many are compared, allow.
USUAL_SHARE = 0.01
MAX_COMPARED = 5000
MAX_PAIRS = MAX_EXAMPLES // 2  # a pair takes the place of two pictures

ACROSS = Finding(
    "copies-across-splits",
    "Near-copies in different splits",
    "leak",
    "Images of val or test look like images of another split, so a score on them is partly from "
    "memory.",
    "Prepare again with group_by=near-duplicates, or with a group_file that keeps patients "
    "together.",
)
LOOK_ALIKES = Finding(
    "look-alikes-across-splits",
    "Other patients who look alike, in different splits",
    "note",
    "Images of val or test look more like images of other patients in another split than training "
    "images of different patients look like each other. Patients are known and none is in two "
    "splits, so this is no leak, unless one patient has two names.",
    "See whether the examples show one patient under two names. If so, join the names in a "
    "group_file.",
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
    "Images that one dataset holds out, in val or test, look like images of another split of the "
    "other dataset. A "
    "model that is trained on one and scored on the other has seen them.",
    "Leave these images out of the set that you train on: file_list and split_file name what is "
    "used.",
)
SHARED = Finding(
    "shared-with-other",
    "Images shared with the other dataset",
    "note",
    "Images look like images of the same split of the other dataset: no leak, but the two sets are "
    "not independent.",
    "Count these images once where the two sets are put together.",
)
EXACT = Finding(
    "exact-copies",
    "Exact copies",
    "warning",
    "Images have the very same stored pixels as an earlier one, constant ones not counted: they "
    "weigh more in training "
    "and in scores.",
    "Delete all but one of each, and ask which label is right where they differ.",
)
EFFECTIVE = Finding(
    "near-copies",
    "Near-copies counted as independent",
    "note",
    "Images of different groups of one split look alike, so there are fewer independent images "
    "than it seems, and "
    "intervals over images are too narrow.",
    "Group by patient, or by near-duplicates; report how many groups there are.",
)
CHAIN = Finding(
    "one-chain",
    "Many images alike",
    "warning",
    "A large part of the dataset is one chain of near-copies: frames of few videos, neighboring "
    "slices, or images of "
    "one layout (a disc on black) that the perceptual hash cannot tell apart.",
    "Group by patient or volume instead of by near-duplicates; look at the examples before you "
    "trust the finding.",
)


def findings(
    table: pd.DataFrame, unit: GroupUnit, against: PatchDataset | None = None
) -> Iterator[Finding]:
    """Yield the findings about copies.

    Args:
        table: a row per image, from `measure_dataset`.
        unit: what a group is. Between known patients likeness is no leak, and no reason to group
            by near-duplicates, which would join patients.
        against: another dataset, with which to compare.
    """
    hashes = table["hash"].to_numpy(np.uint64)
    if unit == "patient":
        distance = unusual_distance(table, hashes)
        meaning = f"{LOOK_ALIKES.meaning} {_threshold_text(distance)}"
        yield _across_splits(table, hashes, LOOK_ALIKES, distance, meaning=meaning)
    else:
        yield _across_splits(table, hashes, ACROSS, MAX_DISTANCE)
    yield _split_groups(table)
    if against is not None:
        yield from _across_datasets(table, hashes, against)
    yield _exact_copies(table)
    chain = find_chains(hashes)
    if unit != "patient":
        yield _near_copies(table, hashes, chain)
        yield _longest_chain(table, chain)


def unusual_distance(table: pd.DataFrame, hashes: np.ndarray) -> int:
    """Find how many bits may differ for two images of different patients to be unusually alike.

    That is the largest number, up to `MAX_DISTANCE`, at which no more than `USUAL_SHARE` of the
    training images have such a neighbor of another patient in train; -1 if there is none. Our own
    rule: slices of one organ are alike in every set, but how much depends on the set.
    """
    rows = np.flatnonzero((table["split"] == SPLITS[0]).to_numpy())
    rows = rows[np.linspace(0, len(rows) - 1, min(len(rows), MAX_COMPARED), dtype=np.int64)]
    if not len(rows):
        return -1
    _, patient = np.unique(table["group"].to_numpy(str)[rows], return_inverse=True)
    train = hashes[rows]
    nearest = np.full(len(rows), MAX_DISTANCE + 1)
    for a, b in near_pairs(train, MAX_DISTANCE):
        is_other = patient[a] != patient[b]
        left, right = a[is_other], b[is_other]
        distances = np.bitwise_count(train[left] ^ train[right]).astype(np.int64)
        np.minimum.at(nearest, left, distances)
        np.minimum.at(nearest, right, distances)
    usual = [float((nearest <= distance).mean()) for distance in range(MAX_DISTANCE + 1)]
    return sum(share <= USUAL_SHARE for share in usual) - 1


def _threshold_text(distance: int) -> str:
    if distance < 0:
        return (
            "Here over 1 % of the training images have the hash of one of another patient, so "
            "likeness tells nothing, and none is counted."
        )
    return f"Counted are hashes that differ in at most {distance} of 64 bits, as found on this set."


def _across_splits(
    table: pd.DataFrame,
    hashes: np.ndarray,
    finding: Finding,
    distance: int,
    *,
    meaning: str | None = None,
) -> Finding:
    split = _split_codes(table["split"])
    has_copy = _splits_with_copy(hashes, split, distance=distance)
    has_copy[np.arange(len(table)), split] = False
    is_hit = has_copy.any(axis=1) & (split > 0)
    examples = []
    for i in spread(np.flatnonzero(is_hit), MAX_PAIRS):
        elsewhere = np.flatnonzero(split != split[i])
        examples.append(_nearest_pair(table, i, table, elsewhere))
    held_out = int((split > 0).sum())
    return finding.with_count(
        is_hit.sum(),
        held_out,
        examples,
        what="held-out images",
        meaning=meaning or finding.meaning,
    )


def _split_groups(table: pd.DataFrame) -> Finding:
    splits = table.groupby("group")["split"].nunique()
    cut = splits.index[splits > 1]
    examples = []
    for name in cut[:MAX_EXAMPLES]:
        rows = table[table["group"] == name].drop_duplicates("split")
        examples.append(Example(image_ref(rows, 0), f"group {name}", image_ref(rows, 1)))
    return SPLIT_GROUPS.with_count(len(cut), len(splits), examples)


def _across_datasets(
    table: pd.DataFrame, hashes: np.ndarray, against: PatchDataset
) -> Iterator[Finding]:
    other = against.table(columns=["id", "hash"])
    other["row"] = other.groupby("split", sort=False).cumcount()
    split = _split_codes(table["split"])
    other_split = _split_codes(other["split"])
    has_copy = _splits_with_copy(hashes, other_split, other["hash"].to_numpy(np.uint64))
    positions = np.arange(len(table))
    is_shared = has_copy[positions, split]
    is_leak = has_copy.copy()
    is_leak[positions, split] = False  # every link that is left has val or test at one end
    for finding, is_hit in ((AGAINST, is_leak.any(axis=1)), (SHARED, is_shared)):
        examples = []
        for i in spread(np.flatnonzero(is_hit), MAX_PAIRS):
            is_candidate = (other_split == split[i]) == (finding is SHARED)
            candidates = np.flatnonzero(is_candidate)
            examples.append(_nearest_pair(table, i, other, candidates, in_other=True))
        yield finding.with_count(is_hit.sum(), len(table), examples)


def _exact_copies(table: pd.DataFrame) -> Finding:
    """Count later copies; those that contradict the first one are the first examples."""
    rows = np.flatnonzero(table["high"] > table["low"])
    digests = table["digest"].to_numpy()[rows]
    _, first, inverse = np.unique(digests, return_index=True, return_inverse=True)
    original = rows[first[inverse]]
    is_copy = original != rows
    copies = rows[is_copy]
    originals = original[is_copy]
    folder = table["source"].map(lambda source: PurePosixPath(source).parent.name).to_numpy()
    lesion = table["lesion"].to_numpy(float)
    has_other_folder = folder[copies] != folder[originals]
    are_labeled = np.isfinite(lesion[copies] + lesion[originals])
    has_other_mask = are_labeled & (lesion[copies] != lesion[originals])
    is_contradiction = has_other_folder | has_other_mask
    examples = []
    for n in np.argsort(~is_contradiction, kind="stable")[:MAX_PAIRS]:
        text = "identical"
        if has_other_folder[n]:
            text += f", but {folder[copies[n]]} and {folder[originals[n]]}"
        elif has_other_mask[n]:
            text += ", but other mask"
        example = Example(image_ref(table, copies[n]), text, image_ref(table, originals[n]))
        examples.append(example)
    meaning = EXACT.meaning
    count = np.count_nonzero(is_contradiction)
    if count:
        meaning += f" With another mask or folder than the first: {count}."
    return EXACT.with_count(len(copies), len(table), examples, meaning=meaning)


def _near_copies(table: pd.DataFrame, hashes: np.ndarray, chain: np.ndarray) -> Finding:
    """Count groups beyond the first of each chain, split by split; an example for each chain."""
    columns = pd.DataFrame({"split": table["split"], "chain": chain, "group": table["group"]})
    distinct = columns.drop_duplicates()
    repeated = distinct[distinct.duplicated(["split", "chain"])]
    # Images of one group may lie in several chains.
    repeated = repeated.drop_duplicates(["split", "group"])
    num_groups = len(columns.drop_duplicates(["split", "group"]))
    examples = []
    for i in spread(repeated.drop_duplicates("chain").index.to_numpy(), MAX_PAIRS):
        image = columns.iloc[i]
        is_near = (columns["chain"] == image["chain"]) & (columns["split"] == image["split"])
        others = np.flatnonzero(is_near & (columns["group"] != image["group"]))
        examples.append(_nearest_pair(table, i, table, others))
    return EFFECTIVE.with_count(len(repeated), num_groups, examples, what="groups")


def _longest_chain(table: pd.DataFrame, chain: np.ndarray) -> Finding:
    if not len(table):
        return CHAIN
    sizes = np.bincount(chain)
    longest = int(sizes.argmax())
    is_hit = chain == longest
    is_long = sizes[longest] >= max(MIN_CHAIN_IMAGES, MIN_CHAIN_SHARE * len(table))
    # Slices of one volume are alike and belong together.
    if not is_long or table["group"][is_hit].nunique() == 1:
        is_hit[:] = False
    return CHAIN.with_rows(table, is_hit)


def _splits_with_copy(
    hashes: np.ndarray,
    split: np.ndarray,
    other: np.ndarray | None = None,
    *,
    distance: int = MAX_DISTANCE,
) -> np.ndarray:
    """Find which splits hold a near-copy of each image.

    Args:
        hashes: (N,) uint64.
        split: (M,) split of each of `other`, or of each of `hashes`.
        other: (M,) uint64; None: `hashes`, which then count as copies of themselves.
        distance: most bits in which copies differ; below 0 nothing is a copy.

    Returns:
        (N, splits) bool.
    """
    if distance < 0:
        return np.zeros((len(hashes), len(SPLITS)), bool)
    values, inverse = np.unique(hashes, return_inverse=True)
    other_values, other_inverse = values, inverse
    if other is not None:
        other_values, other_inverse = np.unique(other, return_inverse=True)
    is_in_split = np.zeros((len(other_values), len(SPLITS)), bool)
    is_in_split[other_inverse, split] = True
    has_copy = np.zeros((len(values), len(SPLITS)), bool)
    if other is None:
        has_copy = is_in_split & (values != FLAT)[:, None]
    pairs = near_pairs(values, distance, None if other is None else other_values)
    for a, b in pairs:
        for number in range(len(SPLITS)):
            has_copy[a[is_in_split[b, number]], number] = True
            if other is None:
                has_copy[b[is_in_split[a, number]], number] = True
    return has_copy[inverse]


def _nearest_pair(
    table: pd.DataFrame,
    i: int,
    others: pd.DataFrame,
    candidates: np.ndarray,
    *,
    in_other: bool = False,
) -> Example:
    """Show image `i` of `table` with the one of `candidates` in `others` of the nearest hash."""
    own_hash = np.uint64(table["hash"].iloc[i])
    hashes = others["hash"].to_numpy(np.uint64)[candidates]
    distances = np.bitwise_count(hashes ^ own_hash)
    nearest = int(distances.argmin())
    distance = int(distances[nearest])
    text = f"{distance} of 64 bits differ" if distance else "equal hash"
    nearest_ref = image_ref(others, candidates[nearest], other=in_other)
    return Example(image_ref(table, i), text, nearest_ref)


def _split_codes(split: pd.Series) -> np.ndarray:
    return split.map({name: code for code, name in enumerate(SPLITS)}).to_numpy(np.int64)
