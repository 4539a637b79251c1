"""Normalization and augmentation of a batch on its device: random crops, flips and intensity.

Every random number comes from `counter_rng`, so an image's crop depends on (seed, epoch, image) and
not on its batch.

The positions of one stream's numbers never move, so that a new kind of augmentation changes no
earlier result: 0-4 crop and left-right flip, 5-6 SimSiam's own contrast and brightness (see
`simsiam.py`), 7 upside-down flip, 8-10 intensity.

Shapes: B images, C channels, H x W pixels.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from amlp_ray.config import ImageSpec, PretrainConfig, SegmentConfig
from amlp_ray.method import counter_rng

Mask = TypeVar("Mask", Tensor, None)
AugmentConfig = PretrainConfig | SegmentConfig

# At intensity_jitter 1. nnU-Net draws contrast from 0.75-1.25 and gamma from 0.7-1.5: about 0.5.
BRIGHTNESS = 0.5  # SDs of the dataset, up or down
CONTRAST = 1.6  # times, or divided by
GAMMA = 2.0  # exponent, or one over it


def normalize(images: Tensor, spec: ImageSpec) -> Tensor:
    """Scale stored images (B, C, H, W) to float32 by mean and SD per channel of the training split.

    The only step that knows a dtype: uint16 has no arithmetic in torch, and int16 of CT lies far
    below 0.
    """
    mean, std = _mean_and_std(spec, images.device)
    return (images.float() - mean).div_(std)


# Cached: copying them to a GPU anew would make every step wait for it.
@lru_cache(maxsize=16)
def _mean_and_std(spec: ImageSpec, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return mean and SD, (1, C, 1, 1) each."""
    # Cached tensors serve training too, so they must not be inference tensors.
    with torch.inference_mode(False):
        mean = torch.tensor(spec.mean, device=device).view(1, -1, 1, 1)
        std = torch.tensor(spec.std, device=device).view(1, -1, 1, 1)
    return mean, std


def augment(
    images: Tensor,
    masks: Mask,
    keys: Tensor,
    config: AugmentConfig,
    epoch: int,
    stream: int = counter_rng.CROP,
) -> tuple[Tensor, Mask]:
    """Crop, flip and jitter normalized images, and crop their masks alike.

    With all of it off, images and masks are returned untouched.

    Args:
        images: (B, C, H, W), normalized.
        masks: (B, H, W) of any dtype, or None. Resized by nearest pixel, so that labels stay
            labels.
        keys: (B,) int64 on the images' device, one identity per image.
        config: see `random_crop` and `jitter_intensity`.
    """
    crop = random_crop(keys, config, epoch, stream)
    if masks is not None and crop is not None:
        mask_images = masks[:, None].to(crop.dtype)
        masks = apply_crop(mask_images, crop, mode="nearest")[:, 0].to(masks.dtype)
    return jitter_intensity(apply_crop(images, crop), keys, config, epoch, stream), masks


def random_crop(
    keys: Tensor, config: AugmentConfig, epoch: int, stream: int = counter_rng.CROP
) -> Tensor | None:
    """Draw a random part of every image, with sides of 3:4 to 4:3.

    The crop depends on (seed, epoch, key). Of `config` it reads:

    - `min_crop_area`: least share of the image's area; the largest is 1.
    - `flip`: mirror half of the images left to right.
    - `flip_vertical`: turn half of them upside down. Right for skin, tissue under a microscope and
      brain slices. Wrong where depth has a direction, as in ultrasound, whose shadows point down.

    Args:
        keys: (B,) int64, one identity per image.

    Returns:
        (B, 2, 3) affine maps for `apply_crop`, or None where images stay as they are.

    Source: random resized crop as in MAE (He et al. 2022).
    """
    min_crop_area = config.min_crop_area
    if min_crop_area == 1 and not config.flip and not config.flip_vertical:
        return None
    u = counter_rng.uniform(keys, 8, seed=config.seed, epoch=epoch, stream=stream)
    area = min_crop_area + (1 - min_crop_area) * u[:, 0]
    aspect = (4 / 3) ** (u[:, 1] * 2 - 1) if min_crop_area < 1 else torch.ones_like(area)
    # A side that would leave the image is cut. The lower bound keeps the area from falling below
    # the least one.
    half_width = (area * aspect).sqrt().clamp(min_crop_area, 1)
    half_height = (area / aspect).sqrt().clamp(min_crop_area, 1)
    center_x = (u[:, 2] * 2 - 1) * (1 - half_width)
    center_y = (u[:, 3] * 2 - 1) * (1 - half_height)
    if config.flip:
        half_width = torch.where(u[:, 4] < 0.5, -half_width, half_width)
    if config.flip_vertical:
        half_height = torch.where(u[:, 7] < 0.5, -half_height, half_height)
    zero = torch.zeros_like(area)
    rows = [half_width, zero, center_x, zero, half_height, center_y]
    return torch.stack(rows, 1).view(-1, 2, 3)


def apply_crop(images: Tensor, crop: Tensor | None, mode: str = "bilinear") -> Tensor:
    """Crop images (B, C, H, W) by the maps of `random_crop` and resize the parts to full size.

    The same maps crop what belongs to the images, such as maps of patches (B, C, h, w), with `mode`
    nearest.
    """
    if crop is None:
        return images
    grid = F.affine_grid(crop, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, mode=mode, padding_mode="border", align_corners=False)


def jitter_intensity(
    images: Tensor,
    keys: Tensor,
    config: AugmentConfig,
    epoch: int,
    stream: int = counter_rng.CROP,
) -> Tensor:
    """Change gamma, contrast and brightness of normalized images (B, C, H, W) at random.

    One draw per image for all its channels: drawn per channel, colors would change, which tell skin
    lesions apart, and so would the ratio of one MRI sequence to another. Each channel is bent
    within its own range and stretched about its own mean, since channels such as CT and PET have
    neither in common. Gamma applies to shares of that range, so values below 0 are allowed (all of
    CT's air, half of anything normalized). It leaves mean and SD as they were, because it would
    move brightness by more than brightness itself. A constant channel changes in brightness only.
    At `intensity_jitter` 0 nothing changes; see the constants of this module for 1.

    Source: gamma, contrast and brightness of nnU-Net (Isensee et al. 2021), which also restores
    mean and SD after gamma.
    """
    strength = config.intensity_jitter
    if strength == 0:
        return images
    uniform = counter_rng.uniform(keys, 11, seed=config.seed, epoch=epoch, stream=stream)
    u = uniform[:, 8:, None, None, None] * 2 - 1
    gamma = GAMMA ** (strength * u[:, 0])
    contrast = CONTRAST ** (strength * u[:, 1])
    brightness = u[:, 2]
    low = images.amin((2, 3), keepdim=True)
    span = images.amax((2, 3), keepdim=True) - low
    tiny = torch.finfo(images.dtype).tiny
    shares = ((images - low) / span.clamp_min(tiny)).clamp(0, 1)
    bent = low + span * shares**gamma
    std, mean = torch.std_mean(images, (2, 3), keepdim=True)
    bent_std, bent_mean = torch.std_mean(bent, (2, 3), keepdim=True)
    stretch = contrast * std / bent_std.clamp_min(tiny)
    return mean + (bent - bent_mean) * stretch + strength * BRIGHTNESS * brightness
