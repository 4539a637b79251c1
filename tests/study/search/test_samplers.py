"""Samplers, each of them built anew for every suggestion."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import optuna
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.samplers import BaseSampler
from optuna.testing.pytest_samplers import BasicSamplerTestCase, RelativeSamplerTestCase
from optuna.trial import Trial, TrialState

from amlp_ray.config import SamplerConfig, StudyConfig
from amlp_ray.config.base import build
from amlp_ray.errors import ConfigError
from amlp_ray.study.search.in_memory_study import InMemoryStudy, ObservedTrial
from amlp_ray.study.search.samplers import (
    GENERATION,
    CmaEsSampler,
    EvenPointsSampler,
    InfiniteSpaceError,
    check_sampler,
    enumerate_params,
    from_unit,
    make_sampler,
    to_unit,
)
from amlp_ray.study.search_space.space import SearchSpace
from amlp_ray.study.storage.optuna_internals import FastTPESampler, contains

RANGES = {
    "a": FloatDistribution(0.0, 1.0),
    "b": FloatDistribution(1e-3, 1e2, log=True),
    "c": IntDistribution(2, 8, step=2),
    "d": CategoricalDistribution(["x", "y", "z"]),
    "e": FloatDistribution(0.0, 0.5, step=0.1),
    "f": IntDistribution(1, 64, log=True),
}


def study_of(space: dict[str, Any], sampler: str = "grid", **more: Any) -> StudyConfig:
    return build(
        StudyConfig,
        {"name": "s", "space": space, "sampler": {"name": sampler}, "baselines": [], **more},
        "test",
    )


def ask(trial: Trial) -> dict[str, Any]:
    """A space with conditions on both sides of a choice."""
    params: dict[str, Any] = {"a": trial.suggest_float("a", 0.0, 1.0)}
    if trial.suggest_categorical("d", ["x", "y", "z"]) == "x":
        params["b"] = trial.suggest_float("b", 1e-3, 1e2, log=True)
    else:
        params["c"] = trial.suggest_int("c", 2, 8, step=2)
    return params


def filled(
    directions: list[str], n_trials: int = 40, *, constrained: bool = False
) -> InMemoryStudy:
    study, rng = InMemoryStudy("s", directions), np.random.default_rng(1)
    for number in range(n_trials):
        _, trial = study.sample(number, optuna.samplers.RandomSampler(number), ask)
        state = [TrialState.COMPLETE, TrialState.COMPLETE, TrialState.PRUNED, TrialState.RUNNING][
            number % 4
        ]
        scores = {10: float(rng.random()), 20: float(rng.random())} if len(directions) == 1 else {}
        values = (
            [float(v) for v in rng.random(len(directions))]
            if state == TrialState.COMPLETE
            else None
        )
        study.put(
            ObservedTrial(
                number,
                state,
                params=trial.params,
                distributions=trial.distributions,
                values=values,
                intermediate_values=scores,
                constraints={"seconds": float(rng.normal())} if constrained else None,
            )
        )
    return study


@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
@pytest.mark.parametrize("constrained", [False, True])
@pytest.mark.parametrize("group", [False, True])
@pytest.mark.parametrize("directions", [["maximize"], ["maximize", "minimize"]])
def test_our_faster_tpe_suggests_what_optunas_own_does(
    directions: list[str], group: bool, constrained: bool
) -> None:
    study = filled(directions, constrained=constrained)
    for seed in range(5):
        config = SamplerConfig(n_startup_trials=5, group=group)
        sampler = make_sampler(config, seed, space={})
        assert isinstance(sampler, FastTPESampler)
        suggested = study.sample(40, sampler, ask)[1].params
        optunas_own = optuna.samplers.TPESampler(
            seed=seed, n_startup_trials=5, multivariate=True, group=group
        )
        assert suggested == study.sample(40, optunas_own, ask)[1].params


@pytest.mark.parametrize("name", ["tpe", "gp", "cmaes", "qmc", "nsga2", "nsga3", "random"])
def test_each_sampler_stays_inside_the_ranges(name: str) -> None:
    study = filled(["maximize"], 12)
    always = {"a": RANGES["a"]}
    space = always if name == "cmaes" else {k: RANGES[k] for k in "abcd"}
    for seed in range(4):
        sampler = make_sampler(
            SamplerConfig(name=name, n_startup_trials=2), seed, space=space, point=seed
        )
        params = study.sample(12, sampler, ask)[1].params
        assert 0 <= params["a"] <= 1
        assert params["d"] in ("x", "y", "z")
        assert 1e-3 <= params.get("b", 1.0) <= 1e2
        assert params.get("c", 2) in (2, 4, 6, 8)


def test_pbt_is_no_sampler_of_single_trials() -> None:
    with pytest.raises(ValueError, match="pbt is no sampler"):
        make_sampler(SamplerConfig(name="pbt"), 0, space={})


@pytest.mark.parametrize("name", sorted(RANGES))
def test_a_place_in_a_range_and_its_value_belong_together(name: str) -> None:
    d: Any = RANGES[name]
    values = [from_unit(u, d) for u in np.linspace(0, 1, 400)]
    assert all(contains(d, v) for v in values)
    if not isinstance(d, CategoricalDistribution):
        assert values == sorted(values)
        assert all(from_unit(to_unit(v, d), d) == pytest.approx(v) for v in values)
    if name in "cde":
        counts = [values.count(v) for v in dict.fromkeys(values)]
        assert max(counts) - min(counts) <= 2, "the outermost values are as likely as the others"


def test_cmaes_closes_in_on_the_best_and_counts_pruned_trials() -> None:
    study = InMemoryStudy("s", ["maximize"])
    space = {"a": RANGES["a"], "b": RANGES["b"]}

    def plain(trial: Trial) -> None:
        trial.suggest_float("a", 0.0, 1.0)
        trial.suggest_float("b", 1e-3, 1e2, log=True)

    generations, distances = [], []
    for number in range(96):
        config = SamplerConfig(name="cmaes", n_startup_trials=4, population_size=8)
        sampler: Any = make_sampler(config, number, space=space)
        _, trial = study.sample(number, sampler, plain)
        attributes = dict(sampler.attributes)
        miss = (trial.params["a"] - 0.8) ** 2 + (np.log10(trial.params["b"]) / 5) ** 2
        state = TrialState.PRUNED if number % 2 else TrialState.COMPLETE
        study.put(
            ObservedTrial(
                number,
                state,
                params=trial.params,
                distributions=trial.distributions,
                values=[-miss],
                system_attrs=attributes,
            )
        )
        generations.append(attributes.get(GENERATION))
        distances.append(miss)
        assert not trial.system_attrs, "nothing pickled, even in memory"
        assert set(attributes) <= {GENERATION}
    assert generations[:4] == [None] * 4
    assert generations[4:] == [i // 8 for i in range(92)], "pruned trials fill a generation too"
    assert np.median(distances[-16:]) < np.median(distances[4:20]) / 4


def test_points_of_qmc_are_even_and_conditional_parameters_have_their_coordinate() -> None:
    study = InMemoryStudy("s", ["maximize"])
    space = {k: RANGES[k] for k in "abcd"}
    points = []
    for number in range(32):
        sampler = make_sampler(
            SamplerConfig(name="qmc"), number, space=space, series=7, point=number
        )
        points.append(study.sample(number, sampler, ask)[1].params)
    assert {int(p["a"] * 16) for p in points} == set(range(16)), "each sixteenth is met"
    assert [sum(int(p["a"] * 16) == i for p in points) for i in range(16)] == [2] * 16
    logs = [np.log10(p["b"]) for p in points if "b" in p]
    assert {int((v + 3) / 5 * 4) for v in logs} == {0, 1, 2, 3}


def test_combinations_follow_conditions_each_once() -> None:
    space = {
        "ratio.shape": {"choices": ["linear", "power"]},
        "ratio.power": {"low": 1.0, "high": 2.0, "step": 0.5, "when": {"ratio.shape": "power"}},
        "selection.clusters": {"low": 2, "high": 4},
    }
    combinations = enumerate_params(SearchSpace(study_of(space)))
    assert len(combinations) == len({str(sorted(f.items())) for f in combinations}) == 3 + 3 * 3
    assert sum("ratio.power" in f for f in combinations) == 9
    assert enumerate_params(SearchSpace(study_of({}))) == [{}]


@pytest.mark.parametrize(
    ("space", "why"),
    [
        ({"ratio.start": {"low": 0.1, "high": 0.5}}, "ratio.start has no step"),
        (
            {"ratio.start": {"low": 0.1, "high": 0.5, "step": 1e-6}},
            "ratio.start alone has 400,001 values",
        ),
        (
            {
                n: {"low": 0.0, "high": 0.5, "step": 0.01}
                for n in ("ratio.start", "ratio.end", "loss.warmup")
            },
            "more than 500 combinations",
        ),
    ],
)
def test_a_grid_of_an_endless_space_is_refused_in_one_sentence(
    space: dict[str, Any], why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("amlp_ray.study.search.samplers.MAX_GRID", 500)
    with pytest.raises(InfiniteSpaceError, match=why):
        enumerate_params(SearchSpace(study_of(space)))
    with pytest.raises(ConfigError, match=f"grid tries every combination, but .*{why}"):
        check_sampler(study_of(space))


def test_cmaes_without_a_range_in_every_trial_is_refused() -> None:
    space = {
        "ratio.shape": {"choices": ["linear", "power"]},
        "ratio.power": {"low": 0.5, "high": 3.0, "when": {"ratio.shape": "power"}},
    }
    with pytest.raises(ConfigError, match="cmaes needs a range that is searched in every trial"):
        check_sampler(study_of(space, "cmaes"))
    check_sampler(study_of(space | {"ratio.end": {"low": 0.3, "high": 0.9}}, "cmaes"))


def test_draws_tell_what_every_trial_has() -> None:
    space = {
        "ratio.end": {"low": 0.3, "high": 0.9},
        "ratio.shape": {"choices": ["linear", "power"]},
        "ratio.power": {"low": 0.5, "high": 3.0, "when": {"ratio.shape": "power"}},
    }
    searched = SearchSpace(study_of(space, "tpe"))
    assert set(searched.distributions) == set(space)
    assert set(searched.unconditional) == {"ratio.end", "ratio.shape"}


class TestCmaEsAsOptunaRequires(BasicSamplerTestCase, RelativeSamplerTestCase):
    """Optuna's own tests of a sampler."""

    @pytest.fixture
    def sampler(self) -> Callable[[], BaseSampler]:
        return lambda: CmaEsSampler({}, population_size=4, n_startup_trials=1, seed=0)


class TestEvenPointsAsOptunaRequires(BasicSamplerTestCase, RelativeSamplerTestCase):
    """The same of the sampler of even points."""

    @pytest.fixture
    def sampler(self) -> Callable[[], BaseSampler]:
        return lambda: EvenPointsSampler({}, series=0, point=3, seed=0)
