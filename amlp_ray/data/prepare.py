"""A folder of images -> a patch dataset, in two passes of Ray Data: look at everything, then write everything.

The same files and settings give the same bytes. Nothing half-written is ever readable: parts are written beside `out`
and moved there at the end. On a cluster, source and `out` must lie where every node sees them.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path, PurePosixPath

import numpy as np

from amlp_ray.config import PrepareSettings
from amlp_ray.data.dataset import MANIFEST, SPLITS, Counts, Manifest, PatchDataset
from amlp_ray.data.grouping import near_duplicate_groups, read_group_file
from amlp_ray.data.scan import Scan, scan
from amlp_ray.data.sources import Item, find_items
from amlp_ray.data.splitting import groups_cut, read_split_file, split_by_group
from amlp_ray.data.write import Row, write_rows
from amlp_ray.errors import DataError

Say = Callable[[str], None]


def prepare(
    source: str | Path, out: str | Path, settings: PrepareSettings, *, progress: Say | None = None
) -> PatchDataset:
    """Write the images of `source` as a patch dataset `out` and open it.

    Uses Ray as it is initialised, or lets Ray Data start a local one. If `out` was prepared from the same files with
    the same settings, it is returned as it is.

    Args:
        source: folder in the layout `settings.layout`.
        out: folder to make; it must not exist, be empty, or hold the very same dataset.
        settings: size, channels, groups and splits.
        progress: is told a sentence now and then.

    Raises:
        DataError: any file that cannot be used; all are checked before anything is written.
    """
    say = progress or (lambda sentence: None)
    source, out = Path(source).absolute(), Path(out).absolute()
    existing = _existing(out)
    items = find_items(settings.layout, source)
    split_of = read_split_file(settings.split_file, [item.id for item in items]) if settings.split_file else None
    listed = [item for item in items if split_of is None or item.id in split_of]
    ids = [item.id for item in listed]
    given_groups = read_group_file(settings.group_file, ids) if settings.group_file else None

    say(f"Looking at {len(listed)} images in {source}.")
    scans = scan(listed)
    dtype = _dtype(listed, scans)
    channels = _channels(settings, scans)
    fingerprint = _fingerprint(settings, listed, scans)
    if existing is not None:
        if existing.manifest.fingerprint == fingerprint:
            say(f"{out} was already prepared from the same files with the same settings; nothing to do.")
            return existing
        raise DataError(
            f"{out} is a patch dataset made from other files or settings; delete it or choose another folder."
        )

    groups = given_groups or _groups(settings, ids, scans)
    splits = _splits(settings, listed, scans, groups, split_of, say)
    rows = [Row(*of) for of in zip(listed, scans, groups, splits, strict=True)]
    say(f"Writing {len(rows)} images of {settings.size}x{settings.size} pixels, {channels} channel(s), {dtype}.")
    partial = out.with_name(f".{out.name}.partial-{os.getpid()}")
    try:
        parts, mean, std = write_rows(rows, partial, settings.size, channels, dtype)
        manifest = Manifest(
            created_by=f"amlp_ray {version('amlp-ray')}",
            name=out.name,
            channels=channels,
            height=settings.size,
            width=settings.size,
            dtype=dtype,
            mean=mean,
            std=std,
            counts={split: _counts(rows, split) for split in SPLITS},
            parts=parts,
            split_rule=_split_rule(settings),
            group_rule=_group_rule(settings),
            left_out=len(items) - len(listed),
            settings=settings,
            fingerprint=fingerprint,
        )
        (partial / MANIFEST).write_text(json.dumps(manifest.model_dump(mode="json"), indent=1) + "\n")
        if out.exists():  # empty, see `_existing`
            out.rmdir()
        partial.rename(out)
    except OSError as error:
        raise DataError(
            f"{out} cannot be written ({error.strerror or error}); check the path, space and rights."
        ) from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    counts = ", ".join(f"{split} {manifest.counts[split].images}" for split in SPLITS)
    say(f"Wrote {out}: {counts}" + (f"; {manifest.left_out} left out as not listed." if manifest.left_out else "."))
    return PatchDataset.open(out)


def _existing(out: Path) -> PatchDataset | None:
    """Return the dataset at `out`, None if the place is free. Raises DataError where something else is there."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    if not (out / MANIFEST).is_file():
        raise DataError(f"{out} exists and is not a patch dataset; delete it or choose another folder.")
    try:
        return PatchDataset.open(out)
    except DataError as error:
        raise DataError(f"{error} Delete {out} first.") from None


def _dtype(items: Sequence[Item], scans: Sequence[Scan]) -> str:
    first = scans[0].dtype
    for item, found in zip(items, scans, strict=True):
        if found.dtype != first:
            raise DataError(
                f"{item.image} is {found.dtype}, but {items[0].source} is {first}; all images must have the "
                f"same depth, so convert one kind."
            )
    return first


def _channels(settings: PrepareSettings, scans: Sequence[Scan]) -> int:
    if settings.channels == "auto":
        return 1 if all(found.grey for found in scans) else 3
    return settings.channels


def _fingerprint(settings: PrepareSettings, items: Sequence[Item], scans: Sequence[Scan]) -> str:
    """Hash what decides the dataset; split and group file by what they say, not by where they lie."""
    values = settings.model_dump(mode="json")
    for name in ("split_file", "group_file"):
        if values[name]:
            values[name] = hashlib.sha256(Path(values[name]).read_bytes()).hexdigest()
    digest = hashlib.sha256(json.dumps(values, sort_keys=True).encode())
    for item, found in zip(items, scans, strict=True):
        digest.update(json.dumps([item.id, item.source, bool(item.masks), found.digest]).encode())
    return digest.hexdigest()


def _groups(settings: PrepareSettings, ids: list[str], scans: Sequence[Scan]) -> list[str]:
    if settings.group_by == "image":
        return ids
    return near_duplicate_groups(ids, np.stack([found.thumbnail for found in scans]))


def _splits(
    settings: PrepareSettings,
    items: Sequence[Item],
    scans: Sequence[Scan],
    groups: Sequence[str],
    split_of: dict[str, str] | None,
    say: Say,
) -> list[str]:
    if split_of is None:
        # The folder of a file is its class in the busi layout and the same for all in others.
        strata = [
            f"{PurePosixPath(item.source).parent} {bool(item.masks)} {found.lesion}"
            for item, found in zip(items, scans, strict=True)
        ]
        return split_by_group(groups, strata, settings.fractions, settings.seed)
    cut = groups_cut(split_of, dict(zip((item.id for item in items), groups, strict=True)))
    if cut and settings.group_file:
        group, where = next(iter(cut.items()))
        raise DataError(
            f"{settings.split_file} puts group {group!r} of {settings.group_file} into {' and '.join(where)}; "
            f"a group must stay in one split, so move its images together."
        )
    if cut:  # our own guess at groups is no reason to refuse a published split, but one to speak up
        say(f"{len(cut)} groups of near-copies, such as that of {next(iter(cut))!r}, lie in several splits.")
    return [split_of[item.id] for item in items]


def _counts(rows: Sequence[Row], split: str) -> Counts:
    members = [row for row in rows if row.split == split]
    labelled = sum(bool(row.item.masks) for row in members)
    return Counts(images=len(members), labelled=labelled, lesions=sum(row.scan.lesion for row in members))


def _split_rule(settings: PrepareSettings) -> str:
    if settings.split_file:
        return f"as {Path(settings.split_file).name} says; images it does not list are left out"
    fractions = "/".join(f"{fraction:g}" for fraction in settings.fractions)
    return f"{fractions} by group, within classes, seed {settings.seed}"


def _group_rule(settings: PrepareSettings) -> str:
    if settings.group_file:
        return f"as {Path(settings.group_file).name} says"
    return "near-duplicates by thumbnail" if settings.group_by == "near-duplicates" else "every image by itself"
