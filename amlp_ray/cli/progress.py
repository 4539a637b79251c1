"""Progress on stderr: a line about the latest epoch of a training, and bars for counted work.

Bars are drawn on terminals only. A log file gets plain lines, the rarer the longer it takes.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column

from amlp_ray.utils.text import counted

# Seconds between lines where stderr is no terminal: this share of the time so far, within bounds.
# So an hour gives some 60 lines and a day some 200.
LOG_INTERVAL_SHARE = 0.1
LOG_INTERVALS_S = (5.0, 600.0)
# Counted work that takes less gets no line.
FIRST_COUNT_S = 30.0
# Epochs that the time left is estimated from: a rising masking ratio makes later ones faster.
RECENT_EPOCHS = 10

# Metrics and their formats, the most important first: a narrow terminal cuts the end of the line.
FIGURES = {
    "loss": "loss {:.4f}",
    "images_per_second": "{:,.1f} img/s",
    # Loss under a mask that never changes.
    "loss_reference": "reference {:.4f}",
    "wait_share": "waiting {:.0%}",
    "mfu": "MFU {:.0%}",
    "ratio": "ratio {:.2f}",
    "lesion_cluster_share": "lesion {:.1%}",
    "images_per_second_per_worker": "{:,.1f} per worker",
    "memory": "{:.1f} GB",
    "lr": "lr {:.1e}",
    "grad_norm": "grad {:.2g}",
}


class LogPace:
    """Says when the next line of a log is due."""

    def __init__(self, first_s: float = 0.0) -> None:
        """Start now; the first line is due after `first_s` seconds."""
        self._started = time.monotonic()
        self._due = self._started + first_s

    def take(self) -> bool:
        """Return whether a line is due; if so, the next one is due after an interval."""
        now = time.monotonic()
        if now < self._due:
            return False
        shortest, longest = LOG_INTERVALS_S
        interval = min(longest, max(shortest, LOG_INTERVAL_SHARE * (now - self._started)))
        self._due = now + interval
        return True


def stderr_console() -> Console:
    """Return a console on stderr that draws bars on terminals only.

    Rich would also draw where FORCE_COLOR is set, as batch systems do whose output is a file.
    """
    console = Console(stderr=True)
    console.is_interactive = console.is_interactive and sys.stderr.isatty()
    return console


class EpochProgress:
    """Line about the latest epoch of a run.

    On a terminal it is one line that changes; elsewhere lines at the pace of `LogPace`. Nothing is
    drawn before the first epoch, so that an error stands alone.
    """

    def __init__(self, epochs: int, console: Console | None = None) -> None:
        """Create the progress of a run of so many epochs; `console` None draws on stderr."""
        self.was_updated = False
        self._epochs = epochs
        self._console = console or stderr_console()
        self._recent_seconds: deque[float] = deque(maxlen=RECENT_EPOCHS)
        rest = Column(ratio=1, no_wrap=True, overflow="ellipsis")
        self._bar = Progress(
            BarColumn(8),
            TextColumn("{task.description}", markup=False, table_column=rest),
            console=self._console,
            auto_refresh=False,
            redirect_stdout=False,
            expand=True,
        )
        self._pace = LogPace()
        self._pending = ""

    def __enter__(self) -> EpochProgress:
        return self

    def __exit__(self, *error: object) -> None:
        """Leave the last line on the screen."""
        if self._bar.tasks:
            self._bar.stop()
        if self._pending:
            self._log(self._pending, is_last=True)

    def update(self, metrics: Mapping[str, Any]) -> None:
        """Show the metrics of an epoch; epoch 0 is the random encoder, which is not trained."""
        self.was_updated = True
        epoch = metrics["epoch"]
        if epoch == 0:
            return
        self._recent_seconds.append(metrics["seconds"] + metrics.get("evaluate_seconds", 0.0))
        seconds_left = statistics.median(self._recent_seconds) * (self._epochs - epoch)
        line = format_epoch(metrics, self._epochs, seconds_left)
        if self._console.is_interactive:
            self._draw(line, epoch)
        else:
            self._log(line, is_last=epoch >= self._epochs)

    def _draw(self, line: str, epoch: int) -> None:
        if not self._bar.tasks:
            self._bar.add_task("", total=self._epochs)
            self._bar.start()
        self._bar.update(self._bar.task_ids[0], description=line, completed=epoch, refresh=True)

    def _log(self, line: str, *, is_last: bool) -> None:
        if self._pace.take() or is_last:
            print_line(self._console, line)
            self._pending = ""
        else:
            self._pending = line


def print_line(console: Console, line: str) -> None:
    """Print a line of text as it is, however long."""
    console.print(line, soft_wrap=True, markup=False, highlight=False)


@contextmanager
def count_progress() -> Iterator[Callable[[str, int, int], None]]:
    """Yield `update(stage, done, total)`, which shows counted work.

    On a terminal it draws a bar from its first call on; elsewhere it prints lines, from
    `FIRST_COUNT_S` on, at the pace of `LogPace`.
    """
    console = stderr_console()
    pace = LogPace(FIRST_COUNT_S)
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        redirect_stdout=False,
    )

    def update(stage: str, done: int, total: int) -> None:
        if not console.is_interactive:
            if pace.take():
                print_line(console, f"{stage} {done}/{total}")
            return
        if not bar.tasks:
            bar.add_task(stage, total=total)
            bar.start()
        task = bar.tasks[0]
        if task.description != stage:
            bar.reset(task.id, description=stage)
        bar.update(task.id, completed=done, total=total)

    try:
        yield update
    finally:
        if bar.tasks:
            bar.stop()


@contextmanager
def run_progress(
    folder: Path, epochs: int, *, err: bool = False
) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """Yield `report(metrics)`, which shows the epochs of a run.

    Ctrl-C or a scheduler's SIGTERM is answered with how to resume the run; a run that had nothing
    to do is said to be finished, on stderr if `err`.
    """
    try:
        with EpochProgress(epochs) as progress:
            yield progress.update
    except KeyboardInterrupt:
        typer.echo(
            f"amlp-ray: {folder} was interrupted; run the same command to resume from its "
            f"checkpoint.",
            err=True,
        )
        raise typer.Exit(130) from None
    if not progress.was_updated:
        typer.echo(f"{folder} was finished before: {counted(epochs, 'epoch')}.", err=err)


def format_epoch(metrics: Mapping[str, Any], epochs: int, seconds_left: float) -> str:
    """Format the metrics of an epoch as one line; missing ones are skipped."""
    parts = [f"epoch {metrics['epoch']}/{epochs}", f"{format_duration(seconds_left)} left"]
    for name, template in FIGURES.items():
        value = metrics.get(name)
        repeats_total = name == "images_per_second_per_worker" and metrics.get("workers", 1) == 1
        if value is not None and not repeats_total:
            parts.append(template.format(value))
    return ", ".join(parts)


def format_duration(seconds: float) -> str:
    """Format seconds for people.

    >>> [format_duration(s) for s in (0.4, 75, 3700, 200_000)]
    ['0s', '1m 15s', '1h 01m', '2d 07h']
    """
    whole = round(seconds)
    for size, part_size, units in ((86400, 3600, "dh"), (3600, 60, "hm"), (60, 1, "ms")):
        if whole >= size:
            return f"{whole // size}{units[0]} {whole % size // part_size:02d}{units[1]}"
    return f"{whole}s"
