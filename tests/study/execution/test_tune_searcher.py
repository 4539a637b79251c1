"""The bridge between Tune and Optuna, driven by hand: what Tune calls, in the order it calls it."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState

from amlp_ray.config import StudyConfig
from amlp_ray.config.base import build
from amlp_ray.config.yaml_file import write_yaml
from amlp_ray.study.execution.stop_flags import StopFlags
from amlp_ray.study.execution.stop_reason import StopReason
from amlp_ray.study.rungs import first_prunable_epoch, rung_epochs
from amlp_ray.study.storage.study_store import StudyStore
from amlp_ray.study.trial_spec import TrialSpec

pytestmark = pytest.mark.ray

IMAGES = 320
Messages = Callable[[], list[str]]


def make_config(**changes: Any) -> StudyConfig:
    values: dict[str, Any] = {
        "name": "s",
        "pretrain": {"epochs": 40},
        "space": {"ratio.start": {"low": 0.1, "high": 0.6}, "ratio.end": {"low": 0.3, "high": 0.9}},
        "pruner": {"name": "median", "rungs": 4, "min_steps": 400, "n_startup_trials": 2},
        "budget": {"trials": 4},
        "baselines": [],
    }
    return build(StudyConfig, values | changes, "test")


@pytest.fixture
def stop_flags(ray_session: None) -> Any:
    import ray

    actor = ray.remote(StopFlags).options(num_cpus=0).remote()
    yield actor
    ray.kill(actor)


@pytest.fixture
def messages(caplog: pytest.LogCaptureFixture) -> Messages:
    """Return what was logged so far when it is called."""
    caplog.set_level("INFO", logger="amlp_ray")
    return lambda: caplog.messages


@pytest.fixture
def store(tmp_path: Path) -> StudyStore:
    (tmp_path / "s").mkdir()
    return StudyStore(tmp_path / "s")


def searcher(
    store: StudyStore,
    stop_flags: Any,
    chosen: StudyConfig,
    *,
    seconds: Callable[[], float] = lambda: 0.0,
    suggest_ahead: int = 0,
) -> Any:
    from amlp_ray.study.execution.trial_queue import TrialQueue
    from amlp_ray.study.execution.tune_searcher import StudySearcher

    write_yaml(chosen, store.folder / "study.yaml")
    store.search(create=True)
    queue = TrialQueue(store, chosen, data="data", eval_data=None, suggest_ahead=suggest_ahead)
    return StudySearcher(
        store, chosen, queue, images=IMAGES, stop_flags=stop_flags, seconds=seconds
    )


def stop_request(stop_flags: Any, config: dict[str, Any]) -> str | None:
    import ray

    return ray.get(stop_flags.requested.remote(config["trial_spec"]["run"]["folder"]))


def run_trial(
    search: Any, tune_id: str, dsc: list[float], stop_flags: Any, **fields: Any
) -> dict[str, Any]:
    """Report one DSC per rung until asked to stop, as a trial does."""
    config = search.suggest(tune_id)
    rungs = TrialSpec.model_validate(config["trial_spec"]).run.rungs
    epoch, value = 0, 0.0
    for epoch, value in zip(rungs, dsc, strict=False):
        search.on_trial_result(
            tune_id, {"epoch": epoch, "epochs": epoch, "dsc": value, "seconds": float(epoch)}
        )
        if stop_request(stop_flags, config):
            break
    ended = {"ended": True, "seconds": float(epoch), "epochs": epoch, "dsc": value}
    search.on_trial_complete(tune_id, ended | fields)
    return config


def test_a_poor_trial_is_asked_to_stop_and_told_as_pruned(
    store: StudyStore, stop_flags: Any
) -> None:
    search = searcher(store, stop_flags, make_config())
    for i in range(2):
        run_trial(search, f"good{i}", [0.4, 0.45, 0.5, 0.5], stop_flags)
    config = run_trial(search, "poor", [0.1, 0.1, 0.1, 0.1], stop_flags)
    assert stop_request(stop_flags, config)
    trials = store.search().trials
    assert [t.state for t in trials] == [
        TrialState.COMPLETE,
        TrialState.COMPLETE,
        TrialState.PRUNED,
    ]
    assert trials[2].intermediate_values == {10: 0.1, 20: 0.1}
    assert trials[2].value == 0.1
    assert trials[0].user_attrs["stats"] == {
        "seconds": 40.0,
        "gpu_seconds": 0.0,
        "epochs": 40,
        "scores": {"dsc": 0.5},
    }


def test_nothing_is_pruned_before_the_least_steps(store: StudyStore, stop_flags: Any) -> None:
    assert first_prunable_epoch(make_config().trial({}, seed=0), make_config().pruner, IMAGES) == 20
    search = searcher(store, stop_flags, make_config())
    for i in range(2):
        run_trial(search, f"good{i}", [0.4, 0.45, 0.5, 0.5], stop_flags)
    config = search.suggest("poor")
    search.on_trial_result("poor", {"epoch": 10, "dsc": 0.0})
    assert not stop_request(stop_flags, config)
    search.on_trial_result("poor", {"epoch": 20, "dsc": 0.0})
    assert stop_request(stop_flags, config)


@pytest.mark.parametrize("name", ["median", "percentile", "halving"])
def test_each_pruner_stops_a_hopeless_trial_and_none_does_not(
    store: StudyStore, stop_flags: Any, name: str
) -> None:
    chosen = make_config(
        pruner={"name": name, "rungs": 4, "min_steps": 400, "n_startup_trials": 2},
        budget={"trials": 9},
    )
    search = searcher(store, stop_flags, chosen)
    for i in range(5):
        run_trial(search, f"good{i}", [0.4, 0.45, 0.5, 0.5 + i / 100], stop_flags)
    run_trial(search, "poor", [0.0, 0.0, 0.0, 0.0], stop_flags)
    assert store.search().trials[-1].state == TrialState.PRUNED
    patient = StudyStore(store.folder.parent / "patient")
    patient.folder.mkdir()
    search = searcher(patient, stop_flags, make_config(pruner={"name": "none"}))
    for i in range(3):
        run_trial(search, f"any{i}", [0.5 - i / 5] * 4, stop_flags)
    assert {t.state for t in patient.search().trials} == {TrialState.COMPLETE}


def test_a_failure_is_told_with_its_reason(store: StudyStore, stop_flags: Any) -> None:
    search = searcher(store, stop_flags, make_config())
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
    store: StudyStore, stop_flags: Any, messages: Messages
) -> None:
    search = searcher(store, stop_flags, make_config(fault_tolerance={"max_failures": 2}))
    first = search.suggest("a")
    for tune_id, following in (("a", "b"), ("b", "c")):
        search.on_trial_complete(tune_id, None, error=True)
        assert search.suggest(following)["trial_spec"] == first["trial_spec"], (
            "same number, from its checkpoint"
        )
    assert store.search().trials[0].state == TrialState.RUNNING
    search.on_trial_complete("c", None, error=True)
    (trial,) = store.search().trials
    assert trial.state == TrialState.FAIL
    assert trial.user_attrs["lost"] == 3
    assert trial.user_attrs["reason"] == "its process died 3 times (fault_tolerance.max_failures=2)"
    assert "trial 0 lost its process (1 of 2 retries)" in messages()


def test_first_trials_that_fail_alike_end_the_study(store: StudyStore, stop_flags: Any) -> None:
    from ray.tune.search import Searcher

    search = searcher(
        store,
        stop_flags,
        make_config(budget={"trials": 10}, fault_tolerance={"max_identical_failures": 3}),
    )
    for i in range(3):
        assert search.stop_reason is None
        search.suggest(f"t{i}")
        search.on_trial_complete(f"t{i}", {"failed": f"No space left at {i}"})
    assert (search.stop_reason, search.stop_details) == (
        StopReason.IDENTICAL_FAILURES,
        "No space left at 2",
    )
    assert search.suggest("more") == Searcher.FINISHED
    assert len(store.search().trials) == 3


def test_one_trial_that_does_not_fail_lets_the_study_go_on(
    store: StudyStore, stop_flags: Any
) -> None:
    search = searcher(
        store,
        stop_flags,
        make_config(budget={"trials": 10}, fault_tolerance={"max_identical_failures": 2}),
    )
    run_trial(search, "good", [0.4, 0.45, 0.5, 0.5], stop_flags)
    for i in range(4):
        search.suggest(f"t{i}")
        search.on_trial_complete(f"t{i}", {"failed": "x"})
    assert search.stop_reason is None


@pytest.mark.parametrize(
    ("budget", "message"),
    [({"epochs": 60}, "epochs 60 of 60"), ({"gpu_hours": 0.016}, "gpu-hours 0.01667 of 0.016")],
)
def test_a_budget_ends_running_trials_at_their_next_rung(
    store: StudyStore, stop_flags: Any, budget: dict[str, float], message: str
) -> None:
    from ray.tune.search import Searcher

    chosen = make_config(
        budget={"trials": 9, **budget},
        pruner={"name": "none", "rungs": 4},
        resources={"gpus_per_worker": 1},
    )
    search = searcher(store, stop_flags, chosen)
    run_trial(search, "whole", [0.4, 0.45, 0.5, 0.5], stop_flags)
    config = search.suggest("cut")
    search.on_trial_result("cut", {"epoch": 10, "epochs": 10, "dsc": 0.4, "seconds": 10.0})
    assert stop_request(stop_flags, config) is None
    search.on_trial_result("cut", {"epoch": 20, "epochs": 20, "dsc": 0.4, "seconds": 20.0})
    assert stop_request(stop_flags, config) == "rung"
    search.on_trial_complete("cut", {"ended": True, "epochs": 20, "seconds": 20.0, "dsc": 0.4})
    assert search.suggest("more") == Searcher.FINISHED
    trial = store.search().trials[1]
    assert (trial.state, trial.value) == (TrialState.PRUNED, 0.4)
    assert trial.user_attrs["reason"] == f"budget: {message}"


def test_hours_are_counted_over_all_runs(store: StudyStore, stop_flags: Any) -> None:
    from ray.tune.search import Searcher

    chosen = make_config(budget={"trials": 9, "hours": 2})
    assert isinstance(
        searcher(store, stop_flags, chosen, seconds=lambda: 7199.0).suggest("a"), dict
    )
    other = StudyStore(store.folder.parent / "other")
    other.folder.mkdir()
    assert (
        searcher(other, stop_flags, chosen, seconds=lambda: 7200.0).suggest("a")
        == Searcher.FINISHED
    )


def test_stop_lets_running_trials_finish_and_begins_none(
    store: StudyStore, stop_flags: Any
) -> None:
    from ray.tune.search import Searcher

    search = searcher(store, stop_flags, make_config())
    config = search.suggest("a")
    search.stop(StopReason.STOP)
    assert stop_request(stop_flags, config) is None
    assert search.suggest("b") is None, "nothing now: a lost process could come back"
    for epoch in rung_epochs(40, make_config().pruner):
        search.on_trial_result("a", {"epoch": epoch, "dsc": 0.4})
    search.on_trial_complete("a", {"ended": True, "epochs": 40, "seconds": 1.0, "dsc": 0.4})
    assert search.suggest("b") == Searcher.FINISHED
    assert [t.state for t in store.search().trials] == [TrialState.COMPLETE]


def test_pause_keeps_running_trials_for_later(store: StudyStore, stop_flags: Any) -> None:
    search = searcher(store, stop_flags, make_config())
    config = search.suggest("a")
    search.on_trial_result("a", {"epoch": 10, "dsc": 0.4})
    search.stop(StopReason.PAUSE)
    assert stop_request(stop_flags, config) == "now"
    search.on_trial_complete("a", {"ended": True, "epochs": 13, "seconds": 1.0, "dsc": 0.4})
    (trial,) = store.search().trials
    assert trial.state == TrialState.RUNNING
    assert (
        searcher(store, stop_flags, make_config()).suggest("b")["trial_spec"]
        == config["trial_spec"]
    )


def test_stop_after_pause_still_keeps_what_was_paused(store: StudyStore, stop_flags: Any) -> None:
    search = searcher(store, stop_flags, make_config())
    search.suggest("a")
    search.stop(StopReason.PAUSE)
    search.stop(StopReason.STOP)
    search.on_trial_complete("a", {"ended": True, "epochs": 3, "seconds": 1.0})
    assert [t.state for t in store.search().trials] == [TrialState.RUNNING]


def test_an_interrupted_baseline_that_is_named_no_more_fails_and_the_study_goes_on(
    store: StudyStore, stop_flags: Any
) -> None:
    searcher(store, stop_flags, make_config(baselines=["mae"], baseline_seeds=1)).suggest("a")
    trial_spec = TrialSpec.model_validate(
        searcher(store, stop_flags, make_config(baselines=[])).suggest("b")["trial_spec"]
    )
    assert trial_spec.run.label == "trial 0"
    (baseline,) = store.baselines().trials
    assert (baseline.state, baseline.user_attrs["reason"]) == (
        TrialState.FAIL,
        "it was interrupted, and baselines does not name mae any more.",
    )


def test_cancel_ends_running_trials_at_once(store: StudyStore, stop_flags: Any) -> None:
    search = searcher(store, stop_flags, make_config())
    config = search.suggest("a")
    search.suggest("waits")
    search.mark_started([config["trial_spec"]["run"]["folder"]])
    search.stop(StopReason.CANCEL)
    trial, waiting = store.search().trials
    assert (trial.state, trial.user_attrs["reason"]) == (TrialState.FAIL, "cancelled")
    assert waiting.state == TrialState.RUNNING, "what never ran is not lost"
    search.on_trial_complete("a", {"ended": True})  # Tune, afterwards
    search.on_trial_complete("waits")
    assert not search.has_finished


def test_a_trial_that_waits_for_resources_neither_runs_nor_uses_budget(
    store: StudyStore, stop_flags: Any
) -> None:
    from amlp_ray.study.operations.status import status

    search = searcher(store, stop_flags, make_config(budget={"trials": 2}))
    folders = [search.suggest(name)["trial_spec"]["run"]["folder"] for name in ("a", "b")]
    assert search.suggest("more") is None, "both are taken from the budget when they start"

    def shown() -> tuple[dict[str, int], float]:
        with store.lock():
            facts = status(StudyStore(store.folder))
        return facts["states"], facts["budget"]["trials"]["used"]

    assert shown() == ({"WAITING": 2}, 0)
    assert all(seconds > 0 for seconds in search.waiting_times())
    search.mark_started(folders[:1])
    assert shown() == ({"RUNNING": 1, "WAITING": 1}, 1)
    assert [seconds > 0 for seconds in search.waiting_times()] == [False, True]
    search.on_trial_complete("a", error=True)  # its process died
    search.suggest("again")
    assert shown() == ({"WAITING": 2}, 1), "it has begun, and waits once more"
    search.on_trial_complete("b", error=True)
    assert store.search().trials[1].user_attrs["lost"] == 1


def test_a_full_disk_pauses_the_study_and_fails_no_trial(
    store: StudyStore, stop_flags: Any, messages: Messages, monkeypatch: pytest.MonkeyPatch
) -> None:
    from amlp_ray.study.execution import storage_pause

    monkeypatch.setattr(storage_pause, "FIRST_PAUSE_S", 0.3)
    settings = {"max_identical_failures": 1}
    search = searcher(store, stop_flags, make_config(fault_tolerance=settings))
    config = search.suggest("a")
    reason = f"Could not write the checkpoint of epoch 3 to {store.trial_folder(0)} for 1 minutes."
    search.on_trial_complete("a", {"failed": reason, "storage": True})
    assert search.suggest("b") is None
    assert messages()[-1].startswith(f"the study is paused: trial 0: {reason.rstrip('.')}. ")
    time.sleep(0.3)
    assert search.suggest("c")["trial_spec"] == config["trial_spec"]
    assert [t.state for t in store.search().trials] == [TrialState.RUNNING]
    assert search.stop_reason is None


def test_the_first_cause_is_kept_of_whichever_kind(
    store: StudyStore, stop_flags: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    search = searcher(store, stop_flags, make_config())

    def fail(has_room: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(search._queue, "next", fail)
    with pytest.raises(ZeroDivisionError):
        search.suggest("a")
    search.record_failure(RuntimeError("what Tune makes of it"))
    assert isinstance(search.failure, ZeroDivisionError)


def test_several_objectives_have_a_value_each_and_one_is_compared_at_rungs(
    store: StudyStore, stop_flags: Any
) -> None:
    chosen = make_config(
        objectives={"dsc": "maximize", "seconds": "minimize"},
        pruner={
            "name": "median",
            "rungs": 4,
            "min_steps": 400,
            "n_startup_trials": 2,
            "metric": "dsc",
        },
        limits={"memory": 2.0},
    )
    search = searcher(store, stop_flags, chosen)
    run_trial(search, "a", [0.4, 0.45, 0.5, 0.5], stop_flags, memory=3.0)
    run_trial(search, "b", [0.4, 0.45, 0.5, 0.6], stop_flags, memory=1.0)
    run_trial(search, "poor", [0.1] * 4, stop_flags)
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
    store: StudyStore, stop_flags: Any
) -> None:
    from amlp_ray.study.operations.edit import enqueue, retry

    search = searcher(store, stop_flags, make_config(budget={"trials": 3}))
    run_trial(search, "a", [0.4, 0.45, 0.5, 0.5], stop_flags)
    params = store.search().trials[0].params
    enqueue(store, make_config(), params)
    enqueue(store, make_config(), {"ratio.start": 0.2})
    config = search.suggest("b")
    assert config["trial_spec"]["run"]["config"]["ratio"]["start"] == 0.2
    copy, asked_for = store.search().trials[1:]
    assert (copy.state, copy.value, copy.user_attrs["copy_of"]) == (TrialState.COMPLETE, 0.5, 0)
    assert asked_for.number == 2
    retry(store, make_config(), 0)
    trial_spec = search.suggest("c")["trial_spec"]
    assert trial_spec["run"]["config"]["ratio"]["start"] == params["ratio.start"]
    assert trial_spec["run"]["config"]["seed"] != config["trial_spec"]["run"]["config"]["seed"]
    assert store.search().trials[3].user_attrs["retry_of"] == 0


def test_the_budget_counts_every_trial_and_then_the_search_is_finished(
    store: StudyStore, stop_flags: Any
) -> None:
    from ray.tune.search import Searcher

    search = searcher(store, stop_flags, make_config(budget={"trials": 2}))
    search.suggest("a")
    search.on_trial_complete("a", {"failed": "x"})
    run_trial(search, "b", [0.4] * 4, stop_flags)
    assert search.suggest("c") == Searcher.FINISHED
    assert len(store.search().trials) == 2
    assert isinstance(
        searcher(store, stop_flags, make_config(budget={"trials": 3})).suggest("d"), dict
    )  # extended


def test_baselines_come_first_share_seeds_and_stay_out_of_the_search(
    store: StudyStore, stop_flags: Any
) -> None:
    chosen = make_config(
        baselines=["scratch", "mae"],
        baseline_seeds=2,
        pretrain={"epochs": 40, "ratio": {"start": 0.1}},
    )
    search = searcher(store, stop_flags, chosen)
    tasks = [TrialSpec.model_validate(search.suggest(f"t{i}")["trial_spec"]) for i in range(5)]
    assert [t.run.label for t in tasks] == [
        "baseline scratch-0",
        "baseline mae-0",
        "baseline scratch-1",
        "baseline mae-1",
        "trial 0",
    ]
    assert tasks[0].run.config.objective == "none"
    assert tasks[0].run.rungs == (0,)
    assert tasks[0].run.config.seed == tasks[1].run.config.seed != tasks[2].run.config.seed
    assert tasks[1].run.config.ratio.start == 0.75, (
        "what the study fixes of the method must not change what mae means"
    )
    assert len(store.search().trials) == 1
    assert [t.user_attrs["baseline"] for t in store.baselines().trials] == [
        "scratch",
        "mae",
        "scratch",
        "mae",
    ]


def test_trials_of_a_dead_driver_are_taken_over_with_number_and_settings(
    store: StudyStore, stop_flags: Any, messages: Messages
) -> None:
    first = searcher(store, stop_flags, make_config())
    configs = [first.suggest("a"), first.suggest("b")]
    first.on_trial_result("b", {"epoch": 10, "dsc": 0.3})
    # The driver dies here: nobody tells how the trials ended.
    before = len(messages())
    second = searcher(store, stop_flags, make_config())
    again = [second.suggest("x"), second.suggest("y")]
    assert [c["trial_spec"] for c in again] == [c["trial_spec"] for c in configs]
    assert all("continues" in message for message in messages()[before:])
    second.on_trial_result(
        "y", {"epoch": 10, "dsc": 0.3}
    )  # reported again from the trial's own file
    second.on_trial_complete("y", {"failed": "x"})
    assert store.search().trials[1].intermediate_values == {10: 0.3}
    assert len(store.search().trials) == 2


def test_a_restarted_sampler_goes_on_as_an_uninterrupted_one(
    store: StudyStore, stop_flags: Any
) -> None:
    chosen = make_config(budget={"trials": 8}, sampler={"name": "tpe", "n_startup_trials": 3})
    dsc = [0.3, 0.4, 0.35, 0.5, 0.45, 0.42, 0.47, 0.41]
    search = searcher(store, stop_flags, chosen)
    for i, value in enumerate(dsc):
        run_trial(search, f"t{i}", [value] * 4, stop_flags)
    other = StudyStore(store.folder.parent / "restarted")
    other.folder.mkdir()
    for i, value in enumerate(dsc):  # a new driver for every trial
        run_trial(searcher(other, stop_flags, chosen), f"t{i}", [value] * 4, stop_flags)
    params = [t.params for t in store.search().trials]
    assert [t.params for t in other.search().trials] == params
    assert len({tuple(p.values()) for p in params}) == 8, "no setting is repeated"


def test_suggestions_made_ahead_use_up_no_number_and_stay_within_the_budget(
    store: StudyStore, stop_flags: Any
) -> None:
    from ray.tune.search import Searcher

    search = searcher(store, stop_flags, make_config(budget={"trials": 5}), suggest_ahead=3)
    begun = [suggested(search, f"t{i}") for i in range(2)]
    assert [TrialSpec.model_validate(config["trial_spec"]).number for config in begun] == [0, 1]
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


def test_plain_optuna_reads_the_study(store: StudyStore, stop_flags: Any) -> None:
    run_trial(searcher(store, stop_flags, make_config()), "a", [0.1, 0.2, 0.3, 0.4], stop_flags)
    journal = optuna.storages.journal.JournalFileBackend(str(store.folder / "study.journal"))
    study = optuna.load_study(study_name="s", storage=optuna.storages.JournalStorage(journal))
    assert study.best_value == 0.4
    assert study.best_trial.intermediate_values == {10: 0.1, 20: 0.2, 30: 0.3, 40: 0.4}


def test_a_combination_that_a_setting_refuses_is_not_suggested(
    store: StudyStore, stop_flags: Any, messages: Messages
) -> None:
    space = {
        "model.width": {"choices": [32]},
        "model.heads": {"choices": [2, 3]},
    }  # unchecked: the searcher must cope
    search = searcher(store, stop_flags, make_config(space=space, budget={"trials": 8}))
    from ray.tune.search import Searcher

    run_trial(search, "only", [0.4] * 4, stop_flags)
    assert search.suggest("more") == Searcher.FINISHED
    assert [t.params["model.heads"] for t in store.search().trials] == [2]
    assert messages()[-1] == "every combination of the search space was tried"
