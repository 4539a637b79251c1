"""SimSiam (Chen and He 2021): the contrastive baseline. Two crops of an image should be told apart by nothing.

No reconstruction and no mask; the encoder, its export and the way it is scored are those of every other baseline. Tokens are
averaged over patches, since a probe reads patches and not the class token.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from amlp_ray.config import ImageSpec, ModelConfig, PretrainConfig
from amlp_ray.method import counter_rng
from amlp_ray.method.augment import augment
from amlp_ray.method.encoder import encoder_tokens, new_encoder
from amlp_ray.method.patches import patchify
from amlp_ray.utils.differentiable_sum import summed


class SimSiam(nn.Module):
    """Encoder, projector and predictor; widths follow the encoder's (2048 and 512 for a width of 512 and more)."""

    def __init__(self, config: ModelConfig, spec: ImageSpec) -> None:
        super().__init__()
        self.encoder: VisionTransformer
        self.patch_size, self.spec = config.patch_size, spec
        self.encoder = new_encoder(config, spec)
        wide = min(2048, 4 * config.width)
        self.projector = nn.Sequential(
            *_layer(config.width, wide),
            *_layer(wide, wide),
            nn.Linear(wide, wide),
            SharedBatchNorm(wide, affine=False),
        )
        self.predictor = nn.Sequential(*_layer(wide, wide // 4), nn.Linear(wide // 4, wide))

    def forward(self, one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
        """Compare two views, as patches (B, N, P).

        Returns:
            The loss, mean negative cosine to the other view's projection, which gets no gradient: -1 where they agree.
            And the spread of projections over the batch, SD * sqrt(width): about 1 where images differ, 0 if collapsed.
        """
        z = [self.projector(self._pooled(view)).float() for view in (one, other)]
        p = [self.predictor(each).float() for each in z]
        loss = -(_cosine(p[0], z[1].detach()) + _cosine(p[1], z[0].detach())) / 2
        spread = F.normalize(z[0].detach(), dim=-1).std(0).mean() * z[0].shape[1] ** 0.5
        return loss, spread

    def _pooled(self, patches: Tensor) -> Tensor:
        return encoder_tokens(self.encoder, patches)[:, self.encoder.num_prefix_tokens :].mean(1)


def two_views(
    images: Tensor, keys: Tensor, config: PretrainConfig, patch_size: int, epoch: int
) -> tuple[Tensor, Tensor]:
    """Two random crops of normalised images (B, C, H, W) as patches, with random contrast and brightness."""
    views = []
    for stream in (counter_rng.CROP, counter_rng.VIEW):
        view, _ = augment(
            images,
            None,
            keys,
            min_crop_area=config.min_crop_area,
            flip=config.flip,
            flip_vertical=config.flip_vertical,
            intensity_jitter=config.intensity_jitter,
            seed=config.seed,
            epoch=epoch,
            stream=stream,
        )
        u = counter_rng.uniform(keys, 7, seed=config.seed, epoch=epoch, stream=stream)[
            :, 5:, None, None, None
        ]
        # Without it, brightness alone would tell two images apart. Images have SD 1.
        contrast, brightness = 0.6 + 0.8 * u[:, 0], 0.8 * (u[:, 1] - 0.5)
        views.append(patchify(view * contrast + brightness, patch_size))
    return views[0], views[1]


class SharedBatchNorm(nn.BatchNorm1d):
    """Normalises over the batches of all workers together, so that their number changes nothing. On CPUs too."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or not dist.is_initialized():
            return super().forward(x)
        x32 = x.float()
        count = summed(x32.new_tensor([len(x)]))
        mean = summed(x32.sum(0)) / count
        variance = summed((x32 - mean).square().sum(0)) / count
        with torch.no_grad():
            assert self.running_mean is not None
            assert self.running_var is not None
            assert self.momentum is not None
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * count / (count - 1), self.momentum)
        out = (x32 - mean) * (variance + self.eps).rsqrt()
        return (out * self.weight + self.bias if self.affine else out).to(x.dtype)


def _layer(width: int, out: int) -> list[nn.Module]:
    return [nn.Linear(width, out, bias=False), SharedBatchNorm(out), nn.ReLU(inplace=True)]


def _cosine(predicted: Tensor, target: Tensor) -> Tensor:
    return F.cosine_similarity(predicted, target, dim=-1).mean()
