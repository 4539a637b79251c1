"""Normalisation and augmentation of a batch on its device, in one call: random resized crops and flips."""

import torch
import torch.nn.functional as F
from torch import Tensor

from amlp_ray.config import ImageSpec
from amlp_ray.method import noise as draw


def normalise(images: Tensor, spec: ImageSpec) -> Tensor:
    """Scale stored images (B, C, H, W), uint8 or uint16, to mean 0 and SD 1 per channel of the training split."""
    mean = torch.tensor(spec.mean, device=images.device).view(1, -1, 1, 1)
    std = torch.tensor(spec.std, device=images.device).view(1, -1, 1, 1)
    return (images.float() - mean) / std


def random_crop(
    keys: Tensor, *, crop_min: float, flip: bool, seed: int, epoch: int, purpose: int = draw.CROP
) -> Tensor | None:
    """Draw a random part of every image: area share crop_min to 1, sides 3:4 to 4:3, half of them mirrored.

    Args:
        keys: (B,) int64, identities; the crop depends on (seed, epoch, key).

    Returns:
        (B, 2, 3) affine maps for `cropped`, or None where images stay as they are.
    """
    if crop_min == 1 and not flip:
        return None
    u = draw.uniform(keys, 5, seed=seed, epoch=epoch, purpose=purpose)
    area = crop_min + (1 - crop_min) * u[:, 0]
    aspect = (4 / 3) ** (u[:, 1] * 2 - 1) if crop_min < 1 else torch.ones_like(area)
    # A side that would leave the image is cut; the other is then kept from falling below the least area.
    half_w, half_h = (area * aspect).sqrt().clamp(crop_min, 1), (area / aspect).sqrt().clamp(crop_min, 1)
    centre_x, centre_y = (u[:, 2] * 2 - 1) * (1 - half_w), (u[:, 3] * 2 - 1) * (1 - half_h)
    if flip:
        half_w = torch.where(u[:, 4] < 0.5, -half_w, half_w)
    zero = torch.zeros_like(area)
    return torch.stack([half_w, zero, centre_x, zero, half_h, centre_y], 1).view(-1, 2, 3)


def cropped(images: Tensor, crop: Tensor | None, mode: str = "bilinear") -> Tensor:
    """Cut images (B, C, H, W) by the maps of `random_crop` and resize the parts to full size.

    The same maps cut what belongs to the images, such as maps of patches (B, C, h, w), with `mode` nearest.
    """
    if crop is None:
        return images
    grid = F.affine_grid(crop, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, mode=mode, padding_mode="border", align_corners=False)
