"""What a source reader returns, and what all readers share."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal, NamedTuple

DIGITS = "0123456789"

Format = Literal["picture", "dicom", "nifti"]


@dataclass(frozen=True, slots=True)
class SourceImage:
    """What is read in one go: a picture, a DICOM series or multi-frame object, a volume of one or more modalities.

    No mask means unlabelled; an all-zero mask means labelled, without a lesion.
    """

    id: str  # unique in the set
    format: Format  # who decodes it
    images: tuple[
        str, ...
    ]  # paths or URIs: one picture, the slices of a series in order, or a volume per modality
    masks: tuple[str, ...]  # paths or URIs; several are united
    source: str  # name shown to people: path relative to the folder, with forward slashes
    group: str = ""  # patient or volume, never cut by a split; empty where the layout knows none
    stratum: str = ""  # class, shared evenly by the splits
    outlines: str = ""  # lesions drawn in an annotation file, as JSON: {"height", "width", "segmentations": [COCO]}


class RejectedFile(NamedTuple):
    """A file that was found and cannot be used, or was used after a repair; a line of rejects.csv."""

    file: str
    action: Literal["rejected", "repaired"]
    reason: str  # a sentence without the file's name


class Listing(NamedTuple):
    """What a reader found in a folder."""

    items: list[SourceImage]
    faults: list[RejectedFile]  # such as a mask without an image; the rest of the set survives
    why: str = ""  # how `auto` recognised the layout, and what else was seen
    layout: str = ""  # as given or recognised


def natural_key(text: str) -> tuple[list[tuple[bool, int, str]], str]:
    """Sort key under which `benign (9)` comes before `benign (10)`, and digits before letters.

    >>> sorted(["a10", "a9", "a", "7"], key=natural_key)
    ['7', 'a', 'a9', 'a10']
    """
    # A number is compared by its length without zeros, then its digits: no number is too long for that.
    parts = [part for part in re.split(r"([0-9]+)", text) if part]
    key = [
        (False, len(part.lstrip("0")), part.lstrip("0")) if part[0] in DIGITS else (True, 0, part)
        for part in parts
    ]
    return key, text
