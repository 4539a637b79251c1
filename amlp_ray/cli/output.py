"""Answers of the command line: tables for people, JSON for programs."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.table import Table

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def print_json(value: Any) -> None:
    """Print JSON; NaN, which JSON does not have, becomes null."""
    typer.echo(json.dumps(_plain(value), indent=1))


def print_facts(facts: Mapping[str, Any]) -> None:
    """Print one `name: value` line per fact."""
    width = max(map(len, facts), default=0)
    for name, value in facts.items():
        typer.echo(f"{name.replace('_', ' '):<{width}}  {text_of(value)}")


def print_table(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print rows with equal keys as a table; columns that are empty in every row are left out."""
    from rich.console import Console

    console = Console(
        markup=False, emoji=False
    )  # values are shown as they are: [number] is no style
    if not console.is_terminal:
        console = Console(markup=False, emoji=False, width=200)  # a pipe has no width to fit into
    console.print(table_of(rows))


def table_of(rows: Sequence[Mapping[str, Any]]) -> Table:
    """The same as something that rich draws."""
    from rich.table import Table

    columns = [c for c in (rows[0] if rows else {}) if any(row[c] is not None for row in rows)]
    table = Table(*[c.replace("_", " ") for c in columns], box=None, header_style="bold")
    for row in rows:
        table.add_row(*[text_of(row[c]) for c in columns])
    return table


def text_of(value: Any) -> str:
    """A value as people read it."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{k} {text_of(v)}" for k, v in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(text_of, value)) or "none"
    return str(value)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
