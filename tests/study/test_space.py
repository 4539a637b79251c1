"""The declared space: faults are told before anything runs, conditions hold, and equal seeds give equal settings."""

from typing import Any

import optuna
import pytest

from amlp_ray.config import StudySettings
from amlp_ray.errors import SettingsError
from amlp_ray.settings import build
from amlp_ray.study.space import check_space, order_of_asking, suggest


def study(space: dict[str, Any], **other: Any) -> StudySettings:
    return build(StudySettings, {"name": "s", "space": space, **other}, "study.yaml")


FAULTS = {
    "misspelt": ({"ratio.strat": {"low": 0.1, "high": 0.5}}, "did you mean ratio.start"),
    "unlike anything": ({"zzzzzz": {"low": 0.1, "high": 0.5}}, "unknown setting 'zzzzzz'"),
    "value outside": ({"ratio.end": {"low": 0.1, "high": 1.2}}, "ratio.end is 1.2"),
    "choice outside": ({"selection.clusters": {"choices": [1, 3]}}, "selection.clusters is 1"),
    "choice unknown": ({"selection.rule": {"choices": ["smallest", "reddest"]}}, "reddest"),
    "range of words": ({"selection.rule": {"low": 0, "high": 1}}, "give choices instead of a range"),
    "range of switches": ({"flip": {"low": 0, "high": 1}}, "give choices instead of a range"),
    "seed": ({"seed": {"low": 0, "high": 9}}, "seed is not searched"),
    "condition on nothing": (
        {"ratio.power": {"low": 1, "high": 2, "when": {"ratio.form": "power"}}},
        "which is no setting",
    ),
    "condition never met": (
        {
            "ratio.shape": {"choices": ["linear"]},
            "ratio.power": {"low": 1, "high": 2, "when": {"ratio.shape": "power"}},
        },
        "never searched",
    ),
    "half steps of an integer": ({"selection.clusters": {"low": 2, "high": 6, "step": 0.5}}, "is an integer"),
    "combination": (
        {"model.width": {"low": 24, "high": 48, "step": 4}, "model.heads": {"choices": [2, 3]}},
        "some combinations are refused",
    ),
    "condition of another type": (
        {
            "selection.clusters": {"choices": [3, 4]},
            "selection.lesion_share": {"low": 0.5, "high": 1.0, "when": {"selection.clusters": "3"}},
        },
        "never searched",
    ),
    "circle": (
        {
            "ratio.start": {"low": 0.1, "high": 0.5, "when": {"ratio.end": 0.5}},
            "ratio.end": {"choices": [0.5, 0.6], "when": {"ratio.start": 0.3}},
        },
        "circle",
    ),
}


@pytest.mark.parametrize(("space", "told"), FAULTS.values(), ids=FAULTS)
def test_a_bad_space_is_refused_with_its_fault(space: dict[str, Any], told: str) -> None:
    with pytest.raises(SettingsError, match=told):
        check_space(study(space))


def test_all_faults_are_told_at_once() -> None:
    with pytest.raises(SettingsError) as error:
        check_space(study({"ratio.strat": {"low": 0.1, "high": 0.5}, "ratio.end": {"low": 0.1, "high": 1.2}}))
    assert "ratio.strat" in str(error.value)
    assert "1.2" in str(error.value)


@pytest.mark.parametrize(
    ("parameter", "told"),
    [
        ({"low": 0.9, "high": 0.2}, "must lie below"),
        ({"low": 0.0, "high": 0.2, "log": True}, "log needs"),
        ({"choices": []}, "at least 1"),
        ({"lo": 0.1, "high": 0.2}, "low is missing"),
    ],
)
def test_a_malformed_parameter_is_refused(parameter: dict[str, Any], told: str) -> None:
    with pytest.raises(SettingsError, match=told):
        study({"ratio.start": parameter})


CONDITIONAL = {
    "ratio.power": {"low": 0.5, "high": 3.0, "log": True, "when": {"ratio.shape": "power"}},
    "ratio.shape": {"choices": ["linear", "power"]},
    "selection.clusters": {"low": 2, "high": 6},
}


def test_a_parameter_is_asked_only_where_its_condition_holds() -> None:
    settings = study(CONDITIONAL)
    check_space(settings)
    assert order_of_asking(settings.space).index("ratio.shape") < order_of_asking(settings.space).index("ratio.power")
    search = optuna.create_study(sampler=optuna.samplers.RandomSampler(0))
    asked = [suggest(search.ask(), settings) for _ in range(30)]
    assert {params["ratio.shape"] for params in asked} == {"linear", "power"}
    for params in asked:
        assert ("ratio.power" in params) == (params["ratio.shape"] == "power")
        assert type(params["selection.clusters"]) is int


def test_conditions_may_rest_on_a_fixed_setting() -> None:
    space = {"ratio.power": {"low": 0.5, "high": 3.0, "when": {"ratio.shape": "power"}}}
    settings = study(space, pretrain={"ratio": {"shape": "power"}})
    check_space(settings)
    assert "ratio.power" in suggest(optuna.create_study().ask(), settings)


def test_a_trial_asked_before_gives_the_same_values_again() -> None:
    settings, search = study(CONDITIONAL), optuna.create_study(sampler=optuna.samplers.RandomSampler(1))
    trial = search.ask()
    first = suggest(trial, settings)
    again = optuna.trial.Trial(search, trial._trial_id)
    assert suggest(again, settings) == first


def test_a_searched_variant_brings_its_own_settings() -> None:
    settings = study({"variant": {"choices": ["mae", "amlp"]}}, pretrain={"epochs": 3})
    assert settings.trial({"variant": "mae"}, seed=0).selection.mode == "random"
    assert settings.trial({"variant": "amlp"}, seed=0).selection.mode == "hard"
