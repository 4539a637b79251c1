"""Turn a folder of images into a patch dataset.

Pass 1 scans every file, then groups and splits are assigned, then pass 2 writes every image. Both
passes run on Ray Data.

The same files and config give the same bytes. A run that was killed resumes where it stopped.
Nothing half-written is ever readable, because the manifest is written last. Files that cannot be
used are skipped and listed in `<name>.rejects.csv` beside the dataset. On a cluster, every node
must see the source and `out`.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from amlp_ray.config import PrepareConfig
from amlp_ray.data.dataset import PatchDataset
from amlp_ray.data.decoders import MaskRule
from amlp_ray.data.layouts import find_items
from amlp_ray.data.layouts.item import rejected, repaired
from amlp_ray.data.manifest import (
    MANIFEST,
    SPLITS,
    UNFINISHED,
    Manifest,
    Part,
    write_manifest,
)
from amlp_ray.data.parquet import group_rows, part_rows
from amlp_ray.data.path import DataPath
from amlp_ray.data.prepare.assign import (
    Assignment,
    UserFiles,
    assign,
    file_digests,
    group_rule,
    split_rule,
)
from amlp_ray.data.prepare.consistency import PixelFormat, choose_format
from amlp_ray.data.prepare.mask_rules import check_lesions, read_masks_alike
from amlp_ray.data.prepare.names import absolute, name_hider, salt_mark, without_folders
from amlp_ray.data.prepare.ray_tasks import run_jobs
from amlp_ray.data.prepare.rejects import Rejects, check_stray_masks
from amlp_ray.data.prepare.resume import PreparationState, ResumableError
from amlp_ray.data.prepare.scan import SCANS, ScannedItem, item_to_row, scan_job
from amlp_ray.data.prepare.statistics import Statistics
from amlp_ray.data.prepare.writer import Row, part_job, write_job
from amlp_ray.errors import DataError
from amlp_ray.utils.text import counted

logger = logging.getLogger(__name__)

SCAN_PICTURES = 64  # of a job: some 100 ms of decoding, ten times what a task costs

Progress = Callable[[str, int, int], None]  # stage, images done, images in total
SplitRows = dict[str, list[Row]]


def prepare(
    source: str | Path | DataPath,
    out: str | Path | DataPath,
    config: PrepareConfig | None = None,
    *,
    strict: bool = False,
    progress: Progress | None = None,
) -> PatchDataset:
    """Write the images of `source` as a patch dataset `out` and open it.

    Uses Ray as it is initialized, or lets Ray Data start a local one. If `out` was prepared from
    the same files with the same config, it is returned as it is.

    Args:
        source: path or URI of a folder in the layout `config.layout`.
        out: path or URI of the dataset. It must not exist, be empty, or hold the same dataset,
            complete or unfinished.
        config: layout, size, channels, groups and splits.
        strict: stop at the first file that cannot be used or needs a repair, instead of skipping
            it.
        progress: called with the stage, the number of images done and the number of all.

    Raises:
        DataError: no file can be used, `out` is taken or cannot be written, or, if strict, a file
            cannot be used.
    """
    out = DataPath(out)
    existing = _open_existing(out)
    preparation = _Preparation(
        DataPath(source), out, config or PrepareConfig(), Rejects(out, strict), progress
    )
    if existing is not None:
        preparation.check_same(existing)
        return existing
    preparation.run()
    return PatchDataset.open(out)


@dataclass(frozen=True)
class _Selection:
    """The items that go into the dataset."""

    scanned: list[ScannedItem]
    format: PixelFormat
    fingerprint: str


class _Preparation:
    """The preparation of one dataset, from listing the source to the manifest."""

    def __init__(
        self,
        source: DataPath,
        out: DataPath,
        config: PrepareConfig,
        rejects: Rejects,
        progress: Progress | None,
    ) -> None:
        """List the source; nothing is decoded or written."""
        listing = find_items(config, source)
        if listing.summary:
            logger.info("%s", listing.summary)
        check_stray_masks(listing)
        self.out = out
        self.progress = progress or (lambda stage, done, total: None)
        self.rejects = rejects
        rejects.add(file._replace(file=absolute(file.file, source)) for file in listing.rejected)
        self.config = config.model_copy(update={"layout": listing.layout})
        self.user_files = UserFiles.from_config(self.config, listing.items)
        self.items = [item for item in listing.items if self.user_files.lists(item)]
        self.left_out = len(listing.items) - len(self.items)
        is_picture = self.items[0].format == "picture"
        kind = ("picture", "pictures") if is_picture else ("series or volume", "series or volumes")
        logger.info("Scanning %s in %s.", counted(len(self.items), *kind), source)
        self.salt_mark = salt_mark(self.items, self.config)
        self.mask_rule = MaskRule()  # known after pass 1
        self._plain_config = self.config.model_dump(mode="json")
        # Everything that the result follows from, but the contents of the images.
        self._identity = [self._plain_config | file_digests(self.config), self.salt_mark]
        rows = [item_to_row(item) for item in self.items]
        self.state = PreparationState(out, _digest([*self._identity, version("amlp-ray"), rows]))

    def check_same(self, existing: PatchDataset) -> None:
        """Scan again, and compare with the dataset at `out`. Nothing but the rejects is written.

        Raises:
            DataError: the dataset was made from other files or with another config.
        """
        selection = self._select(self._scan({}, save=False))
        if existing.manifest.fingerprint != selection.fingerprint:
            raise DataError(
                f"{self.out} is a patch dataset made from other files or settings; delete it or "
                f"choose another folder."
            )
        self.state.finish()  # a run may have been killed right at its end
        self.rejects.write()
        logger.info(
            "%s was already prepared from the same files with the same settings; nothing to do.",
            self.out,
        )

    def run(self) -> None:
        """Write the dataset, or what is missing of it.

        Raises:
            DataError: see `prepare`.
        """
        try:
            with self.state.lock():
                manifest = self._make_manifest()
                write_manifest(self.out, manifest)
                self.rejects.write()
                self.state.finish()
        except OSError as error:
            raise DataError(
                f"{self.out} cannot be written ({error.strerror or error}); check the path, space "
                f"and rights."
            ) from None
        self._log_result(manifest)

    def _make_manifest(self) -> Manifest:
        """Write all parts. After an error nothing is left, unless the next run can resume."""
        scans = self.state.begin()  # not below: another run's unfinished work must stay
        try:
            selection = self._select(self._scan(scans, save=True))
            assignment = assign(selection.scanned, self.user_files, self.config)
            rows = self._rows(selection, assignment)
            notes = self._write(rows, selection.format)
        except ResumableError:
            raise
        except DataError:
            self.rejects.write()
            self.state.discard()
            raise
        dtype, shape = selection.format
        parts: dict[str, list[Part]] = {split: [] for split in SPLITS}
        statistics = Statistics(shape[0], dtype)
        for name, note in notes.items():
            split = name.partition("-")[0]
            values = {name: note[name] for name in Part.model_fields}
            parts[split].append(Part.model_validate(values))
            if split == "train":
                statistics.add_rows(note["statistics"])
        mean, std = statistics.mean_and_std()
        return Manifest(
            created_by=f"amlp_ray {version('amlp-ray')}",
            name=self.out.name,
            layout=self.config.layout,
            channels=shape[0],
            height=shape[1],
            width=shape[2],
            dtype=dtype,
            mean=mean,
            std=std,
            counts=assignment.counts,
            parts=parts,
            group_rows=group_rows(shape, dtype),
            split_rule=split_rule(self.config, assignment.counts["train"]),
            group_rule=group_rule(selection.scanned, self.config),
            left_out=self.left_out,
            rejected=self.rejects.num_rejected,
            dropped=sum(scan.dropped for _, scan in selection.scanned),
            salt=self.salt_mark,
            config=without_folders(self.config),
            fingerprint=selection.fingerprint,
        )

    def _scan(self, scans: dict[int, Any], *, save: bool) -> list[ScannedItem]:
        """Run pass 1: scan the items that `scans` of an earlier run, by job, do not hold."""
        size = SCAN_PICTURES if self.items[0].format == "picture" else 1
        batches = [self.items[start : start + size] for start in range(0, len(self.items), size)]
        done = sum(len(batches[number]) for number in scans)
        jobs = {}
        for number, batch in enumerate(batches):
            if number not in scans:
                rows = [item_to_row(item) for item in batch]
                jobs[number] = {"config": self._plain_config, "mask_rule": None, "items": rows}
        self.progress("scanning", done, len(self.items))
        for number, result in run_jobs(jobs, scan_job):
            scans[number] = result
            if save:
                self.state.add_scans(number, result)
            done += len(batches[number])
            self.progress("scanning", done, len(self.items))
        if save:
            self.state.flush()
        scanned = []
        for number, batch in enumerate(batches):
            results = SCANS.validate_python(scans.pop(number))
            for item, scan in zip(batch, results, strict=True):
                scanned.append(ScannedItem(item, scan))
        scanned, self.mask_rule = read_masks_alike(scanned, self.config)
        return scanned

    def _select(self, scanned: Sequence[ScannedItem]) -> _Selection:
        """Skip items that have faults or do not fit the rest.

        Raises:
            DataError: no item is left.
        """
        for item, scan in scanned:
            if scan.fault:
                # A line of the list names the file in its own column.
                reason = scan.fault.removeprefix(f"{item.images[0]} ")
                self.rejects.add([rejected(item.images[0], reason)])
        for item, scan in scanned:
            self.rejects.add(repaired(item.images[0], note) for note in scan.notes)
        good = [pair for pair in scanned if not pair.scan.fault]
        if not good:
            raise self._nothing_usable()
        for sentence in check_lesions(scanned, self.config):
            logger.warning("%s", sentence)
        pixel_format, fitting, misfits = choose_format(good, self.config)
        self.rejects.add(misfits)
        if not fitting:
            raise self._nothing_usable()
        selected = [pair for pair in fitting if pair.scan.frames]
        if not selected:
            raise DataError(
                f"No image is left of {len(self.items)}: all hold less tissue than "
                f"--min-foreground {self.config.min_foreground:g}; lower it."
            )
        contents = []
        for item, scan in selected:
            contents.append([item.id, item.source, item.group, item.is_labeled, scan.digest])
        return _Selection(selected, pixel_format, _digest([*self._identity, contents]))

    def _nothing_usable(self) -> DataError:
        return DataError(
            f"None of {counted(len(self.items), 'image')} can be used. The first: "
            f"{self.rejects.first()}"
        )

    def _rows(self, selection: _Selection, assignment: Assignment) -> SplitRows:
        """List the images of every split in the order in which they are stored."""
        hide = name_hider(self.config)
        rows: SplitRows = {split: [] for split in SPLITS}
        assigned = zip(selection.scanned, assignment.groups, assignment.splits, strict=True)
        for (item, scan), group, split in assigned:
            item_name = hide(item, item.id)
            source = hide(item, item.source)
            for frame in scan.frames:
                is_picture = item.format == "picture"
                frame_name = item_name if is_picture else f"{item_name}/{frame.number:04d}"
                for crop in frame.crops:
                    name = frame_name
                    if self.config.fit == "tiles":
                        name = f"{frame_name}@{crop.y},{crop.x}"
                    rows[split].append(
                        Row(item, scan.digest, frame, crop, name, hide(item, group), source)
                    )
        if not rows["train"]:
            raise DataError(
                "No image is left for train: those of its groups hold too little tissue; lower "
                "min_foreground."
            )
        return rows

    def _write(self, rows: SplitRows, pixel_format: PixelFormat) -> dict[str, dict[str, Any]]:
        """Run pass 2: write the parts that are missing; return what is stored about each part."""
        dtype, shape = pixel_format
        channels, height, width = shape
        total = sum(len(split_rows) for split_rows in rows.values())
        size_text = f"{height}x{width} pixels, {counted(channels, 'channel')}, {dtype}"
        logger.info("Writing %s of %s.", counted(total, "image"), size_text)
        size = part_rows(shape, dtype)
        notes: dict[str, dict[str, Any]] = {}
        files = {}
        jobs = {}
        for split in SPLITS:
            for number, start in enumerate(range(0, len(rows[split]), size)):
                name = f"{split}-{number:05d}"
                files[name] = f"{split}/part-{number:05d}.parquet"
                notes[name] = self.state.part(name) or {}
                if not notes[name]:
                    part = rows[split][start : start + size]
                    path = str(self.out / files[name])
                    jobs[name] = part_job(
                        path, part, self._plain_config, self.mask_rule, shape, dtype
                    )
        done = sum(note.get("rows", 0) for note in notes.values())
        self.progress("writing", done, total)
        for name, result in run_jobs(jobs, write_job):
            notes[name] = self._check_part(files[name], result)
            self.state.add_part(name, notes[name])
            done += result["rows"]
            self.progress("writing", done, total)
        return notes

    def _check_part(self, file: str, result: dict[str, Any]) -> dict[str, Any]:
        """Return what to store about a part that a worker wrote."""
        if "fault" in result:
            raise (ResumableError if result["resumable"] else DataError)(result["fault"])
        if (self.out / file).info().size != result["bytes"]:
            raise DataError(
                f"{self.out / file} was written by another node and is not visible here; share "
                f"the folder."
            )
        return {"file": file, **result}

    def _log_result(self, manifest: Manifest) -> None:
        message = ", ".join(f"{split} {manifest.counts[split].images}" for split in SPLITS)
        if manifest.left_out:
            message += f"; {manifest.left_out} left out as not listed"
        if manifest.dropped:
            message += f"; {manifest.dropped} tiles or slices left out as mostly background"
        logger.info("Wrote %s: %s.", self.out, message)
        if self.rejects.num_rejected or self.rejects.num_repaired:
            logger.info("%s", self.rejects.summary())


def _open_existing(out: DataPath) -> PatchDataset | None:
    """Open the dataset at `out`; return None if nothing or an unfinished one is there.

    Raises:
        DataError: something else is there, or a dataset that cannot be opened.
    """
    message = f"{out} exists and is not a patch dataset; delete it or choose another folder."
    if out.is_file():
        raise DataError(message)
    if not out.is_folder():
        return None
    if (out / MANIFEST).is_file():
        try:
            return PatchDataset.open(out)
        except DataError as error:
            raise DataError(f"{error} Delete {out} first.") from None
    if not (out / UNFINISHED).is_folder() and not out.is_empty():
        raise DataError(message)
    return None


def _digest(values: Any) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
