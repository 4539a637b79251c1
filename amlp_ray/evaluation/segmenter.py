"""The segmenter: a ViT encoder, a decoder from its tokens to pixels, and its file.

Shapes: B images, C channels, H x W pixels, h x w patches, D the encoder's width, E `decoder_width`.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from amlp_ray.config import ImageSpec, ModelConfig, PrepareConfig, SegmentConfig
from amlp_ray.errors import CheckpointError
from amlp_ray.method.encoder import create_encoder, timm_arguments, timm_name
from amlp_ray.training.checkpoint.tensor_file import read_tensors, write_tensors
from amlp_ray.utils.json_files import parse_json

WEIGHTS = "segmenter.safetensors"


class Segmenter(nn.Module):
    """An encoder and the configured decoder, from normalized images to lesion logits.

    Raises:
        ConfigError: the decoder does not fit the encoder's patches.
    """

    def __init__(self, encoder: VisionTransformer, spec: ImageSpec, config: SegmentConfig) -> None:
        super().__init__()
        self.encoder = encoder
        patch_size = encoder.patch_embed.patch_size[0]
        config.check_patch_size(patch_size)
        decoder = DECODERS[config.decoder]
        self.decoder: Decoder = decoder(
            len(encoder.blocks), encoder.embed_dim, spec.channels, patch_size, config.decoder_width
        )

    def forward(self, images: Tensor) -> Tensor:
        """Compute lesion logits (B, 1, H, W) of normalized images (B, C, H, W)."""
        # In a shallow encoder, one depth serves several.
        depths = sorted(set(self.decoder.depths))
        tokens = self.encoder.forward_intermediates(
            images, indices=depths, norm=True, intermediates_only=True
        )
        by_depth = dict(zip(depths, tokens, strict=True))
        return self.decoder([by_depth[depth] for depth in self.decoder.depths], images)


class Decoder(nn.Module):
    """Computes logits (B, 1, H, W) from images and tokens (B, D, h, w) of some depths.

    Args:
        depth: number of the encoder's blocks.
        dim: D.
        channels: C.
        patch_size: of the encoder.
        width: E.

    Attributes:
        depths: the blocks after which tokens are taken.
    """

    depths: list[int]


class LinearDecoder(Decoder):
    """A logit per token of the last depth, upsampled: nothing but what the encoder knows."""

    def __init__(self, depth: int, dim: int, channels: int, patch_size: int, width: int) -> None:
        super().__init__()
        self.depths = [depth - 1]
        self.head = nn.Conv2d(dim, 1, 1)

    def forward(self, levels: list[Tensor], images: Tensor) -> Tensor:
        return _resize(self.head(levels[0]), images)


class ConvDecoder(Decoder):
    """Projects and sums four depths, doubled to half resolution and joined with the image."""

    def __init__(self, depth: int, dim: int, channels: int, patch_size: int, width: int) -> None:
        super().__init__()
        depths = {round((i + 1) * depth / 4) - 1 for i in range(4)}
        self.depths = sorted(depths - {-1})
        self.project = nn.ModuleList(nn.Conv2d(dim, width, 1) for _ in self.depths)
        self.image = nn.Sequential(
            nn.Conv2d(channels, 16, 3, padding=1), nn.GroupNorm(4, 16), nn.GELU()
        )
        self.fuse = _conv_block(width, width)
        # To half resolution; the last step is bilinear, onto the image's own features.
        stages: list[nn.Module] = []
        side = patch_size
        while side > 2:
            upsample = nn.Upsample(scale_factor=2, mode="bilinear")
            stages.append(nn.Sequential(upsample, _conv_block(width, width)))
            side //= 2
        self.up = nn.Sequential(*stages)
        self.head = nn.Sequential(_conv_block(width + 16, 32), nn.Conv2d(32, 1, 1))

    def forward(self, levels: list[Tensor], images: Tensor) -> Tensor:
        projected = [project(level) for project, level in zip(self.project, levels, strict=True)]
        x = self.up(self.fuse(torch.stack(projected).sum(0)))
        return self.head(torch.cat([_resize(x, images), self.image(images)], 1))


class UnetrDecoder(Decoder):
    """UNETR (Hatamizadeh et al. 2022, arXiv 2103.10504), built from MONAI's blocks.

    Tokens of ever earlier depths are upsampled to ever higher resolution and joined on the way up,
    the image last.
    """

    def __init__(self, depth: int, dim: int, channels: int, patch_size: int, width: int) -> None:
        # Takes seconds to import.
        from monai.networks.blocks import UnetrBasicBlock, UnetrPrUpBlock, UnetrUpBlock

        super().__init__()
        doublings = patch_size.bit_length() - 1  # from tokens to pixels
        # The deepest tokens go up all the way. Those of the depth (doublings - k) / doublings join
        # them after k doublings.
        self.depths = [depth - 1]
        for k in range(1, doublings):
            self.depths.append(max(0, round(depth * (doublings - k) / doublings) - 1))
        # E at the coarsest resolution, halved with each doubling.
        widths = [max(8, width >> k) for k in range(doublings)]
        shared = {"spatial_dims": 2, "kernel_size": 3, "norm_name": "instance", "res_block": True}
        self.skips = nn.ModuleList(
            UnetrPrUpBlock(
                in_channels=dim,
                out_channels=out_width,
                num_layer=k,
                stride=1,
                upsample_kernel_size=2,
                conv_block=True,
                **shared,
            )
            for k, out_width in enumerate(widths[:-1])
        )
        self.image = UnetrBasicBlock(
            in_channels=channels, out_channels=widths[-1], stride=1, **shared
        )
        self.up = nn.ModuleList(
            UnetrUpBlock(
                in_channels=in_width, out_channels=out_width, upsample_kernel_size=2, **shared
            )
            for in_width, out_width in zip([dim, *widths], widths, strict=False)
        )
        self.head = nn.Conv2d(widths[-1], 1, 1)

    def forward(self, levels: list[Tensor], images: Tensor) -> Tensor:
        x = levels[0]
        skips = [skip(level) for skip, level in zip(self.skips, levels[1:], strict=True)]
        for up, skip in zip(self.up, [*skips, self.image(images)], strict=True):
            x = up(x, skip)
        return self.head(x)


class DptDecoder(Decoder):
    """DPT (Ranftl et al. 2021, arXiv 2103.13413), without batch norm: it depends on the batch size.

    Tokens of four depths are reassembled at four scales, which residual units fuse, the coarsest
    first.
    """

    def __init__(self, depth: int, dim: int, channels: int, patch_size: int, width: int) -> None:
        super().__init__()
        self.depths = [max(0, round((i + 1) * depth / 4) - 1) for i in range(4)]
        # Scales of the tokens' grid: DPT's 4 is a quarter of the image at patch size 16.
        self.reassemble = nn.ModuleList(
            [
                _enlarge(dim, width, min(4, patch_size)),
                _enlarge(dim, width, min(2, patch_size)),
                nn.Conv2d(dim, width, 1),
                nn.Sequential(
                    nn.Conv2d(dim, width, 1), nn.Conv2d(width, width, 3, stride=2, padding=1)
                ),
            ]
        )
        # Of what joins; nothing joins at the coarsest scale.
        self.before = nn.ModuleList(_Residual(width) for _ in range(3))
        self.after = nn.ModuleList(_Residual(width) for _ in range(4))
        self.out = nn.ModuleList(nn.Conv2d(width, width, 1) for _ in range(4))
        half = max(8, width // 2)
        self.narrow = nn.Conv2d(width, half, 3, padding=1)
        self.head = nn.Sequential(nn.Conv2d(half, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 1, 1))

    def forward(self, levels: list[Tensor], images: Tensor) -> Tensor:
        scales = [part(level) for part, level in zip(self.reassemble, levels, strict=True)]
        x = self.out[3](self.after[3](scales[3]))
        for i in (2, 1, 0):
            joined = _resize(x, scales[i]) + self.before[i](scales[i])
            x = self.out[i](self.after[i](joined))
        return self.head(_resize(self.narrow(x), images))


DECODERS: dict[str, type[Decoder]] = {
    "linear": LinearDecoder,
    "conv": ConvDecoder,
    "unetr": UnetrDecoder,
    "dpt": DptDecoder,
}


class _Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


def _enlarge(inputs: int, outputs: int, factor: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 1), nn.ConvTranspose2d(outputs, outputs, factor, stride=factor)
    )


def _conv_block(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, padding=1),
        nn.GroupNorm(math.gcd(8, outputs), outputs),
        nn.GELU(),
    )


def _resize(x: Tensor, like: Tensor) -> Tensor:
    return F.interpolate(x, like.shape[-2:], mode="bilinear", align_corners=False)


@dataclass(frozen=True)
class LoadedSegmenter:
    """A segmenter from its file."""

    model: Segmenter  # in evaluation mode, on the CPU
    spec: ImageSpec  # how its images are normalized
    prepare: PrepareConfig | None  # how those of its fine-tuning were read, if that is known
    config: SegmentConfig  # of the fine-tuning


def save_segmenter(
    model: Segmenter,
    folder: Path,
    *,
    encoder: ModelConfig,
    spec: ImageSpec,
    prepare: PrepareConfig | None,
    config: SegmentConfig,
) -> None:
    """Write `segmenter.safetensors`; its header has all that is needed to build and feed the model.

    Args:
        encoder: config of the model's encoder.
        prepare: how the images were read from their files.
    """
    header = {
        "timm_name": timm_name(encoder),
        "timm_arguments": json.dumps(timm_arguments(encoder, spec)),
        "image": spec.model_dump_json(),
        "segment": config.model_dump_json(),
    }
    if prepare is not None:
        header["prepare"] = prepare.model_dump_json()
    write_tensors(folder / WEIGHTS, model.state_dict(), header)


def load_segmenter(folder: Path) -> LoadedSegmenter:
    """Load the segmenter that `segment` left in `folder`, from `segmenter.safetensors` alone.

    Raises:
        CheckpointError: it is missing, damaged, or of another version of amlp_ray.
    """
    path = folder / WEIGHTS
    if not path.is_file():
        raise CheckpointError(
            f"There is no {path}; give the folder of a finished `amlp-ray segment`."
        )
    header, tensors = read_tensors(path)
    try:
        spec = ImageSpec.model_validate_json(header["image"])
        config = SegmentConfig.model_validate_json(header["segment"])
        prepare = None
        if "prepare" in header:
            prepare = PrepareConfig.model_validate_json(header["prepare"])
        encoder = create_encoder(header["timm_name"], parse_json(header["timm_arguments"]))
        model = Segmenter(encoder, spec, config)
        model.load_state_dict(tensors)
    except (RuntimeError, KeyError, ValueError) as error:
        raise CheckpointError(
            f"{path} cannot be read as a segmenter ({type(error).__name__}); run "
            f"`amlp-ray segment` again."
        ) from None
    return LoadedSegmenter(model.eval(), spec, prepare, config)
