"""What a layout's reader returns: source images, rejected files and their listing."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal, NamedTuple

Format = Literal["picture", "dicom", "nifti"]


@dataclass(frozen=True, slots=True)
class SourceImage:
    """What is decoded in one go: a picture, a DICOM series or multi-frame object, or a volume.

    No mask means unlabeled. An all-zero mask means labeled and without a lesion.
    """

    id: str  # unique in the set
    format: Format  # chooses the decoder
    # Paths or URIs: one picture, the slices of a series in order, or a volume per modality.
    images: tuple[str, ...]
    masks: tuple[str, ...]  # paths or URIs; several are united
    source: str  # name shown to people: path relative to the folder, with forward slashes
    group: str = ""  # patient or volume, never cut by a split; empty if the layout knows none
    group_kind: str = "patient"  # what `group` is, in words; "study" where no patient is named
    stratum: str = ""  # class, shared evenly by the splits
    site: str = ""  # hospital or scanner, shared evenly too; empty if the layout knows none
    # Lesions drawn in an annotation file, as JSON: {"height", "width", "segmentations": [COCO]}.
    outlines: str = ""

    @property
    def is_labeled(self) -> bool:
        """Whether there is a mask or an outline, which may be empty."""
        return bool(self.masks or self.outlines)


class RejectedFile(NamedTuple):
    """A file that cannot be used, or that was used after a repair; a line of rejects.csv."""

    file: str
    action: Literal["rejected", "repaired"]
    reason: str  # a sentence without the file's name


class Listing(NamedTuple):
    """Images and rejected files of a folder."""

    items: list[SourceImage]
    rejected: list[RejectedFile]  # such as a mask without an image; the rest of the set survives
    summary: str = ""  # how `auto` recognized the layout, and what else was seen
    layout: str = ""  # as given or recognized
    stray_masks: tuple[RejectedFile, ...] = ()  # rejected masks that belong to no image


def rejected(file: str, reason: str) -> RejectedFile:
    """Describe a file that cannot be used; `reason` is a sentence without its name."""
    return RejectedFile(file, "rejected", reason)


def repaired(file: str, reason: str) -> RejectedFile:
    """Describe a file that is used after a repair; `reason` is a sentence without its name."""
    return RejectedFile(file, "repaired", reason)


def natural_key(text: str) -> tuple[list[tuple[bool, int, str]], str]:
    """Return a sort key that puts `benign (9)` before `benign (10)`, and digits before letters.

    >>> sorted(["a10", "a9", "a", "7"], key=natural_key)
    ['7', 'a', 'a9', 'a10']
    """
    key = []
    for i, part in enumerate(re.split(r"([0-9]+)", text)):
        if i % 2:
            # Compare by length without zeros, then digits: no number is too long for that.
            number = part.lstrip("0")
            key.append((False, len(number), number))
        elif part:
            key.append((True, 0, part))
    return key, text
