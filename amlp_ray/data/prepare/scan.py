"""Pass 1 of preparing: decode every item to find its faults and what will be cut from it.

Nothing is written. Ray Data workers run it. A fault comes back as a sentence, because an exception
would reach the user as Ray's.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from pydantic import TypeAdapter

from amlp_ray.config import PrepareConfig
from amlp_ray.data.decoders import MaskRule, common_dtype, read_frames
from amlp_ray.data.decoders.image import is_gray
from amlp_ray.data.decoders.mask_values import MaskValues
from amlp_ray.data.layouts import SourceImage
from amlp_ray.data.path import read_bytes
from amlp_ray.data.prepare.crop import Crop, iter_crops, scaled
from amlp_ray.data.prepare.near_duplicates import perceptual_hash
from amlp_ray.errors import DataError


class FrameScan(NamedTuple):
    """Result of pass 1 for one frame."""

    number: int
    height: int
    width: int
    spacing: tuple[float, float] | None  # millimeters of a pixel, down and across
    hash: int  # see `perceptual_hash`
    crops: tuple[Crop, ...]  # those worth storing


class MaskArea(NamedTuple):
    """How much of the frames of an item is marked as lesion."""

    pixels: int = 0
    lesion_pixels: int = 0
    border_pixels: int = 0
    border_lesion_pixels: int = 0

    @property
    def lesion_share(self) -> float:
        """Share of all pixels; 0 if unlabeled."""
        return self.lesion_pixels / max(1, self.pixels)

    @property
    def border_share(self) -> float:
        """Share of the outermost pixels; 0 if unlabeled."""
        return self.border_lesion_pixels / max(1, self.border_pixels)

    def plus(self, mask: np.ndarray) -> MaskArea:
        """Add the mask (H, W) of a frame."""
        border = mask.copy()
        border[1:-1, 1:-1] = 0
        inside = mask[1:-1, 1:-1]
        return MaskArea(
            self.pixels + mask.size,
            self.lesion_pixels + int(np.count_nonzero(mask)),
            self.border_pixels + mask.size - inside.size,
            self.border_lesion_pixels + int(np.count_nonzero(border)),
        )


class ItemScan(NamedTuple):
    """Result of pass 1 for one item; a `fault` leaves the rest empty."""

    fault: str = ""
    notes: tuple[str, ...] = ()  # repairs
    digest: str = ""  # SHA-256 of all files that were read
    dtype: str = ""
    channels: int = 0
    gray: bool = True
    frames: tuple[FrameScan, ...] = ()
    dropped: int = 0  # tiles and slices with too little tissue
    mask_area: MaskArea = MaskArea()
    mask_values: tuple[MaskValues, ...] = ()  # of the mask files of a picture

    @property
    def num_images(self) -> int:
        """Number of images that are stored."""
        return sum(len(frame.crops) for frame in self.frames)

    @property
    def num_lesions(self) -> int:
        """Number of stored images that hold a lesion; 0 if unlabeled."""
        return sum(crop.lesion for frame in self.frames for crop in frame.crops)


class ScannedItem(NamedTuple):
    """An item and the result of pass 1 for it."""

    item: SourceImage
    scan: ItemScan


class HashingReader:
    """Read files, and hash their contents in the order of reading."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()

    def __call__(self, path: str) -> bytes:
        """Return the content of a file. Raises OSError."""
        content = read_bytes(path)
        self._hash.update(hashlib.sha256(content).digest())
        return content

    @property
    def digest(self) -> str:
        """Hash of all contents so far."""
        return self._hash.hexdigest()


def scan_item(
    item: SourceImage, config: PrepareConfig, mask_rule: MaskRule | None = None
) -> ItemScan:
    """Decode an item, and find what of it is worth storing.

    Its masks are read by the rule of the set if that is known.
    """
    reader = HashingReader()
    frames = []
    notes: dict[str, None] = {}  # without repetitions, in order
    dtypes: set[str] = set()
    channels: set[int] = set()
    gray = True
    dropped = 0
    mask_area = MaskArea()
    mask_values: list[MaskValues] = []
    try:
        for frame in read_frames(item, config, reader, mask_rule):
            mask_values += frame.mask_values
            mask_area = mask_area if frame.mask is None else mask_area.plus(frame.mask)
            notes |= dict.fromkeys(frame.notes)
            dtypes.add(frame.image.dtype.name)
            channels.add(frame.image.shape[2])
            gray = gray and is_gray(frame.image)
            image, mask = scaled(frame.image, frame.mask, config)
            crops = list(iter_crops(image, mask, config))
            stored = tuple(crop for crop in crops if _is_worth_storing(item, crop, config))
            dropped += len(crops) - len(stored)
            if stored:
                height, width = frame.image.shape[:2]
                image_hash = perceptual_hash(frame.image)
                frames.append(
                    FrameScan(frame.number, height, width, frame.spacing, image_hash, stored)
                )
    except DataError as error:
        return ItemScan(fault=str(error))
    except OSError as error:
        path = error.filename or item.images[0]
        return ItemScan(
            fault=f"{path} cannot be read ({error.strerror or error}); check its rights and that "
            f"every node sees it."
        )
    except MemoryError:
        return ItemScan(fault=f"{item.images[0]} does not fit in memory; cut it in pieces.")
    if len(channels) != 1:
        counts = " and ".join(str(count) for count in sorted(channels)) or "no"
        return ItemScan(
            fault=f"{item.images[0]} and what belongs to it hold images of {counts} channels; "
            f"keep one kind."
        )
    return ItemScan(
        notes=tuple(notes),
        digest=reader.digest,
        dtype=common_dtype(dtypes),  # one slice of a series may need more bits than the others
        channels=channels.pop(),
        gray=gray,
        frames=tuple(frames),
        dropped=dropped,
        mask_area=mask_area,
        mask_values=tuple(mask_values),
    )


def _is_worth_storing(item: SourceImage, crop: Crop, config: PrepareConfig) -> bool:
    """Take whole pictures always, and tiles and slices that hold tissue or a lesion."""
    is_whole_picture = item.format == "picture" and config.fit != "tiles"
    return is_whole_picture or crop.lesion or crop.foreground >= config.min_foreground


def scan_job(job: dict[str, Any]) -> list[Any]:
    """Scan the items of a job, in a worker; job and results are plain values."""
    config = PrepareConfig.model_validate(job["config"])
    mask_rule = MaskRule(*job["mask_rule"]) if job["mask_rule"] else None
    return [scan_item(item_from_row(row), config, mask_rule) for row in job["items"]]


# A field each, in order; JSON turns tuples into lists, and back by `item_from_row` and `SCANS`.
ITEM_FIELDS = tuple(SourceImage.__dataclass_fields__)
ITEM = TypeAdapter(SourceImage)
SCANS = TypeAdapter(list[ItemScan])


def item_to_row(item: SourceImage) -> list[Any]:
    """Turn an item into plain values."""
    return [getattr(item, name) for name in ITEM_FIELDS]


def item_from_row(row: Sequence[Any]) -> SourceImage:
    """Restore an item from `item_to_row`, also after JSON."""
    return ITEM.validate_python(dict(zip(ITEM_FIELDS, row, strict=True)))
