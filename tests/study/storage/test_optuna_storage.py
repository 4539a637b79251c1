"""Journals and databases: half a line, a full disk and a server that is gone lose nothing;
passwords show nowhere."""

from __future__ import annotations

import logging
import os
import threading
import time
from pathlib import Path
from typing import Any

import optuna
import pytest
from helpers.database import Postgres
from optuna.testing.pytest_storages import StorageTestCase
from optuna.trial import TrialState

from amlp_ray.errors import StudyError
from amlp_ray.study.storage.journal import Journal
from amlp_ray.study.storage.optuna_storage import (
    RetryingStorage,
    expand_variables,
    open_database,
    open_journal,
    sqlite_file,
    without_secrets,
)


@pytest.fixture(params=["journal", "sqlite", "postgresql"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> optuna.storages.BaseStorage:
    if request.param == "journal":
        return open_journal(tmp_path / "study.journal")
    if request.param == "sqlite":
        return open_database("sqlite:///study.db", tmp_path)
    return open_database(request.getfixturevalue("server").url, tmp_path)


def new_trial(**values: Any) -> optuna.trial.FrozenTrial:
    trial = optuna.trial.create_trial(
        state=TrialState.RUNNING,
        params={"x": 0.5},
        distributions={"x": optuna.distributions.FloatDistribution(0, 1)},
    )
    trial.user_attrs.update(values)
    return trial


def test_every_storage_keeps_a_trial_as_it_was_stored_and_told(
    storage: optuna.storages.BaseStorage,
) -> None:
    name = f"s{time.time_ns()}"
    study = optuna.create_study(
        study_name=name, storage=storage, directions=["maximize", "minimize"]
    )
    trial_id = storage.create_new_trial(study._study_id, new_trial(baseline="mae"))
    storage.set_trial_intermediate_value(trial_id, 10, 0.4)
    storage.set_trial_user_attr(trial_id, "stats", {"seconds": 1.5, "scores": {"dsc": 0.4}})
    storage.set_trial_state_values(trial_id, TrialState.COMPLETE, [0.4, 3.0])
    study.set_user_attr("lease", {"at": 1.0})
    (stored,) = optuna.load_study(study_name=name, storage=storage).trials
    assert (stored.number, stored.state, stored.values, stored.params) == (
        0,
        TrialState.COMPLETE,
        [0.4, 3.0],
        {"x": 0.5},
    )
    assert stored.intermediate_values == {10: 0.4}
    assert stored.user_attrs == {
        "baseline": "mae",
        "stats": {"seconds": 1.5, "scores": {"dsc": 0.4}},
    }
    assert study.user_attrs["lease"] == {"at": 1.0}


def test_half_a_line_of_a_killed_writer_is_cut_off_by_the_next(tmp_path: Path) -> None:
    journal = tmp_path / "study.journal"
    storage = open_journal(journal)
    study = optuna.create_study(study_name="s", storage=storage)
    storage.create_new_trial(study._study_id, new_trial())
    whole = journal.read_bytes()
    journal.write_bytes(whole + b'{"op_code":4,"worker_id":"half')
    again = open_journal(journal)
    study = optuna.load_study(study_name="s", storage=again)
    again.create_new_trial(study._study_id, new_trial())
    assert len(optuna.load_study(study_name="s", storage=open_journal(journal)).trials) == 2
    assert journal.read_bytes().startswith(whole)


def test_a_journal_of_one_half_line_is_an_empty_one(tmp_path: Path) -> None:
    (tmp_path / "study.journal").write_bytes(b'{"op_co')
    study = optuna.create_study(study_name="s", storage=open_journal(tmp_path / "study.journal"))
    assert study.trials == []


def test_a_writer_killed_while_it_holds_the_lock_keeps_nobody_waiting(tmp_path: Path) -> None:
    journal = tmp_path / "study.journal"
    study = optuna.create_study(study_name="s", storage=open_journal(journal))
    if (child := os.fork()) == 0:
        import fcntl

        file = journal.with_name(".study.journal.lock").open("a")
        fcntl.flock(file, fcntl.LOCK_EX)
        os.kill(os.getpid(), 9)
    os.waitpid(child, 0)
    started = time.monotonic()
    study.set_user_attr("a", 1)
    assert time.monotonic() - started < 5, "Optuna's own lock would hold for 30 s"


class Flaky:
    """Fails a call before or after it was done, as a lost connection does."""

    def __init__(self, inner: Any, name: str, *, done: bool) -> None:
        self._inner, self._name, self._done, self.failed = inner, name, done, False

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._inner, name)
        if name != self._name or self.failed:
            return method

        def call(*args: Any, **named: Any) -> Any:
            self.failed = True
            if self._done:
                method(*args, **named)
            raise ConnectionResetError("gone")

        return call


@pytest.mark.parametrize("done", [False, True], ids=["before it was stored", "after it was stored"])
@pytest.mark.parametrize(
    "name", ["create_new_trial", "set_trial_state_values", "set_trial_user_attr"]
)
def test_a_call_whose_answer_is_lost_is_made_once(name: str, done: bool) -> None:
    inner = optuna.storages.InMemoryStorage()
    flaky = Flaky(inner, name, done=done)
    storage = RetryingStorage(flaky, 5)  # type: ignore[arg-type]
    study = optuna.create_study(storage=storage)
    trial_id = storage.create_new_trial(study._study_id, new_trial())
    storage.set_trial_user_attr(trial_id, "a", 1)
    storage.set_trial_state_values(trial_id, TrialState.COMPLETE, [0.5])
    assert flaky.failed
    (trial,) = study.trials
    assert (trial.state, trial.value, trial.user_attrs) == (TrialState.COMPLETE, 0.5, {"a": 1})


def test_a_trial_is_not_told_twice_by_mistake() -> None:
    storage = RetryingStorage(optuna.storages.InMemoryStorage(), 5)
    study = optuna.create_study(storage=storage)
    trial_id = storage.create_new_trial(study._study_id, new_trial())
    storage.set_trial_state_values(trial_id, TrialState.COMPLETE, [0.5])
    with pytest.raises(optuna.exceptions.UpdateFinishedTrialError):
        storage.set_trial_state_values(trial_id, TrialState.COMPLETE, [0.6])


def test_retrying_ends_with_a_sentence() -> None:
    class Gone:
        def get_all_studies(self) -> None:
            raise ConnectionRefusedError(111, "Connection refused")

    with pytest.raises(
        StudyError, match=r"cannot be reached for 0\.3 s \(Connection refused\); check it"
    ):
        RetryingStorage(Gone(), 0.3).get_all_studies()  # type: ignore[arg-type]


def test_an_error_that_will_not_pass_is_not_waited_for() -> None:
    with pytest.raises(KeyError):
        RetryingStorage(optuna.storages.InMemoryStorage(), 60).get_study_id_from_name("none")


@pytest.mark.timeout(120)
def test_a_database_that_is_restarted_is_waited_for(
    server: Postgres, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "amlp_ray")
    storage = open_database(server.url, Path(), retry_seconds=60)
    study = optuna.create_study(study_name=f"s{time.time_ns()}", storage=storage)
    trial_id = storage.create_new_trial(study._study_id, new_trial())
    server.stop()
    threading.Timer(3, server.start).start()
    storage.set_trial_intermediate_value(trial_id, 1, 0.25)
    storage.create_new_trial(study._study_id, new_trial())
    assert [t.intermediate_values for t in study.trials] == [{1: 0.25}, {}]
    lines = caplog.messages
    assert lines[0].startswith("the study's storage postgresql://127.0.0.1:")
    assert lines[-1] == "the study's storage is back"
    assert Postgres.password not in "".join(lines)


def test_a_password_shows_in_no_message(server: Postgres, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AMLP_TEST_PASSWORD", "wrong word")
    with pytest.raises(StudyError) as refused:
        open_database(server.url, Path())
    assert "wrong" not in str(refused.value)
    assert f"postgresql://127.0.0.1:{server.port}/postgres cannot be opened" in str(refused.value)


def test_a_name_that_is_not_in_the_environment_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NOT_SET", raising=False)
    with pytest.raises(StudyError, match=r"storage names \$\{NOT_SET\}, which is not set"):
        open_database("postgresql://me:${NOT_SET}@host/db", Path())


@pytest.mark.parametrize("url", ["postgresql://me@host:port/x", "postgresql+nodriver://me@host/x"])
def test_a_url_that_is_none_is_told_in_a_sentence(url: str) -> None:
    with pytest.raises(StudyError, match="cannot be opened"):
        open_database(url, Path())


@pytest.mark.parametrize(
    ("url", "file"),
    [
        ("sqlite:///trials.db", "/studies/s/trials.db"),
        ("sqlite:///./trials of 100%.db", "/studies/s/trials of 100%.db"),
        ("sqlite:///trials%20of%202026.db", "/studies/s/trials of 2026.db"),
        ("sqlite+pysqlite:///sub/trials.db?timeout=5", "/studies/s/sub/trials.db"),
        ("sqlite:///../shared.db", "/studies/s/../shared.db"),
        ("sqlite:////data/trials.db", "/data/trials.db"),
        ("sqlite:///~/trials.db", "/home/me/trials.db"),
        ("sqlite:///${FOLDER}/trials.db", "/data/a b?/trials.db"),
        ("postgresql://me@host/db", None),
    ],
)
def test_a_sqlite_file_lies_in_the_studys_folder_unless_it_is_named_from_the_root_on(
    url: str, file: str | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("FOLDER", "/data/a b?")
    assert sqlite_file(url, Path("/studies/s")) == (None if file is None else Path(file))


def test_a_sqlite_file_is_the_same_from_any_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "what? {100%}"
    folder.mkdir()
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        storage = open_database("sqlite:///trials of 100%.db", Path("..") / folder.name)
        optuna.create_study(study_name=name, storage=storage)
    assert {study.study_name for study in storage.get_all_studies()} == {"one", "two"}
    assert [path.name for path in folder.iterdir()] == ["trials of 100%.db"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "two", folder.name]
    assert not [*(tmp_path / "one").iterdir(), *(tmp_path / "two").iterdir()]


def test_a_variable_that_makes_a_database_of_memory_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("FILE", "")
    with pytest.raises(StudyError, match=r"storage sqlite:///\$\{FILE\}: the URL names no SQLite"):
        open_database("sqlite:///${FILE}", tmp_path)


def test_a_short_write_leaves_no_half_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = tmp_path / "study.journal"
    storage = open_journal(journal)
    study = optuna.create_study(study_name="s", storage=storage)
    whole = journal.read_bytes()

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("amlp_ray.study.storage.journal.os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        Journal(journal).append_logs([{"op_code": 1}])
    assert journal.read_bytes() == whole
    monkeypatch.undo()
    study.set_user_attr("a", 1)
    assert optuna.load_study(study_name="s", storage=open_journal(journal)).user_attrs == {"a": 1}


def test_values_of_the_environment_are_quoted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORD", "a/b@c:d e")
    url = expand_variables("postgresql://me:${WORD}@host/db")
    assert url == "postgresql://me:a%2Fb%40c%3Ad%20e@host/db"
    url = without_secrets("mysql+pymysql://me:${WORD}@host:3306/db?ssl=1")
    assert url == "mysql+pymysql://host:3306/db"


class TestJournalAsOptunaRequires(StorageTestCase):
    """Optuna's own tests of a storage, on our journal."""

    @pytest.fixture
    def storage(self, tmp_path: Path) -> optuna.storages.BaseStorage:
        return optuna.storages.JournalStorage(Journal(tmp_path / "study.journal"))
