"""A folder of DICOM files, sorted by their headers into series: names and folders of exports mean nothing.

Nothing that names a patient leaves this module but the paths needed for reading: ids, sources and groups are pseudonyms
(see `privacy`), since UIDs lead back to a patient in the archive they came from.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

from amlp_ray.config import PrepareConfig
from amlp_ray.data.layouts.dicom_headers import Found, Other, Segmentation, Slice, read_headers
from amlp_ray.data.layouts.item import Listing, RejectedFile, SourceImage, natural_key
from amlp_ray.data.path import DataPath
from amlp_ray.data.pseudonyms import pseudonym, salt
from amlp_ray.errors import DataError

TURN = 0.01  # two slices whose direction cosines differ by less are parallel: scanners round them
NAMED = 5  # kinds of other objects that are named


def find_dicom(place: DataPath, config: PrepareConfig) -> Listing:
    """List the series below a folder. Only headers are read: 200 000 files take minutes, and some 300 MB of memory.

    Slices of one series lie in one item, in order of position along their normal (else of instance number, else of
    name), slices of another shape or direction in an item of their own, as localisers are; so does each object of
    several frames. SEG objects are masks of all items they refer to.

    Raises:
        DataError: there is no folder, or no image in it.
    """
    secret = salt()
    entries = sorted(place.entries(), key=lambda entry: natural_key(entry.name))
    slices, segmentations, faults, kinds = _sort(read_headers(place, entries))
    items, members = [], {}
    for series, parts in _series(slices):
        for number, part in enumerate(parts, 1):
            name = pseudonym(series, secret) + (f"-{number}" if len(parts) > 1 else "")
            members[name] = part
            items.append(
                SourceImage(
                    id=name,
                    format="dicom",
                    images=tuple(str(place / of.name) for of in part),
                    masks=(),
                    source=name,
                    group=pseudonym(part[0].patient, secret),
                    stratum=part[0].modality,
                )
            )
    if not items:
        rejected = (
            f", {len(faults)} of them rejected: {faults[0].file} {faults[0].reason}"
            if faults
            else ""
        )
        raise DataError(
            f"{place} holds no DICOM image ({len(entries)} files were looked at{rejected}); give the folder that "
            f"contains the images, or use another layout."
        )
    masks, stray = _masks(segmentations, members)
    items = [
        replace(item, masks=tuple(str(place / name) for name in masks.get(item.id, ())))
        for item in items
    ]
    return Listing(items, sorted([*faults, *stray]), _why(items, len(segmentations), kinds))


def _sort(
    found: Iterable[Found],
) -> tuple[list[Slice], list[Segmentation], list[RejectedFile], Counter[str]]:
    """Part the files by what they are, without the second one of each SOP instance."""
    slices, segmentations, faults = [], [], []
    kinds: Counter[str] = Counter()
    first_of: dict[str, str] = {}  # file by SOP instance
    for of in found:
        if isinstance(of, Slice):
            first = first_of.setdefault(of.instance, of.name)
            if first != of.name:
                faults.append(
                    RejectedFile(of.name, "rejected", f"is a second copy of {first}, which is kept")
                )
                continue
            slices.append(of)
        elif isinstance(of, Segmentation):
            segmentations.append(of)
        elif isinstance(of, RejectedFile):
            faults.append(of)
        elif isinstance(of, Other):
            kinds[of.kind] += 1
    return slices, segmentations, faults, kinds


def _series(slices: list[Slice]) -> Iterator[tuple[str, list[list[Slice]]]]:
    """Yield each series with its parts, in an order that file names do not change."""
    by_series: dict[str, list[Slice]] = defaultdict(list)
    for of in slices:
        by_series[of.series].append(of)
    for series in sorted(by_series):
        parts: list[list[Slice]] = []
        for of in by_series[series]:
            # Few parts, so comparing with the first of each is quick; rounding instead would part equal directions.
            same = next((part for part in parts if of.frames == 1 and _fit(part[0], of)), None)
            if same is None:
                parts.append([of])
            else:
                same.append(of)
        ordered = [sorted(part, key=_order(part)) for part in parts]
        yield (
            series,
            sorted(
                ordered,
                key=lambda part: (part[0].number is None, part[0].number or 0, part[0].instance),
            ),
        )


def _fit(first: Slice, other: Slice) -> bool:
    if (
        first.frames > 1
        or first.shape != other.shape
        or (first.orientation is None) != (other.orientation is None)
    ):
        return False
    if first.orientation is None or other.orientation is None:
        return True
    return all(abs(a - b) < TURN for a, b in zip(first.orientation, other.orientation, strict=True))


def _order(part: list[Slice]) -> Any:
    """Sort key of the slices of a part. Volumes repeated in time lie in one series: place first, then number."""
    first = part[0].orientation
    if first is not None and all(of.position is not None for of in part):
        (a, b, c), (d, e, f) = first[:3], first[3:]
        normal = (b * f - c * e, c * d - a * f, a * e - b * d)
        return lambda of: (
            round(sum(n * p for n, p in zip(normal, of.position, strict=True)), 3),
            of.number or 0,
            natural_key(of.name),
        )
    if all(of.number is not None for of in part):
        return lambda of: (of.number, natural_key(of.name))
    return lambda of: natural_key(of.name)


def _masks(
    segmentations: list[Segmentation], members: dict[str, list[Slice]]
) -> tuple[dict[str, list[str]], list[RejectedFile]]:
    """Return the names of the SEG objects of each item, and faults for those that belong to none."""
    by_instance: dict[str, list[str]] = defaultdict(list)
    by_series: dict[str, list[str]] = defaultdict(list)
    for seg in segmentations:
        for uid in seg.instances:
            by_instance[uid].append(seg.name)
        for uid in () if seg.instances else seg.series:
            by_series[uid].append(seg.name)
    masks: dict[str, dict[str, None]] = {}
    for item, part in members.items():
        for of in part if segmentations else ():
            for name in (*by_instance.get(of.instance, ()), *by_series.get(of.series, ())):
                masks.setdefault(item, {})[name] = None
    used = {name for names in masks.values() for name in names}
    stray = [
        RejectedFile(
            seg.name, "rejected", "is a segmentation that refers to a series that is not here"
        )
        for seg in segmentations
        if seg.name not in used
    ]
    return {item: sorted(names, key=natural_key) for item, names in masks.items()}, stray


def _why(items: list[SourceImage], segmentations: int, kinds: Counter[str]) -> str:
    modalities = Counter(item.stratum or "unknown" for item in items)
    text = f"{len(items)} DICOM series ({', '.join(f'{n} {name}' for name, n in modalities.most_common())})"
    if segmentations:
        text += f", {segmentations} segmentation{'s' if segmentations > 1 else ''}"
    if kinds:
        named = ", ".join(f"{n} {name}" for name, n in kinds.most_common(NAMED))
        text += f"; {sum(kinds.values())} other objects left out ({named}{', ...' if len(kinds) > NAMED else ''})"
    return text
