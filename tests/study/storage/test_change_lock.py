"""Changes of a study by several processes at once add up; nobody sees half of one."""

from __future__ import annotations

import multiprocessing
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from helpers.studies import add, make_store

from amlp_ray.errors import AmlpError, StudyError
from amlp_ray.study.operations.edit import delete, enqueue, extend
from amlp_ray.study.operations.status import status
from amlp_ray.study.storage.change_lock import BusyStudyError
from amlp_ray.study.storage.study_store import StudyStore

Change = Callable[[StudyStore], Any]
AT_ONCE = 4  # processes for each change
DEADLINE_S = 60


def more_trials(store: StudyStore) -> str:
    extend(store, trials="+1")
    return "extended"


def one_enqueued(store: StudyStore) -> str:
    enqueue(store, store.config(), {"ratio.start": 0.3})
    return "enqueued"


def deleted(store: StudyStore) -> str:
    delete(store)
    return "deleted"


def at_once(folder: Path, changes: Sequence[Change]) -> list[str]:
    """Make changes in processes of their own, released by a barrier; what each was told."""
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(AT_ONCE * len(changes))
    answers: Any = context.Queue()

    def run(change: Change) -> None:
        store = StudyStore.open(folder)
        barrier.wait(DEADLINE_S)
        try:
            answers.put(change(store))
        except AmlpError:
            answers.put("refused")
        except BaseException as error:
            answers.put(repr(error))

    processes = [
        context.Process(target=run, args=(change,), daemon=True) for change in changes * AT_ONCE
    ]
    for process in processes:
        process.start()
    told = [answers.get(timeout=DEADLINE_S) for _ in processes]
    for process in processes:
        process.join(DEADLINE_S)
    return told


@pytest.mark.parametrize("storage", [None, "sqlite:///trials.db"], ids=["journal", "sqlite"])
def test_extensions_and_enqueued_trials_add_up(tmp_path: Path, storage: str | None) -> None:
    store = make_store(tmp_path, storage=storage, budget={"trials": 3})
    told = at_once(store.folder, (more_trials, one_enqueued))
    assert sorted(told) == ["enqueued"] * AT_ONCE + ["extended"] * AT_ONCE
    again = StudyStore.open(store.folder)
    assert again.config().budget.trials == 3 + AT_ONCE
    assert again.search().user_attrs["budget"]["trials"] == 3 + AT_ONCE
    assert again.search().user_attrs["extended"]["from"]["trials"] == 3
    assert [trial.number for trial in again.search().trials] == list(range(AT_ONCE))


def test_a_study_is_deleted_as_a_whole_whatever_else_is_asked(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    add(store)
    told = at_once(store.folder, (deleted, one_enqueued))
    assert told.count("deleted") == 1
    assert set(told) <= {"deleted", "enqueued", "refused"}
    assert list(tmp_path.iterdir()) == []


def test_readers_hold_up_nobody_and_take_only_the_driver_for_one(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    over = threading.Event()
    seen: set[str | None] = set()

    def look() -> None:
        reader = StudyStore.open(store.folder)
        while not over.is_set():
            seen.add(reader.holder())

    readers = [threading.Thread(target=look) for _ in range(3)]
    for reader in readers:
        reader.start()
    try:
        for _ in range(5):
            with store.lock():
                pass
    finally:
        over.set()
        for reader in readers:
            reader.join()
    with store.lock():
        driver = StudyStore.open(store.folder).holder()
    assert seen <= {None, driver, "another process"}  # the last before it has written its name


def test_a_change_inside_of_a_change_waits_for_nobody_and_another_thread_does(
    tmp_path: Path,
) -> None:
    store = make_store(tmp_path)
    with store.transaction():
        assert extend(store, trials="+1").trials == 4
        with (
            pytest.raises(BusyStudyError, match="is being changed by process"),
            StudyStore.open(store.folder).transaction(wait_s=0.05),
        ):
            pass


def test_a_study_that_was_begun_anew_meanwhile_is_not_changed_by_mistake(tmp_path: Path) -> None:
    old = StudyStore.open(make_store(tmp_path).folder)
    delete(StudyStore.open(old.folder))
    with pytest.raises(StudyError, match="deleted or moved meanwhile"):
        extend(old, trials="+1")
    make_store(tmp_path)
    with pytest.raises(StudyError, match="was deleted and begun anew meanwhile"):
        extend(old, trials="+1")
    assert status(StudyStore.open(old.folder))["budget"]["trials"]["allowed"] == 3


def test_every_request_is_answered_also_of_several_at_once(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    assert store.request("stop") is None, "nobody runs it"
    heard: list[str] = []
    with store.lock():
        first = store.request("pause")
        second = store.request("cancel")
        assert first is not None
        assert second is not None
        assert not store.is_answered(first)
        store.answer_requests(lambda request: heard.append(request["verb"]))
        assert store.is_answered(first)
        assert store.is_answered(second)
    assert heard == ["pause", "cancel"]
    with store.lock():
        store.answer_requests(lambda request: heard.append(request["verb"]))
    assert heard == ["pause", "cancel"], "requests to an earlier run are not obeyed"
