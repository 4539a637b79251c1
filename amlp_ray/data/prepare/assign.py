"""Assign every item to a group and a split: by layout, near-duplicates or files of the user."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from amlp_ray.config import PrepareConfig
from amlp_ray.data.layouts import SourceImage
from amlp_ray.data.manifest import GROUP_RULES, SPLITS
from amlp_ray.data.prepare.near_duplicates import connect, find_chains, read_group_file
from amlp_ray.data.prepare.scan import ScannedItem
from amlp_ray.data.prepare.splits import find_cut_groups, read_split_file, split_by_group
from amlp_ray.data.pseudonyms import pseudonym, salt
from amlp_ray.errors import DataError

logger = logging.getLogger(__name__)

FILE_FIELDS = ("split_file", "group_file", "file_list")  # fields that name a file of the user's


@dataclass(frozen=True)
class UserFiles:
    """What the user's files say, by item id; None if there is no such file."""

    split_of: dict[str, str] | None
    group_of: dict[str, str] | None

    @classmethod
    def from_config(cls, config: PrepareConfig, items: Sequence[SourceImage]) -> UserFiles:
        """Read split and group file.

        Raises:
            DataError: a file is missing or malformed, or the group file leaves an image out.
        """
        ids = [item.id for item in items]
        split_of = read_split_file(config.split_file, ids) if config.split_file else None
        if not config.group_file:
            return cls(split_of, None)
        groups = read_group_file(config.group_file, config.group_column)
        if items[0].format == "dicom":
            groups = _hide_names(groups)
        group_of: dict[str, str] = {}
        missing = []
        listed = [item for item in items if split_of is None or item.id in split_of]
        for item in listed:
            # The file may name images, or the patients that the layout knows.
            group = groups.get(item.id) or groups.get(item.group)
            if group is None:
                missing.append(item.id)
            else:
                group_of[item.id] = group
        if missing:
            raise DataError(
                f"{config.group_file} has no {config.group_column} for {len(missing)} of "
                f"{len(listed)} images, such as {missing[0]!r}; add a line for each."
            )
        return cls(split_of, group_of)

    def lists(self, item: SourceImage) -> bool:
        """Return whether the item is to be used."""
        return self.split_of is None or item.id in self.split_of


def _hide_names(groups: dict[str, str]) -> dict[str, str]:
    """Hash groups, and ids as well: of DICOM, items are hashed, but the file has plain names."""
    secret = salt()
    by_plain_name = {name: pseudonym(group, secret) for name, group in groups.items()}
    by_hash = {pseudonym(name, secret): group for name, group in by_plain_name.items()}
    return by_hash | by_plain_name


def assign(
    scanned: Sequence[ScannedItem], user_files: UserFiles, config: PrepareConfig
) -> tuple[list[str], list[str]]:
    """Name the group and the split of every item.

    No split cuts a group, unless a split file does. Cut groups that were guessed are logged.

    Raises:
        DataError: groups are unknown, are cut by the user's own split file, or leave a split empty.
    """
    groups = _groups(scanned, user_files, config)
    if user_files.split_of is None:
        return groups, _draw_splits(scanned, groups, config)
    ids = [item.id for item, _ in scanned]
    cut = find_cut_groups(user_files.split_of, dict(zip(ids, groups, strict=True)))
    if cut and config.group_file:
        group, splits = next(iter(cut.items()))
        raise DataError(
            f"{config.split_file} puts group {group!r} of {config.group_file} into "
            f"{' and '.join(splits)}; a group must stay in one split, so move its images together."
        )
    if cut:  # a guess at groups is no reason to refuse a published split, but one to speak up
        rule = group_rule(scanned, config)
        message = "%d groups of %s, such as that of %r, lie in several splits of %s."
        logger.info(message, len(cut), rule, next(iter(cut)), config.split_file)
    return groups, [user_files.split_of[name] for name in ids]


def _draw_splits(
    scanned: Sequence[ScannedItem], groups: Sequence[str], config: PrepareConfig
) -> list[str]:
    strata = []
    images = []
    for item, scan in scanned:
        strata.append(f"{item.stratum} {item.is_labeled} {scan.lesion}")
        images.append(scan.num_images)
    splits = split_by_group(groups, strata, config.fractions, config.seed, images)
    fractions = zip(SPLITS, config.fractions, strict=True)
    empty = [split for split, fraction in fractions if fraction and split not in splits]
    if empty:
        message = "%s stays empty: %d groups are too few; give other fractions."
        logger.info(message, " and ".join(empty), len(set(groups)))
    return splits


def _groups(
    scanned: Sequence[ScannedItem], user_files: UserFiles, config: PrepareConfig
) -> list[str]:
    if user_files.group_of is not None:
        return [user_files.group_of[item.id] for item, _ in scanned]
    rule = _resolve_rule(scanned, config)
    if rule == "image":
        return [item.id for item, _ in scanned]
    layout_groups = [item.group or item.id for item, _ in scanned]
    if rule == "near-duplicates":
        return _join_near_duplicates(scanned, layout_groups)
    if not _knows_patients(scanned):
        raise DataError(
            f"The layout {config.layout} knows no patients, so group_by=patient has nothing to go "
            f"by; give a group_file with columns id and {config.group_column}, or group_by "
            f"near-duplicates."
        )
    return layout_groups


def _knows_patients(scanned: Sequence[ScannedItem]) -> bool:
    return any(item.group for item, _ in scanned)


def _join_near_duplicates(scanned: Sequence[ScannedItem], groups: Sequence[str]) -> list[str]:
    """Join items that share a group or near-copies of a frame; the first item names the group."""
    owner = []  # item of each frame
    hashes = []
    for i, (_, scan) in enumerate(scanned):
        for frame in scan.frames:
            owner.append(i)
            hashes.append(frame.hash)
    # Link an item to the owners of frames that its frames resemble, and to the first of its group.
    left = owner + list(range(len(scanned)))
    right = [owner[frame] for frame in find_chains(np.array(hashes, np.uint64)).tolist()]
    first_item: dict[str, int] = {}
    for i, group in enumerate(groups):
        right.append(first_item.setdefault(group, i))
    first = connect(np.array(left), np.array(right), len(scanned))
    return [groups[i] for i in first.tolist()]


def _resolve_rule(scanned: Sequence[ScannedItem], config: PrepareConfig) -> str:
    if config.group_by != "auto":
        return config.group_by
    return "patient" if _knows_patients(scanned) else "near-duplicates"


def group_rule(scanned: Sequence[ScannedItem], config: PrepareConfig) -> str:
    """Describe what keeps images together."""
    if config.group_file:
        return f"column {config.group_column} of {Path(config.group_file).name}"
    return GROUP_RULES[_resolve_rule(scanned, config)]


def split_rule(config: PrepareConfig) -> str:
    """Describe what decides the split."""
    if config.split_file:
        return f"as {Path(config.split_file).name} says; images it does not list are left out"
    fractions = "/".join(f"{fraction:g}" for fraction in config.fractions)
    return f"{fractions} by group, within classes, seed {config.seed}"


def file_digests(config: PrepareConfig) -> dict[str, str]:
    """Hash the contents of the user's files, by field: their paths do not matter."""
    digests = {}
    for name in FILE_FIELDS:
        path = getattr(config, name)
        if path:
            digests[name] = hashlib.sha256(Path(path).read_bytes()).hexdigest()
    return digests
