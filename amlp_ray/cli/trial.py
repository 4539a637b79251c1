"""amlp-ray study trial: one trial of a study."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer

from amlp_ray.cli.output import Json, print_facts, print_json, print_table
from amlp_ray.cli.study_control import note_used_budget
from amlp_ray.cli.study_options import Data, Labels, Name, Number, Runs, opened

app = typer.Typer(help="One trial of a study.", no_args_is_help=True)


@app.command()
def show(name: Name, number: Number, runs: Runs = Path("runs"), as_json: Json = False) -> None:
    """Show a trial: its settings, rungs, what it took, where it comes from, its files."""
    from amlp_ray.study.operations.trials import trial_facts

    facts = trial_facts(opened(name, runs), number)
    if as_json:
        print_json(facts)
        return
    aside = ("rungs", "config", "provenance")
    print_facts(
        {
            key: value
            for key, value in facts.items()
            if key not in aside and value not in (None, {}, [])
        }
    )
    if facts["rungs"]:
        typer.echo()
        print_table(
            [{"epoch": epoch, facts["metric"]: value} for epoch, value in facts["rungs"].items()]
        )
    for title in ("config", "provenance"):
        if facts[title]:
            typer.echo(f"\n{title}")
            print_table(_lines(facts[title]))


@app.command()
def replay(
    name: Name,
    number: Number,
    runs: Runs = Path("runs"),
    data: Data = None,
    eval_data: Labels = None,
    as_json: Json = False,
) -> None:
    """Train a trial again and compare its scores to the digit; exit code 1 where they differ."""
    from amlp_ray.study.operations.replay import replay

    store = opened(name, runs)
    found = replay(
        store,
        store.config(),
        number,
        data=data,
        eval_data=eval_data,
        notify=lambda line: typer.echo(line, err=as_json),
    )
    if as_json:
        print_json(found)
    else:
        print_table(
            [{**rung, "same": "yes" if rung["same"] else "no"} for rung in _exact(found["rungs"])]
        )
        for line in found["differs"]:
            typer.echo(f"not as it was: {line}")
        typer.echo(
            f"{'the same to the digit' if found['same'] else 'not the same'}: {found['folder']}"
        )
    if not found["same"]:
        raise typer.Exit(1)


@app.command()
def retry(name: Name, number: Number, runs: Runs = Path("runs"), as_json: Json = False) -> None:
    """Enqueue a finished trial's parameters once more, as a new trial with a seed of its own."""
    from amlp_ray.study.operations.edit import retry

    store = opened(name, runs)
    again = retry(store, store.config(), number)
    if as_json:
        print_json({"study": store.name, "number": again, "retry_of": number})
        return
    typer.echo(
        f"trial {again} of {store.name!r} waits to be run with the parameters of trial {number}"
    )
    note_used_budget(store)


def _lines(values: dict[str, Any]) -> list[dict[str, Any]]:
    """By their names, as they are written in a file."""
    from amlp_ray.config.overrides import flatten

    return [{"name": name, "value": value} for name, value in flatten(values).items()]


def _exact(rungs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Scores with all their digits, which a table would round."""
    return [{k: repr(v) if isinstance(v, float) else v for k, v in rung.items()} for rung in rungs]
