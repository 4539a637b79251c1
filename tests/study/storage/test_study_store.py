"""The study's folder and storage: who holds it, what was asked of them, and that a look changes
nothing."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import time
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from amlp_ray.config import StudyConfig
from amlp_ray.config.base import build
from amlp_ray.config.yaml_file import write_yaml
from amlp_ray.errors import StudyError
from amlp_ray.study.storage.lease import EXPIRES_S, Lease
from amlp_ray.study.storage.study_store import StudyStore


@pytest.fixture
def store(tmp_path: Path) -> StudyStore:
    folder = tmp_path / "s"
    folder.mkdir()
    write_yaml(build(StudyConfig, {"name": "s"}, "s"), folder / "study.yaml")
    return StudyStore(folder)


def hold(folder: Path, ready: Connection) -> None:
    with StudyStore(folder).lock():
        ready.send("held")
        time.sleep(60)


@pytest.fixture
def holder(store: StudyStore) -> multiprocessing.process.BaseProcess:
    """Another process that runs the study."""
    receiver, sender = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(
        target=hold, args=(store.folder, sender), daemon=True
    )
    process.start()
    assert receiver.recv() == "held"
    return process


def test_a_second_driver_is_told_who_holds_the_study(
    store: StudyStore, holder: multiprocessing.process.BaseProcess
) -> None:
    assert store.holder() == f"process {holder.pid} on {os.uname().nodename}"
    with pytest.raises(StudyError, match=rf"already run by process {holder.pid} on"), store.lock():
        pass


def test_a_killed_driver_leaves_the_study_free_at_once(
    store: StudyStore, holder: multiprocessing.process.BaseProcess
) -> None:
    holder.kill()
    holder.join()
    assert store.holder() is None
    with store.lock() as lease:
        assert lease.renew()


def test_a_driver_on_another_machine_holds_the_study_until_its_lease_passes(
    store: StudyStore,
) -> None:
    with store.lock():
        pass
    lease = {
        "id": "x",
        "holder": "process 1 on elsewhere",
        "host": "elsewhere",
        "pid": 1,
        "seconds": 7.0,
        "over": False,
    }
    study = store.search()
    study.set_user_attr("lease", lease | {"at": time.time() - EXPIRES_S / 2})
    assert store.holder() == "process 1 on elsewhere"
    with pytest.raises(StudyError, match="process 1 on elsewhere"), store.lock():
        pass
    study.set_user_attr("lease", lease | {"at": time.time() - EXPIRES_S - 1})
    assert store.holder() is None
    with store.lock() as lock:
        assert lock.seconds >= 7.0, "hours of the budget are counted over all runs"


def test_a_lease_that_was_taken_over_is_not_renewed(store: StudyStore) -> None:
    with store.lock() as lease:
        study = store.search()
        study.set_user_attr("lease", study.user_attrs["lease"] | {"id": "another"})
        assert not lease.renew()
        lease.release()
        assert store.search().user_attrs["lease"]["id"] == "another"


def test_of_two_who_take_a_free_lease_at_once_one_has_it(
    store: StudyStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = store.search(create=True)

    def other(seconds: float) -> None:  # writes while we wait to see
        study.set_user_attr(
            "lease", study.user_attrs["lease"] | {"id": "x", "host": "elsewhere", "holder": "they"}
        )

    monkeypatch.setattr("amlp_ray.study.storage.lease.time.sleep", other)
    with pytest.raises(StudyError, match="taken by they"):
        Lease(study, wait=True)


def test_a_look_at_a_study_that_was_not_begun_writes_nothing(store: StudyStore) -> None:
    assert store.search().trials == store.baselines().trials == store.confirmation().trials == []
    assert store.holder() is None
    assert sorted(p.name for p in store.folder.iterdir()) == ["study.yaml"]


def test_a_request_is_there_for_the_driver_until_it_answers(store: StudyStore) -> None:
    with store.lock():
        store.request("pause")
        request = StudyStore(store.folder).last_request()
    assert request is not None
    assert request["verb"] == "pause"
    assert "answer" not in request


def test_a_look_before_there_is_a_study_does_not_settle_where_it_is_kept(tmp_path: Path) -> None:
    store = StudyStore(tmp_path / "s")
    assert store.search().trials == []
    store.folder.mkdir()
    config = build(StudyConfig, {"name": "s", "storage": f"sqlite:///{tmp_path}/s.db"}, "s")
    write_yaml(config, store.folder / "study.yaml")
    with store.lock():
        pass
    assert (tmp_path / "s.db").is_file()
    assert not (store.folder / "study.journal").exists()


def test_a_look_at_a_study_leaves_no_empty_database(tmp_path: Path) -> None:
    store = StudyStore(tmp_path / "s")
    store.folder.mkdir()
    config = build(StudyConfig, {"name": "s", "storage": "sqlite:///trials.db"}, "s")
    write_yaml(config, store.folder / "study.yaml")
    assert store.search().trials == store.baselines().trials == []
    assert store.holder() is None
    assert [path.name for path in store.folder.iterdir() if "db" in path.name] == []
    with store.lock():
        pass
    assert (store.folder / "trials.db").is_file()


def test_the_time_of_a_confirmation_does_not_count(
    store: StudyStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    with store.lock(counted=False) as lease:
        monkeypatch.setattr("amlp_ray.study.storage.lease.time.monotonic", lambda: 1e9)
        assert lease.seconds == 0


def test_a_study_may_be_moved(store: StudyStore, tmp_path: Path) -> None:
    with store.lock():
        store.search().set_user_attr("a", 1)
    moved = shutil.move(store.folder, tmp_path / "other")
    assert StudyStore.open(moved).search().user_attrs["a"] == 1


def test_a_database_with_a_study_of_that_name_from_another_folder_is_refused(
    tmp_path: Path,
) -> None:
    stores = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        config = build(StudyConfig, {"name": "s", "storage": f"sqlite:///{tmp_path}/all.db"}, "s")
        write_yaml(config, tmp_path / name / "study.yaml")
        stores.append(StudyStore(tmp_path / name, "s"))
    with stores[0].lock():
        pass
    with pytest.raises(StudyError, match="holds a study 's' of another folder"), stores[1].lock():
        pass


@pytest.mark.parametrize("written", [None, "0", "99"])
def test_a_folder_of_another_format_is_refused_in_one_sentence(
    store: StudyStore, written: str | None
) -> None:
    store.search(create=True)
    file = store.folder / "format"
    file.unlink()
    if written is not None:
        file.write_text(written)
    with pytest.raises(
        StudyError, match=rf"has study format '{written or 0}', and this"
    ) as refused:
        StudyStore.open(store.folder)
    assert "\n" not in str(refused.value)
