"""The bridge between Tune and Optuna, driven by hand: what Tune calls, in the order it calls it."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState

from amlp_ray.config import StudySettings
from amlp_ray.config.base import build
from amlp_ray.config.yaml_file import write_yaml
from amlp_ray.study.execution.stop_flags import StopBoard
from amlp_ray.study.rungs import first_prunable_epoch, rung_epochs
from amlp_ray.study.storage.study_store import StudyStore
from amlp_ray.study.trial_spec import Task

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


def searcher(
    store: StudyStore,
    board: Any,
    chosen: StudySettings,
    lines: list[str] | None = None,
    *,
    seconds: Callable[[], float] = lambda: 0.0,
    ahead: int = 0,
) -> Any:
    from amlp_ray.study.execution.trial_queue import WorkQueue
    from amlp_ray.study.execution.tune_searcher import StudySearcher

    notify = lines.append if lines is not None else (lambda line: None)
    write_yaml(chosen, store.folder / "study.yaml")
    store.search(create=True, directions=list(chosen.objectives.values()))
    queue = WorkQueue(store, chosen, data="data", labels=None, ahead=ahead, notify=notify)
    return StudySearcher(
        store, chosen, queue, images=IMAGES, board=board, seconds=seconds, notify=notify
    )


def asked(board: Any, config: dict[str, Any]) -> str | None:
    import ray

    return ray.get(board.asked.remote(config["task"]["folder"]))


def run_trial(
    search: Any, tune_id: str, dsc: list[float], board: Any, **facts: Any
) -> dict[str, Any]:
    """Report one DSC per rung until asked to stop, as a trial does."""
    config = search.suggest(tune_id)
    rungs = Task.from_config(config["task"]).rungs
    epoch, value = 0, 0.0
    for epoch, value in zip(rungs, dsc, strict=False):
        search.on_trial_result(
            tune_id, {"epoch": epoch, "epochs": epoch, "dsc": value, "seconds": float(epoch)}
        )
        if asked(board, config):
            break
    ended = {"ended": True, "seconds": float(epoch), "epochs": epoch, "dsc": value}
    search.on_trial_complete(tune_id, ended | facts)
    return config


def test_a_poor_trial_is_asked_to_stop_and_told_as_pruned(store: StudyStore, board: Any) -> None:
    search = searcher(store, board, settings())
    for i in range(2):
        run_trial(search, f"good{i}", [0.4, 0.45, 0.5, 0.5], board)
    config = run_trial(search, "poor", [0.1, 0.1, 0.1, 0.1], board)
    assert asked(board, config)
    trials = store.search().trials
    assert [t.state for t in trials] == [
        TrialState.COMPLETE,
        TrialState.COMPLETE,
        TrialState.PRUNED,
    ]
    assert trials[2].intermediate_values == {10: 0.1, 20: 0.1}
    assert trials[2].value == 0.1
    assert trials[0].user_attrs["facts"] == {
        "seconds": 40.0,
        "gpu_seconds": 0.0,
        "epochs": 40,
        "scores": {"dsc": 0.5},
    }


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
def test_each_pruner_stops_a_hopeless_trial_and_none_does_not(
    store: StudyStore, board: Any, name: str
) -> None:
    chosen = settings(
        pruner={"name": name, "rungs": 4, "min_steps": 400, "startup": 2}, budget={"trials": 9}
    )
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
    search.suggest("c")
    search.on_trial_result("c", {"epoch": 10, "dsc": float("nan")})
    search.on_trial_complete("c", {"ended": True, "epochs": 40, "seconds": 1.0})
    trials = store.search().trials
    assert {t.state for t in trials} == {TrialState.FAIL}
    assert [t.user_attrs["reason"] for t in trials] == [
        "The loss is not finite at epoch 3.",
        "no rung gave a finite DSC",
    ]


def test_a_lost_process_is_no_failure_until_it_was_lost_too_often(
    store: StudyStore, board: Any
) -> None:
    lines: list[str] = []
    search = searcher(store, board, settings(faults={"retries": 2}), lines)
    first = search.suggest("a")
    for tune_id, following in (("a", "b"), ("b", "c")):
        search.on_trial_complete(tune_id, None, error=True)
        assert search.suggest(following)["task"] == first["task"], (
            "same number, from its checkpoint"
        )
    assert store.search().trials[0].state == TrialState.RUNNING
    search.on_trial_complete("c", None, error=True)
    (trial,) = store.search().trials
    assert trial.state == TrialState.FAIL
    assert trial.user_attrs["lost"] == 3
    assert trial.user_attrs["reason"] == "its process died 3 times (faults.retries=2)"
    assert "trial 0 lost its process (1 of 2 retries)" in lines


def test_first_trials_that_fail_alike_end_the_study(store: StudyStore, board: Any) -> None:
    from ray.tune.search import Searcher

    search = searcher(store, board, settings(budget={"trials": 10}, faults={"alike": 3}))
    for i in range(3):
        assert search.ending is None
        search.suggest(f"t{i}")
        search.on_trial_complete(f"t{i}", {"failed": f"No space left at {i}"})
    assert (search.ending, search.ending_reason) == ("alike", "No space left at 2")
    assert search.suggest("more") == Searcher.FINISHED
    assert len(store.search().trials) == 3


def test_one_trial_that_does_not_fail_lets_the_study_go_on(store: StudyStore, board: Any) -> None:
    search = searcher(store, board, settings(budget={"trials": 10}, faults={"alike": 2}))
    run_trial(search, "good", [0.4, 0.45, 0.5, 0.5], board)
    for i in range(4):
        search.suggest(f"t{i}")
        search.on_trial_complete(f"t{i}", {"failed": "x"})
    assert search.ending is None


@pytest.mark.parametrize(
    ("budget", "told"),
    [({"epochs": 60}, "epochs 60 of 60"), ({"gpu_hours": 0.016}, "gpu-hours 0.01667 of 0.016")],
)
def test_a_budget_ends_running_trials_at_their_next_rung(
    store: StudyStore, board: Any, budget: dict[str, float], told: str
) -> None:
    from ray.tune.search import Searcher

    chosen = settings(
        budget={"trials": 9, **budget},
        pruner={"name": "none", "rungs": 4},
        resources={"gpus_per_worker": 1},
    )
    search = searcher(store, board, chosen)
    run_trial(search, "whole", [0.4, 0.45, 0.5, 0.5], board)
    config = search.suggest("cut")
    search.on_trial_result("cut", {"epoch": 10, "epochs": 10, "dsc": 0.4, "seconds": 10.0})
    assert asked(board, config) is None
    search.on_trial_result("cut", {"epoch": 20, "epochs": 20, "dsc": 0.4, "seconds": 20.0})
    assert asked(board, config) == "rung"
    search.on_trial_complete("cut", {"ended": True, "epochs": 20, "seconds": 20.0, "dsc": 0.4})
    assert search.suggest("more") == Searcher.FINISHED
    trial = store.search().trials[1]
    assert (trial.state, trial.value) == (TrialState.PRUNED, 0.4)
    assert trial.user_attrs["reason"] == f"budget: {told}"


def test_hours_are_counted_over_all_runs(store: StudyStore, board: Any) -> None:
    from ray.tune.search import Searcher

    chosen = settings(budget={"trials": 9, "hours": 2})
    assert isinstance(searcher(store, board, chosen, seconds=lambda: 7199.0).suggest("a"), dict)
    other = StudyStore(store.folder.parent / "other")
    other.folder.mkdir()
    assert searcher(other, board, chosen, seconds=lambda: 7200.0).suggest("a") == Searcher.FINISHED


def test_stop_lets_running_trials_finish_and_begins_none(store: StudyStore, board: Any) -> None:
    from ray.tune.search import Searcher

    search = searcher(store, board, settings())
    config = search.suggest("a")
    search.end("stop")
    assert asked(board, config) is None
    assert search.suggest("b") is None, "nothing now: a lost process could come back"
    for epoch in rung_epochs(40, settings().pruner):
        search.on_trial_result("a", {"epoch": epoch, "dsc": 0.4})
    search.on_trial_complete("a", {"ended": True, "epochs": 40, "seconds": 1.0, "dsc": 0.4})
    assert search.suggest("b") == Searcher.FINISHED
    assert [t.state for t in store.search().trials] == [TrialState.COMPLETE]


def test_pause_keeps_running_trials_for_later(store: StudyStore, board: Any) -> None:
    search = searcher(store, board, settings())
    config = search.suggest("a")
    search.on_trial_result("a", {"epoch": 10, "dsc": 0.4})
    search.end("pause")
    assert asked(board, config) == "now"
    search.on_trial_complete("a", {"ended": True, "epochs": 13, "seconds": 1.0, "dsc": 0.4})
    (trial,) = store.search().trials
    assert trial.state == TrialState.RUNNING
    assert searcher(store, board, settings()).suggest("b")["task"] == config["task"]


def test_stop_after_pause_still_keeps_what_was_paused(store: StudyStore, board: Any) -> None:
    search = searcher(store, board, settings())
    search.suggest("a")
    search.end("pause")
    search.end("stop")
    search.on_trial_complete("a", {"ended": True, "epochs": 3, "seconds": 1.0})
    assert [t.state for t in store.search().trials] == [TrialState.RUNNING]


def test_an_interrupted_arm_that_is_named_no_more_fails_and_the_study_goes_on(
    store: StudyStore, board: Any
) -> None:
    searcher(store, board, settings(arms=["mae"], arm_seeds=1)).suggest("a")
    task = Task.from_config(searcher(store, board, settings(arms=[])).suggest("b")["task"])
    assert task.label == "trial 0"
    (arm,) = store.arms().trials
    assert (arm.state, arm.user_attrs["reason"]) == (
        TrialState.FAIL,
        "it was interrupted, and arms does not name mae any more.",
    )


def test_cancel_ends_running_trials_at_once(store: StudyStore, board: Any) -> None:
    search = searcher(store, board, settings())
    search.suggest("a")
    search.end("cancel")
    (trial,) = store.search().trials
    assert (trial.state, trial.user_attrs["reason"]) == (TrialState.FAIL, "cancelled")
    search.on_trial_complete("a", {"ended": True})  # Tune, afterwards
    assert not search.unfinished()


def test_several_objectives_have_a_value_each_and_one_is_compared_at_rungs(
    store: StudyStore, board: Any
) -> None:
    chosen = settings(
        objectives={"dsc": "maximize", "seconds": "minimize"},
        pruner={"name": "median", "rungs": 4, "min_steps": 400, "startup": 2, "metric": "dsc"},
        limits={"memory": 2.0},
    )
    search = searcher(store, board, chosen)
    run_trial(search, "a", [0.4, 0.45, 0.5, 0.5], board, memory=3.0)
    run_trial(search, "b", [0.4, 0.45, 0.5, 0.6], board, memory=1.0)
    run_trial(search, "poor", [0.1] * 4, board)
    trials = store.search().trials
    assert [t.values for t in trials] == [[0.5, 40.0], [0.6, 40.0], None]
    assert [t.state for t in trials] == [
        TrialState.COMPLETE,
        TrialState.COMPLETE,
        TrialState.PRUNED,
    ]
    assert trials[2].intermediate_values == {10: 0.1, 20: 0.1}
    assert [t.system_attrs.get("constraints") for t in trials] == [[1.0], [-1.0], []]


def test_an_enqueued_trial_comes_first_and_a_known_one_is_answered_from_the_store(
    store: StudyStore, board: Any
) -> None:
    from amlp_ray.study.operations.edit import enqueue, retry

    search = searcher(store, board, settings(budget={"trials": 3}))
    run_trial(search, "a", [0.4, 0.45, 0.5, 0.5], board)
    known = store.search().trials[0].params
    enqueue(store, settings(), known)
    enqueue(store, settings(), {"ratio.start": 0.2})
    config = search.suggest("b")
    assert config["task"]["settings"]["ratio"]["start"] == 0.2
    copy, asked_for = store.search().trials[1:]
    assert (copy.state, copy.value, copy.user_attrs["copy_of"]) == (TrialState.COMPLETE, 0.5, 0)
    assert asked_for.number == 2
    retry(store, settings(), 0)
    task = search.suggest("c")["task"]
    assert task["settings"]["ratio"]["start"] == known["ratio.start"]
    assert task["settings"]["seed"] != config["task"]["settings"]["seed"]
    assert store.search().trials[3].user_attrs["retry_of"] == 0


def test_the_budget_counts_every_trial_and_then_the_search_is_finished(
    store: StudyStore, board: Any
) -> None:
    from ray.tune.search import Searcher

    search = searcher(store, board, settings(budget={"trials": 2}))
    search.suggest("a")
    search.on_trial_complete("a", {"failed": "x"})
    run_trial(search, "b", [0.4] * 4, board)
    assert search.suggest("c") == Searcher.FINISHED
    assert len(store.search().trials) == 2
    assert isinstance(
        searcher(store, board, settings(budget={"trials": 3})).suggest("d"), dict
    )  # extended


def test_arms_come_first_share_seeds_and_stay_out_of_the_search(
    store: StudyStore, board: Any
) -> None:
    chosen = settings(
        arms=["scratch", "mae"], arm_seeds=2, pretrain={"epochs": 40, "ratio": {"start": 0.1}}
    )
    search = searcher(store, board, chosen)
    tasks = [Task.from_config(search.suggest(f"t{i}")["task"]) for i in range(5)]
    assert [t.label for t in tasks] == [
        "arm scratch-0",
        "arm mae-0",
        "arm scratch-1",
        "arm mae-1",
        "trial 0",
    ]
    assert tasks[0].settings.objective == "none"
    assert tasks[0].rungs == (0,)
    assert tasks[0].settings.seed == tasks[1].settings.seed != tasks[2].settings.seed
    assert tasks[1].settings.ratio.start == 0.75, (
        "what the study fixes of the method must not change what mae means"
    )
    assert len(store.search().trials) == 1
    assert [t.user_attrs["arm"] for t in store.arms().trials] == [
        "scratch",
        "mae",
        "scratch",
        "mae",
    ]


def test_trials_of_a_dead_driver_are_taken_over_with_number_and_settings(
    store: StudyStore, board: Any
) -> None:
    first = searcher(store, board, settings())
    configs = [first.suggest("a"), first.suggest("b")]
    first.on_trial_result("b", {"epoch": 10, "dsc": 0.3})
    # The driver dies here: nobody tells how the trials ended.
    lines: list[str] = []
    second = searcher(store, board, settings(), lines)
    again = [second.suggest("x"), second.suggest("y")]
    assert [c["task"] for c in again] == [c["task"] for c in configs]
    assert all("continues" in line for line in lines)
    second.on_trial_result(
        "y", {"epoch": 10, "dsc": 0.3}
    )  # reported again from the trial's own file
    second.on_trial_complete("y", {"failed": "x"})
    assert store.search().trials[1].intermediate_values == {10: 0.3}
    assert len(store.search().trials) == 2


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


def test_suggestions_made_ahead_use_up_no_number_and_stay_within_the_budget(
    store: StudyStore, board: Any
) -> None:
    from ray.tune.search import Searcher

    search = searcher(store, board, settings(budget={"trials": 5}), ahead=3)
    begun = [suggested(search, f"t{i}") for i in range(2)]
    assert [Task.from_config(config["task"]).number for config in begun] == [0, 1]
    assert len(store.search().trials) == 2
    for i, reason in enumerate(("one", "two", "three"), 2):  # not alike, which would end the study
        search.on_trial_complete(f"t{i - 2}", {"failed": reason})
        assert isinstance(suggested(search, f"t{i}"), dict)
    assert search.suggest("t5") is None, "the budget is used, but what runs may come back"
    for i in (3, 4):
        search.on_trial_complete(f"t{i}", {"failed": f"{i}"})
    assert search.suggest("t5") == Searcher.FINISHED
    assert [t.number for t in store.search().trials] == list(range(5))


def suggested(search: Any, tune_id: str) -> Any:
    """What Tune runs next, asked for until there is something: ahead of time, a thread makes it."""
    deadline = time.monotonic() + 60
    while (config := search.suggest(tune_id)) is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return config


def test_plain_optuna_reads_the_study(store: StudyStore, board: Any) -> None:
    run_trial(searcher(store, board, settings()), "a", [0.1, 0.2, 0.3, 0.4], board)
    journal = optuna.storages.journal.JournalFileBackend(str(store.folder / "study.journal"))
    study = optuna.load_study(study_name="s", storage=optuna.storages.JournalStorage(journal))
    assert study.best_value == 0.4
    assert study.best_trial.intermediate_values == {10: 0.1, 20: 0.2, 30: 0.3, 40: 0.4}


def test_a_combination_that_a_setting_refuses_is_not_suggested(
    store: StudyStore, board: Any
) -> None:
    space = {
        "model.width": {"choices": [32]},
        "model.heads": {"choices": [2, 3]},
    }  # unchecked: the searcher must cope
    lines: list[str] = []
    search = searcher(store, board, settings(space=space, budget={"trials": 8}), lines)
    from ray.tune.search import Searcher

    run_trial(search, "only", [0.4] * 4, board)
    assert search.suggest("more") == Searcher.FINISHED
    assert [t.params["model.heads"] for t in store.search().trials] == [2]
    assert lines[-1] == "every combination of the search space was tried"
