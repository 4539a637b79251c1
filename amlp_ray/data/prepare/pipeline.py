"""A folder of images -> a patch dataset, in two passes of Ray Data: look at everything, then write everything.

The same files and settings give the same bytes. A run that was killed goes on where it stopped. Nothing half-written is
ever readable: the manifest comes last. What cannot be used is left out and listed beside the dataset, in
`<name>.rejects.csv`. On a cluster, source and `out` must lie where every node sees them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from amlp_ray.config import PrepareConfig
from amlp_ray.data.dataset import PatchDataset
from amlp_ray.data.layouts import RejectedFile, SourceImage, find_items
from amlp_ray.data.manifest import MANIFEST, SPLITS, UNFINISHED, Counts, Manifest, Part
from amlp_ray.data.parquet import Shape, group_rows, part_rows
from amlp_ray.data.path import DataPath
from amlp_ray.data.prepare.assign import FILES, Given, assign, file_digests, group_rule, split_rule
from amlp_ray.data.prepare.consistency import Kind, agree
from amlp_ray.data.prepare.ray_tasks import run_jobs
from amlp_ray.data.prepare.rejects import Rejects
from amlp_ray.data.prepare.resume import ResumableError, Unfinished
from amlp_ray.data.prepare.scan import ImageScan, item_row, look_job, look_of
from amlp_ray.data.prepare.statistics import Statistics
from amlp_ray.data.prepare.writer import Row, part_job, write_job
from amlp_ray.data.pseudonyms import pseudonym, salt
from amlp_ray.errors import DataError

LOOK_ITEMS = 64  # pictures of a job of pass 1: some 100 ms of decoding, ten times what a task costs

Say = Callable[[str], None]
Progress = Callable[[str, int, int], None]


class Told(NamedTuple):
    """Whom to tell: `say` gets sentences; `progress` what is being done, how many are, and of how many."""

    say: Say = lambda sentence: None
    progress: Progress = lambda what, done, of: None


def prepare(
    source: str | Path | DataPath,
    out: str | Path | DataPath,
    config: PrepareConfig | None = None,
    *,
    strict: bool = False,
    told: Told | None = None,
) -> PatchDataset:
    """Write the images of `source` as a patch dataset `out` and open it. Both are paths or URIs.

    Uses Ray as it is initialised, or lets Ray Data start a local one. If `out` was prepared from the same files with
    the same settings, it is returned as it is.

    Args:
        source: folder in the layout `settings.layout`.
        out: folder to make; it must not exist, be empty, hold the very same dataset, or an unfinished one of the same.
        settings: layout, size, channels, groups and splits.
        strict: stop at the first file that cannot be used or needs a repair, instead of going on without it.

    Raises:
        DataError: nothing can be used, `out` is taken or cannot be written, or, if strict, any fault.
    """
    config, told = config or PrepareConfig(), told or Told()
    source, out = DataPath(source), DataPath(out)
    existing = _existing(out)
    listing = find_items(config, source)
    if listing.summary:
        told.say(listing.summary)
    rejects = Rejects(out, strict)
    rejects.add(fault._replace(file=_absolute(fault.file, source)) for fault in listing.rejected)
    config = config.model_copy(update={"layout": listing.layout})
    given = Given.read(config, listing.items)
    items = [item for item in listing.items if given.lists(item)]
    left_out = len(listing.items) - len(items)
    told.say(
        f"Looking at {len(items)} {'pictures' if items[0].format == 'picture' else 'series or volumes'} in {source}."
    )

    decided = [
        _values(config) | file_digests(config),
        _salt_mark(items, config),
        version("amlp-ray"),
    ]
    state = Unfinished(out, _digest([*decided, [item_row(item) for item in items]]))
    if existing is not None:  # a second look tells whether it is the same; nothing is written
        chosen = _choose(items, _look(items, config, {}, None, told), config, rejects)
        if existing.manifest.fingerprint != chosen.fingerprint:
            raise DataError(
                f"{out} is a patch dataset made from other files or settings; delete it or choose another folder."
            )
        state.finish()  # of a run that was killed right at its end
        rejects.write()
        told.say(
            f"{out} was already prepared from the same files with the same settings; nothing to do."
        )
        return existing
    try:
        with state.lock():
            manifest = _prepare(items, given, config, state, rejects, told)
            manifest = manifest.model_copy(update={"name": out.name, "left_out": left_out})
            (out / MANIFEST).atomic_write(
                json.dumps(manifest.model_dump(mode="json"), indent=1) + "\n"
            )
            rejects.write()
            state.finish()
    except OSError as error:
        raise DataError(
            f"{out} cannot be written ({error.strerror or error}); check the path, space and rights."
        ) from None
    _say_end(manifest, out, rejects, told.say)
    return PatchDataset.open(out)


def _existing(out: DataPath) -> PatchDataset | None:
    """Return the dataset at `out`; None if the place is free or holds an unfinished one.

    Raises:
        DataError: something else is there, or a dataset that cannot be opened.
    """
    if out.is_file():
        raise DataError(
            f"{out} exists and is not a patch dataset; delete it or choose another folder."
        )
    if not out.is_folder():
        return None
    if (out / MANIFEST).is_file():
        try:
            return PatchDataset.open(out)
        except DataError as error:
            raise DataError(f"{error} Delete {out} first.") from None
    if not (out / UNFINISHED).is_folder() and not out.is_empty():
        raise DataError(
            f"{out} exists and is not a patch dataset; delete it or choose another folder."
        )
    return None


class Chosen(NamedTuple):
    """The items that go into the dataset, what is known of each, and what they have in common."""

    items: list[SourceImage]
    looks: list[ImageScan]
    kind: Kind
    fingerprint: str


def _prepare(
    items: list[SourceImage],
    given: Given,
    config: PrepareConfig,
    state: Unfinished,
    rejects: Rejects,
    told: Told,
) -> Manifest:
    """Do all but the manifest. A fault leaves nothing behind, unless a next run can go on from there."""
    known = state.begin()  # outside: another's unfinished work is not ours to delete
    try:
        chosen = _choose(items, _look(items, config, known, state, told), config, rejects)
        groups, splits = assign(chosen.items, chosen.looks, given, config, told.say)
        rows = _rows(chosen, groups, splits, config)
        shape = chosen.kind.channels, config.size, config.size
        told.say(
            f"Writing {sum(map(len, rows.values()))} images of {config.size}x{config.size} pixels, "
            f"{chosen.kind.channels} channel(s), {chosen.kind.dtype}."
        )
        parts, mean, std = _write(rows, shape, chosen.kind.dtype, config, state, told)
    except ResumableError:
        raise
    except DataError:
        rejects.write()
        state.discard()
        raise
    return Manifest(
        created_by=f"amlp_ray {version('amlp-ray')}",
        name="",
        layout=config.layout,
        channels=shape[0],
        height=shape[1],
        width=shape[2],
        dtype=chosen.kind.dtype,
        mean=mean,
        std=std,
        counts={split: _counts(rows[split]) for split in SPLITS},
        parts=parts,
        group_rows=group_rows(shape, chosen.kind.dtype),
        split_rule=split_rule(config),
        group_rule=group_rule(chosen.items, config),
        left_out=0,
        rejected=rejects.rejected,
        dropped=sum(look.dropped for look in chosen.looks),
        salt=_salt_mark(items, config),
        config=_without_folders(config),
        fingerprint=chosen.fingerprint,
    )


def _look(
    items: Sequence[SourceImage],
    config: PrepareConfig,
    known: dict[int, Any],
    state: Unfinished | None,
    told: Told,
) -> list[ImageScan]:
    """Pass 1, in parallel; results in the order of `items`. Jobs that are `known` are not done again."""
    size = LOOK_ITEMS if items[0].format == "picture" else 1
    batches = [items[start : start + size] for start in range(0, len(items), size)]
    results = dict(known)
    done = sum(len(batches[number]) for number in results)
    jobs = [
        (number, {"config": _values(config), "items": [item_row(item) for item in batch]})
        for number, batch in enumerate(batches)
        if number not in results
    ]
    told.progress("looking", done, len(items))
    for number, result in run_jobs(jobs, look_job):
        results[number] = result
        if state:
            state.add_looked(number, result)
        done += len(batches[number])
        told.progress("looking", done, len(items))
    if state:
        state.flush()
    return [look_of(row) for number in range(len(batches)) for row in results.pop(number)]


def _choose(
    items: Sequence[SourceImage],
    looks: Sequence[ImageScan],
    config: PrepareConfig,
    rejects: Rejects,
) -> Chosen:
    """Leave out what has faults or does not fit the rest. Raises DataError where nothing is left."""
    pairs = list(zip(items, looks, strict=True))
    rejects.add(_fault(item, look.fault) for item, look in pairs if look.fault)
    rejects.add(
        RejectedFile(item.images[0], "repaired", note)
        for item, look in pairs
        for note in look.notes
    )
    good = [(item, look) for item, look in pairs if not look.fault]
    if not good:
        raise DataError(f"None of {len(items)} images can be used. The first: {rejects.first()}")
    kind, at, faults = agree([item for item, _ in good], [look for _, look in good], config)
    rejects.add(faults)
    if not at:
        raise DataError(f"None of {len(items)} images can be used. The first: {rejects.first()}")
    kept = [good[i] for i in at if good[i][1].frames]
    if not kept:
        raise DataError(
            f"No image is left of {len(items)}: all hold less tissue than --min-foreground "
            f"{config.min_foreground:g}; lower it."
        )
    named = [
        [item.id, item.source, item.group, bool(item.masks or item.outlines), look.digest]
        for item, look in kept
    ]
    mark = _salt_mark(items, config)
    fingerprint = _digest([_values(config) | file_digests(config), mark, named])
    return Chosen([item for item, _ in kept], [look for _, look in kept], kind, fingerprint)


def _rows(
    chosen: Chosen, groups: Sequence[str], splits: Sequence[str], config: PrepareConfig
) -> dict[str, list[Row]]:
    """The images of every split, in the order they are stored."""
    hide = _hider(config)
    rows: dict[str, list[Row]] = {split: [] for split in SPLITS}
    for item, look, group, split in zip(chosen.items, chosen.looks, groups, splits, strict=True):
        name, shown = hide(item, item.id), hide(item, item.source)
        for frame in look.frames:
            of_frame = name if item.format == "picture" else f"{name}/{frame.number:04d}"
            for cutting in frame.cuttings:
                whole = of_frame if config.fit != "tiles" else f"{of_frame}@{cutting.y},{cutting.x}"
                rows[split].append(
                    Row(item, look.digest, frame, cutting, whole, hide(item, group), shown)
                )
    if not rows["train"]:
        raise DataError(
            "No image is left for train: those of its groups hold too little tissue; lower min_foreground."
        )
    return rows


def _hider(config: PrepareConfig) -> Callable[[SourceImage, str], str]:
    """What turns names of files into hashes where asked; DICOM's are hashes from the start."""
    if not config.hash_names:
        return lambda item, name: name
    secret = salt()
    return lambda item, name: name if item.format == "dicom" else pseudonym(name, secret)


def _salt_mark(items: Sequence[SourceImage], config: PrepareConfig) -> str | None:
    """A few digits that tell one salt from another, and nothing of what it is."""
    return (
        pseudonym("salt", salt())[:8] if config.hash_names or items[0].format == "dicom" else None
    )


def _write(
    rows: dict[str, list[Row]],
    shape: Shape,
    dtype: str,
    config: PrepareConfig,
    state: Unfinished,
    told: Told,
) -> tuple[dict[str, list[Part]], tuple[float, ...], tuple[float, ...]]:
    """Pass 2: write the parts that are not there yet; return them, with mean and SD of the training split."""
    size, total = part_rows(shape, dtype), sum(map(len, rows.values()))
    names = [(split, number) for split in SPLITS for number in range(-(-len(rows[split]) // size))]
    known = {at: state.part(f"{at[0]}-{at[1]:05d}") for at in names}
    jobs = []
    for index, (split, number) in enumerate(names):
        if known[split, number] is None:
            place = state.out / f"{split}/part-{number:05d}.parquet"
            of_part = rows[split][number * size : (number + 1) * size]
            jobs.append((index, part_job(place, of_part, config, shape, dtype)))
    done = sum(part["rows"] for part in known.values() if part)
    told.progress("writing", done, total)
    for index, result in run_jobs(jobs, write_job):
        if "fault" in result:
            raise (ResumableError if result["resumable"] else DataError)(result["fault"])
        split, number = names[index]
        file = f"{split}/part-{number:05d}.parquet"
        if (state.out / file).info().size != result["bytes"]:
            raise DataError(
                f"{state.out / file} was written by another node and is not visible here; share the folder."
            )
        known[split, number] = {"file": file, **result}
        state.add_part(f"{split}-{number:05d}", {"file": file, **result})
        done += result["rows"]
        told.progress("writing", done, total)
    parts: dict[str, list[Part]] = {split: [] for split in SPLITS}
    statistics = Statistics(shape[0], dtype)
    for (split, _), part in known.items():
        assert part is not None
        parts[split].append(Part(file=part["file"], rows=part["rows"], bytes=part["bytes"]))
        if split == "train":
            statistics.add_plain(part["statistics"])
    return parts, *statistics.mean_and_sd()


def _counts(rows: Sequence[Row]) -> Counts:
    labeled = sum(bool(row.item.masks or row.item.outlines) for row in rows)
    return Counts(
        images=len(rows), labeled=labeled, lesions=sum(row.cutting.lesion for row in rows)
    )


def _say_end(manifest: Manifest, out: DataPath, rejects: Rejects, say: Say) -> None:
    counts = ", ".join(f"{split} {manifest.counts[split].images}" for split in SPLITS)
    left = f"; {manifest.left_out} left out as not listed" if manifest.left_out else ""
    air = (
        f"; {manifest.dropped} tiles or slices left out as mostly background"
        if manifest.dropped
        else ""
    )
    say(f"Wrote {out}: {counts}{left}{air}.")
    if rejects.rejected or rejects.repaired:
        say(
            f"{rejects.rejected} files rejected and {rejects.repaired} repaired, see {rejects.place}."
        )


def _fault(item: SourceImage, sentence: str) -> RejectedFile:
    """A sentence that begins with the file's name as a line of the list, which has the name apart."""
    return RejectedFile(item.images[0], "rejected", sentence.removeprefix(f"{item.images[0]} "))


def _absolute(file: str, source: DataPath) -> str:
    return file if file.startswith("/") or "://" in file else str(source / file)


def _without_folders(config: PrepareConfig) -> PrepareConfig:
    """Settings whose files are named without their folders: paths hold names of people, and differ by machine."""
    files = {name: Path(path).name for name in FILES if (path := getattr(config, name))}
    return config.model_copy(update=files)


def _values(config: PrepareConfig) -> dict[str, Any]:
    return config.model_dump(mode="json")


def _digest(values: Any) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
