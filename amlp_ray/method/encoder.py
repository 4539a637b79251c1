"""The encoder: a timm ViT that is run on the visible patches only.

Shapes: B images, N patches, V visible, R prefix tokens (class token and registers), D width,
P values per patch.
"""

from __future__ import annotations

from typing import Any

import timm
import torch
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from amlp_ray.config import ImageSpec, ModelConfig
from amlp_ray.method.patches import gather

# timm's name of the plain ViT with a class token; every size is overridden.
PLAIN_VIT = "vit_base_patch16_224"


def timm_name(config: ModelConfig) -> str:
    """Return the name under which timm builds the encoder; sizes come from `timm_arguments`."""
    return config.encoder or PLAIN_VIT


def timm_arguments(config: ModelConfig, spec: ImageSpec) -> dict[str, Any]:
    """Return keyword arguments with which `timm.create_model(timm_name(config), ...)` builds it."""
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
    """Build the timm ViT of `timm_arguments`, randomly initialized."""
    return timm.create_model(name, pretrained=False, **arguments)


def build_encoder(config: ModelConfig, spec: ImageSpec) -> VisionTransformer:
    """Build the configured encoder with fixed positions and MAE's patch embedding."""
    encoder = create_encoder(timm_name(config), timm_arguments(config, spec))
    grid = encoder.patch_embed.grid_size
    # Some timm ViTs give prefix tokens no position.
    prefix = encoder.pos_embed.shape[1] - grid[0] * grid[1]
    positions = sincos_positions(grid, config.width, prefix)
    encoder.pos_embed = nn.Parameter(positions, requires_grad=False)
    initialize(encoder.patch_embed.proj)
    return encoder


def encoder_tokens(
    encoder: VisionTransformer,
    patches: Tensor,
    visible: Tensor | None = None,
    *,
    hidden: Tensor | None = None,
) -> Tensor:
    """Encode patches (B, N, P): tokens (B, R + V, D), prefix first.

    Equal to `encoder.forward_features(images)` where all patches are visible. Patches are picked
    before they are embedded, which gives the same tokens for less work.

    Args:
        visible: (B, V) indices of the patches to encode; all where None.
        hidden: (B, N, D) embeddings that replace those of all patches (SimMIM).
    """
    tokens = _embed_with_positions(encoder, patches, visible, hidden=hidden)
    for block in encoder.blocks:
        tokens = block(tokens)
    return encoder.norm(tokens)


def _embed_with_positions(
    encoder: VisionTransformer,
    patches: Tensor,
    visible: Tensor | None = None,
    *,
    hidden: Tensor | None = None,
) -> Tensor:
    """Return the input of the first block, (B, R + V, D)."""
    count = patches.shape[1]
    positions = encoder.pos_embed  # (1, N, D) or (1, R + N, D)
    patch_positions = positions[:, -count:]
    prefix_positions = positions[:, :-count]
    if visible is not None:
        patches = gather(patches, visible)
        patch_positions = nn.functional.embedding(visible, patch_positions[0])
    tokens = embed_patches(encoder, patches) if hidden is None else hidden
    tokens = tokens + patch_positions
    prefix = [token for token in (encoder.cls_token, encoder.reg_token) if token is not None]
    if prefix:
        first = torch.cat(prefix, 1)
        if prefix_positions.shape[1]:
            first = first + prefix_positions
        first = first.expand(tokens.shape[0], -1, -1).to(tokens.dtype)
        tokens = torch.cat([first, tokens], 1)
    return encoder.norm_pre(tokens)


def embed_patches(encoder: VisionTransformer, patches: Tensor) -> Tensor:
    """Project patches (B, n, P) to embeddings (B, n, D), without positions."""
    projection = encoder.patch_embed.proj
    return nn.functional.linear(patches, projection.weight.flatten(1), projection.bias)


def patch_attention(encoder: VisionTransformer, patches: Tensor) -> Tensor:
    """Return the last block's attention from the class token to each patch, (B, N).

    The mean over heads; rows sum to at most 1. Without a class token: the mean over all patches'
    attention.

    Source: AttMask (Kakogeorgiou et al. 2022).
    """
    tokens = _embed_with_positions(encoder, patches)
    for block in encoder.blocks[:-1]:
        tokens = block(tokens)
    last_block = encoder.blocks[-1]
    q, k, _ = queries_keys_values(last_block, tokens)
    if encoder.cls_token is not None:
        q = q[:, :, :1]
    weights = torch.softmax((q * last_block.attn.scale) @ k.mT, -1)
    return weights.mean((1, 2))[:, encoder.num_prefix_tokens :]


def queries_keys_values(block: Block, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Compute what a block's attention multiplies, (B, heads, n, D / heads) each.

    Args:
        tokens: (B, n, D), the input of the block.
    """
    attention = block.attn
    b, n, _ = tokens.shape
    qkv = attention.qkv(block.norm1(tokens)).reshape(b, n, 3, attention.num_heads, -1)
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    return attention.q_norm(q), attention.k_norm(k), v


def use_fused_attention(model: nn.Module, fused: bool) -> None:
    """Choose scaled-dot-product attention, or plain matmul-softmax-matmul.

    In bf16 on CPU the plain one is faster forward and backward: 3.7x at 50 tokens, 1.5x at 197
    (measured).
    """
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            # A flag of timm that nn.Module's stubs do not know.
            setattr(module, "fused_attn", fused)  # noqa: B010


def sincos_positions(grid: tuple[int, int], width: int, prefix: int) -> Tensor:
    """Return fixed 2-D sine-cosine positions (1, prefix + N, width), zero for prefix tokens.

    Source: MAE (He et al. 2022), `get_2d_sincos_pos_embed` of its public code.
    """
    quarter = width // 4
    frequency = 1 / 10000 ** (torch.arange(quarter, dtype=torch.float64) / quarter)
    rows = torch.arange(grid[0], dtype=torch.float64)
    columns = torch.arange(grid[1], dtype=torch.float64)
    y, x = torch.meshgrid(rows, columns, indexing="ij")
    angles = torch.cat([x.reshape(-1, 1) * frequency, y.reshape(-1, 1) * frequency], 1)
    angles = angles.unflatten(1, (2, quarter))
    table = torch.cat([angles.sin(), angles.cos()], -1).flatten(1).float()  # (N, width)
    return torch.cat([torch.zeros(prefix, width), table])[None]


def initialize(module: nn.Module) -> None:
    """Initialize as MAE does: Xavier for matrices (the embedding is one), zero for biases."""
    if isinstance(module, nn.Linear | nn.Conv2d):
        nn.init.xavier_uniform_(module.weight.flatten(1))
        if module.bias is not None:
            nn.init.zeros_(module.bias)
