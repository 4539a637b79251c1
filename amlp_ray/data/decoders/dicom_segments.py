"""Tell which segments of a DICOM SEG object are lesion, and which are its background."""

from __future__ import annotations

from typing import NamedTuple

from pydicom import Dataset

BACKGROUND_CODE = ("DCM", "125040")
BACKGROUND_LABELS = ("background", "bg")
CODE_SEQUENCES = ("SegmentedPropertyTypeCodeSequence", "SegmentedPropertyCategoryCodeSequence")


class Segments(NamedTuple):
    """Segment numbers of a SEG object."""

    described: frozenset[int]
    background: frozenset[int]
    notes: tuple[str, ...]  # what was guessed of the background

    def lesion(self, lesion_labels: tuple[int, ...]) -> frozenset[int]:
        """Return the segments that are lesion: those of the user, else all but the background."""
        if lesion_labels:
            return self.described & set(lesion_labels)
        return self.described - self.background


def read_segments(dataset: Dataset) -> Segments:
    """Read the segments of a SEG object.

    The background is named by the padding value, by the code 125040 of DCM or by its label. In a
    label map that names none it is segment 0.
    """
    is_label_map = dataset.SegmentationType == "LABELMAP"
    labels = {}
    coded = set()
    for description in dataset.SegmentSequence:
        number = int(description.SegmentNumber)
        labels[number] = str(description.get("SegmentLabel") or "").strip()
        if _is_coded_background(description):
            coded.add(number)
    padding = dataset.get("PixelPaddingValue") if is_label_map else None
    if padding is not None and padding != "":
        coded.add(int(padding))
    named = {number for number, label in labels.items() if label.lower() in BACKGROUND_LABELS}
    background = coded | named
    notes = [
        f"names segment {number} {labels[number]!r} without its code: counted as no lesion"
        for number in sorted(named - coded)
    ]
    if is_label_map and not background:
        background = {0}
        if 0 in labels:
            notes.append("names no background, so segment 0 is counted as no lesion")
    if not labels.keys() - background:
        notes.append("has no segment but the background: counted as no lesion")
    return Segments(frozenset(labels), frozenset(background), tuple(notes))


def _is_coded_background(description: Dataset) -> bool:
    for name in CODE_SEQUENCES:
        for code in description.get(name) or ():
            scheme = str(code.get("CodingSchemeDesignator") or "")
            if (scheme, str(code.get("CodeValue") or "")) == BACKGROUND_CODE:
                return True
    return False
