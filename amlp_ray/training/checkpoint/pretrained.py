"""Encoders to start from: one exported here, a timm checkpoint in a file, or timm's own weights from the internet.

timm does the adapting, with its own functions: the patch embedding of 3 channels is summed to 1, or repeated and scaled
to n; positions are resampled (bicubic) to another grid of patches. Weights are tensors alone: no code is loaded.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import isqrt
from pathlib import Path
from typing import Any

import timm
from timm.models import adapt_input_conv, load_state_dict
from timm.models.vision_transformer import (
    VisionTransformer,
    checkpoint_filter_fn,
    get_pretrained_grid_size,
)
from torch import Tensor

from amlp_ray.config import ImageSpec, ModelConfig
from amlp_ray.config.base import build
from amlp_ray.errors import CheckpointError, ConfigError
from amlp_ray.method.encoder import create_encoder, timm_arguments, timm_name
from amlp_ray.training.checkpoint.export import load_encoder, read_encoder_header

ONLINE = "timm:"
ENCODER_FIELDS = ("patch_size", "width", "depth", "heads", "class_token", "register_tokens")
# What checkpoints hold beside an encoder: classifiers, and the decoders of MAE and its kin.
BESIDE = ("head", "fc", "decoder", "mask_token", "pre_logits")


@dataclass(frozen=True)
class Start:
    """An encoder to train on, in evaluation mode, and the settings it belongs to.

    `told` says in a sentence what was loaded and what was adapted. Positions are fixed, as in every encoder here.
    """

    encoder: VisionTransformer
    model: ModelConfig
    told: str


def starting_encoder(
    weights: str, spec: ImageSpec, model: ModelConfig | None = None, name: str | None = None
) -> Start:
    """Load an encoder for images of `spec`; it equals what `build_encoder` builds from its settings, but for its values.

    Args:
        weights: path of an encoder exported here, path of a timm checkpoint (.safetensors, .pth, .bin), or
            `timm:vit_small_patch16_224`, with a tag or without, for timm's own weights from the internet.
        model: what the encoder has to be; its decoder's settings are handed on. None: whatever it is.
        name: which timm ViT a timm checkpoint is of; other weights say it themselves.

    Raises:
        ConfigError: `name` is missing or no ViT that can be used, or its patches do not fit the images.
        CheckpointError: no such file, a damaged one, one of another architecture, or no internet.
    """
    found = starting_model(weights, name)
    _check_same(weights, found, model)
    config = found if model is None else model
    if _is_exported(weights):
        return Start(_own(weights, spec), config, f"encoder of {weights}, exported by amlp-ray")
    check_patches(found, spec)
    given = _online(weights.removeprefix(ONLINE)) if weights.startswith(ONLINE) else _read(weights)
    encoder = create_encoder(timm_name(config), timm_arguments(config, spec))
    adapted = _fill(encoder, given, f"{weights} as {found.encoder}")
    encoder.pos_embed.requires_grad_(False)
    source = "the internet" if weights.startswith(ONLINE) else weights
    label = weights.removeprefix(ONLINE) if weights.startswith(ONLINE) else found.encoder
    return Start(
        encoder.eval(),
        config,
        f"{label} from {source}: {', '.join(adapted) or 'nothing adapted'}",
    )


def located(weights: str | Path) -> str:
    """Weights by a path that holds wherever a worker runs."""
    return str(weights) if str(weights).startswith(ONLINE) else str(Path(weights).absolute())


def starting_model(weights: str, name: str | None = None) -> ModelConfig:
    """What encoder `weights` are of; nothing is loaded. Arguments and errors as in `starting_encoder`."""
    if weights.startswith(ONLINE):
        return _settings_of(weights.removeprefix(ONLINE).partition(".")[0], "--encoder")
    if _is_exported(weights):
        return read_encoder_header(weights)[0]
    if name is None:
        raise ConfigError(
            f"{weights} is no encoder exported by amlp-ray; if it is a timm checkpoint, say of which ViT, such as "
            f"vit_small_patch16_224: --encoder-name of segment, model.encoder of pretraining."
        )
    return _settings_of(name.partition(".")[0], "--encoder-name")


def starting_spec(weights: str, own: ImageSpec) -> ImageSpec:
    """How images are to be normalised for an encoder: as those it was pretrained on, or by `own` for timm's weights.

    timm's were trained with the mean and SD of ImageNet's colours, which say nothing of other channels.
    """
    return read_encoder_header(weights)[1] if _is_exported(weights) else own


def check_patches(model: ModelConfig, spec: ImageSpec) -> None:
    """Raise ConfigError where an encoder's patches do not divide the images."""
    if spec.height % model.patch_size or spec.width % model.patch_size:
        raise ConfigError(
            f"The patches of {timm_name(model)} ({model.patch_size} pixels) do not divide images of "
            f"{spec.height}x{spec.width} pixels; choose another ViT, or prepare the data with another --size."
        )


def _is_exported(weights: str) -> bool:
    """Whether it is a file of an encoder exported here. Raises CheckpointError where there is no file at all."""
    if weights.startswith(ONLINE):
        return False
    if not Path(weights).is_file():
        raise CheckpointError(
            f"There is no encoder file {weights}; check the path, or give timm:NAME for weights from the internet."
        )
    try:
        read_encoder_header(weights)
    except CheckpointError:
        return False
    return True


def _settings_of(name: str, option: str) -> ModelConfig:
    return build(ModelConfig, {"encoder": name}, option)


def _check_same(weights: str, found: ModelConfig, wanted: ModelConfig | None) -> None:
    if wanted is None:
        return
    pairs = {"encoder": (timm_name(found), timm_name(wanted))}
    pairs |= {field: (getattr(found, field), getattr(wanted, field)) for field in ENCODER_FIELDS}
    differing = [
        f"model.{key} {theirs}, not {ours}"
        for key, (theirs, ours) in pairs.items()
        if theirs != ours
    ]
    if differing:
        raise CheckpointError(
            f"{weights} is of another architecture than the settings have: {'; '.join(differing)}; "
            f"change the settings, or give other weights."
        )


def _own(weights: str, spec: ImageSpec) -> VisionTransformer:
    made_for = read_encoder_header(weights)[1]
    theirs, ours = ("x".join(map(str, (s.channels, s.height, s.width))) for s in (made_for, spec))
    if theirs != ours:
        raise CheckpointError(
            f"{weights} is made for {theirs} images (channels, height, width), not {ours}; prepare the data alike."
        )
    encoder = load_encoder(weights)
    encoder.pos_embed.requires_grad_(False)
    return encoder


def _online(name: str) -> dict[str, Tensor]:
    """Weights as timm gives them, for images as timm trains on."""
    base = name.partition(".")[0]
    known = timm.list_pretrained(f"{base}.*")
    if name not in (base, *known) or not known:
        raise ConfigError(
            f"timm has no weights of the name {name!r}; it has "
            + (", ".join(known) if known else f"none of {base}, only its architecture")
            + "."
        )
    try:
        return timm.create_model(name, pretrained=True).state_dict()
    except Exception as error:  # every library on the way has its own
        raise CheckpointError(
            f"timm:{name} cannot be loaded from the internet ({type(error).__name__}); fetch its file where there is "
            f"internet, and give --encoder FILE --encoder-name {base}."
        ) from None


def _read(weights: str) -> dict[str, Tensor]:
    try:
        state: dict[str, Any] = load_state_dict(
            weights
        )  # under `model` or `state_dict` too, and by `weights_only`
        tensors = {key: value for key, value in state.items() if isinstance(value, Tensor)}
    except Exception as error:  # whatever else the file is
        raise CheckpointError(
            f"{weights} cannot be read as weights ({type(error).__name__}); give a state dict as .safetensors, or as "
            f"torch.save writes it."
        ) from None
    return tensors


def _fill(encoder: VisionTransformer, given: dict[str, Tensor], what: str) -> list[str]:
    """Load a checkpoint's tensors, adapted to the encoder; return what was adapted.

    Raises CheckpointError where the encoder would keep a random weight, or lose one of the checkpoint's.
    """
    told, grid = [], tuple(encoder.patch_embed.grid_size)
    source_grid = _grid_of(encoder, given)
    try:
        state = checkpoint_filter_fn(dict(given), encoder)
        embedding = state.get("patch_embed.proj.weight")
        channels, source = (
            encoder.patch_embed.proj.in_channels,
            embedding.shape[1] if embedding is not None else 0,
        )
        if embedding is not None and source != channels:
            state["patch_embed.proj.weight"] = adapt_input_conv(
                channels, embedding, base_chans=source
            )
            how = "summed to 1" if channels == 1 else f"repeated to {channels} and scaled"
            told.append(f"patch embedding of {source} channel{'s' * (source > 1)} {how}")
        if "norm.weight" not in state and "fc_norm.weight" in state:  # of ViTs that pool first
            state |= {
                key.removeprefix("fc_"): state[key] for key in ("fc_norm.weight", "fc_norm.bias")
            }
            told.append("the norm of pooled tokens taken as that of each")
        if source_grid not in (None, grid):
            told.append("positions resampled from {}x{} to {}x{}".format(*source_grid, *grid))
        result = encoder.load_state_dict(state, strict=False)
    except (RuntimeError, ValueError, AttributeError, KeyError) as error:
        raise CheckpointError(
            f"{what} cannot be loaded, its tensors are of other shapes ({_first_line(error)}); check the name."
        ) from None
    lost = [key for key in result.unexpected_keys if not key.startswith(BESIDE)]
    for kind, keys in (("lacks", result.missing_keys), ("has, what the encoder has not,", lost)):
        if keys:
            raise CheckpointError(
                f"{what} {kind} {len(keys)} tensor{'s' * (len(keys) > 1)} such as {keys[0]}; "
                f"check that the file is of this ViT."
            )
    return told


def _grid_of(encoder: VisionTransformer, given: dict[str, Tensor]) -> tuple[int, int] | None:
    """Rows and columns of the patches that a checkpoint's positions stand for, as timm finds them."""
    positions = given.get("pos_embed")
    if positions is None:
        return None
    prefix = 0 if encoder.no_embed_class else encoder.num_prefix_tokens
    count = positions.shape[1] - prefix
    side = isqrt(max(0, count))
    return get_pretrained_grid_size(encoder, given.get("patch_embed.proj.weight"), count) or (
        side,
        side,
    )


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[-1] if lines else type(error).__name__).rstrip(".")[:160]
