"""Small configs and models for tests of the method, and images that break naive code."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from amlp_ray.config import ImageSpec, PretrainConfig
from amlp_ray.config.overrides import merge
from amlp_ray.method.autoencoder import MaskedAutoencoder, Prediction, build_autoencoder
from amlp_ray.method.losses import Losses, pretraining_loss
from amlp_ray.method.masking import Masking, TrainingStep
from amlp_ray.method.patch_selection import Selection
from amlp_ray.method.patches import gather

Shape = tuple[int, int, int]
GRAY: Shape = (1, 64, 64)
TINY = {
    "patch_size": 8,
    "width": 16,
    "depth": 1,
    "heads": 2,
    "decoder_width": 16,
    "decoder_depth": 1,
}
MAE = {"variant": "mae", "epochs": 20}


def spec_of(shape: Shape) -> ImageSpec:
    channels, height, width = shape
    return ImageSpec(
        channels=channels, height=height, width=width, mean=(0,) * channels, std=(1,) * channels
    )


def tiny(*layers: dict[str, Any]) -> PretrainConfig:
    """Settings of 20 epochs with a tiny model; later layers win."""
    values: dict[str, Any] = {"model": TINY, "epochs": 20}
    for layer in layers:
        values = merge(values, layer)
    return PretrainConfig(**values)


def build(config: PretrainConfig, shape: Shape = GRAY, seed: int = 0) -> MaskedAutoencoder:
    torch.manual_seed(seed)
    return build_autoencoder(config, spec_of(shape))


def random_images(shape: Shape, count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed))


def random_split(count: int, patches: int, masked: int) -> tuple[Tensor, Tensor]:
    """A random permutation of the patches per image, as (visible, masked) indices."""
    order = torch.rand(count, patches, generator=torch.Generator().manual_seed(1)).argsort(1)
    return order[:, masked:], order[:, :masked]


def hidden(selection: Selection) -> Tensor:
    """Which patches are masked, (B, N) bool."""
    return torch.zeros_like(selection.lesion).scatter(1, selection.masked, True)


class Stepped(NamedTuple):
    chosen: Selection
    prediction: Prediction
    losses: Losses


def step(masking: Masking, images: Tensor, keys: Tensor, epoch: int) -> Stepped:
    """What one training step computes, without the optimizer's part."""
    model, config = masking.model, masking.config
    patches, chosen = masking.mask_augmented(images, keys, keys, TrainingStep(epoch))
    prediction = model(patches, chosen.visible, chosen.masked)
    losses = pretraining_loss(
        prediction,
        *(gather(x, chosen.masked) for x in (patches, chosen.lesion, chosen.tissue)),
        config.loss,
        warming_up=epoch <= config.loss.warmup * config.epochs,
    )
    return Stepped(chosen, prediction, losses)


AWKWARD = (
    "noise",
    "tiny noise",
    "black",
    "constant",
    "one lesion",
    "one bright patch",
    "saturated",
    "mostly border",
    "huge",
)


def awkward_image(kind: str, generator: torch.Generator) -> Tensor:
    """(1, 64, 64) images that break naive code."""
    noise = torch.rand(1, 64, 64, generator=generator)
    lesion = torch.zeros(1, 64, 64)
    lesion[:, 24:40, 24:40] = 1
    return {
        "noise": noise,
        "tiny noise": 1e-7 * noise,
        "black": torch.zeros(1, 64, 64),
        "constant": torch.full((1, 64, 64), 3.2),
        "one lesion": 1 - lesion,
        "one bright patch": lesion * (noise > 0.99),
        "saturated": (noise > 0.5).float() * 255,
        "mostly border": torch.where(lesion > 0, 1 + noise, 0.0),
        "huge": 1e6 * noise,
    }[kind]


def awkward_images(kinds: list[str], seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([awkward_image(kind, generator) for kind in kinds])
