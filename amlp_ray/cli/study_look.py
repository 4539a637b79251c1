"""amlp-ray study status, trials, best, compare, importance, list: what there is to see, at any time."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from amlp_ray.cli.output import Json, print_facts, print_json, print_table
from amlp_ray.cli.study_options import Name, Runs, opened

if TYPE_CHECKING:
    from amlp_ray.config import StudyConfig
    from amlp_ray.study.storage.study_store import StudyStore


def status(name: Name, runs: Runs = Path("runs"), as_json: Json = False) -> None:
    """Show how far a study is: who runs it, its budget, its best trial."""
    from amlp_ray.study.operations.status import status

    facts = status(opened(name, runs))
    print_json(facts) if as_json else print_facts(told(facts))


def trials(
    name: Name,
    runs: Runs = Path("runs"),
    state: Annotated[
        list[str] | None,
        typer.Option(help="COMPLETE, PRUNED, FAIL, RUNNING, INTERRUPTED or WAITING; repeatable."),
    ] = None,
    sort: Annotated[
        str | None, typer.Option(help="A column; -dsc from high to low, dsc from low to high.")
    ] = None,
    columns: Annotated[str | None, typer.Option(help="Columns to show, between commas.")] = None,
    limit: Annotated[int | None, typer.Option(help="Rows to show.", min=1)] = None,
    as_json: Json = False,
) -> None:
    """List all trials, baseline baselines and confirmations."""
    from amlp_ray.study.operations.trials import chosen_rows, trial_rows

    chosen = [column.strip() for column in (columns or "").split(",") if column.strip()]
    rows = chosen_rows(
        trial_rows(opened(name, runs)), states=state or (), sort=sort, columns=chosen, limit=limit
    )
    print_json(rows) if as_json else print_table(rows)


def best(name: Name, runs: Runs = Path("runs"), as_json: Json = False) -> None:
    """Show the best complete trial; with several objectives, all that no other beats in each."""
    from amlp_ray.study.storage.best_trials import best_trial, front

    store = opened(name, runs)
    config = store.config()
    top = best_trial(store, config)  # says so where there is none
    rows = []
    for trial in front(store.search().get_trials(deepcopy=False), config):
        folder = store.trial_folder(trial.number)
        rows.append(
            {
                "number": trial.number,
                **dict(zip(config.objectives, trial.values, strict=True)),
                "params": dict(trial.params),
                **_learnt(store, config, trial.number),
                "encoder": str(folder / "encoder.safetensors"),
                "config": str(folder / "config.yaml"),
            }
        )
    if len(config.objectives) == 1:
        print_json(rows[0]) if as_json else print_facts(rows[0])
    elif as_json:
        print_json({"best": top.number, "metric": config.metric, "front": rows})
    else:
        typer.echo(
            f"best by {config.metric}: trial {top.number}; no other trial beats these in every objective:"
        )
        print_table(
            [{key: row[key] for key in ("number", *config.objectives, "params")} for row in rows]
        )


def _learnt(store: StudyStore, config: StudyConfig, number: int) -> dict[str, Any]:
    """The masking-ratio schedule that a population has learnt, for `ratio.points`; nothing for other samplers."""
    if config.sampler.name != "pbt":
        return {}
    from amlp_ray.study.search.pbt import learnt_schedule

    trials = store.search().get_trials(deepcopy=False)
    return {
        "schedule": [
            [share, round(level, 4)] for share, level in learnt_schedule(config, trials, number)
        ]
    }


def compare(
    names: Annotated[list[str], typer.Argument(help="Names of two or more studies.")],
    runs: Runs = Path("runs"),
    as_json: Json = False,
) -> None:
    """Compare studies: best trials, baselines, differing settings, and whether their scores can be compared."""
    from amlp_ray.study.operations.compare import compare

    found = compare([opened(name, runs) for name in names])
    if as_json:
        print_json(found)
        return
    rows = [
        {k: v for k, v in row.items() if k not in ("data", "baselines")} for row in found["studies"]
    ]
    baselines = dict.fromkeys(baseline for row in found["studies"] for baseline in row["baselines"])
    for row, full in zip(rows, found["studies"], strict=True):
        row |= {
            f"baseline {baseline}": full["baselines"].get(baseline, {}).get("mean")
            for baseline in baselines
        }
    print_table(rows)
    typer.echo(f"\n{found['verdict']}")
    if found["differing"]:
        typer.echo("\nsettings that differ")
        print_table(found["differing"])
    for pair in found["overlap"]:
        text = f"\n{' and '.join(pair['studies'])} both search {', '.join(pair['searched_in_both']) or 'nothing'}"
        if pair["same_trials"]:
            text += f"; {pair['same_trials']} trials have the same parameters, {pair['mean_difference']:+.3f} on average"
        typer.echo(text)


def importance(name: Name, runs: Runs = Path("runs"), as_json: Json = False) -> None:
    """Show which parameters set the best trials apart (PED-ANOVA), as the report does."""
    from amlp_ray.study.report import importances

    found = importances(opened(name, runs))
    if as_json:
        print_json(
            {objective: {"shares": i.shares, "gap": i.gap} for objective, i in found.items()}
        )
        return
    for objective, shares in found.items():
        typer.echo(
            f"{objective}: {shares.gap or 'share of the difference between the best trials and the rest'}"
        )
        if shares.shares:
            print_table(
                [{"parameter": name, "share": share} for name, share in shares.shares.items()]
            )


def list_(runs: Runs = Path("runs"), as_json: Json = False) -> None:
    """List all studies of a folder."""
    from amlp_ray.study.operations.status import list_studies

    rows = list_studies(runs)
    if as_json:
        print_json(rows)
    elif rows:
        print_table(rows)
    else:
        typer.echo(f"there is no study in {runs}")


def told(facts: Mapping[str, Any]) -> dict[str, Any]:
    """A study's status as lines for people."""
    lines: dict[str, Any] = {
        "study": facts["study"],
        "folder": facts["folder"],
        "state": facts["state"],
    }
    if facts["run_by"]:
        lines["run by"] = facts["run_by"] + (f", since {facts['since']}" if facts["since"] else "")
    if request := facts["request"]:
        answered = f"answered {request['answer']}" if "answer" in request else "not answered yet"
        lines["asked"] = f"{request['verb']} by {request['by']}, {answered}"
    lines["trials"] = facts["states"] or "none yet"
    if facts["arm_states"].keys() - {"COMPLETE"}:
        lines["baseline runs"] = facts["arm_states"]
    if facts["imported"]:
        lines["imported"] = (
            f"{facts['imported']} trials, which count neither in the budget nor as best"
        )
    lines["budget"] = ", ".join(
        f"{part['used']:.4g}"
        + ("" if part["allowed"] is None else f" of {part['allowed']:g}")
        + f" {name.replace('_', '-')}"
        for name, part in facts["budget"].items()
        if part["allowed"] is not None or part["used"]
    )
    if facts["best"]:
        several = len(facts["objectives"]) > 1
        lines["front" if several else "best"] = [_short(row) for row in facts["best"]]
    for baseline, values in facts["baselines"].items():
        lines[f"baseline {baseline}"] = values
    if facts["confirmed"]:
        lines["confirmed"] = {
            name: f"{c['done']} done of {c['begun']} begun"
            for name, c in facts["confirmed"].items()
        }
    if facts["changed"]:
        lines["last change"] = facts["changed"]
    return lines


def _short(row: Mapping[str, Any]) -> str:
    scores = ", ".join(
        f"{name} {value:.4g}" for name, value in row.items() if name not in ("trial", "params")
    )
    params = ", ".join(
        f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in row["params"].items()
    )
    return f"trial {row['trial']} with {scores}" + (f" ({params})" if params else "")
