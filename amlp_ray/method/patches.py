"""Images as patches.

Shapes: B images, C channels, N patches, P = C * p * p values per patch, h x w the patch grid.
"""

import numpy as np
import torch
from torch import Tensor


def patchify(images: Tensor, patch_size: int) -> Tensor:
    """Cut images (B, C, H, W) into patches (B, N, P), row by row; values are ordered (C, p, p).

    The order is that of a convolution's weight, so a timm patch embedding applies as a matrix.
    """
    b, c, height, width = images.shape
    p = patch_size
    grid = images.reshape(b, c, height // p, p, width // p, p)
    return grid.permute(0, 2, 4, 1, 3, 5).reshape(b, (height // p) * (width // p), c * p * p)


def unpatchify(patches: Tensor, patch_size: int, grid: tuple[int, int]) -> Tensor:
    """Put patches (B, N, P) back together into images (B, C, H, W); the inverse of `patchify`."""
    b, _, values = patches.shape
    p = patch_size
    h, w = grid
    channels = values // (p * p)
    pixels = patches.reshape(b, h, w, channels, p, p).permute(0, 3, 1, 4, 2, 5)
    return pixels.reshape(b, channels, h * p, w * p)


def lesion_shares(masks: np.ndarray, patch_size: int) -> Tensor:
    """Return the lesion share of every patch, (B, N), from masks (B, H, W)."""
    return patchify(torch.from_numpy(masks > 0).float()[:, None], patch_size).mean(-1)


def gather(patches: Tensor, ids: Tensor) -> Tensor:
    """Pick patches (B, N, X) by index (B, n): (B, n, X). A (B, N) tensor gives (B, n)."""
    if patches.dim() == 2:
        return patches.gather(1, ids)
    b, n, _ = patches.shape
    rows = ids + n * torch.arange(b, device=ids.device)[:, None]
    # Unlike torch.gather, this copies whole patches.
    picked = patches.flatten(0, 1).index_select(0, rows.flatten())
    return picked.unflatten(0, ids.shape)


def tissue_patches(patches: Tensor, *, mean_above: float, std_above: float) -> Tensor:
    """Tell tissue from border in patches (B, N, P): bool (B, N).

    A patch is tissue where its mean or its SD exceeds the threshold. A black border is flat and
    lies at the minimum. An image of one value has no tissue.

    Args:
        mean_above: share of the image's value range.
        std_above: share of the image's value range.

    Source: our reconstruction.
    """
    low = patches.amin((1, 2), keepdim=True)
    high = patches.amax((1, 2), keepdim=True)
    shares = (patches - low) / (high - low).clamp_min(torch.finfo(patches.dtype).tiny)
    mean = shares.mean(-1, keepdim=True)
    std = (shares - mean).square().mean(-1).sqrt()  # on CPU 15 times faster than torch's own
    return (mean[..., 0] > mean_above) | (std > std_above)


def descending_ranks(values: Tensor) -> Tensor:
    """Return the rank of each value in its row (B, n), 0 for the highest; stable."""
    return values.argsort(stable=True, dim=1, descending=True).argsort(1)


def standardize(x: Tensor, inside: Tensor) -> Tensor:
    """Scale each column of x (B, N, D) to mean 0 and SD 1 over the patches `inside` (B, N) bool.

    Flat columns become 0.
    """
    weight = inside[..., None].to(x.dtype)
    count = weight.sum(1, keepdim=True).clamp_min(1)
    mean = (x * weight).sum(1, keepdim=True) / count
    var = ((x - mean).square() * weight).sum(1, keepdim=True) / count
    return torch.where(var > 1e-12, (x - mean) / var.clamp_min(1e-12).sqrt(), 0.0)
