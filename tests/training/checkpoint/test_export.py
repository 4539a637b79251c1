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
from amlp_ray.training.checkpoint.export import (
    export_encoder,
    is_encoder,
    load_encoder,
    read_encoder_header,
)
from amlp_ray.training.checkpoint.pretrained import load_pretrained_encoder
from amlp_ray.training.checkpoint.tensor_file import read_tensors, write_tensors

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


NO_ENCODERS = {
    "missing": "check the path",
    "text": "is no safetensors file of amlp-ray; give the encoder.safetensors",
    "another model": "is no safetensors file of amlp-ray; give the encoder.safetensors",
    "of an older version": "has no digests, so that damage could not be seen: an older amlp_ray",
    "a segmenter": "is no encoder; give the encoder.safetensors of a pretraining run",
    "cut short": "is damaged: it is cut short or its header cannot be read; copy it again",
}


@pytest.mark.parametrize("read", [load_encoder, read_encoder_header])
@pytest.mark.parametrize("kind", NO_ENCODERS)
def test_what_is_no_exported_encoder_is_refused_in_one_sentence(
    tmp_path: Path, read, kind: str
) -> None:  # type: ignore[no-untyped-def]
    path = tmp_path / "e.safetensors"
    model, spec, _ = trained()
    header = {"timm_name": "vit", "timm_arguments": "{}", "image": spec.model_dump_json()}
    if kind == "text":
        path.write_text("not safetensors")
    elif kind == "cut short":
        export_encoder(model.encoder, path, SETTINGS.model, spec)
        path.write_bytes(path.read_bytes()[:-100])
    elif kind == "a segmenter":
        write_tensors(path, {"w": torch.zeros(2)}, header)
    elif kind == "of an older version":
        save_file({"w": torch.zeros(2)}, path, metadata=header)
    elif kind == "another model":
        save_file({"w": torch.zeros(2)}, path, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=NO_ENCODERS[kind]) as error:
        read(path)
    assert str(error.value).count(str(path)) == 1


def test_no_flipped_bit_of_an_encoder_is_read(tmp_path: Path) -> None:
    path = tmp_path / "e.safetensors"
    model, spec, _ = trained()
    export_encoder(model.encoder, path, SETTINGS.model, spec)
    content = path.read_bytes()
    header_end = 8 + int.from_bytes(content[:8], "little")
    assert is_encoder(path)
    for place in (*range(0, header_end, 41), *range(header_end, len(content), len(content) // 40)):
        damaged = bytearray(content)
        damaged[place] ^= 1 << place % 8
        path.write_bytes(damaged)
        assert not is_encoder(path)
        # Weights of others may be read from any file, but not from a damaged one of ours.
        for read in (load_encoder, lambda file: load_pretrained_encoder(str(file), spec)):
            with pytest.raises(CheckpointError, match=r"e\.safetensors is damaged: it"):
                read(path)
    path.write_bytes(content)
    assert is_encoder(path)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, torch.bool, torch.int64])
def test_tensors_of_any_type_and_shape_have_digests(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = {"a": torch.ones(3, 2).T.to(dtype), "b": torch.zeros((), dtype=dtype)}
    tensors["empty"] = torch.zeros(0, 4, dtype=dtype)
    write_tensors(tmp_path / "t.safetensors", tensors, {"kind": "test"})
    header, result = read_tensors(tmp_path / "t.safetensors")
    assert header == {"kind": "test"}
    assert result.keys() == tensors.keys()
    assert all(torch.equal(result[name], tensors[name]) for name in tensors)


def test_model_settings_of_an_export_are_those_of_the_run_and_not_the_defaults(
    tmp_path: Path,
) -> None:
    model, spec, _ = trained()
    export_encoder(model.encoder, tmp_path / "e.safetensors", SETTINGS.model, spec)
    assert read_encoder_header(tmp_path / "e.safetensors")[0] != ModelConfig()
