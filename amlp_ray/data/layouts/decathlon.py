"""Read NIfTI volumes listed in a dataset.json.

The Medical Segmentation Decathlon, MONAI and the first version of nnU-Net write such files:

    {"training": [{"image": "./imagesTr/la_003.nii.gz", "label": "./labelsTr/la_003.nii.gz"}],
     "test": ["./imagesTs/..."]}
"""

from __future__ import annotations

from itertools import takewhile
from posixpath import normpath
from typing import Any

from amlp_ray.config import PrepareConfig
from amlp_ray.data.layouts.item import Listing, RejectedFile, SourceImage, natural_key, rejected
from amlp_ray.data.layouts.json_numbers import whole_number
from amlp_ray.data.layouts.nifti_names import nifti_stem
from amlp_ray.data.path import DataPath
from amlp_ray.errors import DataError
from amlp_ray.utils.json_files import JsonError, parse_json
from amlp_ray.utils.text import counted

INDEX = "dataset.json"
SECTIONS = ("training", "validation", "test")
MAX_CHANNELS = 16


def find_decathlon(root: DataPath, config: PrepareConfig) -> Listing:
    """List the volumes that dataset.json names. An id is a file name without ending; so is a group.

    Test volumes are unlabeled. If a named image is missing, its nnU-Net channels (`_0000`,
    `_0001`, ...) are read. Rejected are volumes that are missing, named twice, or outside the
    folder.

    Raises:
        DataError: dataset.json is missing or damaged, names no volume that exists, or does not know
            one of `lesion_labels`.
    """
    index = _read_index(root)
    labels = _read_labels(index)
    _check_labels(root, labels, config.lesion_labels)
    file_names = set(root.names())
    items: dict[str, SourceImage] = {}
    rejects: list[RejectedFile] = []
    for section in SECTIONS:
        for entry in _entries(index, section):
            item = _read_entry(root, entry, section, file_names)
            if isinstance(item, RejectedFile):
                rejects.append(item)
            elif item.id in items:
                reason = f"is named twice in {INDEX}, or like another volume"
                rejects.append(rejected(item.source, reason))
            else:
                items[item.id] = item
    if not items:
        example = f" (such as {rejects[0].file}, which {rejects[0].reason})" if rejects else ""
        raise DataError(
            f"{root / INDEX} names no volume that is there{example}, but lists "
            f"{', '.join(SECTIONS)} of image and label files are accepted; give the folder its "
            "paths start from, or use layout nifti."
        )
    volumes = sorted(items.values(), key=lambda item: natural_key(item.id))
    summary = _summarize(volumes, index)
    if len(labels) > 1 and not config.lesion_labels:
        listed = _describe_labels(labels)
        summary += f"; all labels are taken as lesion, {listed}; choose some with lesion_labels"
    return Listing(volumes, sorted(rejects), summary)


def _entries(index: dict[str, Any], section: str) -> list[Any]:
    """Return the entries of a section; one that is no list, such as a count, has none."""
    entries = index.get(section)
    return entries if isinstance(entries, list) else []


def _read_labels(index: dict[str, Any]) -> dict[int, str]:
    """Return the names of all labels but background by value; none if the file has none.

    Versions of the format map values to names, or names to one value or several.
    """
    labels: dict[int, str] = {}
    listed = index.get("labels")
    for key, value in listed.items() if isinstance(listed, dict) else ():
        by_value = whole_number(key)
        if by_value is not None:
            labels[by_value] = str(value)
            continue
        for one in value if isinstance(value, list) else [value]:
            number = whole_number(one)
            if number is not None:
                labels.setdefault(number, key)
    return {number: labels[number] for number in sorted(labels) if number > 0}


def _check_labels(root: DataPath, labels: dict[int, str], lesion_labels: tuple[int, ...]) -> None:
    """Raise DataError if a wanted label is none that dataset.json lists."""
    unknown = [label for label in lesion_labels if label not in labels]
    if labels and unknown:
        raise DataError(
            f"lesion_labels {', '.join(map(str, unknown))} is no label of {root / INDEX}, which "
            f"has {_describe_labels(labels)}; give some of these."
        )


def _describe_labels(labels: dict[int, str]) -> str:
    return ", ".join(f"{number} ({name})" for number, name in labels.items())


def _summarize(volumes: list[SourceImage], index: dict[str, Any]) -> str:
    labeled = sum(bool(item.masks) for item in volumes)
    text = f"{INDEX} names {counted(len(volumes), 'volume')}, {labeled} with labels"
    modalities = index.get("modality") or index.get("channel_names") or ""
    if isinstance(modalities, dict):
        modalities = list(modalities.values())
    if isinstance(modalities, list):
        modalities = ", ".join(map(str, modalities))
    return f"{text}, of {modalities}" if modalities else text


def _read_index(root: DataPath) -> dict[str, Any]:
    path = root / INDEX
    try:
        index = parse_json(path.read_bytes())
    except FileNotFoundError:
        raise DataError(
            f"{root} holds no {INDEX}, which the decathlon layout needs; "
            "give the folder that contains it, or use layout nifti."
        ) from None
    except OSError as error:
        raise DataError(
            f"{path} cannot be read ({error.strerror or error}); check your access."
        ) from None
    except JsonError as error:
        raise DataError(f"{path} {error}; repair it, or use layout nifti.") from None
    if isinstance(index, dict) and any(isinstance(index.get(name), list) for name in SECTIONS):
        return index
    raise DataError(
        f"{path} has none of the lists {', '.join(SECTIONS)}, which the decathlon layout needs; "
        "that of newer nnU-Net has none, so use layout nifti for it."
    )


def _read_entry(
    root: DataPath, entry: Any, section: str, file_names: set[str]
) -> SourceImage | RejectedFile:
    """Turn an entry of dataset.json into an item, or say why it cannot be used."""
    files = entry if isinstance(entry, dict) else {"image": entry}
    images = _clean_names(files.get("image"))
    label = files.get("label")
    masks = [] if label is None else _clean_names(label)
    if not images or masks is None:
        reason = f"has an entry in {section} that names no files: {str(entry)[:80]!r}"
        return rejected(INDEX, reason)
    for name in (*images, *masks):
        if name.startswith(("/", "../")) or "://" in name:
            return rejected(name, "lies outside of the folder; move it inside")
        if nifti_stem(name) is None:
            return rejected(name, "is no NIfTI volume (.nii, .nii.gz)")
    stem = nifti_stem(images[0])
    assert stem is not None
    if len(images) == 1 and images[0] not in file_names:
        images = _find_channels(images[0], stem, file_names) or images
    for name in (*images, *masks):
        if name not in file_names:
            return rejected(name, f"is named in {INDEX} and not there")
    return SourceImage(
        id=stem,
        format="nifti",
        images=root.join(images),
        masks=root.join(masks),
        source=images[0],
        group=stem,
        group_kind="volume",
    )


def _clean_names(value: Any) -> list[str] | None:
    """Return one or more paths as the listing has them; None if one is no path."""
    names = []
    for name in value if isinstance(value, list) else [value]:
        if not isinstance(name, str) or not name.strip():
            return None
        names.append(normpath(name.replace("\\", "/")))
    return names


def _find_channels(name: str, stem: str, file_names: set[str]) -> list[str]:
    """Return the files of nnU-Net's channels of an image, from 0000 on without gaps."""
    ending = name.rpartition("/")[2].removeprefix(stem)
    prefix = name.removesuffix(ending)
    channels = [f"{prefix}_{number:04d}{ending}" for number in range(MAX_CHANNELS)]
    return list(takewhile(file_names.__contains__, channels))
