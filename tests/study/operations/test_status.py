"""What is told of a study at any time."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.studies import add, add_baseline, make_store
from optuna.trial import TrialState

from amlp_ray.errors import StudyError
from amlp_ray.study.operations.edit import enqueue
from amlp_ray.study.operations.status import list_studies, running_rows, status
from amlp_ray.study.storage.best_trials import best_trial, pareto_front
from amlp_ray.study.storage.study_store import StudyStore
from amlp_ray.study.storage.trial_record import trial_records


def test_a_status_tells_states_budget_best_baselines_and_confirmation(tmp_path: Path) -> None:
    store = make_store(tmp_path, budget={"trials": 8, "epochs": 100, "gpu_hours": 1})
    add(store, {"ratio.start": 0.3, "selection.mode": "soft"}, 0.6)
    add(store, values=0.4)
    add(store, state=TrialState.PRUNED)
    add(store, state=TrialState.FAIL, reason="x")
    add(store, source="import a.csv", values=0.9)
    add(store, values=0.6, copy_of=0)
    enqueue(store, store.config(), {"ratio.start": 0.3})
    for repeat, value in enumerate((0.3, 0.5)):
        add_baseline(store, "mae", repeat, value)
    add(store, {}, 0.7, study=store.confirmation(create=True), candidate="trial-0", repeat=0)
    values = status(store)
    assert values["states"] == {"COMPLETE": 3, "PRUNED": 1, "FAIL": 1, "WAITING": 1}
    assert values["imported"] == 1
    assert values["budget"]["trials"] == {"used": 4, "allowed": 8}
    assert values["budget"]["epochs"] == {
        "used": 4 * 7,
        "allowed": 100,
    }  # a confirmation has no budget
    assert values["budget"]["gpu_hours"]["used"] == pytest.approx(7 * 36 / 3600)
    assert values["best"] == [
        {"trial": 0, "dsc": 0.6, "params": {"ratio.start": 0.3, "selection.mode": "soft"}}
    ]
    assert values["baselines"] == {"mae": {"n": 2, "dsc": 0.4}}
    assert values["confirmed"] == {"trial-0": {"done": 1, "begun": 1}}


def test_a_running_trial_of_a_study_that_nobody_runs_is_interrupted(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    add(store, state=TrialState.RUNNING)
    assert status(store)["states"] == {"INTERRUPTED": 1}
    assert status(store)["state"] == "interrupted"
    with store.lock():
        values = status(StudyStore.open(store.folder))
    assert values["states"] == {"RUNNING": 1}
    assert values["state"] == "running"
    assert values["run_by"].startswith("process ")


def test_the_state_follows_what_was_asked_and_whether_budget_is_left(tmp_path: Path) -> None:
    store = make_store(tmp_path, budget={"trials": 2})
    assert status(store)["state"] == "not begun"
    add(store)
    with store.lock():
        store.request("stop")
        assert status(StudyStore.open(store.folder))["state"] == "stopping"
    assert status(store)["state"] == "stopped"
    add(store, state=TrialState.RUNNING)
    with store.lock():
        store.request("pause")
    assert status(store)["state"] == "paused"
    with store.lock():
        pass
    assert status(store)["state"] == "interrupted"
    add(store)
    finished = make_store(tmp_path, "finished", budget={"trials": 1})
    add(finished)
    assert status(finished)["state"] == "finished (trials 1 of 1)"


def test_a_running_trial_has_spent_the_epochs_of_its_metrics(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    number = add(store, state=TrialState.RUNNING, path="trials/0", rungs={2: 0.4})
    folder = store.trial_folder(number)
    folder.mkdir(parents=True)
    rows = [{"epoch": e, "loss": 1 / e, "ratio": 0.3, "images_per_second": 90.0} for e in (1, 2, 3)]
    (folder / "metrics.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in rows) + '{"epoch": 4, "lo'
    )
    assert status(store)["budget"]["epochs"]["used"] == 3
    assert running_rows(store, store.config()) == [
        {
            "run": "trials/0",
            "epoch": 3,
            "of": 4,
            "loss": pytest.approx(1 / 3),
            "dsc": 0.4,
            "ratio": 0.3,
            "images_per_second": 90.0,
        }
    ]


def test_of_several_objectives_the_front_is_best_and_costs_count_downwards(tmp_path: Path) -> None:
    store = make_store(tmp_path, objectives={"dsc": "maximize", "gpu_seconds": "minimize"})
    for values in ([0.5, 20.0], [0.6, 30.0], [0.55, 35.0], [0.4, 10.0], [0.6, 30.0]):
        add(store, values=values)
    config = store.config()
    assert [t.number for t in pareto_front(trial_records(store.search()), config)] == [1, 0, 3]
    assert best_trial(store).number == 1
    assert [row["trial"] for row in status(store)["best"]] == [1, 0, 3]


def test_a_trial_beyond_the_limits_is_best_only_where_all_are(tmp_path: Path) -> None:
    store = make_store(tmp_path, limits={"memory": 1.0})
    add(store, values=0.9, stats={"memory": 1.5})
    assert best_trial(store).number == 0
    add(store, values=0.3, stats={"memory": 0.9})
    assert best_trial(store).number == 1


def test_a_study_without_a_complete_trial_has_no_best(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    add(store, state=TrialState.PRUNED)
    with pytest.raises(StudyError, match="no complete trial yet"):
        best_trial(store)


def test_looking_writes_nothing(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    add(store)
    before = {file: file.read_bytes() for file in store.folder.rglob("*") if file.is_file()}
    status(StudyStore.open(store.folder))
    assert {file: file.read_bytes() for file in store.folder.rglob("*") if file.is_file()} == before


def test_a_half_written_last_line_of_the_journal_is_passed_over(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    add(store)
    with (store.folder / "study.journal").open("a") as journal:
        journal.write('{"op_code":4,"wor')
    assert status(StudyStore.open(store.folder))["states"] == {"COMPLETE": 1}


def test_all_studies_are_listed_and_a_broken_one_says_so(tmp_path: Path) -> None:
    add(make_store(tmp_path, "good", budget={"trials": 5}), values=0.6)
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "study.yaml").write_text("name: bad\nspace: 3\n")
    bad, good = list_studies(tmp_path)
    assert bad["name"] == "bad"
    assert bad["state"].startswith("cannot be read: ")
    assert (good["state"], good["trials"], good["of"], good["best"]) == ("ended", 1, 5, 0.6)
    assert list_studies(tmp_path / "nowhere") == []


def test_a_status_imports_nothing_heavy(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    add(store)
    code = (
        "import sys; from pathlib import Path\n"
        "from amlp_ray.cli.study_inspect import status, trials\n"
        f"status('tiny', Path({str(tmp_path)!r}), True)\n"
        "heavy = ('torch', 'ray', 'pandas', 'pyarrow', 'sklearn', 'scipy', 'plotly')\n"
        "heavy += ('sqlalchemy',)\n"
        "print([m for m in heavy if m in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]"
