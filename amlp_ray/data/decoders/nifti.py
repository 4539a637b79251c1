"""Decode NIfTI volumes to slices, pixel by pixel as stored.

Volumes are turned to RAS axes, never resampled. After turning, the axes of a volume run from the
patient's left to right, from posterior to anterior, and from inferior to superior. Slices come so:

    axial      rows from anterior to posterior, columns from left to right; first slice inferior
    coronal    rows from superior to inferior, columns from left to right; first slice posterior
    sagittal   rows from superior to inferior, columns from posterior to anterior; first slice left
"""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator
from typing import NamedTuple

import nibabel as nib
import numpy as np
from nibabel import imageglobals
from nibabel.orientations import apply_orientation, io_orientation

from amlp_ray.config import PrepareConfig
from amlp_ray.data.decoders.frame import DTYPES, Frame, ReadFile, common_dtype, read_content
from amlp_ray.data.decoders.intensity import percentile_range, smallest_exact, to_bytes
from amlp_ray.data.decoders.mask_rule import MaskRule, choose_rule
from amlp_ray.data.decoders.mask_values import MaskValues
from amlp_ray.data.decoders.nifti_geometry import Grid, read_grid
from amlp_ray.data.decoders.nifti_labels import clean_labels, find_lesion_voxels, label_values
from amlp_ray.data.layouts.item import SourceImage
from amlp_ray.errors import DataError, describe_error

MAX_CHANNELS = 16  # a fourth axis is longer in series of time, which are no channels
AXES = {"sagittal": 0, "coronal": 1, "axial": 2}  # of a volume turned to RAS
HEADER_BYTES = 348  # of NIfTI-1, the shorter one
MODALITY_ADVICE = (
    "the modalities of a case must share one grid; register them, or prepare them apart"
)
GZIP = b"\x1f\x8b"


class _Volume(NamedTuple):
    """A volume in RAS axes, as a view of the bytes of its file: only slices are copied."""

    path: str
    stored: np.ndarray  # (X, Y, Z, C)
    slope: float  # of stored values; 1 and 0 if they need no scaling
    intercept: float
    grid: Grid
    turn: np.ndarray  # from the file's axes to RAS, as nibabel's orientations
    zooms: tuple[float, ...]  # mm of a voxel, along RAS axes

    @property
    def file_shape(self) -> tuple[int, ...]:
        """Voxels along the file's own axes."""
        return tuple(self.stored.shape[axis] for axis in self.turn[:, 0].astype(int))

    @property
    def is_float(self) -> bool:
        """Whether the scaled values are floats."""
        return self.stored.dtype.kind == "f" or self.slope != 1 or self.intercept != 0

    def scale(self, values: np.ndarray) -> np.ndarray:
        """Apply slope and intercept, as float32; values that need no scaling stay."""
        if self.slope == 1 and self.intercept == 0:
            return values
        with np.errstate(over="ignore"):
            scaled = values.astype(np.float64) * self.slope + self.intercept
            return scaled.astype(np.float32)


class _Channel(NamedTuple):
    """One channel of the frames."""

    volume: _Volume
    values: np.ndarray  # (X, Y, Z), as stored


class _Mask(NamedTuple):
    """The union of the label volumes of an item."""

    lesion: np.ndarray  # (X, Y, Z) uint8 of 0 and 1, in RAS axes
    values: tuple[MaskValues, ...]  # of each label volume
    notes: tuple[str, ...]


def read_nifti(
    item: SourceImage, config: PrepareConfig, read: ReadFile, mask_rule: MaskRule | None = None
) -> Iterator[Frame]:
    """Yield the slices of a volume across `config.axis`.

    There is a channel per modality, or per step of the fourth axis. Whole numbers keep their
    values: as uint8, uint16 or int16 if the file says so, else as the smallest of these that holds
    all, else as float32. Scaled values are float32 too. With `values=percentile` each channel
    becomes uint8 by the percentiles of what lies above its minimum.

    Soft labels are read by `mask_rule`, or by one that the labels of this item suggest.

    Raises:
        DataError: a file cannot be read, holds no volume of finite numbers, or has another grid
            than the first one; or `values=window` comes without a window. The sentence names the
            file.
    """
    if config.values == "window" and config.window is None:
        raise DataError(
            f"{item.images[0]} is a NIfTI volume, which names no window, so values=window needs "
            "one to be given: add --window LOW,HIGH in the units of the images, or take "
            "values=percentile."
        )
    channels = _open_channels(item, read)
    first = channels[0].volume
    dtype = _common_dtype(channels) if config.values == "keep" else "uint8"
    ranges = [config.window] * len(channels)
    if config.values == "percentile":
        ranges = [percentile_range(volume.scale(values)) for volume, values in channels]
    mask = _read_mask(item, config, first, read, mask_rule) if item.masks else None
    notes = mask.notes if mask else ()
    guesses = [channel.volume.grid.note for channel in channels if channel.volume.grid.note]
    notes = (*dict.fromkeys(guesses), *notes)
    axis = AXES[config.axis]
    across, down = [zoom for i, zoom in enumerate(first.zooms) if i != axis]
    for index in range(first.stored.shape[axis]):
        planes = []
        for channel, value_range in zip(channels, ranges, strict=True):
            plane = channel.volume.scale(_cut(channel.values, axis, index))
            planes.append(to_bytes(plane, *value_range) if value_range else plane.astype(dtype))
        yield Frame(
            image=np.stack(planes, axis=-1),
            mask=np.ascontiguousarray(_cut(mask.lesion, axis, index)) if mask else None,
            number=index,
            spacing=(down, across),
            notes=notes if index == 0 else (),
            mask_values=mask.values if mask and index == 0 else (),
        )


def _open_channels(item: SourceImage, read: ReadFile) -> list[_Channel]:
    """Open the volumes of an item and return their channels. Raises DataError if one is unfit."""
    first = _open(item.images[0], read)
    volumes = [first]
    for path in item.images[1:]:
        volume = _open(path, read, first.turn)
        _check_grid(volume, first, MODALITY_ADVICE)
        volumes.append(volume)
    channels = []
    for volume in volumes:
        for c in range(volume.stored.shape[3]):
            channels.append(_Channel(volume, volume.stored[..., c]))
    if len(channels) > MAX_CHANNELS:
        raise DataError(
            f"{first.path} has {len(channels)} volumes along its fourth axis, but at most "
            f"{MAX_CHANNELS} are taken as channels; cut it into volumes of their own."
        )
    for channel in channels:
        _check_finite(channel)
    return channels


def _cut(values: np.ndarray, axis: int, index: int) -> np.ndarray:
    """Cut a slice out of (X, Y, Z) in RAS axes; the later axis goes down, from its end."""
    return np.take(values, index, axis)[:, ::-1].T


def _open(path: str, read: ReadFile, turn: np.ndarray | None = None) -> _Volume:
    """Read a volume and turn it to RAS. Raises DataError if it cannot be used.

    `turn` replaces its own orientations: of two oblique volumes on one grid, each may round
    otherwise.
    """
    image, content = _parse(path, read)
    proxy = image.dataobj
    if proxy.dtype.fields is not None or proxy.dtype.kind not in "uif":
        kind = "color (RGB)" if proxy.dtype.fields is not None else str(proxy.dtype)
        raise DataError(
            f"{path} holds values of kind {kind}, but whole and floating point numbers are "
            "accepted; convert it."
        )
    shape = _volume_shape(path, tuple(map(int, proxy.shape)))
    count = int(np.prod(shape))
    offset = int(proxy.offset)
    try:
        flat = np.frombuffer(content, proxy.dtype, count, offset)
    except ValueError:
        available = max(0, len(content) - offset)
        raise DataError(
            f"{path} ends too early ({available} bytes of values where its header claims "
            f"{count * proxy.dtype.itemsize}); copy it again."
        ) from None
    grid = read_grid(path, image)
    if turn is None:
        turn = io_orientation(grid.affine)
    # As nibabel.as_closest_canonical, but of the stored values: no copy, and no scaled float64.
    stored = apply_orientation(flat.reshape(shape, order="F"), turn)
    zooms = [0.0, 0.0, 0.0]
    for size, ras_axis in zip(grid.sizes, turn[:, 0].astype(int), strict=True):
        zooms[ras_axis] = size
    return _Volume(
        path=path,
        stored=stored,
        slope=float(proxy.slope),
        intercept=float(proxy.inter),
        grid=grid,
        turn=turn,
        zooms=tuple(zooms),
    )


def _volume_shape(path: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return a shape as (X, Y, Z, C). Raises DataError if it is no volume with channels."""
    full = shape
    while len(full) > 3 and full[-1] == 1:
        full = full[:-1]
    if len(full) == 2:
        full = (*full, 1)
    if len(full) == 5 and full[3] == 1:  # NIfTI's own place for several values a voxel
        full = (*full[:3], full[4])
    if len(full) not in (3, 4) or min(full) < 1:
        raise DataError(
            f"{path} has {_times(shape)} values, but volumes of three axes, and a fourth one of "
            "channels, are accepted; convert it."
        )
    return full if len(full) == 4 else (*full, 1)


def _times(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


def _parse(path: str, read: ReadFile) -> tuple[nib.Nifti1Image, bytes]:
    """Return the header, as an image that has no values loaded, and the unzipped file."""
    content = read_content(path, read)
    # Not by name: both kinds of wrong names are common.
    if content[:2] == GZIP:
        try:
            content = gzip.decompress(content)
        except (OSError, EOFError, zlib.error) as error:
            raise DataError(
                f"{path} cannot be unzipped ({describe_error(error)}); copy it again."
            ) from None
    if content[344:348] == b"ni1\0" or content[4:8] == b"ni2\0":
        raise DataError(
            f"{path} is one half of a pair (.hdr and .img), but single files are accepted; "
            "save it as .nii."
        )
    is_nifti_1 = content[344:348] == b"n+1\0"
    is_nifti_2 = content[4:8] == b"n+2\0"
    if len(content) < HEADER_BYTES or not (is_nifti_1 or is_nifti_2):
        problem = "does not begin as NIfTI files do" if content else "is empty"
        raise DataError(
            f"{path} {problem}, but .nii and .nii.gz are accepted; export it again or remove it."
        )
    kind = nib.Nifti2Image if is_nifti_2 else nib.Nifti1Image
    try:
        with imageglobals.LoggingOutputSuppressor():  # it prints what it repairs
            return kind.from_bytes(content), content
    except Exception as error:  # nibabel raises many types on damaged headers
        raise DataError(
            f"{path} has a damaged NIfTI header ({describe_error(error)}); "
            "export it again or remove it."
        ) from None


def _check_finite(channel: _Channel) -> None:
    """Raise DataError if a channel holds values that float32 cannot hold."""
    volume, values = channel
    if not volume.is_float:
        return
    bad_values = 0
    with np.errstate(over="ignore"):
        for z in range(values.shape[2]):  # slice by slice, so that no second volume is made
            scaled = volume.scale(values[:, :, z]).astype(np.float32)
            bad_values += int((~np.isfinite(scaled)).sum())
    if bad_values:
        raise DataError(
            f"{volume.path} holds {bad_values} values that are NaN, infinite or too large for "
            "float32, but finite numbers are needed; replace them, or remove the file."
        )


def _common_dtype(channels: list[_Channel]) -> str:
    """Return the smallest of the stored types that holds all channels exactly, else float32."""
    dtypes = set()
    for volume, values in channels:
        dtype = "float32" if volume.is_float else values.dtype.name
        if dtype not in DTYPES:
            ends = np.array([values.min(), values.max()])
            dtype = smallest_exact(ends, int(ends[0]), int(ends[1])).dtype.name
        dtypes.add(dtype)
    return common_dtype(dtypes)


def _read_mask(
    item: SourceImage,
    config: PrepareConfig,
    image: _Volume,
    read: ReadFile,
    rule: MaskRule | None,
) -> _Mask:
    """Unite the label volumes of an item."""
    volumes: dict[str, np.ndarray] = {}
    notes: list[str] = []
    for path in item.masks:
        volume = _open(path, read, image.turn)
        if volume.stored.shape[3] != 1:
            raise DataError(
                f"{path} is a label volume with {volume.stored.shape[3]} values a voxel, but one "
                "is accepted; keep one number per voxel."
            )
        _check_grid(volume, image, "labels must lie on the grid of their image; resample them")
        volumes[path], label_notes = clean_labels(path, volume.scale(volume.stored[..., 0]))
        notes += label_notes
    values = tuple(label_values(path, labels, config) for path, labels in volumes.items())
    rule = rule or choose_rule(values, config)
    union = np.zeros(image.stored.shape[:3], np.uint8)
    for labels, one in zip(volumes.values(), values, strict=True):
        lesion, label_notes = find_lesion_voxels(labels, one, rule, config)
        union |= lesion
        notes += label_notes
    return _Mask(union, values, tuple(notes))


def _check_grid(volume: _Volume, first: _Volume, advice: str) -> None:
    """Raise DataError if two volumes differ in shape or grid, both of the files' own axes."""
    shape = volume.file_shape
    first_shape = first.file_shape
    if shape != first_shape:
        problem = f"has {_times(shape)} voxels and {first.path} {_times(first_shape)}"
    elif not volume.grid.is_same(first.grid):
        gap = volume.grid.distance(first.grid)
        problem = f"lies elsewhere than {first.path} (their affines differ by up to {gap:.3g})"
    else:
        return
    raise DataError(f"{volume.path} {problem}, but {advice}.")
