"""amlp-ray study status, trials, best, compare, importance, list: read a study at any time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Argument, Option

from amlp_ray.cli.output import Json, print_fields, print_json, print_table
from amlp_ray.cli.study_options import DEFAULT_RUNS, Name, Runs, open_store

if TYPE_CHECKING:
    from amlp_ray.config import StudyConfig
    from amlp_ray.study.storage.study_store import StudyStore


def status(name: Name, runs: Runs = DEFAULT_RUNS, as_json: Json = False) -> None:
    """Show the progress of a study: who runs it, its budget, its best trial."""
    from amlp_ray.study.operations.status import status

    current = status(open_store(name, runs))
    print_json(current) if as_json else print_fields(status_fields(current))


def trials(
    name: Name,
    runs: Runs = DEFAULT_RUNS,
    state: Annotated[
        list[str] | None,
        Option(help="COMPLETE, PRUNED, FAIL, RUNNING, INTERRUPTED or WAITING; repeatable."),
    ] = None,
    sort: Annotated[
        str | None, Option(help="A column; -dsc from high to low, dsc from low to high.")
    ] = None,
    columns: Annotated[str | None, Option(help="Columns to show, between commas.")] = None,
    limit: Annotated[int | None, Option(help="Rows to show.", min=1)] = None,
    as_json: Json = False,
) -> None:
    """List all trials, baselines and confirmation runs."""
    from amlp_ray.study.operations.trials import select_rows, trial_rows

    names = [column.strip() for column in (columns or "").split(",")]
    rows = select_rows(
        trial_rows(open_store(name, runs)),
        states=state or (),
        sort=sort,
        columns=list(filter(None, names)),
        limit=limit,
    )
    print_json(rows) if as_json else print_table(rows)


def best(name: Name, runs: Runs = DEFAULT_RUNS, as_json: Json = False) -> None:
    """Show the best complete trial; with several objectives, all that no other beats in each."""
    from amlp_ray.study.storage.best_trials import best_trial, pareto_front
    from amlp_ray.study.storage.trial_record import trial_records

    store = open_store(name, runs)
    config = store.config()
    # Raises an error if no trial is complete.
    top = best_trial(store, config)
    rows = []
    for trial in pareto_front(trial_records(store.search()), config):
        folder = store.trial_folder(trial.number)
        row: dict[str, Any] = {"number": trial.number, **trial.objective_values(config)}
        row["params"] = dict(trial.params)
        if config.sampler.name == "pbt":
            row["schedule"] = _ratio_schedule(store, config, trial.number)
        row["encoder"] = str(folder / "encoder.safetensors")
        row["config"] = str(folder / "config.yaml")
        rows.append(row)
    if len(config.objectives) == 1:
        print_json(rows[0]) if as_json else print_fields(rows[0])
    elif as_json:
        print_json({"best": top.number, "metric": config.metric, "front": rows})
    else:
        typer.echo(
            f"best by {config.metric}: trial {top.number}; no other trial beats these in every "
            f"objective:"
        )
        columns = ("number", *config.objectives, "params")
        print_table([{name: row[name] for name in columns} for row in rows])


def _ratio_schedule(store: StudyStore, config: StudyConfig, number: int) -> list[list[float]]:
    """Return the masking ratios that a population has found, as `ratio.points` takes them."""
    from amlp_ray.study.search.pbt import learned_schedule

    stored_trials = store.search().get_trials(deepcopy=False)
    points = learned_schedule(config, stored_trials, number)
    return [[share, round(ratio, 4)] for share, ratio in points]


def compare(
    names: Annotated[list[str], Argument(help="Names of two or more studies.")],
    runs: Runs = DEFAULT_RUNS,
    as_json: Json = False,
) -> None:
    """Compare studies: best trials, baselines, and settings; say whether scores are comparable."""
    from amlp_ray.study.operations.compare import compare

    comparison = compare([open_store(name, runs) for name in names])
    if as_json:
        print_json(comparison)
        return
    print_table(_comparison_rows(comparison["studies"]))
    typer.echo(f"\n{comparison['verdict']}")
    if comparison["differing"]:
        typer.echo("\nsettings that differ")
        print_table(comparison["differing"])
    for pair in comparison["overlap"]:
        common = ", ".join(pair["searched_in_both"]) or "nothing"
        text = f"\n{' and '.join(pair['studies'])} both search {common}"
        if pair["same_trials"]:
            text += (
                f"; {pair['same_trials']} trials have the same parameters, "
                f"{pair['mean_difference']:+.3f} on average"
            )
        typer.echo(text)


def _comparison_rows(studies: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return a row per study, with a column per baseline of any of them."""
    baselines: dict[str, None] = {}
    for study in studies:
        baselines |= dict.fromkeys(study["baselines"])
    rows = []
    for study in studies:
        row = {name: value for name, value in study.items() if name not in ("data", "baselines")}
        for name in baselines:
            row[f"baseline {name}"] = study["baselines"].get(name, {}).get("mean")
        rows.append(row)
    return rows


def importance(name: Name, runs: Runs = DEFAULT_RUNS, as_json: Json = False) -> None:
    """Show which parameters distinguish the best trials (PED-ANOVA), as the report does."""
    from amlp_ray.study.report import importances

    by_objective = importances(open_store(name, runs))
    if as_json:
        print_json({name: vars(result) for name, result in by_objective.items()})
        return
    for objective, result in by_objective.items():
        meaning = "share of the difference between the best trials and the rest"
        typer.echo(f"{objective}: {result.gap or meaning}")
        if result.shares:
            shares = result.shares.items()
            print_table([{"parameter": name, "share": share} for name, share in shares])


def list_(runs: Runs = DEFAULT_RUNS, as_json: Json = False) -> None:
    """List all studies of a folder."""
    from amlp_ray.study.operations.status import list_studies

    rows = list_studies(runs)
    if as_json:
        print_json(rows)
    elif rows:
        print_table(rows)
    else:
        typer.echo(f"there is no study in {runs}")


def status_fields(status: Mapping[str, Any]) -> dict[str, Any]:
    """Return a study's status as fields for people."""
    fields = {name: status[name] for name in ("study", "folder", "state")}
    if status["run_by"]:
        since = f", since {status['since']}" if status["since"] else ""
        fields["run by"] = f"{status['run_by']}{since}"
    if request := status["request"]:
        answer = f"answered {request['answer']}" if "answer" in request else "not answered yet"
        fields["request"] = f"{request['verb']} by {request['by']}, {answer}"
    fields["trials"] = status["states"] or "none yet"
    if status["baseline_states"].keys() - {"COMPLETE"}:
        fields["baseline runs"] = status["baseline_states"]
    if status["imported"]:
        fields["imported"] = (
            f"{status['imported']} trials, which count neither in the budget nor as best"
        )
    fields["budget"] = _format_budget(status["budget"])
    if status["best"]:
        is_front = len(status["objectives"]) > 1
        fields["front" if is_front else "best"] = [_format_trial(row) for row in status["best"]]
    for baseline, values in status["baselines"].items():
        fields[f"baseline {baseline}"] = values
    if status["confirmed"]:
        fields["confirmed"] = {}
        for name, counts in status["confirmed"].items():
            fields["confirmed"][name] = f"{counts['done']} done of {counts['begun']} started"
    if status["changed"]:
        fields["last change"] = status["changed"]
    return fields


def _format_budget(budget: Mapping[str, Mapping[str, float | None]]) -> str:
    parts = []
    for name, limit in budget.items():
        used, allowed = limit["used"], limit["allowed"]
        if allowed is not None or used:
            of_allowed = "" if allowed is None else f" of {allowed:g}"
            parts.append(f"{used:.4g}{of_allowed} {name.replace('_', '-')}")
    return ", ".join(parts)


def _format_trial(row: Mapping[str, Any]) -> str:
    scores = []
    for name, value in row.items():
        if name not in ("trial", "params"):
            scores.append(f"{name} {value:.4g}")
    params = []
    for name, value in row["params"].items():
        params.append(f"{name}={value:.4g}" if isinstance(value, float) else f"{name}={value}")
    suffix = f" ({', '.join(params)})" if params else ""
    return f"trial {row['trial']} with {', '.join(scores)}{suffix}"
