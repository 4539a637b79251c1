"""Which values of a mask are lesion, whatever the mask's file format."""

from __future__ import annotations

import numpy as np

LISTED = 8  # values a note names at most


def lesion_of(labels: np.ndarray, wanted: tuple[int, ...]) -> tuple[np.ndarray, tuple[str, ...]]:
    """Turn the labels of a mask, of any shape and number type, into uint8 of 0 and 1 of the same shape, with notes.

    All above zero is lesion, or the values `wanted` where given. A note says where a mask has labels of which none is
    wanted: most often `lesion_labels` was written for another numbering.

    >>> lesion_of(np.array([[0, 3, 7]]), (1, 2))[1]
    ('has the values 3, 7 but lesion_labels are 1, 2: counted as no lesion',)
    """
    if not wanted:
        return (labels > 0).astype(np.uint8), ()
    mask = np.isin(labels, wanted).astype(np.uint8)
    if mask.any() or not labels.any():
        return mask, ()
    found = np.unique(labels[labels != 0])
    listed = ", ".join(f"{value:g}" for value in found[:LISTED].tolist())
    if len(found) > LISTED:
        listed += f" and {len(found) - LISTED} more"
    labels_wanted = ", ".join(map(str, wanted))
    return mask, (
        f"has the values {listed} but lesion_labels are {labels_wanted}: counted as no lesion",
    )
