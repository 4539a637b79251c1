"""Predict masks of new images with a segmenter, in the geometry of their files.

Images are listed and decoded by the code that prepares datasets, and brought to the network's input
as its training images were. The output is brought back to the size, position and axes of the file.
Masks in the folder are ignored.

    a.jpg, wards/b.png           a.png, wards/b.png: 0 and 255, of the same height and width
    case_7.nii                   case_7.nii.gz: 0 and 1, of the same shape, affine and voxel sizes
    case_0000.nii.gz, _0001      case.nii.gz: the channels of a case make one
    series/IM0001, b.dcm         series/IM0001.png, b.png
    frames.dcm                   frames/0000.png, frames/0001.png, ...
"""

from __future__ import annotations

import hashlib
import logging
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np

from amlp_ray.config import PredictConfig
from amlp_ray.data.decoders import Frame, read_frames
from amlp_ray.data.layouts import RejectedFile, SourceImage, find_items
from amlp_ray.data.layouts.nifti_names import nifti_stem
from amlp_ray.data.path import DataPath, read_bytes
from amlp_ray.data.prepare.rejects import Rejects
from amlp_ray.errors import DataError
from amlp_ray.evaluation.segmenter import WEIGHTS
from amlp_ray.inference.engine import Inference, load_inference
from amlp_ray.inference.geometry import draw_overlay, encode_png, encode_volume
from amlp_ray.utils.run_dir import OtherRunError, RunDir
from amlp_ray.utils.text import counted

IDENTITY_FILE = "predict.json"  # in the folder of masks
DICOM_SUFFIXES = (".dcm", ".dicom", ".ima")

logger = logging.getLogger(__name__)


class Predictions(NamedTuple):
    """Result of a run. An item is a picture, a DICOM series or a volume."""

    out: str
    """Folder of the masks."""
    predicted: int
    """Number of items predicted now."""
    before: int
    """Number of items that an earlier run predicted."""
    rejected: int
    """Number of files that cannot be used."""
    rejects: str
    """The file that lists them; missing where there are none."""


def predict(
    images: str | Path | DataPath,
    segmenter: str | Path,
    out: str | Path | DataPath,
    config: PredictConfig | None = None,
    *,
    overwrite: bool = False,
    device: str = "cpu",
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Predictions:
    """Write a mask for each image of a folder. Images of an earlier run of the same are skipped.

    Args:
        images: folder or URI, in any layout that can be prepared.
        segmenter: folder that `segment` wrote.
        out: folder or URI of the masks. Beside it lie `<out>.probability` and `<out>.overlay`,
            where the config turns them on, and `<out>.rejects.csv`, which lists the files that
            cannot be used.
        overwrite: replace what another run left in `out`.
        progress: called with the number of finished items and of all.

    Raises:
        DataError: no image can be used, or `out` is taken or cannot be written.
        CheckpointError: the segmenter is missing or damaged.
    """
    config = config or PredictConfig()
    source = DataPath(images)
    out = DataPath(out)
    _check_separate(source, out)
    inference = load_inference(Path(segmenter), config, device)
    listing = find_items(inference.decoding, source)
    if listing.summary:
        logger.info(listing.summary)
    _claim(out, _identity(source, Path(segmenter), config), overwrite)
    rejects = Rejects(out, strict=False)
    rejects.add(
        rejected._replace(file=str(source / rejected.file)) for rejected in listing.rejected
    )
    try:
        predicted, before = _predict_items(listing.items, source, out, inference, rejects, progress)
        rejects.write()
    except OSError as error:
        raise DataError(
            f"{out} cannot be written ({error.strerror or error}); check the path, space and "
            f"rights, and run the same command again to resume."
        ) from None
    if not predicted and not before:
        (out / IDENTITY_FILE).delete()  # so that the next try may have other settings
        raise DataError(
            f"None of {counted(len(listing.items), 'image')} can be used. The first: "
            f"{rejects.first()}"
        )
    return Predictions(str(out), predicted, before, rejects.num_rejected, str(rejects.path))


def _predict_items(
    items: list[SourceImage],
    source: DataPath,
    out: DataPath,
    inference: Inference,
    rejects: Rejects,
    progress: Callable[[int, int], None],
) -> tuple[int, int]:
    """Predict and write all items that are not done.

    Returns:
        How many were predicted, and how many an earlier run had predicted.
    """
    predicted = 0
    before = 0
    used_names: dict[str, str] = {}
    for done, item in enumerate(items):
        progress(done, len(items))
        item = replace(item, masks=(), outlines="")
        try:
            names = mask_names(item, source)
            _check_unused(item, names, used_names)
            if _is_done(item, names, out):
                before += 1
                continue
            files, notes = _predict_item(item, names, out, inference)
        except (DataError, OSError, MemoryError) as error:
            rejects.add([_rejected(item, error)])
            continue
        rejects.add(RejectedFile(item.images[0], "repaired", note) for note in notes)
        for path, content in files:
            path.atomic_write(content)
        predicted += 1
    progress(len(items), len(items))
    return predicted, before


def mask_names(item: SourceImage, source: DataPath) -> list[str]:
    """Return the masks of an item, relative to their folder: one per frame, or one per volume.

    Raises:
        DataError: a DICOM object, whose frames are counted, cannot be read.
    """
    if item.format == "picture":
        return [str(PurePosixPath(item.source).with_suffix(".png"))]
    if item.format == "nifti":
        folder, slash, name = item.source.rpartition("/")
        stem = nifti_stem(name) if len(item.images) == 1 else item.id.rpartition("/")[2]
        return [f"{folder}{slash}{stem}.nii.gz"]
    files = [DataPath(path).path.removeprefix(f"{source.path}/") for path in item.images]
    stems = [_without_dicom_suffix(name) for name in files]
    # A file with several frames is an item of its own.
    count = 1 if len(stems) > 1 else _frame_count(item.images[0])
    if count == 1:
        return [f"{stem}.png" for stem in stems]
    return [f"{stems[0]}/{number:04d}.png" for number in range(count)]


def _frame_count(path: str) -> int:
    # Imports packages that no other format needs.
    from amlp_ray.data.decoders.dicom_pixels import frame_count, load

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # every odd value in a header gives one
        return frame_count(load(path, read_bytes))


def _without_dicom_suffix(name: str) -> str:
    """Return a name without its suffix; the last number of a UID is none."""
    path = PurePosixPath(name)
    return str(path.with_suffix("")) if path.suffix.lower() in DICOM_SUFFIXES else name


def _predict_item(
    item: SourceImage, names: list[str], out: DataPath, inference: Inference
) -> tuple[list[tuple[DataPath, bytes]], list[str]]:
    """Predict all frames of an item.

    Returns:
        Paths and contents of its files, the masks last, because a later run takes an item with
        masks as done. And notes of repairs.

    Raises:
        DataError: the item cannot be used; the message names the file.
        OSError, MemoryError: it cannot be read.
    """
    config = inference.config
    masks: list[np.ndarray] = []
    probabilities: list[np.ndarray] = []
    files: list[tuple[DataPath, bytes]] = []
    notes: dict[str, None] = {}
    for frame, probability in _predict_frames(item, inference):
        mask = (probability > config.threshold).astype(np.uint8)
        masks.append(mask)
        if config.probability:
            probabilities.append(probability)
        if config.overlay:
            path = _sibling(out, "overlay") / _overlay_name(item, names, frame.number)
            files.append((path, encode_png(draw_overlay(frame.image, mask))))
        notes |= dict.fromkeys(frame.notes)
    axis = inference.decoding.axis
    mask_contents = _encode(masks, item, axis)
    if config.probability:
        folder = _sibling(out, "probability")
        contents = _encode(probabilities, item, axis)
        files += zip([folder / name for name in names], contents, strict=True)
    files += zip([out / name for name in names], mask_contents, strict=True)
    return files, list(notes)


def _predict_frames(item: SourceImage, inference: Inference) -> Iterator[tuple[Frame, np.ndarray]]:
    """Yield every frame of an item and its lesion probability (H, W)."""
    frames = read_frames(item, inference.decoding)
    while batch := list(islice(frames, inference.config.batch_size)):
        images = [inference.convert(item, frame) for frame in batch]
        yield from zip(batch, inference.lesion_probabilities(images), strict=True)


def _overlay_name(item: SourceImage, names: list[str], number: int) -> str:
    """Return the overlay of a frame, relative to its folder: a volume has one per slice."""
    if item.format == "nifti":
        return f"{names[0].removesuffix('.nii.gz')}/{number:04d}.png"
    return names[number]


def _encode(planes: list[np.ndarray], item: SourceImage, axis: str) -> list[bytes]:
    """Encode masks of uint8 or probabilities of float32 (H, W), as a volume or as pictures."""
    if item.format == "nifti":
        return [encode_volume(planes, axis, item.images[0])]
    if planes[0].dtype == np.uint8:
        return [encode_png(mask * np.uint8(255)) for mask in planes]
    return [encode_png(np.rint(plane * 65535).astype(np.uint16)) for plane in planes]


def _sibling(out: DataPath, suffix: str) -> DataPath:
    return out.parent / f"{out.name}.{suffix}"


def _check_separate(source: DataPath, out: DataPath) -> None:
    """Refuse masks among the images: they would be taken for images, or replace them."""
    source_path = _resolved(source)
    out_path = _resolved(out)
    if out_path.is_relative_to(source_path) or source_path.is_relative_to(out_path):
        raise DataError(
            f"{out} lies among the images of {source}, or holds them; "
            f"give masks a folder of their own."
        )


def _resolved(path: DataPath) -> PurePosixPath:
    return PurePosixPath(path.local.resolve() if path.is_local else str(path))


def _identity(source: DataPath, segmenter: Path, config: PredictConfig) -> dict[str, Any]:
    """Describe what a run's masks follow from, apart from the images themselves."""
    return {
        "images": str(source),
        "segmenter": hashlib.sha256((segmenter / WEIGHTS).read_bytes()).hexdigest(),
        "config": config.model_dump(mode="json", exclude={"batch_size"}),
    }


def _claim(out: DataPath, identity: dict[str, Any], overwrite: bool) -> None:
    """Take `out` for this run: it is new, empty, of an earlier run of the same, or replaced.

    Raises:
        DataError: it is something else, or cannot be written.
    """
    run_dir = RunDir(out, IDENTITY_FILE, write=DataPath.atomic_write)
    if run_dir.read_identity() is None:
        if out.is_file() or (out.is_folder() and not out.is_empty()):
            raise DataError(f"{out} holds something else than predictions; give another --out.")
    elif overwrite:
        for folder in (out, _sibling(out, "probability"), _sibling(out, "overlay")):
            folder.delete()
    try:
        run_dir.claim(identity)
    except OtherRunError:
        raise DataError(
            f"{out} holds predictions of other images, another segmenter or other settings; give "
            f"another --out, or --overwrite to replace them."
        ) from None
    except OSError as error:
        raise DataError(
            f"{out} cannot be written ({error.strerror or error}); "
            f"check the path, space and rights."
        ) from None


def _check_unused(item: SourceImage, names: list[str], used_names: dict[str, str]) -> None:
    """Raise DataError if another item has a mask of the same name."""
    path = item.images[0]
    for name in names:
        first = used_names.setdefault(name, path)
        if first != path:
            raise DataError(
                f"{path} would get the mask {name}, which is that of {first}; rename one."
            )


def _is_done(item: SourceImage, names: list[str], out: DataPath) -> bool:
    """Return whether all masks exist and none of the item's files has changed since."""
    written = [(out / name).info().mtime_ns for name in names]
    read = [DataPath(path).info().mtime_ns for path in item.images]
    return None not in written and None not in read and min(written) >= max(read)


def _rejected(item: SourceImage, error: Exception) -> RejectedFile:
    """Describe why an item cannot be used, as a line of the list."""
    path = item.images[0]
    # The list has the file's name in a column of its own.
    reason = str(error).removeprefix(f"{path} ")
    if isinstance(error, MemoryError):
        reason = "does not fit in memory; cut it in pieces"
    elif isinstance(error, OSError):
        reason = f"cannot be read ({error.strerror or error}); check that it is there and yours"
    return RejectedFile(path, "rejected", reason)
