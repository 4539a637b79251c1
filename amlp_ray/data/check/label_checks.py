"""Check labels and splits."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import pandas as pd

from amlp_ray.data.check.finding import Finding
from amlp_ray.data.dataset import PatchDataset
from amlp_ray.data.manifest import SPLITS

MIN_LESION = 8 * 8  # pixels: a patch of the usual 8 x 8
MAX_MASK = 0.6  # of the image
# A share is uneven if it differs by at least so much, and by so many standard errors.
MIN_DIFFERENCE = 0.1
MIN_ERRORS = 3.0
MIN_GROUPS = 10  # in a split
# More folders, or folders of fewer groups, are patients or series and no classes.
MAX_CLASSES = 10
MIN_CLASS_GROUPS = 5

UNLABELED = Finding(
    "unlabeled",
    "Unlabeled images",
    "note",
    "Images have no mask. They serve for pretraining; scores and segmentation pass them over.",
    "Nothing, if that is meant; else look for masks whose names do not fit their images.",
)
EMPTY = Finding(
    "empty-masks",
    "Empty masks",
    "note",
    "Labeled images have no lesion. Normal images are welcome, forgotten outlines are not.",
    "Look at the examples for lesions without an outline.",
)
TINY_LESIONS = Finding(
    "tiny-lesions",
    "Tiny lesions",
    "warning",
    f"Lesions have fewer than {MIN_LESION} stored pixels, less than one patch of 8 x 8: a model of "
    "patches hardly sees them, and an error of one pixel decides their score.",
    "Prepare with a larger size, or with fit=tiles.",
)
BORDER = Finding(
    "lesions-at-border",
    "Lesions cut by the border",
    "note",
    "Lesions touch the border of the image, so part of them may lie outside.",
    "Nothing, if the images are so; if they were cropped, crop wider.",
)
LARGE = Finding(
    "large-masks",
    "Masks of nearly everything",
    "warning",
    f"Masks cover more than {MAX_MASK:.0%} of the image; such masks are often inverted, or of "
    "another organ.",
    "Look at the examples; invert the masks, or set lesion_labels.",
)
LESION_SHARE = Finding(
    "uneven-lesions",
    "Splits with other shares of lesions",
    "warning",
    "The share of labeled images with a lesion differs between splits more than chance explains.",
    "Let `prepare` split, which keeps the share; with a split_file, check how it was drawn.",
    what="splits",
)
CLASS_SHARE = Finding(
    "uneven-classes",
    "Splits with other shares of classes",
    "warning",
    "Classes, which are the folders of the source, have other shares in some splits than chance "
    "explains.",
    "Let `prepare` split, which keeps the shares; with a split_file, check how it was drawn.",
    what="splits",
)
GROUPS = Finding(
    "few-groups",
    "Splits of few groups",
    "warning",
    f"Splits have fewer than {MIN_GROUPS} groups: scores on them say little, however many images "
    "they hold.",
    "Collect more patients, choose other fractions, or score by cross-validation.",
    what="splits",
)


def findings(table: pd.DataFrame, dataset: PatchDataset) -> Iterator[Finding]:
    """Yield the findings about labels and splits in a table of `measure_dataset`."""
    lesion = table["lesion"].to_numpy(float)  # pixels; NaN if unlabeled
    is_labeled = np.isfinite(lesion)
    yield UNLABELED.with_rows(table, ~is_labeled)
    if is_labeled.any():
        yield from _masks(table, dataset, lesion)
        has_lesion = lesion > 0
        yield _uneven(LESION_SHARE, table[is_labeled], {"lesion": has_lesion[is_labeled]})
    else:
        for finding in (EMPTY, TINY_LESIONS, LARGE, BORDER, LESION_SHARE):
            yield finding.with_gap("no image is labeled")
    yield _uneven_classes(table)
    yield _few_groups(table)


def _masks(table: pd.DataFrame, dataset: PatchDataset, lesion: np.ndarray) -> Iterator[Finding]:
    """Yield the findings about masks; `lesion` is (N,) pixels, NaN if unlabeled."""
    pixels = dataset.manifest.height * dataset.manifest.width
    num_labeled = int(np.isfinite(lesion).sum())
    has_lesion = lesion > 0

    def percent(row: Any) -> str:
        return f"{100 * row.lesion / pixels:.3g} % of the image"

    yield EMPTY.with_rows(table, lesion == 0, of=num_labeled)
    yield TINY_LESIONS.with_rows(
        table,
        has_lesion & (lesion < MIN_LESION),
        badness=-lesion,
        describe=lambda row: f"{int(row.lesion)} pixels",
        of=num_labeled,
    )
    yield LARGE.with_rows(
        table, lesion > MAX_MASK * pixels, badness=lesion, describe=percent, of=num_labeled
    )
    if dataset.manifest.config.fit == "tiles":
        yield BORDER.with_gap("tiles cut lesions by design")
    else:
        touches_border = has_lesion & table["border"].to_numpy(bool)
        yield BORDER.with_rows(table, touches_border, describe=percent, of=num_labeled)


def _uneven_classes(table: pd.DataFrame) -> Finding:
    folder = table["source"].map(lambda source: str(PurePosixPath(source).parent))
    names = folder.unique()
    num_groups = table["group"].groupby(folder).nunique()
    if not 2 <= len(names) <= MAX_CLASSES or num_groups.min() < MIN_CLASS_GROUPS:
        return CLASS_SHARE.with_gap("the folders of the source are no classes")
    classes = {PurePosixPath(name).name: (folder == name).to_numpy() for name in names}
    return _uneven(CLASS_SHARE, table, classes)


def _uneven(finding: Finding, table: pd.DataFrame, marks: dict[str, np.ndarray]) -> Finding:
    """Compare the share of each mark (N,) bool in each split with its share in all splits."""
    differences = []
    uneven = set()
    splits = [split for split in SPLITS if (table["split"] == split).any()]
    for name, mark in marks.items():
        share = float(mark.mean())
        for split in splits:
            split_mark = mark[(table["split"] == split).to_numpy()]
            # Images of a split are drawn without replacement, hence the last factor.
            left = max(1 - len(split_mark) / len(mark), 0)
            error = np.sqrt(share * (1 - share) / len(split_mark) * left)
            split_share = float(split_mark.mean())
            difference = abs(split_share - share)
            if difference > MIN_DIFFERENCE and difference > MIN_ERRORS * error:
                text = f"{name} {split_share:.0%} of {split} against {share:.0%} of all"
                differences.append(text)
                uneven.add(split)
    meaning = _with_details(finding, "; ".join(differences))
    return finding.with_count(len(uneven), len(splits), meaning=meaning)


def _few_groups(table: pd.DataFrame) -> Finding:
    groups = table.groupby("split", sort=False)["group"].nunique()
    few = groups[groups < MIN_GROUPS]
    details = ", ".join(f"{split} {number}" for split, number in few.items())
    return GROUPS.with_count(len(few), len(groups), meaning=_with_details(GROUPS, details))


def _with_details(finding: Finding, details: str) -> str:
    return f"{finding.meaning} Here: {details}." if details else finding.meaning
