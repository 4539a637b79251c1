"""A folder of NIfTI volumes: flat, a folder per case, BIDS, BraTS, or imagesTr and labelsTr of MSD and nnU-Net.

    imagesTr/la_003.nii.gz            labelsTr/la_003.nii.gz              MSD
    imagesTr/case_0000.nii.gz ..._0001.nii.gz   labelsTr/case.nii.gz      nnU-Net: endings are channels
    BraTS_7/BraTS_7_t1.nii.gz ..._t1ce ..._t2 ..._flair   BraTS_7_seg     BraTS: endings are channels
    sub-01/anat/sub-01_T1w.nii.gz     sub-01/anat/sub-01_T1w_label-lesion_mask.nii.gz   BIDS: one item per volume
    t2/t2.nii.gz                      t2/t2_seg-manual.nii.gz             flat or in folders

Labels are known by their folder or by their name (`nifti_names`). All slices of a patient share a group.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field

from amlp_ray.config import PrepareConfig
from amlp_ray.data.layouts.item import Listing, RejectedFile, SourceImage, natural_key
from amlp_ray.data.layouts.nifti_names import (
    Volume,
    groups_of,
    is_brain_mask,
    mask_bases,
    nifti_stem,
    parse,
)
from amlp_ray.data.path import DataPath
from amlp_ray.errors import DataError

# Order of the channels of a BraTS case; each by all its names: of 2012-2021, of 2023 and later, and of MSD.
MODALITIES = {
    "t1": "t1", "t1n": "t1", "t1ce": "t1ce", "t1gd": "t1ce", "t1c": "t1ce",
    "t2": "t2", "t2w": "t2", "flair": "flair", "t2f": "flair",
}  # fmt: skip
ORDER = ("t1", "t1ce", "t2", "flair")
BRATS = re.compile(
    rf"(?P<case>.+)[_-](?P<channel>{'|'.join(sorted(MODALITIES, key=len, reverse=True))})",
    re.IGNORECASE,
)
NNUNET = re.compile(r"(?P<case>.+)_(?P<channel>\d{4})")
MOST_CHANNELS = 16  # more numbered volumes of one name are no channels


@dataclass
class _Case:
    """Volumes that are read as one, and their labels."""

    name: str
    volumes: list[Volume]
    masks: list[str] = field(default_factory=list)
    is_stacked: bool = False


def find_nifti(place: DataPath, config: PrepareConfig) -> Listing:
    """List the volumes below a folder, without opening one. A case that lacks a channel most cases have is rejected.

    Several label volumes of one image are united. Brain masks are no lesions and left out.

    Raises:
        DataError: there is no folder, or no volume in it.
    """
    names = sorted((entry.name for entry in place.entries()), key=natural_key)
    volumes = [parse(name) for name in names if nifti_stem(name) is not None]
    brains = [of for of in volumes if is_brain_mask(of.stem)]
    volumes = [of for of in volumes if not is_brain_mask(of.stem)]
    images = [of for of in volumes if not of.is_label]
    faults = _pairs(names)
    if not images:
        found = (
            f"{len(volumes)} label volumes"
            if volumes
            else f"{len(names)} files, none of them NIfTI"
        )
        raise DataError(
            f"{place} holds {found}, but the nifti layout needs image volumes (.nii, .nii.gz); give the folder that "
            f"contains these, or use another layout."
        )
    cases, incomplete = stack(images)
    rejected = {fault.file for fault in incomplete}
    of_rejected = [of for of in images if of.name in rejected]
    for label in _attach(cases, [of for of in volumes if of.is_label]):
        starts = tuple(
            base for base in (label.stem.lower(), *mask_bases(label.stem.lower())) if base
        )
        lost = any(
            of.folder == label.folder and of.stem.lower().startswith(starts) for of in of_rejected
        )
        reason = (
            "belongs to a case that is rejected" if lost else "is a label volume without an image"
        )
        faults.append(RejectedFile(label.name, "rejected", reason))
    faults += incomplete
    return Listing(to_items(place, cases), sorted(faults), _why(cases, len(brains)))


def stack(images: list[Volume]) -> tuple[list[_Case], list[RejectedFile]]:
    """Put the channels of each case together; what is no channel is a case of its own.

    >>> cases, _ = stack([parse(f"c{i}/c{i}_{name}.nii") for i in (1, 2) for name in ("flair", "T1", "t1gd", "t2w")])
    >>> [[volume.stem for volume in case.volumes] for case in cases]
    [['c1_T1', 'c1_t1gd', 'c1_t2w', 'c1_flair'], ['c2_T1', 'c2_t1gd', 'c2_t2w', 'c2_flair']]
    """
    numbered = _numbered(images)
    scans: dict[tuple[tuple[str, ...], str], dict[str, list[Volume]]] = defaultdict(
        lambda: defaultdict(list)
    )
    for of in images:
        match = BRATS.fullmatch(of.stem)
        # Scans of a BIDS subject lie on grids of their own, so they are no channels.
        if of.name not in numbered and match and not of.stem.lower().startswith("sub-"):
            scans[of.folder, match["case"]][MODALITIES[match["channel"].lower()]].append(of)
    cases, faults = _complete(scans, ORDER)
    for folder in sorted({folder for folder, _ in numbered.values()}):
        own: dict[tuple[tuple[str, ...], str], dict[str, list[Volume]]] = defaultdict(
            lambda: defaultdict(list)
        )
        for of in images:
            if of.name in numbered and numbered[of.name][0] == folder:
                own[of.folder, numbered[of.name][1]][of.stem[-4:]].append(of)
        more, missing = _complete(
            own, sorted({channel for channels in own.values() for channel in channels}), least=1
        )
        cases += more
        faults += missing
    taken = {of.name for case in cases for of in case.volumes} | {fault.file for fault in faults}
    cases += [_Case(of.stem, [of]) for of in images if of.name not in taken]
    return sorted(cases, key=lambda case: natural_key(case.volumes[0].name)), faults


def _numbered(images: list[Volume]) -> dict[str, tuple[tuple[str, ...], str]]:
    """Return folder and case of the files with nnU-Net's channel numbers: all of a folder are so, from 0000."""
    folders: dict[tuple[str, ...], list[Volume]] = defaultdict(list)
    for of in images:
        if of.is_in_images:
            folders[of.folder].append(of)
    found = {}
    for folder, volumes in folders.items():
        matches = [NNUNET.fullmatch(of.stem) for of in volumes]
        cases = Counter(match["case"] for match in matches if match)
        starts = {match["case"] for match in matches if match and match["channel"] == "0000"}
        if None not in matches and starts == set(cases) and max(cases.values()) <= MOST_CHANNELS:
            found.update({of.name: (folder, of.stem[:-5]) for of in volumes})
    return found


def _complete(
    scans: dict[tuple[tuple[str, ...], str], dict[str, list[Volume]]],
    order: Iterable[str],
    least: int = 2,
) -> tuple[list[_Case], list[RejectedFile]]:
    """Return the cases that have the channels most cases have, in order; faults for other cases and for channels too
    many. Nothing if most cases have fewer than `least` channels."""
    counts = Counter(channel for channels in scans.values() for channel in channels)
    expected = [channel for channel in order if 2 * counts[channel] > len(scans)]
    cases: list[_Case] = []
    faults: list[RejectedFile] = []
    for (_, name), channels in scans.items() if len(expected) >= least else ():
        lacking = [channel for channel in expected if channel not in channels]
        for channel, volumes in channels.items():
            for of in volumes if lacking else volumes[1:] if channel in expected else volumes:
                if lacking:
                    reason = (
                        f"belongs to a case that lacks {', '.join(lacking)}, which most cases have"
                    )
                elif channel in expected:
                    reason = f"is a second {channel} volume of its case; the first is used"
                else:
                    reason = f"is a {channel} volume, which most cases lack"
                faults.append(RejectedFile(of.name, "rejected", reason))
        if not lacking:
            cases.append(
                _Case(name, [channels[channel][0] for channel in expected], is_stacked=True)
            )
    return cases, faults


def _attach(cases: list[_Case], labels: list[Volume]) -> list[Volume]:
    """Give each label volume to its case; return those that have none."""
    by_folder: dict[tuple[str, ...], list[_Case]] = defaultdict(list)
    by_name: dict[str, list[_Case]] = defaultdict(list)
    for case in cases:
        by_folder[case.volumes[0].folder].append(case)
        for name in _names(case):
            by_name[name].append(case)
    stray: list[Volume] = []
    for label in labels:
        found = _case_of(label, by_folder[label.folder], by_name)
        if found is None:
            stray.append(label)
        else:
            found.masks.append(label.name)
    return stray


def _case_of(label: Volume, near: list[_Case], by_name: dict[str, list[_Case]]) -> _Case | None:
    """Find a label's case: by name in its folder, by the start of its name, as the only one there, by name anywhere."""
    stem = label.stem.lower()
    bases = [*([stem] if label.is_in_labels else []), *mask_bases(stem)]
    for base in bases:
        named = [case for case in near if base in _names(case)]
        if len(named) == 1:
            return named[0]
    starts = [
        (len(name), i)
        for i, case in enumerate(near)
        for name in _names(case)
        if re.match(rf"{re.escape(name)}[_\-.]", stem)
    ]
    if starts:
        return near[max(starts)[1]]
    if len(near) == 1 and not (label.is_in_labels and near[0].volumes[0].is_in_images):
        return near[
            0
        ]  # case_07/imaging.nii.gz and case_07/segmentation.nii.gz; not so where names must agree
    for base in bases:
        if len(by_name.get(base, ())) == 1:
            return by_name[base][0]
    return None


def _names(case: _Case) -> set[str]:
    return {case.name.lower(), *(of.stem.lower() for of in case.volumes)}


def to_items(place: DataPath, cases: list[_Case]) -> list[SourceImage]:
    """Name the cases: by file or case name where these differ, else by their path."""
    groups = groups_of([(case.name, case.volumes[0], case.is_stacked) for case in cases])
    differ = len({case.name for case in cases}) == len(cases)
    items = []
    for case, group in zip(cases, groups, strict=True):
        first = case.volumes[0].name
        folder = first.rpartition("/")[0]
        items.append(
            SourceImage(
                id=case.name if differ or not folder else f"{folder}/{case.name}",
                format="nifti",
                images=tuple(str(place / of.name) for of in case.volumes),
                masks=tuple(str(place / name) for name in case.masks),
                source=first,
                group=group,
            )
        )
    return items


def _pairs(names: list[str]) -> list[RejectedFile]:
    headers = {name[:-4] for name in names if name.lower().endswith(".hdr")}
    return [
        RejectedFile(
            name,
            "rejected",
            "is one half of a pair (.hdr and .img); single .nii or .nii.gz files are accepted",
        )
        for name in names
        if name.lower().endswith(".img") and name[:-4] in headers
    ]


def _why(cases: list[_Case], brains: int) -> str:
    stacked = [case for case in cases if case.is_stacked and len(case.volumes) > 1]
    text = f"{len(cases)} NIfTI volumes"
    if stacked:
        channels = ", ".join(
            of.stem.removeprefix(stacked[0].name).lstrip("_-") for of in stacked[0].volumes
        )
        text += f", {len(stacked)} of them with the channels {channels}"
    return text + (f"; {brains} brain masks left out" if brains else "")
