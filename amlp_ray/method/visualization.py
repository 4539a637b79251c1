"""Draw what a model masks and reconstructs: one strip of panels per image.

Shapes: B images, C channels, N patches, m masked patches, P values per patch, K clusters,
H x W pixels, h x w the patch grid.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from amlp_ray.config import ImageSpec, LossConfig, PretrainConfig
from amlp_ray.method.augment import normalize
from amlp_ray.method.autoencoder import MaskedAutoencoder
from amlp_ray.method.ema_teacher import predict_complementary_halves
from amlp_ray.method.lesion_map import LesionMap
from amlp_ray.method.losses import EPSILON
from amlp_ray.method.masking import Masking, TrainingStep
from amlp_ray.method.patch_selection import Selection
from amlp_ray.method.patches import gather, lesion_shares, unpatchify

Pixels = NDArray[np.uint8]  # (..., H, W, 3)
Panels = dict[str, Pixels]  # by title, all of one size

BRIEF = ("input", "lesion", "mask", "reconstruction", "truth")
FULL = ("input", "clusters", "lesion", "score", "mask", "reconstruction", "error", "truth")

RED = (230, 60, 40)
GREEN = (40, 170, 90)
OUTLINE = (90, 255, 120)
GRAY = np.uint8(128)

# All in pixels.
PANEL_SIDE = 192
TITLE_HEIGHT = 22
CAPTION_HEIGHT = 24
GAP = 8

INFERNO = ("000004", "330a5f", "781c6d", "bb3754", "ed6925", "fcb519", "fcffa4")
# Twelve of ColorBrewer's Paired and four grays, the most distinct first: the most clusters that
# there may be.
CLUSTER_COLORS = (
    *("1f78b4", "ff7f00", "33a02c", "6a3d9a", "e31a1c", "ffff99", "a6cee3", "fb9a99"),
    *("b2df8a", "cab2d6", "fdbf6f", "b15928", "282828", "646464", "a0a0a0", "dcdcdc"),
)


class ImageAnalysis(NamedTuple):
    """What a model does with whole images.

    Attributes:
        patches: (B, N, P).
        reconstruction: (B, N, P), where visible patches are the input's own.
        masked: (B, N) bool.
        error: (B, N), mean squared error in the image's scale, 0 where visible.
        lesion_map: as in training.
        selection: as in training.
        ratio: masking ratio of the epoch.
        score_name: title of `score`.
        score: (B, N), by which patches are ranked, or None.
    """

    patches: Tensor
    reconstruction: Tensor
    masked: Tensor
    error: Tensor
    lesion_map: LesionMap
    selection: Selection
    ratio: float
    score_name: str
    score: Tensor | None


@torch.inference_mode()
def analyze(
    model: MaskedAutoencoder,
    images: Tensor,
    keys: Tensor,
    masks: NDArray[np.uint8] | None,
    config: PretrainConfig,
    epoch: int,
) -> ImageAnalysis:
    """Mask and reconstruct stored images, uncropped, with the masks and the ratio of an epoch.

    Args:
        images: (B, C, H, W), as stored.
        keys: (B,) int64, one identity per image.
        masks: (B, H, W) true lesions or None; used by oracles only.

    Raises:
        ConfigError: the config has an oracle and there are no masks.
    """
    device = model.mask_token.device
    keys = keys.to(device)
    truth = None
    if masks is not None:
        shares = lesion_shares(masks, model.patch_size)
        truth = dict(zip(keys.tolist(), shares.unflatten(1, model.grid), strict=True))
    masking = Masking(model, config, truth)
    step = TrainingStep(epoch)
    patches, lesion_map, selection = masking.mask_whole_images(
        normalize(images.to(device), model.spec), keys, step
    )
    target = gather(patches, selection.masked)
    output = model(patches, selection.visible, selection.masked).pixels.float()
    prediction = denormalize(output, target, config.loss)
    index = selection.masked[..., None].expand_as(prediction)
    zeros = torch.zeros_like(patches[..., 0])
    error = (prediction - target).square().mean(-1)
    score_name, score = _displayed_score(model, patches, keys, lesion_map, config, epoch)
    return ImageAnalysis(
        patches=patches,
        reconstruction=patches.scatter(1, index, prediction),
        masked=zeros.bool().scatter(1, selection.masked, True),
        error=zeros.scatter(1, selection.masked, error),
        lesion_map=lesion_map,
        selection=selection,
        ratio=masking.ratio(step),
        score_name=score_name,
        score=score,
    )


def _displayed_score(
    model: MaskedAutoencoder,
    patches: Tensor,
    keys: Tensor,
    lesion_map: LesionMap,
    config: PretrainConfig,
    epoch: int,
) -> tuple[str, Tensor | None]:
    """Return title and values (B, N): the selection's score, or else CCL's category if any."""
    selection = config.selection
    if selection.uses_score and selection.score == "cluster":
        is_found = lesion_map.lesion.any(1, keepdim=True)
        return "cluster probability", lesion_map.score.exp() * is_found
    if selection.uses_score:
        return f"score: {selection.score.replace('_', ' ')}", lesion_map.score
    if selection.uses_clusters and model.category is not None:
        name = "teacher's probability" if model.teacher else "learned probability"
        teacher = model.teacher or model
        _, category = predict_complementary_halves(teacher, patches, keys, config, epoch)
        return name, category
    return "", None


def picture_strips(
    model: MaskedAutoencoder,
    images: Tensor,
    keys: Tensor,
    masks: NDArray[np.uint8] | None,
    config: PretrainConfig,
    epoch: int,
) -> list[Image.Image]:
    """Draw one strip per image: input, probable lesion, mask, reconstruction and true lesion.

    Arguments as in `analyze`. Random masking has no probable lesion.
    """
    analysis = analyze(model, images, keys, masks, config, epoch)
    drawn = draw_panels(analysis, model, masks, config, BRIEF, outline=False)
    return [draw_strip(panels) for panels in drawn]


def draw_panels(
    analysis: ImageAnalysis,
    model: MaskedAutoencoder,
    masks: NDArray[np.uint8] | None,
    config: PretrainConfig,
    names: Sequence[str] = FULL,
    *,
    outline: bool = True,
) -> list[Panels]:
    """Draw the panels of every image: those of `names` that have content, in that order.

    Input and reconstruction share one scale. Errors share one color scale over all images, given
    in the title. A score has its own scale per image, a probability goes from 0 to 1.

    Args:
        masks: (B, H, W) true lesions, or None.
        outline: outline the true lesions on panels that overlay the image.
    """
    grid = model.grid
    size = panel_size(model.spec)
    images = unpatchify(analysis.patches, model.patch_size, grid)
    reconstructions = unpatchify(analysis.reconstruction, model.patch_size, grid)
    pictures = to_pixels(images, images, model.spec, size)
    panels = _overlay_panels(analysis, pictures, config, grid)
    if masks is not None:
        true_lesion = resize_map(torch.from_numpy(masks > 0).flatten(1), masks.shape[1:], size)
        if outline:
            for name, (title, pixels) in panels.items():
                panels[name] = (title, draw_outline(pixels, true_lesion))
        panels["truth"] = ("true lesion", tint(pictures, true_lesion, GREEN))
    panels["input"] = ("input", pictures)
    reconstructed = to_pixels(reconstructions, images, model.spec, size)
    panels["reconstruction"] = ("reconstruction", reconstructed)
    titled = [panels[name] for name in names if name in panels]
    return [{title: pixels[i] for title, pixels in titled} for i in range(len(pictures))]


def _overlay_panels(
    analysis: ImageAnalysis, pictures: Pixels, config: PretrainConfig, grid: tuple[int, int]
) -> dict[str, tuple[str, Pixels]]:
    """Draw (title, pixels) by panel name, of what overlays the pictures (B, H, W, 3)."""
    size = pictures.shape[1:3]
    max_error = max(float(analysis.error[analysis.masked].quantile(0.95)), 1e-6)
    masked = resize_map(analysis.masked, grid, size)[..., None]
    error = draw_heatmap(resize_map(analysis.error / max_error, grid, size))
    pale = (0.3 * pictures + 0.7 * 255).astype(np.uint8)
    panels = {
        "mask": (f"masked {analysis.ratio:.0%}", np.where(masked, GRAY, pictures)),
        "error": (f"error, 0 to {max_error:.2g}", np.where(masked, error, pale)),
    }
    if config.selection.uses_clusters:
        clusters = resize_map(_comparable_clusters(analysis, config), grid, size)
        panels["clusters"] = ("clusters", tint_clusters(pictures, clusters))
    if config.selection.names_lesion:
        lesion = resize_map(analysis.selection.lesion, grid, size)
        panels["lesion"] = ("probable lesion", tint(pictures, lesion, RED))
    if analysis.score is not None:
        score = analysis.score
        if "probability" not in analysis.score_name:
            low = score.amin(1, keepdim=True)
            span = score.amax(1, keepdim=True) - low
            score = (score - low) / span.clamp_min(1e-6)
        panels["score"] = (analysis.score_name, draw_heatmap(resize_map(score, grid, size)))
    return panels


def _comparable_clusters(analysis: ImageAnalysis, config: PretrainConfig) -> Tensor:
    """Number clusters (B, N) by rising brightness, so that a color means the same in all images.

    -1 off tissue. Clusters of the dataset keep their numbers, which are the same in all images.
    """
    cluster = analysis.lesion_map.cluster.long()
    if config.selection.scope == "dataset":
        return cluster
    k = config.selection.clusters
    one_hot = F.one_hot(cluster + 1, k + 1)[..., 1:].float()  # (B, N, K)
    brightness = analysis.patches.mean(-1, keepdim=True)
    mean = (one_hot * brightness).sum(1) / one_hot.sum(1)
    rank = mean.nan_to_num(torch.inf).argsort(1).argsort(1)
    return torch.where(cluster < 0, cluster, rank.gather(1, cluster.clamp_min(0)))


def denormalize(prediction: Tensor, target: Tensor, config: LossConfig) -> Tensor:
    """Return predicted patches (B, m, P) in the scale of the image.

    With `norm_pix` by mean and SD of the target patches (B, m, P), the inverse of MAE's
    standardization.
    """
    if not config.norm_pix:
        return prediction
    std = (target.var(-1, keepdim=True) + EPSILON).sqrt()
    return prediction * std + target.mean(-1, keepdim=True)


def panel_size(spec: ImageSpec) -> tuple[int, int]:
    """Return height and width of a panel, in pixels; the longer side is always the same."""
    longest = max(spec.height, spec.width)
    return round(PANEL_SIDE * spec.height / longest), round(PANEL_SIDE * spec.width / longest)


def to_pixels(images: Tensor, reference: Tensor, spec: ImageSpec, size: tuple[int, int]) -> Pixels:
    """Convert normalized images (B, C, H, W) to pictures (B, H, W, 3) of `size`.

    Scaled from the 0.5 to the 99.5 percentile of `reference` (B, C, H, W), once per image for all
    channels and in stored units, so that colors stay what they are. Of images with other than three
    channels the first is shown: a modality that a reader knows, which a mean over CT and PET is
    not.
    """
    channels = spec.channels if spec.channels == 3 else 1
    mean = torch.tensor(spec.mean[:channels], device=images.device)[:, None, None]
    std = torch.tensor(spec.std[:channels], device=images.device)[:, None, None]
    images = images[:, :channels] * std + mean
    values = (reference[:, :channels] * std + mean).flatten(1)
    low = values.quantile(0.005, 1)[:, None, None, None]
    high = values.quantile(0.995, 1)[:, None, None, None]
    # A constant image has no contrast, and rounding is not to look like one. The bound is in units
    # of the dataset, which may be shares of 1 or thousands.
    scaled = ((images - low) / (high - low).clamp_min(1e-6 * std.max())).clamp(0, 1)
    pixels = (scaled * 255).round().byte().expand(-1, 3, -1, -1).permute(0, 2, 3, 1).cpu().numpy()
    pictures = []
    for image in pixels:
        resized = Image.fromarray(image).resize(size[::-1], Image.Resampling.BICUBIC)
        pictures.append(np.asarray(resized))
    return np.stack(pictures)


def resize_map(values: Tensor, grid: tuple[int, ...], size: tuple[int, ...]) -> NDArray[np.float32]:
    """Resize maps (..., N) over a grid to pixels (..., H, W) by nearest neighbor."""
    maps = values.reshape(-1, 1, *grid).float()
    pixels = F.interpolate(maps, size, mode="nearest-exact")
    return pixels.reshape(*values.shape[:-1], *size).cpu().numpy()


def tint(image: Pixels, where: NDArray[np.float32], color: tuple[int, int, int]) -> Pixels:
    """Lay a color over pictures (..., H, W, 3) where a map (..., H, W) is not 0."""
    mixed = (0.55 * image + 0.45 * np.asarray(color)).astype(np.uint8)
    return np.where(where[..., None] > 0, mixed, image)


def tint_clusters(image: Pixels, clusters: NDArray[np.float32]) -> Pixels:
    """Lay one color per cluster (..., H, W) over pictures in gray; -1 has none."""
    colors = _rgb(CLUSTER_COLORS)[clusters.astype(int)]
    mixed = (0.45 * image.mean(-1, keepdims=True) + 0.55 * colors).astype(np.uint8)
    return np.where(clusters[..., None] < 0, image, mixed)


def _rgb(hex_colors: Sequence[str]) -> NDArray[np.int64]:
    """Return colors as an array (n, 3)."""
    return np.array([list(bytes.fromhex(color)) for color in hex_colors])


def draw_outline(image: Pixels, where: NDArray[np.float32]) -> Pixels:
    """Draw a bright line along the inner rim of a map (..., H, W)."""
    inside = torch.from_numpy(where) > 0
    outside = (~inside).float().reshape(-1, *where.shape[-2:])
    is_core = F.max_pool2d(outside, 5, 1, 2).reshape(where.shape) == 0
    rim = (inside & ~is_core).numpy()
    return np.where(rim[..., None], np.array(OUTLINE, np.uint8), image)


def draw_heatmap(shares: NDArray[np.float32]) -> Pixels:
    """Draw maps (..., H, W) of 0 to 1 in matplotlib's inferno: black over red to yellow."""
    positions = np.linspace(0, 1, len(INFERNO))
    channels = [np.interp(shares, positions, channel) for channel in _rgb(INFERNO).T]
    return np.stack(channels, -1).astype(np.uint8)


def draw_strip(panels: Mapping[str, Pixels]) -> Image.Image:
    """Draw pictures of one size (H, W, 3) side by side under their titles."""
    height, width = next(iter(panels.values())).shape[:2]
    strip_width = len(panels) * (width + GAP) - GAP
    strip = Image.new("RGB", (strip_width, height + TITLE_HEIGHT), "white")
    pen = ImageDraw.Draw(strip)
    font = ImageFont.load_default(14)
    for i, (title, pixels) in enumerate(panels.items()):
        left = i * (width + GAP)
        pen.text((left, 2), title, fill="black", font=font)
        strip.paste(Image.fromarray(pixels), (left, TITLE_HEIGHT))
    return strip


def draw_sheet(strips: Sequence[Image.Image], captions: Sequence[str]) -> Image.Image:
    """Draw strips of equal titles below each other, each with its caption.

    Titles stand above the first strip only.
    """
    width, height = strips[0].size
    row_height = height - TITLE_HEIGHT + CAPTION_HEIGHT
    sheet = Image.new("RGB", (width, TITLE_HEIGHT + len(strips) * row_height), "white")
    pen = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(13)
    sheet.paste(strips[0].crop((0, 0, width, TITLE_HEIGHT)), (0, 0))
    for i, (strip, caption) in enumerate(zip(strips, captions, strict=True)):
        top = TITLE_HEIGHT + i * row_height
        caption_top = top + row_height - CAPTION_HEIGHT + 3
        sheet.paste(strip.crop((0, TITLE_HEIGHT, width, height)), (0, top))
        pen.text((0, caption_top), caption, fill=(90, 90, 90), font=font)
    return sheet
