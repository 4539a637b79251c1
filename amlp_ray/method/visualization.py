"""What a model aims at, masks and rebuilds, as pictures a person can judge: one strip of panels per image."""

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
from amlp_ray.method.ema_teacher import masked_once
from amlp_ray.method.lesion_map import LesionMap
from amlp_ray.method.masking import Masking, TrainingStep
from amlp_ray.method.patch_selection import Selection
from amlp_ray.method.patches import gather, patchify, unpatchify

Pixels = NDArray[np.uint8]
Panels = dict[str, Pixels]  # title -> (H, W, 3), all of one size

BRIEF = ("input", "lesion", "mask", "reconstruction", "truth")
FULL = ("input", "clusters", "lesion", "score", "mask", "reconstruction", "error", "truth")
RED, GREEN, GREY = (230, 60, 40), (40, 170, 90), 128
_LINE = (90, 255, 120)
_SIDE, _TITLE, _CAPTION, _GAP = 192, 22, 24, 8  # pixels
_INFERNO = (
    (0, 0, 4),
    (51, 10, 95),
    (120, 28, 109),
    (187, 55, 84),
    (237, 105, 37),
    (252, 181, 25),
    (252, 255, 164),
)
# Twelve of ColorBrewer's Paired and four greys, the most distinct first; as many as there may be clusters.
_PART_COLOURS = (
    (31, 120, 180), (255, 127, 0), (51, 160, 44), (106, 61, 154), (227, 26, 28), (255, 255, 153), (166, 206, 227),
    (251, 154, 153), (178, 223, 138), (202, 178, 214), (253, 191, 111), (177, 89, 40), (40, 40, 40), (100, 100, 100),
    (160, 160, 160), (220, 220, 220),
)  # fmt: skip


class ImageAnalysis(NamedTuple):
    """Whole images as a model meets them: B images, N patches of P values.

    `patches` and `rebuilt` (B, N, P), where visible patches of `rebuilt` are the input's own; `masked` (B, N) bool;
    `error` (B, N) the mean squared error in the image's scale, 0 where visible; `aim` and `chosen` as in masking;
    `ratio` of the epoch. `score` (B, N) is what patches are judged by, named by `score_name`, or None.
    """

    patches: Tensor
    rebuilt: Tensor
    masked: Tensor
    error: Tensor
    aim: LesionMap
    chosen: Selection
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
    """Aim, mask and rebuild stored images (B, C, H, W), uncropped, with the masks and the ratio of an epoch.

    Args:
        keys: (B,). masks: (B, H, W) or None; read by settings that aim by true lesions and by no others.

    Raises:
        ConfigError: where settings aim by true lesions and there are no masks.
    """
    device = model.mask_token.device
    keys = keys.to(device)
    truth = None
    if masks is not None and config.selection.uses_truth:
        shares = patchify(torch.from_numpy(masks > 0).float()[:, None], model.patch_size).mean(-1)
        truth = dict(zip(keys.tolist(), shares.unflatten(1, model.grid), strict=True))
    masking = Masking(model, config, truth)
    patches, aim, chosen = masking.whole(
        normalize(images.to(device), model.spec), keys, TrainingStep(epoch)
    )
    target = gather(patches, chosen.masked)
    prediction = denormalized(
        model(patches, chosen.visible, chosen.masked).pixels.float(), target, config.loss
    )
    none = torch.zeros_like(patches[..., 0])
    return ImageAnalysis(
        patches,
        patches.scatter(1, chosen.masked[..., None].expand_as(prediction), prediction),
        none.bool().scatter(1, chosen.masked, True),
        none.scatter(1, chosen.masked, (prediction - target).square().mean(-1)),
        aim,
        chosen,
        masking.ratio(TrainingStep(epoch)),
        *_judgement(model, patches, keys, aim, config, epoch),
    )


def _judgement(
    model: MaskedAutoencoder,
    patches: Tensor,
    keys: Tensor,
    aim: LesionMap,
    config: PretrainConfig,
    epoch: int,
) -> tuple[str, Tensor | None]:
    """What patches are judged by: the selection's score or, where a rule names a cluster, CCL's category if any."""
    s = config.selection
    if s.uses_score and s.score == "cluster":
        return "cluster probability", aim.score.exp() * aim.lesion.any(
            1, keepdim=True
        )  # all 0 where none was found
    if s.uses_score:
        return f"score: {s.score.replace('_', ' ')}", aim.score
    if s.uses_clusters and model.category is not None:
        name = "teacher's probability" if model.teacher else "learnt probability"
        return name, masked_once(model.teacher or model, patches, keys, config, epoch)[1]
    return "", None


def picture_strips(
    model: MaskedAutoencoder,
    images: Tensor,
    keys: Tensor,
    masks: NDArray[np.uint8] | None,
    config: PretrainConfig,
    epoch: int,
) -> list[Image.Image]:
    """Draw every image as a strip: input, probable lesion, mask, reconstruction and, where known, the true lesion.

    Arguments as in `analyze`. Random masking has no probable lesion.
    """
    seen = analyze(model, images, keys, masks, config, epoch)
    return [strip(each) for each in panels(seen, model, masks, config, BRIEF, outline=False)]


def panels(
    seen: ImageAnalysis,
    model: MaskedAutoencoder,
    masks: NDArray[np.uint8] | None,
    config: PretrainConfig,
    names: Sequence[str] = FULL,
    *,
    outline: bool = True,
) -> list[Panels]:
    """The panels of every image: those of `names` that there is something to show for, in that order.

    Input and reconstruction share one scale. Errors share one colour scale over all images, told in the title; a score
    has its own per image, a probability goes from 0 to 1. With `outline`, known true lesions (B, H, W) are outlined on
    the panels that are laid over the image.
    """
    grid, size = model.grid, shown_size(model.spec)
    whole, again = (unpatchify(p, model.patch_size, grid) for p in (seen.patches, seen.rebuilt))
    parts = _comparable_parts(seen, config)
    top = max(float(seen.error[seen.masked].quantile(0.95)), 1e-6)
    drawn = []
    inputs, rebuilt = (
        as_pixels(whole, whole, model.spec, size),
        as_pixels(again, whole, model.spec, size),
    )
    for i, image in enumerate(inputs):
        hidden = on_pixels(seen.masked[i], grid, size)[..., None]
        error = np.where(hidden, heat(on_pixels(seen.error[i] / top, grid, size)), _paled(image))
        laid = {
            "mask": (f"masked {seen.ratio:.0%}", np.where(hidden, np.uint8(GREY), image)),
            "error": (f"error, 0 to {top:.2g}", error),
        }
        if config.selection.uses_clusters:
            laid["clusters"] = ("clusters", colored(image, on_pixels(parts[i], grid, size)))
        if config.selection.names_lesion:
            lesion = on_pixels(seen.chosen.lesion[i], grid, size)
            laid["lesion"] = ("probable lesion", tinted(image, lesion, RED))
        if seen.score is not None:
            laid["score"] = (
                seen.score_name,
                heat(on_pixels(_shares(seen.score[i], seen.score_name), grid, size)),
            )
        if masks is not None:
            true = on_pixels(torch.from_numpy(masks[i] > 0), masks.shape[1:], size)
            if outline:
                laid = {
                    name: (title, outlined(pixels, true)) for name, (title, pixels) in laid.items()
                }
            laid["truth"] = ("true lesion", tinted(image, true, GREEN))
        laid |= {"input": ("input", image), "reconstruction": ("reconstruction", rebuilt[i])}
        drawn.append(dict(laid[name] for name in names if name in laid))
    return drawn


def _shares(score: Tensor, name: str) -> Tensor:
    """A score (N,) as a share of its own range; a probability as it is."""
    if "probability" in name:
        return score
    return (score - score.min()) / (score.max() - score.min()).clamp_min(1e-6)


def _comparable_parts(seen: ImageAnalysis, config: PretrainConfig) -> Tensor:
    """Clusters (B, N) numbered by rising brightness, so that a colour means the same in all images; -1 off tissue.

    Clusters of the data set are numbered alike in all images as they are.
    """
    part, k = seen.aim.part.long(), config.selection.clusters
    if config.selection.scope == "dataset":
        return part
    member = F.one_hot(part + 1, k + 1)[..., 1:].float()  # (B, N, K)
    mean = (member * seen.patches.mean(-1, keepdim=True)).sum(1) / member.sum(1)
    place = mean.nan_to_num(torch.inf).argsort(1).argsort(1)
    return torch.where(part < 0, part, place.gather(1, part.clamp_min(0)))


def denormalized(prediction: Tensor, target: Tensor, config: LossConfig) -> Tensor:
    """Predicted patches (B, m, P) in the scale of the image, by the statistics of the target patches."""
    if not config.norm_pix:
        return prediction
    return prediction * (target.var(-1, keepdim=True) + 1e-6).sqrt() + target.mean(-1, keepdim=True)


def shown_size(spec: ImageSpec) -> tuple[int, int]:
    """Height and width of a panel: the longer side is always the same."""
    longest = max(spec.height, spec.width)
    return round(_SIDE * spec.height / longest), round(_SIDE * spec.width / longest)


def as_pixels(images: Tensor, like: Tensor, spec: ImageSpec, size: tuple[int, int]) -> list[Pixels]:
    """Normalised images (B, C, H, W) as B pictures of `size`, scaled from the 0.5 to the 99.5 percentile of `like`.

    One scale per image, of stored units and for all channels, so that colours stay what they are. Of images of other
    than three channels the first is shown: a modality a reader knows, which a mean over CT and PET is not.
    """
    shown = spec.channels if spec.channels == 3 else 1
    mean, std = (
        torch.tensor(x[:shown], device=images.device)[:, None, None] for x in (spec.mean, spec.std)
    )
    images, like = (x[:, :shown] * std + mean for x in (images, like))
    flat = like.flatten(1)
    low, high = (flat.quantile(q, 1)[:, None, None, None] for q in (0.005, 0.995))
    # A constant image has no contrast to show, and rounding is not to be shown as one: in units of the data set,
    # which may be shares of 1 or thousands.
    scaled = ((images - low) / (high - low).clamp_min(1e-6 * std.max())).clamp(0, 1)
    pixels = (scaled * 255).round().byte().expand(-1, 3, -1, -1).permute(0, 2, 3, 1).cpu().numpy()
    return [
        np.asarray(Image.fromarray(each).resize(size[::-1], Image.Resampling.BICUBIC))
        for each in pixels
    ]


def on_pixels(values: Tensor, grid: tuple[int, ...], size: tuple[int, int]) -> NDArray[np.float32]:
    """A map (N,) over a grid as a map over pixels (H, W), each the value of the place it lies in."""
    return (
        F.interpolate(values.reshape(1, 1, *grid).float(), size, mode="nearest-exact")[0, 0]
        .cpu()
        .numpy()
    )


def tinted(image: Pixels, where: NDArray[np.float32], color: tuple[int, int, int]) -> Pixels:
    """The picture (H, W, 3) with a colour laid over it where a map (H, W) is not 0."""
    mixed = (0.55 * image + 0.45 * np.asarray(color)).astype(np.uint8)
    return np.where(where[..., None] > 0, mixed, image)


def colored(image: Pixels, parts: NDArray[np.float32]) -> Pixels:
    """The picture in grey with one colour per part (H, W) laid over it; -1 has none."""
    colors = np.asarray(_PART_COLOURS)[parts.astype(int)]
    mixed = (0.45 * image.mean(-1, keepdims=True) + 0.55 * colors).astype(np.uint8)
    return np.where(parts[..., None] < 0, image, mixed)


def outlined(image: Pixels, where: NDArray[np.float32]) -> Pixels:
    """The picture with a bright line along the inner rim of a map (H, W)."""
    inside = torch.from_numpy(where)[None] > 0
    core = F.max_pool2d((~inside).float(), 5, 1, 2)[0] == 0
    return np.where((inside[0] & ~core).numpy()[..., None], np.array(_LINE, np.uint8), image)


def heat(shares: NDArray[np.float32]) -> Pixels:
    """A map (H, W) of 0 to 1 as colours that rise evenly in brightness, from black over red to yellow (inferno)."""
    at = np.linspace(0, 1, len(_INFERNO))
    return np.stack(
        [np.interp(shares, at, channel) for channel in zip(*_INFERNO, strict=True)], -1
    ).astype(np.uint8)


def _paled(image: Pixels) -> Pixels:
    return (0.3 * image + 0.7 * 255).astype(np.uint8)


def strip(titled: Mapping[str, Pixels]) -> Image.Image:
    """Pictures of one size (H, W, 3) side by side under their titles."""
    height, width = next(iter(titled.values())).shape[:2]
    out = Image.new("RGB", (len(titled) * (width + _GAP) - _GAP, height + _TITLE), "white")
    pen, font = ImageDraw.Draw(out), ImageFont.load_default(14)
    for i, (title, pixels) in enumerate(titled.items()):
        left = i * (width + _GAP)
        pen.text((left, 2), title, fill="black", font=font)
        out.paste(Image.fromarray(pixels), (left, _TITLE))
    return out


def sheet(strips: Sequence[Image.Image], captions: Sequence[str]) -> Image.Image:
    """Strips of equal titles under each other, each with its caption below; titles stand above the first only."""
    width, height = strips[0].size
    row = height - _TITLE + _CAPTION
    out = Image.new("RGB", (width, _TITLE + len(strips) * row), "white")
    pen, font = ImageDraw.Draw(out), ImageFont.load_default(13)
    out.paste(strips[0].crop((0, 0, width, _TITLE)), (0, 0))
    for i, (each, caption) in enumerate(zip(strips, captions, strict=True)):
        out.paste(each.crop((0, _TITLE, width, height)), (0, _TITLE + i * row))
        pen.text((0, _TITLE + (i + 1) * row - _CAPTION + 3), caption, fill=(90, 90, 90), font=font)
    return out
