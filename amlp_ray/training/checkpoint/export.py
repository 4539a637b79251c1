"""Export an encoder as safetensors with timm's own keys and a header that describes it."""

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


def write_tensors(
    path: Path, tensors: dict[str, torch.Tensor], header: dict[str, str] | None = None
) -> None:
    """Write tensors as safetensors atomically.

    The library's own writer makes files that colleagues cannot read.
    """
    plain = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
    atomic_write(path, save(plain, metadata=header))


def read_encoder_header(path: str | Path) -> tuple[ModelConfig, ImageSpec]:
    """Read the model config and the image shape that an exported encoder was trained with.

    Raises:
        CheckpointError: the file is missing or is no encoder exported here.
    """
    header = _read_header(path)
    model = ModelConfig.model_validate_json(header["model"])
    return model, ImageSpec.model_validate_json(header["image"])


def load_encoder(path: str | Path) -> VisionTransformer:
    """Load an exported encoder as a timm model, in evaluation mode.

    It takes images (B, C, H, W) normalized by the `mean` and `std` of `read_encoder_header`.
    `forward_features` returns tokens (B, R + N, D): the R prefix tokens (class token, registers)
    come first.

    Raises:
        CheckpointError: the file is missing or is no encoder exported here.
    """
    header = _read_header(path)
    arguments: dict[str, Any] = json.loads(header["timm_arguments"])
    encoder = create_encoder(header["timm_name"], arguments)
    with safe_open(str(path), framework="pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  (no dict)
    encoder.load_state_dict(tensors)
    return encoder.eval()


def is_encoder(path: Path) -> bool:
    """Return whether a file is a complete encoder exported here, by its header and its length."""
    try:
        read_encoder_header(path)
    except CheckpointError:
        return False
    return True


def _read_header(path: str | Path) -> dict[str, str]:
    if not Path(path).is_file():
        raise CheckpointError(f"There is no encoder file {path}; check the path.")
    try:
        with safe_open(str(path), framework="pt") as file:
            header = file.metadata() or {}
    except SafetensorError:
        header = {}
    if not header.keys() >= HEADER_KEYS:
        raise CheckpointError(
            f"{path} is cut short, or not an encoder exported by amlp-ray; give the "
            f"encoder.safetensors of a run."
        )
    return dict(header)
