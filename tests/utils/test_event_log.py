from __future__ import annotations

import errno
import logging
import time
from pathlib import Path

import pytest

from amlp_ray.utils.event_log import EventLog, EventTail, count_events, read_events


def test_events_are_lines_with_their_time_and_facts_and_are_counted(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    before = time.time()
    for log in (EventLog(tmp_path / "run"), EventLog(tmp_path / "run")):  # after a restart
        log.record("started", workers=2, epoch=0, repeated=0)
        log.record("worker lost", "A worker was lost.")
    events = read_events(tmp_path / "run")
    assert [event["event"] for event in events] == ["started", "worker lost"] * 2
    assert events[0] | {"time": 0} == {
        "time": 0,
        "event": "started",
        "text": "",
        "workers": 2,
        "epoch": 0,
        "repeated": 0,
    }
    assert all(before - 1 < event["time"] <= time.time() + 1 for event in events)
    assert count_events(tmp_path / "run") == {"started": 2, "worker lost": 2}


def test_only_what_has_a_sentence_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="amlp_ray"):
        EventLog(tmp_path).record("started", workers=1)
        EventLog(tmp_path).record("storage", "The disk is full.")
    assert [(record.levelname, record.message) for record in caplog.records] == [
        ("WARNING", "The disk is full.")
    ]


def test_events_that_their_disk_does_not_take_are_kept_and_written_later_in_order(
    tmp_path: Path,
) -> None:
    log = EventLog(tmp_path)
    log.record("started")
    path = tmp_path / "events.jsonl"
    path.rename(tmp_path / "aside")
    path.mkdir()  # takes no line
    log.record("storage", "first")
    log.record("storage", "second")
    path.rmdir()
    (tmp_path / "aside").rename(path)
    log.record("preempted")
    assert [event["text"] or event["event"] for event in read_events(tmp_path)] == [
        "started",
        "first",
        "second",
        "preempted",
    ]


def test_a_folder_that_is_away_is_not_made_anew_and_gets_its_events_when_it_is_back(
    tmp_path: Path,
) -> None:
    (tmp_path / "run").mkdir()
    log = EventLog(tmp_path / "run")
    log.record("started")
    (tmp_path / "run").rename(tmp_path / "away")
    log.record("storage", "The folder is away.")
    (tmp_path / "away").rename(tmp_path / "run")
    log.record("preempted")
    assert count_events(tmp_path / "run") == {"started": 1, "storage": 1, "preempted": 1}


def test_a_line_cut_short_by_a_kill_is_left_out(tmp_path: Path) -> None:
    assert read_events(tmp_path) == []
    EventLog(tmp_path).record("started")
    with (tmp_path / "events.jsonl").open("a") as file:
        file.write('{"time": 1, "eve')
    assert count_events(tmp_path) == {"started": 1}


def test_what_workers_note_is_said_once_by_another_process(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    worker = EventLog(tmp_path, log_messages=False)
    worker.record("storage", "long ago")
    tail = EventTail(tmp_path)
    worker.record("started", workers=2)
    worker.record("storage", "The disk is full.")
    assert caplog.messages == []
    for _ in range(2):
        tail.log_new()
    assert caplog.messages == ["The disk is full."]


def test_what_was_said_is_not_said_again_after_the_disk_was_away(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    tail, worker = EventTail(tmp_path / "run"), EventLog(tmp_path / "run", log_messages=False)
    (tmp_path / "run").mkdir()
    worker.record("storage", "once")
    tail.log_new()
    (tmp_path / "run").rename(tmp_path / "away")
    tail.log_new()
    (tmp_path / "away").rename(tmp_path / "run")
    with monkeypatch.context() as broken:
        broken.setattr(Path, "read_text", stale)
        tail.log_new()
    worker.record("storage", "twice")
    tail.log_new()
    assert caplog.messages == ["once", "twice"]


def stale(path: Path) -> str:
    raise OSError(errno.ESTALE, "Stale file handle", str(path))
