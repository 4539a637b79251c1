"""amlp-ray settings: every setting with what it accepts, its default, and the reason for it."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer
from typer import Argument, Option

from amlp_ray.cli.output import Json, print_json, print_table
from amlp_ray.errors import ConfigError

if TYPE_CHECKING:
    from amlp_ray.config.base import Config
    from amlp_ray.config.reference import Section

TOPICS = ("pretrain", "study", "segment", "prepare", "predict", "variants")
DEFAULT_VARIANT = "amlp"
CODE_COLUMNS = ("name", "default", "variant", "sets")


class Table(NamedTuple):
    """Rows with equal keys under a heading, and what they are."""

    heading: str
    about: str
    rows: list[dict[str, str]]


def settings(
    topics: Annotated[
        list[str] | None, Argument(help=f"Any of {', '.join(TOPICS)}; none: pretrain.")
    ] = None,
    markdown: Annotated[bool, Option("--markdown", help="Print a page in Markdown.")] = False,
    as_json: Json = False,
) -> None:
    """Show settings: accepted values, defaults, and the reasons for them."""
    topics = topics or ["pretrain"]
    for topic in topics:
        if topic not in TOPICS:
            raise ConfigError(
                f"settings: there are none of {topic!r}; known are {', '.join(TOPICS)}."
            )
    if as_json:
        print_json({topic: _json_rows(topic) for topic in topics})
    elif markdown:
        typer.echo("\n\n".join(_markdown_page(topics)))
    else:
        for topic in topics:
            for table in _tables(topic):
                typer.echo(f"\n{table.heading}: {table.about}")
                print_table(table.rows)


def _model(topic: str) -> type[Config]:
    from amlp_ray import config

    return getattr(config, f"{topic.capitalize()}Config")


def _json_rows(topic: str) -> list[dict[str, Any]]:
    from amlp_ray.config.reference import sections, variants

    if topic == "variants":
        return variants()
    rows = []
    for section in sections(_model(topic)):
        rows += [vars(setting) for setting in section.settings]
    return rows


def _tables(topic: str) -> Iterator[Table]:
    from amlp_ray.config.reference import sections

    if topic == "variants":
        yield _variants_table()
        return
    for section in sections(_model(topic)):
        yield Table(section.group or topic, section.about, _setting_rows(section, topic))


def _variants_table() -> Table:
    from amlp_ray.config.reference import format_value, variants

    rows = []
    for variant in variants():
        changes = [f"{name}={format_value(value)}" for name, value in variant["sets"].items()]
        rows.append(variant | {"sets": ", ".join(changes)})
    about = "Named variants. Each changes some defaults; every value given overrides them."
    return Table("variants", about, rows)


def _setting_rows(section: Section, topic: str) -> list[dict[str, str]]:
    from amlp_ray.config import VARIANTS
    from amlp_ray.config.overrides import flatten
    from amlp_ray.config.reference import format_value

    # A pretraining without a named variant is amlp, which changes some defaults.
    changes = flatten(VARIANTS[DEFAULT_VARIANT]) if topic == "pretrain" else {}
    rows = []
    for setting in section.settings:
        default = "required" if setting.required else format_value(setting.default)
        if setting.name in changes:
            default += f" ({DEFAULT_VARIANT}: {format_value(changes[setting.name])})"
        rows.append(
            {
                "name": setting.name,
                "accepts": setting.accepts,
                "default": default,
                "description": setting.description,
            }
        )
    return rows


def _markdown_page(topics: Sequence[str]) -> Iterator[str]:
    """Yield the paragraphs and tables of a page."""
    from amlp_ray import config

    yield "# Settings"
    yield "Made from `amlp_ray/config` by `make docs`; change it there."
    yield from (inspect.getdoc(config) or "").split("\n\n")[1:]
    for topic in topics:
        previous = ""
        for table in _tables(topic):
            if table.heading != previous:
                level = "##" if table.heading == topic else "###"
                yield f"{level} {table.heading}".replace("<", "\\<")
            yield table.about
            yield "\n".join(_markdown_lines(table.rows))
            previous = table.heading


def _markdown_lines(rows: Sequence[dict[str, str]]) -> Iterator[str]:
    columns = list(rows[0])
    yield f"| {' | '.join(columns)} |"
    yield "|" + "---|" * len(columns)
    for row in rows:
        cells = []
        for column, text in row.items():
            cell = text.replace("|", "\\|")
            cells.append(f"`{cell}`" if column in CODE_COLUMNS else cell)
        yield f"| {' | '.join(cells)} |"
