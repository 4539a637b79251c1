"""amlp-ray study pause, stop, cancel, extend, enqueue, delete: from any shell that sees the study."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from amlp_ray.cli.output import Json, print_facts, print_json
from amlp_ray.cli.study_options import File, Name, Runs, begun_or_not, opened
from amlp_ray.errors import ConfigError

if TYPE_CHECKING:
    from amlp_ray.study.storage.study_store import Request, StudyStore

NoWait = Annotated[
    bool, typer.Option("--no-wait", help="Do not wait until the study has heard it.")
]
LOOK_S = 0.5
MEANS = {
    "pause": "running trials return after their epoch and are kept; `amlp-ray study resume {name}` goes on",
    "stop": "no new trials begin, and running ones finish",
    "cancel": "running trials end now, as failed",
}


def pause(name: Name, runs: Runs = Path("runs"), no_wait: NoWait = False) -> None:
    """Pause a study: running trials return after their epoch and are kept, to be continued by `resume`."""
    _ask(opened(name, runs), "pause", no_wait)


def stop(name: Name, runs: Runs = Path("runs"), no_wait: NoWait = False) -> None:
    """Stop a study: no new trials begin, running ones finish."""
    _ask(opened(name, runs), "stop", no_wait)


def cancel(name: Name, runs: Runs = Path("runs"), no_wait: NoWait = False) -> None:
    """Cancel a study: running trials end now, as failed."""
    _ask(opened(name, runs), "cancel", no_wait)


def _ask(store: StudyStore, verb: Request, no_wait: bool) -> None:
    """Leave word for whoever runs the study. Where nobody does, what is asked for is so already."""
    holder = store.holder()
    if holder is None:
        typer.echo(f"Study {store.name!r} is run by nobody; there is nothing to {verb}.")
        return
    store.request(verb)
    means = MEANS[verb].format(name=store.name)
    if no_wait:
        typer.echo(f"asked {holder} to {verb} {store.name!r}: {means}")
        return
    typer.echo(f"asked {holder} to {verb} {store.name!r}, waiting for its answer")
    while "answer" not in (store.last_request() or {"answer": None}):
        if store.holder() is None:
            typer.echo(
                f"{holder} ended before it answered; study {store.name!r} is run by nobody now."
            )
            return
        time.sleep(LOOK_S)
    typer.echo(f"heard: {means}")


def extend(
    name: Name,
    runs: Runs = Path("runs"),
    trials: Annotated[
        str | None, typer.Option(help="+10 for ten more, 40 for forty in all.")
    ] = None,
    hours: Annotated[str | None, typer.Option(help="Of running, likewise.")] = None,
    gpu_hours: Annotated[str | None, typer.Option(help="Held by trials, likewise.")] = None,
    epochs: Annotated[
        str | None, typer.Option(help="Trained by all trials together, likewise.")
    ] = None,
    space: Annotated[
        Path | None, typer.Option(help="Study file whose space and requirements take the place.")
    ] = None,
    mapping: Annotated[
        list[str] | None,
        typer.Option("--map", help="OLD=NEW: a parameter that has another name now; repeatable."),
    ] = None,
    fill: Annotated[
        list[str] | None,
        typer.Option(help="NAME=VALUE: what old trials had of a new parameter; repeatable."),
    ] = None,
    drop: Annotated[
        list[str] | None,
        typer.Option(help="NAME: a parameter that is gone, whatever old trials had; repeatable."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Give a study more budget, also after its end and while it runs; or another space, while nobody runs it."""
    store = opened(name, runs)
    facts: dict[str, object] = {"study": store.name}
    if space is not None:
        from amlp_ray.config.yaml_file import read_yaml
        from amlp_ray.study.operations.change_space import change_of, migrate
        from amlp_ray.study.search_space.validate import build_study

        change = change_of(mapping or [], fill or [], drop or [])
        facts |= vars(migrate(store, build_study(read_yaml(space), str(space)), change))
    elif mapping or fill or drop:
        raise ConfigError(
            "--map, --fill and --drop say what becomes of a changed space; give it with --space FILE."
        )
    if space is None or any((trials, hours, gpu_hours, epochs)):
        from amlp_ray.study.operations.edit import extend

        budget = extend(store, trials=trials, hours=hours, gpu_hours=gpu_hours, epochs=epochs)
        facts["budget"] = {
            key: value for key, value in budget.model_dump().items() if value is not None
        }
    if as_json:
        print_json(facts)
        return
    print_facts(facts)
    if store.holder() is None:
        typer.echo(f"`amlp-ray study resume {store.name}` goes on")


def enqueue(
    file: File,
    values: Annotated[
        list[str], typer.Argument(help="name=value of the space; what is left open is sampled.")
    ],
    runs: Runs = Path("runs"),
    as_json: Json = False,
) -> None:
    """Give a study a trial to run before those of its sampler; also while it runs, or before it ever did."""
    from amlp_ray.config.overrides import flatten, parse_overrides
    from amlp_ray.study.operations.edit import enqueue

    store, config = begun_or_not(file, runs)
    number = enqueue(store, config, flatten(parse_overrides(values, "enqueue")))
    if as_json:
        print_json({"study": config.name, "number": number})
        return
    typer.echo(f"trial {number} of {config.name!r} waits to be run")
    note_used_budget(store)


def note_used_budget(store: StudyStore) -> None:
    """Say where a waiting trial would wait in vain."""
    from amlp_ray.study.operations.status import spent_by

    config = store.config()
    spent = spent_by(store, store.search().get_trials(deepcopy=False), config)
    if reached := spent.reached(config.budget):
        typer.echo(
            f"note: the budget is used ({reached}); `amlp-ray study extend {store.name}` gives it more"
        )


def delete(
    name: Name,
    runs: Runs = Path("runs"),
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Delete a study: its folder, and what a database holds of it."""
    from amlp_ray.study.operations.edit import delete

    store = opened(name, runs)
    count = len(store.search().get_trials(deepcopy=False))
    if not yes and not typer.confirm(
        f"Delete {store.folder} with {count} trials and their encoders?"
    ):
        typer.echo("nothing was deleted")
        return
    delete(store)
    typer.echo(f"deleted {store.folder}")
