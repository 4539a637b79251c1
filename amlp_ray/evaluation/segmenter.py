"""The segmenter: a ViT encoder and a decoder, chosen by name, from its tokens to the pixels; and its file.

Shapes: B images, C channels, H x W pixels, h x w patches, D the encoder's width, E `decoder_width`.

- `linear`: a logit per token of the last depth, drawn large. Nothing but the encoder's own knowledge, at the
  resolution of its patches.
- `conv`: the tokens of four depths, projected and summed, doubled to half resolution, and joined with features of the
  image itself.
- `unetr`: after UNETR (Hatamizadeh et al. 2022, arXiv 2103.10504), of MONAI's own blocks. Tokens of ever earlier depths
  are brought to ever higher resolution and joined on the way up, the image last.
- `dpt`: after DPT (Ranftl et al. 2021, arXiv 2103.13413). Tokens of four depths are reassembled at four scales, which
  residual units fuse from the coarsest on; without its batch norm, which would depend on the batch's size.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from amlp_ray.config import ImageSpec, ModelConfig, PrepareConfig, SegmentConfig
from amlp_ray.errors import CheckpointError
from amlp_ray.method.encoder import create_encoder, timm_arguments, timm_name
from amlp_ray.training.checkpoint.export import write_tensors

WEIGHTS = "segmenter.safetensors"


class Segmenter(nn.Module):
    """An encoder and the decoder of the settings: from normalised images to the logits of a lesion.

    Raises ConfigError where the decoder does not go with the encoder's patches.
    """

    def __init__(self, encoder: VisionTransformer, spec: ImageSpec, config: SegmentConfig) -> None:
        super().__init__()
        self.encoder = encoder
        depth, patch_size = len(encoder.blocks), encoder.patch_embed.patch_size[0]
        config.check_patch_size(patch_size)
        kind: dict[str, type[Decoder]] = {
            "linear": LinearDecoder,
            "conv": ConvDecoder,
            "unetr": UnetrDecoder,
            "dpt": DptDecoder,
        }
        self.decoder: Decoder = kind[config.decoder](
            depth, encoder.embed_dim, spec.channels, patch_size, config.decoder_width
        )

    def forward(self, images: Tensor) -> Tensor:
        """Return lesion logits (B, 1, H, W) of normalised images (B, C, H, W)."""
        depths = self.decoder.depths
        levels = self.encoder.forward_intermediates(
            images, indices=sorted(set(depths)), norm=True, intermediates_only=True
        )
        found = dict(
            zip(sorted(set(depths)), levels, strict=True)
        )  # in a shallow encoder, one depth serves several
        return self.decoder([found[depth] for depth in depths], images)


class Decoder(nn.Module):
    """Makes logits (B, 1, H, W) of the images, and of the tokens (B, D, h, w) after each of the blocks `depths`."""

    depths: list[int]


class LinearDecoder(Decoder):
    def __init__(
        self, depth: int, embed_dim: int, channels: int, patch_size: int, width: int
    ) -> None:
        super().__init__()
        self.depths = [depth - 1]
        self.head = nn.Conv2d(embed_dim, 1, 1)

    def forward(self, levels: list[Tensor], images: Tensor) -> Tensor:
        return _resized(self.head(levels[0]), images)


class ConvDecoder(Decoder):
    def __init__(
        self, depth: int, embed_dim: int, channels: int, patch_size: int, width: int
    ) -> None:
        super().__init__()
        self.depths = sorted({round((i + 1) * depth / 4) - 1 for i in range(4)} - {-1})
        self.project = nn.ModuleList(nn.Conv2d(embed_dim, width, 1) for _ in self.depths)
        self.image = nn.Sequential(
            nn.Conv2d(channels, 16, 3, padding=1), nn.GroupNorm(4, 16), nn.GELU()
        )
        self.fuse = _block(width, width)
        stages, side = [], patch_size
        while (
            side > 2
        ):  # to half resolution; the last step is bilinear, onto the image's own features
            stages.append(
                nn.Sequential(nn.Upsample(scale_factor=2, mode="bilinear"), _block(width, width))
            )
            side //= 2
        self.up = nn.Sequential(*stages)
        self.head = nn.Sequential(_block(width + 16, 32), nn.Conv2d(32, 1, 1))

    def forward(self, levels: list[Tensor], images: Tensor) -> Tensor:
        fused = torch.stack(
            [project(level) for project, level in zip(self.project, levels, strict=True)]
        ).sum(0)
        return self.head(
            torch.cat([_resized(self.up(self.fuse(fused)), images), self.image(images)], 1)
        )


class UnetrDecoder(Decoder):
    def __init__(
        self, depth: int, embed_dim: int, channels: int, patch_size: int, width: int
    ) -> None:
        from monai.networks.blocks import (  # takes seconds to import
            UnetrBasicBlock,
            UnetrPrUpBlock,
            UnetrUpBlock,
        )

        super().__init__()
        steps = patch_size.bit_length() - 1  # doublings from tokens to pixels
        # The deepest tokens go up all the way; those of the depth (steps - k) / steps join them after k doublings.
        self.depths = [
            depth - 1,
            *(max(0, round(depth * (steps - k) / steps) - 1) for k in range(1, steps)),
        ]
        widths = [
            max(8, width >> k) for k in range(steps)
        ]  # E where it is coarsest, halved with each doubling
        shared = {"spatial_dims": 2, "kernel_size": 3, "norm_name": "instance", "res_block": True}
        self.skips = nn.ModuleList(
            UnetrPrUpBlock(
                in_channels=embed_dim, out_channels=wide, num_layer=k, stride=1, upsample_kernel_size=2,
                conv_block=True, **shared,
            )
            for k, wide in enumerate(widths[:-1])
        )  # fmt: skip
        self.image = UnetrBasicBlock(
            in_channels=channels, out_channels=widths[-1], stride=1, **shared
        )
        self.up = nn.ModuleList(
            UnetrUpBlock(in_channels=below, out_channels=wide, upsample_kernel_size=2, **shared)
            for below, wide in zip([embed_dim, *widths], widths, strict=False)
        )
        self.head = nn.Conv2d(widths[-1], 1, 1)

    def forward(self, levels: list[Tensor], images: Tensor) -> Tensor:
        x, *earlier = levels
        joined = [
            *(skip(level) for skip, level in zip(self.skips, earlier, strict=True)),
            self.image(images),
        ]
        for up, other in zip(self.up, joined, strict=True):
            x = up(x, other)
        return self.head(x)


class DptDecoder(Decoder):
    def __init__(
        self, depth: int, embed_dim: int, channels: int, patch_size: int, width: int
    ) -> None:
        super().__init__()
        self.depths = [max(0, round((i + 1) * depth / 4) - 1) for i in range(4)]
        finest = min(
            4, patch_size
        )  # times the tokens' grid; DPT's 4 is a quarter of the image at patch 16
        self.reassemble = nn.ModuleList(
            [
                _enlarged(embed_dim, width, finest),
                _enlarged(embed_dim, width, min(2, patch_size)),
                nn.Conv2d(embed_dim, width, 1),
                nn.Sequential(
                    nn.Conv2d(embed_dim, width, 1), nn.Conv2d(width, width, 3, stride=2, padding=1)
                ),
            ]
        )
        self.before = nn.ModuleList(
            _Residual(width) for _ in range(3)
        )  # of what joins; the coarsest joins nothing
        self.after = nn.ModuleList(_Residual(width) for _ in range(4))
        self.out = nn.ModuleList(nn.Conv2d(width, width, 1) for _ in range(4))
        half = max(8, width // 2)
        self.narrow = nn.Conv2d(width, half, 3, padding=1)
        self.head = nn.Sequential(nn.Conv2d(half, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 1, 1))

    def forward(self, levels: list[Tensor], images: Tensor) -> Tensor:
        scales = [part(level) for part, level in zip(self.reassemble, levels, strict=True)]
        x = self.out[3](self.after[3](scales[3]))
        for i in (2, 1, 0):
            x = self.out[i](self.after[i](_resized(x, scales[i]) + self.before[i](scales[i])))
        return self.head(_resized(self.narrow(x), images))


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


def _enlarged(inputs: int, outputs: int, factor: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 1), nn.ConvTranspose2d(outputs, outputs, factor, stride=factor)
    )


def _block(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, padding=1),
        nn.GroupNorm(math.gcd(8, outputs), outputs),
        nn.GELU(),
    )


def _resized(x: Tensor, like: Tensor) -> Tensor:
    return F.interpolate(x, like.shape[-2:], mode="bilinear", align_corners=False)


@dataclass(frozen=True)
class LoadedSegmenter:
    """A segmenter as its file has it.

    `model` is in evaluation mode, on the CPU, and takes images normalised by `spec`; `prepare` is how the images that
    it was fine-tuned on came out of their files, None where that is not known.
    """

    model: Segmenter
    spec: ImageSpec
    prepare: PrepareConfig | None
    config: SegmentConfig


def save_segmenter(
    model: Segmenter,
    folder: Path,
    *,
    encoder: ModelConfig,
    spec: ImageSpec,
    prepare: PrepareConfig | None,
    config: SegmentConfig,
) -> None:
    """Write `segmenter.safetensors`: weights, and in the header all that it takes to build the model and to feed it."""
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
    try:
        with safe_open(str(path), framework="pt") as file:
            header = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  (not a dict)
        spec = ImageSpec.model_validate_json(header["image"])
        config = SegmentConfig.model_validate_json(header["segment"])
        prepare = (
            PrepareConfig.model_validate_json(header["prepare"]) if "prepare" in header else None
        )
        model = Segmenter(
            create_encoder(header["timm_name"], json.loads(header["timm_arguments"])),
            spec,
            config,
        )
        model.load_state_dict(tensors)
    except (OSError, SafetensorError, RuntimeError, KeyError, ValueError) as error:
        raise CheckpointError(
            f"{path} cannot be read as a segmenter ({type(error).__name__}); run `amlp-ray segment` again."
        ) from None
    return LoadedSegmenter(model.eval(), spec, prepare, config)
