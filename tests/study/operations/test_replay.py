"""A trial again: the same scores to the digit, or what is not as it was."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers.studies import add, make_store, run_spec_of
from optuna.trial import TrialState

from amlp_ray.data.dataset import PatchDataset
from amlp_ray.errors import StudyError
from amlp_ray.launch.launcher import run_here
from amlp_ray.study.operations.replay import replay
from amlp_ray.study.storage.provenance import write_provenance
from amlp_ray.study.storage.study_store import StudyStore
from amlp_ray.training.loggers.metrics_file import read_rows
from amlp_ray.utils.json_files import read_json, seal_json


@pytest.fixture(scope="module")
def trained(phantom_dataset: PatchDataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs with one study of one trial, trained in this process as a driver would have it."""
    runs = tmp_path_factory.mktemp("replay")
    store = make_store(runs, data=phantom_dataset.path)
    run_spec = run_spec_of(store.folder, phantom_dataset)
    write_provenance(run_spec)
    run_here(run_spec)
    scores = {
        row["epoch"]: row["dsc"]
        for row in read_rows(run_spec.folder / "metrics.jsonl")
        if "dsc" in row
    }
    add(
        store,
        {"ratio.start": 0.3, "selection.mode": "hard"},
        scores[4],
        rungs=scores,
        path="trials/0",
    )
    return runs


@pytest.fixture
def store(trained: Path, tmp_path: Path) -> StudyStore:
    shutil.copytree(trained / "tiny", tmp_path / "tiny")
    return StudyStore.open(tmp_path / "tiny")


def test_a_replay_gives_the_same_scores_to_the_digit(
    store: StudyStore, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="amlp_ray")
    replayed = replay(store, store.config(), 0)
    assert [rung["epoch"] for rung in replayed["rungs"]] == [2, 4]
    assert replayed["same"], replayed
    assert replayed["differs"] == []
    epochs = [message for message in caplog.messages if message.startswith("epoch ")]
    assert [message.split(",")[0] for message in epochs] == [
        f"epoch {n} of 4" for n in (1, 2, 3, 4)
    ]
    assert Path(replayed["folder"]) == store.folder / "replays" / "0-0"
    assert not torch.are_deterministic_algorithms_enabled(), "as it was before"
    assert replay(store, store.config(), 0)["folder"].endswith("0-1")


def test_a_pruned_trial_is_replayed_up_to_its_last_rung(store: StudyStore) -> None:
    metrics = store.trial_folder(0) / "metrics.jsonl"
    metrics.write_text("".join(json.dumps(row) + "\n" for row in read_rows(metrics)[:2]))
    replayed = replay(store, store.config(), 0)
    assert [rung["epoch"] for rung in replayed["rungs"]] == [2]
    assert replayed["same"]
    assert len(read_rows(Path(replayed["folder"]) / "metrics.jsonl")) == 2


def test_other_scores_are_told_with_what_is_not_as_it_was(store: StudyStore) -> None:
    file = store.trial_folder(0) / "provenance.json"
    provenance = dict(read_json(file) or {})
    provenance["versions"]["torch"] = "1.0"
    provenance["hardware"]["processor"] = "an abacus"
    provenance["continued"] = [{"epoch": 1, "at": "", "hardware": {}}]
    file.write_text(seal_json(provenance))
    metrics = store.trial_folder(0) / "metrics.jsonl"
    rows = read_rows(metrics)
    rows[3]["dsc"] += 1e-12
    metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
    replayed = replay(store, store.config(), 0)
    assert not replayed["same"]
    assert [rung["same"] for rung in replayed["rungs"]] == [True, False]
    differences = "; ".join(replayed["differs"])
    assert "torch: 1.0 then" in differences
    assert "processor: an abacus then" in differences
    assert "resumed after epoch 1 with other hardware" in differences


def test_other_data_are_refused(store: StudyStore, trained: Path) -> None:
    file = store.trial_folder(0) / "provenance.json"
    provenance = dict(read_json(file) or {})
    provenance["dataset"]["fingerprint"] = "0" * 64
    file.write_text(seal_json(provenance))
    with pytest.raises(StudyError, match="other data than the trial was trained with"):
        replay(store, store.config(), 0)
    assert not (store.folder / "replays").exists()


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({"source": "import prior.csv"}, "imported from import prior.csv"),
        ({"copy_of": 0}, "replay that one"),
        ({"parent": 0, "member": 1, "generation": 2}, "continued from the weights of trial 0"),
        ({"path": "trials/1"}, "never began to train"),
        (
            {"path": "../../elsewhere"},
            "never began to train",
        ),  # nothing outside of the study is read
    ],
)
def test_what_cannot_be_repeated_says_why(
    store: StudyStore, attributes: dict[str, object], message: str
) -> None:
    number = add(store, **attributes)
    with pytest.raises(StudyError, match=message):
        replay(store, store.config(), number)


def test_a_trial_that_was_never_scored_has_nothing_to_compare(store: StudyStore) -> None:
    (store.trial_folder(0) / "metrics.jsonl").unlink()
    add(store, state=TrialState.FAIL)
    with pytest.raises(StudyError, match="no score that a replay could be compared with"):
        replay(store, store.config(), 0)
