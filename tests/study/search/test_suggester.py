"""Suggestions from a copy of the store in memory, and whether a restart changes them."""

from __future__ import annotations

import sys
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from types import ModuleType
from typing import Any

import optuna
import pytest
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState

from amlp_ray.config import StudyConfig
from amlp_ray.config.base import build
from amlp_ray.errors import ConfigError
from amlp_ray.study.search.suggester import Duplicate, Suggester, Suggestion
from amlp_ray.study.search_space.space_function import allow_code

CONDITIONAL = {
    "ratio.start": {"low": 0.1, "high": 0.6},
    "ratio.end": {"low": 0.3, "high": 0.9},
    "ratio.shape": {"choices": ["linear", "cosine", "power"]},
    "ratio.power": {"low": 0.5, "high": 3.0, "log": True, "when": {"ratio.shape": "power"}},
}
FINITE = {
    "ratio.shape": {"choices": ["linear", "cosine", "power"]},
    "ratio.power": {"low": 1.0, "high": 2.0, "step": 0.5, "when": {"ratio.shape": "power"}},
    "selection.clusters": {"low": 2, "high": 4},
}  # 15 combinations
TWO = {"objectives": {"dsc": "maximize", "gpu_seconds": "minimize"}, "limits": {"seconds": 15}}
SAMPLERS = ["tpe", "cmaes", "qmc", "nsga2", "nsga3", "random", "grid"]


def make_config(sampler: str = "tpe", **changes: Any) -> StudyConfig:
    values: dict[str, Any] = {
        "name": "s",
        "pretrain": {"epochs": 40},
        "space": FINITE | {"selection.clusters": {"low": 2, "high": 8}}
        if sampler == "grid"
        else CONDITIONAL,
        "sampler": {"name": sampler, "n_startup_trials": 5},
        "pruner": {"name": "none"},
        "baselines": [],
    }
    return build(StudyConfig, values | changes, "test")


def study_of(s: StudyConfig, storage: Any = None) -> optuna.Study:
    return optuna.create_study(
        study_name="s", directions=list(s.objectives.values()), storage=storage
    )


def store(study: optuna.Study, suggestion: Suggestion, **attributes: Any) -> int:
    now = datetime.now()
    template = FrozenTrial(
        number=-1,
        trial_id=-1,
        state=TrialState.RUNNING,
        value=None,
        datetime_start=now,
        datetime_complete=None,
        params=suggestion.params,
        distributions=suggestion.distributions,
        user_attrs=attributes,
        system_attrs=suggestion.system_attrs,
        intermediate_values={},
    )
    return study._storage.create_new_trial(study._study_id, template)


def end(
    study: optuna.Study, trial_id: int, value: float, state: TrialState = TrialState.COMPLETE
) -> None:
    number = study._storage.get_trial(trial_id).number
    study._storage.set_trial_user_attr(trial_id, "stats", {"seconds": 10 + number % 9})
    study._storage.set_trial_intermediate_value(trial_id, 20, value - 0.1)
    several = len(study.directions) > 1
    values: list[float] | None = [value, float(number)] if several else [value]
    if state == TrialState.PRUNED:
        values = None if several else [value - 0.1]
    study._storage.set_trial_state_values(
        trial_id, state, None if state == TrialState.FAIL else values
    )


def score(params: dict[str, Any]) -> float:
    return (
        1 - (params.get("ratio.start", 0.3) - 0.3) ** 2 - (params.get("ratio.end", 0.5) - 0.7) ** 2
    )


def run(
    s: StudyConfig, many: int, *, restarted: bool, open_storage: Callable[[], Any] = lambda: None
) -> list[dict[str, Any]]:
    study = study_of(s, open_storage())
    suggester, proposed = Suggester(s, study.directions), []
    for number in range(many):
        if restarted:
            if (storage := open_storage()) is not None:
                study = optuna.load_study(study_name="s", storage=storage)
            suggester = Suggester(s, study.directions)
        suggester.update(study.get_trials(deepcopy=False))
        suggestion = suggester.suggest(number)
        assert isinstance(suggestion, Suggestion)
        proposed.append(suggestion.params)
        states = [
            TrialState.PRUNED,
            TrialState.COMPLETE,
            TrialState.COMPLETE,
            TrialState.COMPLETE,
            TrialState.FAIL,
        ]
        end(study, store(study, suggestion), score(suggestion.params), states[number % 5])
    return proposed


CASES = [(name, {}) for name in SAMPLERS] + [
    (name, TWO) for name in ("tpe", "nsga2", "nsga3", "qmc")
]
CASES += [
    (name, {"require": ["ratio.start <= ratio.end"]}) for name in ("tpe", "cmaes", "qmc", "nsga3")
]


@pytest.mark.parametrize(("name", "more"), CASES)
def test_a_restart_before_each_trial_changes_nothing(
    tmp_path: Path, name: str, more: dict[str, Any]
) -> None:
    s = make_config(name, **more)
    whole = run(s, 24, restarted=False)
    journal = str(tmp_path / "journal")
    assert (
        run(s, 24, restarted=True, open_storage=lambda: JournalStorage(JournalFileBackend(journal)))
        == whole
    )
    assert len({str(p) for p in whole}) == 24, "no settings twice"
    assert "pickle" not in (text := Path(journal).read_text())
    assert "optimizer" not in text


@pytest.mark.parametrize("more", [{}, TWO])
def test_a_restart_changes_nothing_for_gp(more: dict[str, Any]) -> None:  # a second per suggestion
    space = {"ratio.start": {"low": 0.1, "high": 0.6}, "ratio.end": {"low": 0.3, "high": 0.9}}
    s = make_config("gp", space=space, **more)
    assert run(s, 9, restarted=False) == run(s, 9, restarted=True)


def test_another_seed_is_another_search() -> None:
    for name in SAMPLERS:
        assert run(make_config(name), 3, restarted=False) != run(
            make_config(name, seed=1), 3, restarted=False
        )


def test_running_trials_are_seen_and_suggestions_ahead_of_the_store_are_too() -> None:
    s = make_config("grid", space=FINITE)
    study = study_of(s)
    suggester = Suggester(s, study.directions)
    ahead = [suggester.suggest(number) for number in range(15)]  # none of them stored yet
    assert len({str(p.params) for p in ahead if isinstance(p, Suggestion)}) == 15
    assert suggester.suggest(15) is None
    suggester.discard(7)
    assert suggester.suggest(15) == ahead[7]


def test_a_suggestion_that_was_stored_under_another_number_counts_once() -> None:
    s = make_config("grid", space=FINITE)
    study = study_of(s)
    suggester = Suggester(s, study.directions)
    zero, one = suggester.suggest(0), suggester.suggest(1)
    assert isinstance(zero, Suggestion)
    assert isinstance(one, Suggestion)
    for suggestion in (one, zero):
        end(study, store(study, suggestion), 0.5)
    suggester.update(study.get_trials(deepcopy=False))
    rest = [suggester.suggest(2 + i) for i in range(14)]
    assert rest[-1] is None
    assert len({str(p.params) for p in [zero, one, *rest[:-1]]}) == 15  # type: ignore[union-attr]


def test_what_was_made_for_a_number_that_an_enqueued_trial_took_harms_nothing() -> None:
    s = make_config("tpe")
    study = study_of(s)
    suggester = Suggester(s, study.directions)
    for number in range(8):
        made = suggester.suggest(number)  # ahead, and then somebody enqueues
        enqueued = suggester.suggest(number, fixed={"ratio.start": 0.2 + number / 100})
        assert isinstance(enqueued, Suggestion)
        assert enqueued != made
        end(study, store(study, enqueued), score(enqueued.params))
        suggester.update(study.get_trials(deepcopy=False))
        assert suggester.suggest(number) is None
        suggester.discard(number)
    other = Suggester(s, study.directions)
    other.update(study.get_trials(deepcopy=False))
    assert suggester.suggest(8) == other.suggest(8)


@pytest.mark.parametrize("name", ["grid", "random", "tpe", "nsga2", "qmc"])
def test_a_finite_space_is_used_up_after_each_combination_once(name: str) -> None:
    s = make_config(name, space=FINITE)
    study = study_of(s)
    suggester, suggested = Suggester(s, study.directions), []
    while (suggestion := suggester.suggest(len(suggested))) is not None:
        assert isinstance(suggestion, Suggestion)
        suggested.append(str(suggestion.params))
        failed = len(suggested) % 4 == 0 and name == "grid"
        end(
            study, store(study, suggestion), 0.5, TrialState.FAIL if failed else TrialState.COMPLETE
        )
        suggester.update(study.get_trials(deepcopy=False))
        assert len(suggested) <= 15
    assert len(set(suggested)) == 15


def test_what_require_refuses_is_drawn_again() -> None:
    tight = ["ratio.start + 0.5 <= ratio.end"]  # 4 % of the space
    for name in ("random", "tpe", "qmc"):
        proposed = run(make_config(name, require=tight), 12, restarted=False)
        assert all(p["ratio.start"] + 0.5 <= p["ratio.end"] for p in proposed)
    grid = {"ratio.start": {"choices": [0.1, 0.6]}, "ratio.end": {"choices": [0.5, 0.9]}}
    s = make_config("grid", space=grid, require=["ratio.start <= ratio.end"])
    suggester = Suggester(s, ["maximize"])
    assert [isinstance(suggester.suggest(i), Suggestion) for i in range(4)] == [
        True,
        True,
        True,
        False,
    ]
    never = Suggester(make_config("random", require=["ratio.start > 1"]), ["maximize"])
    assert never.suggest(0) is None


def test_settings_that_refuse_each_other_are_drawn_again() -> None:
    space = {"model.width": {"choices": [32]}, "model.heads": {"choices": [2, 3]}}
    suggester = Suggester(make_config("random", space=space), ["maximize"])
    first = suggester.suggest(0)
    assert isinstance(first, Suggestion)
    assert first.params["model.heads"] == 2
    assert suggester.suggest(1) is None


def test_an_enqueued_trial_keeps_its_values_and_the_rest_is_sampled() -> None:
    for name in SAMPLERS:
        suggester = Suggester(make_config(name), ["maximize"])
        suggestion = suggester.suggest(0, fixed={"ratio.shape": "power", "ratio.power": 1.5})
        assert isinstance(suggestion, Suggestion)
        assert suggestion.params["ratio.shape"] == "power"
        assert suggestion.values["ratio.power"] == 1.5
        assert suggestion.params.keys() > {"ratio.shape", "ratio.power"}


def test_an_enqueued_trial_that_was_run_is_a_duplicate_and_one_that_nothing_allows_is_refused() -> (
    None
):
    s = make_config("random", space=FINITE, require=["selection.clusters < 4"])
    study = study_of(s)
    suggester = Suggester(s, study.directions)
    params = {"ratio.shape": "cosine", "selection.clusters": 3}
    suggestion = suggester.suggest(0, fixed=params)
    assert isinstance(suggestion, Suggestion)
    trial_id = store(study, suggestion)
    suggester.update(study.get_trials(deepcopy=False))
    assert isinstance(suggester.suggest(1, fixed=params), Suggestion), (
        "what merely runs may still fail"
    )
    suggester.discard(1)
    end(study, trial_id, 0.4, TrialState.PRUNED)
    suggester.update(study.get_trials(deepcopy=False))
    assert suggester.suggest(1, fixed=params) == Duplicate(0)
    assert isinstance(suggester.suggest(1, fixed={"ratio.shape": "cosine"}), Suggestion)
    with pytest.raises(
        ConfigError,
        match=r"trial 2: what was enqueued \(selection.clusters=4\) leaves no combination",
    ):
        suggester.suggest(2, fixed={"selection.clusters": 4})


def test_the_first_trial_tries_the_defaults_once_and_after_imports_too() -> None:
    space = {
        "ratio.start": {"low": 0.1, "high": 0.6, "default": 0.25},
        "ratio.end": {"low": 0.3, "high": 0.9, "default": 0.75},
    }
    s = make_config("tpe", space=space)
    study = study_of(s)
    imported = Suggester(make_config("random", space=CONDITIONAL), study.directions).suggest(0)
    assert isinstance(imported, Suggestion)
    end(study, store(study, imported, source="import old.csv"), 0.3)
    suggester = Suggester(s, study.directions)
    suggester.update(study.get_trials(deepcopy=False))
    first, second = suggester.suggest(1), suggester.suggest(2)
    assert isinstance(first, Suggestion)
    assert isinstance(second, Suggestion)
    assert first.params == {"ratio.start": 0.25, "ratio.end": 0.75}
    assert second.params != first.params


def test_a_function_and_a_declared_space_give_the_same_suggestions(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def space(trial: optuna.Trial) -> None:
        trial.suggest_float("ratio.start", 0.1, 0.6)
        trial.suggest_float("ratio.end", 0.3, 0.9)
        if trial.suggest_categorical("ratio.shape", ["linear", "cosine", "power"]) == "power":
            trial.suggest_float("ratio.power", 0.5, 3.0, log=True)

    module = ModuleType("a_space")
    module.space = space  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "a_space", module)
    allow_code("a_space:space")
    for name in ("tpe", "cmaes", "qmc", "nsga2", "random"):
        declared = run(make_config(name), 12, restarted=False)
        assert run(make_config(name, space="a_space:space"), 12, restarted=False) == declared


def test_a_wider_range_is_searched_whole() -> None:
    narrow = make_config("tpe", space={"ratio.start": {"low": 0.1, "high": 0.3}})
    wide = make_config("tpe", space={"ratio.start": {"low": 0.1, "high": 0.9}})
    study = study_of(narrow)
    suggester = Suggester(narrow, study.directions)
    for number in range(10):
        suggestion = suggester.suggest(number)
        assert isinstance(suggestion, Suggestion)
        end(study, store(study, suggestion), suggestion.params["ratio.start"])
    suggester = Suggester(wide, study.directions)
    suggester.update(study.get_trials(deepcopy=False))
    more = [suggester.suggest(10 + i) for i in range(10)]
    assert max(p.params["ratio.start"] for p in more if isinstance(p, Suggestion)) > 0.5


def test_limits_turn_a_sampler_away_from_what_breaks_them() -> None:
    def proposed(**more: Any) -> list[float]:
        s = make_config("tpe", space={"ratio.start": {"low": 0.1, "high": 0.9}}, **more)
        study = study_of(s)
        suggester, starts = Suggester(s, study.directions), []
        for number in range(40):
            suggester.update(study.get_trials(deepcopy=False))
            suggestion = suggester.suggest(number)
            assert isinstance(suggestion, Suggestion)
            start = suggestion.params["ratio.start"]
            trial_id = store(study, suggestion)
            study._storage.set_trial_user_attr(trial_id, "stats", {"seconds": 100 * start})
            study._storage.set_trial_state_values(
                trial_id, TrialState.COMPLETE, [start]
            )  # the dearer, the better
            starts.append(start)
        return starts[-20:]

    assert sum(start > 0.5 for start in proposed()) > 15
    assert sum(start > 0.5 for start in proposed(limits={"seconds": 50})) < 10


def test_gp_learns_from_pruned_trials() -> None:
    s = make_config(
        "gp",
        space={"ratio.start": {"low": 0.1, "high": 0.9}, "ratio.end": {"low": 0.3, "high": 0.9}},
    )
    study = study_of(s)
    drawn = Suggester(make_config("random", space=s.space), study.directions)
    for number in range(6):
        suggestion = drawn.suggest(number)
        assert isinstance(suggestion, Suggestion)
        end(study, store(study, suggestion), score(suggestion.params), TrialState.PRUNED)
    suggester = Suggester(s, study.directions)
    suggester.update(study.get_trials(deepcopy=False))
    modeled = suggester.suggest(6)
    assert isinstance(modeled, Suggestion)
    assert modeled != drawn.suggest(6), "after 5 startup trials, six pruned are enough to model"


def test_a_trial_answered_from_the_store_is_no_news() -> None:
    s = make_config("tpe")
    study = study_of(s)
    suggester = Suggester(s, study.directions)
    for number in range(8):
        suggestion = suggester.suggest(number)
        assert isinstance(suggestion, Suggestion)
        end(study, store(study, suggestion), score(suggestion.params))
        suggester.update(study.get_trials(deepcopy=False))
    end(study, store(study, suggestion, copy_of=7), score(suggestion.params))
    suggester.update(study.get_trials(deepcopy=False))
    with_copy = suggester.suggest(9)
    other = Suggester(s, study.directions)
    other.update(study.get_trials(deepcopy=False)[:8])
    assert with_copy == other.suggest(9)


def test_values_of_stored_parameters_are_those_of_the_suggestion() -> None:
    s = make_config("random")
    suggester = Suggester(s, ["maximize"])
    for number in range(5):
        suggestion = suggester.suggest(number)
        assert isinstance(suggestion, Suggestion)
        assert suggester.config_of(suggestion.params) == suggestion.values
