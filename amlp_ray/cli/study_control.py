"""amlp-ray study pause, stop, cancel, extend, enqueue, repair, delete: change a study."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Argument, Option

from amlp_ray.cli.output import Json, print_fields, print_json
from amlp_ray.cli.study_options import (
    DEFAULT_RUNS,
    AllowCode,
    File,
    Name,
    Runs,
    find_study,
    open_store,
)
from amlp_ray.errors import ConfigError, StudyError
from amlp_ray.utils.text import counted

if TYPE_CHECKING:
    from amlp_ray.config import StudyConfig
    from amlp_ray.study.storage.requests import Verb
    from amlp_ray.study.storage.study_store import StudyStore

NoWait = Annotated[bool, Option("--no-wait", help="Do not wait until the study has received it.")]
POLL_INTERVAL_S = 0.5
EFFECTS = {
    "pause": (
        "running trials stop after the current epoch and are kept; "
        "`amlp-ray study resume {name}` resumes them"
    ),
    "stop": "no new trials start, and running ones finish",
    "cancel": "running trials end now, as failed",
}


def pause(name: Name, runs: Runs = DEFAULT_RUNS, no_wait: NoWait = False) -> None:
    """Pause a study: running trials stop after the current epoch; `resume` continues them."""
    _request(_open_begun(name, runs, "pause"), "pause", no_wait)


def stop(name: Name, runs: Runs = DEFAULT_RUNS, no_wait: NoWait = False) -> None:
    """Stop a study: no new trials start, running ones finish."""
    _request(_open_begun(name, runs, "stop"), "stop", no_wait)


def cancel(name: Name, runs: Runs = DEFAULT_RUNS, no_wait: NoWait = False) -> None:
    """Cancel a study: running trials end now, as failed."""
    _request(_open_begun(name, runs, "cancel"), "cancel", no_wait)


def _open_begun(name: str, runs: Path, verb: Verb) -> StudyStore:
    """Open the store of a study, which must have begun."""
    if not (runs / name).exists():
        raise StudyError(
            f"Study {name!r} has not begun in {runs}, so there is nothing to {verb}; `amlp-ray "
            f"study list` lists those that have. A run that was started just now can be asked as "
            f"soon as it prints its folder, or be ended with Ctrl-C."
        )
    return open_store(name, runs)


def _request(store: StudyStore, verb: Verb, no_wait: bool) -> None:
    """Send a request to the process that runs the study, and wait for its answer."""
    holder = store.holder()
    if holder is None:
        # A stored request would be obeyed by the next run at once.
        typer.echo(f"Study {store.name!r} is not running; there is nothing to {verb}.")
        return
    request_id = store.request(verb)
    if request_id is None:
        typer.echo(f"{holder} ended meanwhile; study {store.name!r} is not running.")
        return
    effect = EFFECTS[verb].format(name=store.name)
    if no_wait:
        typer.echo(f"asked {holder} to {verb} {store.name!r}: {effect}")
        return
    typer.echo(f"asked {holder} to {verb} {store.name!r}, waiting for its answer")
    while not store.is_answered(request_id):
        if store.holder() is None:
            typer.echo(f"{holder} ended before it answered; study {store.name!r} is not running.")
            return
        time.sleep(POLL_INTERVAL_S)
    typer.echo(f"received: {effect}")


def extend(
    name: Name,
    runs: Runs = DEFAULT_RUNS,
    trials: Annotated[str | None, Option(help="+10 for ten more, 40 for forty in all.")] = None,
    hours: Annotated[str | None, Option(help="Hours of running, likewise.")] = None,
    gpu_hours: Annotated[str | None, Option(help="Hours of GPUs, likewise.")] = None,
    epochs: Annotated[str | None, Option(help="Epochs of all trials, likewise.")] = None,
    space: Annotated[
        Path | None, Option(help="Study file with the new space and requirements.")
    ] = None,
    mapping: Annotated[
        list[str] | None,
        Option("--map", help="OLD=NEW: a parameter that has another name now; repeatable."),
    ] = None,
    fill: Annotated[
        list[str] | None,
        Option(help="NAME=VALUE: what old trials had of a new parameter; repeatable."),
    ] = None,
    drop: Annotated[
        list[str] | None,
        Option(help="NAME: a parameter that is gone, whatever old trials had; repeatable."),
    ] = None,
    allow_code: AllowCode = False,
    as_json: Json = False,
) -> None:
    """Extend a study's budget, at any time; or change its space, while it does not run."""
    store = open_store(name, runs, allow_code=allow_code)
    result: dict[str, Any] = {"study": store.name}
    if space is not None:
        new = _read_study(space, allow_code)
        result |= _change_space(store, new, mapping or [], fill or [], drop or [])
    elif mapping or fill or drop:
        raise ConfigError(
            "--map, --fill and --drop say what becomes of a changed space; give it with "
            "--space FILE."
        )
    if space is None or any((trials, hours, gpu_hours, epochs)):
        from amlp_ray.study.operations.edit import extend

        budget = extend(store, trials=trials, hours=hours, gpu_hours=gpu_hours, epochs=epochs)
        result["budget"] = budget.model_dump(exclude_none=True)
    if as_json:
        print_json(result)
        return
    print_fields(result)
    if store.holder() is None:
        typer.echo(f"`amlp-ray study resume {store.name}` resumes it")


def _read_study(file: Path, allow_code: bool) -> StudyConfig:
    from amlp_ray.study.operations.templates import read_study_file
    from amlp_ray.study.search_space.validate import build_study

    return build_study(read_study_file(file), str(file), should_allow_code=allow_code)


def _change_space(
    store: StudyStore, new: StudyConfig, mapping: list[str], fill: list[str], drop: list[str]
) -> dict[str, Any]:
    from amlp_ray.study.operations.change_space import change_of, migrate

    return vars(migrate(store, new, change_of(mapping, fill, drop)))


def enqueue(
    file: File,
    values: Annotated[list[str], Argument(help="name=value of the space; the others are sampled.")],
    runs: Runs = DEFAULT_RUNS,
    allow_code: AllowCode = False,
    as_json: Json = False,
) -> None:
    """Enqueue a trial that is run before those of the sampler, at any time, even before a run."""
    from amlp_ray.config.overrides import flatten, parse_overrides
    from amlp_ray.study.operations.edit import enqueue

    store, config = find_study(file, runs, allow_code=allow_code)
    number = enqueue(store, config, flatten(parse_overrides(values, "enqueue")))
    if as_json:
        print_json({"study": config.name, "number": number})
        return
    typer.echo(f"trial {number} of {config.name!r} waits to be run")
    warn_used_budget(store)


def warn_used_budget(store: StudyStore) -> None:
    """Say so if the budget is used, because an enqueued trial is not run then."""
    from amlp_ray.study.operations.status import study_usage
    from amlp_ray.study.storage.trial_record import trial_records

    config = store.config()
    usage = study_usage(store, trial_records(store.search()))
    if limit := usage.reached(config.budget):
        typer.echo(
            f"note: the budget is used ({limit}); `amlp-ray study extend {store.name}` extends it"
        )


def repair(
    name: Name,
    runs: Runs = DEFAULT_RUNS,
    allow_code: AllowCode = False,
    as_json: Json = False,
) -> None:
    """Restore a study whose journal or database was lost or damaged from its trial folders."""
    from amlp_ray.study.operations.repair import repair

    store = open_store(name, runs, allow_code=allow_code)
    result = repair(store)
    if as_json:
        print_json({"study": store.name, **vars(result)})
        return
    if not result.restored and not result.gone and result.copy is None and not result.notes:
        typer.echo(f"nothing is to be repaired in {store.name!r}")
        return
    typer.echo(
        f"repaired {store.name!r}: {counted(len(result.restored), 'run')} restored from folders, "
        f"{result.kept} as they were stored, {len(result.gone)} gone"
    )
    if result.copy is not None:
        typer.echo(f"the old journal is kept as {result.copy}")
    for note in result.notes:
        typer.echo(f"note: {note}")
    typer.echo(f"`amlp-ray study status {store.folder.name}` shows it")


def delete(
    name: Name,
    runs: Runs = DEFAULT_RUNS,
    yes: Annotated[bool, Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Delete a study: its folder, and its trials in a database."""
    from amlp_ray.study.operations.edit import count_trials, delete

    store = open_store(name, runs)
    count = count_trials(store)
    question = f"Delete {store.folder} with {counted(count, 'trial')} and all encoders?"
    if not yes and not typer.confirm(question):
        typer.echo("nothing was deleted")
        return
    delete(store)
    typer.echo(f"deleted {store.folder}")
