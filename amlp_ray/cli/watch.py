"""amlp-ray study watch, logs: a study while it runs."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from amlp_ray.cli.study_options import Name, Runs, opened
from amlp_ray.errors import StudyError

if TYPE_CHECKING:
    from rich.console import RenderableType

    from amlp_ray.study.storage.study_store import StudyStore

LOOK_S = 0.5  # between looks at files that grow


def watch(
    name: Name,
    runs: Runs = Path("runs"),
    every: Annotated[float, typer.Option(help="Seconds between looks.", min=0.2)] = 2.0,
    once: Annotated[bool, typer.Option("--once", help="Print it once, and end.")] = False,
) -> None:
    """Watch a study: running trials, budget, best so far. Ctrl-C ends the watching, not the study."""
    from rich.console import Console
    from rich.live import Live

    store = opened(name, runs)
    console = Console(markup=False, emoji=False)
    if not console.is_terminal:
        console = Console(markup=False, emoji=False, width=160)
    if once:
        console.print(frame(store))
        return
    try:
        with Live(frame(store), console=console, auto_refresh=False) as live:
            while True:
                time.sleep(every)
                live.update(frame(store), refresh=True)
    except KeyboardInterrupt:
        raise typer.Exit(130) from None


def logs(
    name: Name,
    number: Annotated[
        int | None, typer.Argument(help="Of a trial; none: what happened to the study.")
    ] = None,
    runs: Runs = Path("runs"),
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Go on as lines are added, until Ctrl-C.")
    ] = False,
) -> None:
    """Print what happened to a study, line by line; or a trial's metrics, and its error where it failed."""
    store = opened(name, runs)
    file = store.folder / "events.log"
    if number is not None:
        from amlp_ray.study.operations.trials import find_trial, folder_of

        file = folder_of(store, find_trial(store, number)) / "metrics.jsonl"
    if not file.is_file() and not follow:
        error = file.with_name("error.txt")
        if not error.is_file():
            raise StudyError(f"There is no {file} yet; the study writes it when it runs.")
    try:
        for line in _lines(file, follow):
            typer.echo(line if number is None else _metrics(line))
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
    error = file.with_name("error.txt")
    if number is not None and error.is_file():
        typer.echo(error.read_text().rstrip())


def _lines(file: Path, follow: bool) -> Iterator[str]:
    """Whole lines of a file, from its beginning; with `follow`, for ever."""
    at = 0
    while True:
        if file.is_file():
            if file.stat().st_size < at:  # rewritten, as metrics are after a kill
                at = 0
            with file.open() as stream:
                stream.seek(at)
                while (line := stream.readline()).endswith("\n"):
                    at = stream.tell()
                    yield line.rstrip("\n")
        if not follow:
            return
        time.sleep(LOOK_S)


def _metrics(line: str) -> str:
    import json

    try:
        row = json.loads(line)
    except ValueError:
        return line
    return ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items())


def frame(store: StudyStore) -> RenderableType:
    """One picture of a study: what it is, bars of its budget, best so far, and what runs."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    from amlp_ray.cli.output import table_of
    from amlp_ray.cli.study_look import told
    from amlp_ray.study.operations.status import running_rows, status

    config = store.config()
    facts = status(store, config)
    lines = {key: value for key, value in told(facts).items() if key not in ("folder", "budget")}
    head = Table.grid(padding=(0, 2))
    for key, value in lines.items():
        head.add_row(Text(key, style="bold"), Text(_plain(value)))
    parts: list[RenderableType] = [head, _bars(facts["budget"])]
    if rows := running_rows(store, config):
        parts += [Text(""), table_of(rows)]
    return Group(*parts)


def _bars(budget: dict[str, Any]) -> RenderableType:
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    grid = Table.grid(padding=(0, 2))
    for name, part in budget.items():
        if part["allowed"] is not None:
            used, allowed = part["used"], part["allowed"]
            bar = ProgressBar(total=allowed, completed=min(used, allowed), width=30)
            grid.add_row(
                Text(name.replace("_", "-"), style="bold"), bar, Text(f"{used:.4g} of {allowed:g}")
            )
    return grid


def _plain(value: Any) -> str:
    from amlp_ray.cli.output import text_of

    return text_of(value)
