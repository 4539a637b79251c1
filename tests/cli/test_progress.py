"""The progress line, on terminals of several widths and in a pipe."""

from __future__ import annotations

import io
import os
import re
from typing import Any

import pytest

from amlp_ray.cli import progress
from amlp_ray.cli.progress import Progress, fitted, told

FULL = {
    "epoch": 12,
    "loss": 0.21341,
    "loss_reference": 0.30214,
    "ratio": 0.412,
    "lesion_cluster_share": 0.0613,
    "lr": 8.1e-4,
    "grad_norm": 0.314,
    "images_per_second": 4130.2,
    "images_per_second_per_worker": 2065.1,
    "workers": 2,
    "mfu": 0.342,
    "memory": 1.24,
    "wait_share": 0.021,
    "seconds": 8.0,
    "evaluate_seconds": 2.0,
}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True

    def last_line(self) -> str:
        """What stands in the last line that is not empty."""
        return re.split(r"[\r\n]+", self.getvalue().rstrip())[-1].rstrip()


def of_width(monkeypatch: pytest.MonkeyPatch, columns: int) -> None:
    monkeypatch.setattr(
        progress.shutil, "get_terminal_size", lambda: os.terminal_size((columns, 24))
    )


def after(epoch: int, **more: Any) -> dict[str, Any]:
    return FULL | {"epoch": epoch} | more


def test_every_figure_stands_in_a_line_that_has_room() -> None:
    assert ", ".join(told(FULL, 100, 880.0).values()) == (
        "epoch 12/100, loss 0.2134, reference 0.3021, ratio 0.41, lesion 6.1%, lr 8.1e-04, grad 0.31, 4,130 img/s, "
        "2,065 per worker, MFU 34%, 1.2 GB, waiting 2%, 14m 40s left"
    )


def test_what_is_missing_is_left_out() -> None:
    simsiam = {
        "epoch": 1,
        "loss": -0.5,
        "ratio": 0.0,
        "images_per_second": 9.97,
        "mfu": None,
        "seconds": 1.0,
    }
    assert (
        ", ".join(told(simsiam, 2, 1.0).values())
        == "epoch 1/2, loss -0.5000, ratio 0.00, 10.0 img/s, 1s left"
    )


def test_one_worker_is_not_told_twice() -> None:
    assert "per worker" not in ", ".join(told(FULL | {"workers": 1}, 100, 0.0).values())


@pytest.mark.parametrize("columns", [60, 80, 100, 120, 160, 200])
def test_a_line_fits_the_terminal_and_says_what_it_leaves_out(
    monkeypatch: pytest.MonkeyPatch, columns: int
) -> None:
    of_width(monkeypatch, columns)
    stream = Terminal()
    shown = Progress(100, stream)
    shown.update(FULL)
    shown.update(after(13))
    line = stream.last_line()
    assert len(line) < columns
    assert "epoch 13/100, loss 0.2134" in line
    assert line.endswith("14m 30s left")
    left_out = fitted(told(FULL, 100, 880.0), columns - 10)[1]
    assert stream.getvalue().count("too narrow for") == bool(left_out)
    assert ("img/s" in line) == ("images per second" not in left_out)


def test_eighty_columns_hold_what_matters_most(monkeypatch: pytest.MonkeyPatch) -> None:
    of_width(monkeypatch, 80)
    line, _ = fitted(told(FULL, 100, 880.0), 70)
    assert line == "epoch 12/100, loss 0.2134, reference 0.3021, 4,130 img/s, 14m 40s left"


def test_the_rest_is_judged_by_the_median_of_recent_epochs() -> None:
    stream = io.StringIO()
    shown = Progress(100, stream)
    for number in range(1, 20):  # the first compiles; one waits for a disk
        shown.update(
            after(number, seconds=60.0 if number in (1, 15) else 4.0, evaluate_seconds=1.0)
        )
    shown.close()
    assert stream.getvalue().rstrip().endswith("6m 45s left")  # 81 epochs of 5 s


def test_a_log_gets_a_line_every_few_seconds_and_the_last_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    stream = io.StringIO()
    shown = Progress(30, stream)
    for number in range(1, 24):
        shown.update(after(number))
        now[0] += 1.0
    shown.close()
    epochs = [int(found) for found in re.findall(r"epoch (\d+)/30", stream.getvalue())]
    assert epochs == [1, 6, 11, 16, 21, 23]
    assert "\r" not in stream.getvalue()
    assert "grad" in stream.getvalue()  # a log is as wide as need be


@pytest.mark.parametrize("stream", [Terminal(), io.StringIO()], ids=["terminal", "log"])
def test_a_sentence_stands_in_a_line_of_its_own(
    monkeypatch: pytest.MonkeyPatch, stream: io.StringIO
) -> None:
    of_width(monkeypatch, 200)
    shown = Progress(3, stream)
    shown.note("before the first epoch")
    shown.update(after(1))
    shown.note("checkpoint of epoch 7 is damaged; going on from 6")
    shown.update(after(3))
    shown.close()
    lines = re.split(r"[\r\n]+", stream.getvalue())
    assert "before the first epoch" in lines
    assert "checkpoint of epoch 7 is damaged; going on from 6" in lines
    assert "epoch 3/3" in lines[-2]
    assert lines[-1] == ""


def test_nothing_is_drawn_of_a_run_that_trains_nothing() -> None:
    stream = Terminal()
    shown = Progress(3, stream)
    shown.update({"epoch": 0, "dsc": 0.5})
    shown.close()
    assert stream.getvalue() == ""
    assert not shown.drawn
