from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from helpers.models import (
    GRAY,
    TINY,
    Shape,
    build,
    random_images,
    random_split,
    spec_of,
    step,
    tiny,
)
from timm.models.vision_transformer import Block
from torch import Tensor

from amlp_ray.config import VARIANTS, ModelConfig
from amlp_ray.method.autoencoder import MaskedAutoencoder, build_autoencoder
from amlp_ray.method.encoder import encoder_tokens, use_fused_attention
from amlp_ray.method.masking import Masking
from amlp_ray.method.patches import patchify
from amlp_ray.method.simsiam import SimSiam, two_views

SMALL = {
    "patch_size": 8,
    "width": 24,
    "depth": 2,
    "heads": 2,
    "decoder_width": 16,
    "decoder_depth": 2,
}
KINDS: list[dict[str, Any]] = [
    SMALL,
    {**SMALL, "class_token": False},
    {**SMALL, "register_tokens": 3},
    {**SMALL, "encode": "all"},
    {**SMALL, "encode": "all", "decoder_depth": 0},
]
SHAPES: list[Shape] = [(1, 32, 32), (2, 24, 40), (3, 16, 48)]


def autoencoder(
    shape: Shape, overrides: dict[str, Any] | None = None, *, seed: int = 0, **parts: bool
) -> MaskedAutoencoder:
    torch.manual_seed(seed)
    return MaskedAutoencoder(ModelConfig(**(overrides or SMALL)), spec_of(shape), **parts).eval()


def patches_and_split(shape: Shape, masked: int) -> tuple[Tensor, Tensor, Tensor]:
    patches = patchify(random_images(shape, 3), 8)
    return patches, *random_split(3, patches.shape[1], masked)


@torch.no_grad()
def reference_mae(model: MaskedAutoencoder, patches: Tensor, visible: Tensor) -> Tensor:
    """MAE's forward as published: mask tokens appended, unshuffled, all decoded and predicted."""
    b, n, _ = patches.shape
    encoded = model.decoder_embed(encoder_tokens(model.encoder, patches, visible))
    full = model.mask_token.expand(b, n, -1).clone()
    for i in range(b):
        full[i, visible[i]] = encoded[i, model.prefix :]
    tokens = torch.cat([encoded[:, : model.prefix], full], 1) + model.decoder_positions
    for block in model.decoder.blocks:
        tokens = block(tokens)
    return model.predict(model.decoder.norm(tokens))[:, model.prefix :]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("overrides", KINDS[:3], ids=str)
@torch.no_grad()
def test_predictions_are_those_of_mae_that_decodes_every_token_in_place(
    overrides: dict[str, Any], shape: Shape
) -> None:
    model = autoencoder(shape, overrides)
    patches, visible, masked = patches_and_split(shape, 7)
    prediction = model(patches, visible, masked)
    whole = reference_mae(model, patches, visible)
    assert prediction.category is None
    assert prediction.difficulty is None
    assert prediction.pixels.shape == (3, 7, shape[0] * 64)
    torch.testing.assert_close(
        prediction.pixels,
        torch.stack([whole[i, masked[i]] for i in range(3)]),
        atol=1e-5,
        rtol=1e-5,
    )


@pytest.mark.parametrize("depth", [0, 1])
@torch.no_grad()
def test_encoding_all_tokens_is_simmim_with_mask_tokens_among_the_embeddings(depth: int) -> None:
    shape = (1, 32, 32)
    model = autoencoder(shape, {**SMALL, "encode": "all", "decoder_depth": depth})
    patches, visible, masked = patches_and_split(shape, 5)
    encoder = model.encoder
    embedded = encoder.patch_embed(random_images(shape, 3))
    for i in range(3):
        embedded[i, masked[i]] = model.mask_token[0]
    tokens = torch.cat([encoder.cls_token.expand(3, -1, -1), embedded], 1) + encoder.pos_embed
    tokens = encoder.norm(encoder.blocks(tokens))
    if depth:
        tokens = model.decoder(model.decoder_embed(tokens) + model.decoder_positions)
    expected = model.predict(tokens)[:, 1:]
    prediction = model(patches, visible, masked).pixels
    torch.testing.assert_close(
        prediction, torch.stack([expected[i, masked[i]] for i in range(3)]), atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("overrides", KINDS, ids=str)
@torch.no_grad()
def test_masked_pixels_have_no_influence_on_the_prediction(overrides: dict[str, Any]) -> None:
    model = autoencoder((1, 32, 32), overrides, category=True)
    patches, visible, masked = patches_and_split((1, 32, 32), 10)
    changed = patches.clone().scatter(1, masked[..., None].expand(-1, -1, 64), 99.0)
    for one, other in zip(
        model(patches, visible, masked)[:2], model(changed, visible, masked)[:2], strict=True
    ):
        assert torch.equal(one, other)
    changed[0, visible[0, 0]] += 1
    assert not torch.equal(
        model(patches, visible, masked).pixels[0], model(changed, visible, masked).pixels[0]
    )


@pytest.mark.parametrize("overrides", KINDS, ids=str)
@torch.no_grad()
def test_the_order_of_indices_does_not_matter(overrides: dict[str, Any]) -> None:
    model = autoencoder(
        (1, 32, 32), overrides, category=True, ranking=overrides.get("encode") != "all"
    )
    patches, visible, masked = patches_and_split((1, 32, 32), 6)
    plain = model(patches, visible, masked)
    flipped = model(patches, visible.flip(1), masked.flip(1))
    for one, other in zip(plain, flipped, strict=True):
        if one is not None:
            torch.testing.assert_close(other.flip(1), one, atol=1e-5, rtol=1e-5)


# Optional parts


@pytest.mark.parametrize("shape", SHAPES)
def test_optional_parts_change_no_other_initial_weight_and_no_prediction(shape: Shape) -> None:
    base = autoencoder(shape)
    weights = base.state_dict()
    patches, visible, masked = patches_and_split(shape, 4)
    for category, ranking in itertools.product((False, True), repeat=2):
        model = autoencoder(shape, category=category, ranking=ranking)
        more = model.state_dict()
        added = {name.split(".")[0] for name in set(more) - set(weights)}
        assert added == ({"category"} if category else set()) | (
            {"ranking", "rank"} if ranking else set()
        )
        assert all(torch.equal(weights[name], more[name]) for name in weights)
        prediction = model(patches, visible, masked)
        assert torch.equal(prediction.pixels, base(patches, visible, masked).pixels)
        assert (prediction.category is not None, prediction.difficulty is not None) == (
            category,
            ranking,
        )
        assert all(extra.shape == (3, 4) for extra in prediction[1:] if extra is not None)


def test_a_teacher_and_centroids_change_no_other_initial_weight_either() -> None:
    plain = build(tiny({"variant": "mps-ams"})).state_dict()
    for selection in (
        {"scope": "dataset"},
        {"features": "tokens"},
        {"features": "tokens", "scope": "dataset"},
    ):
        model = build(tiny({"variant": "mps-ams", "selection": selection}))
        more = model.state_dict()
        assert all(torch.equal(plain[name], more[name]) for name in plain)
        assert {name.split(".")[0] for name in set(more) - set(plain)} <= {"teacher", "centroids"}
        assert (model.centroids is not None) == ("scope" in selection)
        assert (model.teacher is not None) == ("features" in selection)


@pytest.mark.parametrize(
    ("features", "dimensions"),
    [("raw", 2 * 64), ("stats", 2 * 3), ("context", 4), ("tokens", TINY["width"])],
)
def test_centroids_have_the_dimensions_of_their_features(features: str, dimensions: int) -> None:
    config = tiny(
        {
            "selection": {"features": features, "scope": "dataset", "clusters": 5},
            "loss": {"warmup": 0.0},
        }
    )
    model = build(config, (2, 64, 64))
    assert model.centroids is not None
    assert model.centroids.centers.shape == (5, dimensions)
    keys = torch.arange(4)
    step(
        Masking(model, config),
        random_images((2, 64, 64), 4),
        keys,
        2 if features == "tokens" else 1,
    )
    assert float(model.centroids.counts.sum()) == 4 * 64


@torch.no_grad()
def test_difficulty_is_predicted_for_all_patches_from_whole_images() -> None:
    shape = (1, 32, 32)
    model = autoencoder(shape, ranking=True)
    patches, _, _ = patches_and_split(shape, 4)
    tokens = model.decoder_embed(encoder_tokens(model.encoder, patches)) + model.decoder_positions
    for block in model.ranking.blocks:
        tokens = block(tokens)
    expected = model.rank(model.ranking.norm(tokens))[:, 1:, 0]
    torch.testing.assert_close(model.predicted_difficulty(patches), expected, atol=1e-5, rtol=1e-5)
    assert expected.shape == (3, 16)


def test_the_seed_alone_decides_the_initial_weights() -> None:
    a, b, c = (autoencoder((1, 16, 16), seed=seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not torch.equal(
        a["encoder.patch_embed.proj.weight"], c["encoder.patch_embed.proj.weight"]
    )


def test_fused_and_plain_attention_agree() -> None:
    model = autoencoder((1, 32, 32))
    patches, visible, masked = patches_and_split((1, 32, 32), 6)
    results = []
    for fused in (True, False):
        use_fused_attention(model, fused)
        assert all(m.attn.fused_attn is fused for m in model.modules() if isinstance(m, Block))
        results.append(model(patches, visible, masked).pixels)
    torch.testing.assert_close(*results, atol=1e-5, rtol=1e-5)


# Gradients: data-parallel training waits for that of every trained parameter

BASELINES: list[dict[str, Any]] = [
    {"variant": name}
    for name, changes in VARIANTS.items()
    if changes.get("objective", "reconstruction") == "reconstruction"
]
BASELINES[[b["variant"] for b in BASELINES].index("simmim")]["model"] = {"decoder_depth": 0}
MORE: list[dict[str, Any]] = [
    {"model": {"class_token": False, "register_tokens": 2}},
    {"model": {"encode": "all"}},
    {"selection": {"scope": "dataset", "features": "tokens"}},
    {"loss": {"ranking_weight": 1.0}},
    {"loss": {"weighting": "arl", "ccl_threshold": "otsu", "norm_pix": True, "distance": "l1"}},
]


@pytest.mark.parametrize("epoch", [1, 5])  # within and after the warm-up
@pytest.mark.parametrize("overrides", BASELINES + MORE, ids=str)
def test_every_trained_parameter_gets_a_gradient(overrides: dict[str, Any], epoch: int) -> None:
    config = tiny(overrides)
    model = build(config).train()
    step(
        Masking(model, config), random_images(GRAY, 4), torch.arange(4), epoch
    ).losses.total.backward()
    for name, parameter in model.named_parameters():
        fixed = name.endswith("pos_embed") or name.startswith("teacher.")
        assert parameter.requires_grad is not fixed, name
        assert (parameter.grad is None) is fixed, name
        assert fixed or bool(parameter.grad.isfinite().all()), name


@pytest.mark.parametrize(
    "encoder", ["vit_medium_patch16_reg4_gap_256", "vit_base_patch16_siglip_224"]
)
def test_every_trained_parameter_of_a_named_encoder_gets_a_gradient(encoder: str) -> None:
    config = tiny({"variant": "mae", "model": {"encoder": encoder, "heads": 2, "decoder_heads": 2}})
    model = build(config).train()
    step(Masking(model, config), random_images(GRAY, 2), torch.arange(2), 1).losses.total.backward()
    without = {name for name, p in model.named_parameters() if p.requires_grad and p.grad is None}
    assert without == set()


def test_every_trained_parameter_of_simsiam_gets_a_gradient() -> None:
    config = tiny({"variant": "simsiam"})
    model = SimSiam(config.model, spec_of(GRAY))
    model(*two_views(random_images(GRAY, 6), torch.arange(6), config, 8, 1))[0].backward()
    assert {name for name, p in model.named_parameters() if p.grad is None} == {"encoder.pos_embed"}


def test_the_random_encoder_is_that_of_every_other_variant() -> None:
    scratch, mae = (build(tiny({"variant": name})) for name in ("scratch", "mae"))
    expected = mae.encoder.state_dict()
    assert all(
        torch.equal(value, expected[name]) for name, value in scratch.encoder.state_dict().items()
    )
    assert build_autoencoder(tiny({"variant": "scratch"}), spec_of(GRAY)).teacher is None
