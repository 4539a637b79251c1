"""Trials as rows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers.studies import add, add_baseline, make_store
from optuna.trial import TrialState

from amlp_ray.errors import ConfigError, StudyError
from amlp_ray.study.operations.edit import enqueue
from amlp_ray.study.operations.trials import select_rows, trial_details, trial_rows
from amlp_ray.study.storage.study_store import StudyStore


@pytest.fixture
def store(tmp_path: Path) -> StudyStore:
    store = make_store(tmp_path)
    add(store, {"ratio.start": 0.25, "selection.mode": "hard"}, 0.5)
    add(store, {"ratio.start": 0.45, "selection.mode": "soft"}, 0.7)
    add(store, state=TrialState.FAIL, values=0.2, reason="no luck")
    add(store, state=TrialState.RUNNING, values=None)
    add(store, values=0.6, source="import prior.csv")
    enqueue(store, store.config(), {"ratio.start": 0.3})
    add_baseline(store, "mae", 1, 0.4)
    add(store, {}, 0.65, study=store.confirmation(create=True), candidate="trial-1", repeat=2)
    return store


def test_rows_are_of_the_search_then_baselines_then_the_confirmation(store: StudyStore) -> None:
    rows = trial_rows(store)
    assert [(row["kind"], row["number"], row["state"]) for row in rows] == [
        ("search", 0, "COMPLETE"),
        ("search", 1, "COMPLETE"),
        ("search", 2, "FAIL"),
        ("search", 3, "INTERRUPTED"),
        ("search", 4, "COMPLETE"),
        ("search", 5, "WAITING"),
        ("mae", 1, "COMPLETE"),
        ("confirm trial-1", 2, "COMPLETE"),
    ]
    assert rows[1]["ratio.start"] == 0.45
    assert rows[2]["reason"] == "no luck"
    assert rows[4]["note"] == "from import prior.csv"
    assert (rows[6]["dsc"], rows[7]["dsc"]) == (0.4, 0.65)
    assert len({tuple(row) for row in rows}) == 1, "all rows have the same columns"


def test_rows_are_chosen_sorted_and_cut(store: StudyStore) -> None:
    rows = trial_rows(store)
    best = select_rows(rows, states=["complete"], sort="-dsc", columns=["number", "dsc"], limit=2)
    assert best == [{"number": 1, "dsc": 0.7}, {"number": 2, "dsc": 0.65}]
    assert select_rows(rows, sort="dsc")[-1]["dsc"] is None, "those without a score come last"
    assert [r["selection.mode"] for r in select_rows(rows, sort="selection.mode")][:2] == [
        "hard",
        "hard",
    ]


def test_an_unknown_column_or_state_is_named(store: StudyStore) -> None:
    with pytest.raises(ConfigError, match="no column 'dcs'"):
        select_rows(trial_rows(store), sort="-dcs")
    with pytest.raises(ConfigError, match="no state 'DONE'"):
        select_rows(trial_rows(store), states=["done"])


def test_several_objectives_have_a_column_each(tmp_path: Path) -> None:
    store = make_store(tmp_path, "two", objectives={"dsc": "maximize", "memory": "minimize"})
    add(store, values=[0.5, 0.8])
    (row,) = trial_rows(store)
    assert (row["dsc"], row["memory"]) == (0.5, 0.8)


def test_a_trial_is_shown_with_its_files_and_provenance(store: StudyStore) -> None:
    folder = store.trial_folder(0)
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("epochs: 4\n")
    (folder / "provenance.json").write_text(json.dumps({"commit": "abc", "config": {"epochs": 4}}))
    details = trial_details(store, 0)
    assert details["values"] == {"dsc": 0.5}
    assert details["rungs"] == {2: 0.4, 4: 0.5}
    assert details["config"] == {"epochs": 4}
    assert details["provenance"] == {"commit": "abc"}
    assert details["files"] == ["config.yaml", "provenance.json"]
    assert trial_details(store, 5)["params"] == {"ratio.start": 0.3}, (
        "what was asked for, before it runs"
    )
    assert trial_details(store, 2)["reason"] == "no luck"
    with pytest.raises(StudyError, match="has no trial 9"):
        trial_details(store, 9)
