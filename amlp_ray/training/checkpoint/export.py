"""Export an encoder as safetensors with timm's own keys and a header that describes it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from timm.models.vision_transformer import VisionTransformer

from amlp_ray.config import ImageSpec, ModelConfig
from amlp_ray.errors import CheckpointError
from amlp_ray.method.encoder import create_encoder, timm_arguments, timm_name
from amlp_ray.training.checkpoint.tensor_file import (
    Header,
    read_header,
    read_tensors,
    write_tensors,
)
from amlp_ray.utils.json_files import parse_json

ENCODER = "encoder.safetensors"  # in the folder of a run
HEADER_KEYS = {"timm_name", "timm_arguments", "model", "image"}


def export_encoder(
    encoder: VisionTransformer, path: Path, config: ModelConfig, spec: ImageSpec
) -> None:
    """Write an encoder that timm loads with every key matched.

    `timm.create_model(name, checkpoint_path=path, **arguments)` loads it. Name and arguments are in
    the header, as `timm_name` and `timm_arguments`.
    """
    header = {
        "timm_name": timm_name(config),
        "timm_arguments": json.dumps(timm_arguments(config, spec)),
        "model": config.model_dump_json(),
        "image": spec.model_dump_json(),
    }
    write_tensors(path, encoder.state_dict(), header)


def read_encoder_header(path: str | Path) -> tuple[ModelConfig, ImageSpec]:
    """Read the model config and the image shape that an exported encoder was trained with.

    Raises:
        CheckpointError: the file is missing, damaged, or no encoder exported here.
    """
    header = read_header(_existing(path))
    _check_is_encoder(Path(path), header)
    model = ModelConfig.model_validate_json(header["model"])
    return model, ImageSpec.model_validate_json(header["image"])


def load_encoder(path: str | Path) -> VisionTransformer:
    """Load an exported encoder as a timm model, in evaluation mode.

    It takes images (B, C, H, W) normalized by the `mean` and `std` of `read_encoder_header`.
    `forward_features` returns tokens (B, R + N, D): the R prefix tokens (class token, registers)
    come first.

    Raises:
        CheckpointError: the file is missing, damaged, or no encoder exported here.
    """
    header, tensors = read_tensors(_existing(path))
    _check_is_encoder(Path(path), header)
    arguments: dict[str, Any] = parse_json(header["timm_arguments"])
    encoder = create_encoder(header["timm_name"], arguments)
    encoder.load_state_dict(tensors)
    return encoder.eval()


def is_encoder(path: Path) -> bool:
    """Return whether a file is an undamaged encoder exported here."""
    try:
        return read_tensors(path)[0].keys() >= HEADER_KEYS
    except CheckpointError:
        return False


def _existing(path: str | Path) -> Path:
    if not Path(path).is_file():
        raise CheckpointError(f"There is no encoder file {path}; check the path.")
    return Path(path)


def _check_is_encoder(path: Path, header: Header) -> None:
    if not header.keys() >= HEADER_KEYS:
        raise CheckpointError(
            f"{path} is no encoder; give the encoder.safetensors of a pretraining run."
        )
