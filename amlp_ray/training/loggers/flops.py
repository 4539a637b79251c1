"""Compute the FLOPs that training requires, the peak of a device, and the share used (MFU).

Only required work counts: forward and backward passes of what is trained. The teacher, clustering,
crops and evaluation are left out, so that a more expensive mask lowers MFU instead of raising it.
"""

from __future__ import annotations

import logging
import re
import time
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from amlp_ray.config import ImageSpec, PretrainConfig
from amlp_ray.method.autoencoder import MaskedAutoencoder, build_autoencoder
from amlp_ray.method.masking_ratio import masked_count
from amlp_ray.method.precision import autocast_type
from amlp_ray.method.simsiam import SimSiam
from amlp_ray.training.loggers.metrics_file import Metrics

# Dense peaks in TFLOP/s by the name that CUDA and ROCm report: (bfloat16, float16, float32 without
# TF32). None: the card has no units for the type. Half types accumulate in float32. The first match
# counts.
# Source: the makers' data sheets, half of what they print "with sparsity": NVIDIA V100, T4, A100,
# A10, A30, A40, L4, L40S, H100, H200, Blackwell; the white papers of Turing, GA102, Ada and RTX
# Blackwell; AMD MI200, MI300 and MI350 (matrix units; of MI250 one of its two halves, which is the
# device that torch sees).
_PEAKS: tuple[tuple[str, tuple[float | None, float, float]], ...] = (
    (r"\bB200\b", (2250, 2250, 75)),
    (r"\bH200\b", (989, 989, 67)),
    (r"\bH100 NVL\b", (835, 835, 60)),
    (r"\bH100 PCIe\b", (756, 756, 51)),
    (r"\bH100\b|\bGH200\b", (989, 989, 67)),
    (r"\bA100\b", (312, 312, 19.5)),
    (r"\bA40\b", (149.7, 149.7, 37.4)),
    (r"\bA30\b", (165, 165, 10.3)),
    (r"\bA10\b", (125, 125, 31.2)),
    (r"\bL40S\b", (362, 362, 91.6)),
    (r"\bL4\b", (121, 121, 30.3)),
    (r"\bV100-PCIE\b", (None, 112, 14)),
    (r"\bV100\b", (None, 125, 15.7)),
    (r"\bT4\b", (None, 65, 8.1)),
    (r"\bRTX 6000 Ada\b", (364, 364, 91.1)),
    (r"\bRTX A6000\b", (154.8, 154.8, 38.7)),
    (r"\bRTX 5090$", (209.5, 209.5, 104.8)),
    (r"\bRTX 4090$", (165.2, 165.2, 82.6)),
    (r"\bRTX 3090$", (71, 71, 35.6)),
    (r"\bRTX 2080 Ti$", (None, 53.8, 13.4)),
    (r"\bMI355X\b", (2517, 2517, 157.3)),
    (r"\bMI3(00|25)X\b", (1307, 1307, 163.4)),
    (r"\bMI250X\b", (191.5, 191.5, 47.9)),
    (r"\bMI2(50|10)\b", (181, 181, 45.3)),
)
_COLUMNS = (torch.bfloat16, torch.float16, torch.float32)

# Seconds spent on multiplying matrices to measure a CPU.
MEASURE_S = 0.2
# Shortest product to measure: below it, starting the threads counts.
SHORTEST_S = 0.004

logger = logging.getLogger(__name__)


def trained_flops(config: PretrainConfig, spec: ImageSpec, ratio: float) -> float:
    """Compute the FLOPs that training requires per image: matrix products, forward and backward.

    A product costs 2 operations per multiply-add, and twice as much again backward. That of pixels,
    which need no gradient, costs as much again.
    """
    if config.objective == "none":
        return 0.0
    model = _meta_model(config, spec)
    patches = spec.height * spec.width // config.model.patch_size**2
    if isinstance(model, SimSiam):
        return _simsiam_flops(model, patches)
    masked = masked_count(ratio, patches, config.ratio.round_to)
    encodes_all = config.model.encode == "all"
    seen = patches if encodes_all else patches - masked
    encoder = model.encoder
    prefix = encoder.num_prefix_tokens
    products = _block_products(encoder.blocks, prefix + seen, encoder.embed_dim)
    if not model.linear:
        products += (prefix + seen) * _weights(model.decoder_embed)
    for decoder in (model.decoder, model.ranking):
        if decoder is not None:
            outputs = None if encodes_all else masked
            products += _block_products(
                decoder.blocks, prefix + patches, config.model.decoder_width, outputs
            )
    for head in (model.predict, model.category, model.rank):
        if head is not None:
            products += masked * _weights(head)
    return 6 * products + 4 * seen * _weights(encoder.patch_embed)


def _simsiam_flops(model: SimSiam, patches: int) -> float:
    """Compute the FLOPs of both views."""
    encoder = model.encoder
    tokens = patches + encoder.num_prefix_tokens
    products = _block_products(encoder.blocks, tokens, encoder.embed_dim)
    products += _weights(model.projector) + _weights(model.predictor)
    return 2 * (6 * products + 4 * patches * _weights(encoder.patch_embed))


def peak_flops(device: str, dtype: torch.dtype) -> float | None:
    """Return the peak FLOP/s of a device: of a GPU by its name, of a CPU as measured now.

    Args:
        device: such as `cpu` or `cuda:0`.
        dtype: in which matrices are multiplied; that of autocast, if there is one.

    Returns:
        None for a GPU that is in no table; one warning is logged.
    """
    if device == "cpu":
        return _measured_peak(dtype, torch.get_num_threads())
    name = torch.cuda.get_device_name(device)
    peak = listed_peak(name, dtype)
    if peak is None:
        _warn_unknown(name, dtype)
    return peak


def listed_peak(name: str, dtype: torch.dtype) -> float | None:
    """Return the dense peak FLOP/s of the GPU of that name; None if it is not listed.

    >>> listed_peak("NVIDIA A100-SXM4-80GB", torch.bfloat16)
    312000000000000.0
    """
    # A part of a card, and a slower card of the same name.
    if "MIG" in name or "Laptop" in name:
        return None
    for pattern, peaks in _PEAKS:
        if re.search(pattern, name):
            peak = dict(zip(_COLUMNS, peaks, strict=True)).get(dtype)
            return None if peak is None else peak * 1e12
    return None


def utilization(config: PretrainConfig, spec: ImageSpec, device: str, metrics: Metrics) -> Metrics:
    """Measure a worker by an epoch's metrics; the first worker's figures stand for all.

    Returns:
        `mfu` (None if the device's peak is not known), and the peak `memory` in GB.
    """
    flops = trained_flops(config, spec, metrics["ratio"])
    peak = peak_flops(device, autocast_type(config, device) or torch.float32)
    used = mfu(metrics["images_per_second_per_worker"], flops, peak)
    return {"mfu": used, "memory": round(peak_memory(device), 3)}


def mfu(images_per_second: float, flops: float, peak: float | None) -> float | None:
    """Return the share of a device's peak FLOP/s that one worker uses; None without a peak.

    Args:
        flops: per image.
    """
    return images_per_second * flops / peak if peak else None


def peak_memory(device: str) -> float:
    """Return the peak memory so far in GB; 0 if it is not known.

    It is that of torch's tensors on a GPU, and that of this process on a CPU.
    """
    if device != "cpu":
        return torch.cuda.max_memory_allocated(device) / 1e9
    status = Path("/proc/self/status")  # Linux
    found = re.search(r"VmHWM:\s+(\d+)", status.read_text()) if status.is_file() else None
    return int(found[1]) * 1024 / 1e9 if found else 0.0


@lru_cache(maxsize=8)
def _meta_model(config: PretrainConfig, spec: ImageSpec) -> MaskedAutoencoder | SimSiam:
    """Build the model without values; its own matrices count for a ViT of unusual parts too."""
    with torch.device("meta"):
        if config.objective == "simsiam":
            return SimSiam(config.model, spec)
        return build_autoencoder(config, spec)


def _weights(module: nn.Module) -> int:
    """Count the entries of a module's matrices, which are its multiply-adds per token."""
    return sum(p.numel() for p in module.parameters() if p.dim() > 1)


def _block_products(
    blocks: nn.Module, tokens: int, width: int, last_outputs: int | None = None
) -> int:
    """Count the multiply-adds of timm's blocks, of which the last computes `last_outputs` tokens.

    None: all `tokens`.
    """
    total = 0
    stack: list[Any] = list(blocks.children())
    for block in stack:
        is_last = block is stack[-1]
        outputs = last_outputs if is_last and last_outputs is not None else tokens
        qkv = _weights(block.attn.qkv)
        attention = 2 * tokens * outputs * width
        total += tokens * qkv + outputs * (_weights(block) - qkv) + attention
    return total


@cache
def _warn_unknown(name: str, dtype: torch.dtype) -> None:
    type_name = str(dtype).removeprefix("torch.")
    logger.warning("The peak of %s in %s is not known, so no MFU is reported.", name, type_name)


@cache
def _measured_peak(dtype: torch.dtype, threads: int) -> float:
    """Measure the best square product of this type; other processes can only make it slower.

    `threads` of torch tell cached measurements apart.
    """
    size = 512
    seconds = 0.0
    while seconds < SHORTEST_S and size < 8192:
        size *= 2
        a = torch.randn(size, size).to(dtype)
        b = torch.randn(size, size).to(dtype)
        out = torch.empty_like(a)
        torch.mm(a, b, out=out)  # libraries choose their kernel at the first call
        seconds = _time_product(a, b, out)
    deadline = time.perf_counter() + MEASURE_S
    while time.perf_counter() < deadline:
        seconds = min(seconds, _time_product(a, b, out))
    return 2 * size**3 / seconds


def _time_product(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> float:
    started = time.perf_counter()
    torch.mm(a, b, out=out)
    return time.perf_counter() - started
