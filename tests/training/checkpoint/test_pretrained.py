"""Encoders to start from.

What timm itself makes of a checkpoint, and a sentence where nothing can be made of it.
"""

from __future__ import annotations

import argparse
import pickle
from pathlib import Path
from typing import Any

import numpy as np
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
from amlp_ray.utils.json_files import read_json

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
        (lambda w: {}, "holds no tensors, but a state dict of a ViT is needed"),
        (
            lambda w: w | {"blocks.3.ls1.gamma": torch.ones(192)},
            r"has not, 1 tensor such as blocks\.3\.ls1\.gamma",
        ),
        (lambda w: {key: value[:8] for key, value in w.items()}, "tensors are of other shapes"),
        (lambda w: [1, 2], "holds no tensors"),
        (
            lambda w: {"a": w, "b": w},
            r"holds 2 ViTs \('a', 'b'\), but one is needed",
        ),
        (
            lambda w: w | {"norm.bias": torch.full((192,), torch.nan)},
            r"has NaN or infinite values in 1 tensor such as norm\.bias",
        ),
        (
            lambda w: w | {"norm.bias": torch.zeros(192, dtype=torch.int8)},
            r"has whole numbers in 1 tensor such as norm\.bias",
        ),
        (
            lambda w: w | {"reg_token": torch.zeros(1, 4, 192)},
            "has 4 register tokens, not 0 as that ViT has",
        ),
    ],
)
def test_a_file_of_another_model_is_refused_and_nothing_stays_random(
    weights: dict[str, Tensor], tmp_path: Path, change: Any, message: str
) -> None:
    torch.save(change(weights), tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match=message):
        load_pretrained_encoder(str(tmp_path / "w.pth"), spec_of(), name=TINY)


class RunsCode:
    """Write a file when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, tuple[Path]]:
        return Path.touch, (self.target,)


@pytest.mark.parametrize("is_zip", [True, False])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lambda w, target: RunsCode(target), "holds an object of type .* could run code"),
        (
            lambda w, target: {"model": w, "hook": RunsCode(target)},
            "holds an object of type .* beside its tensors, and loading it could run code",
        ),
        (
            lambda w, target: {"model": w, "config": ModelConfig()},
            r"holds an object of type amlp_ray\.config\.method\.ModelConfig beside its tensors",
        ),
        (
            lambda w, target: torch.nn.Sequential(torch.nn.Linear(2, 2)),
            r"holds a whole pickled model, .* torch\.save\(model\.state_dict\(\), FILE\)",
        ),
    ],
)
def test_a_file_that_would_run_code_is_not_loaded(
    weights: dict[str, Tensor], tmp_path: Path, content: Any, message: str, is_zip: bool
) -> None:
    target = tmp_path / "made by code"
    file = tmp_path / "w.pth"
    torch.save(content(weights, target), file, _use_new_zipfile_serialization=is_zip)
    with pytest.raises(CheckpointError, match=message):
        load_pretrained_encoder(str(file), spec_of(), name=TINY)
    assert not target.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is cut short, or no file of weights"),
        (b"<!DOCTYPE html>", "is cut short, or no file of weights"),
        (b"PK\x03\x04 and no more", "cannot be read as weights"),
        (pickle.dumps({"a": 1}), "cannot be read as weights"),
        (b"\x80\x05\x95", "cannot be read as weights"),
    ],
)
def test_a_file_that_holds_no_weights_gets_one_sentence(
    tmp_path: Path, content: bytes, message: str
) -> None:
    file = tmp_path / "w.pth"
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as raised:
        load_pretrained_encoder(str(file), spec_of(), name=TINY)
    assert "\n" not in str(raised.value)


def prefixed(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: value for name, value in state.items()}


def hugging_face_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Name the tensors of a ViT as transformers does, by its documentation."""
    names = {
        "cls_token": "embeddings.cls_token",
        "pos_embed": "embeddings.position_embeddings",
        "patch_embed.proj": "embeddings.patch_embeddings.projection",
        "attn.proj": "attention.output.dense",
        "norm1": "layernorm_before",
        "norm2": "layernorm_after",
        "mlp.fc1": "intermediate.dense",
        "mlp.fc2": "output.dense",
        "blocks": "encoder.layer",
    }
    result = {"pooler.dense.weight": torch.ones(2)}
    for name, value in state.items():
        if name.startswith("norm."):
            name = f"layernorm.{name.removeprefix('norm.')}"
        for own, theirs in names.items():
            name = name.replace(own, theirs)
        if "attn.qkv" in name:
            for part, rows in zip(("query", "key", "value"), value.chunk(3), strict=True):
                result[name.replace("attn.qkv", f"attention.attention.{part}")] = rows
        else:
            result[name] = value
    return result


def chunked(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Name the blocks as DINOv2 does, three to a chunk."""
    result = {}
    for name, value in state.items():
        parts = name.split(".")
        if parts[0] == "blocks":
            parts.insert(1, str(int(parts[1]) // 3))
        result[".".join(parts)] = value
    return result


TEACHER = "weights of 'teacher.backbone' taken (the file holds 'student.backbone', "


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lambda w, other: {"state_dict": prefixed("module.encoder.", w)}, ""),
        (lambda w, other: {"model": prefixed("_orig_mod.module.backbone.", w)}, ""),
        (lambda w, other: {"net": {"encoder": {"module": w}}, "epoch": 3}, ""),
        (
            lambda w, other: {
                "student": prefixed("module.backbone.", other),
                "teacher": prefixed("backbone.", w) | {"head.mlp.0.weight": torch.ones(3)},
            },
            f"{TEACHER}'teacher.backbone')",
        ),
        (lambda w, other: {"state_dict": other, "state_dict_ema": w}, "'state_dict_ema' taken"),
        (
            lambda w, other: {
                "encoder": prefixed("module.", other),
                "target_encoder": prefixed("module.", w),
            },
            "weights of 'target_encoder' taken",
        ),
        (lambda w, other: {"teacher": chunked(w)}, ""),
        (lambda w, other: hugging_face_names(w), "names of Hugging Face translated"),
        (
            lambda w, other: (
                prefixed("vit.", hugging_face_names(w)) | {"classifier.weight": torch.ones(2)}
            ),
            "names of Hugging Face translated",
        ),
        (
            lambda w, other: {
                "model": w,
                "best": np.float64(0.83),
                "epoch": np.int64(3),
                "losses": np.arange(3.0),
                "args": argparse.Namespace(lr=np.float32(1), out=Path("runs")),
            },
            "",
        ),
    ],
)
def test_weights_are_found_under_any_prefix_and_beside_other_values(
    weights: dict[str, Tensor], tmp_path: Path, content: Any, message: str
) -> None:
    plain = {name: value for name, value in weights.items() if not name.startswith("head")}
    other = {name: torch.zeros_like(value) for name, value in plain.items()}
    torch.save(content(plain, other), tmp_path / "w.pth")
    result = load_pretrained_encoder(str(tmp_path / "w.pth"), spec_of(3, 224, 224), name=TINY)
    assert message in result.description
    loaded = result.encoder.state_dict()
    assert loaded.keys() == plain.keys()
    assert all(torch.equal(value, plain[name]) for name, value in loaded.items())


def test_the_content_tells_the_format_of_weights_not_the_suffix(
    weights: dict[str, Tensor], tmp_path: Path
) -> None:
    save_file(weights, tmp_path / "w.bin")
    torch.save(weights, tmp_path / "w.safetensors")
    for name in ("w.bin", "w.safetensors"):
        result = load_pretrained_encoder(str(tmp_path / name), spec_of(), name=TINY)
        assert torch.equal(result.encoder.norm.weight, weights["norm.weight"])


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
    assert read_json(tmp_path / "out" / "score.json") == score
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
