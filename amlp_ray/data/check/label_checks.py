"""Findings about labels and splits."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import PurePosixPath

import numpy as np
import pandas as pd

from amlp_ray.data.check.finding import Finding, counted, found
from amlp_ray.data.dataset import PatchDataset
from amlp_ray.data.manifest import SPLITS

TINY = 8 * 8  # pixels: a patch of the usual 8 x 8
COVERED = 0.6  # of the image
UNEVEN = 0.1, 3.0  # a share differs by at least so much, and by so many standard errors
FEW_GROUPS = 10  # in a split
MOST_CLASSES, CLASS_GROUPS = (
    10,
    5,
)  # more folders, or folders of fewer groups, are patients or series and no classes

UNLABELED = Finding(
    "unlabeled", "Unlabelled images", "note",
    "Images have no mask. They serve for pretraining; scores and segmentation pass them over.",
    "Nothing, if that is meant; else look for masks whose names do not fit their images.",
)  # fmt: skip
EMPTY = Finding(
    "empty-masks", "Empty masks", "note",
    "Labelled images have no lesion. Normal images are welcome, forgotten outlines are not.",
    "Look at the examples for lesions without an outline.",
)  # fmt: skip
TINY_LESIONS = Finding(
    "tiny-lesions", "Tiny lesions", "warning",
    f"Lesions have fewer than {TINY} stored pixels, less than one patch of 8 x 8: a model of patches hardly sees them, "
    "and an error of one pixel decides their score.",
    "Prepare with a larger size, or with fit=tiles.",
)  # fmt: skip
BORDER = Finding(
    "lesions-at-border", "Lesions cut by the border", "note",
    "Lesions touch the border of the image, so part of them may lie outside.",
    "Nothing, if the images are so; if they were cropped, crop wider.",
)  # fmt: skip
LARGE = Finding(
    "large-masks", "Masks of nearly everything", "warning",
    f"Masks cover more than {COVERED:.0%} of the image; such masks are often inverted, or of another organ.",
    "Look at the examples; invert the masks, or set lesion_labels.",
)  # fmt: skip
LESION_SHARE = Finding(
    "uneven-lesions", "Splits with other shares of lesions", "warning",
    "The share of labelled images with a lesion differs between splits more than chance explains.",
    "Let `prepare` split, which keeps the share; with a split_file, check how it was drawn.",
    what="splits",
)  # fmt: skip
CLASS_SHARE = Finding(
    "uneven-classes", "Splits with other shares of classes", "warning",
    "Classes, which are the folders of the source, have other shares in some splits than chance explains.",
    "Let `prepare` split, which keeps the shares; with a split_file, check how it was drawn.",
    what="splits",
)  # fmt: skip
GROUPS = Finding(
    "few-groups", "Splits of few groups", "warning",
    f"Splits have fewer than {FEW_GROUPS} groups: scores on them say little, however many images they hold.",
    "Collect more patients, choose other fractions, or score by cross-validation.",
    what="splits",
)  # fmt: skip


def findings(table: pd.DataFrame, dataset: PatchDataset) -> Iterator[Finding]:
    """Yield what is found about labels and splits in a table of `measured`."""
    pixels = dataset.manifest.height * dataset.manifest.width
    lesion = table["lesion"].to_numpy(float)  # NaN where unlabelled
    labeled = np.isfinite(lesion)
    lesions, count = lesion > 0, int(labeled.sum())
    percent = lambda row: f"{100 * row.lesion / pixels:.3g} % of the image"  # noqa: E731
    yield found(UNLABELED, table, ~labeled)
    if count:
        yield found(EMPTY, table, lesion == 0, of=count)
        yield found(
            TINY_LESIONS, table, lesions & (lesion < TINY), badness=-lesion,
            value=lambda row: f"{int(row.lesion)} pixels", of=count,
        )  # fmt: skip
        yield found(
            LARGE, table, lesion > COVERED * pixels, badness=lesion, value=percent, of=count
        )
        if dataset.manifest.config.fit != "tiles":
            yield found(
                BORDER, table, lesions & table["border"].to_numpy(bool), value=percent, of=count
            )
        else:
            yield counted(BORDER, 0, 0, gap="tiles cut lesions by design")
        yield _shares(LESION_SHARE, table[labeled], {"lesion": lesions[labeled]})
    else:
        for about in (EMPTY, TINY_LESIONS, LARGE, BORDER, LESION_SHARE):
            yield counted(about, 0, 0, gap="no image is labelled")
    yield _classes(table)
    yield _groups(table)


def _classes(table: pd.DataFrame) -> Finding:
    classes = table["source"].map(lambda source: str(PurePosixPath(source).parent))
    names = classes.unique()
    members = table["group"].groupby(classes).nunique()
    if not 2 <= len(names) <= MOST_CLASSES or members.min() < CLASS_GROUPS:
        return counted(CLASS_SHARE, 0, 0, gap="the folders of the source are no classes")
    return _shares(
        CLASS_SHARE,
        table,
        {PurePosixPath(name).name: (classes == name).to_numpy() for name in names},
    )


def _shares(about: Finding, table: pd.DataFrame, marks: dict[str, np.ndarray]) -> Finding:
    """Compare the share of each mark (N,) bool in each split with its share in all splits."""
    told, uneven = [], set()
    splits = [split for split in SPLITS if (table["split"] == split).any()]
    for name, mark in marks.items():
        share = float(mark.mean())
        for split in splits:
            of_split = mark[(table["split"] == split).to_numpy()]
            # Images of a split are drawn without replacement, hence the last factor.
            left = max(1 - len(of_split) / len(mark), 0)
            error = np.sqrt(share * (1 - share) / len(of_split) * left)
            difference = float(of_split.mean()) - share
            if abs(difference) > UNEVEN[0] and abs(difference) > UNEVEN[1] * error:
                told.append(f"{name} {of_split.mean():.0%} of {split} against {share:.0%} of all")
                uneven.add(split)
    meaning = about.meaning + (f" Here: {'; '.join(told)}." if told else "")
    return counted(about, len(uneven), len(splits), meaning=meaning)


def _groups(table: pd.DataFrame) -> Finding:
    groups = table.groupby("split", sort=False)["group"].nunique()
    few = groups[groups < FEW_GROUPS]
    told = ", ".join(f"{split} {number}" for split, number in few.items())
    return counted(
        GROUPS, len(few), len(groups), meaning=GROUPS.meaning + (f" Here: {told}." if told else "")
    )
