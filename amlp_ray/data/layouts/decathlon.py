"""NIfTI volumes listed in a dataset.json, as the Medical Segmentation Decathlon, MONAI and nnU-Net (first version) do.

{"training": [{"image": "./imagesTr/la_003.nii.gz", "label": "./labelsTr/la_003.nii.gz"}], "test": ["./imagesTs/..."]}
"""

from __future__ import annotations

import json
from posixpath import normpath
from typing import Any

from amlp_ray.config import PrepareConfig
from amlp_ray.data.layouts.item import Listing, RejectedFile, SourceImage, natural_key
from amlp_ray.data.layouts.nifti_names import nifti_stem
from amlp_ray.data.path import DataPath
from amlp_ray.errors import DataError

INDEX = "dataset.json"
PARTS = ("training", "validation", "test")
MOST_CHANNELS = 16


def find_decathlon(place: DataPath, config: PrepareConfig) -> Listing:
    """List the volumes that dataset.json names; an id is a file name without ending, and so is a group.

    Test volumes are unlabelled. Where a named image is missing, nnU-Net's channels (`_0000`, `_0001`, ...) of it are.
    Volumes that are missing or named twice are faults, and so are those outside of the folder.

    Raises:
        DataError: dataset.json is missing or damaged, or names no volume that is there.
    """
    content = _index(place)
    there = {entry.name for entry in place.entries()}
    items: dict[str, SourceImage] = {}
    faults: list[RejectedFile] = []
    entries = [(part, entry) for part in PARTS for entry in content.get(part) or ()]
    for part, entry in entries:
        found = _item(place, entry, part, there)
        if isinstance(found, RejectedFile):
            faults.append(found)
        elif found.id in items:
            faults.append(
                RejectedFile(
                    found.source, "rejected", f"is named twice in {INDEX}, or like another volume"
                )
            )
        else:
            items[found.id] = found
    if not items:
        first = f" (such as {faults[0].file}, which {faults[0].reason})" if faults else ""
        raise DataError(
            f"{place / INDEX} names no volume that is there{first}, but lists {', '.join(PARTS)} of image and label "
            f"files are accepted; give the folder its paths start from, or use layout nifti."
        )
    listed = sorted(items.values(), key=lambda item: natural_key(item.id))
    labeled = sum(bool(item.masks) for item in listed)
    modalities = _modalities(content)
    why = f"{INDEX} names {len(listed)} volumes, {labeled} with labels" + (
        f", of {modalities}" if modalities else ""
    )
    return Listing(listed, sorted(faults), why)


def _index(place: DataPath) -> dict[str, Any]:
    path = place / INDEX
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise DataError(
            f"{place} holds no {INDEX}, which the decathlon layout needs; give the folder that contains it, or use "
            f"layout nifti."
        ) from None
    except OSError as error:
        raise DataError(
            f"{path} cannot be read ({error.strerror or error}); check your access."
        ) from None
    except ValueError as error:
        raise DataError(
            f"{path} is no JSON file ({error}); repair it, or use layout nifti."
        ) from None
    if not isinstance(content, dict) or not any(
        isinstance(content.get(part), list) for part in PARTS
    ):
        raise DataError(
            f"{path} has none of the lists {', '.join(PARTS)}, which the decathlon layout needs; that of newer nnU-Net "
            f"has none, so use layout nifti for it."
        )
    return content


def _item(place: DataPath, entry: Any, part: str, there: set[str]) -> SourceImage | RejectedFile:
    image = entry.get("image") if isinstance(entry, dict) else entry
    label = entry.get("label") if isinstance(entry, dict) else None
    images = [_clean(name) for name in (image if isinstance(image, list) else [image])]
    labels = (
        []
        if label is None
        else [_clean(name) for name in (label if isinstance(label, list) else [label])]
    )
    if None in images or None in labels or not images:
        return RejectedFile(
            INDEX, "rejected", f"has an entry in {part} that names no files: {str(entry)[:80]!r}"
        )
    names = [name for name in images if name is not None]
    masks = [name for name in labels if name is not None]
    for name in (*names, *masks):
        if name.startswith(("/", "../")) or "://" in name:
            return RejectedFile(name, "rejected", "lies outside of the folder; move it inside")
        if nifti_stem(name) is None:
            return RejectedFile(name, "rejected", "is no NIfTI volume (.nii, .nii.gz)")
    stem = nifti_stem(names[0])
    assert stem is not None
    if len(names) == 1 and names[0] not in there:
        names = _channels(names[0], stem, there) or names
    for name in (*names, *masks):
        if name not in there:
            return RejectedFile(name, "rejected", f"is named in {INDEX} and not there")
    return SourceImage(
        id=stem,
        format="nifti",
        images=tuple(str(place / name) for name in names),
        masks=tuple(str(place / name) for name in masks),
        source=names[0],
        group=stem,
    )


def _channels(name: str, stem: str, there: set[str]) -> list[str]:
    """Return the files of nnU-Net's channels of an image, from 0000 on as far as they go."""
    folder, slash, base = name.rpartition("/")
    ending = base[len(stem) :]
    found: list[str] = []
    while len(found) < MOST_CHANNELS:
        channel = f"{folder}{slash}{stem}_{len(found):04d}{ending}"
        if channel not in there:
            break
        found.append(channel)
    return found


def _clean(name: Any) -> str | None:
    """Return a path as the listing has it, without a leading ./ and with forward slashes."""
    return normpath(name.replace("\\", "/")) if isinstance(name, str) and name.strip() else None


def _modalities(content: dict[str, Any]) -> str:
    named = content.get("modality") or content.get("channel_names") or {}
    if isinstance(named, str):
        return named
    return ", ".join(map(str, named.values() if isinstance(named, dict) else named))
