"""Find images that belong together: near-copies by perceptual hash, or groups that a file names.

Splits never cut a group, because a copy of a training image in the test split would be scored from
memory.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image
from scipy import sparse
from scipy.sparse.csgraph import connected_components

from amlp_ray.errors import DataError
from amlp_ray.utils.text import csv_separator, decode_text

# Two images count as one if their hashes differ in at most so many bits (an even number, because
# half of the bits are set). Of 122,760 pairs of 496 breast ultrasound images, pHash links 72 at 2
# bits, 94 at 4, 106 at 8, 110 at 10 and 123 at 12. By eye, all up to 10 bits are one scan, but 7 of
# the 13 more at 12 are not. Missed at 8 bits are 15 of the 117 pairs whose 48 x 48 thumbnails
# correlate above 0.95: other views of one lesion. None of 1,953 pairs of dermoscopy images and of
# 195,008 pairs of slices of different MRI volumes is linked at 8 bits; dHash links 4 and 1 there,
# and wHash 24,595 of the ultrasound pairs. 8 and not 10: chance links grow with the square of the
# number of images, and fourfold with every 2 bits.
MAX_DISTANCE = 8

FLAT = 0  # hash of an image without content; linked to nothing
# Percentiles that become black and white where images of more than 8 bits are hashed or drawn.
STRETCH = (0.5, 99.5)
GRAY_WEIGHTS = (0.299, 0.587, 0.114)  # of red, green and blue
BLOCK_PAIRS = 1 << 18  # pairs compared at a time: 2 MiB of differences stay in a core's cache
MERGE_PAIRS = 1 << 20  # linked pairs held at a time
MAX_BANDS = 16  # with more, bands are so narrow that comparing all pairs is cheaper

Positions = np.ndarray  # of hashes, int64


def perceptual_hash(image: np.ndarray) -> int:
    """Hash an image to 64 bits that survive a resize, JPEG and a change of brightness.

    This is imagehash's pHash of the gray image: which of the 8 x 8 lowest frequencies lie above
    their median. Three channels are taken as RGB, any other number is averaged. Values that are not
    finite count as the image's minimum.

    Args:
        image: (H, W, C) uint8, uint16, int16 or float32.

    Returns:
        A number below 2**64; `FLAT` for an image of one value.
    """
    import imagehash

    channels = image.shape[2]
    if image.dtype == np.uint8 and channels in (1, 3):
        picture = Image.fromarray(image[:, :, 0] if channels == 1 else image).convert("L")
    else:
        picture = Image.fromarray(_to_gray8(image))
    low, high = picture.getextrema()
    if low == high:
        return FLAT
    return int(str(imagehash.phash(picture)), 16)


def find_chains(hashes: np.ndarray, distance: int = MAX_DISTANCE) -> np.ndarray:
    """Find for each hash the first one that a chain of near-copies links it to.

    Args:
        hashes: (N,) uint64.
        distance: most bits in which near-copies differ.

    Returns:
        (N,) int64, a position in `hashes`.
    """
    hashes = np.asarray(hashes, np.uint64)
    values, inverse = np.unique(hashes, return_inverse=True)
    labels = np.arange(len(values))
    left: list[np.ndarray] = []
    right: list[np.ndarray] = []
    num_pairs = 0
    for a, b in near_pairs(values, distance):
        is_new = labels[a] != labels[b]
        left.append(a[is_new])
        right.append(b[is_new])
        num_pairs += int(is_new.sum())
        if num_pairs > MERGE_PAIRS:  # bounds memory even if every image resembles every other
            labels = _merge(labels, left, right)
            left, right, num_pairs = [], [], 0
    labels = _merge(labels, left, right)[inverse]
    flat = np.flatnonzero(hashes == FLAT)
    labels[flat] = len(values) + flat  # each by itself
    return _first_of_each(labels)


def near_pairs(
    hashes: np.ndarray, distance: int, other: np.ndarray | None = None
) -> Iterator[tuple[Positions, Positions]]:
    """Yield the pairs of near-copies, each once.

    Pairs come in pieces, because N equal hashes have N * (N - 1) / 2 of them. Pass unique values if
    many are equal. `FLAT` is in no pair.

    Args:
        hashes: (N,) uint64.
        distance: most bits in which near-copies differ.
        other: (M,) uint64, hashes that `hashes` are compared with; None: with each other.

    Yields:
        (P,) positions in `hashes`, and (P,) positions in `other`. Without `other`, both are in
        `hashes` and the first is the smaller one.
    """
    left = np.asarray(hashes, np.uint64)
    right = left if other is None else np.asarray(other, np.uint64)
    sides = np.flatnonzero(left != FLAT), np.flatnonzero(right != FLAT)
    masks = _bands(left[sides[0]], right[sides[1]], distance)
    for number, mask in enumerate(masks):
        for a, b in _buckets(left, right, sides, mask, is_same=other is None):
            for i, j in _near_in_blocks(left, right, a, b, distance):
                keep = i < j if other is None else np.ones(len(i), bool)
                # A pair that agrees in several bands was yielded with the first of them.
                for earlier in masks[:number]:
                    keep &= ((left[i] ^ right[j]) & earlier) != 0
                if keep.any():
                    yield i[keep], j[keep]


def connect(left: np.ndarray, right: np.ndarray, count: int) -> np.ndarray:
    """Find the first member of the component of each of `count` things: (count,) positions.

    Args:
        left: (P,) positions below `count`.
        right: (P,) positions that those in `left` are linked to.
        count: number of things that are linked.
    """
    ones = np.ones(len(left), np.int8)
    graph = sparse.coo_matrix((ones, (left, right)), shape=(count, count))
    return _first_of_each(connected_components(graph, directed=False)[1])


def read_group_file(path: str | Path, column: str = "group") -> dict[str, str]:
    """Read groups by id from a CSV file with the columns id and `column`.

    Other columns are ignored, and so is space around values.

    Raises:
        DataError: the file is missing or no such CSV, names a column twice, or gives an id two
            groups or none.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"There is no group file {path}; check the path.")
    try:
        return _parse_groups(decode_text(path.read_bytes()), path, column)
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(
            f"{path} is not a CSV text file ({error}); export it as CSV in UTF-8."
        ) from None


def _parse_groups(text: str, path: Path, column: str) -> dict[str, str]:
    separator = csv_separator(text.partition("\n")[0])
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=separator)
    columns = reader.fieldnames or []
    if columns.count("id") != 1 or columns.count(column) != 1:
        raise DataError(
            f"{path} has the columns {', '.join(columns) or 'none'}, but one id and one {column} "
            f"are needed; rename them or set group_column."
        )
    groups: dict[str, str] = {}
    for row in reader:
        name = (row["id"] or "").strip()
        group = (row[column] or "").strip()
        if not name or not group:
            raise DataError(
                f"{path} line {reader.line_num} lacks an id or a {column}; complete it."
            )
        if groups.setdefault(name, group) != group:
            raise DataError(f"{path} gives {name!r} two groups; keep one line for each id.")
    return groups


def _to_gray8(image: np.ndarray) -> np.ndarray:
    """Average the channels of an image (H, W, C) and stretch it to (H, W) uint8."""
    channels = image.shape[2]
    weights = np.array(GRAY_WEIGHTS) if channels == 3 else np.full(channels, 1 / channels)
    gray = image.astype(np.float32) @ weights.astype(np.float32)
    if image.dtype == np.uint8:
        return gray.round().astype(np.uint8)
    finite = np.isfinite(gray)
    lowest = gray.min(where=finite, initial=np.inf)
    return stretch_to_uint8(np.where(finite, gray, lowest))


def stretch_to_uint8(values: np.ndarray) -> np.ndarray:
    """Stretch float32 values between two percentiles to black and white; NaN becomes black."""
    finite = values[np.isfinite(values)]
    if not finite.size:
        return np.zeros(values.shape, np.uint8)
    low, high = np.percentile(finite, STRETCH)
    if high <= low:  # a few bright pixels on an empty image
        low, high = finite.min(), finite.max()
    if high <= low:
        return np.zeros(values.shape, np.uint8)
    stretched = (values - low) * (255 / (high - low))
    return np.nan_to_num(stretched, nan=0).clip(0, 255).round().astype(np.uint8)


def _bands(left: np.ndarray, right: np.ndarray, distance: int) -> list[np.uint64]:
    """Choose masks of bits such that near-copies agree in all bits of one mask.

    That holds for `distance` + 1 masks without common bits. Bits are dealt out in turn, because
    neighboring frequencies agree in many images. One empty mask, with which all hashes are compared
    with all, is returned where it is cheaper. For 200,000 hashes and 8 bits nine masks take 7 s,
    one takes 60 s.
    """
    count = distance + 1
    no_band = [np.uint64(0)]
    if count > MAX_BANDS:
        return no_band
    masks = []
    num_compared = 0.0
    for first in range(count):
        bits = np.arange(first, 64, count, dtype=np.uint64)
        mask = np.bitwise_or.reduce(np.uint64(1) << bits)
        masks.append(mask)
        values, left_counts = np.unique(left & mask, return_counts=True)
        right_values, right_counts = np.unique(right & mask, return_counts=True)
        _, i, j = np.intersect1d(values, right_values, assume_unique=True, return_indices=True)
        num_compared += float(left_counts[i].astype(float) @ right_counts[j])
    return masks if num_compared < 0.5 * len(left) * len(right) else no_band


def _buckets(
    left: np.ndarray,
    right: np.ndarray,
    sides: tuple[Positions, Positions],
    mask: np.uint64,
    *,
    is_same: bool,
) -> Iterator[tuple[Positions, Positions]]:
    """Yield (A,) and (B,) positions of hashes that agree in the bits of `mask`, for each value."""
    left_buckets = _group_by_bits(left, sides[0], mask)
    right_buckets = left_buckets if is_same else _group_by_bits(right, sides[1], mask)
    for bits, positions in left_buckets.items():
        if bits in right_buckets:
            yield positions, right_buckets[bits]


def _group_by_bits(
    hashes: np.ndarray, positions: Positions, mask: np.uint64
) -> dict[int, Positions]:
    """Return the positions by the bits of `mask` at each; positions rise within a group."""
    bits = hashes[positions] & mask
    order = np.argsort(bits, kind="stable")
    values, starts = np.unique(bits[order], return_index=True)
    groups = np.split(positions[order], starts)[1:]
    return dict(zip(values.tolist(), groups, strict=True))


def _near_in_blocks(
    left: np.ndarray, right: np.ndarray, a: Positions, b: Positions, distance: int
) -> Iterator[tuple[Positions, Positions]]:
    """Compare hashes at positions `a` with those at `b`, block by block; yield the near ones."""
    rows = max(1, BLOCK_PAIRS // max(len(b), 1))
    right_hashes = right[b]
    for start in range(0, len(a), rows):
        # Positions rise, so with itself, what lies before is the other half.
        first = start if a is b else 0
        differing = left[a[start : start + rows], None] ^ right_hashes[first:]
        i, j = np.nonzero(np.bitwise_count(differing) <= distance)
        if len(i):
            yield a[start + i], b[first + j]


def _merge(labels: np.ndarray, left: list[np.ndarray], right: list[np.ndarray]) -> np.ndarray:
    """Join the components of linked positions."""
    if not left:
        return labels
    all_left = np.concatenate([*left, np.arange(len(labels))])
    all_right = np.concatenate([*right, labels])
    return connect(all_left, all_right, len(labels))


def _first_of_each(labels: np.ndarray) -> np.ndarray:
    """Replace component numbers by the position of the component's first member."""
    _, first, inverse = np.unique(labels, return_index=True, return_inverse=True)
    return first[inverse]
