"""amlp-ray study trial: one trial of a study."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import typer

from amlp_ray.cli.output import Json, print_fields, print_json, print_table
from amlp_ray.cli.study_control import warn_used_budget
from amlp_ray.cli.study_options import (
    DEFAULT_RUNS,
    AllowCode,
    Data,
    EvalData,
    Name,
    Number,
    Runs,
    open_store,
)

app = typer.Typer(help="One trial of a study.", no_args_is_help=True)

# Parts of a trial that are printed as tables.
TABLES = ("rungs", "config", "provenance")


@app.command()
def show(name: Name, number: Number, runs: Runs = DEFAULT_RUNS, as_json: Json = False) -> None:
    """Show a trial: settings, scores at rungs, cost, provenance and files."""
    from amlp_ray.config.overrides import flatten
    from amlp_ray.study.operations.trials import trial_details

    facts = trial_details(open_store(name, runs), number)
    if as_json:
        print_json(facts)
        return
    fields = {key: value for key, value in facts.items() if key not in TABLES}
    print_fields({key: value for key, value in fields.items() if value not in (None, {}, [])})
    if facts["rungs"]:
        typer.echo()
        scores = facts["rungs"].items()
        print_table([{"epoch": epoch, facts["metric"]: score} for epoch, score in scores])
    for title in ("config", "provenance"):
        if facts[title]:
            typer.echo(f"\n{title}")
            values = flatten(facts[title]).items()
            print_table([{"name": name, "value": value} for name, value in values])


@app.command()
def replay(
    name: Name,
    number: Number,
    runs: Runs = DEFAULT_RUNS,
    data: Data = None,
    eval_data: EvalData = None,
    as_json: Json = False,
) -> None:
    """Train a trial again and compare its scores to the digit; exit code 1 where they differ."""
    from amlp_ray.study.operations.replay import replay

    store = open_store(name, runs)
    result = replay(store, store.config(), number, data=data, eval_data=eval_data)
    if as_json:
        print_json(result)
    else:
        _print_replay(result)
    if not result["same"]:
        raise typer.Exit(1)


def _print_replay(result: Mapping[str, Any]) -> None:
    print_table(_exact_rows(result["rungs"]))
    for line in result["differs"]:
        typer.echo(f"differs from then: {line}")
    verdict = "the same to the digit" if result["same"] else "not the same"
    typer.echo(f"{verdict}: {result['folder']}")


def _exact_rows(rungs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return rows with all digits of the scores, which a table would round."""
    rows = []
    for rung in rungs:
        row = dict(rung)
        for key, value in rung.items():
            if isinstance(value, float):
                row[key] = repr(value)
        row["same"] = "yes" if rung["same"] else "no"
        rows.append(row)
    return rows


@app.command()
def retry(
    name: Name,
    number: Number,
    runs: Runs = DEFAULT_RUNS,
    allow_code: AllowCode = False,
    as_json: Json = False,
) -> None:
    """Enqueue a finished trial's parameters once more, as a new trial with another seed."""
    from amlp_ray.study.operations.edit import retry

    store = open_store(name, runs, allow_code=allow_code)
    new_number = retry(store, store.config(), number)
    if as_json:
        print_json({"study": store.name, "number": new_number, "retry_of": number})
        return
    typer.echo(
        f"trial {new_number} of {store.name!r} waits to be run with the parameters of trial "
        f"{number}"
    )
    warn_used_budget(store)
