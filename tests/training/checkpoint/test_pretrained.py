"""Encoders to start from.

What timm itself makes of a checkpoint, and a sentence where nothing can be made of it.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor

from amlp_ray.config import ImageSpec, ModelConfig, SegmentConfig
from amlp_ray.data.dataset import PatchDataset
from amlp_ray.errors import CheckpointError, ConfigError
from amlp_ray.evaluation.segmentation import segment
from amlp_ray.evaluation.segmenter import load_segmenter
from amlp_ray.method.encoder import build_encoder
from amlp_ray.training.checkpoint import pretrained
from amlp_ray.training.checkpoint.export import export_encoder, load_encoder
from amlp_ray.training.checkpoint.pretrained import load_pretrained_encoder

# With a register and without a class token; it pools before its norm.
NAME = "vit_wee_patch16_reg1_gap_256"
TINY = "vit_tiny_patch16_224"


def spec_of(channels: int = 1, height: int = 64, width: int = 64) -> ImageSpec:
    return ImageSpec(
        channels=channels,
        height=height,
        width=width,
        mean=(90.0,) * channels,
        std=(30.0,) * channels,
    )


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    """A ViT-Ti of timm's, 3 channels, 224 pixels, with random weights."""
    torch.manual_seed(0)
    return timm.create_model(TINY).state_dict()


@pytest.fixture(scope="module")
def files(weights: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same weights as timm, torch and MAE write them."""
    folder = tmp_path_factory.mktemp("weights")
    result = {kind: folder / f"vit.{kind}" for kind in ("safetensors", "pth", "bin")} | {
        "mae": folder / "mae.pth"
    }
    save_file(weights, result["safetensors"])
    torch.save(weights, result["pth"])
    torch.save(
        {"state_dict": {f"module.{key}": value for key, value in weights.items()}}, result["bin"]
    )
    beside = {"mask_token": torch.zeros(1, 1, 8), "decoder_embed.weight": torch.zeros(8, 192)}
    mae = {key: value for key, value in weights.items() if not key.startswith("head")} | beside
    torch.save({"model": mae, "args": argparse.Namespace(lr=1), "epoch": 799}, result["mae"])
    return result


@pytest.mark.parametrize("kind", ["safetensors", "pth", "bin", "mae"])
@pytest.mark.parametrize(
    ("shape", "message"),
    [
        (
            (1, 64, 64),
            "patch embedding of 3 channels summed to 1, positions resampled from 14x14 to 4x4",
        ),
        (
            (5, 96, 64),
            "patch embedding of 3 channels repeated to 5 and scaled, "
            "positions resampled from 14x14 to 6x4",
        ),
        ((3, 224, 224), "nothing adapted"),
    ],
)
def test_a_checkpoint_becomes_what_timm_makes_of_it(
    files: dict[str, Path], kind: str, shape: tuple[int, int, int], message: str
) -> None:
    result = load_pretrained_encoder(str(files[kind]), spec_of(*shape), name=TINY)
    assert result.description == f"{TINY} from {files[kind]}: {message}"
    overlay = {"file": str(files["pth"])}
    resumed = timm.create_model(
        TINY,
        pretrained=True,
        pretrained_cfg_overlay=overlay,
        in_chans=shape[0],
        img_size=shape[1:],
        num_classes=0,
    ).eval()
    images = torch.randn(2, *shape)
    with torch.inference_mode():
        assert torch.equal(
            result.encoder.forward_features(images), resumed.forward_features(images)
        )
    assert not result.encoder.training
    assert not result.encoder.pos_embed.requires_grad


def test_a_start_is_exported_as_any_encoder(files: dict[str, Path], tmp_path: Path) -> None:
    spec = spec_of()
    result = load_pretrained_encoder(str(files["pth"]), spec, name=TINY)
    export_encoder(result.encoder, tmp_path / "e.safetensors", result.model, spec)
    again = load_pretrained_encoder(str(tmp_path / "e.safetensors"), spec, result.model)
    assert again.model == result.model
    assert again.description == f"encoder of {tmp_path / 'e.safetensors'}, exported by amlp-ray"
    images = torch.randn(2, 1, 64, 64)
    with torch.inference_mode():
        original = result.encoder.forward_features(images)
        assert torch.equal(again.encoder.forward_features(images), original)
        assert torch.equal(
            load_encoder(tmp_path / "e.safetensors").forward_features(images), original
        )


def test_a_start_replaces_the_encoder_that_settings_build(tmp_path: Path) -> None:
    torch.manual_seed(0)
    torch.save(timm.create_model(NAME).state_dict(), tmp_path / "w.pth")
    model = ModelConfig.model_validate({"encoder": NAME, "decoder_width": 32, "decoder_heads": 1})
    result = load_pretrained_encoder(str(tmp_path / "w.pth"), spec_of(), model, NAME)
    assert result.model is model
    built = build_encoder(model, spec_of()).state_dict()
    loaded = result.encoder.state_dict()
    assert {key: value.shape for key, value in built.items()} == {
        key: value.shape for key, value in loaded.items()
    }
    assert not torch.equal(built["pos_embed"], loaded["pos_embed"])


def test_weights_from_the_internet_are_adapted_alike(
    weights: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    def create(name: str, pretrained: bool) -> Any:
        assert (name, pretrained) == (f"{TINY}.augreg_in21k", True)
        model = timm.create_model(TINY)
        model.load_state_dict(weights)
        return model

    monkeypatch.setattr(
        pretrained,
        "timm",
        argparse.Namespace(create_model=create, list_pretrained=timm.list_pretrained),
    )
    result = load_pretrained_encoder(f"timm:{TINY}.augreg_in21k", spec_of())
    assert result.description.startswith(
        f"{TINY}.augreg_in21k from the internet: patch embedding of 3 channels summed to 1"
    )
    assert torch.equal(result.encoder.blocks[3].mlp.fc1.weight, weights["blocks.3.mlp.fc1.weight"])
    assert result.model == ModelConfig(encoder=TINY)


def test_without_internet_the_way_around_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def create(name: str, pretrained: bool) -> Any:
        raise ConnectionError("no route")

    monkeypatch.setattr(
        pretrained,
        "timm",
        argparse.Namespace(create_model=create, list_pretrained=timm.list_pretrained),
    )
    with pytest.raises(
        CheckpointError,
        match=rf"internet \(ConnectionError\); .* --encoder FILE --encoder-name {TINY}",
    ):
        load_pretrained_encoder(f"timm:{TINY}", spec_of())


def without(state: dict[str, Tensor], key: str) -> dict[str, Tensor]:
    return {name: value for name, value in state.items() if name != key}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda w: without(w, "blocks.3.mlp.fc1.weight"),
            r"lacks 1 tensor such as blocks\.3\.mlp\.fc1\.weight",
        ),
        (lambda w: without(w, "pos_embed"), "lacks 1 tensor such as pos_embed"),
        (
            lambda w: without(w, "patch_embed.proj.weight"),
            r"lacks 1 tensor such as patch_embed\.proj\.weight",
        ),
        (lambda w: {}, "lacks 150 tensors such as cls_token"),
        (
            lambda w: w | {"blocks.3.ls1.gamma": torch.ones(192)},
            r"has not, 1 tensor such as blocks\.3\.ls1\.gamma",
        ),
        (lambda w: {key: value[:8] for key, value in w.items()}, "tensors are of other shapes"),
        (lambda w: [1, 2], "cannot be read as weights"),
    ],
)
def test_a_file_of_another_model_is_refused_and_nothing_stays_random(
    weights: dict[str, Tensor], tmp_path: Path, change: Any, message: str
) -> None:
    torch.save(change(weights), tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match=message):
        load_pretrained_encoder(str(tmp_path / "w.pth"), spec_of(), name=TINY)


def test_a_file_that_would_run_code_is_not_loaded(tmp_path: Path) -> None:
    torch.save({"model": ModelConfig()}, tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match="cannot be read as weights"):
        load_pretrained_encoder(str(tmp_path / "w.pth"), spec_of(), name=TINY)


@pytest.mark.parametrize(
    ("overrides", "error", "message"),
    [
        (
            {"name": None},
            ConfigError,
            "is no encoder exported by amlp-ray; .* vit_small_patch16_224: --encoder-name",
        ),
        (
            {"name": "vit_tiny_patch17"},
            ConfigError,
            "'vit_tiny_patch17' is no ViT that timm knows; near: vit_tiny",
        ),
        (
            {"weights": "nowhere.pth"},
            CheckpointError,
            "There is no encoder file nowhere.pth; check the path",
        ),
        (
            {"weights": f"timm:{TINY}.mine"},
            ConfigError,
            f"no weights of the name '{TINY}.mine'; it has {TINY}.augreg",
        ),
        ({"weights": "timm:resnet18"}, ConfigError, "'resnet18' is no ViT that timm knows"),
        (
            {"spec": spec_of(1, 60, 64)},
            ConfigError,
            r"\(16 pixels\) do not divide images of 60x64 pixels",
        ),
        (
            {"model": ModelConfig()},
            CheckpointError,
            "model.patch_size 16, not 8; model.width 192, not 96",
        ),
    ],
)
def test_what_cannot_be_started_from_gets_one_sentence(
    files: dict[str, Path], overrides: dict[str, Any], error: type[Exception], message: str
) -> None:
    arguments = {"weights": str(files["pth"]), "spec": spec_of(), "name": TINY} | overrides
    with pytest.raises(error, match=message) as raised:
        load_pretrained_encoder(**arguments)
    assert "\n" not in str(raised.value)


def test_an_own_encoder_must_be_of_the_same_images_and_architecture(tmp_path: Path) -> None:
    model = ModelConfig(width=24, depth=1, heads=2)
    path = tmp_path / "e.safetensors"
    export_encoder(build_encoder(model, spec_of()), path, model, spec_of())
    with pytest.raises(CheckpointError, match=r"made for 1x64x64 images .* not 1x96x96"):
        load_pretrained_encoder(str(path), spec_of(1, 96, 96))
    with pytest.raises(CheckpointError, match=r"model\.depth 1, not 2; change the settings"):
        load_pretrained_encoder(str(path), spec_of(), ModelConfig(width=24, depth=2, heads=2))
    loaded = load_pretrained_encoder(
        str(path), spec_of(), ModelConfig(width=24, depth=1, heads=2, decoder_width=16)
    )
    assert loaded.model.decoder_width == 16


def test_a_segmenter_is_fine_tuned_from_a_timm_checkpoint(
    phantom_dataset: PatchDataset, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    file = tmp_path / "w.pth"
    torch.save(timm.create_model(NAME).state_dict(), file)
    config = SegmentConfig(epochs=1, num_labeled=4, decoder="unetr", decoder_width=8, freeze=True)
    score = segment(phantom_dataset, file, tmp_path / "out", config, name=NAME)
    message = (
        "patch embedding of 3 channels summed to 1, "
        "the norm of pooled tokens taken as that of each, positions res"
    )
    assert message in score["start"]
    assert json.loads((tmp_path / "out" / "score.json").read_text()) == score
    result = load_segmenter(tmp_path / "out")
    assert result.spec == phantom_dataset.spec, "images are normalized by their own mean and SD"
    encoder_state = load_pretrained_encoder(
        str(file), phantom_dataset.spec, name=NAME
    ).encoder.state_dict()
    assert all(
        torch.equal(value, encoder_state[key])
        for key, value in result.model.encoder.state_dict().items()
    )  # frozen
    scratch = segment(
        phantom_dataset, f"timm:{NAME}", tmp_path / "scratch", config, from_scratch=True
    )
    assert scratch["start"] == f"random weights in the shape of timm:{NAME}", (
        "asks the internet for nothing"
    )
