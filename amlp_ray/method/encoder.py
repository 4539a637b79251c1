"""The encoder: a timm ViT that is run on the visible patches only.

Shapes: B images, N patches, V visible ones, R prefix tokens (class token and registers), D width, P values per patch.
"""

from __future__ import annotations

from typing import Any

import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from amlp_ray.config import ImageSpec, ModelConfig
from amlp_ray.method.patches import gather

PLAIN_VIT = "vit_base_patch16_224"  # timm's name of the plain ViT with a class token; every size is overridden


def timm_name(config: ModelConfig) -> str:
    """Name under which timm builds the encoder; sizes are given by `timm_arguments`."""
    return config.encoder or PLAIN_VIT


def timm_arguments(config: ModelConfig, spec: ImageSpec) -> dict[str, Any]:
    """Keyword arguments with which `timm.create_model(timm_name(settings), ...)` builds the encoder."""
    return {
        "img_size": [spec.height, spec.width],
        "in_chans": spec.channels,
        "patch_size": config.patch_size,
        "embed_dim": config.width,
        "depth": config.depth,
        "num_heads": config.heads,
        "class_token": config.class_token,
        "reg_tokens": config.register_tokens,
        "global_pool": "token" if config.class_token else "avg",
        "fc_norm": False,  # the norm belongs to the tokens, whatever is pooled
        "num_classes": 0,
    }


def create_encoder(name: str, arguments: dict[str, Any]) -> VisionTransformer:
    """Build the timm ViT of `timm_arguments`, randomly initialised."""
    return timm.create_model(name, pretrained=False, **arguments)


def encoder_tokens(
    encoder: VisionTransformer,
    patches: Tensor,
    visible: Tensor | None = None,
    *,
    hidden: Tensor | None = None,
) -> Tensor:
    """Run the encoder on patches (B, N, P), or on those at `visible` (B, V) only: tokens (B, R + V, D), prefix first.

    Equal to `encoder.forward_features(images)` where all patches are visible. Patches are picked before they are
    embedded, which gives the same tokens for less work.

    Args:
        hidden: (B, N, D) embeddings that stand in for all patches, with `visible` None (SimMIM).
    """
    tokens = embedded_tokens(encoder, patches, visible, hidden=hidden)
    for block in encoder.blocks:
        tokens = block(tokens)
    return encoder.norm(tokens)


def embedded_tokens(
    encoder: VisionTransformer,
    patches: Tensor,
    visible: Tensor | None = None,
    *,
    hidden: Tensor | None = None,
) -> Tensor:
    """What the first block is given; arguments as in `encoder_tokens`."""
    count = patches.shape[1]
    positions = encoder.pos_embed  # (1, N, D) or (1, R + N, D)
    place, prefix_place = positions[:, -count:], positions[:, :-count]
    if visible is not None:
        patches = gather(patches, visible)
        place = nn.functional.embedding(visible, place[0])
    tokens = (embed_patches(encoder, patches) if hidden is None else hidden) + place
    prefix = [token for token in (encoder.cls_token, encoder.reg_token) if token is not None]
    if prefix:
        first = torch.cat(prefix, 1)
        first = first + prefix_place if prefix_place.shape[1] else first
        tokens = torch.cat([first.expand(tokens.shape[0], -1, -1).to(tokens.dtype), tokens], 1)
    return encoder.norm_pre(tokens)


def embed_patches(encoder: VisionTransformer, patches: Tensor) -> Tensor:
    """Project patches (B, n, P) to embeddings (B, n, D), without positions."""
    projection = encoder.patch_embed.proj
    return nn.functional.linear(patches, projection.weight.flatten(1), projection.bias)


def patch_attention(encoder: VisionTransformer, patches: Tensor) -> Tensor:
    """How much the last block's class token attends to each patch, mean over heads: (B, N), rows sum to at most 1.

    Without a class token: the mean over all patches' attention.
    """
    tokens = embedded_tokens(encoder, patches)
    for block in encoder.blocks[:-1]:
        tokens = block(tokens)
    last = encoder.blocks[-1]
    attention = last.attn
    b, n, _ = tokens.shape
    qkv = (
        attention.qkv(last.norm1(tokens))
        .reshape(b, n, 3, attention.num_heads, -1)
        .permute(2, 0, 3, 1, 4)
    )
    q, k = attention.q_norm(qkv[0]), attention.k_norm(qkv[1])  # (B, heads, R + N, D / heads)
    asking = q[:, :, :1] if encoder.cls_token is not None else q
    weights = torch.softmax((asking * attention.scale) @ k.mT, -1)
    return weights.mean((1, 2))[:, encoder.num_prefix_tokens :]


def use_fused_attention(model: nn.Module, fused: bool) -> None:
    """Choose scaled-dot-product attention, or plain matmul-softmax-matmul.

    In bf16 on CPU the plain one is faster forward and backward: 3.7x at 50 tokens, 1.5x at 197 (measured).
    """
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            setattr(module, "fused_attn", fused)  # noqa: B010  (a timm flag that nn.Module's stubs do not know)


def sincos_positions(grid: tuple[int, int], width: int, prefix: int) -> Tensor:
    """Fixed 2-D sine-cosine positions (1, prefix + N, width), zero for prefix tokens (MAE)."""
    quarter = width // 4
    frequency = 1 / 10000 ** (torch.arange(quarter, dtype=torch.float64) / quarter)
    y, x = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in grid), indexing="ij")
    angles = torch.cat([x.reshape(-1, 1) * frequency, y.reshape(-1, 1) * frequency], 1).unflatten(
        1, (2, quarter)
    )
    table = torch.cat([angles.sin(), angles.cos()], -1).flatten(1).float()  # (N, width)
    return torch.cat([torch.zeros(prefix, width), table])[None]


def initialize(module: nn.Module) -> None:
    """MAE's initialisation: Xavier for matrices (the embedding counts as one), zero for biases."""
    if isinstance(module, nn.Linear | nn.Conv2d):
        nn.init.xavier_uniform_(module.weight.flatten(1))
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def new_encoder(config: ModelConfig, spec: ImageSpec) -> VisionTransformer:
    """Build the encoder of the settings with fixed positions and MAE's embedding."""
    encoder = create_encoder(timm_name(config), timm_arguments(config, spec))
    grid = (spec.height // config.patch_size, spec.width // config.patch_size)
    prefix = (
        encoder.pos_embed.shape[1] - grid[0] * grid[1]
    )  # some timm ViTs give prefix tokens no position
    positions = sincos_positions(grid, config.width, prefix)
    encoder.pos_embed = nn.Parameter(positions, requires_grad=False)
    initialize(encoder.patch_embed.proj)
    return encoder
