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
    "amlp_ray.data.layouts.item",
    "amlp_ray.study.rungs",
)


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings_are_true(name: str) -> None:
    result = doctest.testmod(importlib.import_module(name))
    assert result.attempted > 0
    assert result.failed == 0
