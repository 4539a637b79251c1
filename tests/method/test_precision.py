"""In which precision models run."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from amlp_ray.config import ImageSpec, PretrainConfig
from amlp_ray.method.autoencoder import build_autoencoder
from amlp_ray.method.masking import Masking, TrainingStep
from amlp_ray.method.precision import autocast_type

SPEC = ImageSpec(channels=1, height=32, width=32, mean=(0.0,), std=(1.0,))


def test_auto_is_float32_on_a_cpu_and_what_is_asked_for_is_given() -> None:
    types = [
        autocast_type(PretrainConfig(precision=name), "cpu") for name in ("auto", "fp32", "bf16")
    ]
    assert types == [None, None, torch.bfloat16]


@pytest.mark.parametrize(
    ("precision", "expected"), [("fp32", torch.float32), ("bf16", torch.bfloat16)]
)
def test_the_teacher_is_asked_in_the_precision_of_the_run_and_masks_are_aimed_in_float32(
    precision: str, expected: torch.dtype
) -> None:
    config = PretrainConfig(
        variant="hpm",
        precision=precision,
        epochs=2,
        model={"width": 16, "heads": 2, "decoder_width": 16},
    )
    model = build_autoencoder(config, SPEC)
    assert model.teacher is not None
    dtypes: list[torch.dtype] = []
    model.teacher.decoder_embed.register_forward_hook(
        lambda module, inputs, out: dtypes.append(out.dtype)
    )
    masking, keys = Masking(model, config), torch.arange(3)
    images = torch.randn(3, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    score: Tensor = masking.mask_whole_images(images, keys, TrainingStep(2))[1].score
    assert dtypes == [expected]
    assert score.dtype == torch.float32
    assert bool((score.std(1) > 0.5).all())
