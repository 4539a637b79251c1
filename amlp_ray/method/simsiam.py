"""SimSiam (Chen and He 2021): the contrastive baseline.

Two random crops of an image are mapped to the same point; nothing is masked or reconstructed.
Encoder, export and scoring are those of every other variant. Tokens are averaged over patches,
because a probe reads patches and not the class token.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from amlp_ray.config import ImageSpec, ModelConfig, PretrainConfig
from amlp_ray.method import counter_rng
from amlp_ray.method.augment import augment
from amlp_ray.method.encoder import build_encoder, encoder_tokens
from amlp_ray.method.patches import patchify
from amlp_ray.utils.distributed import differentiable_sum, is_distributed


class SimSiam(nn.Module):
    """Encoder, projector and predictor.

    Widths follow the encoder's: 2048 and 512, the paper's, for an encoder width of 512 or more.
    """

    def __init__(self, config: ModelConfig, spec: ImageSpec) -> None:
        super().__init__()
        self.patch_size = config.patch_size
        self.spec = spec
        self.encoder: VisionTransformer = build_encoder(config, spec)
        width = min(2048, 4 * config.width)
        self.projector = nn.Sequential(
            *_projection_layer(config.width, width),
            *_projection_layer(width, width),
            nn.Linear(width, width),
            SharedBatchNorm(width, affine=False),
        )
        self.predictor = nn.Sequential(
            *_projection_layer(width, width // 4),
            nn.Linear(width // 4, width),
        )

    def forward(self, first_view: Tensor, second_view: Tensor) -> tuple[Tensor, Tensor]:
        """Compare two views of the same images, as patches (B, N, P).

        Returns:
            The loss and the spread, scalars. The loss is the mean negative cosine of each view's
            prediction to the other view's projection, which gets no gradient; -1 where they agree.
            The spread is SD * sqrt(width) of the projections over the batch: about 1 where images
            differ, 0 where all collapse to one point.

        Source: algorithm 1 of Chen and He 2021.
        """
        first_projection = self.projector(self._mean_token(first_view)).float()
        second_projection = self.projector(self._mean_token(second_view)).float()
        first_prediction = self.predictor(first_projection).float()
        second_prediction = self.predictor(second_projection).float()
        first_cosine = _mean_cosine(first_prediction, second_projection.detach())
        second_cosine = _mean_cosine(second_prediction, first_projection.detach())
        loss = -(first_cosine + second_cosine) / 2
        directions = F.normalize(first_projection.detach(), dim=-1)
        spread = directions.std(0).mean() * directions.shape[1] ** 0.5
        return loss, spread

    def _mean_token(self, patches: Tensor) -> Tensor:
        tokens = encoder_tokens(self.encoder, patches)
        return tokens[:, self.encoder.num_prefix_tokens :].mean(1)


def two_views(
    images: Tensor, keys: Tensor, config: PretrainConfig, patch_size: int, epoch: int
) -> tuple[Tensor, Tensor]:
    """Cut two random crops of every image, with random contrast and brightness.

    Args:
        images: (B, C, H, W), normalized.
        keys: (B,) int64, one identity per image.

    Returns:
        Two views as patches, (B, N, P) each.
    """
    views = []
    for stream in (counter_rng.CROP, counter_rng.VIEW):
        view, _ = augment(images, None, keys, config, epoch, stream)
        uniform = counter_rng.uniform(keys, 7, seed=config.seed, epoch=epoch, stream=stream)
        uniform = uniform[:, 5:, None, None, None]
        # Without this step, brightness alone would tell two images apart. Images have SD 1.
        contrast = 0.6 + 0.8 * uniform[:, 0]
        brightness = 0.8 * (uniform[:, 1] - 0.5)
        views.append(patchify(view * contrast + brightness, patch_size))
    return views[0], views[1]


class SharedBatchNorm(nn.BatchNorm1d):
    """Normalize over the batches of all workers together, so that their number changes nothing.

    Unlike torch's SyncBatchNorm it runs on CPUs too.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Normalize (B, D) by mean and variance of the global batch."""
        if not self.training or not is_distributed():
            return super().forward(x)
        x32 = x.float()
        count = differentiable_sum(x32.new_tensor([len(x)]))
        mean = differentiable_sum(x32.sum(0)) / count
        variance = differentiable_sum((x32 - mean).square().sum(0)) / count
        with torch.no_grad():
            assert self.running_mean is not None
            assert self.running_var is not None
            assert self.momentum is not None
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * count / (count - 1), self.momentum)
        normalized = (x32 - mean) * (variance + self.eps).rsqrt()
        if self.affine:
            normalized = normalized * self.weight + self.bias
        return normalized.to(x.dtype)


def _projection_layer(width: int, out_width: int) -> list[nn.Module]:
    linear = nn.Linear(width, out_width, bias=False)
    return [linear, SharedBatchNorm(out_width), nn.ReLU(inplace=True)]


def _mean_cosine(prediction: Tensor, target: Tensor) -> Tensor:
    return F.cosine_similarity(prediction, target, dim=-1).mean()
