"""Choose what all images of a dataset have in common: one value type and one number of channels."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple, TypeVar

from amlp_ray.config import PrepareConfig
from amlp_ray.data.decoders import DTYPES, common_dtype
from amlp_ray.data.layouts import RejectedFile
from amlp_ray.data.layouts.item import Format, rejected
from amlp_ray.data.parquet import Shape
from amlp_ray.data.prepare.scan import ItemScan, ScannedItem

# Gray and color become each other; other channels have meanings of their own.
GRAY_AND_COLOR = (1, 3)

T = TypeVar("T")


class PixelFormat(NamedTuple):
    """How images are stored."""

    dtype: str
    shape: Shape


def choose_format(
    scanned: Sequence[ScannedItem], config: PrepareConfig
) -> tuple[PixelFormat, list[ScannedItem], list[RejectedFile]]:
    """Choose value type and channels, and find the items that fit them.

    - Type: for pictures the most common one, because 8 and 16 bits have two scales. For volumes and
      DICOM, whose values have units, the smallest that holds all of them exactly.
    - Channels: gray and color pictures become one kind, which is gray if all are, see `is_gray`.
      Otherwise the most common number, because a screenshot among slices is none of them. DICOM in
      colors that are all gray becomes gray.

    Args:
        scanned: at least one item, none with a fault.
        config: may give the number of channels.

    Returns:
        The format, the items that fit (none may, if `config` gives channels), and a rejected file
        for each of the others.
    """
    misfits = []
    item_format = scanned[0].item.format
    if item_format == "picture":
        dtype = _most_common([scan.dtype for _, scan in scanned], DTYPES)
        for item, scan in scanned:
            if scan.dtype != dtype:
                reason = (
                    f"is {scan.dtype}, but most pictures are {dtype}, and two depths have two "
                    f"scales; convert one kind"
                )
                misfits.append(rejected(item.images[0], reason))
        scanned = [pair for pair in scanned if pair.scan.dtype == dtype]
    channels, accepted = _choose_channels([scan for _, scan in scanned], config, item_format)
    for item, scan in scanned:
        if scan.channels not in accepted:
            reason = (
                f"has {scan.channels} channels, but the dataset has {channels}; convert it or give "
                f"--channels"
            )
            misfits.append(rejected(item.images[0], reason))
    fitting = [pair for pair in scanned if pair.scan.channels in accepted]
    if item_format != "picture":
        dtype = common_dtype({scan.dtype for _, scan in fitting} or {DTYPES[0]})
    return PixelFormat(dtype, (channels, config.size, config.size)), fitting, misfits


def _choose_channels(
    scans: Sequence[ItemScan], config: PrepareConfig, item_format: Format
) -> tuple[int, set[int]]:
    """Return the number of channels that is stored, and the numbers that become it."""
    gray_and_color = set(GRAY_AND_COLOR)
    if config.channels != "auto":
        # Three channels of a NIfTI case are modalities and no colors.
        is_converted = item_format != "nifti" and config.channels in gray_and_color
        return config.channels, gray_and_color if is_converted else {config.channels}
    # Count images and not items: one series of slices outweighs two screenshots.
    counts: list[int] = []
    for scan in scans:
        counts += [scan.channels] * len(scan.frames)
    counts = counts or [scan.channels for scan in scans]
    common = _most_common(counts, sorted(set(counts)))
    if item_format == "picture" and common in gray_and_color:
        is_all_gray = all(scan.gray for scan in scans if scan.channels in gray_and_color)
        return 1 if is_all_gray else 3, gray_and_color
    color_scans = [scan for scan in scans if scan.channels == 3]
    if item_format == "dicom" and common == 3 and all(scan.gray for scan in color_scans):
        return 1, gray_and_color
    return common, {common}


def _most_common(values: Sequence[T], order: Sequence[T]) -> T:
    """Return the most common value; among equals, the first in `order`."""
    counts = Counter(values)
    return max(order, key=lambda value: counts[value])
