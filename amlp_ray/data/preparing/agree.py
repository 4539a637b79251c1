"""What all images of a dataset have in common: one type of value and one number of channels."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

from amlp_ray.config import PrepareSettings
from amlp_ray.data.formats import DTYPES
from amlp_ray.data.preparing.look import Look
from amlp_ray.data.sources import Fault, Item

CONVERTED = (1, 3)  # grey and colour become each other; other channels mean something of their own


T = TypeVar("T")


class Kind(NamedTuple):
    """How images are stored."""

    dtype: str
    channels: int


def agree(
    items: Sequence[Item], looks: Sequence[Look], settings: PrepareSettings
) -> tuple[Kind, list[int], list[Fault]]:
    """Choose type and channels; return them, the positions of the items that fit, and a fault for each that does not.

    - Pictures: the most common type, since 8 and 16 bits have two scales. Volumes and DICOM, whose values have units:
      the smallest type that holds all of them exactly.
    - Grey and colour pictures: grey if all are, see `is_grey`, else colour. Otherwise the most common channel count.

    `looks` have no faults, and there is at least one.
    """
    faults: list[Fault] = []

    def only(fits: Callable[[Look], bool], why: Callable[[Look], str], at: list[int]) -> list[int]:
        faults.extend(Fault(items[i].images[0], "rejected", why(looks[i])) for i in at if not fits(looks[i]))
        return [i for i in at if fits(looks[i])]

    at = list(range(len(items)))
    if items[0].format == "picture":
        dtype = _most_common([look.dtype for look in looks], DTYPES)
        at = only(
            lambda look: look.dtype == dtype,
            lambda look: (
                f"is {look.dtype}, but most pictures are {dtype}, and two depths have two scales; convert one kind"
            ),
            at,
        )
    else:
        dtype = holding_all({look.dtype for look in looks})
    counts = [looks[i].channels for i in at]
    if settings.channels != "auto":
        channels = settings.channels
    elif set(counts) <= set(CONVERTED):
        channels = 1 if all(looks[i].grey for i in at) else 3
    else:
        channels = _most_common(counts, sorted(set(counts)))
    at = only(
        lambda look: look.channels == channels or {look.channels, channels} == set(CONVERTED),
        lambda look: f"has {look.channels} channels, but the dataset has {channels}; convert it or give --channels",
        at,
    )
    return Kind(dtype, channels), at, faults


def holding_all(dtypes: set[str]) -> str:
    """The smallest of the stored types that holds every value of all of `dtypes`.

    >>> holding_all({"uint8", "int16"}), holding_all({"uint16", "int16"})
    ('int16', 'float32')
    """
    if {"uint16", "int16"} <= dtypes:
        return "float32"  # holds both exactly
    return max(dtypes, key=DTYPES.index)


def _most_common(values: Sequence[T], order: Sequence[T]) -> T:
    """The most common value; among equals, the first in `order`."""
    counts = Counter(values)
    return max(order, key=lambda value: counts[value])
