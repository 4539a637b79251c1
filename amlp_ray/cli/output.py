"""Output of the command line: tables for people, JSON for programs, log messages on stderr."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Option

from amlp_ray.utils.files import without_nan

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

Json = Annotated[bool, Option("--json", help="Print JSON.")]

# Width of a table that is not printed on a terminal.
PIPE_WIDTH = 200


class StderrHandler(logging.Handler):
    """Print messages on the current `sys.stderr`, which a progress bar replaces while drawn."""

    def emit(self, record: logging.LogRecord) -> None:
        print(self.format(record), file=sys.stderr, flush=True)


@contextmanager
def log_to_stderr() -> Iterator[None]:
    """Print what this package logs, INFO and above, as bare text on stderr."""
    logger = logging.getLogger("amlp_ray")
    previous = logger.level, logger.propagate
    handler = StderrHandler()
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.level, logger.propagate = previous


def print_json(value: Any) -> None:
    """Print JSON; NaN and infinity, which JSON does not have, become null."""
    typer.echo(json.dumps(without_nan(value), indent=1))


def print_fields(fields: Mapping[str, Any]) -> None:
    """Print one `name: value` line per field."""
    width = max(map(len, fields), default=0)
    for name, value in fields.items():
        typer.echo(f"{name.replace('_', ' '):<{width}}  {format_value(value)}")


def print_table(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print rows with equal keys as a table, without columns that are empty in every row."""
    make_console(PIPE_WIDTH).print(make_table(rows))


def make_console(pipe_width: int) -> Console:
    """Return a console that prints text as it is, [number] too; `pipe_width` is for no terminal."""
    from rich.console import Console

    console = Console(markup=False, emoji=False)
    if not console.is_terminal:
        console.width = pipe_width
    return console


def make_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Return the table that `print_table` prints."""
    from rich.table import Table

    table = Table(box=None, header_style="bold")
    columns = []
    for name in rows[0] if rows else ():
        if any(row[name] is not None for row in rows):
            columns.append(name)
            table.add_column(name.replace("_", " "))
    for row in rows:
        table.add_row(*[format_value(row[name]) for name in columns])
    return table


def format_value(value: Any) -> str:
    """Format a value for people.

    >>> format_value({"dsc": 0.71234, "rungs": [1, 2], "note": None})
    'dsc 0.7123, rungs 1, 2, note -'
    """
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {format_value(item)}" for key, item in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(format_value, value)) or "none"
    return str(value)
