"""Decoders by name, and the file that holds a segmenter with all that it takes to use it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from amlp_ray.config import ImageSpec, ModelConfig, PrepareConfig, SegmentConfig
from amlp_ray.errors import CheckpointError, ConfigError
from amlp_ray.evaluation.segmenter import Segmenter, load_segmenter, save_segmenter
from amlp_ray.method.encoder import build_encoder

SHAPES: list[dict[str, Any]] = [
    {},
    {"patch_size": 16, "depth": 4, "class_token": False, "register_tokens": 4},
    {"patch_size": 4, "depth": 1, "register_tokens": 1},
    {"patch_size": 32, "depth": 5},
    {"patch_size": 64, "depth": 2},  # a single token
]


def spec_of(channels: int = 1, height: int = 64, width: int = 64) -> ImageSpec:
    return ImageSpec(
        channels=channels,
        height=height,
        width=width,
        mean=(90.0,) * channels,
        std=(30.0,) * channels,
    )


def model_of(**overrides: Any) -> ModelConfig:
    return ModelConfig.model_validate(
        {"width": 24, "depth": 2, "heads": 2, "decoder_width": 16} | overrides
    )


def segmenter(spec: ImageSpec, model: ModelConfig, **overrides: Any) -> Segmenter:
    config = SegmentConfig.model_validate({"decoder_width": 8} | overrides)
    return Segmenter(build_encoder(model, spec), spec, config)


@pytest.mark.parametrize("decoder", ["linear", "conv", "unetr", "dpt"])
@pytest.mark.parametrize("change", SHAPES)
def test_every_decoder_makes_a_logit_per_pixel_and_uses_all_its_weights(
    decoder: str, change: dict[str, Any]
) -> None:
    side = max(64, change.get("patch_size", 8))
    spec, model = (
        spec_of(2, side, side + change.get("patch_size", 8)),
        model_of(**change),
    )  # not square
    result = segmenter(spec, model, decoder=decoder)
    logits = result(torch.randn(2, 2, spec.height, spec.width))
    assert logits.shape == (2, 1, spec.height, spec.width)
    logits.square().sum().backward()
    still = [
        name
        for name, p in result.named_parameters()
        if p.requires_grad and (p.grad is None or not p.grad.any())
    ]
    # Before instance norm a bias is nothing; of a single token so are all weights of a query and a
    # key.
    still = [name for name in still if not name.endswith("bias")]
    assert still == [] or change.get("patch_size") == 64


@pytest.mark.parametrize("decoder", ["linear", "conv", "unetr", "dpt"])
def test_no_image_of_a_batch_changes_what_is_said_of_another(decoder: str) -> None:
    result = segmenter(spec_of(), model_of(), decoder=decoder)
    images = torch.randn(3, 1, 64, 64)
    with torch.inference_mode():
        torch.testing.assert_close(result(images)[:1], result(images[:1]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("decoder", ["conv", "dpt", "linear"])
def test_patches_of_any_size_suit_all_but_unetr(decoder: str) -> None:
    model, spec = model_of(patch_size=12), spec_of(1, 48, 60)
    assert segmenter(spec, model, decoder=decoder)(torch.randn(1, 1, 48, 60)).shape == (
        1,
        1,
        48,
        60,
    )


@pytest.mark.parametrize("patch_size", [2, 12])
def test_unetr_says_which_patches_it_needs(patch_size: int) -> None:
    with pytest.raises(
        ConfigError, match=rf"a power of two from 4 on, not {patch_size}; choose decoder conv"
    ):
        segmenter(spec_of(1, 48, 48), model_of(patch_size=patch_size), decoder="unetr")


def test_a_linear_decoder_is_one_projection_drawn_large() -> None:
    result = segmenter(spec_of(), model_of(), decoder="linear")
    images = torch.randn(2, 1, 64, 64)
    tokens = result.encoder.forward_features(images)[:, result.encoder.num_prefix_tokens :]
    logits = (tokens @ result.decoder.head.weight[0, :, 0, 0] + result.decoder.head.bias).view(
        2, 1, 8, 8
    )
    large = torch.nn.functional.interpolate(logits, (64, 64), mode="bilinear", align_corners=False)
    torch.testing.assert_close(result(images), large)
    assert sum(p.numel() for p in result.decoder.parameters()) == 25


@pytest.mark.parametrize("prepare", [PrepareConfig(size=64, values="percentile"), None])
def test_a_file_holds_all_that_it_takes_to_use_a_segmenter(
    tmp_path: Path, prepare: PrepareConfig | None
) -> None:
    spec, model = spec_of(), model_of(register_tokens=2)
    config = SegmentConfig(decoder="dpt", decoder_width=8, lr=0.5)
    saved = Segmenter(build_encoder(model, spec), spec, config).eval()
    save_segmenter(saved, tmp_path, encoder=model, spec=spec, prepare=prepare, config=config)
    assert [path.name for path in tmp_path.iterdir()] == ["segmenter.safetensors"]
    result = load_segmenter(tmp_path)
    assert (result.spec, result.prepare, result.config) == (spec, prepare, config)
    images = torch.randn(2, 1, 64, 64)
    with torch.inference_mode():
        assert torch.equal(result.model(images), saved(images))
    assert not result.model.training


def test_a_file_of_something_else_is_refused(tmp_path: Path) -> None:
    spec, model, config = spec_of(), model_of(), SegmentConfig(decoder_width=8)
    saved = Segmenter(build_encoder(model, spec), spec, config)
    save_segmenter(saved, tmp_path, encoder=model, spec=spec, prepare=None, config=config)
    path = tmp_path / "segmenter.safetensors"
    save_file(load_file(path), path)  # without its header
    with pytest.raises(CheckpointError, match=r"is no safetensors file of amlp-ray"):
        load_segmenter(tmp_path)
    save_segmenter(saved, tmp_path, encoder=model, spec=spec, prepare=None, config=config)
    content = path.read_bytes()
    path.write_bytes(content[:-3] + bytes([content[-3] ^ 64]) + content[-2:])
    with pytest.raises(CheckpointError, match="is damaged: its tensors are not those"):
        load_segmenter(tmp_path)
    other = config.model_copy(update={"decoder": "unetr"})
    save_segmenter(saved, tmp_path, encoder=model, spec=spec, prepare=None, config=other)
    with pytest.raises(CheckpointError, match=r"segmenter \(RuntimeError\)"):
        load_segmenter(tmp_path)
