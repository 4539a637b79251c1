"""Contenders: amlp_ray's own training step, and other implementations of MAE at equal sizes."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import astuple, dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from originals import original
from torch import Tensor, nn

from amlp_ray.config import ImageSpec, PretrainConfig, SelectionConfig
from amlp_ray.data.loading.batches import Batch
from amlp_ray.data.phantoms import draw_phantom
from amlp_ray.method.augment import normalize
from amlp_ray.method.masking import TrainingStep
from amlp_ray.training.objectives import make_objective
from amlp_ray.training.train_state import TrainState


@dataclass(frozen=True)
class Size:
    """A ViT and its decoder."""

    width: int
    depth: int
    heads: int
    decoder_width: int
    decoder_depth: int
    decoder_heads: int


SIZES = {
    "Ti": Size(192, 12, 3, 128, 4, 4),
    "S": Size(384, 12, 6, 256, 4, 8),
    "B": Size(768, 12, 12, 512, 8, 16),
}
IMAGE, PATCH = 224, 16
PATCHES = (IMAGE // PATCH) ** 2
SPEC = ImageSpec(channels=3, height=IMAGE, width=IMAGE, mean=(64.0,) * 3, std=(48.0,) * 3)
ANALYSIS_INTERVAL = SelectionConfig().analysis_interval
MAE = "mae"
CACHED = "amlp, no analysis"
ANALYZED = "amlp, analysis"


@dataclass
class Contender:
    """A model, and what makes one loss of it, forward only, in a given round."""

    name: str
    model: nn.Module
    loss: Callable[[int], Tensor]
    optimizer: torch.optim.Optimizer | None = None

    @property
    def trained(self) -> list[Tensor]:
        """All parameters but fixed positions and a teacher."""
        return [p for p in self.model.parameters() if p.requires_grad]


def contenders(options: argparse.Namespace) -> list[Contender]:
    """Those that can run here; of each other one a line on stderr says why not."""
    drawn = [
        draw_phantom("ultrasound", IMAGE, np.random.default_rng(i), lesion=True)[0]
        for i in range(8)
    ]
    stored = torch.from_numpy(np.stack([drawn[i % 8] for i in range(options.batch)]))
    batch = Batch(stored[:, None].repeat(1, 3, 1, 1), torch.arange(options.batch))
    contenders = [
        _ours(MAE, "mae", lambda turn: 2 + turn, batch, options),
        # Analyzes in the first round, which is not timed.
        _ours(CACHED, "amlp", lambda turn: 2, batch, options),
        _ours(ANALYZED, "amlp", lambda turn: 1 + turn * ANALYSIS_INTERVAL, batch, options),
    ]
    images = normalize(batch.images, SPEC).to(options.device)
    for name, build in (
        ("facebookresearch", _facebook),
        ("transformers", _transformers),
        ("vit-pytorch", _vit_pytorch),
    ):
        try:
            model, loss = build(SIZES[options.size], options)
        except ModuleNotFoundError as missing:
            print(f"{name} is left out: {missing}", file=sys.stderr)
            continue
        model = model.to(options.device).train()
        contenders.append(
            Contender(name, model, _in_autocast(partial(loss, model, images), options))
        )
    return contenders


def _ours(
    name: str,
    variant: str,
    epoch_of: Callable[[int], int],
    batch: Batch,
    options: argparse.Namespace,
) -> Contender:
    """Build the training path without crops: from stored images to the loss, past the warm-up.

    Images are analyzed in epochs 1, 1 + ANALYSIS_INTERVAL, and so on, and where no lesion map of
    theirs is cached.
    """
    config = PretrainConfig(
        variant=variant,
        epochs=(options.rounds + 1) * ANALYSIS_INTERVAL,
        min_crop_area=1.0,
        flip=False,
        precision=options.dtype,
        ratio={"start": options.ratio, "end": options.ratio},
        model={"patch_size": PATCH, **vars(SIZES[options.size])},
        loss={"warmup": 0.0},
    )
    model = TrainState(config, SPEC, options.device).model
    objective = make_objective(model, config, None)

    def loss(turn: int) -> Tensor:
        step = TrainingStep(epoch_of(turn))
        objective.begin_epoch(step.epoch, 1)  # updates the teacher before an analysis
        values, _ = next(objective(model, batch, step, options.device))
        return values["loss"]

    return Contender(name, model, loss)


def _in_autocast(
    loss: Callable[[], Tensor], options: argparse.Namespace
) -> Callable[[int], Tensor]:
    def turn(_: int) -> Tensor:
        with torch.autocast(options.device, torch.bfloat16, enabled=options.dtype == "bf16"):
            return loss()

    return turn


Built = tuple[nn.Module, Callable[[Any, Tensor], Tensor]]


def _facebook(size: Size, options: argparse.Namespace) -> Built:
    if options.mae is None:
        raise ModuleNotFoundError("give the folder of its clone with --mae")
    with original(options.mae, "models_mae") as loaded:
        model = loaded.MaskedAutoencoderViT(
            IMAGE, PATCH, 3, *astuple(size), norm_layer=partial(nn.LayerNorm, eps=1e-6)
        )  # fmt: skip
    return model, lambda model, images: model(images, options.ratio)[0]


def _transformers(size: Size, options: argparse.Namespace) -> Built:
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    config = ViTMAEConfig(
        image_size=IMAGE,
        patch_size=PATCH,
        hidden_size=size.width,
        num_hidden_layers=size.depth,
        num_attention_heads=size.heads,
        intermediate_size=4 * size.width,
        decoder_hidden_size=size.decoder_width,
        decoder_num_hidden_layers=size.decoder_depth,
        decoder_num_attention_heads=size.decoder_heads,
        decoder_intermediate_size=4 * size.decoder_width,
        mask_ratio=options.ratio,
    )
    return ViTMAEForPreTraining(config), lambda model, images: model(images).loss


def _vit_pytorch(size: Size, options: argparse.Namespace) -> Built:
    import vit_pytorch as peer

    encoder = peer.ViT(
        image_size=IMAGE,
        patch_size=PATCH,
        num_classes=0,
        dim=size.width,
        depth=size.depth,
        heads=size.heads,
        dim_head=size.width // size.heads,
        mlp_dim=4 * size.width,
        pool="mean",  # its MAE fails on an encoder with a class token (1.26)
    )
    model = peer.MAE(
        encoder=encoder,
        masking_ratio=options.ratio,
        decoder_dim=size.decoder_width,
        decoder_depth=size.decoder_depth,
        decoder_heads=size.decoder_heads,
        decoder_dim_head=size.decoder_width // size.decoder_heads,
    )
    return model, lambda model, images: model(images)
