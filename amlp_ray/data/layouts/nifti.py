"""Read a folder of NIfTI volumes, with or without labels.

    imagesTr/la_003.nii.gz            labelsTr/la_003.nii.gz              MSD
    imagesTr/case_0000.nii.gz ..._0001.nii.gz   labelsTr/case.nii.gz      nnU-Net: channels
    BraTS_7/BraTS_7_t1.nii.gz ..._t1ce ..._t2 ..._flair   BraTS_7_seg     BraTS: channels
    sub-01/anat/sub-01_T1w.nii.gz     ..._T1w_label-lesion_mask.nii.gz    BIDS: an item per volume
    t2/t2.nii.gz                      t2/t2_seg-manual.nii.gz             flat or in folders

Labels are known by their folder or by their name (`nifti_names`). All slices of a patient share a
group.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field

from amlp_ray.config import PrepareConfig
from amlp_ray.data.layouts.item import Listing, RejectedFile, SourceImage, natural_key, rejected
from amlp_ray.data.layouts.nifti_names import Volume, groups_of, is_brain_mask, mask_bases, parse
from amlp_ray.data.path import DataPath
from amlp_ray.errors import DataError
from amlp_ray.utils.text import counted

# Channels of a BraTS case by all their names: of 2012-2021, of 2023 and later, and of MSD.
MODALITIES = {
    "t1": "t1",
    "t1n": "t1",
    "t1ce": "t1ce",
    "t1gd": "t1ce",
    "t1c": "t1ce",
    "t2": "t2",
    "t2w": "t2",
    "flair": "flair",
    "t2f": "flair",
}
MODALITY_ORDER = ("t1", "t1ce", "t2", "flair")
_NAMES = "|".join(sorted(MODALITIES, key=len, reverse=True))
BRATS = re.compile(rf"(?P<case>.+)[_-](?P<channel>{_NAMES})", re.IGNORECASE)
NNUNET = re.compile(r"(?P<case>.+)_(?P<channel>\d{4})")
MAX_CHANNELS = 16  # more numbered volumes of one name are no channels

Folder = tuple[str, ...]
# Volumes by channel, for each folder and case.
Scans = dict[tuple[Folder, str], dict[str, list[Volume]]]


@dataclass
class _Case:
    """Volumes that are read as one, and their labels."""

    name: str
    volumes: list[Volume]
    masks: list[str] = field(default_factory=list)
    is_stacked: bool = False

    def names(self) -> set[str]:
        """Return the names that a label may refer to, in lower case."""
        return {self.name.lower(), *(volume.stem.lower() for volume in self.volumes)}


def find_nifti(root: DataPath, config: PrepareConfig) -> Listing:
    """List the volumes below a folder, without opening one.

    A case that lacks a channel most cases have is rejected. Several label volumes of one image are
    united. Brain masks are no lesions and left out.

    Raises:
        DataError: the folder does not exist, or holds no volume.
    """
    names = sorted(root.names(), key=natural_key)
    images: list[Volume] = []
    labels: list[Volume] = []
    brain_mask_count = 0
    for name in names:
        volume = parse(name)
        if volume is None:
            continue
        if is_brain_mask(volume.stem):
            brain_mask_count += 1
        elif volume.is_label:
            labels.append(volume)
        else:
            images.append(volume)
    if not images:
        contents = f"{counted(len(names), 'file')}, no NIfTI among them"
        if labels:
            contents = counted(len(labels), "label volume")
        raise DataError(
            f"{root} holds {contents}, but the nifti layout needs image volumes (.nii, .nii.gz); "
            "give the folder that contains these, or use another layout."
        )
    cases, rejects = stack(images)
    rejected_names = {file.file for file in rejects}
    rejected_images = [volume for volume in images if volume.name in rejected_names]
    strays: list[RejectedFile] = []
    for label in _attach_labels(cases, labels):
        reason = "is a label volume without an image"
        if _belongs_to_any(label, rejected_images):
            reason = "belongs to a case that is rejected"
        strays.append(rejected(label.name, reason))
    rejects += strays + _reject_pairs(names)
    summary = _summarize(cases, brain_mask_count)
    items = to_items(root, cases)
    return Listing(items, sorted(rejects), summary, stray_masks=tuple(strays))


def stack(images: list[Volume]) -> tuple[list[_Case], list[RejectedFile]]:
    """Put the channels of each case together. A volume that is no channel is a case of its own.

    >>> names = [f"c{i}/c{i}_{name}.nii" for i in (1, 2) for name in ("flair", "T1", "t1gd", "t2w")]
    >>> cases, _ = stack([parse(name) for name in names])
    >>> [volume.stem for volume in cases[0].volumes]
    ['c1_T1', 'c1_t1gd', 'c1_t2w', 'c1_flair']
    """
    brats: Scans = defaultdict(lambda: defaultdict(list))
    for volume in images:
        match = BRATS.fullmatch(volume.stem)
        # Scans of a BIDS subject lie on grids of their own, so they are no channels.
        if match and not volume.stem.lower().startswith("sub-"):
            modality = MODALITIES[match["channel"].lower()]
            brats[volume.folder, match["case"]][modality].append(volume)
    cases, rejects = _keep_complete(brats, MODALITY_ORDER, min_channels=2)
    for scans in _find_numbered(images):
        channels = {channel for scan in scans.values() for channel in scan}
        more_cases, more_rejects = _keep_complete(scans, sorted(channels), min_channels=1)
        cases += more_cases
        rejects += more_rejects
    used_names = {file.file for file in rejects}
    for stacked in cases:
        used_names.update(volume.name for volume in stacked.volumes)
    for volume in images:
        if volume.name not in used_names:
            cases.append(_Case(volume.stem, [volume]))
    return sorted(cases, key=lambda case: natural_key(case.volumes[0].name)), rejects


def _find_numbered(images: list[Volume]) -> list[Scans]:
    """Return the scans of each folder whose volumes all have nnU-Net's channel numbers."""
    by_folder: dict[Folder, list[Volume]] = defaultdict(list)
    for volume in images:
        if volume.is_in_images:
            by_folder[volume.folder].append(volume)
    all_scans = [_scans_by_number(by_folder[folder]) for folder in sorted(by_folder)]
    return [scans for scans in all_scans if scans]


def _scans_by_number(volumes: list[Volume]) -> Scans:
    """Sort the volumes of a folder; nothing if one has no number or a case lacks 0000."""
    scans: Scans = defaultdict(lambda: defaultdict(list))
    for volume in volumes:
        match = NNUNET.fullmatch(volume.stem)
        if match is None:
            return {}
        scans[volume.folder, match["case"]][match["channel"]].append(volume)
    for channels in scans.values():
        if "0000" not in channels or sum(map(len, channels.values())) > MAX_CHANNELS:
            return {}
    return scans


def _keep_complete(
    scans: Scans, order: Iterable[str], *, min_channels: int
) -> tuple[list[_Case], list[RejectedFile]]:
    """Return the cases that have the channels most cases have, in order.

    Rejected are the volumes of other cases, and channels too many. If most cases have fewer than
    `min_channels` channels, nothing is returned and nothing rejected.
    """
    counts = Counter(channel for channels in scans.values() for channel in channels)
    expected = [channel for channel in order if 2 * counts[channel] > len(scans)]
    if len(expected) < min_channels:
        return [], []
    cases: list[_Case] = []
    rejects: list[RejectedFile] = []
    for (_, name), channels in scans.items():
        missing = [channel for channel in expected if channel not in channels]
        if not missing:
            volumes = [channels[channel][0] for channel in expected]
            cases.append(_Case(name, volumes, is_stacked=True))
        for channel, volumes in channels.items():
            surplus = volumes
            if missing:
                reason = f"belongs to a case that lacks {', '.join(missing)}, which most cases have"
            elif channel in expected:
                surplus = volumes[1:]
                reason = f"is a second {channel} volume of its case; the first is used"
            else:
                reason = f"is a {channel} volume, which most cases lack"
            rejects += [rejected(volume.name, reason) for volume in surplus]
    return cases, rejects


def _attach_labels(cases: list[_Case], labels: list[Volume]) -> list[Volume]:
    """Give each label volume to its case; return those without a case."""
    by_folder: dict[Folder, list[_Case]] = defaultdict(list)
    by_name: dict[str, list[_Case]] = defaultdict(list)
    for case in cases:
        by_folder[case.volumes[0].folder].append(case)
        for name in case.names():
            by_name[name].append(case)
    strays: list[Volume] = []
    for label in labels:
        label_case = _find_case(label, by_folder[label.folder], by_name)
        if label_case is None:
            strays.append(label)
        else:
            label_case.masks.append(label.name)
    return strays


def _find_case(
    label: Volume, neighbors: list[_Case], by_name: dict[str, list[_Case]]
) -> _Case | None:
    """Find the case of a label.

    Tried in turn: by name in its folder, by the start of its name, as the only one in its folder,
    by name anywhere.
    """
    stem = label.stem.lower()
    bases = mask_bases(stem)
    if label.is_in_labels:
        bases = [stem, *bases]
    for base in bases:
        matches = [case for case in neighbors if base in case.names()]
        if len(matches) == 1:
            return matches[0]
    best = _longest_start(stem, neighbors)
    if best is not None:
        return best
    if len(neighbors) == 1:
        # As case_07/imaging.nii.gz and case_07/segmentation.nii.gz. Not so in images and labels
        # folders, where names must agree.
        has_own_folder = label.is_in_labels and neighbors[0].volumes[0].is_in_images
        if not has_own_folder:
            return neighbors[0]
    for base in bases:
        if len(by_name.get(base, ())) == 1:
            return by_name[base][0]
    return None


def _longest_start(stem: str, cases: list[_Case]) -> _Case | None:
    """Return the case with the longest name that a label's name starts with; the last of equals."""
    best = None
    best_length = 0
    for case in cases:
        for name in case.names():
            is_start = re.match(rf"{re.escape(name)}[_\-.]", stem)
            if is_start and len(name) >= best_length:
                best = case
                best_length = len(name)
    return best


def _belongs_to_any(label: Volume, images: list[Volume]) -> bool:
    """Return whether a label is named like an image of its folder."""
    stem = label.stem.lower()
    starts = tuple(base for base in (stem, *mask_bases(stem)) if base)
    neighbors = [image.stem.lower() for image in images if image.folder == label.folder]
    return any(neighbor.startswith(starts) for neighbor in neighbors)


def to_items(root: DataPath, cases: list[_Case]) -> list[SourceImage]:
    """Name the cases: by file or case name if all differ, else by their path."""
    groups = groups_of([(case.name, case.volumes[0], case.is_stacked) for case in cases])
    has_unique_names = len({case.name for case in cases}) == len(cases)
    items = []
    for case, group in zip(cases, groups, strict=True):
        first = case.volumes[0].name
        folder = first.rpartition("/")[0]
        items.append(
            SourceImage(
                id=case.name if has_unique_names or not folder else f"{folder}/{case.name}",
                format="nifti",
                images=root.join(volume.name for volume in case.volumes),
                masks=root.join(case.masks),
                source=first,
                group=group,
            )
        )
    return items


def _reject_pairs(names: list[str]) -> list[RejectedFile]:
    reason = "is one half of a pair (.hdr and .img); single .nii or .nii.gz files are accepted"
    headers = {name[:-4] for name in names if name.lower().endswith(".hdr")}
    images = [name for name in names if name.lower().endswith(".img")]
    return [rejected(name, reason) for name in images if name[:-4] in headers]


def _summarize(cases: list[_Case], brain_mask_count: int) -> str:
    text = counted(len(cases), "NIfTI volume")
    stacked = [case for case in cases if case.is_stacked and len(case.volumes) > 1]
    if stacked:
        first = stacked[0]
        channels = [v.stem.removeprefix(first.name).lstrip("_-") for v in first.volumes]
        text += f", {len(stacked)} of them with the channels {', '.join(channels)}"
    if brain_mask_count:
        text += f"; {counted(brain_mask_count, 'brain mask')} left out"
    return text
