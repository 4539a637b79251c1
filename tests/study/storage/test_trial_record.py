"""What a stored trial says of itself, and how the store writes one."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from helpers.studies import make_store
from optuna.distributions import FloatDistribution
from optuna.trial import TrialState, create_trial

from amlp_ray.config import StudyConfig
from amlp_ray.config.base import build
from amlp_ray.study.storage.study_store import StudyStore
from amlp_ray.study.storage.trial_record import TrialRecord, trial_records

RATIO = FloatDistribution(0.2, 0.5)


def record(state: str = "COMPLETE", **stored: Any) -> TrialRecord:
    if state == "COMPLETE" and "value" not in stored and "values" not in stored:
        stored["value"] = 0.5
    return TrialRecord.from_frozen(create_trial(state=TrialState[state], **stored))


@pytest.fixture
def store(tmp_path: Path) -> StudyStore:
    return make_store(tmp_path)


@pytest.mark.parametrize(
    ("trial", "value"),
    [
        (record(value=0.4, intermediate_values={2: 0.3}), 0.4),
        (record("PRUNED", intermediate_values={2: 0.3, 4: 0.2}), 0.2),
        (record("PRUNED", value=0.7, intermediate_values={2: 0.3}), 0.7),
        (record("PRUNED"), None),
        (record("FAIL", intermediate_values={2: 0.3}), None),
        (record("RUNNING", intermediate_values={2: 0.3}), None),
        (record("PRUNED", value=math.inf), None),
        (record(values=[0.4, 9.0], intermediate_values={2: 0.3}), 0.3),
    ],
)
def test_a_trial_is_ranked_by_its_value_or_its_last_rung(
    trial: TrialRecord, value: float | None
) -> None:
    assert trial.value == value


def test_objectives_are_named_and_a_baseline_has_the_metric_alone() -> None:
    objectives = {"dsc": "maximize", "seconds": "minimize"}
    two = build(
        StudyConfig, {"name": "s", "objectives": objectives, "pruner": {"name": "none"}}, "s"
    )
    assert record(values=[0.4, 9.0]).objective_values(two) == {"dsc": 0.4, "seconds": 9.0}
    assert record(value=0.4).objective_values(two) == {"dsc": 0.4}
    assert record("PRUNED", value=0.4).objective_values(two) == {}


def test_a_baseline_s_value_is_of_the_metric_where_that_is_no_objective() -> None:
    values = {"name": "s", "objectives": {"dsc": "maximize"}, "pruner": {"metric": "ap"}}
    config = build(StudyConfig, values, "s")
    baseline = record(value=0.4, user_attrs={"baseline": "mae", "repeat": 0})
    assert record(value=0.4).objective_values(config) == {"dsc": 0.4}
    assert baseline.objective_values(config) == {"ap": 0.4}


def test_the_score_is_that_of_the_metric_and_never_of_a_cost() -> None:
    cost = build(StudyConfig, {"name": "s", "objectives": {"seconds": "minimize"}}, "s")
    trial = record(value=9.0, user_attrs={"stats": {"scores": {"dsc": 0.3}}})
    assert trial.score(cost) == 0.3
    assert record("RUNNING", intermediate_values={2: 0.1}).score(cost) == 0.1
    assert record("FAIL", intermediate_values={2: 0.1}).score(cost) is None


@pytest.mark.parametrize(
    ("attributes", "folder"),
    [
        ({}, "trials/-1"),
        ({"path": "baselines/mae-0"}, "baselines/mae-0"),
        ({"path": "../elsewhere"}, "trials/-1"),
        ({"path": "/etc"}, "trials/-1"),
        ({"baseline": "mae", "repeat": 2}, "baselines/mae-2"),
    ],
)
def test_the_folder_lies_inside_of_the_study(attributes: dict[str, Any], folder: str) -> None:
    assert record(user_attrs=attributes).folder == Path(folder)


def test_a_link_out_of_the_study_is_not_followed(store: StudyStore, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (store.folder / "linked").symlink_to(tmp_path / "elsewhere")
    trial = record(user_attrs={"path": "linked"})
    assert store.folder_of(trial) == store.trial_folder(-1)


@pytest.mark.parametrize(
    ("trial", "counts"),
    [
        (record(), True),
        (record("FAIL"), True),
        (record("RUNNING"), True),
        (record("WAITING"), False),
        (record(user_attrs={"source": "other"}), False),
        (record(user_attrs={"copy_of": 1}), False),
    ],
)
def test_only_trials_that_were_trained_use_up_the_budget(trial: TrialRecord, counts: bool) -> None:
    assert trial.counts_in_budget == counts


def test_the_note_says_where_a_trial_comes_from() -> None:
    assert record().note is None
    trial = record(user_attrs={"source": "study old", "outside": "ratio is gone"})
    assert trial.note == "from study old; outside of the space"
    assert record(user_attrs={"parent": 0}).note == "continues trial 0"


def test_a_running_trial_is_interrupted_where_nobody_runs_the_study() -> None:
    assert record("RUNNING").status(is_running=False) == "INTERRUPTED"
    assert record("RUNNING").status(is_running=True) == "RUNNING"
    assert record("WAITING").status(is_running=False) == "WAITING"


def test_what_is_stored_of_a_trial_is_read_by_another_store(store: StudyStore) -> None:
    study = store.search()
    trial = create_trial(
        state=TrialState.RUNNING,
        params={"ratio.start": 0.3},
        distributions={"ratio.start": RATIO},
        system_attrs={"fixed_params": {"ratio.start": 0.3}},
    )
    added = store.add_trial(study, trial)
    store.report(study, added.number, 2, 0.25)
    store.set_attrs(study, added.number, stats={"seconds": 3.0}, lost=1)
    store.finish(study, added.number, TrialState.PRUNED, [0.25])

    (read,) = trial_records(StudyStore(store.folder).search())
    assert (read.number, read.state, read.params) == (0, TrialState.PRUNED, {"ratio.start": 0.3})
    assert (read.rungs, read.value, read.last_score) == ({2: 0.25}, 0.25, 0.25)
    assert (read.cost("seconds"), read.lost) == (3.0, 1)
    assert (read.is_enqueued, read.fixed_params) == (True, {"ratio.start": 0.3})


def test_a_waiting_trial_starts_with_its_parameters(store: StudyStore) -> None:
    study = store.search()
    number = store.add_trial(study, create_trial(state=TrialState.WAITING)).number
    started = store.start_enqueued(study, number, {"ratio.start": 0.4}, {"ratio.start": RATIO})
    assert (started.state, started.params) == (TrialState.RUNNING, {"ratio.start": 0.4})
    assert started.started is not None


@pytest.mark.parametrize("missing", [None, math.nan, math.inf, -math.inf])
def test_a_score_is_stored_once_and_only_if_it_is_finite(
    store: StudyStore, missing: float | None
) -> None:
    study = store.search()
    number = store.add_trial(study, create_trial(state=TrialState.RUNNING)).number
    assert not store.report(study, number, 10, missing)
    assert store.report(study, number, 10, 0.1)
    assert not store.report(study, number, 10, 0.2), "reported again after a take-over"
    assert store.trial(study, number).rungs == {10: 0.1}
