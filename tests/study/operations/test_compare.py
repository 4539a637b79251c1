"""Studies side by side."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.studies import add, add_baseline, make_store, note_data
from optuna.trial import TrialState

from amlp_ray.errors import ConfigError
from amlp_ray.study.operations.compare import compare
from amlp_ray.study.storage.study_store import StudyStore

SAME = {"ratio.start": 0.25, "selection.mode": "hard"}


def two(tmp_path: Path, best: float = 0.7, **changes: object) -> list[StudyStore]:
    a, b = make_store(tmp_path, "a"), make_store(tmp_path, "b", **changes)
    add(a, SAME, 0.6)
    add(b, SAME, 0.5)
    add(b, {"ratio.start": 0.45, "selection.mode": "soft"}, best)
    add_baseline(a, "mae", 0, 0.4)
    for store in (a, b):
        note_data(store, "f00d")
    return [a, b]


def test_the_better_study_is_named_with_its_gain_and_what_is_the_same_is_compared(
    tmp_path: Path,
) -> None:
    comparison = compare(two(tmp_path))
    assert comparison["comparable"]
    assert comparison["verdict"].startswith("b found the best trial, 0.100 above a")
    assert [(row["best"], row["trial"], row["complete"]) for row in comparison["studies"]] == [
        (0.6, 0, 1),
        (0.7, 1, 2),
    ]
    assert comparison["studies"][0]["baselines"] == {"mae": {"n": 1, "mean": 0.4}}
    (pair,) = comparison["overlap"]
    assert pair["searched_in_both"] == ["ratio.start", "selection.mode"]
    assert (pair["same_trials"], pair["mean_difference"]) == (1, pytest.approx(0.1))


def test_a_small_gain_is_a_tie(tmp_path: Path) -> None:
    assert compare(two(tmp_path, best=0.61))["verdict"].startswith("A tie: b is 0.010 above a")


def test_differing_settings_are_listed_and_places_of_data_are_not(tmp_path: Path) -> None:
    comparison = compare(
        two(tmp_path, seed=9, data="/elsewhere", space={"ratio.start": {"low": 0.2, "high": 0.5}})
    )
    config = {row["setting"]: (row["a"], row["b"]) for row in comparison["differing"]}
    assert config["seed"] == (3, 9)
    assert config["space.selection.mode.choices"] == (["hard", "soft"], None)
    assert not {"data", "name"} & config.keys()


def test_other_data_another_probe_or_no_run_is_not_comparable(tmp_path: Path) -> None:
    stores = two(tmp_path / "data")
    note_data(stores[1], "beef")
    comparison = compare(stores)
    assert not comparison["comparable"]
    assert "run on different data" in comparison["verdict"]
    probe = compare(two(tmp_path / "probe", probe={"num_labeled": 24, "subsets": 2, "folds": 2}))
    assert "score by different probes" in probe["verdict"]
    (stores[0].folder / "environment.json").unlink()
    assert "one has not been run" in compare(stores)["verdict"]


def test_a_study_without_a_score_leaves_nothing_to_compare(tmp_path: Path) -> None:
    a, b = make_store(tmp_path, "a"), make_store(tmp_path, "b")
    add(a, SAME)
    add(b, SAME, state=TrialState.FAIL)
    for store in (a, b):
        note_data(store, "f00d")
    assert compare([a, b])["verdict"].startswith("Nothing to compare yet")


def test_one_study_is_not_compared_with_itself(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    with pytest.raises(ConfigError, match="two or more different studies, not tiny, tiny"):
        compare([store, store])
