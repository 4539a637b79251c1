"""Pass 1 of preparing: decode every item once, to find its faults and what will be cut from it. Nothing is written.

Runs in Ray Data workers. A fault comes back as a sentence, since an exception would reach the user as Ray's.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, NamedTuple

from amlp_ray.config import PrepareConfig
from amlp_ray.data.decoders import common_dtype, read_frames
from amlp_ray.data.decoders.image import is_gray
from amlp_ray.data.layouts import SourceImage
from amlp_ray.data.path import read_bytes
from amlp_ray.data.prepare.crop import Cutting, cuttings, scaled
from amlp_ray.data.prepare.near_duplicates import perceptual_hash
from amlp_ray.errors import DataError

ITEM_FIELDS = tuple(SourceImage.__dataclass_fields__)


class FrameScan(NamedTuple):
    """What pass 1 learns of one frame."""

    number: int
    height: int
    width: int
    spacing: tuple[float, float] | None
    hash: int
    cuttings: tuple[Cutting, ...]  # those kept


class ImageScan(NamedTuple):
    """What pass 1 learns of one item; a `fault` leaves the rest empty."""

    fault: str = ""
    notes: tuple[str, ...] = ()  # repairs
    digest: str = ""  # SHA-256 of all files that were read
    dtype: str = ""
    channels: int = 0
    gray: bool = True
    frames: tuple[FrameScan, ...] = ()
    dropped: int = 0  # tiles and slices with too little tissue

    @property
    def lesion(self) -> bool:
        """Whether anything kept holds a lesion; False as well where unlabelled."""
        return any(cutting.lesion for frame in self.frames for cutting in frame.cuttings)


class Reader:
    """Reads files and hashes what it reads, in the order it is asked."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()

    def __call__(self, path: str) -> bytes:
        content = read_bytes(path)
        self._hash.update(hashlib.sha256(content).digest())
        return content

    @property
    def digest(self) -> str:
        return self._hash.hexdigest()


def analyze(item: SourceImage, config: PrepareConfig) -> ImageScan:
    """Decode an item, and say what of it is kept."""
    read, frames, notes, kinds, dropped = Reader(), [], [], set(), 0
    gray = True
    try:
        for frame in read_frames(item, config, read):
            image, mask = scaled(frame.image, frame.mask, config)
            every = list(cuttings(image, mask, config))
            kept = tuple(cutting for cutting in every if keeps(item, cutting, config))
            dropped += len(every) - len(kept)
            kinds.add((frame.image.dtype.name, frame.image.shape[2]))
            gray = gray and is_gray(frame.image)
            notes += [note for note in frame.notes if note not in notes]
            height, width = frame.image.shape[:2]
            if kept:
                frames.append(
                    FrameScan(
                        frame.number,
                        height,
                        width,
                        frame.spacing,
                        perceptual_hash(frame.image),
                        kept,
                    )
                )
    except DataError as error:
        return ImageScan(fault=str(error))
    except OSError as error:
        path = error.filename or item.images[0]
        return ImageScan(
            fault=f"{path} cannot be read ({error.strerror or error}); check its rights and that every node sees it."
        )
    except MemoryError:
        return ImageScan(fault=f"{item.images[0]} does not fit in memory; cut it in pieces.")
    channels = {of[1] for of in kinds}
    if len(channels) != 1:
        found = " and ".join(map(str, sorted(channels))) or "no"
        return ImageScan(
            fault=f"{item.images[0]} and what belongs to it hold images of {found} channels; keep one kind."
        )
    dtype = common_dtype(
        {of[0] for of in kinds}
    )  # one slice of a series may need more bits than the others
    return ImageScan(
        "", tuple(notes), read.digest, dtype, channels.pop(), gray, tuple(frames), dropped
    )


def keeps(item: SourceImage, cutting: Cutting, config: PrepareConfig) -> bool:
    """Whether an image is worth storing: whole pictures always; tiles and slices with tissue or a lesion."""
    whole_picture = item.format == "picture" and config.fit != "tiles"
    return whole_picture or cutting.lesion or cutting.foreground >= config.min_foreground


def look_job(run_spec: dict[str, Any]) -> list[Any]:
    """Look at the items of a job, in a worker; both are plain values."""
    config = PrepareConfig.model_validate(run_spec["config"])
    return [analyze(item_of(row), config) for row in run_spec["items"]]


def item_row(item: SourceImage) -> list[Any]:
    """An item as plain values, the inverse of `item_of`."""
    return [getattr(item, name) for name in ITEM_FIELDS]


def item_of(row: Sequence[Any]) -> SourceImage:
    values = dict(zip(ITEM_FIELDS, row, strict=True))
    return SourceImage(
        **values | {"images": tuple(values["images"]), "masks": tuple(values["masks"])}
    )


def look_of(row: Sequence[Any]) -> ImageScan:
    """A look from plain values, as JSON gives back what `look_job` returned."""
    look = ImageScan(*row)
    frames = tuple(
        FrameScan(*frame)._replace(
            spacing=None if frame[3] is None else (frame[3][0], frame[3][1]),
            cuttings=tuple(Cutting(*cutting) for cutting in frame[5]),
        )
        for frame in look.frames
    )
    return look._replace(notes=tuple(look.notes), frames=frames)
