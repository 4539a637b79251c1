"""Which images belong together: near-copies found by perceptual hashes, or a file that says so.

Splits never cut a group, since a copy of a training image in the test split would be scored from memory.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from scipy import sparse
from scipy.sparse.csgraph import connected_components

from amlp_ray.errors import DataError

# Two images count as one if their hashes differ in at most so many bits (an even number, as half of the bits are set).
# Of 122,760 pairs of 496 breast ultrasound images pHash links 72 at 2 bits, 94 at 4, 106 at 8, 110 at 10, 123 at 12: by
# eye all of them up to 10 are one scan, but 7 of the 13 more at 12 are not. Missed at 8 are 15 of the 117 pairs whose
# 48 x 48 thumbnails correlate above 0.95: other views of one lesion. None of 1,953 pairs of dermoscopy images and of
# 195,008 pairs of slices of different MRI volumes is linked at 8; dHash links 4 and 1 there, and wHash 24,595 of the
# ultrasound pairs. 8 and not 10: chance links grow with the square of the number of images, fourfold with every 2 bits.
SAME = 8

FLAT = 0  # hash of an image without content; linked to nothing
STRETCH = (
    0.5,
    99.5,
)  # percentiles that become black and white before images of more than 8 bits are hashed
BLOCK_PAIRS = 1 << 18  # pairs compared at a time: 2 MiB of differences stay in a core's cache
MERGE_PAIRS = 1 << 20  # linked pairs held at a time


def perceptual_hash(image: np.ndarray) -> int:
    """Hash an image (H, W, C) of uint8, uint16, int16 or float32 to 64 bits that survive a resize, JPEG and brightness.

    This is imagehash's pHash of the grey image: which of the 8 x 8 lowest frequencies lie above their median. Three
    channels are taken as RGB, any other number is averaged. What is not finite counts as the image's minimum.

    Returns:
        A number below 2**64; `FLAT` for an image of one value.
    """
    import imagehash

    channels = image.shape[2]
    if image.dtype == np.uint8 and channels in (1, 3):
        picture = Image.fromarray(image[:, :, 0] if channels == 1 else image).convert("L")
    else:
        picture = Image.fromarray(_gray8(image))
    low, high = picture.getextrema()
    if low == high:
        return FLAT
    return int(str(imagehash.phash(picture)), 16)


def near_duplicate_groups(
    ids: Sequence[str], hashes: np.ndarray, *, distance: int = SAME
) -> list[str]:
    """Name the group of each image: the first id among all that are linked by a chain of near-copies.

    Args:
        ids: N names, in the order that decides which is first.
        hashes: (N,) uint64, of `perceptual_hash`; `FLAT` is linked to nothing.
        distance: bits in which near-copies may differ.
    """
    return [ids[first] for first in chains(hashes, distance).tolist()]


def chains(hashes: np.ndarray, distance: int = SAME) -> np.ndarray:
    """For each hash (N,) uint64, the position of the first one that a chain of near-copies links it to: (N,) int64."""
    hashes = np.asarray(hashes, np.uint64)
    values, inverse = np.unique(hashes, return_inverse=True)
    labels = np.arange(len(values))
    left: list[np.ndarray] = []
    right: list[np.ndarray] = []
    held = 0
    for a, b in near_pairs(values, distance):
        new = labels[a] != labels[b]
        left.append(a[new])
        right.append(b[new])
        held += int(new.sum())
        if (
            held > MERGE_PAIRS
        ):  # so that memory stays bounded even where every image resembles every other
            labels = _merged(labels, left, right)
            left, right, held = [], [], 0
    labels = _merged(labels, left, right)[inverse]
    flat = np.flatnonzero(hashes == FLAT)
    labels[flat] = len(values) + flat  # each by itself
    return _first_of_each(labels)


def near_pairs(
    hashes: np.ndarray, distance: int, other: np.ndarray | None = None
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield the pairs of near-copies, each once, as positions (P,) and (P,): left < right within `hashes` (N,) uint64.

    With `other` (M,), left is a position in `hashes` and right one in `other`. `FLAT` is in no pair. Pairs come in
    pieces, since N equal hashes have N * (N - 1) / 2 of them: callers with many equal ones pass unique values.
    """
    left = np.asarray(hashes, np.uint64)
    right = left if other is None else np.asarray(other, np.uint64)
    sides = np.flatnonzero(left != FLAT), np.flatnonzero(right != FLAT)
    masks = _bands(left[sides[0]], right[sides[1]], distance)
    for number, mask in enumerate(masks):
        for a, b in _buckets(left, right, sides, mask, within=other is None):
            for c, d in _blocks(left, right, a, b, distance):
                keep = c < d if other is None else np.ones(len(c), bool)
                for earlier in masks[
                    :number
                ]:  # a pair that shares several bands was told with the first
                    keep &= ((left[c] ^ right[d]) & earlier) != 0
                if keep.any():
                    yield c[keep], d[keep]


def read_group_file(path: str | Path, column: str = "group") -> dict[str, str]:
    """Read a CSV with columns id and `column` as groups by id; other columns are ignored, and space around values.

    Raises:
        DataError: the file is missing or no such CSV, names a column twice, or gives an id two groups or none.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"There is no group file {path}; check the path.")
    groups: dict[str, str] = {}
    try:
        with path.open(
            newline="", encoding="utf-8-sig"
        ) as file:  # spreadsheets write a byte-order mark
            reader = csv.DictReader(file)
            columns = reader.fieldnames or []
            if columns.count("id") != 1 or columns.count(column) != 1:
                semicolons = (
                    "; separate columns by commas" if any(";" in name for name in columns) else ""
                )
                raise DataError(
                    f"{path} has the columns {', '.join(columns) or 'none'}, but one id and one {column} are needed; "
                    f"rename them or set group_column{semicolons}."
                )
            for row in reader:
                name, group = (row["id"] or "").strip(), (row[column] or "").strip()
                if not name or not group:
                    raise DataError(
                        f"{path} line {reader.line_num} lacks an id or a {column}; complete it."
                    )
                if groups.setdefault(name, group) != group:
                    raise DataError(f"{path} gives {name!r} two groups; keep one line for each id.")
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(
            f"{path} is not a CSV text file ({error}); export it as CSV in UTF-8."
        ) from None
    return groups


def _gray8(image: np.ndarray) -> np.ndarray:
    """Average the channels of an image (H, W, C) and stretch it to (H, W) uint8."""
    weights = (
        np.array([0.299, 0.587, 0.114])
        if image.shape[2] == 3
        else np.full(image.shape[2], 1 / image.shape[2])
    )
    gray = image.astype(np.float32) @ weights.astype(np.float32)
    finite = np.isfinite(gray)
    if not finite.any():
        return np.zeros(gray.shape, np.uint8)
    gray = np.where(finite, gray, gray[finite].min())
    if image.dtype == np.uint8:
        return gray.round().astype(np.uint8)
    low, high = np.percentile(gray, STRETCH)
    if high <= low:  # a few bright pixels on an empty image
        low, high = gray.min(), gray.max()
    if high <= low:
        return np.zeros(gray.shape, np.uint8)
    return ((gray - low) * (255 / (high - low))).clip(0, 255).round().astype(np.uint8)


def _bands(left: np.ndarray, right: np.ndarray, distance: int) -> list[np.uint64]:
    """Choose masks of bits such that hashes that differ in at most `distance` bits agree in all bits of one mask.

    That holds for `distance` + 1 masks without common bits. Bits are dealt out in turn, since neighbouring frequencies
    agree in many images. One empty mask, with which all are compared with all, is returned where it is cheaper. For
    200,000 hashes and 8 bits nine masks take 7 s, one takes 60 s.
    """
    count = distance + 1
    everything = [np.uint64(0)]
    if count > 16:
        return everything
    masks = [
        np.bitwise_or.reduce(np.uint64(1) << np.arange(i, 64, count, dtype=np.uint64))
        for i in range(count)
    ]
    compared = 0.0
    for mask in masks:
        sizes = dict(zip(*np.unique(left & mask, return_counts=True), strict=True))
        compared += sum(
            float(n) * sizes.get(key, 0)
            for key, n in zip(*np.unique(right & mask, return_counts=True), strict=True)
        )
    return masks if compared < 0.5 * len(left) * len(right) else everything


def _buckets(
    left: np.ndarray,
    right: np.ndarray,
    sides: tuple[np.ndarray, np.ndarray],
    mask: np.uint64,
    *,
    within: bool,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield positions (A,) and (B,) of hashes that agree in the bits of `mask`, for each value of these bits."""
    found: list[dict[int, np.ndarray]] = []
    for values, positions in zip((left, right), sides, strict=True):
        if within and found:
            found.append(found[0])
            break
        keys = values[positions] & mask
        order = np.argsort(keys, kind="stable")
        names, starts = np.unique(keys[order], return_index=True)
        found.append(dict(zip(names.tolist(), np.split(positions[order], starts)[1:], strict=True)))
    for key, a in found[0].items():
        if key in found[1]:
            yield a, found[1][key]


def _blocks(
    left: np.ndarray, right: np.ndarray, a: np.ndarray, b: np.ndarray, distance: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Compare hashes at positions `a` with those at `b`, block by block, and yield the positions of near ones."""
    rows = max(1, BLOCK_PAIRS // max(len(b), 1))
    theirs = right[b]
    same = a is b
    for start in range(0, len(a), rows):
        first = start if same else 0  # positions rise, so that what lies before is the other half
        near = np.bitwise_count(left[a[start : start + rows], None] ^ theirs[first:]) <= distance
        above, below = np.nonzero(near)
        if len(above):
            yield a[start + above], b[first + below]


def _merged(labels: np.ndarray, left: list[np.ndarray], right: list[np.ndarray]) -> np.ndarray:
    """Join the components of linked positions."""
    if not left:
        return labels
    count = len(labels)
    ends = np.concatenate([*left, np.arange(count)]), np.concatenate([*right, labels])
    graph = sparse.coo_matrix((np.ones(len(ends[0]), np.int8), ends), shape=(count, count))
    return _first_of_each(connected_components(graph, directed=False)[1])


def _first_of_each(labels: np.ndarray) -> np.ndarray:
    """Replace component numbers by the position of the component's first member."""
    _, first, inverse = np.unique(labels, return_index=True, return_inverse=True)
    return first[inverse]
