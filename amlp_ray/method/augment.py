"""Normalisation and augmentation of a batch on its device, in one call: random resized crops, flips and intensity.

Every number comes from `noise`, so an image's crop depends on (seed, epoch, image) and not on its batch.

The positions of one purpose's numbers, which never move, so that a new kind of augmentation changes no earlier result:
0-4 crop and left-right flip, 5-6 SimSiam's own contrast and brightness (`siamese`), 7 upside-down flip, 8-10 intensity.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from amlp_ray.config import ImageSpec
from amlp_ray.method import counter_rng

Mask = TypeVar("Mask", Tensor, None)

# At intensity 1. nnU-Net draws contrast from 0.75-1.25 and gamma from 0.7-1.5: about an intensity of 0.5.
BRIGHTNESS = 0.5  # SDs of the data set, up or down
CONTRAST = 1.6  # times, or divided by
GAMMA = 2.0  # exponent, or one over it


def normalize(images: Tensor, spec: ImageSpec) -> Tensor:
    """Scale stored images (B, C, H, W) of any dtype to float32 of mean 0 and SD 1 per channel of the training split.

    The only step that knows a dtype: uint16 has no arithmetic in torch, and int16 of CT lies far below 0.
    """
    mean, std = _scale(spec, images.device)
    return (images.float() - mean).div_(std)


@lru_cache(maxsize=16)
def _scale(spec: ImageSpec, device: torch.device) -> tuple[Tensor, Tensor]:
    """Mean and SD, (1, C, 1, 1) each, kept: copying them to a GPU anew would make every step wait for it."""
    with torch.inference_mode(False):  # kept tensors serve training too
        mean, std = (
            torch.tensor(x, device=device).view(1, -1, 1, 1) for x in (spec.mean, spec.std)
        )
    return mean, std


def augment(
    images: Tensor,
    masks: Mask,
    keys: Tensor,
    *,
    min_crop_area: float = 1.0,
    flip: bool = False,
    flip_vertical: bool = False,
    intensity_jitter: float = 0.0,
    seed: int,
    epoch: int,
    stream: int = counter_rng.CROP,
) -> tuple[Tensor, Mask]:
    """Cut, mirror and recolour normalised images and cut their masks alike; with all of it off, nothing is touched.

    Args:
        images: (B, C, H, W), normalised. masks: (B, H, W) of any dtype, by nearest pixel, so that labels stay labels.
        keys: (B,) int64 on the images' device, identities.
        min_crop_area, flip, flip_vertical: see `random_crop`. intensity: see `recoloured`.
    """
    crop = random_crop(
        keys,
        min_crop_area=min_crop_area,
        flip=flip,
        flip_vertical=flip_vertical,
        seed=seed,
        epoch=epoch,
        stream=stream,
    )
    if masks is not None and crop is not None:
        masks = cropped(masks[:, None].to(crop.dtype), crop, mode="nearest")[:, 0].to(masks.dtype)
    return recolored(
        cropped(images, crop), keys, intensity_jitter, seed=seed, epoch=epoch, stream=stream
    ), masks


def random_crop(
    keys: Tensor,
    *,
    min_crop_area: float,
    flip: bool,
    flip_vertical: bool = False,
    seed: int,
    epoch: int,
    stream: int = counter_rng.CROP,
) -> Tensor | None:
    """Draw a random part of every image: area share min_crop_area to 1, sides 3:4 to 4:3.

    Args:
        keys: (B,) int64, identities; the crop depends on (seed, epoch, key).
        flip: mirror half of the images left to right.
        flip_vertical: turn half of them upside down: right for skin, tissue under a microscope and brain slices, wrong
            where depth has a direction, as in ultrasound, whose shadows point down.

    Returns:
        (B, 2, 3) affine maps for `cropped`, or None where images stay as they are.
    """
    if min_crop_area == 1 and not flip and not flip_vertical:
        return None
    u = counter_rng.uniform(keys, 8, seed=seed, epoch=epoch, stream=stream)
    area = min_crop_area + (1 - min_crop_area) * u[:, 0]
    aspect = (4 / 3) ** (u[:, 1] * 2 - 1) if min_crop_area < 1 else torch.ones_like(area)
    # A side that would leave the image is cut; the other is then kept from falling below the least area.
    half_w, half_h = (
        (area * aspect).sqrt().clamp(min_crop_area, 1),
        (area / aspect).sqrt().clamp(min_crop_area, 1),
    )
    center_x, center_y = (u[:, 2] * 2 - 1) * (1 - half_w), (u[:, 3] * 2 - 1) * (1 - half_h)
    if flip:
        half_w = torch.where(u[:, 4] < 0.5, -half_w, half_w)
    if flip_vertical:
        half_h = torch.where(u[:, 7] < 0.5, -half_h, half_h)
    zero = torch.zeros_like(area)
    return torch.stack([half_w, zero, center_x, zero, half_h, center_y], 1).view(-1, 2, 3)


def cropped(images: Tensor, crop: Tensor | None, mode: str = "bilinear") -> Tensor:
    """Cut images (B, C, H, W) by the maps of `random_crop` and resize the parts to full size.

    The same maps cut what belongs to the images, such as maps of patches (B, C, h, w), with `mode` nearest.
    """
    if crop is None:
        return images
    grid = F.affine_grid(crop, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, mode=mode, padding_mode="border", align_corners=False)


def recolored(
    images: Tensor,
    keys: Tensor,
    intensity_jitter: float,
    *,
    seed: int,
    epoch: int,
    stream: int = counter_rng.CROP,
) -> Tensor:
    """Change gamma, contrast and brightness of normalised images (B, C, H, W) at random; `intensity` is the strength.

    One draw per image for all its channels: drawn per channel, colours would change, which tell skin lesions apart,
    and so would the ratio of one MRI sequence to another. Each channel is bent within its own range and stretched
    about its own mean, since channels such as CT and PET have neither in common. Gamma works on shares of that range,
    so that values below 0 (all of CT's air, half of anything normalised) are no fault, and leaves mean and SD as they
    were (as nnU-Net's does): it would move brightness by more than brightness itself. A constant channel only moves.
    """
    if intensity_jitter == 0:
        return images
    u = (
        counter_rng.uniform(keys, 11, seed=seed, epoch=epoch, stream=stream)[
            :, 8:, None, None, None
        ]
        * 2
        - 1
    )
    gamma, contrast, brightness = (
        GAMMA ** (intensity_jitter * u[:, 0]),
        CONTRAST ** (intensity_jitter * u[:, 1]),
        u[:, 2],
    )
    low, high = images.amin((2, 3), keepdim=True), images.amax((2, 3), keepdim=True)
    span = high - low
    shares = ((images - low) / span.clamp_min(torch.finfo(images.dtype).tiny)).clamp(0, 1)
    bent = low + span * shares**gamma
    std, mean = torch.std_mean(images, (2, 3), keepdim=True)
    bent_std, bent_mean = torch.std_mean(bent, (2, 3), keepdim=True)
    stretch = contrast * std / bent_std.clamp_min(torch.finfo(images.dtype).tiny)
    return mean + (bent - bent_mean) * stretch + intensity_jitter * BRIGHTNESS * brightness
