"""Assign every item to a group and a split: by layout, near-duplicates or files of the user."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from amlp_ray.config import PrepareConfig
from amlp_ray.data.layouts import SourceImage
from amlp_ray.data.manifest import GROUP_RULES, SPLITS, Counts
from amlp_ray.data.prepare.near_duplicates import connect, find_chains, read_group_file
from amlp_ray.data.prepare.random_split import split_by_group
from amlp_ray.data.prepare.scan import ScannedItem
from amlp_ray.data.prepare.splits import find_cut_groups, read_split_file
from amlp_ray.data.pseudonyms import pseudonym, salt
from amlp_ray.errors import DataError
from amlp_ray.utils.text import counted

logger = logging.getLogger(__name__)

FILE_FIELDS = ("split_file", "group_file", "file_list")  # fields that name a file of the user's


@dataclass(frozen=True)
class UserFiles:
    """What the user's files say, by item id; None if there is no such file."""

    split_of: dict[str, str] | None
    group_of: dict[str, str] | None
    balanced: dict[str, dict[str, str]]  # by column of the group file

    @classmethod
    def from_config(cls, config: PrepareConfig, items: Sequence[SourceImage]) -> UserFiles:
        """Read split and group file.

        Raises:
            DataError: a file is missing or malformed, or the group file leaves an image out.
        """
        ids = [item.id for item in items]
        split_of = read_split_file(config.split_file, ids) if config.split_file else None
        if not config.group_file:
            return cls(split_of, None, {})
        listed = [item for item in items if split_of is None or item.id in split_of]
        columns = {}
        for column in (config.group_column, *config.balance_columns):
            columns[column] = _read_column(config.group_file, column, listed)
        group_of = columns.pop(config.group_column)
        if listed[0].format == "dicom":
            secret = salt()
            group_of = {name: pseudonym(group, secret) for name, group in group_of.items()}
        return cls(split_of, group_of, columns)

    def lists(self, item: SourceImage) -> bool:
        """Return whether the item is to be used."""
        return self.split_of is None or item.id in self.split_of


def _read_column(file: str, column: str, items: Sequence[SourceImage]) -> dict[str, str]:
    """Read a value for every item. The file may name images, or the patients of the layout."""
    values = read_group_file(file, column)
    if items[0].format == "dicom":
        # Items are hashed, but the file has plain names.
        secret = salt()
        values |= {pseudonym(name, secret): value for name, value in values.items()}
    value_of: dict[str, str] = {}
    missing = []
    for item in items:
        value = values.get(item.id) or values.get(item.group)
        if value is None:
            missing.append(item.id)
        else:
            value_of[item.id] = value
    if missing:
        raise DataError(
            f"{file} has no {column} for {len(missing)} of {len(items)} images, such as "
            f"{missing[0]!r}; add a line for each."
        )
    return value_of


class ImageCounts(NamedTuple):
    """Numbers of images of each item, by kind."""

    kinds: list[str]  # images, labeled, lesions, and then those of each class and site
    values: np.ndarray  # (items, kinds) int64


class Assignment(NamedTuple):
    """Group and split of every item."""

    groups: list[str]
    splits: list[str]
    counts: dict[str, Counts]  # by split


def assign(
    scanned: Sequence[ScannedItem], user_files: UserFiles, config: PrepareConfig
) -> Assignment:
    """Name the group and the split of every item.

    No split cuts a group, unless a split file does. Cut groups that were guessed are logged.

    Raises:
        DataError: groups are unknown, are cut by the user's own split file, or leave a split empty.
    """
    groups = _groups(scanned, user_files, config)
    counts = _count_images(scanned, user_files, hide_names=config.hash_names)
    if user_files.split_of is None:
        advice = _advise_on_groups(scanned, config)
        splits = split_by_group(groups, counts.values, config.fractions, config.seed, advice)
        _tell_empty_splits(splits, groups, config)
    else:
        splits = [user_files.split_of[item.id] for item, _ in scanned]
        _check_cut_groups(scanned, groups, splits, config)
    return Assignment(groups, splits, _counts_of_splits(groups, splits, counts))


def _advise_on_groups(scanned: Sequence[ScannedItem], config: PrepareConfig) -> str:
    """Say what can be done where one group is too large to be split."""
    if config.group_file:
        return f"give other fractions, or smaller groups in {config.group_file}"
    rule = _resolve_rule(scanned, config)
    if rule == "image":
        return "give other fractions, or more files, since the slices of one stay together"
    if rule == "patient":
        return "give other fractions, or images of more patients"
    return "give other fractions or a group_file, or set group_by to image if these are not copies"


def _check_cut_groups(
    scanned: Sequence[ScannedItem],
    groups: Sequence[str],
    splits: Sequence[str],
    config: PrepareConfig,
) -> None:
    ids = [item.id for item, _ in scanned]
    split_of = dict(zip(ids, splits, strict=True))
    cut = find_cut_groups(split_of, dict(zip(ids, groups, strict=True)))
    if cut and config.group_file:
        group, names = next(iter(cut.items()))
        raise DataError(
            f"{config.split_file} puts group {group!r} of {config.group_file} into "
            f"{' and '.join(names)}; a group must stay in one split, so move its images together."
        )
    if cut:  # a guess at groups is no reason to refuse a published split, but one to speak up
        rule = group_rule(scanned, config)
        message = "%s of %s, such as that of %r, cut by the splits of %s."
        logger.info(message, counted(len(cut), "group"), rule, next(iter(cut)), config.split_file)


def _tell_empty_splits(splits: Sequence[str], groups: Sequence[str], config: PrepareConfig) -> None:
    fractions = zip(SPLITS, config.fractions, strict=True)
    empty = [split for split, fraction in fractions if fraction and split not in splits]
    if empty:
        message = "%s stays empty: there are too few groups (%d); give other fractions."
        logger.info(message, " and ".join(empty), len(set(groups)))


def _count_images(
    scanned: Sequence[ScannedItem], user_files: UserFiles, *, hide_names: bool
) -> ImageCounts:
    """Count what splits share evenly. A class that all images have is left out.

    Args:
        hide_names: number classes and sites instead of naming them.
    """
    traits = {"class": [item.stratum for item, _ in scanned]}
    traits["site"] = [item.site for item, _ in scanned]
    for column, value_of in user_files.balanced.items():
        traits[column] = [value_of[item.id] for item, _ in scanned]
    images = np.array([scan.num_images for _, scan in scanned])
    kinds = ["images", "labeled", "lesions"]
    columns = [images, images * [item.is_labeled for item, _ in scanned]]
    columns.append(np.array([scan.num_lesions for _, scan in scanned]))
    for trait, values in traits.items():
        names = sorted(set(values))
        for number, name in enumerate(names if len(names) > 1 else (), 1):
            kinds.append(f"{trait} {number if hide_names else name or 'unknown'}")
            columns.append(images * (np.asarray(values, dtype=object) == name))
    return ImageCounts(kinds, np.stack(columns, axis=1).astype(np.int64))


def _counts_of_splits(
    groups: Sequence[str], splits: Sequence[str], counts: ImageCounts
) -> dict[str, Counts]:
    result = {}
    for split in SPLITS:
        is_member = np.asarray(splits) == split
        totals = counts.values[is_member].sum(axis=0).tolist()
        of_kind = dict(zip(counts.kinds, totals, strict=True))
        result[split] = Counts(
            groups=len(
                {group for group, name in zip(groups, splits, strict=True) if name == split}
            ),
            images=of_kind.pop("images"),
            labeled=of_kind.pop("labeled"),
            lesions=of_kind.pop("lesions"),
            kinds=of_kind,
        )
    return result


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
    if config.group_by == "patient" and _group_kinds(scanned) != ["patient"]:
        raise DataError(
            f"The layout {config.layout} does not know the patients of all images, so "
            f"group_by=patient has nothing to go by; give a group_file with columns id and "
            f"{config.group_column}, or group_by auto."
        )
    return layout_groups


def _group_kinds(scanned: Sequence[ScannedItem]) -> list[str]:
    """Return in words what the groups of the layout are; empty if any item has none."""
    kinds = {item.group_kind if item.group else "" for item, _ in scanned}
    return [] if "" in kinds else sorted(kinds)


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
    return "patient" if _group_kinds(scanned) else "near-duplicates"


def group_rule(scanned: Sequence[ScannedItem], config: PrepareConfig) -> str:
    """Describe what keeps images together."""
    if config.group_file:
        return f"column {config.group_column} of {Path(config.group_file).name}"
    rule = _resolve_rule(scanned, config)
    kinds = _group_kinds(scanned)
    if rule == "patient" and kinds != ["patient"]:
        return f"{' or '.join(kinds)}, as the layout tells; patients are not known"
    return GROUP_RULES[rule]


def split_rule(config: PrepareConfig, counts: Counts) -> str:
    """Describe what decides the split, and what it balances."""
    if config.split_file:
        return f"as {Path(config.split_file).name} says; images it does not list are left out"
    fractions = "/".join(f"{fraction:g}" for fraction in config.fractions)
    balanced = ["images"]
    if counts.labeled:
        balanced.append("lesions")
    traits = dict.fromkeys(["class", "site", *config.balance_columns])
    balanced += [
        trait for trait in traits if any(kind.startswith(f"{trait} ") for kind in counts.kinds)
    ]
    return f"{fractions} by group, balanced in {', '.join(balanced)}, seed {config.seed}"


def file_digests(config: PrepareConfig) -> dict[str, str]:
    """Hash the contents of the user's files, by field: their paths do not matter."""
    digests = {}
    for name in FILE_FIELDS:
        path = getattr(config, name)
        if path:
            digests[name] = hashlib.sha256(Path(path).read_bytes()).hexdigest()
    return digests
