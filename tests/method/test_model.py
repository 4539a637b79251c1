from __future__ import annotations

import pytest
import timm
import torch
from timm.models.vision_transformer import Block
from torch import Tensor

from amlp_ray.config import ImageSpec, ModelSettings
from amlp_ray.method.model import TIMM_NAME, MaskedAutoencoder, encoder_tokens, timm_arguments, use_fused_attention
from amlp_ray.method.patches import patchify

TINY = ModelSettings(patch_size=8, width=24, depth=2, heads=2, decoder_width=16, decoder_depth=2, decoder_heads=2)
SHAPES = [(1, 32, 32), (2, 24, 40), (3, 16, 48)]


def spec_of(shape: tuple[int, int, int]) -> ImageSpec:
    channels, height, width = shape
    return ImageSpec(channels=channels, height=height, width=width, mean=(0,) * channels, std=(1,) * channels)


def build(shape: tuple[int, int, int], *, category: bool = False, seed: int = 0) -> MaskedAutoencoder:
    torch.manual_seed(seed)
    return MaskedAutoencoder(TINY, spec_of(shape), category=category).eval()


def split(model: MaskedAutoencoder, batch: int, masked: int) -> tuple[Tensor, Tensor]:
    """A random permutation of the patches per image, as (visible, masked) indices."""
    n = model.grid[0] * model.grid[1]
    order = torch.rand(batch, n, generator=torch.Generator().manual_seed(1)).argsort(1)
    return order[:, masked:], order[:, :masked]


def images_of(shape: tuple[int, int, int], batch: int = 3) -> Tensor:
    return torch.randn(batch, *shape, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_with_all_patches_visible_tokens_are_those_of_timm(shape: tuple[int, int, int]) -> None:
    model, images = build(shape), images_of(shape)
    ours = encoder_tokens(model.encoder, patchify(images, 8))
    torch.testing.assert_close(ours, model.encoder.forward_features(images), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_visible_patches_alone_give_what_dropping_the_others_after_embedding_gives(shape: tuple[int, int, int]) -> None:
    model, images = build(shape), images_of(shape)
    visible, _ = split(model, 3, 5)
    ours = encoder_tokens(model.encoder, patchify(images, 8), visible)

    encoder = model.encoder  # MAE's own order: embed all, add positions, drop, prepend the class token
    tokens = encoder.patch_embed(images) + encoder.pos_embed[:, 1:]
    tokens = torch.stack([tokens[i, visible[i]] for i in range(3)])
    first = (encoder.cls_token + encoder.pos_embed[:, :1]).expand(3, -1, -1)
    expected = encoder.norm(encoder.blocks(torch.cat([first, tokens], 1)))
    torch.testing.assert_close(ours, expected, atol=1e-6, rtol=1e-5)


@torch.no_grad()
def reference_mae(model: MaskedAutoencoder, patches: Tensor, visible: Tensor) -> Tensor:
    """MAE's forward as published: mask tokens appended, unshuffled into place, all tokens decoded, all predicted."""
    b, n, _ = patches.shape
    encoded = model.decoder_embed(encoder_tokens(model.encoder, patches, visible))
    full = model.mask_token.expand(b, n, -1).clone()
    for i in range(b):
        full[i, visible[i]] = encoded[i, 1:]
    tokens = torch.cat([encoded[:, :1], full], 1) + model.decoder_positions
    for block in model.decoder_blocks:
        tokens = block(tokens)
    return model.predict(model.decoder_norm(tokens))[:, 1:]


@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_predictions_are_those_of_mae_that_decodes_every_token_in_place(shape: tuple[int, int, int]) -> None:
    model = build(shape)
    patches = patchify(images_of(shape), 8)
    visible, masked = split(model, 3, 7)
    prediction, category = model(patches, visible, masked)
    whole = reference_mae(model, patches, visible)
    assert category is None
    assert prediction.shape == (3, 7, shape[0] * 64)
    torch.testing.assert_close(prediction, torch.stack([whole[i, masked[i]] for i in range(3)]), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_masked_pixels_have_no_influence_on_the_prediction() -> None:
    model = build((1, 32, 32))
    patches = patchify(images_of((1, 32, 32)), 8)
    visible, masked = split(model, 3, 10)
    changed = patches.clone().scatter(1, masked[..., None].expand(-1, -1, 64), 99.0)
    assert torch.equal(model(patches, visible, masked)[0], model(changed, visible, masked)[0])
    changed[0, visible[0, 0]] += 1
    assert not torch.equal(model(patches, visible, masked)[0][0], model(changed, visible, masked)[0][0])


@torch.no_grad()
def test_the_order_of_indices_does_not_matter() -> None:
    model = build((1, 32, 32), category=True)
    patches = patchify(images_of((1, 32, 32)), 8)
    visible, masked = split(model, 3, 6)
    prediction, category = model(patches, visible, masked)
    again, category_again = model(patches, visible.flip(1), masked.flip(1))
    torch.testing.assert_close(again.flip(1), prediction, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(category_again.flip(1), category, atol=1e-5, rtol=1e-5)


def test_the_category_head_gives_one_logit_per_masked_patch_and_changes_no_other_initial_weight() -> None:
    without, with_head = build((2, 24, 40)), build((2, 24, 40), category=True)
    weights, more = without.state_dict(), with_head.state_dict()
    assert set(more) - set(weights) == {"category.weight", "category.bias"}
    assert all(torch.equal(weights[name], more[name]) for name in weights)
    visible, masked = split(with_head, 3, 4)
    logits = with_head(patchify(images_of((2, 24, 40)), 8), visible, masked)[1]
    assert logits is not None
    assert logits.shape == (3, 4)


def test_the_seed_alone_decides_the_initial_weights() -> None:
    a, b, c = (build((1, 16, 16), seed=seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not torch.equal(a["encoder.patch_embed.proj.weight"], c["encoder.patch_embed.proj.weight"])


def test_every_trained_parameter_gets_a_gradient_and_positions_stay_fixed() -> None:
    model = build((1, 32, 32), category=True).train()
    visible, masked = split(model, 3, 6)
    prediction, category = model(patchify(images_of((1, 32, 32)), 8), visible, masked)
    (prediction.square().mean() + category.square().mean()).backward()
    assert {name for name, p in model.named_parameters() if p.grad is None} == {"encoder.pos_embed"}
    assert not model.encoder.pos_embed.requires_grad


def test_positions_are_distinct_bounded_and_zero_for_the_class_token() -> None:
    positions = build((1, 24, 40)).encoder.pos_embed[0]
    assert not positions[0].any()
    assert positions.abs().max() <= 1
    assert torch.cdist(positions[1:], positions[1:]).add(torch.eye(15) * 9).min() > 0.1
    grid = positions[1:].view(3, 5, 24)
    assert torch.equal(grid[0, :, :12], grid[2, :, :12])  # the first half tells columns, the second rows
    assert torch.equal(grid[:, 0, 12:], grid[:, 4, 12:])


def test_fused_and_plain_attention_agree() -> None:
    model = build((1, 32, 32))
    patches = patchify(images_of((1, 32, 32)), 8)
    visible, masked = split(model, 3, 6)
    results = []
    for fused in (True, False):
        use_fused_attention(model, fused)
        assert all(m.attn.fused_attn is fused for m in model.modules() if isinstance(m, Block))
        results.append(model(patches, visible, masked)[0])
    torch.testing.assert_close(*results, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_timm_builds_the_same_encoder_from_the_arguments_alone(shape: tuple[int, int, int]) -> None:
    arguments = timm_arguments(TINY, spec_of(shape))
    theirs = timm.create_model(TIMM_NAME, pretrained=False, **arguments)
    ours = build(shape).encoder
    assert {k: v.shape for k, v in theirs.state_dict().items()} == {k: v.shape for k, v in ours.state_dict().items()}
