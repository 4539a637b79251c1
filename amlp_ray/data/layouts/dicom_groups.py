"""Name what keeps the slices of a patient in one split, also where headers name no patient.

Each file goes by the first of these that says something: PatientID, study, frame of reference,
series, folder. An anonymizer may have made a UID the same in all files, or a new one in every
file. Such UIDs say nothing.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import NamedTuple

from amlp_ray.data.layouts.dicom_headers import Slice

# Frames of reference of atlases that all patients share.
ATLAS_FRAMES = "1.2.840.10008.1.4.1."
UIDS = {
    "study": "StudyInstanceUID",
    "frame of reference": "FrameOfReferenceUID",
    "series": "SeriesInstanceUID",
}
# Slices of these come many to a series, so a series of each slice's own is none.
SECTIONAL = ("CT", "MR", "PT")
# Folders sort by class or split where they are named so, not by patient.
SORTING_FOLDERS = {
    *("train", "training", "val", "valid", "validation", "test", "testing"),
    *("benign", "malignant", "normal", "abnormal", "healthy", "positive", "negative"),
}
MIN_FOLDERS = 3  # fewer cannot fill three splits


class Group(NamedTuple):
    """What a file belongs to; both are empty if nothing is known."""

    kind: str  # such as "patient" or "study"
    name: str


class Grouping:
    """The groups of the files of a folder."""

    def __init__(self, slices: Sequence[Slice]) -> None:
        """Find out which identifiers say something."""
        self._num_files = len(slices)
        self._num_without_patient = sum(not one.patient for one in slices)
        self._num_patients = len({one.patient for one in slices})
        self._faults: dict[str, str] = {}  # why a kind of UID says nothing
        for kind in UIDS:
            fault = _find_fault(kind, slices)
            if fault:
                self._faults[kind] = fault
        # Patients by UID, for files whose own PatientID was removed.
        self._patients: dict[Group, set[str]] = defaultdict(set)
        for one in slices:
            if one.patient:
                for group in self._uids_of(one):
                    self._patients[group].add(one.patient)
        self._folder_depth = _find_folder_depth([one.name for one in slices])

    def group_of(self, one: Slice) -> Group:
        """Return what keeps a file together with others."""
        if one.patient:
            return Group("patient", one.patient)
        groups = self._uids_of(one)
        for group in groups:
            patients = self._patients.get(group, set())
            if len(patients) == 1:
                return Group("patient", next(iter(patients)))
        if groups:
            return groups[0]
        if self._folder_depth:
            return Group("folder", _folder(one.name, self._folder_depth))
        return Group("", "")

    def series_of(self, one: Slice) -> tuple[str, ...]:
        """Return what the slices of one series have in common.

        Anonymizers give several series one UID, so the group counts too, and the study where all
        files have one UID.
        """
        if not one.series:
            return ("", one.name)
        has_one_uid = "series" in self._faults and "study" not in self._faults
        study = one.study if has_one_uid else ""
        return (one.series, self.group_of(one).name, study)

    def describe(self, groups: Sequence[Group]) -> str:
        """Say in a sentence what the groups of items are, unless all are patients."""
        if not self._num_without_patient:
            if self._num_patients > 1 or len(groups) < 2:
                return ""
            return (
                "all files have one PatientID, so they are one patient; if it is a placeholder, "
                "give a group_file that names the patients"
            )
        without_patient = (
            f"{self._num_without_patient} of {self._num_files} files have no PatientID or a "
            "placeholder"
        )
        if all(group.kind == "patient" for group in groups):
            return f"{without_patient}; other files with their UIDs name their patients"
        kinds = Counter(group.kind for group in set(groups) if group.kind)
        parts = [f"{count} {_plural(kind, count)}" for kind, count in kinds.items()]
        num_unknown = sum(not group.kind for group in groups)
        if num_unknown:
            parts.append(f"near-duplicates among {num_unknown} items that nothing tells apart")
        return (
            f"patients are not all known ({'; '.join([without_patient, *self._reasons()])}), so "
            f"groups are {' and '.join(parts)}: images of a patient may lie in several splits "
            "unless a group_file names the patients"
        )

    def _reasons(self) -> list[str]:
        """Say which UIDs tell nothing, and why."""
        reasons = []
        for fault in dict.fromkeys(self._faults.values()):
            names = [UIDS[kind] for kind, other in self._faults.items() if other == fault]
            verb = "is" if len(names) == 1 else "are"
            reasons.append(f"{' and '.join(names)} {verb} {fault}")
        return reasons

    def _uids_of(self, one: Slice) -> list[Group]:
        """Return the UIDs of a file that say something, the widest first."""
        groups = [Group(kind, _uid(one, kind)) for kind in UIDS if kind not in self._faults]
        return [group for group in groups if group.name]


def _uid(one: Slice, kind: str) -> str:
    if kind == "study":
        return one.study
    if kind == "series":
        return one.series
    return "" if one.frame_of_reference.startswith(ATLAS_FRAMES) else one.frame_of_reference


def _find_fault(kind: str, slices: Sequence[Slice]) -> str:
    """Say why a UID tells nothing; empty if it does."""
    # Files without one, or of another modality, must not hide what is wrong with the others.
    named = [one for one in slices if _uid(one, kind)]
    uids = [_uid(one, kind) for one in named]
    if not uids:
        return "missing"
    if len(uids) > 1 and len(set(uids)) == 1:
        return "the same in all files"
    cuts = [_uid(one, kind) for one in named if one.modality in SECTIONAL and one.frames == 1]
    if len(cuts) > 1 and len(set(cuts)) == len(cuts):
        return "new in every file"
    return ""


def _find_folder_depth(names: Sequence[str]) -> int:
    """Return the depth of the topmost folders that may be patients; 0 if there are none."""
    deepest = max((name.count("/") for name in names), default=0)
    for depth in range(1, deepest + 1):
        folders = {_folder(name, depth) for name in names}
        last_parts = {folder.rpartition("/")[2].lower() for folder in folders}
        if len(folders) >= MIN_FOLDERS and not last_parts <= SORTING_FOLDERS:
            return depth
    return 0


def _folder(name: str, depth: int) -> str:
    return "/".join(name.split("/")[:-1][:depth])


def _plural(word: str, count: int) -> str:
    if count == 1 or word == "series":
        return word
    if word == "frame of reference":
        return "frames of reference"
    return f"{word[:-1]}ies" if word.endswith("y") else f"{word}s"
