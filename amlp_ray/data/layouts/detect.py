"""Which layout a folder has, told from the names of its files and the first bytes of a few."""

from __future__ import annotations

import json
import re

from amlp_ray.data.layouts.busi import CLASSES, split_busi
from amlp_ray.data.layouts.coco import annotation_files
from amlp_ray.data.layouts.lgg import split_lgg
from amlp_ray.data.layouts.listing import Name, contents_of, parts_of, pictures_in, printable, same
from amlp_ray.data.layouts.paired import pair
from amlp_ray.data.path import DataPath
from amlp_ray.errors import DataError

PROBED = 16  # files whose first bytes are read
HEAD = 1 << 16  # bytes of them
DICOM_SUFFIXES = (".dcm", ".dicom", ".ima")
COCO_KEYS = re.compile(rb'"(images|annotations)"\s*:\s*\[')


def recognize(place: DataPath) -> tuple[str, str]:
    """Name the layout of a folder, and say in a sentence by what it was recognised.

    Raises:
        DataError: the folder fits several layouts, or none.
    """
    names = [parts_of(entry.name) for entry in place.entries()]
    pictures = pictures_in(place)
    reasons = {
        "decathlon": _decathlon(place, names),
        "nifti": _nifti(names),
        "dicom": _dicom(place, names),
        "coco": _coco(place),
    } | _masked(pictures)
    if reasons["decathlon"]:
        reasons["nifti"] = ""  # its volumes
    fitting = {layout: f"{layout}: {reason}" for layout, reason in reasons.items() if reason}
    if len(fitting) > 1:
        raise DataError(
            f"{place} fits several layouts ({'; '.join(fitting.values())}); say which is meant with --layout, or "
            f"give a folder that holds one of them."
        )
    if fitting:
        return next(iter(fitting.items()))
    if pictures:
        return (
            "flat",
            f"flat: {len(pictures)} pictures {_such_as(pictures[0])}, and no masks of any known layout",
        )
    raise DataError(
        f"{place} holds {contents_of(place)}, but no layout fits: pictures (.png, .jpg, .tif, .npy, ...), DICOM "
        f"files or NIfTI volumes are needed; give the folder that holds these, or unpack archives first."
    )


def _masked(pictures: list[Name]) -> dict[str, str]:
    """Reasons for the layouts of pictures with masks; the more special ones come before masks beside any picture."""
    images, busi_masks = split_busi(pictures)
    busi = [busi_masks[same(image.path)][0] for image in images if same(image.path) in busi_masks]
    slices, lgg_masks = split_lgg(pictures)
    lgg = (
        [lgg_masks[same(i.path)] for i in slices if i.folder and same(i.path) in lgg_masks]
        if not busi
        else []
    )
    pairs = pair(pictures)
    # Masks in a folder of their own whose names fit no image are a paired set gone wrong: to train on them as if they
    # were images would be worse than to say so.
    paired = (
        [mask for masks in pairs.masks.values() for mask in masks]
        or (pairs.by_folders and pairs.strays)
        or []
    )
    if not pairs.by_folders and (busi or lgg):
        paired = []
    folders = sorted(
        {mask.folder.rpartition("/")[2] for mask in busi}, key=lambda name: (len(name), name)
    )
    reasons = {"busi": "", "lgg": "", "paired": ""}
    if busi:
        reasons["busi"] = (
            f"folders {', '.join(folders)} (of {', '.join(CLASSES)}) with masks {_such_as(busi[0])}"
        )
    if lgg:
        patients = len({mask.folder for mask in lgg})
        reasons["lgg"] = f"{patients} folders of TIFF slices with masks {_such_as(lgg[0])}"
    if paired:
        where = "in a folder of their own" if pairs.by_folders else "beside their images"
        reasons["paired"] = f"masks {where} {_such_as(paired[0])}"
    return reasons


def _decathlon(place: DataPath, names: list[Name]) -> str:
    if not any(name.full == "dataset.json" for name in names):
        return ""
    try:
        document = json.loads((place / "dataset.json").read_bytes())
    except (OSError, ValueError):
        return ""
    if isinstance(document, dict) and {"training", "labels"} <= document.keys():
        return "a dataset.json with the keys training and labels"
    return ""


def _nifti(names: list[Name]) -> str:
    volumes = [name for name in names if name.full.lower().endswith((".nii", ".nii.gz"))]
    return f"{len(volumes)} NIfTI volumes {_such_as(volumes[0])}" if volumes else ""


def _dicom(place: DataPath, names: list[Name]) -> str:
    files = [name for name in names if name.suffix in DICOM_SUFFIXES]
    if files:
        return f"{len(files)} DICOM files {_such_as(files[0])}"
    # Scanners name files IM0001, or by a UID, whose last number is no suffix.
    bare = [name for name in names if not name.suffix or name.suffix[1:].isdigit()]
    for name in bare[:: max(1, len(bare) // PROBED)][:PROBED]:
        if _head(place / name.full)[128:132] == b"DICM":
            return f"files {_such_as(name)} with DICM at byte 128"
    return ""


def _coco(place: DataPath) -> str:
    for name in annotation_files(place)[:PROBED]:
        if COCO_KEYS.search(_head(place / name)):
            return f"an annotation file {printable(name)!r} with the keys of COCO"
    return ""


def _head(file: DataPath) -> bytes:
    try:
        with file.filesystem.open_input_file(file.path) as stream:
            return bytes(stream.read(HEAD))
    except OSError:
        return b""


def _such_as(name: Name) -> str:
    return f"such as {printable(name.full)!r}"
