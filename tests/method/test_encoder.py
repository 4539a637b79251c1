from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from helpers.models import Shape, random_images, random_split, spec_of
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor

from amlp_ray.config import ModelConfig
from amlp_ray.config.base import build as build_settings
from amlp_ray.errors import ConfigError
from amlp_ray.method.encoder import (
    build_encoder,
    create_encoder,
    embed_patches,
    encoder_tokens,
    patch_attention,
    sincos_positions,
    timm_arguments,
    timm_name,
    use_fused_attention,
)
from amlp_ray.method.patches import patchify

SMALL = {"patch_size": 8, "width": 24, "depth": 2, "heads": 2}
PLAIN: dict[str, Any] = SMALL
NAMED: list[dict[str, Any]] = [
    {"encoder": "vit_tiny_patch16_224", "depth": 1},
    {"encoder": "vit_small_patch14_reg4_dinov2", "depth": 1},
    {"encoder": "vit_base_patch16_siglip_224", "depth": 1, "width": 96, "decoder_width": 48},
    {"encoder": "vit_medium_patch16_reg4_gap_256", "depth": 2, "width": 64, "decoder_width": 32},
    {"encoder": "vit_base_patch16_clip_224", "depth": 1, "width": 96, "decoder_width": 48},
    {"encoder": "deit3_small_patch16_224", "depth": 1},
]
OWN: list[dict[str, Any]] = [
    PLAIN,
    {**SMALL, "class_token": False},
    {**SMALL, "register_tokens": 4},
    {**SMALL, "class_token": False, "register_tokens": 2},
    {**SMALL, "patch_size": 4},
]


def shape_of(config: ModelConfig, channels: int = 1, grid: tuple[int, int] = (3, 5)) -> Shape:
    p = config.patch_size
    return channels, grid[0] * p, grid[1] * p


def encoder_of(
    overrides: dict[str, Any], channels: int = 1
) -> tuple[VisionTransformer, ModelConfig, Tensor]:
    """Three images and an encoder whose prefix tokens and positions are no longer the initial."""
    config = ModelConfig(**overrides)
    shape = shape_of(config, channels)
    torch.manual_seed(0)
    encoder = build_encoder(config, spec_of(shape)).eval()
    with torch.no_grad():
        for name, parameter in encoder.named_parameters():
            if name.endswith(("cls_token", "reg_token", "pos_embed", "bias", "gamma")):
                parameter.copy_(0.5 * torch.randn(parameter.shape))
    return encoder, config, random_images(shape, 3)


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("overrides", OWN + NAMED, ids=str)
@torch.no_grad()
def test_with_all_patches_visible_tokens_are_those_of_timm(
    overrides: dict[str, Any], channels: int
) -> None:
    encoder, config, images = encoder_of(overrides, channels)
    tokens = encoder_tokens(encoder, patchify(images, config.patch_size))
    assert tokens.shape == (3, encoder.num_prefix_tokens + 15, config.width)
    torch.testing.assert_close(tokens, encoder.forward_features(images), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("overrides", OWN + NAMED, ids=str)
@torch.no_grad()
def test_all_patches_in_another_order_give_the_same_tokens_in_that_order(
    overrides: dict[str, Any],
) -> None:
    encoder, config, images = encoder_of(overrides)
    patches = patchify(images, config.patch_size)
    order, _ = random_split(3, 15, 0)
    prefix = encoder.num_prefix_tokens
    plain, moved = encoder_tokens(encoder, patches), encoder_tokens(encoder, patches, order)
    torch.testing.assert_close(moved[:, :prefix], plain[:, :prefix], atol=1e-5, rtol=1e-4)
    expected = torch.stack([plain[i, prefix:][order[i]] for i in range(3)])
    torch.testing.assert_close(moved[:, prefix:], expected, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_visible_patches_alone_give_what_dropping_the_others_after_embedding_gives() -> None:
    encoder, config, images = encoder_of(PLAIN)
    visible, _ = random_split(3, 15, 5)
    actual = encoder_tokens(encoder, patchify(images, config.patch_size), visible)

    tokens = encoder.patch_embed(images) + encoder.pos_embed[:, 1:]  # MAE's own order
    tokens = torch.stack([tokens[i, visible[i]] for i in range(3)])
    first = (encoder.cls_token + encoder.pos_embed[:, :1]).expand(3, -1, -1)
    expected = encoder.norm(encoder.blocks(torch.cat([first, tokens], 1)))
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_embeddings_that_stand_in_for_patches_take_their_place() -> None:
    encoder, config, images = encoder_of(PLAIN)
    patches = patchify(images, config.patch_size)
    embedded = embed_patches(encoder, patches)
    torch.testing.assert_close(embedded, encoder.patch_embed(images), atol=1e-5, rtol=1e-5)
    plain = encoder_tokens(encoder, patches)
    assert torch.equal(encoder_tokens(encoder, torch.zeros_like(patches), hidden=embedded), plain)
    assert not torch.equal(encoder_tokens(encoder, patches, hidden=embedded + 1), plain)


@pytest.mark.parametrize("overrides", OWN + NAMED, ids=str)
def test_timm_builds_the_same_encoder_from_the_name_and_the_arguments_alone(
    overrides: dict[str, Any],
) -> None:
    encoder, config, _ = encoder_of(overrides)
    arguments = timm_arguments(config, spec_of(shape_of(config)))
    reference = timm.create_model(timm_name(config), pretrained=False, **arguments)
    assert type(create_encoder(timm_name(config), arguments)) is type(reference)
    assert {k: v.shape for k, v in reference.state_dict().items()} == {
        k: v.shape for k, v in encoder.state_dict().items()
    }


def test_a_timm_name_brings_its_sizes_and_given_ones_win() -> None:
    config = ModelConfig(encoder="vit_medium_patch16_reg4_gap_256", depth=3)
    assert (config.patch_size, config.width, config.heads, config.depth) == (16, 512, 8, 3)
    assert (config.class_token, config.register_tokens) == (False, 4)


@pytest.mark.parametrize(
    "name",
    [
        "vit_smal_patch16_224",  # misspelled
        "vit_small_r26_s32_224",  # a CNN embeds
        "vit_small_patch16_18x2_224",  # blocks in parallel
        "vit_dwee_patch16_reg1_gap_256",  # differential attention
        "vit_relpos_small_patch16_224",  # no added positions
    ],
)
def test_an_encoder_of_another_build_is_refused_by_name(name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name}.*such as vit_small|{name}.*near: vit_small"):
        build_settings(ModelConfig, {"encoder": name}, "model")


# Attention


@pytest.mark.parametrize("overrides", OWN[:4] + NAMED, ids=str)
@torch.no_grad()
def test_patch_attention_is_that_of_the_last_block_s_class_token(overrides: dict[str, Any]) -> None:
    """By hand: softmax(q k / sqrt d) from what the last block's attention is really given."""
    encoder, config, images = encoder_of(overrides)
    patches = patchify(images, config.patch_size)
    inputs: list[Tensor] = []
    last = encoder.blocks[-1].attn
    hook = last.register_forward_pre_hook(lambda module, x: inputs.append(x[0]))
    encoder.forward_features(images)
    hook.remove()

    prefix, heads = encoder.num_prefix_tokens, config.heads
    qkv = inputs[0] @ last.qkv.weight.T + (last.qkv.bias if last.qkv.bias is not None else 0)
    q, k, _ = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in qkv.chunk(3, -1))
    weights = torch.softmax(last.q_norm(q) @ last.k_norm(k).mT / (config.width // heads) ** 0.5, -1)
    rows = weights[:, :, :1] if config.class_token else weights
    expected = rows.mean((1, 2))[:, prefix:]

    attention = patch_attention(encoder, patches)
    torch.testing.assert_close(attention, expected, atol=1e-5, rtol=1e-4)
    assert (attention >= 0).all()
    assert (attention.sum(1) <= 1 + 1e-5).all()
    if prefix:
        assert (attention.sum(1) < 1).all()  # the rest goes to prefix tokens
    else:
        torch.testing.assert_close(attention.sum(1), torch.ones(3))


@torch.no_grad()
def test_fused_and_plain_attention_agree() -> None:
    encoder, config, images = encoder_of(PLAIN)
    patches = patchify(images, config.patch_size)
    results = []
    for fused in (True, False):
        use_fused_attention(encoder, fused)
        assert all(m.attn.fused_attn is fused for m in encoder.modules() if isinstance(m, Block))
        results.append(encoder_tokens(encoder, patches))
    torch.testing.assert_close(*results, atol=1e-5, rtol=1e-5)


# Positions


def test_positions_are_distinct_bounded_and_zero_for_prefix_tokens() -> None:
    positions = sincos_positions((3, 5), 24, 2)[0]
    assert not positions[:2].any()
    assert positions.abs().max() <= 1
    assert torch.cdist(positions[2:], positions[2:]).add(torch.eye(15) * 9).min() > 0.1
    grid = positions[2:].view(3, 5, 24)
    assert torch.equal(
        grid[0, :, :12], grid[2, :, :12]
    )  # the first half tells columns, the second rows
    assert torch.equal(grid[:, 0, 12:], grid[:, 4, 12:])


@pytest.mark.parametrize("overrides", OWN + NAMED, ids=str)
def test_an_encoder_starts_with_fixed_sine_cosine_positions(overrides: dict[str, Any]) -> None:
    config = ModelConfig(**overrides)
    encoder = build_encoder(config, spec_of(shape_of(config)))
    expected = sincos_positions((3, 5), config.width, 0)
    assert torch.equal(encoder.pos_embed[:, -15:], expected)
    assert not encoder.pos_embed[:, :-15].any()
    assert not encoder.pos_embed.requires_grad
