"""Which group and which split every item goes to, by what the layout knows, by pictures, or by files that say so."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy import sparse
from scipy.sparse.csgraph import connected_components

from amlp_ray.config import PrepareConfig
from amlp_ray.data.layouts import SourceImage
from amlp_ray.data.manifest import SPLITS
from amlp_ray.data.prepare.near_duplicates import near_duplicate_groups, read_group_file
from amlp_ray.data.prepare.scan import ImageScan
from amlp_ray.data.prepare.splits import groups_cut, read_split_file, split_by_group
from amlp_ray.data.pseudonyms import pseudonym, salt
from amlp_ray.errors import DataError

FILES = ("split_file", "group_file", "file_list")  # settings that name a file of the user's


@dataclass(frozen=True)
class Given:
    """What the user's files say, by item id; None where there is no such file."""

    split_of: dict[str, str] | None
    group_of: dict[str, str] | None

    @classmethod
    def read(cls, config: PrepareConfig, items: Sequence[SourceImage]) -> Given:
        """Read split and group file. Raises DataError where one is missing, malformed, or leaves an image out."""
        ids = [item.id for item in items]
        split_of = read_split_file(config.split_file, ids) if config.split_file else None
        if not config.group_file:
            return cls(split_of, None)
        named = read_group_file(config.group_file, config.group_column)
        if items[0].format == "dicom":
            # Ids and patients are hashes, but the file names patients as the hospital does.
            secret = salt()
            hidden = {name: pseudonym(group, secret) for name, group in named.items()}
            named = {pseudonym(name, secret): group for name, group in hidden.items()} | hidden
        listed = [item for item in items if split_of is None or item.id in split_of]
        found = {item.id: named.get(item.id) or named.get(item.group) for item in listed}
        missing = [name for name, group in found.items() if group is None]
        if missing:
            raise DataError(
                f"{config.group_file} has no {config.group_column} for {len(missing)} of {len(listed)} images, "
                f"such as {missing[0]!r}; add a line for each."
            )
        return cls(split_of, {name: group for name, group in found.items() if group is not None})

    def lists(self, item: SourceImage) -> bool:
        return self.split_of is None or item.id in self.split_of


def assign(
    items: Sequence[SourceImage],
    looks: Sequence[ImageScan],
    given: Given,
    config: PrepareConfig,
    say: Callable[[str], None],
) -> tuple[list[str], list[str]]:
    """Name the group and the split of every item. No split cuts a group, unless a split file does; then it is said.

    Raises:
        DataError: groups cannot be told, are cut by the user's own split file, or leave a split empty.
    """
    groups = _groups(items, looks, given, config)
    if given.split_of is None:
        strata = [
            f"{item.stratum} {bool(item.masks or item.outlines)} {look.lesion}"
            for item, look in zip(items, looks, strict=True)
        ]
        images = [sum(len(frame.cuttings) for frame in look.frames) for look in looks]
        splits = split_by_group(groups, strata, config.fractions, config.seed, images)
        empty = [
            name
            for name, part in zip(SPLITS, config.fractions, strict=True)
            if part and name not in splits
        ]
        if empty:
            say(
                f"{' and '.join(empty)} stays empty: {len(set(groups))} groups are too few; give other fractions."
            )
        return groups, splits
    cut = groups_cut(given.split_of, dict(zip((item.id for item in items), groups, strict=True)))
    if cut and config.group_file:
        group, where = next(iter(cut.items()))
        raise DataError(
            f"{config.split_file} puts group {group!r} of {config.group_file} into {' and '.join(where)}; "
            f"a group must stay in one split, so move its images together."
        )
    if cut:  # our own guess at groups is no reason to refuse a published split, but one to speak up
        say(
            f"{len(cut)} groups of {group_rule(items, config)}, such as that of {next(iter(cut))!r}, lie in several "
            f"splits of {config.split_file}."
        )
    return groups, [given.split_of[item.id] for item in items]


def _groups(
    items: Sequence[SourceImage], looks: Sequence[ImageScan], given: Given, config: PrepareConfig
) -> list[str]:
    rule = _rule(items, config)
    if given.group_of is not None:
        return [given.group_of[item.id] for item in items]
    own = [item.group or item.id for item in items]
    if rule == "patient":
        if not any(item.group for item in items):
            raise DataError(
                f"The layout {config.layout} knows no patients, so group_by=patient has nothing to go by; give a "
                f"group_file with columns id and {config.group_column}, or group_by near-duplicates."
            )
        return own
    if rule == "image":
        return [item.id for item in items]
    return _linked(items, looks, own)


def _linked(items: Sequence[SourceImage], looks: Sequence[ImageScan], own: list[str]) -> list[str]:
    """Groups of items that share a patient or near-copies of a frame, named by the first of each."""
    owner = [i for i, look in enumerate(looks) for _ in look.frames]
    hashes = np.array([frame.hash for look in looks for frame in look.frames], np.uint64)
    max_identical_failures = near_duplicate_groups([str(i) for i in range(len(owner))], hashes)
    first = {name: i for i, name in reversed(list(enumerate(own)))}
    # An item is linked to the owner of the frame that its frames resemble, and to the first item of its patient.
    ends = (
        owner + list(range(len(items))),
        [owner[int(a)] for a in max_identical_failures] + [first[name] for name in own],
    )
    graph = sparse.coo_matrix(
        (np.ones(len(ends[0]), np.int8), ends), shape=(len(items), len(items))
    )
    _, labels = connected_components(graph, directed=False)
    _, firsts, inverse = np.unique(labels, return_index=True, return_inverse=True)
    return [own[i] for i in firsts[inverse].tolist()]


def _rule(items: Sequence[SourceImage], config: PrepareConfig) -> str:
    if config.group_by != "auto":
        return config.group_by
    return "patient" if any(item.group for item in items) else "near-duplicates"


def group_rule(items: Sequence[SourceImage], config: PrepareConfig) -> str:
    """What keeps images together, in words."""
    if config.group_file:
        return f"column {config.group_column} of {Path(config.group_file).name}"
    return {
        "patient": "patient, as the layout tells",
        "near-duplicates": "near-duplicates by perceptual hash",
        "image": "every image by itself",
    }[_rule(items, config)]


def split_rule(config: PrepareConfig) -> str:
    """What decides the split, in words."""
    if config.split_file:
        return f"as {Path(config.split_file).name} says; images it does not list are left out"
    fractions = "/".join(f"{fraction:g}" for fraction in config.fractions)
    return f"{fractions} by group, within classes, seed {config.seed}"


def file_digests(config: PrepareConfig) -> dict[str, str]:
    """The user's files by what they say, not by where they lie: SHA-256 by setting."""
    return {
        name: hashlib.sha256(Path(path).read_bytes()).hexdigest()
        for name in FILES
        if (path := getattr(config, name))
    }
