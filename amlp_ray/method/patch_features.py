"""What patches are compared by: features for clustering, (B, N, D), standardised per image over tissue."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from amlp_ray.config import SelectionConfig
from amlp_ray.method.patches import standardize, tissue_patches


def tissue_of(patches: Tensor, config: SelectionConfig) -> Tensor:
    """All patches but the black border, (B, N) bool; all of them where the filter is off."""
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
    """Describe patches (B, N, P) for clustering.

    - `raw`: the pixels, (B, N, P); one mean and SD per image and channel, so that contrast between patches is kept.
    - `stats`: mean, SD and mean absolute gradient per channel, (B, N, 3 C).
    - `context`: mean, its 5x5 neighbourhood mean, their difference, and SD, (B, N, 4).
    - `tokens`: an encoder's `tokens` (B, N, D) of the whole image, each of length 1; `raw` where there are none yet.
    """
    b, n, values = patches.shape
    if kind == "tokens" and tokens is not None:
        return standardize(F.normalize(tokens.float(), dim=-1), tissue)
    if kind in ("raw", "tokens"):
        pixels = (
            patches.reshape(b, n, channels, values // channels)
            .transpose(2, 3)
            .reshape(b, -1, channels)
        )
        inside = tissue[..., None].expand(-1, -1, values // channels).reshape(b, -1)
        return standardize(pixels, inside).reshape(b, n, values)
    if kind == "stats":
        side = math.isqrt(values // channels)
        pixels = patches.unflatten(-1, (channels, side, side))
        gradient = (
            pixels.diff(dim=-1).abs().mean((-2, -1)) + pixels.diff(dim=-2).abs().mean((-2, -1))
        ) / 2
        return standardize(
            torch.cat([pixels.mean((-2, -1)), pixels.std((-2, -1), correction=0), gradient], -1),
            tissue,
        )
    mean, std = patches.mean(-1), patches.std(-1, correction=0)
    around = neighborhood_mean(mean, grid, 5)
    return standardize(torch.stack([mean, around, mean - around, std], -1), tissue)


def neighborhood_mean(values: Tensor, grid: tuple[int, int], side: int) -> Tensor:
    """Average values (B, N) over `side` x `side` patches; at the border over those that exist."""
    image = values.reshape(-1, 1, *grid)
    return F.avg_pool2d(image, side, 1, side // 2, count_include_pad=False).reshape(values.shape)


def dilated(where: Tensor, grid: tuple[int, int], patches: int) -> Tensor:
    """Grow a set of patches (B, N) bool by `patches` in every direction, diagonals included."""
    if patches == 0:
        return where
    image = where.reshape(-1, 1, *grid).float()
    return F.max_pool2d(image, 2 * patches + 1, 1, patches).reshape(where.shape) > 0


def center_distance(grid: tuple[int, int], device: torch.device) -> Tensor:
    """Distance of every patch from the image centre in half sides, (N,): 1 is the middle of an edge."""
    h, w = grid
    y = (torch.arange(h, device=device) + 0.5) / h * 2 - 1
    x = (torch.arange(w, device=device) + 0.5) / w * 2 - 1
    return (y[:, None].square() + x.square()).sqrt().flatten()
