"""The line that a training draws: what a person wants to know of the last epoch, and how long the rest will take.

On a terminal it is one line that changes, without those figures for which it is too narrow; elsewhere a plain line for
an epoch, seconds apart at least, so that a log stays readable.
"""

from __future__ import annotations

import logging
import math
import shutil
import statistics
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import typer

if TYPE_CHECKING:
    from tqdm import tqdm

PLAIN_S = 5.0  # between plain lines
RECENT = 10  # epochs by which the rest is judged: a rising masking ratio makes later ones faster

# What is told, in the order of the line: the metric, what it is called when it is left out, and how it is written.
FIGURES: tuple[tuple[str, str, Callable[[float], str]], ...] = (
    ("loss", "loss", lambda x: f"loss {x:.4f}"),
    (
        "loss_reference",
        "reference loss",
        lambda x: f"reference {x:.4f}",
    ),  # under a mask that never changes
    ("ratio", "masking ratio", lambda x: f"ratio {x:.2f}"),
    ("lesion_cluster_share", "lesion share", lambda x: f"lesion {x:.1%}"),
    ("lr", "learning rate", lambda x: f"lr {x:.1e}"),
    ("grad_norm", "gradient norm", lambda x: f"grad {x:.2g}"),
    ("images_per_second", "images per second", lambda x: f"{_count(x)} img/s"),
    ("images_per_second_per_worker", "those per worker", lambda x: f"{_count(x)} per worker"),
    ("mfu", "MFU", lambda x: f"MFU {x:.0%}"),
    ("memory", "memory", lambda x: f"{x:.1f} GB"),
    ("wait_share", "waiting", lambda x: f"waiting {x:.0%}"),
)
# Left out where the line is too long, the first of these first. Epoch, loss and time left always stand there.
SPARED = (
    "gradient norm",
    "learning rate",
    "memory",
    "those per worker",
    "lesion share",
    "masking ratio",
    "MFU",
    "waiting",
    "reference loss",
    "images per second",
)


class Progress:
    """Told of every epoch; drawn on stderr with the first one, so that an error before it stands alone."""

    def __init__(self, total: int, stream: TextIO | None = None) -> None:
        """Args: total: epochs of the whole run."""
        self._total, self._stream = total, stream or sys.stderr
        self._bar: tqdm[Any] | None = None
        self._recent: deque[float] = deque(maxlen=RECENT)
        self._told_of_width = False
        self._printed_at, self._unprinted = -math.inf, ""

    @property
    def drawn(self) -> bool:
        """Whether there was any epoch."""
        return bool(self._recent)

    def update(self, metrics: Mapping[str, Any]) -> None:
        """Show an epoch's metrics; those that are missing are left out."""
        if not metrics["epoch"]:  # the random encoder of variant=scratch, which is not trained
            return
        self._recent.append(metrics["seconds"] + metrics.get("evaluate_seconds", 0.0))
        left = statistics.median(self._recent) * (self._total - metrics["epoch"])
        parts = told(metrics, self._total, left)
        if self._stream.isatty():
            self._draw(parts, metrics["epoch"])
        else:
            self._print(", ".join(parts.values()), last=metrics["epoch"] >= self._total)

    def note(self, text: str) -> None:
        """Print a sentence above the line."""
        if self._bar is None:
            print(text, file=self._stream, flush=True)
        else:
            self._bar.write(text, file=self._stream)

    def close(self) -> None:
        """Leave the last line as it is."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None
        if self._unprinted:
            self._print(self._unprinted, last=True)

    def _draw(self, parts: dict[str, str], epoch: int) -> None:
        from tqdm import tqdm

        if self._bar is None:
            self._bar = tqdm(
                total=self._total,
                bar_format="{bar:8} {desc}",
                file=self._stream,
                dynamic_ncols=True,
                miniters=1,
            )
        width = (
            shutil.get_terminal_size().columns - 10
        )  # the bar, and the column that a terminal wraps at
        line, without = fitted(parts, width)
        if without and not self._told_of_width:
            self._told_of_width = True
            self.note(
                f"This terminal is too narrow for {', '.join(without)}; metrics.jsonl has all of them."
            )
        self._bar.set_description_str(line, refresh=False)
        self._bar.n = epoch
        self._bar.refresh()

    def _print(self, line: str, *, last: bool) -> None:
        now = time.monotonic()
        if last or now - self._printed_at >= PLAIN_S:
            print(line, file=self._stream, flush=True)
            self._printed_at, self._unprinted = now, ""
        else:
            self._unprinted = line


@contextmanager
def resumable(out: Path) -> Iterator[None]:
    """Say how to go on where Ctrl-C or a scheduler's SIGTERM ends what is done in here."""
    try:
        yield
    except KeyboardInterrupt:
        typer.echo(
            f"amlp-ray: {out} was interrupted; the same command goes on from its checkpoint.",
            err=True,
        )
        raise typer.Exit(130) from None


@contextmanager
def noted(logger: logging.Logger, progress: Progress) -> Iterator[None]:
    """Show what `logger` warns of meanwhile as notes, between the figures."""
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: progress.note(record.getMessage())  # type: ignore[method-assign]
    before, logger.propagate = logger.propagate, False
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.propagate = before


def told(metrics: Mapping[str, Any], total: int, left: float) -> dict[str, str]:
    """The parts of a line by what they are called; `left` seconds remain."""
    parts = {"epoch": f"epoch {metrics['epoch']}/{total}"}
    for key, name, written in FIGURES:
        value = metrics.get(key)
        if value is None or (
            key == "images_per_second_per_worker" and metrics.get("workers", 1) == 1
        ):
            continue
        parts[name] = written(value)
    return parts | {"time left": f"{duration(left)} left"}


def fitted(parts: Mapping[str, str], width: int) -> tuple[str, list[str]]:
    """A line of at most `width` characters as far as that is possible, and what was left out of it."""
    kept, without = dict(parts), []
    for name in SPARED:
        if len(", ".join(kept.values())) <= width:
            break
        if name in kept:
            del kept[name]
            without.append(name)
    return ", ".join(kept.values()), without


def duration(seconds: float) -> str:
    """Seconds as people read them.

    >>> [duration(s) for s in (0.4, 75, 3700, 200_000)]
    ['0s', '1m 15s', '1h 01m', '2d 07h']
    """
    whole = round(seconds)
    for size, small, big, unit in (
        (86400, 3600, "d", "h"),
        (3600, 60, "h", "m"),
        (60, 1, "m", "s"),
    ):
        if whole >= size:
            return f"{whole // size}{big} {whole % size // small:02d}{unit}"
    return f"{whole}s"


def _count(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:.1f}"
