"""Read the names of NIfTI files: which are labels, of which image, and of which patient."""

from __future__ import annotations

import re
from collections import defaultdict
from typing import NamedTuple

LABEL_FOLDERS = re.compile(
    r"(labels?|masks?|seg|segs|segmentations?|annotations?|gt|ground_?truth)"
    r"(?P<part>tr|ts|va|val)?",
    re.IGNORECASE,
)
IMAGE_FOLDERS = re.compile(r"(images?|imgs?|volumes?|scans?)(?P<part>tr|ts|va|val)?", re.IGNORECASE)
# The last words of a name: what makes it a label, and what may stand after that.
LABEL_WORD = re.compile(
    r"[a-z0-9]{0,8}(seg|segs|segmentations?|masks?|labels?)|gt|rois?|groundtruth|annotations?"
)
AFTER_LABEL = re.compile(
    r"manual|auto|automatic|final|corrected|lesions?|tumou?rs?|rater\d*|[a-z]|\d{1,3}"
)
BRAIN = re.compile(r"(.*[_\-.])?(brain|bet|skull)[_\-.]?(mask|seg|label)", re.IGNORECASE)
SUBJECT = re.compile(r"sub-[A-Za-z0-9]+")
# One time point of a patient, in BraTS from 2023 on.
TIME_POINT = re.compile(r"(?P<patient>BraTS-[A-Za-z]+-\d{4,6})-\d{3}")
# Folders below that of a patient.
INNER = re.compile(
    r"ses(sion)?[-_]?\w*|visit[-_]?\w*|tp[-_]?\d+|time(point)?[-_]?\d+"
    r"|anat|func|dwi|perf|mri?|nii|nifti|\d{8}"
)


class Volume(NamedTuple):
    """A NIfTI file, by what its name says."""

    name: str  # relative to the listed folder
    # Without folders such as images and labels, so that an image and its label agree.
    folder: tuple[str, ...]
    stem: str
    is_label: bool
    is_in_images: bool
    is_in_labels: bool


def nifti_stem(name: str) -> str | None:
    """Return the file name without folder and ending, None if it is not NIfTI.

    >>> nifti_stem("a/b.1.nii.gz"), nifti_stem("b.gz")
    ('b.1', None)
    """
    base = name.rpartition("/")[2]
    match = re.fullmatch(r"(.+)\.nii(\.gz)?", base, re.IGNORECASE)
    return match[1] if match else None


def parse(name: str) -> Volume | None:
    """Read the name of a file; None if it is not NIfTI.

    >>> parse("set/labelsTr/la_003.nii.gz").folder, parse("set/imagesTr/la_003.nii.gz").folder
    (('set', 'tr'), ('set', 'tr'))
    """
    stem = nifti_stem(name)
    if stem is None:
        return None
    folders: list[str] = []
    is_in_images = False
    is_in_labels = False
    for folder in name.split("/")[:-1]:
        labels = LABEL_FOLDERS.fullmatch(folder)
        images = IMAGE_FOLDERS.fullmatch(folder)
        is_in_labels |= labels is not None
        is_in_images |= images is not None
        match = labels or images
        if match is not None:
            if match["part"]:
                folders.append(match["part"].lower())
        elif folder.lower() != "derivatives":
            folders.append(folder)
    is_label = is_in_labels or bool(mask_bases(stem.lower()))
    return Volume(name, tuple(folders), stem, is_label, is_in_images, is_in_labels)


def mask_bases(stem: str) -> list[str]:
    """Return the possible names of a label's image, longest first; none if it is no label.

    >>> mask_bases("t2s_gmseg-manual"), mask_bases("lesion_001"), mask_bases("segmentation")
    (['t2s'], [], [''])
    >>> mask_bases("sub-1_t1w_label-lesion_mask")
    ['sub-1_t1w_label-lesion', 'sub-1_t1w_label', 'sub-1_t1w']
    """
    parts = re.split(r"([_\-.])", stem)  # word, separator, word, ...
    bases: list[str] = []
    while parts:
        word = parts[-1]
        is_label = LABEL_WORD.fullmatch(word) is not None
        if not is_label and not AFTER_LABEL.fullmatch(word):
            break
        parts = parts[:-2]
        if is_label or bases:
            bases.append("".join(parts))
    return bases


def is_brain_mask(stem: str) -> bool:
    """Return whether a volume marks the brain, which is no lesion.

    >>> is_brain_mask("sub-01_brain_mask"), is_brain_mask("brainmask")
    (True, True)
    >>> is_brain_mask("brain_tumor_mask")
    False
    """
    return BRAIN.fullmatch(stem) is not None


def groups_of(cases: list[tuple[str, Volume, bool]]) -> list[str]:
    """Return the patient of each case.

    That is a BIDS subject; else the case; else, if file names repeat from folder to folder, the
    folder without folders of sessions; else the volume itself.

    Args:
        cases: name, first volume, and whether the name is a case's and not only a file's.
    """
    folders_by_name: dict[str, set[tuple[str, ...]]] = defaultdict(set)
    for name, volume, _ in cases:
        folders_by_name[name].add(volume.folder)
    patient_folders: set[tuple[str, ...]] = set()
    for folders in folders_by_name.values():
        if len(folders) > 1:
            patient_folders |= folders
    groups = []
    for name, volume, is_case in cases:
        subject = _subject_of(volume)
        time_point = TIME_POINT.fullmatch(name)
        if subject:
            group = subject
        elif time_point:
            group = time_point["patient"]
        elif not is_case and volume.folder in patient_folders:
            group = "/".join(_patient_folder(volume.folder)) or name
        elif len(folders_by_name[name]) == 1:
            group = name
        else:
            group = "/".join((*volume.folder, name))
        groups.append(group)
    return groups


def _subject_of(volume: Volume) -> str:
    """Return the BIDS subject that a folder or the file is named for; empty if there is none."""
    for part in (*volume.folder, volume.stem):
        match = SUBJECT.match(part)
        if match:
            return match[0]
    return ""


def _patient_folder(folder: tuple[str, ...]) -> tuple[str, ...]:
    while len(folder) > 1 and INNER.fullmatch(folder[-1].lower()):
        folder = folder[:-1]
    return folder
