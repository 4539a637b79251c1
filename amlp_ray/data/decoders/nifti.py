"""NIfTI volumes -> slices, pixel by pixel as stored: volumes are turned to RAS axes, never resampled.

After turning, the axes of a volume run from the patient's left to right, from posterior to anterior, and from inferior
to superior. Slices are shown so:

    axial      rows from anterior to posterior, columns from left to right; first slice inferior
    coronal    rows from superior to inferior, columns from left to right; first slice posterior
    sagittal   rows from superior to inferior, columns from posterior to anterior; first slice left
"""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

import nibabel as nib
import numpy as np
from nibabel import imageglobals
from nibabel.affines import voxel_sizes
from nibabel.orientations import apply_orientation, io_orientation

from amlp_ray.config import PrepareConfig
from amlp_ray.data.decoders.frame import DTYPES, Frame
from amlp_ray.data.decoders.intensity import percentile_range, smallest_exact, to_bytes
from amlp_ray.data.decoders.masks import lesion_of
from amlp_ray.data.layouts.item import SourceImage
from amlp_ray.errors import DataError

MOST_CHANNELS = 16  # a fourth axis is longer in series of time, which are no channels
SAME_GRID = 1e-3  # mm by which two affines may differ
MILLIMETRES = {"meter": 1000.0, "micron": 0.001}
AXES = {"sagittal": 0, "coronal": 1, "axial": 2}  # of a volume turned to RAS

ConfigValues = Callable[[str], bytes]


class _Volume(NamedTuple):
    """A volume in RAS axes, as a view of the bytes of its file: nothing is copied until a slice is."""

    path: str
    stored: np.ndarray  # (X, Y, Z, C)
    slope: float  # of stored values; 1 and 0 if they are as meant
    intercept: float
    affine: np.ndarray  # (4, 4), of the file's own axes
    turn: np.ndarray  # from the file's axes to RAS, as nibabel's orientations
    zooms: tuple[float, float, float]  # mm of a voxel, along RAS axes


def read_nifti(item: SourceImage, config: PrepareConfig, read: ConfigValues) -> Iterator[Frame]:
    """Yield the slices of a volume across `settings.axis`, of one channel per modality or step of the fourth axis.

    Whole numbers keep their values: as uint8, uint16 or int16 where the file says so, else as the smallest of these
    that holds all, else as float32, as are scaled values. With `values=percentile` each channel becomes uint8 by the
    percentiles of what lies above its minimum.

    Raises:
        DataError: a file cannot be read, holds no volume of finite numbers, has another grid than the first one, or
            `values=window` comes without a window. The sentence names the file.
    """
    if config.values == "window" and config.window is None:
        raise DataError(
            f"{item.images[0]} is a NIfTI volume, which names no window, so values=window needs one to be given: add "
            f"--window LOW,HIGH in the units of the images, or take values=percentile."
        )
    first = _open(item.images[0], read)
    volumes = [first, *(_open(path, read, first.turn) for path in item.images[1:])]
    for other in volumes[1:]:
        _check_grid(
            other,
            first,
            "the modalities of a case must share one grid; register them, or prepare them apart",
        )
    channels = [
        (volume, volume.stored[..., c]) for volume in volumes for c in range(volume.stored.shape[3])
    ]
    if len(channels) > MOST_CHANNELS:
        raise DataError(
            f"{first.path} has {len(channels)} volumes along its fourth axis, but at most {MOST_CHANNELS} are taken as "
            f"channels; cut it into volumes of their own."
        )
    for volume, values in channels:
        _check_finite(volume, values)
    dtype = _dtype(channels) if config.values == "keep" else np.dtype(np.uint8)
    spans = [_span(volume, values, config) for volume, values in channels]
    mask, notes = _mask(item, config, first, read)

    axis = AXES[config.axis]
    down, across = [zoom for i, zoom in enumerate(first.zooms) if i != axis][::-1]
    for index in range(first.stored.shape[axis]):
        planes = []
        for (volume, values), span in zip(channels, spans, strict=True):
            plane = _scaled(volume, _plane(values, axis, index))
            planes.append(to_bytes(plane, *span) if span else plane.astype(dtype))
        yield Frame(
            image=np.stack(planes, axis=-1),
            mask=None if mask is None else np.ascontiguousarray(_plane(mask, axis, index)),
            number=index,
            spacing=(down, across),
            notes=notes if index == 0 else (),
        )


def _plane(values: np.ndarray, axis: int, index: int) -> np.ndarray:
    """Cut a slice out of (X, Y, Z) in RAS axes, turned as people look at it: the later axis goes down, from its end."""
    return np.take(values, index, axis)[:, ::-1].T


def _open(path: str, read: ConfigValues, turn: np.ndarray | None = None) -> _Volume:
    """Read a volume and turn it to RAS, or by `turn`: of two oblique volumes on one grid, each may round otherwise.

    Raises:
        DataError: it cannot be used.
    """
    image, content = _parse(path, read)
    proxy = image.dataobj
    if proxy.dtype.fields is not None or proxy.dtype.kind not in "uif":
        kind = "colour (RGB)" if proxy.dtype.fields is not None else str(proxy.dtype)
        raise DataError(
            f"{path} holds values of kind {kind}, but whole and floating point numbers are accepted; convert it."
        )
    shape = tuple(int(n) for n in proxy.shape)
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    shape = (*shape, 1) if len(shape) == 2 else shape
    if len(shape) == 5 and shape[3] == 1:  # NIfTI's own place for several values a voxel
        shape = (*shape[:3], shape[4])
    if len(shape) not in (3, 4) or min(shape) < 1:
        raise DataError(
            f"{path} has {'x'.join(map(str, proxy.shape))} values, but volumes of three axes, and a fourth one of "
            f"channels, are accepted; convert it."
        )
    shape = shape if len(shape) == 4 else (*shape, 1)
    try:
        flat = np.frombuffer(content, proxy.dtype, int(np.prod(shape)), int(proxy.offset))
    except ValueError:
        needed = int(np.prod(shape)) * proxy.dtype.itemsize
        raise DataError(
            f"{path} ends too early ({max(0, len(content) - int(proxy.offset))} bytes of values where its header "
            f"claims {needed}); copy it again."
        ) from None
    affine = np.asarray(image.affine, np.float64)
    own_turn = io_orientation(affine) if np.isfinite(affine).all() else np.full((3, 2), np.nan)
    if not np.isfinite(own_turn).all():
        raise DataError(
            f"{path} has an affine that gives no direction to an axis, so left and right are unknown; repair it."
        )
    turn = own_turn if turn is None else turn
    # What nibabel.as_closest_canonical does, but of the stored values: no copy, and no scaled float64 of it.
    stored = apply_orientation(flat.reshape(shape, order="F"), turn)
    to_mm = MILLIMETRES.get(image.header.get_xyzt_units()[0], 1.0)
    sizes = voxel_sizes(affine) * to_mm
    zooms = [0.0, 0.0, 0.0]
    for size, ras_axis in zip(sizes, turn[:, 0].astype(int), strict=True):
        zooms[ras_axis] = round(float(size), 6)  # affines are float32
    return _Volume(
        path,
        stored,
        float(proxy.slope),
        float(proxy.inter),
        affine,
        turn,
        (zooms[0], zooms[1], zooms[2]),
    )


def _parse(path: str, read: ConfigValues) -> tuple[nib.Nifti1Image, bytes]:
    """Return the header, as an image that has no values loaded, and the unzipped file."""
    try:
        content = read(path)
    except OSError as error:
        raise DataError(
            f"{path} cannot be read ({error.strerror or error}); check that it is there and yours."
        ) from None
    try:
        if content[:2] == b"\x1f\x8b":  # not by name: both kinds of wrong names are common
            content = gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be unzipped ({_brief(error)}); copy it again.") from None
    if content[344:348] == b"ni1\0" or content[4:8] == b"ni2\0":
        raise DataError(
            f"{path} is one half of a pair (.hdr and .img), but single files are accepted; save it as .nii."
        )
    if len(content) < 348 or (content[344:348] != b"n+1\0" and content[4:8] != b"n+2\0"):
        found = "is empty" if not content else "does not begin as NIfTI files do"
        raise DataError(
            f"{path} {found}, but .nii and .nii.gz are accepted; export it again or remove it."
        )
    kind = nib.Nifti2Image if content[4:8] == b"n+2\0" else nib.Nifti1Image
    try:
        with imageglobals.LoggingOutputSuppressor():  # it prints what it repairs
            return kind.from_bytes(content), content
    except Exception as error:  # nibabel raises many types on damaged headers
        raise DataError(
            f"{path} has a damaged NIfTI header ({_brief(error)}); export it again or remove it."
        ) from None


def _scaled(volume: _Volume, values: np.ndarray) -> np.ndarray:
    """Apply slope and intercept, as float32; whole numbers that have none stay."""
    if volume.slope == 1 and volume.intercept == 0:
        return values
    with np.errstate(over="ignore"):
        return (values.astype(np.float64) * volume.slope + volume.intercept).astype(np.float32)


def _is_float(volume: _Volume) -> bool:
    return volume.stored.dtype.kind == "f" or volume.slope != 1 or volume.intercept != 0


def _check_finite(volume: _Volume, values: np.ndarray) -> None:
    if not _is_float(volume):
        return
    with np.errstate(over="ignore"):
        # Slice by slice, so that no second volume is made.
        bad = sum(
            int((~np.isfinite(_scaled(volume, values[:, :, k]).astype(np.float32))).sum())
            for k in range(values.shape[2])
        )
    if bad:
        raise DataError(
            f"{volume.path} holds {bad} values that are NaN, infinite or too large for float32, but finite numbers are "
            f"needed; replace them, or remove the file."
        )


def _dtype(channels: list[tuple[_Volume, np.ndarray]]) -> np.dtype:
    """Return the smallest of the accepted types that holds all channels exactly, else float32."""
    kinds = set()
    for volume, values in channels:
        native = values.dtype.newbyteorder("=")
        if _is_float(volume):
            kinds.add(np.dtype(np.float32))
        elif native.name in DTYPES:
            kinds.add(native)
        else:
            ends = np.array([values.min(), values.max()])
            kinds.add(smallest_exact(ends, int(ends[0]), int(ends[1])).dtype)
    common = np.result_type(*kinds)
    return common if common.name in DTYPES else np.dtype(np.float32)


def _span(volume: _Volume, values: np.ndarray, config: PrepareConfig) -> tuple[float, float] | None:
    """Return what becomes 0 and 255 in a channel; None: values are kept."""
    if config.values == "percentile":
        return percentile_range(_scaled(volume, values))
    return config.window if config.values == "window" else None


def _mask(
    item: SourceImage, config: PrepareConfig, image: _Volume, read: ConfigValues
) -> tuple[np.ndarray | None, tuple[str, ...]]:
    """Unite the label volumes of an item, (X, Y, Z) uint8 of 0 and 1 in RAS axes, with notes."""
    if not item.masks:
        return None, ()
    union = np.zeros(image.stored.shape[:3], np.uint8)
    notes: list[str] = []
    for path in item.masks:
        volume = _open(path, read, image.turn)
        if volume.stored.shape[3] != 1:
            raise DataError(
                f"{path} is a label volume with {volume.stored.shape[3]} values a voxel, but one is accepted; keep one "
                f"number per voxel."
            )
        _check_grid(volume, image, "labels must lie on the grid of their image; resample them")
        mask, found = lesion_of(
            _whole(_scaled(volume, volume.stored[..., 0])), config.lesion_labels
        )
        union |= mask
        notes += found
    return union, tuple(notes)


def _whole(labels: np.ndarray) -> np.ndarray:
    """Round labels that are whole numbers but for the rounding of a scaled file; probabilities stay."""
    if labels.dtype.kind != "f":
        return labels
    rounded = np.rint(labels)
    return rounded if np.abs(labels - rounded).max() < SAME_GRID else labels


def _check_grid(other: _Volume, first: _Volume, advice: str) -> None:
    """Compare in the files' own axes: two that are equal are turned alike."""
    own, theirs = _own_shape(other), _own_shape(first)
    if own != theirs:
        found = (
            f"has {'x'.join(map(str, own))} voxels and {first.path} {'x'.join(map(str, theirs))}"
        )
    elif not np.allclose(other.affine, first.affine, rtol=0, atol=SAME_GRID):
        gap = np.abs(other.affine - first.affine).max()
        found = f"lies elsewhere than {first.path} (their affines differ by up to {gap:.3g})"
    else:
        return
    raise DataError(f"{other.path} {found}, but {advice}.")


def _own_shape(volume: _Volume) -> tuple[int, ...]:
    return tuple(volume.stored.shape[axis] for axis in volume.turn[:, 0].astype(int))


def _brief(error: BaseException) -> str:
    return " ".join(str(error).split()).rstrip(".")[:200] or type(error).__name__
