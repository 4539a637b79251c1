"""The bridge between Tune and Optuna, driven by hand: what Tune calls, in the order it calls it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState

from amlp_ray.config import StudySettings
from amlp_ray.settings import build
from amlp_ray.study.design import derived_seed, first_prunable_epoch, rung_epochs
from amlp_ray.study.store import StudyStore
from amlp_ray.study.trial import StopBoard, Task

pytestmark = pytest.mark.ray

IMAGES = 320


def settings(**changes: Any) -> StudySettings:
    values: dict[str, Any] = {
        "name": "s",
        "pretrain": {"epochs": 40},
        "space": {"ratio.start": {"low": 0.1, "high": 0.6}, "ratio.end": {"low": 0.3, "high": 0.9}},
        "pruner": {"name": "median", "rungs": 4, "min_steps": 400, "startup": 2},
        "budget": {"trials": 4},
        "arms": [],
    }
    return build(StudySettings, values | changes, "test")


@pytest.fixture
def board(ray_session: None) -> Any:
    import ray

    actor = ray.remote(StopBoard).options(num_cpus=0).remote()
    yield actor
    ray.kill(actor)


@pytest.fixture
def store(tmp_path: Path) -> StudyStore:
    (tmp_path / "s").mkdir()
    return StudyStore(tmp_path / "s")


def searcher(store: StudyStore, board: Any, chosen: StudySettings, lines: list[str] | None = None) -> Any:
    from amlp_ray.study.searcher import StudySearcher

    notify = lines.append if lines is not None else (lambda line: None)
    return StudySearcher(store, chosen, data="data", images=IMAGES, board=board, notify=notify)


def asked(board: Any, config: dict[str, Any]) -> bool:
    import ray

    return bool(ray.get(board.asked.remote(config["task"]["folder"])))


def run_trial(search: Any, tune_id: str, dsc: list[float], board: Any) -> dict[str, Any]:
    """Report one DSC per rung until asked to stop, as a trial does."""
    config = search.suggest(tune_id)
    epoch = 0
    for epoch, value in zip(rung_epochs(40, 4), dsc, strict=False):
        search.on_trial_result(tune_id, {"epoch": epoch, "dsc": value})
        if asked(board, config):
            break
    search.on_trial_complete(tune_id, {"ended": True, "seconds": 1.0, "epochs": epoch})
    return config


def test_a_poor_trial_is_asked_to_stop_and_told_as_pruned(store: StudyStore, board: Any) -> None:
    search = searcher(store, board, settings())
    for i in range(2):
        run_trial(search, f"good{i}", [0.4, 0.45, 0.5, 0.5], board)
    config = run_trial(search, "poor", [0.1, 0.1, 0.1, 0.1], board)
    assert asked(board, config)
    trials = store.search().trials
    assert [t.state for t in trials] == [TrialState.COMPLETE, TrialState.COMPLETE, TrialState.PRUNED]
    assert trials[2].intermediate_values == {10: 0.1, 20: 0.1}
    assert trials[2].value == 0.1
    assert trials[0].user_attrs["path"] == "trials/0"
    assert trials[0].user_attrs["tune_trial_id"] == "good0"


def test_nothing_is_pruned_before_the_least_steps(store: StudyStore, board: Any) -> None:
    assert first_prunable_epoch(settings().trial({}, seed=0), settings().pruner, IMAGES) == 20
    search = searcher(store, board, settings())
    for i in range(2):
        run_trial(search, f"good{i}", [0.4, 0.45, 0.5, 0.5], board)
    config = search.suggest("poor")
    search.on_trial_result("poor", {"epoch": 10, "dsc": 0.0})
    assert not asked(board, config)
    search.on_trial_result("poor", {"epoch": 20, "dsc": 0.0})
    assert asked(board, config)


@pytest.mark.parametrize("name", ["median", "percentile", "halving"])
def test_each_pruner_stops_a_hopeless_trial_and_none_does_not(store: StudyStore, board: Any, name: str) -> None:
    chosen = settings(pruner={"name": name, "rungs": 4, "min_steps": 400, "startup": 2}, budget={"trials": 9})
    search = searcher(store, board, chosen)
    for i in range(5):
        run_trial(search, f"good{i}", [0.4, 0.45, 0.5, 0.5 + i / 100], board)
    run_trial(search, "poor", [0.0, 0.0, 0.0, 0.0], board)
    assert store.search().trials[-1].state == TrialState.PRUNED
    patient = StudyStore(store.folder.parent / "patient")
    patient.folder.mkdir()
    search = searcher(patient, board, settings(pruner={"name": "none"}))
    for i in range(3):
        run_trial(search, f"any{i}", [0.5 - i / 5] * 4, board)
    assert {t.state for t in patient.search().trials} == {TrialState.COMPLETE}


def test_a_failure_is_told_with_its_reason(store: StudyStore, board: Any) -> None:
    search = searcher(store, board, settings())
    search.suggest("a")
    search.on_trial_complete("a", {"failed": "The loss is not finite at epoch 3.", "seconds": 1.0})
    search.suggest("b")
    search.on_trial_complete("b", None, error=True)
    search.suggest("c")
    search.on_trial_result("c", {"epoch": 10, "dsc": float("nan")})
    search.on_trial_complete("c", {"ended": True, "epochs": 40, "seconds": 1.0})
    trials = store.search().trials
    assert {t.state for t in trials} == {TrialState.FAIL}
    assert [t.user_attrs["reason"] for t in trials] == [
        "The loss is not finite at epoch 3.",
        "the trial's process died",
        "no rung gave a finite DSC",
    ]


def test_the_budget_counts_every_trial_and_then_the_search_is_finished(store: StudyStore, board: Any) -> None:
    from ray.tune.search import Searcher

    search = searcher(store, board, settings(budget={"trials": 2}))
    search.suggest("a")
    search.on_trial_complete("a", {"failed": "x"})
    run_trial(search, "b", [0.4] * 4, board)
    assert search.suggest("c") == Searcher.FINISHED
    assert len(store.search().trials) == 2
    assert isinstance(searcher(store, board, settings(budget={"trials": 3})).suggest("d"), dict)  # extended


def test_arms_come_first_share_seeds_and_stay_out_of_the_search(store: StudyStore, board: Any) -> None:
    chosen = settings(arms=["scratch", "mae"], arm_seeds=2, pretrain={"epochs": 40, "ratio": {"start": 0.1}})
    search = searcher(store, board, chosen)
    tasks = [Task.from_config(search.suggest(f"t{i}")["task"]) for i in range(5)]
    assert [t.label for t in tasks] == ["arm scratch-0", "arm mae-0", "arm scratch-1", "arm mae-1", "trial 0"]
    assert tasks[0].settings.objective == "none"
    assert tasks[0].rungs == (0,)
    assert tasks[0].settings.seed == tasks[1].settings.seed != tasks[2].settings.seed
    assert tasks[1].settings.ratio.start == 0.75, "what the study fixes of the method must not change what mae means"
    assert len(store.search().trials) == 1
    assert [t.user_attrs["arm"] for t in store.arms().trials] == ["scratch", "mae", "scratch", "mae"]


def test_trials_of_a_dead_driver_are_taken_over_with_number_and_settings(store: StudyStore, board: Any) -> None:
    first = searcher(store, board, settings())
    configs = [first.suggest("a"), first.suggest("b")]
    first.on_trial_result("b", {"epoch": 10, "dsc": 0.3})
    # The driver dies here: nobody tells how the trials ended.
    lines: list[str] = []
    second = searcher(store, board, settings(), lines)
    again = [second.suggest("x"), second.suggest("y")]
    assert [c["task"] for c in again] == [c["task"] for c in configs]
    assert all("continues" in line for line in lines)
    second.on_trial_result("y", {"epoch": 10, "dsc": 0.3})  # reported again from the trial's own file
    second.on_trial_complete("y", {"failed": "x"})
    assert store.search().trials[1].intermediate_values == {10: 0.3}
    assert len(store.search().trials) == 2


def test_a_trial_killed_before_its_settings_were_asked_gets_those_it_would_have_had(
    store: StudyStore, board: Any
) -> None:
    whole = searcher(store, board, settings()).suggest("a")["task"]
    other = StudyStore(store.folder.parent / "other")
    other.folder.mkdir()
    from amlp_ray.study.searcher import make_sampler

    chosen = settings()
    half = other.search(create=True)
    half.sampler = make_sampler(chosen.sampler, derived_seed(chosen.seed, "sampler", 0))
    half.ask()  # and killed before suggest_float
    taken = searcher(other, board, chosen).suggest("b")["task"]
    assert taken["settings"] == whole["settings"]


def test_a_restarted_sampler_goes_on_as_an_uninterrupted_one(store: StudyStore, board: Any) -> None:
    chosen = settings(budget={"trials": 8}, sampler={"name": "tpe", "startup": 3})
    dsc = [0.3, 0.4, 0.35, 0.5, 0.45, 0.42, 0.47, 0.41]
    search = searcher(store, board, chosen)
    for i, value in enumerate(dsc):
        run_trial(search, f"t{i}", [value] * 4, board)
    other = StudyStore(store.folder.parent / "restarted")
    other.folder.mkdir()
    for i, value in enumerate(dsc):  # a new driver for every trial
        run_trial(searcher(other, board, chosen), f"t{i}", [value] * 4, board)
    params = [t.params for t in store.search().trials]
    assert [t.params for t in other.search().trials] == params
    assert len({tuple(p.values()) for p in params}) == 8, "no setting is repeated"


@pytest.mark.parametrize("name", ["tpe", "random", "gp", "qmc"])
def test_each_sampler_proposes_within_the_space(store: StudyStore, board: Any, name: str) -> None:
    search = searcher(store, board, settings(sampler={"name": name, "startup": 2}))
    for i in range(4):
        run_trial(search, f"t{i}", [0.3 + i / 100] * 4, board)
    assert all(0.1 <= t.params["ratio.start"] <= 0.6 for t in store.search().trials)


def test_plain_optuna_reads_the_study(store: StudyStore, board: Any) -> None:
    run_trial(searcher(store, board, settings()), "a", [0.1, 0.2, 0.3, 0.4], board)
    journal = optuna.storages.journal.JournalFileBackend(str(store.folder / "study.journal"))
    study = optuna.load_study(study_name="s", storage=optuna.storages.JournalStorage(journal))
    assert study.best_value == 0.4
    assert study.best_trial.intermediate_values == {10: 0.1, 20: 0.2, 30: 0.3, 40: 0.4}


def test_a_combination_that_a_setting_refuses_fails_alone(store: StudyStore, board: Any) -> None:
    space = {"model.width": {"choices": [32]}, "model.heads": {"choices": [2, 3]}}  # unchecked: the searcher must cope
    lines: list[str] = []
    search = searcher(store, board, settings(space=space, budget={"trials": 8}), lines)
    from ray.tune.search import Searcher

    while search.suggest(f"t{len(lines)}") != Searcher.FINISHED:
        pass
    states = {t.params["model.heads"]: t.state for t in store.search().trials}
    assert states == {2: TrialState.RUNNING, 3: TrialState.FAIL}
    failed = next(t for t in store.search().trials if t.state == TrialState.FAIL)
    assert "multiple of heads 3" in failed.user_attrs["reason"]
