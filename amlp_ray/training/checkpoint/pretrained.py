"""Load pretrained encoders: one exported here, a timm checkpoint file, or timm's own weights.

timm adapts the weights with its own functions. The patch embedding of 3 channels is summed to 1, or
repeated and scaled to n; positions are resampled (bicubic) to another grid of patches. Files are
read as tensors alone, so no code is loaded. Prefixes such as `teacher.backbone.` and the names of
Hugging Face are translated.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import isqrt
from pathlib import Path

import timm
from timm.models import adapt_input_conv
from timm.models.vision_transformer import (
    VisionTransformer,
    checkpoint_filter_fn,
    get_pretrained_grid_size,
)

from amlp_ray.config import ImageSpec, ModelConfig
from amlp_ray.config.base import build
from amlp_ray.errors import CheckpointError, ConfigError
from amlp_ray.method.encoder import create_encoder, timm_arguments, timm_name
from amlp_ray.training.checkpoint.export import load_encoder, read_encoder_header
from amlp_ray.training.checkpoint.tensor_file import is_own_file
from amlp_ray.training.checkpoint.weight_names import find_vit
from amlp_ray.training.checkpoint.weights_file import Tensors, check_numbers, read_tensors

ONLINE = "timm:"
ENCODER_FIELDS = ("patch_size", "width", "depth", "heads", "class_token", "register_tokens")
# What a checkpoint may hold beside an encoder: classifiers, and the decoders of MAE and its kin.
IGNORED_PREFIXES = ("head", "fc", "decoder", "mask_token", "pre_logits")
REGISTER_NAMES = ("reg_token", "register_tokens")  # of timm and of DINOv2
PATCH_EMBEDDING = "patch_embed.proj.weight"


@dataclass(frozen=True)
class PretrainedEncoder:
    """A pretrained encoder in evaluation mode, its positions fixed, and what was adapted in it."""

    encoder: VisionTransformer
    model: ModelConfig
    description: str  # a sentence


def load_pretrained_encoder(
    weights: str, spec: ImageSpec, model: ModelConfig | None = None, name: str | None = None
) -> PretrainedEncoder:
    """Load an encoder for images of `spec`; only its values differ from `build_encoder`.

    Args:
        weights: path of an encoder exported here, path of a timm checkpoint (.safetensors, .pth,
            .bin), or `timm:vit_small_patch16_224`, with or without a tag, for timm's own weights
            from the internet.
        spec: of the images.
        model: what the encoder must be. It also describes the decoder in the result. None: any.
        name: the timm ViT of a timm checkpoint; other weights tell it themselves.

    Raises:
        ConfigError: `name` is missing or no usable ViT, or its patches do not divide the images.
        CheckpointError: the file is missing, damaged or of another architecture, or there is no
            internet.
    """
    source_model = read_pretrained_config(weights, name)
    if model is None:
        model = source_model
    else:
        _check_same_encoder(weights, source_model, model)
    if _is_exported(weights):
        encoder = _load_exported(weights, spec)
        return PretrainedEncoder(encoder, model, f"encoder of {weights}, exported by amlp-ray")
    check_patches(source_model, spec)
    if weights.startswith(ONLINE):
        label = weights.removeprefix(ONLINE)
        source = "the internet"
        tensors = _download(label)
    else:
        label = str(source_model.encoder)
        source = weights
        tensors = read_tensors(Path(weights))
    encoder = create_encoder(timm_name(model), timm_arguments(model, spec))
    tensors, changes = find_vit(tensors, weights)
    changes += _load_adapted(encoder, tensors, f"{weights} as {source_model.encoder}")
    encoder.pos_embed.requires_grad_(False)
    description = f"{label} from {source}: {', '.join(changes) or 'nothing adapted'}"
    return PretrainedEncoder(encoder.eval(), model, description)


def resolve_weights(weights: str | Path) -> str:
    """Make the path of weights absolute, so that workers in another folder find them."""
    if str(weights).startswith(ONLINE):
        return str(weights)
    return str(Path(weights).absolute())


def read_pretrained_config(weights: str, name: str | None = None) -> ModelConfig:
    """Return which encoder `weights` belong to, without loading them.

    Arguments and errors are those of `load_pretrained_encoder`.
    """
    if weights.startswith(ONLINE):
        return _timm_config(weights.removeprefix(ONLINE), "--encoder")
    if _is_exported(weights):
        return read_encoder_header(weights)[0]
    if name is None:
        raise ConfigError(
            f"{weights} is no encoder exported by amlp-ray; if it is a timm checkpoint, name its "
            f"ViT, such as vit_small_patch16_224: --encoder-name of segment, model.encoder of "
            f"pretraining."
        )
    return _timm_config(name, "--encoder-name")


def _timm_config(name: str, option: str) -> ModelConfig:
    architecture = name.partition(".")[0]
    return build(ModelConfig, {"encoder": architecture}, option)


def pretrained_image_spec(weights: str, own: ImageSpec) -> ImageSpec:
    """Return how images are normalized for an encoder.

    An exported encoder takes images normalized as those it was pretrained on. timm's weights take
    images normalized by their `own` mean and SD: timm's are those of ImageNet's colors, which do
    not apply to other channels.
    """
    return read_encoder_header(weights)[1] if _is_exported(weights) else own


def check_patches(model: ModelConfig, spec: ImageSpec) -> None:
    """Raise ConfigError if an encoder's patches do not divide the images."""
    if spec.height % model.patch_size or spec.width % model.patch_size:
        raise ConfigError(
            f"The patches of {timm_name(model)} ({model.patch_size} pixels) do not divide images "
            f"of {spec.height}x{spec.width} pixels; choose another ViT, or prepare the data with "
            f"another --size."
        )


def _is_exported(weights: str) -> bool:
    """Return whether a file holds an encoder exported here.

    Raises:
        CheckpointError: there is no such file.
    """
    if weights.startswith(ONLINE):
        return False
    if not Path(weights).is_file():
        raise CheckpointError(
            f"There is no encoder file {weights}; check the path, or give timm:NAME for weights "
            f"from the internet."
        )
    return is_own_file(Path(weights))


def _check_same_encoder(weights: str, source: ModelConfig, model: ModelConfig) -> None:
    """Raise CheckpointError if weights of `source` do not fit the encoder of `model`."""
    values = {"encoder": (timm_name(source), timm_name(model))}
    values |= {name: (getattr(source, name), getattr(model, name)) for name in ENCODER_FIELDS}
    differences = [
        f"model.{name} {old}, not {new}" for name, (old, new) in values.items() if old != new
    ]
    if differences:
        raise CheckpointError(
            f"{weights} is of another architecture than the settings have: "
            f"{'; '.join(differences)}; change the settings, or give other weights."
        )


def _load_exported(weights: str, spec: ImageSpec) -> VisionTransformer:
    source_shape = _shape_text(read_encoder_header(weights)[1])
    if source_shape != _shape_text(spec):
        raise CheckpointError(
            f"{weights} is made for {source_shape} images (channels, height, width), not "
            f"{_shape_text(spec)}; prepare the data alike."
        )
    encoder = load_encoder(weights)
    encoder.pos_embed.requires_grad_(False)
    return encoder


def _shape_text(spec: ImageSpec) -> str:
    return f"{spec.channels}x{spec.height}x{spec.width}"


def _download(name: str) -> Tensors:
    """Download timm's weights of a model name, with or without a tag."""
    architecture = name.partition(".")[0]
    names = timm.list_pretrained(f"{architecture}.*")
    if not names or name not in (architecture, *names):
        available = ", ".join(names) or f"none of {architecture}, only its architecture"
        raise ConfigError(f"timm has no weights of the name {name!r}; it has {available}.")
    try:
        return timm.create_model(name, pretrained=True).state_dict()
    except Exception as error:  # each library on the way raises its own
        raise CheckpointError(
            f"timm:{name} cannot be loaded from the internet ({type(error).__name__}); download "
            f"its file where there is internet, and give --encoder FILE --encoder-name "
            f"{architecture}."
        ) from None


def _load_adapted(encoder: VisionTransformer, tensors: Tensors, label: str) -> list[str]:
    """Load tensors by timm's names into an encoder of another shape or grid.

    Returns:
        What was adapted, a phrase each.

    Raises:
        CheckpointError: the encoder would keep a random weight, or lose one of the checkpoint's.
    """
    changes: list[str] = []
    grid = tuple(encoder.patch_embed.grid_size)
    _check_registers(encoder, tensors, label)
    try:
        source_grid = _source_grid(encoder, tensors)
        state = checkpoint_filter_fn(dict(tensors), encoder)
        changes += _adapt_channels(encoder, state)
        if "norm.weight" not in state and "fc_norm.weight" in state:  # of ViTs that pool first
            for name in ("norm.weight", "norm.bias"):
                state[name] = state[f"fc_{name}"]
            changes.append("the norm of pooled tokens taken as that of each")
        if source_grid not in (None, grid):
            changes.append("positions resampled from {}x{} to {}x{}".format(*source_grid, *grid))
        result = encoder.load_state_dict(state, strict=False)
    except Exception as error:  # timm's conversions expect tensors of certain shapes
        raise CheckpointError(
            f"{label} cannot be loaded, its tensors are of other shapes ({_last_line(error)}); "
            f"check the name."
        ) from None
    unused = [key for key in result.unexpected_keys if not key.startswith(IGNORED_PREFIXES)]
    for problem, keys in (
        ("lacks", result.missing_keys),
        ("has, what the encoder has not,", unused),
    ):
        if keys:
            plural = "s" if len(keys) > 1 else ""
            raise CheckpointError(
                f"{label} {problem} {len(keys)} tensor{plural} such as {keys[0]}; check that the "
                f"file is of this ViT."
            )
    weight_names = encoder.state_dict().keys()
    check_numbers({key: state[key] for key in weight_names}, label)
    return changes


def _check_registers(encoder: VisionTransformer, tensors: Tensors, label: str) -> None:
    """Raise CheckpointError unless the checkpoint has as many register tokens as the encoder."""
    tokens = [tensors[name] for name in REGISTER_NAMES if name in tensors]
    count = tokens[0].shape[1] if tokens and tokens[0].ndim == 3 else 0
    if count != encoder.num_reg_tokens:
        raise CheckpointError(
            f"{label} has {count} register tokens, not {encoder.num_reg_tokens} as that ViT has; "
            f"give the name of one with {count}, or other weights."
        )


def _adapt_channels(encoder: VisionTransformer, state: Tensors) -> list[str]:
    """Adapt the patch embedding in `state` to the encoder's channels; return what was done."""
    embedding = state.get(PATCH_EMBEDDING)
    channels = encoder.patch_embed.proj.in_channels
    if embedding is None or embedding.shape[1] == channels:
        return []
    source = embedding.shape[1]
    state[PATCH_EMBEDDING] = adapt_input_conv(channels, embedding, base_chans=source)
    how = "summed to 1" if channels == 1 else f"repeated to {channels} and scaled"
    plural = "s" if source > 1 else ""
    return [f"patch embedding of {source} channel{plural} {how}"]


def _source_grid(encoder: VisionTransformer, tensors: Tensors) -> tuple[int, int] | None:
    """Return rows and columns of the patches of a checkpoint's positions, as timm finds them."""
    positions = tensors.get("pos_embed")
    if positions is None:
        return None
    prefix = 0 if encoder.no_embed_class else encoder.num_prefix_tokens
    patches = positions.shape[1] - prefix
    side = isqrt(max(0, patches))
    grid = get_pretrained_grid_size(encoder, tensors.get(PATCH_EMBEDDING), patches)
    return grid or (side, side)


def _last_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[-1] if lines else type(error).__name__
    return text.rstrip(".")[:160]
