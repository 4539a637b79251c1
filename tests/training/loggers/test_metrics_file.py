"""metrics.jsonl as others read it: while it grows, after a kill, and when epochs are done again."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest

from amlp_ray.training.loggers.metrics_file import (
    RowTail,
    append_row,
    drop_after,
    own_rows,
    read_rows,
)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "metrics.jsonl"


def write(file: Path, *epochs: int, **more: object) -> None:
    for epoch in epochs:
        append_row(file, {"epoch": epoch, **more})


def test_a_line_cut_short_is_left_out_until_it_is_whole(file: Path) -> None:
    assert read_rows(file) == []
    write(file, 1)
    with file.open("a") as half:
        half.write('{"epoch": 2')
    assert read_rows(file) == [{"epoch": 1}]
    with file.open("a") as rest:
        rest.write("}\n")
    assert read_rows(file) == [{"epoch": 1}, {"epoch": 2}]


@pytest.mark.parametrize(
    "damage",
    [
        b'{"epoch": 2, "loss"\n',
        b"\xff\xfe\x00\n",
        b"null\n",
        b"[" * 5000 + b"\n",
        b'{"loss": 1.0}\n',
        b'{"epoch": "two"}\n',
        b'{"epoch": true}\n',
        b'{"epoch": 2, "seconds": "fast"}\n',
        b'{"epoch": 1, "loss": 9.0}\n',
    ],
)
def test_a_damaged_line_is_skipped_and_named_and_the_others_are_read(
    file: Path, damage: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    write(file, 1, loss=1.0)
    with file.open("ab") as damaged:
        damaged.write(damage)
    write(file, 3, loss=0.5)
    assert [(row["epoch"], row["loss"]) for row in read_rows(file)] == [(1, 1.0), (3, 0.5)]
    assert str(file) in caplog.text


def test_a_file_with_a_damaged_line_is_kept_before_it_is_written_anew(file: Path) -> None:
    write(file, 1)
    with file.open("ab") as damaged:
        damaged.write(b"\x00\x00\n")
    write(file, 3)
    before = file.read_bytes()
    assert drop_after(file, 1) == ([{"epoch": 1}], [{"epoch": 3}])
    (copy,) = file.parent.glob("metrics.jsonl.damaged-*")
    assert copy.read_bytes() == before


def test_epochs_after_the_checkpoint_are_dropped_and_returned(file: Path) -> None:
    write(file, 1, 2, 3)
    assert drop_after(file, 1) == ([{"epoch": 1}], [{"epoch": 2}, {"epoch": 3}])
    assert read_rows(file) == [{"epoch": 1}]


def test_inherited_epochs_are_not_a_runs_own(file: Path) -> None:
    write(file, 1, inherited=True)
    write(file, 2)
    assert own_rows(read_rows(file)) == [{"epoch": 2}]


def test_new_rows_are_handed_on_once_also_where_epochs_are_done_again(file: Path) -> None:
    message: list[int] = []
    rows = RowTail(file, lambda row: message.append(row["epoch"]))
    rows.poll()
    assert (message, rows.epoch) == ([], 0)
    write(file, 1, 2)
    rows.poll()
    rows.poll()
    assert (message, rows.epoch) == ([1, 2], 2)
    drop_after(file, 1)
    write(file, 2, 3)
    rows.poll()
    assert (message, rows.epoch) == ([1, 2, 3], 3)


def test_a_disk_that_is_away_is_no_news(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    message: list[int] = []
    rows = RowTail(file, lambda row: message.append(row["epoch"]))
    write(file, 1)
    stat = Path.stat

    def away(path: Path, **overrides: Any) -> Any:
        raise OSError(errno.ESTALE, "Stale file handle", str(path))

    monkeypatch.setattr(Path, "stat", away)
    rows.poll()
    assert message == []
    monkeypatch.setattr(Path, "stat", stat)
    rows.poll()
    assert message == [1]


def test_rows_that_were_there_or_are_a_parents_are_not_new(file: Path) -> None:
    write(file, 1)
    message: list[int] = []
    rows = RowTail(file, lambda row: message.append(row["epoch"]))
    write(file, 2, inherited=True)
    write(file, 3)
    rows.poll()
    assert message == [3]


def test_a_changed_value_and_a_missing_row_are_told(
    file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(file, 1, 2, 3, loss=0.5)
    lines = file.read_text().splitlines(keepends=True)
    file.write_text(lines[0] + lines[1].replace("0.5", "0.4") + lines[2])
    assert read_rows(file) == [{"epoch": 1, "loss": 0.5}, {"epoch": 3, "loss": 0.5}]
    assert "the row of epoch 2 is skipped: it was changed" in caplog.text
    assert "the row of epoch 2 is missing" in caplog.text
