"""Changing a study from outside: its budget, trials of one's own, its end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import optuna
import pytest
from helpers.studies import add, make_store
from optuna.trial import TrialState

from amlp_ray.errors import ConfigError, StudyError
from amlp_ray.study.operations.edit import delete, enqueue, extend, retry
from amlp_ray.study.storage.study_store import StudyStore

CONDITIONS = {
    "selection.mode": {"choices": ["hard", "soft"]},
    "selection.strength": {"low": 0.3, "high": 2.0, "when": {"selection.mode": "soft"}},
    "selection.clusters": {"low": 2, "high": 6, "when": {"selection.mode": "hard"}},
}


def test_more_trials_are_added_and_a_number_takes_the_place(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    assert extend(store, trials="+10").trials == 13
    assert extend(store, trials=5, gpu_hours="2.5").model_dump() == {
        "trials": 5,
        "hours": None,
        "gpu_hours": 2.5,
        "epochs": None,
    }
    assert store.config().budget.trials == 5
    assert StudyStore.open(store.folder).search().user_attrs["budget"]["gpu_hours"] == 2.5, (
        "where a driver looks"
    )
    assert extend(store, gpu_hours="+1").gpu_hours == 3.5


@pytest.mark.parametrize(
    ("amounts", "message"),
    [
        ({}, "needs an amount"),
        ({"trials": "many"}, "'many', but a number"),
        ({"hours": "+2"}, "hours has no limit so far"),
        ({"trials": "-3"}, "trials is -3"),
        ({"trials": "2.5"}, "trials is 2.5"),
        ({"epochs": "nan"}, "epochs is nan"),
    ],
)
def test_an_amount_that_is_none_is_refused_and_the_budget_stays(
    tmp_path: Path, amounts: dict[str, Any], message: str
) -> None:
    store = make_store(tmp_path)
    with pytest.raises(ConfigError, match=message):
        extend(store, **amounts)
    assert store.config().budget.trials == 3
    assert "budget" not in store.search().user_attrs


def test_an_enqueued_trial_waits_as_plain_optuna_would_have_it(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    add(store)
    assert enqueue(store, store.config(), {"ratio.start": 0.25}) == 1
    (_, waiting) = store.search().trials
    assert waiting.state == TrialState.WAITING
    trial = store.search().ask()
    assert trial.number == 1
    assert trial.suggest_float("ratio.start", 0.2, 0.5) == 0.25


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({}, "needs values"),
        (
            {"selection.strength": 5.0},
            "selection.strength=5.0 lies outside of the space, which has 0.3 to 2",
        ),
        ({"selection.mode": "soft", "selection.strength": "strong"}, "which has 0.3 to 2"),
        ({"selection.clusters": 2.5}, "selection.clusters=2.5 lies outside"),
        ({"selection.clusters": True}, "selection.clusters=True lies outside"),
        ({"selection.mode": "ranked"}, "which has hard, soft"),
        ({"selection.mod": "hard"}, "did you mean selection.mode"),
        ({"epochs": 3}, "not searched by this study"),
        (
            {"selection.mode": "hard", "selection.strength": 1.0},
            "no trial has these values together",
        ),
    ],
)
def test_what_is_not_in_the_space_is_not_enqueued(
    tmp_path: Path, params: dict[str, Any], message: str
) -> None:
    store = make_store(tmp_path, space=CONDITIONS)
    with pytest.raises(ConfigError, match=message):
        enqueue(store, store.config(), params)
    assert not store.search().trials


def test_a_condition_is_met_by_what_the_sampler_may_fill_in(tmp_path: Path) -> None:
    store = make_store(tmp_path, space=CONDITIONS)
    assert enqueue(store, store.config(), {"selection.strength": 1}) == 0
    assert store.search().trials[0].system_attrs["fixed_params"] == {"selection.strength": 1.0}


def test_what_breaks_a_requirement_is_not_enqueued(tmp_path: Path) -> None:
    space = {"ratio.start": {"low": 0.2, "high": 0.6}, "ratio.end": {"low": 0.2, "high": 0.6}}
    store = make_store(tmp_path, space=space, require=["ratio.start <= ratio.end"])
    with pytest.raises(ConfigError, match=r"ratio.start <= ratio.end"):
        enqueue(store, store.config(), {"ratio.start": 0.5, "ratio.end": 0.3})
    assert enqueue(store, store.config(), {"ratio.start": 0.3, "ratio.end": 0.5}) == 0


def test_a_study_that_was_never_run_is_begun_by_its_first_waiting_trial(tmp_path: Path) -> None:
    config = make_store(tmp_path / "other").config()
    store = StudyStore(tmp_path / "runs" / "tiny")
    assert enqueue(store, config, {"ratio.start": 0.3}) == 0
    assert StudyStore.open(store.folder).config() == config
    assert len(StudyStore.open(store.folder).search().trials) == 1


@pytest.mark.parametrize("state", [TrialState.FAIL, TrialState.PRUNED, TrialState.COMPLETE])
def test_a_finished_trial_is_tried_again_under_a_number_of_its_own(
    tmp_path: Path, state: TrialState
) -> None:
    store = make_store(tmp_path)
    number = add(store, state=state)
    assert retry(store, store.config(), number) == 1
    again = store.search().trials[1]
    assert again.user_attrs == {"retry_of": 0}
    assert again.system_attrs["fixed_params"] == {"ratio.start": 0.3, "selection.mode": "hard"}


def test_a_trial_that_runs_or_is_none_is_not_retried(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    add(store, state=TrialState.RUNNING)
    with pytest.raises(StudyError, match="has not ended"):
        retry(store, store.config(), 0)
    with pytest.raises(StudyError, match="has no trial 7; its trials are 0 to 0"):
        retry(store, store.config(), 7)


def test_a_study_is_deleted_but_not_while_it_is_run(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    with store.lock(), pytest.raises(StudyError, match="cancel it before"):
        delete(StudyStore.open(store.folder))
    assert store.folder.is_dir()
    delete(StudyStore.open(store.folder))
    assert not store.folder.exists()


def test_deleting_leaves_the_studies_of_others_in_the_database(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/studies.db"
    store, other = (make_store(tmp_path, name, storage=url) for name in ("tiny", "tiny-two"))
    add(other)
    delete(store)
    assert sorted(optuna.get_all_study_names(url)) == ["tiny-two", "tiny-two.baselines"]
    assert len(other.search().trials) == 1


def test_a_study_of_another_folder_is_not_deleted_from_the_database(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/studies.db"
    store = make_store(tmp_path, storage=url)
    (store.folder / "id").write_text("another")
    with pytest.raises(StudyError, match="not ours to delete"):
        delete(StudyStore.open(store.folder))
    assert "tiny" in optuna.get_all_study_names(url)


def test_the_store_knows_from_which_budget_a_study_was_extended(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    for more in ("+2", "+3"):
        extend(store, trials=more)
    extended = store.search().user_attrs["extended"]
    assert (extended["from"]["trials"], extended["to"]["trials"]) == (3, 8)
