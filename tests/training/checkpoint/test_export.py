from __future__ import annotations

import json
from pathlib import Path

import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from amlp_ray.config import ImageSpec, ModelConfig, PretrainConfig
from amlp_ray.errors import CheckpointError
from amlp_ray.method.autoencoder import MaskedAutoencoder
from amlp_ray.training.checkpoint.export import export_encoder, load_encoder, read_encoder_header

SETTINGS = PretrainConfig.model_validate(
    {"model": {"patch_size": 8, "width": 24, "depth": 2, "heads": 2, "decoder_width": 16}}
)
SHAPES = [(1, 32, 32), (2, 24, 40), (3, 48, 16)]


def trained(
    shape: tuple[int, int, int] = (1, 32, 32),
) -> tuple[MaskedAutoencoder, ImageSpec, Tensor]:
    """A model whose weights are all random numbers, its image spec, and images for it."""
    channels, height, width = shape
    spec = ImageSpec(
        channels=channels, height=height, width=width, mean=(9.0,) * channels, std=(3.0,) * channels
    )
    generator = torch.Generator().manual_seed(0)
    model = MaskedAutoencoder(SETTINGS.model, spec, category=True).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model, spec, torch.randn(2, *shape, generator=generator)


@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_an_exported_encoder_loads_in_plain_timm_with_every_key_matched(
    tmp_path: Path, shape: tuple[int, int, int]
) -> None:
    model, spec, images = trained(shape)
    path = tmp_path / "encoder.safetensors"
    export_encoder(model.encoder, path, SETTINGS.model, spec)
    with safe_open(str(path), framework="pt") as file:
        header, keys = file.metadata(), set(file.keys())
    arguments = json.loads(header["timm_arguments"])
    resumed = timm.create_model(header["timm_name"], checkpoint_path=str(path), **arguments).eval()
    assert set(resumed.state_dict()) == keys
    assert all(
        torch.equal(resumed.state_dict()[k], v) for k, v in model.encoder.state_dict().items()
    )
    assert torch.equal(resumed.forward_features(images), model.encoder.forward_features(images))


@torch.no_grad()
def test_load_encoder_gives_the_same_features_in_evaluation_mode(tmp_path: Path) -> None:
    model, spec, images = trained()
    export_encoder(model.encoder, tmp_path / "e.safetensors", SETTINGS.model, spec)
    encoder = load_encoder(tmp_path / "e.safetensors")
    assert not encoder.training
    features = encoder.forward_features(images)
    assert features.shape == (2, 1 + 16, 24)
    assert torch.equal(features, model.encoder.forward_features(images))


@pytest.mark.parametrize("shape", SHAPES)
def test_the_header_says_how_to_build_and_feed_the_encoder(
    tmp_path: Path, shape: tuple[int, int, int]
) -> None:
    model, spec, _ = trained(shape)
    export_encoder(model.encoder, tmp_path / "e.safetensors", SETTINGS.model, spec)
    assert read_encoder_header(tmp_path / "e.safetensors") == (SETTINGS.model, spec)


def test_an_export_holds_no_decoder_and_leaves_no_partial_file(tmp_path: Path) -> None:
    model, spec, _ = trained()
    export_encoder(model.encoder, tmp_path / "e.safetensors", SETTINGS.model, spec)
    with safe_open(str(tmp_path / "e.safetensors"), framework="pt") as file:
        assert not [
            key
            for key in file.keys()  # noqa: SIM118  (no dict)
            if "decoder" in key or "mask" in key or "category" in key
        ]
    assert [path.name for path in tmp_path.iterdir()] == ["e.safetensors"]


@pytest.mark.parametrize("read", [load_encoder, read_encoder_header])
@pytest.mark.parametrize(
    "kind", ["missing", "text", "cut short", "a segmenter", "another model", "no header"]
)
def test_what_is_no_exported_encoder_is_refused_in_one_sentence(
    tmp_path: Path, read, kind: str
) -> None:  # type: ignore[no-untyped-def]
    path = tmp_path / "e.safetensors"
    model, spec, _ = trained()
    if kind == "text":
        path.write_text("not safetensors")
    elif kind == "cut short":
        export_encoder(model.encoder, path, SETTINGS.model, spec)
        path.write_bytes(path.read_bytes()[:-100])
    elif kind == "a segmenter":
        header = {
            "timm_name": "vit_tiny_patch16_224",
            "timm_arguments": "{}",
            "image": spec.model_dump_json(),
        }
        save_file({"w": torch.zeros(2)}, path, metadata=header)
    elif kind == "another model":
        save_file({"w": torch.zeros(2)}, path, metadata={"format": "pt"})
    elif kind == "no header":
        save_file({"w": torch.zeros(2)}, path)
    with pytest.raises(
        CheckpointError, match=r"e\.safetensors.*; (check the path|give the encoder)"
    ):
        read(path)


def test_model_settings_of_an_export_are_those_of_the_run_and_not_the_defaults(
    tmp_path: Path,
) -> None:
    model, spec, _ = trained()
    export_encoder(model.encoder, tmp_path / "e.safetensors", SETTINGS.model, spec)
    assert read_encoder_header(tmp_path / "e.safetensors")[0] != ModelConfig()
