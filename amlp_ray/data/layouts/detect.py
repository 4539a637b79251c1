"""Recognize the layout of a folder from the names of its files and the first bytes of a few."""

from __future__ import annotations

import json
import re

from amlp_ray.data.layouts.coco import annotation_files
from amlp_ray.data.layouts.folders import has_a_folder_per_image
from amlp_ray.data.layouts.listing import (
    FileName,
    describe_contents,
    list_pictures,
    printable,
    split_name,
    such_as,
)
from amlp_ray.data.layouts.mask_folders import find_unnamed_masks
from amlp_ray.data.layouts.paired import BUSI_CLASSES, busi_class, pair_busi, pair_by_name, pair_lgg
from amlp_ray.data.path import DataPath
from amlp_ray.errors import DataError
from amlp_ray.utils.json_files import JsonError, parse_json
from amlp_ray.utils.text import counted

MAX_PROBED = 16  # files whose first bytes are read
HEAD_BYTES = 1 << 16
DICOM_SUFFIXES = (".dcm", ".dicom", ".ima")
COCO_KEYS = re.compile(r'"(images|annotations)"\s*:\s*\[')


def recognize(root: DataPath) -> tuple[str, str]:
    """Name the layout of a folder, and say in a sentence by what it was recognized.

    Raises:
        DataError: the folder fits several layouts, or none.
    """
    names = [split_name(name) for name in root.names()]
    pictures = list_pictures(root)
    decathlon = _recognize_decathlon(root)
    reasons = {
        "decathlon": decathlon,
        "nifti": "" if decathlon else _recognize_nifti(names),
        "dicom": _recognize_dicom(root, names),
        "coco": _recognize_coco(root),
        **_recognize_masked(pictures),
    }
    fitting = {layout: f"{layout}: {reason}" for layout, reason in reasons.items() if reason}
    if len(fitting) > 1:
        raise DataError(
            f"{root} fits several layouts ({'; '.join(fitting.values())}); say which is meant "
            "with --layout, or give a folder that holds one of them."
        )
    if fitting:
        return next(iter(fitting.items()))
    if pictures:
        unnamed = find_unnamed_masks(pictures)
        if unnamed:
            raise DataError(
                f"{root} has pictures in a folder {unnamed!r} that are named like its images. If "
                f"they are masks, add --mask-folder {unnamed}; if all are images, --layout flat."
            )
        example = such_as(pictures[0].full)
        reason = (
            f"flat: {counted(len(pictures), 'picture')} {example}, and no masks of any known layout"
        )
        return "flat", reason
    raise DataError(
        f"{root} holds {describe_contents(root)}, but no layout fits: pictures (.png, .jpg, .tif, "
        ".npy, ...), DICOM files or NIfTI volumes are needed; give the folder that holds these, "
        "or unpack archives first."
    )


def _recognize_masked(pictures: list[FileName]) -> dict[str, str]:
    """Return the reason for each layout of pictures with masks, the more special ones first."""
    busi = _recognize_busi(pictures)
    lgg = "" if busi else _recognize_lgg(pictures)
    pairs, has_mask_folder = pair_by_name(pictures)
    masks = pairs.all_masks()
    # Masks in a folder of their own whose names fit no image are a paired set gone wrong. To train
    # on them as if they were images would be worse than to say so.
    if has_mask_folder:
        masks = masks or pairs.strays
    elif busi or lgg:
        masks = []
    folders = ""
    num_masks = len(pairs.strays) + len(pairs.all_masks())
    if has_mask_folder and 2 * len(pairs.strays) > num_masks and has_a_folder_per_image(pictures):
        folders = f"a folder per image with masks {such_as(pairs.strays[0].full)}"
        masks = []
    paired = ""
    if masks:
        where = "in a folder of their own" if has_mask_folder else "beside their images"
        paired = f"masks {where} {such_as(masks[0].full)}"
    return {"busi": busi, "lgg": lgg, "folders": folders, "paired": paired}


def _recognize_busi(pictures: list[FileName]) -> str:
    masks = pair_busi(pictures).all_masks()
    if not masks:
        return ""
    classes = sorted(
        {busi_class(mask.folder) for mask in masks}, key=lambda name: (len(name), name)
    )
    of_all = ", ".join(BUSI_CLASSES)
    return f"folders {', '.join(classes)} (of {of_all}) with masks {such_as(masks[0].full)}"


def _recognize_lgg(pictures: list[FileName]) -> str:
    masks = [mask for mask in pair_lgg(pictures).all_masks() if mask.folder]
    if not masks:
        return ""
    patients = len({mask.folder for mask in masks})
    return f"{counted(patients, 'folder')} of TIFF slices with masks {such_as(masks[0].full)}"


def _recognize_decathlon(root: DataPath) -> str:
    try:
        document = parse_json((root / "dataset.json").read_bytes())
    except (OSError, JsonError):
        return ""
    if isinstance(document, dict) and {"training", "labels"} <= document.keys():
        return "a dataset.json with the keys training and labels"
    return ""


def _recognize_nifti(names: list[FileName]) -> str:
    volumes = [name for name in names if name.full.lower().endswith((".nii", ".nii.gz"))]
    if not volumes:
        return ""
    return f"{counted(len(volumes), 'NIfTI volume')} {such_as(volumes[0].full)}"


def _recognize_dicom(root: DataPath, names: list[FileName]) -> str:
    files = [name for name in names if name.suffix in DICOM_SUFFIXES]
    if files:
        return f"{counted(len(files), 'DICOM file')} {such_as(files[0].full)}"
    # Scanners name files IM0001, or by a UID, whose last number is no suffix.
    bare = [name for name in names if not name.suffix or name.suffix[1:].isdigit()]
    step = max(1, len(bare) // MAX_PROBED)
    for name in bare[::step][:MAX_PROBED]:
        if _read_head(root / name.full)[128:132] == b"DICM":
            return f"files {such_as(name.full)} with DICM at byte 128"
    return ""


def _recognize_coco(root: DataPath) -> str:
    for name in annotation_files(root)[:MAX_PROBED]:
        head = _read_head(root / name)
        # Tools of Windows write UTF-16; the last character may be cut.
        if COCO_KEYS.search(head.decode(json.detect_encoding(head), "ignore")):
            return f"an annotation file {printable(name)!r} with the keys of COCO"
    return ""


def _read_head(file: DataPath) -> bytes:
    try:
        with file.open() as stream:
            return bytes(stream.read(HEAD_BYTES))
    except OSError:
        return b""
