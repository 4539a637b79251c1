"""`predict`: a segmenter's masks of new images, in the geometry of their files.

Images are listed and decoded by the code that prepares datasets, and brought to the network's input as its training
images were; what comes out is brought back to the size, place and axes of the file. Masks in the folder are ignored.

    a.jpg, wards/b.png           a.png, wards/b.png: 0 and 255, of the same height and width
    case_7.nii                   case_7.nii.gz: 0 and 1, of the same shape, affine and voxel sizes
    case_0000.nii.gz, _0001      case.nii.gz: the channels of a case make one
    series/IM0001, b.dcm         series/IM0001.png, b.png
    frames.dcm                   frames/0000.png, frames/0001.png, ...
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np

from amlp_ray.config import PredictConfig
from amlp_ray.data.decoders import read_frames
from amlp_ray.data.layouts import RejectedFile, SourceImage, find_items
from amlp_ray.data.layouts.nifti_names import nifti_stem
from amlp_ray.data.path import DataPath, read_bytes
from amlp_ray.data.prepare.rejects import Rejects
from amlp_ray.errors import DataError
from amlp_ray.evaluation.segmenter import WEIGHTS
from amlp_ray.inference.engine import Inference, as_trained, lesion_probabilities, load_inference
from amlp_ray.inference.geometry import overlay, png_bytes, volume_bytes
from amlp_ray.utils.run_dir import OtherRunError, RunDir

MARKER = "predict.json"  # in the folder of masks: what they are of
DICOM_SUFFIXES = (".dcm", ".dicom", ".ima")


class Predictions(NamedTuple):
    """What a run left: `out` holds the masks, and `rejects` lists what could not be used, if anything."""

    out: str
    predicted: int  # items: pictures, DICOM series, volumes
    before: int  # by an earlier run
    rejected: int  # files
    rejects: str


class _File(NamedTuple):
    place: DataPath
    content: bytes


def predict(
    images: str | Path | DataPath,
    segmenter: str | Path,
    out: str | Path | DataPath,
    config: PredictConfig | None = None,
    *,
    overwrite: bool = False,
    device: str = "cpu",
    say: Callable[[str], None] = lambda sentence: None,
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> Predictions:
    """Write a mask for each image of a folder. Images of an earlier run of the same are skipped.

    Args:
        images: folder or URI, in any layout that can be prepared.
        segmenter: folder that `segment` made.
        out: folder or URI of the masks. Beside it lie `<out>.probability` and `<out>.overlay`, where the settings ask
            for them, and `<out>.rejects.csv`, which lists the files that cannot be used.
        overwrite: replace what another run left in `out`.

    Raises:
        DataError: nothing can be used, or `out` is taken or cannot be written.
        CheckpointError: the segmenter is missing or damaged.
    """
    config, source, out = config or PredictConfig(), DataPath(images), DataPath(out)
    _check_apart(source, out)
    trial_spec = load_inference(Path(segmenter), config, device, say)
    listing = find_items(trial_spec.decoding, source)
    if listing.summary:
        say(listing.summary)
    _begin(out, _identity(source, Path(segmenter), config), overwrite)
    rejects = Rejects(out, strict=False)
    rejects.add(fault._replace(file=str(source / fault.file)) for fault in listing.rejected)
    predicted = before = 0
    taken: dict[str, str] = {}
    try:
        for done, item in enumerate(listing.items):
            progress(done, len(listing.items))
            item = replace(item, masks=(), outlines="")
            try:
                names = names_of(item, source)
                _check_free(item, names, taken)
                if _is_done(item, names, out):
                    before += 1
                    continue
                files, notes = _predicted(item, names, out, trial_spec)
            except (DataError, OSError, MemoryError) as error:
                rejects.add([_fault(item, error)])
                continue
            rejects.add(RejectedFile(item.images[0], "repaired", note) for note in notes)
            for file in files:
                file.place.atomic_write(file.content)
            predicted += 1
        progress(len(listing.items), len(listing.items))
        rejects.write()
    except OSError as error:
        raise DataError(
            f"{out} cannot be written ({error.strerror or error}); check the path, space and rights, and run the same "
            f"command again to go on."
        ) from None
    if not predicted and not before:
        (out / MARKER).delete()  # so that the next try may have other settings
        raise DataError(
            f"None of {len(listing.items)} images can be used. The first: {rejects.first()}"
        )
    return Predictions(str(out), predicted, before, rejects.rejected, str(rejects.place))


def names_of(item: SourceImage, source: DataPath) -> list[str]:
    """The masks of an item, relative to their folder: one per frame, or one for a volume.

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
    stems = [_without(name, DICOM_SUFFIXES) for name in files]
    count = (
        1 if len(stems) > 1 else _frame_count(item.images[0])
    )  # what has several frames is an item of its own
    if count == 1:
        return [f"{stem}.png" for stem in stems]
    return [f"{stems[0]}/{number:04d}.png" for number in range(count)]


def _frame_count(path: str) -> int:
    from amlp_ray.data.decoders.dicom_pixels import (  # brings packages that no other format needs
        frame_count,
        load,
    )

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # every odd value in a header gives one
        return frame_count(load(path, read_bytes))


def _without(name: str, suffixes: tuple[str, ...]) -> str:
    """A name without one of the suffixes; the last number of a UID is none."""
    path = PurePosixPath(name)
    return str(path.with_suffix("")) if path.suffix.lower() in suffixes else name


def _predicted(
    item: SourceImage, names: list[str], out: DataPath, trial_spec: Inference
) -> tuple[list[_File], list[str]]:
    """All files of an item, its masks last, since they tell a later run that it is done; and notes of repairs.

    Raises:
        DataError: the item cannot be used; the sentence names the file. OSError, MemoryError: it cannot be read.
    """
    config, is_volume = trial_spec.config, item.format == "nifti"
    masks: list[np.ndarray] = []
    probabilities: list[np.ndarray] = []
    drawn: list[_File] = []
    notes: dict[str, None] = {}
    frames = read_frames(item, trial_spec.decoding)
    while batch := list(islice(frames, config.batch_size)):
        images = [as_trained(item, frame, trial_spec) for frame in batch]
        for frame, probability in zip(batch, lesion_probabilities(images, trial_spec), strict=True):
            mask = (probability > config.threshold).astype(np.uint8)
            masks.append(mask)
            if config.probability:
                probabilities.append(probability)
            if config.overlay:
                name = (
                    f"{_stem(names[0])}/{frame.number:04d}.png"
                    if is_volume
                    else names[frame.number]
                )
                drawn.append(
                    _File(_beside(out, "overlay") / name, png_bytes(overlay(frame.image, mask)))
                )
            notes |= dict.fromkeys(frame.notes)
    if is_volume:
        encoded = [volume_bytes(masks, trial_spec.decoding.axis, item.images[0])]
        shares = (
            [volume_bytes(probabilities, trial_spec.decoding.axis, item.images[0])]
            if probabilities
            else []
        )
    else:
        encoded = [png_bytes(mask * np.uint8(255)) for mask in masks]
        shares = [png_bytes(np.rint(one * 65535).astype(np.uint16)) for one in probabilities]
    beside = [
        _File(_beside(out, "probability") / name, content)
        for name, content in zip(names, shares, strict=False)
    ]
    return [
        *drawn,
        *beside,
        *(_File(out / n, content) for n, content in zip(names, encoded, strict=True)),
    ], list(notes)


def _check_apart(source: DataPath, out: DataPath) -> None:
    """Masks among the images would be taken for images, or in their place."""
    paths = [
        PurePosixPath(place.local.resolve() if place.is_local else str(place))
        for place in (source, out)
    ]
    if paths[1].is_relative_to(paths[0]) or paths[0].is_relative_to(paths[1]):
        raise DataError(
            f"{out} lies among the images of {source}, or holds them; give masks a folder of their own."
        )


def _identity(source: DataPath, segmenter: Path, config: PredictConfig) -> dict[str, Any]:
    """What a run's masks follow from, but for the images themselves."""
    return {
        "images": str(source),
        "segmenter": hashlib.sha256((segmenter / WEIGHTS).read_bytes()).hexdigest(),
        "config": config.model_dump(mode="json", exclude={"batch_size"}),
    }


def _begin(out: DataPath, identity: dict[str, Any], overwrite: bool) -> None:
    """Make `out` this run's: it is new, empty, of an earlier run of the same, or replaced."""
    run_dir = RunDir(out, MARKER, write=DataPath.atomic_write)
    if run_dir.read_identity() is None:
        if out.is_file() or (out.is_folder() and not out.is_empty()):
            raise DataError(f"{out} holds something else than predictions; give another --out.")
    elif overwrite:
        for place in (out, _beside(out, "probability"), _beside(out, "overlay")):
            place.delete()
    try:
        run_dir.claim(identity)
    except OtherRunError:
        raise DataError(
            f"{out} holds predictions of other images, another segmenter or other settings; give "
            f"another --out, or --overwrite to replace them."
        ) from None
    except OSError as error:
        raise DataError(
            f"{out} cannot be written ({error.strerror or error}); check the path, space and rights."
        ) from None


def _check_free(item: SourceImage, names: list[str], taken: dict[str, str]) -> None:
    for name in names:
        first = taken.setdefault(name, item.images[0])
        if first != item.images[0]:
            raise DataError(
                f"{item.images[0]} would get the mask {name}, which is that of {first}; rename one."
            )


def _is_done(item: SourceImage, names: list[str], out: DataPath) -> bool:
    """Whether all masks are there, and none of the item's files has changed since."""
    written = [(out / name).info().mtime_ns for name in names]
    read = [DataPath(path).info().mtime_ns for path in item.images]
    return None not in written and None not in read and min(written) >= max(read)


def _beside(out: DataPath, what: str) -> DataPath:
    return out.parent / f"{out.name}.{what}"


def _stem(name: str) -> str:
    return name.removesuffix(".nii.gz")


def _fault(item: SourceImage, error: Exception) -> RejectedFile:
    """Why an item is left out, as a line of the list, which has the file's name apart."""
    path = item.images[0]
    if isinstance(error, MemoryError):
        reason = "does not fit in memory; cut it in pieces"
    elif isinstance(error, OSError):
        reason = f"cannot be read ({error.strerror or error}); check that it is there and yours"
    else:
        reason = str(error).removeprefix(f"{path} ")
    return RejectedFile(path, "rejected", reason)
