"""Features by which patches are clustered, and maps over the grid of patches.

Shapes: B images, N patches, P values per patch, C channels, D features, h x w the patch grid.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from amlp_ray.config import SelectionConfig
from amlp_ray.method.patches import standardize, tissue_patches


def tissue_mask(patches: Tensor, config: SelectionConfig) -> Tensor:
    """Return all patches but the black border, (B, N) bool; all where the filter is off."""
    if not config.background_filter:
        return patches.new_ones(patches.shape[:2], dtype=torch.bool)
    return tissue_patches(
        patches, mean_above=config.background_mean, std_above=config.background_std
    )


def cluster_features(
    patches: Tensor,
    tissue: Tensor,
    grid: tuple[int, int],
    channels: int,
    kind: str,
    tokens: Tensor | None = None,
) -> Tensor:
    """Compute features (B, N, D) of patches (B, N, P), standardized per image over tissue.

    - `raw`: the pixels, (B, N, P), with one mean and SD per image and channel, so that contrast
      between patches is kept.
    - `stats`: mean, SD and mean absolute gradient per channel, (B, N, 3 C).
    - `context`: mean, mean over 5x5 patches, their difference, and SD, (B, N, 4).
    - `tokens`: the teacher's `tokens` (B, N, D), each of length 1; `raw` where there are none yet.

    Source: our reconstruction.
    """
    if kind == "tokens" and tokens is not None:
        return standardize(F.normalize(tokens.float(), dim=-1), tissue)
    if kind in ("raw", "tokens"):
        return _raw_features(patches, tissue, channels)
    if kind == "stats":
        return standardize(_channel_statistics(patches, channels), tissue)
    mean = patches.mean(-1)
    std = patches.std(-1, correction=0)
    around = neighborhood_mean(mean, grid, 5)
    return standardize(torch.stack([mean, around, mean - around, std], -1), tissue)


def _raw_features(patches: Tensor, tissue: Tensor, channels: int) -> Tensor:
    b, n, values = patches.shape
    per_channel = values // channels
    pixels = patches.reshape(b, n, channels, per_channel).transpose(2, 3).reshape(b, -1, channels)
    inside = tissue[..., None].expand(-1, -1, per_channel).reshape(b, -1)
    return standardize(pixels, inside).reshape(b, n, values)


def _channel_statistics(patches: Tensor, channels: int) -> Tensor:
    side = math.isqrt(patches.shape[-1] // channels)
    pixels = patches.unflatten(-1, (channels, side, side))
    gradient_x = pixels.diff(dim=-1).abs().mean((-2, -1))
    gradient_y = pixels.diff(dim=-2).abs().mean((-2, -1))
    gradient = (gradient_x + gradient_y) / 2
    mean = pixels.mean((-2, -1))
    std = pixels.std((-2, -1), correction=0)
    return torch.cat([mean, std, gradient], -1)


def neighborhood_mean(values: Tensor, grid: tuple[int, int], side: int) -> Tensor:
    """Average values (B, N) over `side` x `side` patches; at the border over those that exist."""
    image = values.reshape(-1, 1, *grid)
    mean = F.avg_pool2d(image, side, 1, side // 2, count_include_pad=False)
    return mean.reshape(values.shape)


def dilate(where: Tensor, grid: tuple[int, int], patches: int) -> Tensor:
    """Grow a set of patches (B, N) bool by `patches` in every direction, diagonals included."""
    if patches == 0:
        return where
    image = where.reshape(-1, 1, *grid).float()
    return F.max_pool2d(image, 2 * patches + 1, 1, patches).reshape(where.shape) > 0


def center_distance(grid: tuple[int, int], device: torch.device) -> Tensor:
    """Return every patch's distance from the image center, (N,).

    The unit is half a side: 1 is the middle of an edge.
    """
    h, w = grid
    y = (torch.arange(h, device=device) + 0.5) / h * 2 - 1
    x = (torch.arange(w, device=device) + 0.5) / w * 2 - 1
    return (y[:, None].square() + x.square()).sqrt().flatten()
