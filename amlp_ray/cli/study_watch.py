"""amlp-ray study watch, logs: follow a study while it runs."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Argument, Option

from amlp_ray.cli.output import format_value, make_console, make_table
from amlp_ray.cli.study_inspect import status_fields
from amlp_ray.cli.study_options import DEFAULT_RUNS, Name, Runs, open_store
from amlp_ray.errors import StudyError
from amlp_ray.utils.json_files import JsonError, parse_json

if TYPE_CHECKING:
    from rich.console import RenderableType

    from amlp_ray.study.storage.study_store import StudyStore

POLL_INTERVAL_S = 0.5
PIPE_WIDTH = 160


def watch(
    name: Name,
    runs: Runs = DEFAULT_RUNS,
    every: Annotated[float, Option(help="Seconds between updates.", min=0.2)] = 2.0,
    once: Annotated[bool, Option("--once", help="Print it once, and end.")] = False,
) -> None:
    """Watch running trials, budget and best trial of a study. Ctrl-C ends only the watching."""
    from rich.live import Live

    store = open_store(name, runs)
    console = make_console(PIPE_WIDTH)
    if once:
        console.print(render_status(store))
        return
    try:
        with Live(render_status(store), console=console, auto_refresh=False) as live:
            while True:
                time.sleep(every)
                live.update(render_status(store), refresh=True)
    except KeyboardInterrupt:
        raise typer.Exit(130) from None


def logs(
    name: Name,
    number: Annotated[
        int | None, Argument(help="Number of a trial; none: events of the study.")
    ] = None,
    runs: Runs = DEFAULT_RUNS,
    follow: Annotated[
        bool, Option("--follow", "-f", help="Print new lines as they come, until Ctrl-C.")
    ] = False,
) -> None:
    """Print the events of a study; or a trial's metrics, and its error if it failed."""
    store = open_store(name, runs)
    if number is None:
        file = store.folder / "events.log"
    else:
        from amlp_ray.study.operations.trials import find_trial

        file = store.folder_of(find_trial(store, number)) / "metrics.jsonl"
    error_file = file.with_name("error.txt")
    if not file.is_file() and not error_file.is_file() and not follow:
        raise StudyError(f"There is no {file} yet; the study writes it when it runs.")
    try:
        for line in _read_lines(file, follow):
            typer.echo(line if number is None else _format_metrics(line))
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
    if number is not None and error_file.is_file():
        typer.echo(error_file.read_text().rstrip())


def _read_lines(file: Path, follow: bool) -> Iterator[str]:
    """Yield the complete lines of a file; with `follow`, wait for more without end."""
    position = 0
    while True:
        if file.is_file():
            # Metrics are rewritten after a kill.
            if file.stat().st_size < position:
                position = 0
            with file.open() as stream:
                stream.seek(position)
                while (line := stream.readline()).endswith("\n"):
                    position = stream.tell()
                    yield line.rstrip("\n")
        if not follow:
            return
        time.sleep(POLL_INTERVAL_S)


def _format_metrics(line: str) -> str:
    try:
        return format_value(parse_json(line))
    except JsonError:
        return line


def render_status(store: StudyStore) -> RenderableType:
    """Return a study's status, bars of its budget, and its running trials, for rich to print."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    from amlp_ray.study.operations.status import running_rows, status

    config = store.config()
    current = status(store, config)
    fields = Table.grid(padding=(0, 2))
    for name, value in status_fields(current).items():
        if name not in ("folder", "budget"):
            fields.add_row(Text(name, style="bold"), Text(format_value(value)))
    parts: list[RenderableType] = [fields, _budget_bars(current["budget"])]
    rows = running_rows(store, config)
    if rows:
        parts += [Text(""), make_table(rows)]
    return Group(*parts)


def _budget_bars(budget: Mapping[str, Mapping[str, Any]]) -> RenderableType:
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    bars = Table.grid(padding=(0, 2))
    for name, limit in budget.items():
        used, allowed = limit["used"], limit["allowed"]
        if allowed is not None:
            bar = ProgressBar(total=allowed, completed=min(used, allowed), width=30)
            label = Text(name.replace("_", "-"), style="bold")
            bars.add_row(label, bar, Text(f"{used:.4g} of {allowed:g}"))
    return bars
