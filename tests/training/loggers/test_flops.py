"""Arithmetic of a step against torch's own counter, and peaks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from amlp_ray.config import ImageSpec, PretrainConfig
from amlp_ray.method.autoencoder import build_autoencoder
from amlp_ray.method.encoder import use_fused_attention
from amlp_ray.method.masking_ratio import masked_count
from amlp_ray.method.simsiam import SimSiam
from amlp_ray.training.loggers.flops import listed_peak, mfu, peak_flops, peak_memory, trained_flops

SPEC = ImageSpec(channels=3, height=32, width=48, mean=(0.0,) * 3, std=(1.0,) * 3)
SMALL = {
    "width": 48,
    "depth": 3,
    "heads": 4,
    "decoder_width": 32,
    "decoder_depth": 2,
    "decoder_heads": 2,
}
IMAGES = 3


def counted(config: PretrainConfig, ratio: float) -> float:
    """What torch counts of a forward and backward pass, per image."""
    n = (SPEC.height // config.model.patch_size) * (SPEC.width // config.model.patch_size)
    patches = torch.randn(IMAGES, n, SPEC.channels * config.model.patch_size**2)
    if config.objective == "simsiam":
        siamese = SimSiam(config.model, SPEC)
        use_fused_attention(siamese, False)
        with FlopCounterMode(display=False) as counter:
            siamese(patches, patches.flip(1))[0].backward()
        return counter.get_total_flops() / IMAGES
    model = build_autoencoder(config, SPEC)
    use_fused_attention(model, False)  # the counter does not see fused attention on a CPU
    order = torch.rand(IMAGES, n).argsort(1)
    masked = masked_count(ratio, n, config.ratio.round_to)
    with FlopCounterMode(display=False) as counter:
        prediction = model(patches, order[:, masked:], order[:, :masked])
        torch.stack([part.sum() for part in prediction if part is not None]).sum().backward()
    return counter.get_total_flops() / IMAGES


@pytest.mark.parametrize("ratio", [0.25, 0.75])
@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"variant": "mae", "model": {**SMALL, "decoder_depth": 1, "class_token": False}},
        {"variant": "hpm"},
        {"variant": "simmim"},
        {"variant": "mae", "model": {**SMALL, "encode": "all", "register_tokens": 2}},
        {
            "variant": "mae",
            "model": {**SMALL, "encoder": "vit_tiny_patch16_224", "patch_size": 8},
            "ratio": {"round_to": 4},
        },
        {"variant": "simsiam"},
    ],
    ids=lambda overrides: "-".join(
        str(v) for v in (overrides.get("variant", "amlp"), len(overrides.get("model", ())))
    ),
)
def test_arithmetic_is_what_torch_counts(overrides: dict[str, Any], ratio: float) -> None:
    config = PretrainConfig(
        **{**overrides, "model": {**SMALL, **_of_variant(overrides), **overrides.get("model", {})}}
    )
    assert trained_flops(config, SPEC, ratio) == pytest.approx(counted(config, ratio), rel=1e-9)


def _of_variant(overrides: dict[str, Any]) -> dict[str, Any]:
    return {"encode": "all", "decoder_depth": 0} if overrides.get("variant") == "simmim" else {}


def test_an_mae_of_vit_base_takes_58_gflop_an_image() -> None:
    """The figure of MAE's own architecture.

    8.6 GFLOP forward in the encoder, 10.7 in the decoder.
    """
    model = {
        "encoder": "vit_base_patch16_224",
        "decoder_width": 512,
        "decoder_depth": 8,
        "decoder_heads": 16,
    }
    spec = ImageSpec(channels=3, height=224, width=224, mean=(0.0,) * 3, std=(1.0,) * 3)
    config = PretrainConfig(variant="mae", model=model)
    assert trained_flops(config, spec, 0.75) == pytest.approx(58e9, rel=0.02)


def test_a_random_encoder_takes_nothing() -> None:
    assert trained_flops(PretrainConfig(variant="scratch"), SPEC, 0.75) == 0


@pytest.mark.parametrize(
    ("name", "dtype", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", torch.bfloat16, 989),
        ("NVIDIA H100 PCIe", torch.bfloat16, 756),
        ("NVIDIA H200", torch.float32, 67),
        ("NVIDIA A100-SXM4-40GB", torch.float16, 312),
        ("NVIDIA A10", torch.bfloat16, 125),
        ("NVIDIA L4", torch.bfloat16, 121),
        ("NVIDIA L40S", torch.bfloat16, 362),
        ("Tesla V100-SXM2-16GB", torch.float16, 125),
        ("Tesla V100-SXM2-16GB", torch.bfloat16, None),
        ("Tesla T4", torch.float32, 8.1),
        ("NVIDIA GeForce RTX 4090", torch.bfloat16, 165.2),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", torch.bfloat16, None),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", torch.bfloat16, None),
        ("AMD Instinct MI300X", torch.bfloat16, 1307),
        ("NVIDIA A10G", torch.bfloat16, None),
        ("NVIDIA H200", torch.float64, None),
        ("some other card", torch.bfloat16, None),
    ],
)
def test_a_gpu_is_known_by_its_name(name: str, dtype: torch.dtype, tflops: float | None) -> None:
    assert listed_peak(name, dtype) == (None if tflops is None else pytest.approx(tflops * 1e12))


def test_an_unknown_gpu_is_told_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some Card 9")
    assert [peak_flops("cuda:0", torch.bfloat16) for _ in range(2)] == [None, None]
    message = "The peak of Some Card 9 in bfloat16 is not known, so no MFU is reported."
    assert caplog.messages == [message]


def test_the_peak_of_this_cpu_is_near_that_of_a_plain_product() -> None:
    import time

    peak = peak_flops("cpu", torch.float32)
    assert peak is not None
    a = torch.randn(1024, 1024)
    seconds = []
    for _ in range(10):
        started = time.perf_counter()
        a @ a
        seconds.append(time.perf_counter() - started)
    assert 0.2 * peak < 2 * 1024**3 / min(seconds) < 3 * peak  # a busy machine may have kept it low
    assert peak_flops("cpu", torch.float32) == peak  # measured once


def test_mfu_is_work_done_over_work_possible() -> None:
    assert mfu(100.0, 2e9, 1e12) == pytest.approx(0.2)
    assert mfu(100.0, 2e9, None) is None


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only Linux tells")
def test_memory_that_was_given_back_still_counts() -> None:
    block = torch.ones(50_000_000)  # 0.2 GB
    del block
    status = Path("/proc/self/status").read_text()
    now = int(status.split("VmRSS:")[1].split()[0]) * 1024 / 1e9
    assert peak_memory("cpu") > now + 0.1
