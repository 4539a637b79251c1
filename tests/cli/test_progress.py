"""The progress line, on terminals of several widths and in a pipe."""

from __future__ import annotations

import io
import logging
import re
from typing import Any

import pytest
from rich.console import Console

from amlp_ray.cli import progress
from amlp_ray.cli.output import log_to_stderr
from amlp_ray.cli.progress import EpochProgress, count_progress, format_epoch

METRICS = {
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
WHOLE_LINE = (
    "epoch 12/100, 14m 40s left, loss 0.2134, 4,130.2 img/s, reference 0.3021, waiting 2%, "
    "MFU 34%, ratio 0.41, lesion 6.1%, 2,065.1 per worker, 1.2 GB, lr 8.1e-04, grad 0.31"
)


def terminal(columns: int) -> Console:
    return Console(
        file=io.StringIO(),
        force_terminal=True,
        force_interactive=True,
        color_system=None,
        width=columns,
    )


def pipe() -> Console:
    return Console(file=io.StringIO(), force_terminal=False)


def text_of(console: Console) -> str:
    """What was drawn, without the codes that move the cursor."""
    assert isinstance(console.file, io.StringIO)
    return re.sub(r"\x1b\[[?\d;]*[A-Za-z]", "", console.file.getvalue())


def lines_of(console: Console) -> list[str]:
    lines = re.split(r"[\r\n]+", text_of(console))
    return [line.rstrip() for line in lines if line.strip()]


def after(epoch: int, **more: Any) -> dict[str, Any]:
    return METRICS | {"epoch": epoch} | more


def test_every_figure_stands_in_a_line_that_has_room() -> None:
    assert format_epoch(METRICS, 100, 880.0) == WHOLE_LINE


def test_what_is_missing_is_left_out() -> None:
    simsiam = {
        "epoch": 1,
        "loss": -0.5,
        "ratio": 0.0,
        "images_per_second": 9.97,
        "mfu": None,
        "seconds": 1.0,
    }
    line = format_epoch(simsiam, 2, 1.0)
    assert line == "epoch 1/2, 1s left, loss -0.5000, 10.0 img/s, ratio 0.00"


def test_one_worker_is_not_shown_twice() -> None:
    assert "per worker" not in format_epoch(METRICS | {"workers": 1}, 100, 0.0)


@pytest.mark.parametrize("columns", [60, 80, 100, 120, 160, 200])
def test_a_line_fits_the_terminal_and_is_cut_at_its_end(columns: int) -> None:
    console = terminal(columns)
    with EpochProgress(100, console) as progress:
        progress.update(METRICS)
    line = lines_of(console)[-1]
    assert len(line) <= columns
    _, _, figures = line.partition(" epoch")
    epoch_text = f"epoch{figures}"
    assert epoch_text.startswith("epoch 12/100, 14m 40s left, loss 0.2134, 4,130.2")
    is_cut = columns < len(WHOLE_LINE) + 9
    assert WHOLE_LINE.startswith(epoch_text.removesuffix("…"))
    assert epoch_text.endswith("…") == is_cut
    assert (epoch_text == WHOLE_LINE) != is_cut


def test_a_line_changes_in_its_place() -> None:
    console = terminal(80)
    with EpochProgress(100, console) as progress:
        progress.update(METRICS)
        progress.update(after(13))
    assert isinstance(console.file, io.StringIO)
    assert console.file.getvalue().count("\n") == 1, "one line, ended when the run ends"
    assert "epoch 13/100" in lines_of(console)[-1]


def test_the_time_left_follows_from_the_median_of_recent_epochs() -> None:
    console = pipe()
    with EpochProgress(100, console) as progress:
        for number in range(1, 20):  # the first compiles; one waits for a disk
            seconds = 60.0 if number in (1, 15) else 4.0
            progress.update(after(number, seconds=seconds, evaluate_seconds=1.0))
    assert "epoch 19/100, 6m 45s left" in lines_of(console)[-1]  # 81 epochs of 5 s


@pytest.mark.parametrize(("hours", "most"), [(1 / 60, 15), (1, 70), (24, 220)])
def test_a_log_gets_the_fewer_lines_the_longer_a_run_takes(
    hours: float, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    console = pipe()
    epochs = round(hours * 3600)
    with EpochProgress(epochs, console) as epoch_progress:
        for number in range(1, epochs + 1):
            epoch_progress.update(after(number))
            now[0] += 1.0
    lines = lines_of(console)
    assert most / 2 < len(lines) <= most
    assert f"epoch {epochs}/{epochs}" in lines[-1]


def test_color_that_is_forced_into_a_file_draws_no_bar(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    with EpochProgress(2) as epoch_progress, count_progress() as update:
        update("decoding", 1, 4)
        epoch_progress.update(after(1))
        epoch_progress.update(after(2))
    printed = capsys.readouterr().err
    assert [line[:9] for line in printed.splitlines()] == ["epoch 1/2", "epoch 2/2"]
    assert "\r" not in printed
    assert "decoding" not in printed


def test_counted_work_that_takes_long_gets_lines_in_a_log(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    console = pipe()
    monkeypatch.setattr(progress, "Console", lambda **_: console)
    with count_progress() as update:
        for done in range(1, 51):
            update("decoding", done, 50)
            now[0] += 1.0
    assert lines_of(console) == [
        "decoding 31/50",
        "decoding 36/50",
        "decoding 41/50",
        "decoding 46/50",
    ]


def test_a_log_gets_a_line_every_few_seconds_and_the_last_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    console = pipe()
    with EpochProgress(30, console) as epoch_progress:
        for number in range(1, 24):
            epoch_progress.update(after(number))
            now[0] += 1.0
    epochs = [int(digits) for digits in re.findall(r"epoch (\d+)/30", text_of(console))]
    assert epochs == [1, 6, 11, 16, 21, 23]
    assert "\r" not in text_of(console)
    assert all(line.endswith("grad 0.31") for line in lines_of(console)), "as wide as need be"


@pytest.mark.parametrize("is_terminal", [True, False], ids=["terminal", "log"])
def test_a_message_stands_in_a_line_of_its_own(
    monkeypatch: pytest.MonkeyPatch, is_terminal: bool
) -> None:
    console = terminal(200) if is_terminal else pipe()
    monkeypatch.setattr("sys.stderr", console.file)
    logger = logging.getLogger("amlp_ray.training")
    with log_to_stderr(), EpochProgress(3, console) as progress:
        logger.info("before the first epoch")
        progress.update(after(1))
        logger.warning("checkpoint of epoch 7 is damaged; resuming from 6")
        progress.update(after(3))
    lines = lines_of(console)
    assert "before the first epoch" in lines
    assert "checkpoint of epoch 7 is damaged; resuming from 6" in lines
    assert "epoch 3/3" in lines[-1]
    assert text_of(console).endswith("\n")


def test_nothing_is_drawn_of_a_run_that_trains_nothing() -> None:
    console = terminal(80)
    with EpochProgress(3, console) as progress:
        assert not progress.was_updated
        progress.update({"epoch": 0, "dsc": 0.5})
    assert text_of(console) == ""
    assert progress.was_updated


def test_counted_work_is_drawn_on_terminals_only_and_not_before_it_begins(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for console, is_drawn in ((terminal(80), True), (pipe(), False)):
        monkeypatch.setattr(progress, "stderr_console", lambda console=console: console)
        with count_progress() as update:
            assert text_of(console) == ""
            update("decoding", 1, 4)
            update("writing", 2, 3)
        assert ("decoding" in text_of(console)) == is_drawn
        assert ("writing" in text_of(console)) == is_drawn
        assert ("2/3" in text_of(console)) == is_drawn
