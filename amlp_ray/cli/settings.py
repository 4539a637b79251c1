"""amlp-ray settings: every setting with what is accepted, its default, and why that default."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator
from typing import Annotated

import typer

from amlp_ray import config
from amlp_ray.cli.output import Json, print_json, print_table
from amlp_ray.config import (
    VARIANTS,
    PredictConfig,
    PrepareConfig,
    PretrainConfig,
    SegmentConfig,
    StudyConfig,
)
from amlp_ray.config.base import Config
from amlp_ray.config.overrides import flat
from amlp_ray.config.reference import Section, Setting, sections, shown, variants
from amlp_ray.errors import ConfigError

MODELS: dict[str, type[Config]] = {
    "pretrain": PretrainConfig,
    "study": StudyConfig,
    "segment": SegmentConfig,
    "prepare": PrepareConfig,
    "predict": PredictConfig,
}
TOPICS = (*MODELS, "variants")
USUAL = PretrainConfig().variant
Table = tuple[str, str, list[dict[str, str]]]  # heading, what it is about, rows


def settings(
    topics: Annotated[
        list[str] | None, typer.Argument(help=f"Any of {', '.join(TOPICS)}; none: pretrain.")
    ] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print a page in Markdown.")] = False,
    as_json: Json = False,
) -> None:
    """Show settings: accepted values, defaults, and the reasons for them."""
    chosen = topics or ["pretrain"]
    for topic in chosen:
        if topic not in TOPICS:
            raise ConfigError(
                f"settings: there are none of {topic!r}; known are {', '.join(TOPICS)}."
            )
    if as_json:
        print_json({topic: _values(topic) for topic in chosen})
    elif markdown:
        typer.echo("\n\n".join(_page(chosen)))
    else:
        for topic in chosen:
            for heading, about, rows in _tables(topic):
                typer.echo(f"\n{heading}: {about}")
                print_table(rows)


def _values(topic: str) -> list[dict[str, object]]:
    if topic == "variants":
        return variants()
    return [vars(setting) for section in sections(MODELS[topic]) for setting in section.config]


def _tables(topic: str) -> Iterator[Table]:
    if topic == "variants":
        about = "Named baselines. Each lays its values over the defaults; every value given wins over them."
        rows = [
            {
                "variant": variant["variant"],
                "sets": ", ".join(
                    f"{name}={shown(value)}" for name, value in variant["sets"].items()
                ),
                "about": variant["about"],
            }
            for variant in variants()
        ]
        yield topic, about, rows
        return
    laid = flat(VARIANTS[USUAL]) if topic == "pretrain" else {}
    for section in sections(MODELS[topic]):
        yield section.group or topic, section.about, list(_rows(section, laid))


def _rows(section: Section, laid: dict[str, object]) -> Iterator[dict[str, str]]:
    for setting in section.config:
        yield {
            "name": setting.name,
            "accepts": setting.accepts,
            "default": _default(setting, laid),
            "reason": setting.reason,
        }


def _default(setting: Setting, laid: dict[str, object]) -> str:
    if setting.required:
        return "required"
    # The variant that holds where none is named may set something else.
    usual = f" ({USUAL}: {shown(laid[setting.name])})" if setting.name in laid else ""
    return shown(setting.default) + usual


def _page(topics: Iterable[str]) -> Iterator[str]:
    """Paragraphs and tables of a page."""
    yield "# Settings"
    yield "Made from `amlp_ray/config` by `make docs`; change it there."
    yield from (inspect.getdoc(config) or "").split("\n\n")[1:]
    for topic in topics:
        last = ""
        for heading, about, rows in _tables(topic):
            if heading != last:
                yield f"{'##' if heading == topic else '###'} {heading}".replace("<", "\\<")
            yield about
            yield "\n".join(_markdown(rows))
            last = heading


def _markdown(rows: list[dict[str, str]]) -> Iterator[str]:
    columns = list(rows[0])
    yield f"| {' | '.join(columns)} |"
    yield "|" + "---|" * len(columns)
    for row in rows:
        cells = [
            f"`{row[c]}`" if c in ("name", "default", "variant", "sets") else row[c]
            for c in columns
        ]
        yield f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"
