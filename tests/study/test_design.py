from __future__ import annotations

from typing import Any

import pytest

from amlp_ray.config import VARIANTS, StudySettings
from amlp_ray.study.design import arm_settings


def study(**pretrain: Any) -> StudySettings:
    return StudySettings.model_validate({"name": "s", "pretrain": pretrain})


@pytest.mark.parametrize("arm", VARIANTS)
@pytest.mark.parametrize(
    "searched",
    [
        {"variant": "simsiam"},
        {"objective": "simsiam"},
        {"variant": "simmim"},
        {"model": {"encode": "all", "decoder_depth": 0, "width": 48}},
        {"model": {"decoder_depth": 2}},
        {"ratio": {"start": 0.1}, "selection": {"mode": "soft"}, "loss": {"norm_pix": True}},
    ],
)
def test_an_arm_is_its_variant_whatever_method_a_study_searches(arm: str, searched: dict[str, Any]) -> None:
    found = arm_settings(study(**searched), arm, seed=3)
    plain = arm_settings(study(), arm, seed=3)
    assert (found.variant, found.seed) == (arm, 3)
    for part in ("objective", "ratio", "selection", "loss"):
        assert getattr(found, part) == getattr(plain, part)
    assert found.model.encode == plain.model.encode
    assert (found.model.decoder_depth == 0) == (arm == "simmim")


def test_an_arm_shares_model_and_length_with_the_study() -> None:
    found = arm_settings(study(epochs=7, model={"width": 48, "decoder_depth": 2}), "mae", seed=0)
    assert (found.epochs, found.model.width, found.model.decoder_depth) == (7, 48, 2)
