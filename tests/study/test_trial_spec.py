"""The specification of a trial travels between processes as plain values."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
from pydantic import ValidationError

from amlp_ray.config import PretrainConfig, ProbeConfig, ResourceConfig, SegmentConfig
from amlp_ray.launch.run_spec import RunSpec
from amlp_ray.study.trial_spec import TrialSpec


def make_spec() -> TrialSpec:
    run = RunSpec(
        config=PretrainConfig.model_validate({"epochs": 9, "ratio": {"points": [[0, 0.2]]}}),
        data="/data/mine",
        folder=Path("/runs/s/trials/3"),
        probe=ProbeConfig(num_labeled=8),
        rungs=(3, 6),
        resources=ResourceConfig(workers=(1, 3), gpus_per_worker=1),
        study="s",
        label="trial 3",
        until=6,
        fork=Path("/runs/s/trials/1"),
    )
    return TrialSpec(kind="confirm", number=3, run=run, finetune=SegmentConfig(epochs=2))


def test_a_specification_is_the_same_after_json_and_after_pickle() -> None:
    spec = make_spec()
    text = json.dumps(spec.model_dump(mode="json"))
    assert TrialSpec.model_validate(json.loads(text)) == spec
    assert pickle.loads(pickle.dumps(spec)) == spec


def test_what_follows_from_a_specification() -> None:
    run = make_spec().run
    assert run.gpus == 3, "of the most workers that it may have"
    assert run.last_epoch == 6
    assert run.model_copy(update={"until": None}).last_epoch == 9
    assert run.resources.threads == 1


def test_a_specification_is_neither_changed_nor_misspelled() -> None:
    spec = make_spec()
    with pytest.raises(ValidationError, match="frozen"):
        spec.run.until = 3  # type: ignore[misc]
    with pytest.raises(ValidationError, match="folders"):
        RunSpec.model_validate({**spec.run.model_dump(), "folders": "x"})
