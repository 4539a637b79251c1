"""Progress on stderr: a line about the latest epoch of a training, and bars for counted work."""

from __future__ import annotations

import math
import statistics
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

# Seconds between lines where stderr is no terminal.
LOG_INTERVAL_S = 5.0
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


class EpochProgress:
    """Line about the latest epoch of a run.

    On a terminal it is one line that changes; elsewhere a line per epoch, at most one every
    `LOG_INTERVAL_S`. Nothing is drawn before the first epoch, so that an error stands alone.
    """

    def __init__(self, epochs: int, console: Console | None = None) -> None:
        """Create the progress of a run of so many epochs; `console` None draws on stderr."""
        self.was_updated = False
        self._epochs = epochs
        self._console = console or Console(stderr=True)
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
        self._logged_at = -math.inf
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
        now = time.monotonic()
        if is_last or now - self._logged_at >= LOG_INTERVAL_S:
            self._console.print(line, soft_wrap=True, markup=False, highlight=False)
            self._logged_at = now
            self._pending = ""
        else:
            self._pending = line


@contextmanager
def count_progress() -> Iterator[Callable[[str, int, int], None]]:
    """Yield `update(stage, done, total)`, which draws a bar on terminals from its first call on."""
    console = Console(stderr=True)
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
        typer.echo(f"{folder} was finished before: {epochs} epochs.", err=err)


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
