"""The encoder to take away: safetensors with timm's own keys, and how to build and feed it in the header."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from timm.models.vision_transformer import VisionTransformer

from amlp_ray.config import ImageSpec, ModelConfig
from amlp_ray.errors import CheckpointError
from amlp_ray.method.encoder import create_encoder, timm_arguments, timm_name
from amlp_ray.utils.files import atomic_write

ENCODER = "encoder.safetensors"  # in the folder of a run
HEADER = {"timm_name", "timm_arguments", "model", "image"}


def export_encoder(
    encoder: VisionTransformer, path: Path, config: ModelConfig, spec: ImageSpec
) -> None:
    """Write the encoder as safetensors with timm's own keys, and how to build and feed it in the header.

    `timm.create_model(name, checkpoint_path=path, **arguments)` loads it with every key matched; name and arguments
    are in the header under `timm_name` and `timm_arguments`.
    """
    header = {
        "timm_name": timm_name(config),
        "timm_arguments": json.dumps(timm_arguments(config, spec)),
        "model": config.model_dump_json(),
        "image": spec.model_dump_json(),
    }
    write_tensors(path, encoder.state_dict(), header)


def write_tensors(
    path: Path, tensors: dict[str, torch.Tensor], header: dict[str, str] | None = None
) -> None:
    """Write tensors as safetensors, whole, and readable for colleagues: the library itself makes private files."""
    plain = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
    atomic_write(path, save(plain, metadata=header))


def read_encoder_header(path: str | Path) -> tuple[ModelConfig, ImageSpec]:
    """Return the model settings and image shape an exported encoder was trained with.

    Raises:
        CheckpointError: where the file is missing or is no encoder exported here.
    """
    header = _header(path)
    return ModelConfig.model_validate_json(header["model"]), ImageSpec.model_validate_json(
        header["image"]
    )


def load_encoder(path: str | Path) -> VisionTransformer:
    """Load an exported encoder as a timm model, in evaluation mode.

    It takes images (B, C, H, W) normalised by the `mean` and `std` of `read_encoder_header`, and `forward_features`
    gives tokens (B, R + N, D), the R prefix tokens (class token, registers) first.
    """
    header = _header(path)
    arguments: dict[str, Any] = json.loads(header["timm_arguments"])
    encoder = create_encoder(header["timm_name"], arguments)
    with safe_open(str(path), framework="pt") as file:
        encoder.load_state_dict({key: file.get_tensor(key) for key in file.keys()})  # noqa: SIM118  (not a dict)
    return encoder.eval()


def is_encoder(path: Path) -> bool:
    """Whether this is a whole encoder as `export_encoder` writes it, told by its header and its length."""
    try:
        read_encoder_header(path)
    except CheckpointError:
        return False
    return True


def _header(path: str | Path) -> dict[str, str]:
    if not Path(path).is_file():
        raise CheckpointError(f"There is no encoder file {path}; check the path.")
    try:
        with safe_open(str(path), framework="pt") as file:
            header = file.metadata() or {}
    except SafetensorError:
        header = {}
    if not header.keys() >= HEADER:
        raise CheckpointError(
            f"{path} is cut short, or not an encoder exported by amlp-ray; give the encoder.safetensors of a run."
        )
    return dict(header)
