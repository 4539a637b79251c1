"""How much arithmetic a step requires, how much the device could do, and the share of it that is used (MFU).

Only required work counts: forward and backward of what is trained. The teacher, clustering, crops and evaluation are
left out, so that a dearer mask lowers MFU instead of raising it.
"""

from __future__ import annotations

import re
import time
import warnings
from collections.abc import Callable
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from amlp_ray.config import ImageSpec, PretrainConfig
from amlp_ray.method.autoencoder import MaskedAutoencoder, build_autoencoder
from amlp_ray.method.masking_ratio import masked_count
from amlp_ray.method.simsiam import SimSiam

# Dense peaks in TFLOP/s, by name as CUDA and ROCm tell it: (bfloat16, float16, float32 without TF32); None: the card
# has no units for it. Half types accumulate in float32. First match counts.
# From the makers' data sheets, half of what they print "with sparsity": NVIDIA V100, T4, A100, A10, A30, A40, L4, L40S,
# H100, H200, Blackwell; the white papers of Turing, GA102, Ada and RTX Blackwell; AMD MI200, MI300 and MI350 (matrix
# units; of MI250 one of its two halves, which is the device that torch sees).
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

MEASURE_S = 0.2  # of multiplying matrices on a CPU
SHORTEST_S = 0.004  # of one product: below it, starting the threads counts


def trained_flops(config: PretrainConfig, spec: ImageSpec, ratio: float) -> float:
    """Floating-point operations that training requires per image, at a masking ratio: matrix products, both ways.

    A product costs 2 operations per multiply-add, and twice as much again backward; that of pixels, which need no
    gradient, as much again.
    """
    if config.objective == "none":
        return 0.0
    model = _shapes(config, spec)
    p = config.model.patch_size
    patches = spec.height * spec.width // (p * p)
    encoder = model.encoder
    prefix, width = encoder.num_prefix_tokens, encoder.embed_dim
    if isinstance(model, SimSiam):
        view = (
            _blocks(encoder.blocks, patches + prefix, width)
            + _entries(model.projector)
            + _entries(model.predictor)
        )
        return 2 * (6 * view + 4 * patches * _entries(encoder.patch_embed))
    masked = masked_count(ratio, patches, config.ratio.round_to)
    everything = config.model.encode == "all"
    seen = patches if everything else patches - masked
    products = _blocks(encoder.blocks, prefix + seen, width)
    if not model.linear:
        products += (prefix + seen) * _entries(model.decoder_embed)
    for decoder in (model.decoder, model.ranking):
        if decoder is not None:
            asked = None if everything else masked
            products += _blocks(decoder.blocks, prefix + patches, config.model.decoder_width, asked)
    products += masked * sum(
        _entries(head) for head in (model.predict, model.category, model.rank) if head is not None
    )
    return 6 * products + 4 * seen * _entries(encoder.patch_embed)


def peak_flops(
    device: str, dtype: torch.dtype, say: Callable[[str], None] = warnings.warn
) -> float | None:
    """Operations per second that a device can do at most: of a GPU by its name, of a CPU as measured now.

    Args:
        device: such as `cpu` or `cuda:0`.
        dtype: in which matrices are multiplied, that of autocast where there is one.
        say: told once of a GPU that is in no table; then nothing is known, and None returned.
    """
    if device == "cpu":
        return _measured_peak(dtype, torch.get_num_threads())
    name = torch.cuda.get_device_name(device)
    peak = listed_peak(name, dtype)
    if peak is None:
        _once(say, name, dtype)
    return peak


def listed_peak(name: str, dtype: torch.dtype) -> float | None:
    """Dense peak of the GPU of that name, operations per second; None where it, or its peak in a type, is not known.

    >>> listed_peak("NVIDIA A100-SXM4-80GB", torch.bfloat16)
    312000000000000.0
    """
    if "MIG" in name or "Laptop" in name:  # a part of a card, and a slower card of the same name
        return None
    for pattern, peaks in _PEAKS:
        if re.search(pattern, name) and dtype in _COLUMNS:
            peak = peaks[_COLUMNS.index(dtype)]
            return None if peak is None else peak * 1e12
    return None


def mfu(images_per_second: float, flops: float, peak: float | None) -> float | None:
    """Share of a device's peak that one worker's images per second come to, at `flops` each; None without a peak."""
    return images_per_second * flops / peak if peak else None


def peak_memory(device: str) -> float:
    """Most memory that was held so far, in GB: of the GPU by torch's tensors, else by this process; 0: not known."""
    if device != "cpu":
        return torch.cuda.max_memory_allocated(device) / 1e9
    status = Path("/proc/self/status")  # Linux
    lines = status.read_text().splitlines() if status.is_file() else []
    held = next((line for line in lines if line.startswith("VmHWM:")), "VmHWM: 0 kB")
    return int(held.split()[1]) * 1024 / 1e9


@lru_cache(maxsize=8)
def _shapes(config: PretrainConfig, spec: ImageSpec) -> MaskedAutoencoder | SimSiam:
    """The model without its numbers: counted by its own matrices, a timm ViT of unusual parts is counted right."""
    with torch.device("meta"):
        if config.objective == "simsiam":
            return SimSiam(config.model, spec)
        return build_autoencoder(config, spec)


def _entries(module: nn.Module) -> int:
    """Entries of a module's matrices: multiply-adds per token."""
    return sum(p.numel() for p in module.parameters() if p.dim() > 1)


def _blocks(blocks: nn.Module, tokens: int, width: int, asked: int | None = None) -> int:
    """Multiply-adds of transformer blocks on `tokens`, of which the last block answers for `asked` only."""
    total = 0
    stack: list[Any] = list(blocks.children())  # timm's blocks, whose parts no stub tells
    for block in stack:
        answered = tokens if asked is None or block is not stack[-1] else asked
        into = _entries(block.attn.qkv)
        total += tokens * into + answered * (_entries(block) - into) + 2 * tokens * answered * width
    return total


@cache
def _once(say: Callable[[str], None], name: str, dtype: torch.dtype) -> None:
    say(
        f"The peak of {name} in {str(dtype).removeprefix('torch.')} is not known here, so no MFU is told."
    )


@cache
def _measured_peak(dtype: torch.dtype, threads: int) -> float:
    """The best of square products of this type with `threads` threads; other processes can only make it lower."""
    size, seconds = 512, 0.0
    while seconds < SHORTEST_S and size < 8192:
        size *= 2
        a, b = (torch.randn(size, size).to(dtype) for _ in range(2))
        out = torch.empty_like(a)
        torch.mm(a, b, out=out)  # libraries choose their kernel at the first call
        seconds = _seconds(a, b, out)
    until = time.perf_counter() + MEASURE_S
    while time.perf_counter() < until:
        seconds = min(seconds, _seconds(a, b, out))
    return 2 * size**3 / seconds


def _seconds(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> float:
    started = time.perf_counter()
    torch.mm(a, b, out=out)
    return time.perf_counter() - started
