"""Every part of AMLP that is switched off leaves plain MAE, to the bit.

So a study compares parts, not code.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.models import GRAY, MAE, Stepped, build, step, tiny
from torch import Tensor

from amlp_ray.config import PretrainConfig
from amlp_ray.method.masking import Masking

Phantoms = tuple[Tensor, Tensor, Tensor]
LATE = 12  # an epoch after the warm-up, and between two analyses
RRL = {"weighting": "rrl"}

NEUTRAL: list[dict[str, Any]] = [
    {"selection": {"mode": "soft", "strength": 0}},
    {"selection": {"mode": "soft", "score": "cluster", "strength": 0}},
    {"selection": {"mode": "soft", "strength": 0, "analysis_interval": 0}},
    {"selection": {"mode": "ranked", "score_share_start": 0, "score_share_end": 0}},
    {
        "selection": {
            "mode": "ranked",
            "score": "attention",
            "score_share_start": 0,
            "score_share_end": 0,
        }
    },
    {
        "selection": {
            "mode": "ranked",
            "score": "difficulty",
            "score_share_start": 0,
            "score_share_end": 0,
        }
    },
    {"selection": {"mode": "hard", "min_patches": 64}},
    {"selection": {"mode": "hard", "max_share": 0.001, "analysis_interval": 0}},
    {
        "selection": {"mode": "hard", "hard_by": "score", "background_mean": 1, "background_std": 1}
    },  # nothing is tissue
    {"selection": {"mode": "hard", "min_patches": 64, "scope": "dataset", "dilate": 2}},
    {"selection": {"analysis_interval": 0}},
    {"selection": {"analysis_interval": 3}},
    {"selection": {"feedback": 1.0, "dilate": 4, "features": "tokens"}},  # of no use in random mode
    {"ratio": {"shape": "fixed", "end": 0.2}},
    {"ratio": {"shape": "points", "points": [[0, 0.75], [1, 0.75]]}},
    {"loss": {"weighting": "rrl", "gamma": 0}},
    {"loss": {"weighting": "rrl", "mix": 0}},
    {"loss": {"weighting": "arl", "mix": 0}},
    {"loss": {"ranking_weight": 0, "ccl_weight": 0, "warmup": 0.5}},
]
WARMING: list[dict[str, Any]] = [
    {"loss": RRL},
    {"loss": {"weighting": "arl"}},
    {"loss": {"ccl_weight": 10.0}},
    {
        "loss": {**RRL, "ccl_weight": 10.0},
        "selection": {"mode": "soft", "strength": 0, "feedback": 1.0},
    },
]


def stepped(
    config: PretrainConfig, images: Tensor, keys: Tensor, epoch: int
) -> tuple[Stepped, dict[str, Tensor]]:
    """One step and its gradients by the name of the weight."""
    model = build(config)
    done = step(Masking(model, config), images, keys, epoch)
    done.losses.total.backward()
    return done, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def check_equal_to_mae(overrides: dict[str, Any], images: Tensor, keys: Tensor, epoch: int) -> None:
    (actual, gradients), (reference, expected) = (
        stepped(config, images, keys, epoch) for config in (tiny(MAE, overrides), tiny(MAE))
    )
    assert torch.equal(actual.chosen.masked, reference.chosen.masked)
    assert torch.equal(actual.chosen.visible, reference.chosen.visible)
    assert torch.equal(actual.prediction.pixels, reference.prediction.pixels)
    assert actual.losses.total.equal(reference.losses.total)
    assert all(torch.equal(gradients[name], gradient) for name, gradient in expected.items())


@pytest.mark.parametrize("overrides", NEUTRAL, ids=str)
def test_a_neutral_switch_is_mae_to_the_bit(
    ultrasound: Phantoms, overrides: dict[str, Any]
) -> None:
    images, _, keys = ultrasound
    check_equal_to_mae(overrides, images, keys, LATE)


@pytest.mark.parametrize("overrides", WARMING, ids=str)
@pytest.mark.parametrize("epoch", [1, 5])
def test_while_warming_up_any_loss_is_that_of_mae_to_the_bit(
    ultrasound: Phantoms, overrides: dict[str, Any], epoch: int
) -> None:
    images, _, keys = ultrasound
    check_equal_to_mae(
        {"loss": {"warmup": 0.25}} | overrides | {"loss": {**overrides["loss"], "warmup": 0.25}},
        images,
        keys,
        epoch,
    )
    actual, reference = (
        stepped(tiny(MAE, g, {"loss": {"warmup": 0.25}}), images, keys, 6)[0]
        for g in (overrides, {})
    )
    assert not actual.losses.total.equal(reference.losses.total)  # the epoch after


def test_attention_weights_of_a_huge_temperature_come_close(ultrasound: Phantoms) -> None:
    images, _, keys = ultrasound
    near, mae = (
        stepped(tiny(MAE, overrides), images, keys, LATE)[0].losses.total
        for overrides in ({"loss": {"weighting": "arl", "temperature": 1e6}}, {})
    )
    torch.testing.assert_close(near, mae, rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    "overrides",
    [
        {"selection": {"feedback": 0.0}},
        {"selection": {"feedback": 1.0}, "loss": {"ccl_weight": 0.0}},  # no category is learned
        {"selection": {"dilate": 0}},
        {"selection": {"lesion_share": 1.0}},
        {"loss": {"mix": 0.0, "weighting": "rrl"}},
        {"ratio": {"round_to": 1, "ratio_over": "all"}},
    ],
    ids=str,
)
def test_a_neutral_switch_of_hard_masking_is_hard_masking_to_the_bit(
    ultrasound: Phantoms, overrides: dict[str, Any]
) -> None:
    images, _, keys = ultrasound
    plain = {"variant": "mps-ams"}
    actual, reference = (stepped(tiny(plain, g), images, keys, LATE)[0] for g in (overrides, {}))
    assert torch.equal(actual.chosen.masked, reference.chosen.masked)
    assert torch.equal(actual.chosen.lesion, reference.chosen.lesion)
    assert torch.equal(actual.prediction.pixels, reference.prediction.pixels)
    assert actual.losses.total.equal(reference.losses.total)


@pytest.mark.parametrize(
    "overrides",
    [
        {"selection": {"mode": "soft", "strength": 1}},
        {"selection": {"mode": "ranked", "score_share_end": 0.5}},
        {"selection": {"mode": "hard"}},
        {"selection": {"mode": "parts"}},
        {
            "ratio": {"ratio_over": "tissue"},
            "selection": {"background_mean": 0.5, "background_std": 0.5},
        },
        {"loss": RRL},
        {"loss": {"weighting": "arl"}},
        {"loss": {"ccl_weight": 0.1}},
        {"loss": {"ranking_weight": 1.0}},
        {"loss": {"norm_pix": True}},
        {"loss": {"distance": "l1"}},
    ],
    ids=str,
)
def test_a_switch_that_is_on_is_no_longer_mae(
    ultrasound: Phantoms, overrides: dict[str, Any]
) -> None:
    images, _, keys = ultrasound
    actual, reference = (stepped(tiny(MAE, g), images, keys, LATE)[0] for g in (overrides, {}))
    assert not actual.losses.total.equal(reference.losses.total)


def test_optional_parts_leave_the_other_weights_equal() -> None:
    plain = build(tiny(MAE), GRAY).state_dict()
    parts = (
        {"loss": {"ccl_weight": 1.0}},
        {"loss": {"ranking_weight": 1.0}},
        {"variant": "amlp"},
        {"variant": "hpm"},
    )
    for overrides in parts:
        more = build(tiny(overrides), GRAY).state_dict()
        assert len(more) > len(plain)
        assert all(torch.equal(more[name], value) for name, value in plain.items())
