"""What all images of a dataset have in common: one type of value and one number of channels."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

from amlp_ray.config import PrepareConfig
from amlp_ray.data.decoders import DTYPES, common_dtype
from amlp_ray.data.layouts import RejectedFile, SourceImage
from amlp_ray.data.layouts.item import Format
from amlp_ray.data.prepare.scan import ImageScan

CONVERTED = (1, 3)  # grey and colour become each other; other channels mean something of their own


T = TypeVar("T")


class Kind(NamedTuple):
    """How images are stored."""

    dtype: str
    channels: int


def agree(
    items: Sequence[SourceImage], looks: Sequence[ImageScan], config: PrepareConfig
) -> tuple[Kind, list[int], list[RejectedFile]]:
    """Choose type and channels; return them, the positions of the items that fit, and a fault for each that does not.

    - Type: of pictures the most common, since 8 and 16 bits have two scales; of volumes and DICOM, whose values have
      units, the smallest that holds all of them exactly.
    - Channels: of pictures, grey and colour become one kind, grey if all are, see `is_grey`. Otherwise the most common
      count, since a screenshot among slices is none of them; DICOM in colours that are all grey becomes grey.

    `looks` have no faults, and there is at least one. There may be no position, where `channels` was given.
    """
    faults: list[RejectedFile] = []

    def only(
        fits: Callable[[ImageScan], bool], why: Callable[[ImageScan], str], at: list[int]
    ) -> list[int]:
        faults.extend(
            RejectedFile(items[i].images[0], "rejected", why(looks[i]))
            for i in at
            if not fits(looks[i])
        )
        return [i for i in at if fits(looks[i])]

    at = list(range(len(items)))
    is_picture = items[0].format == "picture"
    if is_picture:
        dtype = _most_common([look.dtype for look in looks], DTYPES)
        at = only(
            lambda look: look.dtype == dtype,
            lambda look: (
                f"is {look.dtype}, but most pictures are {dtype}, and two depths have two scales; convert one kind"
            ),
            at,
        )
    channels, accepted = _channels([looks[i] for i in at], config, items[0].format)
    at = only(
        lambda look: look.channels in accepted,
        lambda look: (
            f"has {look.channels} channels, but the dataset has {channels}; convert it or give --channels"
        ),
        at,
    )
    if not is_picture:
        dtype = common_dtype({looks[i].dtype for i in at} or {DTYPES[0]})
    return Kind(dtype, channels), at, faults


def _channels(
    looks: Sequence[ImageScan], config: PrepareConfig, form: Format
) -> tuple[int, set[int]]:
    """The number of channels that is stored, and those that become it."""
    if config.channels != "auto":
        # Three channels of a NIfTI case are modalities and no colours.
        becomes = form != "nifti" and config.channels in CONVERTED
        return config.channels, {config.channels, *(CONVERTED if becomes else ())}
    # By images: one series of slices weighs more than two screenshots.
    counts = [look.channels for look in looks for _ in look.frames] or [
        look.channels for look in looks
    ]
    common = _most_common(counts, sorted(set(counts)))
    if form == "picture" and common in CONVERTED:
        return (1 if all(look.gray for look in looks if look.channels in CONVERTED) else 3), set(
            CONVERTED
        )
    if (
        form == "dicom"
        and common == 3
        and all(look.gray for look in looks if look.channels == common)
    ):
        return 1, {1, 3}
    return common, {common}


def _most_common(values: Sequence[T], order: Sequence[T]) -> T:
    """The most common value; among equals, the first in `order`."""
    counts = Counter(values)
    return max(order, key=lambda value: counts[value])
