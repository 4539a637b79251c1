"""A study whose storage is lost or cut short is not taken for a new one, and is rebuilt."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import optuna
import pytest
from helpers.studies import add, add_baseline, make_store
from helpers.tiny_study import TINY
from optuna.trial import TrialState

from amlp_ray.config import StudyConfig
from amlp_ray.config.base import build
from amlp_ray.config.yaml_file import write_yaml
from amlp_ray.errors import StudyError
from amlp_ray.study.confirmation.confirm import find_test_unlock
from amlp_ray.study.operations.change_space import Change, migrate
from amlp_ray.study.operations.edit import delete, enqueue
from amlp_ray.study.operations.repair import repair
from amlp_ray.study.operations.status import list_studies, status
from amlp_ray.study.operations.trials import trial_rows
from amlp_ray.study.storage.study_store import StudyStore
from amlp_ray.study.storage.trial_files import TRIAL_FILE, write_trial_file
from amlp_ray.study.storage.trial_record import TrialRecord, trial_records

EVENTS = """\
2026-03-01T12:00:00 study tiny: 2 trials side by side, folder runs/tiny
2026-03-01T12:00:01 trial 0 starts: ratio.start=0.3, selection.mode=hard
2026-03-01T12:05:00 trial 0 complete: DSC 0.500
2026-03-01T12:06:00 trial 1 pruned at epoch 2: DSC 0.300
2026-03-01T12:07:00 trial 2 failed: Loss became NaN in epoch 3.
2026-03-01T12:30:00 study tiny is stopped
"""


def write_files(store: StudyStore, record: TrialRecord, *, epochs: int) -> None:
    """Write what a run leaves in its folder, without `trial.json`."""
    folder = store.folder_of(record)
    folder.mkdir(parents=True)
    config = store.config()
    write_yaml(config.trial(record.params, seed=1), folder / "config.yaml")
    rows = []
    for epoch in range(1, epochs + 1):
        row: dict[str, Any] = {"epoch": epoch, "seconds": 2.5, "images_per_second": 10.0}
        if epoch in record.rungs:
            row["dsc"] = record.rungs[epoch]
        rows.append(json.dumps(row) + "\n")
    (folder / "metrics.jsonl").write_text("".join(rows))


@pytest.fixture(params=["journal", "sqlite"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> StudyStore:
    """A study with a complete, a pruned, a failed and an interrupted trial, and a baseline."""
    url = None if request.param == "journal" else "sqlite:///trials.db"
    store = make_store(tmp_path, storage=url, budget={"trials": 5})
    add(store, values=0.5)
    pruned = {"ratio.start": 0.21, "selection.mode": "soft"}
    add(store, pruned, 0.3, state=TrialState.PRUNED, rungs={2: 0.3})
    add(store, state=TrialState.FAIL, values=None, reason="Loss became NaN in epoch 3.")
    add(store, {"ratio.start": 0.4, "selection.mode": "soft"}, None, state=TrialState.RUNNING)
    add_baseline(store, "mae", 0, 0.45)
    for record, epochs in zip(trial_records(store.search()), (4, 2, 3, 1), strict=True):
        write_files(store, record, epochs=epochs)
    for record in trial_records(store.baselines()):
        write_files(store, record, epochs=4)
    (store.folder / "events.log").write_text(EVENTS)
    return store


def lose(store: StudyStore) -> None:
    for name in ("study.journal", "trials.db"):
        (store.folder / name).unlink(missing_ok=True)


def summary(store: StudyStore) -> list[tuple[Any, ...]]:
    """What matters of every trial."""
    records = [*trial_records(store.search()), *trial_records(store.baselines())]
    return [(r.number, r.state, r.params, r.values, r.reason, r.baseline) for r in records]


def test_a_lost_storage_stops_every_command_and_says_how_it_is_restored(store: StudyStore) -> None:
    lose(store)
    for command in (status, trial_rows, lambda s: enqueue(s, s.config(), {"ratio.start": 0.3})):
        with pytest.raises(StudyError, match=r"folders of 5 runs .* `amlp-ray study repair tiny`"):
            command(StudyStore.open(store.folder))
    with pytest.raises(StudyError, match="study repair"), StudyStore.open(store.folder).lock():
        pass
    (row,) = list_studies(store.folder.parent)
    assert row["state"].startswith("cannot be read")
    assert not (store.folder / "study.journal").exists()


def test_a_lost_storage_is_rebuilt_from_the_folders(store: StudyStore) -> None:
    before = summary(store)
    lose(store)
    done = repair(StudyStore.open(store.folder))
    assert (done.kept, done.gone) == (0, [])
    assert done.restored == [f"trial {number}" for number in range(4)] + ["baseline mae-0"]
    again = StudyStore.open(store.folder)
    assert summary(again) == before
    current = status(again)
    assert current["states"] == {"COMPLETE": 1, "PRUNED": 1, "FAIL": 1, "INTERRUPTED": 1}
    assert current["budget"]["hours"]["used"] == 0.5
    assert current["budget"]["trials"]["used"] == 4
    (first, *_) = trial_records(again.search())
    assert first.rungs == {2: 0.4, 4: 0.5}
    assert (first.cost("seconds"), first.cost("epochs")) == (10.0, 4)
    assert enqueue(again, again.config(), {"ratio.start": 0.3}) == 4
    assert not repair(StudyStore.open(store.folder)).restored, "there is nothing left to repair"


def test_a_file_of_the_trial_as_it_was_stored_restores_it_to_the_digit(store: StudyStore) -> None:
    for record in trial_records(store.search()):
        write_trial_file(store.folder_of(record), record.frozen)
    before = [trial.frozen for trial in trial_records(store.search())[:3]]
    lose(store)
    repair(StudyStore.open(store.folder))
    after = [trial.frozen for trial in trial_records(StudyStore.open(store.folder).search())[:3]]
    for old, new in zip(before, after, strict=True):
        assert (old.values, old.params, old.distributions) == (
            new.values,
            new.params,
            new.distributions,
        )
        assert (old.datetime_start, old.datetime_complete) == (
            new.datetime_start,
            new.datetime_complete,
        )
        assert old.user_attrs == new.user_attrs


def test_a_changed_trial_file_is_not_believed(store: StudyStore) -> None:
    (record, *_) = trial_records(store.search())
    folder = store.folder_of(record)
    write_trial_file(folder, record.frozen)
    file = folder / TRIAL_FILE
    file.write_bytes(file.read_bytes().replace(b'"values":[0.5]', b'"values":[0.9]'))
    lose(store)
    repair(StudyStore.open(store.folder))
    assert trial_records(StudyStore.open(store.folder).search())[0].values == [0.5]


def test_a_trial_without_record_and_folder_keeps_its_number_and_uses_no_budget(
    store: StudyStore,
) -> None:
    shutil.rmtree(store.trial_folder(1))
    lose(store)
    done = repair(StudyStore.open(store.folder))
    assert done.gone == [1]
    again = StudyStore.open(store.folder)
    assert [r.number for r in trial_records(again.search()) if r.counts_in_budget] == [0, 2, 3]
    assert trial_records(again.search())[1].reason == "nothing is left of it but its number"


def test_parameters_that_cannot_be_known_are_said_to_be_unknown(store: StudyStore) -> None:
    (store.trial_folder(0) / "config.yaml").unlink()
    lose(store)
    done = repair(StudyStore.open(store.folder))
    assert any("trial 0: its files do not say its parameters" in note for note in done.notes)
    assert trial_records(StudyStore.open(store.folder).search())[0].outside is not None


def test_open_test_images_stay_open_after_a_repair(store: StudyStore) -> None:
    folder = store.confirm_folder("mae", 0)
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("epochs: 4\n")
    (folder / "score.json").write_text('{"epoch": 4, "dsc": 0.4}')
    (folder / "test.json").write_text("{}")
    lose(store)
    repair(StudyStore.open(store.folder))
    unlock = find_test_unlock(StudyStore.open(store.folder))
    assert unlock is not None
    assert unlock.candidates == ["mae"]
    assert unlock.runs == {"mae-0": "confirm/mae-0"}


def test_a_journal_cut_short_is_completed_and_the_old_one_kept(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    for number in range(3):
        add(store, {"ratio.start": 0.2 + number / 10, "selection.mode": "hard"}, 0.5)
        write_files(store, trial_records(store.search())[-1], epochs=4)
    before = summary(store)
    journal = store.folder / "study.journal"
    lines = journal.read_bytes().splitlines(keepends=True)
    shortened = b"".join(lines[:-1])
    journal.write_bytes(shortened)
    done = repair(StudyStore.open(store.folder))
    assert (done.kept, done.restored) == (2, ["trial 2"])
    assert done.copy is not None
    assert Path(done.copy).read_bytes() == shortened
    assert summary(StudyStore.open(store.folder)) == before


def test_trials_without_a_study_file_are_not_begun_anew(store: StudyStore) -> None:
    config = store.config()
    (store.folder / "study.yaml").unlink()
    with pytest.raises(StudyError, match=r"holds trials, but no study\.yaml"):
        StudyStore.open(store.folder)
    with pytest.raises(StudyError, match=r"holds trials, but no study\.yaml"):
        enqueue(StudyStore(store.folder), config, {"ratio.start": 0.3})


def test_a_study_without_its_storage_can_be_deleted(store: StudyStore) -> None:
    lose(store)
    delete(StudyStore.open(store.folder))
    assert not store.folder.exists()


def test_a_lost_id_is_found_in_the_journal(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    owner = store.read_id()
    (store.folder / "id").unlink()
    with StudyStore.open(store.folder).lock():
        assert store.read_id() == owner


def test_a_lost_name_of_the_changed_search_is_found_in_the_storage(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    add(store)
    wider = {**TINY["space"], "ratio.start": {"low": 0.1, "high": 0.6}}
    version = migrate(
        store, build(StudyConfig, {**TINY, "space": wider}, "wider"), Change()
    ).version
    (store.folder / "search").unlink()
    with pytest.raises(StudyError, match=f"lost its file `search`, which names {version}"):
        status(StudyStore.open(store.folder))
    repair(StudyStore.open(store.folder))
    assert StudyStore.open(store.folder).search_name() == version
    assert status(StudyStore.open(store.folder))["states"] == {"COMPLETE": 1}


def test_a_repair_keeps_the_search_before_its_space_was_changed(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    add(store)
    wider = {**TINY["space"], "ratio.start": {"low": 0.1, "high": 0.6}}
    version = migrate(
        store, build(StudyConfig, {**TINY, "space": wider}, "wider"), Change()
    ).version
    journal = store.folder / "study.journal"
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join([*lines[:-1], b"what is this\n", lines[-1]]))
    repair(StudyStore.open(store.folder))
    storage = StudyStore.open(store.folder).storage()
    trials = {
        study.study_name: len(
            optuna.load_study(study_name=study.study_name, storage=storage).trials
        )
        for study in storage.get_all_studies()
    }
    assert trials["tiny"] == 1
    assert trials[version] == 1
