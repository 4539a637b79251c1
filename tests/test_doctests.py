from __future__ import annotations

import doctest
import importlib

import pytest

MODULES = (
    "amlp_ray.config.method",
    "amlp_ray.config.pretrain",
    "amlp_ray.config.reference",
    "amlp_ray.config.base",
    "amlp_ray.config.overrides",
    "amlp_ray.method.masking_ratio",
    "amlp_ray.data.parquet",
    "amlp_ray.data.path",
    "amlp_ray.data.pseudonyms",
    "amlp_ray.data.decoders.frame",
    "amlp_ray.data.decoders.intensity",
    "amlp_ray.data.decoders.masks",
    "amlp_ray.data.layouts.item",
    "amlp_ray.data.layouts.listing",
    "amlp_ray.data.layouts.nifti",
    "amlp_ray.data.layouts.nifti_names",
    "amlp_ray.study.rungs",
)


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings_are_true(name: str) -> None:
    result = doctest.testmod(importlib.import_module(name))
    assert result.attempted > 0
    assert result.failed == 0
