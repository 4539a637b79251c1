"""What a model masks and rebuilds, as pictures a person can judge: one strip per image."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from amlp_ray.config import LossSettings, PretrainSettings
from amlp_ray.method.augment import normalise
from amlp_ray.method.masking import Masking, Moment
from amlp_ray.method.model import MaskedAutoencoder
from amlp_ray.method.patches import gather, patchify, unpatchify

_SIDE, _TITLE, _GAP = 192, 22, 8  # pixels
_RED, _GREEN = (230, 60, 40), (40, 170, 90)


@torch.inference_mode()
def picture_strips(
    model: MaskedAutoencoder,
    images: Tensor,
    keys: Tensor,
    masks: NDArray[np.uint8] | None,
    settings: PretrainSettings,
    epoch: int,
) -> list[Image.Image]:
    """Draw every image as a strip: input, probable lesion, mask, reconstruction and, where known, the true lesion.

    Random masking has no probable lesion.

    Args:
        images: (B, C, H, W) as stored. keys: (B,). masks: (B, H, W) or None.
        epoch: whose masking ratio and masks are shown.

    Visible patches of the reconstruction are the input's own; masked ones are predicted, and put back into the scale of
    the image where targets were standardised per patch.
    """
    device = model.mask_token.device
    keys = keys.to(device)
    images = normalise(images.to(device), model.spec)
    patches = patchify(images, model.patch_size)
    masking = Masking(model, settings)
    ratio = masking.ratio(Moment(epoch))
    chosen = masking.whole(images, keys, Moment(epoch))[2]
    target = gather(patches, chosen.masked)
    prediction = denormalised(model(patches, chosen.visible, chosen.masked).pixels.float(), target, settings.loss)
    index = chosen.masked[..., None].expand_as(prediction)
    rebuilt = patches.scatter(1, index, prediction)
    hidden = torch.zeros_like(patches[..., 0], dtype=torch.bool).scatter(1, chosen.masked, True)

    whole, again = (_rgb(unpatchify(p, model.patch_size, model.grid)) for p in (patches, rebuilt))
    lesion, masked = (_to_pixels(m, model).cpu().numpy() for m in (chosen.lesion, hidden))
    strips = []
    for i in range(len(images)):
        columns = {"input": whole[i]}
        if settings.selection.mode != "random":
            columns["probable lesion"] = _tint(whole[i], lesion[i], _RED)
        columns[f"masked {ratio:.0%}"] = np.where(masked[i][..., None], 128, whole[i])
        columns["reconstruction"] = again[i]
        if masks is not None:
            columns["true lesion"] = _tint(whole[i], masks[i] > 0, _GREEN)
        strips.append(_strip(columns))
    return strips


def denormalised(prediction: Tensor, target: Tensor, settings: LossSettings) -> Tensor:
    """Predicted patches (B, m, P) in the scale of the image, by the statistics of the target patches."""
    if not settings.norm_pix:
        return prediction
    return prediction * (target.var(-1, keepdim=True) + 1e-6).sqrt() + target.mean(-1, keepdim=True)


def _rgb(images: Tensor) -> NDArray[np.uint8]:
    """Normalised images (B, C, H, W) as (B, H, W, 3); one scale per image and channel, from its 0.5 to 99.5 percentile.

    Images of other than one or three channels show their mean.
    """
    if images.shape[1] not in (1, 3):
        images = images.mean(1, keepdim=True)
    flat = images.flatten(2).float()
    low, high = flat.quantile(0.005, 2), flat.quantile(0.995, 2)
    scaled = (images - low[..., None, None]) / (high - low).clamp_min(1e-6)[..., None, None]
    shown = (scaled.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    return np.repeat(shown, 3, 3) if shown.shape[3] == 1 else shown


def _to_pixels(patches: Tensor, model: MaskedAutoencoder) -> Tensor:
    """A map over patches (B, N) bool as a map over pixels (B, H, W) bool."""
    grid = patches.reshape(-1, 1, *model.grid).float()
    return F.interpolate(grid, scale_factor=model.patch_size, mode="nearest")[:, 0] > 0.5


def _tint(image: NDArray[np.uint8], where: NDArray[np.bool_], colour: tuple[int, int, int]) -> NDArray[np.uint8]:
    mixed = (0.55 * image + 0.45 * np.asarray(colour)).astype(np.uint8)
    return np.where(where[..., None], mixed, image)


def _strip(columns: dict[str, NDArray[np.uint8]]) -> Image.Image:
    height, width = next(iter(columns.values())).shape[:2]
    shown = (round(_SIDE * width / max(height, width)), round(_SIDE * height / max(height, width)))
    strip = Image.new("RGB", (len(columns) * (shown[0] + _GAP) - _GAP, shown[1] + _TITLE), "white")
    pen, font = ImageDraw.Draw(strip), ImageFont.load_default(14)
    for i, (title, pixels) in enumerate(columns.items()):
        left = i * (shown[0] + _GAP)
        pen.text((left, 2), title, fill="black", font=font)
        strip.paste(Image.fromarray(pixels.astype(np.uint8)).resize(shown, Image.Resampling.BICUBIC), (left, _TITLE))
    return strip
