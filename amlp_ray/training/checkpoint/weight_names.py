"""Find the ViT among the tensors of a checkpoint, and give its tensors timm's names."""

from __future__ import annotations

import re
from collections.abc import Iterable

import torch

from amlp_ray.errors import CheckpointError
from amlp_ray.training.checkpoint.weights_file import Tensors

# What wrappers (DataParallel, FSDP, torch.compile) put into names, at any depth.
WRAPPERS = re.compile(
    r"(^|\.)(module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|_forward_module)"
    r"(?=\.)"
)
# A tensor that each ViT has, the surest first; what stands before it is the prefix of all others.
TIMM_ANCHORS = ("patch_embed.proj.weight", "cls_token", "blocks.0.norm1.weight")
HF_ANCHOR = "embeddings.patch_embeddings.projection.weight"
# Parts of a prefix by which one of several ViTs is chosen: averaged weights generalize better.
AVERAGED = {
    "teacher",
    "ema",
    "ema_model",
    "model_ema",
    "state_dict_ema",
    "encoder_ema",
    "target_encoder",
    "momentum_encoder",
}
AUXILIARY = {"student", "predictor", "decoder", "optimizer"}
# Where timm's own conversions look for the tensors of other names.
CONTAINERS = ("state_dict_ema.", "model_ema.", "state_dict.", "model.")
# DINOv2 trains its blocks in chunks: blocks.CHUNK.BLOCK.
CHUNKED_BLOCK = re.compile(r"^blocks\.\d+\.(?=\d+\.)")
# Names of Hugging Face's ViT and DINOv2, each with timm's.
HF_NAMES = tuple(
    (re.compile(pattern), name)
    for pattern, name in (
        (r"^embeddings\.cls_token$", "cls_token"),
        (r"^embeddings\.position_embeddings$", "pos_embed"),
        (r"^embeddings\.register_tokens$", "reg_token"),
        (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
        (r"^layernorm\.", "norm."),
        (r"^encoder\.layer\.(\d+)\.attention\.output\.dense\.", r"blocks.\1.attn.proj."),
        (r"^encoder\.layer\.(\d+)\.intermediate\.dense\.", r"blocks.\1.mlp.fc1."),
        (r"^encoder\.layer\.(\d+)\.output\.dense\.", r"blocks.\1.mlp.fc2."),
        (r"^encoder\.layer\.(\d+)\.layernorm_before\.", r"blocks.\1.norm1."),
        (r"^encoder\.layer\.(\d+)\.layernorm_after\.", r"blocks.\1.norm2."),
        (r"^encoder\.layer\.(\d+)\.layer_scale([12])\.lambda1$", r"blocks.\1.ls\2.gamma"),
        (r"^encoder\.layer\.(\d+)\.mlp\.weights_in\.", r"blocks.\1.mlp.w12."),
        (r"^encoder\.layer\.(\d+)\.mlp\.weights_out\.", r"blocks.\1.mlp.w3."),
        (r"^encoder\.layer\.", "blocks."),
    )
)
HF_QUERY = re.compile(r"^encoder\.layer\.(\d+)\.attention\.attention\.query\.(weight|bias)$")
HF_IGNORED = ("pooler.", "embeddings.mask_token")


def find_vit(tensors: Tensors, label: str) -> tuple[Tensors, list[str]]:
    """Return the tensors of a ViT by names that timm knows, and what was chosen, a phrase each.

    Prefixes such as `teacher.backbone.` are dropped, and names of Hugging Face translated. Of
    several ViTs, the one of averaged weights is taken, such as the teacher.

    Raises:
        CheckpointError: several ViTs of one kind are in the file.
    """
    plain = {
        WRAPPERS.sub("", f".{name}").removeprefix("."): value for name, value in tensors.items()
    }
    prefixes = _prefixes(plain, HF_ANCHOR)
    is_hugging_face = bool(prefixes)
    for anchor in TIMM_ANCHORS:
        prefixes = prefixes or _prefixes(plain, anchor)
    if not prefixes:  # left to timm, which knows some more names
        prefixes = [name for name in CONTAINERS if any(key.startswith(name) for key in plain)]
        prefix = (prefixes or [""])[0]
        return _below(plain, prefix), []
    prefix = _choose(prefixes, label)
    changes = []
    if len(prefixes) > 1:
        listed = ", ".join(_printable(one) for one in prefixes)
        changes.append(f"weights of {_printable(prefix)} taken (the file holds {listed})")
    weights = _below(plain, prefix)
    if is_hugging_face:
        changes.append("names of Hugging Face translated")
        return _translate(weights), changes
    return {CHUNKED_BLOCK.sub("blocks.", name): value for name, value in weights.items()}, changes


def _prefixes(names: Iterable[str], anchor: str) -> list[str]:
    """Return what stands before an anchor, sorted; empty if the anchor begins a name."""
    pattern = re.compile(rf"^(|.*\.){re.escape(anchor)}$")
    return sorted(match[1] for name in names if (match := pattern.match(name)))


def _choose(prefixes: list[str], label: str) -> str:
    averaged = [prefix for prefix in prefixes if AVERAGED & set(prefix.split("."))]
    trained = [prefix for prefix in prefixes if not AUXILIARY & set(prefix.split("."))]
    candidates = averaged or trained or prefixes
    if len(candidates) > 1:
        listed = ", ".join(_printable(one) for one in candidates)
        raise CheckpointError(
            f"{label} holds {len(candidates)} ViTs ({listed}), but one is needed; save the tensors "
            f"of one alone."
        )
    return candidates[0]


def _printable(prefix: str) -> str:
    return repr(prefix.removesuffix(".")) if prefix else "the top level"


def _below(tensors: Tensors, prefix: str) -> Tensors:
    return {
        name.removeprefix(prefix): value
        for name, value in tensors.items()
        if name.startswith(prefix)
    }


def _translate(tensors: Tensors) -> Tensors:
    """Give timm's names to tensors of Hugging Face; query, key and value become one tensor."""
    result: Tensors = {}
    for name, value in tensors.items():
        query = HF_QUERY.match(name)
        if query:
            block, kind = query.groups()
            parts = [tensors.get(name.replace(".query.", f".{part}.")) for part in ("key", "value")]
            present = [part for part in parts if part is not None]
            result[f"blocks.{block}.attn.qkv.{kind}"] = torch.cat([value, *present])
        elif ".attention.attention." not in name and not name.startswith(HF_IGNORED):
            for pattern, timm_name in HF_NAMES:
                name, count = pattern.subn(timm_name, name)
                if count:
                    break
            result[name] = value
    return result
