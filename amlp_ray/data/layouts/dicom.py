"""Sort a folder of DICOM files into series by their headers: file names of exports mean nothing.

Nothing that names a patient leaves this module but the paths needed for reading. Ids, sources and
groups are pseudonyms (see `pseudonyms`), since UIDs lead back to a patient in the archive they came
from.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from amlp_ray.config import PrepareConfig
from amlp_ray.data.layouts.dicom_copies import drop_copies
from amlp_ray.data.layouts.dicom_groups import Grouping
from amlp_ray.data.layouts.dicom_headers import Other, ParsedFile, Segmentation, Slice, read_headers
from amlp_ray.data.layouts.item import Listing, RejectedFile, SourceImage, natural_key, rejected
from amlp_ray.data.path import DataPath
from amlp_ray.data.pseudonyms import pseudonym, salt
from amlp_ray.errors import DataError

# Two slices whose direction cosines differ by less are parallel: scanners round them.
DIRECTION_TOLERANCE = 0.01
MAX_NAMED = 5  # kinds of other objects that the summary names


def find_dicom(root: DataPath, config: PrepareConfig) -> Listing:
    """List the series below a folder.

    Only headers are read, and the pixels of files that share a UID: 200 000 files take minutes, and
    some 300 MB of memory. The slices of a
    series lie in one item, in order of position along their normal, else of instance number, else
    of name. Slices of another shape or direction lie in an item of their own, as localizers do. So
    does each object of several frames. SEG objects are masks of all items they refer to.

    Raises:
        DataError: the folder does not exist, or holds no image.
    """
    secret = salt()
    entries = sorted(root.entries(), key=lambda entry: natural_key(entry.name))
    files = _sort_files(read_headers(root, entries))
    unique = drop_copies(root, files.slices)
    files.rejects += unique.copies
    grouping = Grouping(unique.slices)
    slices_by_item = _list_stacks(unique.slices, grouping, secret)
    if not slices_by_item:
        raise _no_image(root, len(entries), files.rejects)
    masks = _assign_masks(files.segmentations, slices_by_item)
    used = set().union(*masks.values())
    for segmentation in files.segmentations:
        if segmentation.name not in used:
            reason = "is a segmentation that refers to a series that is not here"
            files.rejects.append(rejected(segmentation.name, reason))
    items = []
    groups = []
    for name, stack in slices_by_item.items():
        group = grouping.group_of(stack[0])
        groups.append(group)
        items.append(
            SourceImage(
                id=name,
                format="dicom",
                images=root.join(one.name for one in stack),
                masks=root.join(masks.get(name, ())),
                source=name,
                group=pseudonym(group.name, secret) if group.name else "",
                group_kind=group.kind or "patient",
                stratum=stack[0].modality,
            )
        )
    summary = [_summarize(items, files), unique.describe(), grouping.describe(groups)]
    return Listing(items, sorted(files.rejects), "; ".join(filter(None, summary)))


def _no_image(root: DataPath, num_files: int, rejects: list[RejectedFile]) -> DataError:
    example = ""
    if rejects:
        first = rejects[0]
        example = f", {len(rejects)} of them rejected: {first.file} {first.reason}"
    return DataError(
        f"{root} holds no DICOM image ({num_files} files checked{example}); "
        "give the folder that contains the images, or use another layout."
    )


class _Placed(NamedTuple):
    """A slice and the item that it lies in."""

    item: str
    slice: Slice


@dataclass
class _SortedFiles:
    """The files of a folder by what they are."""

    slices: list[Slice] = field(default_factory=list)
    segmentations: list[Segmentation] = field(default_factory=list)
    rejects: list[RejectedFile] = field(default_factory=list)
    other_kinds: Counter[str] = field(default_factory=Counter)


def _sort_files(parsed_files: Iterable[ParsedFile]) -> _SortedFiles:
    """Sort the files by what they are."""
    files = _SortedFiles()
    for file in parsed_files:
        if isinstance(file, Slice):
            files.slices.append(file)
        elif isinstance(file, Segmentation):
            files.segmentations.append(file)
        elif isinstance(file, RejectedFile):
            files.rejects.append(file)
        elif isinstance(file, Other):
            files.other_kinds[file.kind] += 1
    return files


def _list_stacks(slices: list[Slice], grouping: Grouping, secret: bytes) -> dict[str, list[Slice]]:
    """Return the slices of each item by its name, which is a pseudonym of its series."""
    series = list(_split_series(slices, grouping))
    uses = Counter(key[0] for key, _ in series)
    slices_by_item: dict[str, list[Slice]] = {}
    for key, stacks in series:
        name = pseudonym(key[0] if uses[key[0]] == 1 else "/".join(key), secret)
        for number, stack in enumerate(stacks, 1):
            slices_by_item[f"{name}-{number}" if len(stacks) > 1 else name] = stack
    return slices_by_item


def _split_series(
    slices: list[Slice], grouping: Grouping
) -> Iterator[tuple[tuple[str, ...], list[list[Slice]]]]:
    """Yield each series with its stacks of parallel slices, in an order that ignores file names."""
    by_series: dict[tuple[str, ...], list[Slice]] = defaultdict(list)
    for one in slices:
        by_series[grouping.series_of(one)].append(one)
    for series in sorted(by_series):
        stacks: list[list[Slice]] = []
        for one in by_series[series]:
            # There are few stacks, so it is quick to compare with the first slice of each.
            # Rounding instead would part equal directions.
            for stack in stacks:
                if _belong_together(stack[0], one):
                    stack.append(one)
                    break
            else:
                stacks.append([one])
        stacks = [sorted(stack, key=_slice_order(stack)) for stack in stacks]
        yield series, sorted(stacks, key=_stack_order)


def _stack_order(stack: list[Slice]) -> tuple[bool, int, str]:
    first = stack[0]
    return first.number is None, first.number or 0, first.instance


def _belong_together(first: Slice, other: Slice) -> bool:
    """Return whether two slices of a series have one shape and direction."""
    if first.frames > 1 or other.frames != 1 or first.shape != other.shape:
        return False
    if first.orientation is None or other.orientation is None:
        return first.orientation is None and other.orientation is None
    pairs = zip(first.orientation, other.orientation, strict=True)
    return all(abs(a - b) < DIRECTION_TOLERANCE for a, b in pairs)


def _slice_order(stack: list[Slice]) -> Callable[[Slice], Any]:
    """Return the sort key of the slices of a stack.

    Volumes repeated in time lie in one series, so place comes before number.
    """
    orientation = stack[0].orientation
    if orientation is not None and all(one.position is not None for one in stack):
        normal = _cross(orientation[:3], orientation[3:])

        def by_place(one: Slice) -> Any:
            assert one.position is not None
            distance = sum(n * p for n, p in zip(normal, one.position, strict=True))
            return round(distance, 3), one.number or 0, natural_key(one.name)

        return by_place
    if all(one.number is not None for one in stack):
        return lambda one: (one.number, natural_key(one.name))
    return lambda one: natural_key(one.name)


def _cross(first: tuple[float, ...], second: tuple[float, ...]) -> tuple[float, float, float]:
    a, b, c = first
    d, e, f = second
    return b * f - c * e, c * d - a * f, a * e - b * d


def _assign_masks(
    segmentations: list[Segmentation], slices_by_item: dict[str, list[Slice]]
) -> dict[str, list[str]]:
    """Return the names of the SEG objects that refer to each item."""
    by_instance: dict[str, list[_Placed]] = defaultdict(list)
    by_series: dict[str, list[_Placed]] = defaultdict(list)
    for item, stack in slices_by_item.items():
        for one in stack:
            by_instance[one.instance].append(_Placed(item, one))
            by_series[one.series].append(_Placed(item, one))
    masks: dict[str, set[str]] = defaultdict(set)
    for segmentation in segmentations:
        index = by_instance if segmentation.instances else by_series
        uids = segmentation.instances or segmentation.series
        candidates = [placed for uid in uids for placed in index.get(uid, ())]
        for placed in _narrow_down(candidates, segmentation):
            masks[placed.item].add(segmentation.name)
    return {item: sorted(names, key=natural_key) for item, names in masks.items()}


def _narrow_down(candidates: list[_Placed], segmentation: Segmentation) -> list[_Placed]:
    """Keep the slices that a SEG object means: others may have the same UIDs."""
    in_series = [placed for placed in candidates if placed.slice.series in segmentation.series]
    candidates = in_series or candidates
    same_patient = [one for one in candidates if one.slice.patient == segmentation.patient]
    return same_patient or candidates


def _summarize(items: list[SourceImage], files: _SortedFiles) -> str:
    modalities = Counter(item.stratum or "unknown" for item in items)
    text = f"{len(items)} DICOM series ({_list_counts(modalities)})"
    count = len(files.segmentations)
    if count:
        text += f", {count} segmentation{'s' if count > 1 else ''}"
    kinds = files.other_kinds
    if kinds:
        more = ", ..." if len(kinds) > MAX_NAMED else ""
        named = _list_counts(kinds, MAX_NAMED)
        text += f"; {kinds.total()} other objects left out ({named}{more})"
    return text


def _list_counts(counts: Counter[str], limit: int | None = None) -> str:
    return ", ".join(f"{count} {name}" for name, count in counts.most_common(limit))
