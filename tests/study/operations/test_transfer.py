"""Trials out of a study as tables, and into one as prior knowledge."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from helpers.studies import add, add_baseline, make_store
from optuna.trial import TrialState, create_trial
from pyarrow import parquet

from amlp_ray.errors import ConfigError, StudyError
from amlp_ray.study.operations.status import status
from amlp_ray.study.operations.transfer import export_trials, import_trials
from amlp_ray.study.search_space.space import SearchSpace
from amlp_ray.study.storage.study_store import StudyStore


@pytest.fixture
def store(tmp_path: Path) -> StudyStore:
    store = make_store(tmp_path)
    add(store, {"ratio.start": 0.25, "selection.mode": "hard"}, 0.7, path="trials/0")
    add(store, {"ratio.start": 0.45, "selection.mode": "soft"}, 0.5)
    add(store, state=TrialState.FAIL, reason='says "no", and more')
    add_baseline(store, "mae", 0, 0.4)
    folder = store.trial_folder(0)
    folder.mkdir(parents=True)
    provenance = {
        "commit": "abc",
        "seed": 5,
        "dataset": {"fingerprint": "f00d"},
        "versions": {"torch": "2.0"},
    }
    (folder / "provenance.json").write_text(json.dumps(provenance))
    return store


def test_json_holds_everything_of_every_trial(store: StudyStore, tmp_path: Path) -> None:
    assert export_trials(store, tmp_path / "all.json") == 4
    rows = json.loads((tmp_path / "all.json").read_text())
    assert [row["kind"] for row in rows] == ["search"] * 3 + ["baseline"]
    assert rows[0]["params"] == {"ratio.start": 0.25, "selection.mode": "hard"}
    assert rows[0]["rungs"] == {"2": pytest.approx(0.6), "4": 0.7}
    assert rows[0]["stats"]["gpu_seconds"] == 36.0
    assert rows[0]["provenance"]["dataset"] == "f00d"
    assert rows[2]["attributes"]["reason"] == 'says "no", and more'
    assert rows[3]["attributes"]["baseline"] == "mae"


def test_csv_and_parquet_hold_the_same(store: StudyStore, tmp_path: Path) -> None:
    export_trials(store, tmp_path / "all.csv")
    export_trials(store, tmp_path / "all.parquet")
    with (tmp_path / "all.csv").open() as file:
        rows = list(csv.DictReader(file))
    table = parquet.read_table(tmp_path / "all.parquet").to_pylist()
    assert [row["params.ratio.start"] for row in rows] == ["0.25", "0.45", "0.3", ""]
    assert [row["params.ratio.start"] for row in table] == [0.25, 0.45, 0.3, None]
    assert rows[2]["attributes.reason"] == table[2]["attributes.reason"] == 'says "no", and more'
    assert rows[0]["provenance.versions.torch"] == "2.0"
    assert list(rows[0]) == list(table[0])


def test_a_file_of_no_known_kind_is_not_written(store: StudyStore, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="'xlsx', but must be csv, parquet, json"):
        export_trials(store, tmp_path / "all.xlsx")
    assert not (tmp_path / "all.xlsx").exists()


def test_an_export_comes_back_as_prior_knowledge_once(store: StudyStore, tmp_path: Path) -> None:
    export_trials(store, tmp_path / "all.csv")
    other = make_store(tmp_path, "other")
    imported = import_trials(other, other.config(), tmp_path / "all.csv")
    assert imported.taken == [0, 1]
    assert imported.left_out.keys() == {"line 4", "line 5"}
    trials = other.search().trials
    assert [(t.state, t.values, t.params) for t in trials] == [
        (t.state, t.values, t.params) for t in store.search().trials[:2]
    ]
    assert trials[0].user_attrs == {"source": "import all.csv"}
    again = import_trials(other, other.config(), tmp_path / "all.csv")
    assert (again.taken, again.known) == ([], 2)
    same = import_trials(other, other.config(), "tiny", runs=tmp_path)
    assert (same.taken, same.known) == ([], 2), "the same trials by another way"


def test_text_that_a_spreadsheet_would_run_is_marked_and_comes_back(tmp_path: Path) -> None:
    settings = {
        "space": {"ratio.start": {"low": 0.1, "high": 0.6}, "label": {"choices": ["=1+1", "-a"]}},
    }
    store = make_store(tmp_path, **settings)
    space = SearchSpace(store.config())
    for start, label, reason in ((0.25, "=1+1", ""), (0.45, "-a", "@SUM(A1)")):
        fitted = space.fit({"ratio.start": start, "label": label})
        trial = create_trial(
            values=[start],
            params=fitted.params,
            distributions=fitted.distributions,
            user_attrs={"reason": reason},
        )
        store.add_trial(store.search(), trial)
    export_trials(store, tmp_path / "all.csv")
    with (tmp_path / "all.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["params.label"] for row in rows] == ["'=1+1", "'-a"]
    assert rows[1]["attributes.reason"] == "'@SUM(A1)"
    assert not any(cell[:1] in ("=", "+", "-", "@") for row in rows for cell in row.values())
    other = make_store(tmp_path, "other", **settings)
    import_trials(other, other.config(), tmp_path / "all.csv")
    assert [t.params["label"] for t in other.search().trials] == ["=1+1", "-a"]


def test_imported_trials_count_neither_in_the_budget_nor_as_best(
    store: StudyStore, tmp_path: Path
) -> None:
    other = make_store(tmp_path, "other")
    assert len(import_trials(other, other.config(), "tiny", runs=tmp_path).taken) == 2
    add(other, values=0.1)
    values = status(other)
    assert values["budget"]["trials"]["used"] == 1
    assert [row["trial"] for row in values["best"]] == [2]
    assert (values["imported"], values["states"]) == (2, {"COMPLETE": 1})


def test_trials_that_do_not_fit_are_told_with_the_reason(store: StudyStore, tmp_path: Path) -> None:
    narrow = {
        "ratio.start": {"low": 0.2, "high": 0.3},
        "selection.mode": {"choices": ["hard", "soft"]},
    }
    other = make_store(tmp_path, "other", space=narrow)
    imported = import_trials(other, other.config(), "tiny", runs=tmp_path)
    assert imported.taken == [0]
    assert (
        imported.left_out["trial 1"]
        == "ratio.start=0.45 lies outside of the space, which has 0.2 to 0.3."
    )
    assert imported.left_out["trial 2"] == "it is FAIL and not COMPLETE."


def test_what_one_study_searches_and_the_other_fixes_must_agree(
    store: StudyStore, tmp_path: Path
) -> None:
    only = {"ratio.start": {"low": 0.2, "high": 0.5}}
    other = make_store(tmp_path, "other", space=only)  # selection.mode is hard here
    imported = import_trials(other, other.config(), "tiny", runs=tmp_path)
    assert imported.taken == [0]
    assert imported.left_out["trial 1"] == "selection.mode is soft there and hard here."
    wider = {
        **only,
        "lr": {"low": 1e-4, "high": 1e-2},
        "selection.mode": {"choices": ["hard", "soft"]},
    }
    third = make_store(tmp_path, "third", space=wider)
    assert len(import_trials(third, third.config(), "tiny", runs=tmp_path).taken) == 2
    assert third.search().trials[0].params["lr"] == 0.001, "what the trial was trained with"


def test_a_study_scored_otherwise_is_told_of(store: StudyStore, tmp_path: Path) -> None:
    other = make_store(tmp_path, "other", probe={"num_labeled": 24, "subsets": 2, "folds": 2})
    assert import_trials(other, other.config(), "tiny", runs=tmp_path).notes == [
        "tiny has other probe: its scores may be higher or lower by that alone"
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ratio.start,selection.mode\n0.3,hard\n", "has no column 'dsc'"),
        ("", "has no column 'dsc'"),
    ],
)
def test_a_file_without_scores_is_refused(tmp_path: Path, text: str, message: str) -> None:
    store = make_store(tmp_path)
    (tmp_path / "prior.csv").write_text(text)
    with pytest.raises(ConfigError, match=message):
        import_trials(store, store.config(), tmp_path / "prior.csv")
    assert not store.search().trials


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("0.3,hard,", "it has no dsc."),
        ("0.3,hard,nan", "it has no dsc."),
        ("0.3,,0.5", "selection.mode is missing; the space has hard, soft."),
        ("high,hard,0.5", "ratio.start=high lies outside of the space, which has 0.2 to 0.5."),
    ],
)
def test_a_row_of_ones_own_file_fits_or_says_why_not(tmp_path: Path, row: str, reason: str) -> None:
    store = make_store(tmp_path)
    (tmp_path / "prior.csv").write_text(f"ratio.start,selection.mode,dsc\n{row}\n")
    imported = import_trials(store, store.config(), tmp_path / "prior.csv")
    assert imported.left_out == {"line 2": reason}
    assert not store.search().trials


def test_several_objectives_are_all_needed(store: StudyStore, tmp_path: Path) -> None:
    objectives: dict[str, Any] = {"dsc": "maximize", "gpu_seconds": "minimize"}
    other = make_store(tmp_path, "other", objectives=objectives)
    assert import_trials(other, other.config(), "tiny", runs=tmp_path).taken == [0, 1]
    assert other.search().trials[0].values == [0.7, 36.0]
    third = make_store(tmp_path, "third", objectives={"dsc": "maximize", "dsc_small": "maximize"})
    imported = import_trials(third, third.config(), "tiny", runs=tmp_path)
    assert imported.left_out["trial 0"] == "it has no dsc_small."


def test_a_study_is_not_imported_into_itself(store: StudyStore, tmp_path: Path) -> None:
    with pytest.raises(StudyError, match="into itself"):
        import_trials(store, store.config(), "tiny", runs=tmp_path)


def test_cells_of_a_file_are_read_as_what_they_stand_for(tmp_path: Path) -> None:
    space = {"flip": {"choices": [True, False]}, "selection.clusters": {"low": 2, "high": 5}}
    store = make_store(tmp_path, space=space)
    (tmp_path / "prior.csv").write_text("flip,selection.clusters,dsc\nTrue,3,0.5\nfalse,4.0,0.6\n")
    assert import_trials(store, store.config(), tmp_path / "prior.csv").taken == [0, 1]
    assert [t.params for t in store.search().trials] == [
        {"flip": True, "selection.clusters": 3},
        {"flip": False, "selection.clusters": 4},
    ]
