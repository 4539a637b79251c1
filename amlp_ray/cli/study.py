"""amlp-ray study: commands that create and run a study; the others stand in `study_*.py`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from typer import Argument, Option

from amlp_ray.cli import study_control, study_inspect, study_transfer, study_trial, study_watch
from amlp_ray.cli.output import Json, print_fields, print_json
from amlp_ray.cli.run_options import Set
from amlp_ray.cli.study_inspect import status_fields
from amlp_ray.cli.study_options import (
    DEFAULT_RUNS,
    Address,
    AllowCode,
    Data,
    EvalData,
    File,
    Name,
    Runs,
    load_study,
    open_store,
)
from amlp_ray.errors import FailedStudyError

app = typer.Typer(
    help="Search settings: many trials, scored by the segmentation they lead to.",
    no_args_is_help=True,
)


@app.command()
def init(
    name: Name,
    template: Annotated[
        str | None,
        Option(
            "--from", help="A ready study, such as masking_ratio, or a study file to start from."
        ),
    ] = None,
    folder: Annotated[Path, Option(help="Folder to write it to.")] = Path(),
) -> None:
    """Write a commented study file NAME.yaml to edit."""
    from amlp_ray.study.operations.templates import init_study

    file = init_study(name, template=template, folder=folder)
    typer.echo(f"study file: {file}; check it with `amlp-ray study validate {file}`")


@app.command()
def validate(
    file: Annotated[Path, Argument(help="Study file.")],
    data: Data = None,
    eval_data: EvalData = None,
    allow_code: AllowCode = False,
    as_json: Json = False,
) -> None:
    """Check a study file and list all its mistakes; no data is needed."""
    from amlp_ray.study.operations.templates import validate

    facts = validate(file, data=data, eval_data=eval_data, allow_code=allow_code)
    if as_json:
        print_json({"ok": True, **facts})
        return
    hint = "" if data else "; --data checks it against a dataset too"
    typer.echo(f"{file}: ok{hint}")
    print_fields({key: value for key, value in facts.items() if value not in (None, 0)})


@app.command()
def plan(
    file: File,
    data: Data = None,
    eval_data: EvalData = None,
    runs: Runs = DEFAULT_RUNS,
    assign: Set = None,
    address: Address = None,
    dry_run: Annotated[
        bool,
        Option(
            "--dry-run", help="Also run two steps of one trial on the cluster, and keep nothing."
        ),
    ] = False,
    allow_code: AllowCode = False,
    as_json: Json = False,
) -> None:
    """Check a study and estimate what it takes; nothing is run."""
    study = load_study(
        file, runs, data=data, eval_data=eval_data, overrides=assign, allow_code=allow_code
    )
    facts: dict[str, Any] = study.plan(address).as_dict()
    if dry_run:
        facts["dry_run"] = study.dry_run(address)
    if as_json:
        print_json(facts)
        return
    for name in ("seconds_per_trial", "hours", "gpu_hours"):
        if name in facts:
            least, expected, most = facts[name]
            facts[name] = f"{expected:.3g} ({least:.3g} to {most:.3g})"
    print_fields(facts)


@app.command()
def run(
    file: File,
    data: Data = None,
    eval_data: EvalData = None,
    runs: Runs = DEFAULT_RUNS,
    assign: Set = None,
    address: Address = None,
    allow_code: AllowCode = False,
) -> None:
    """Run a study, or resume it where it stopped, then write its report."""
    from amlp_ray.study.operations.status import status

    study = load_study(
        file, runs, data=data, eval_data=eval_data, overrides=assign, allow_code=allow_code
    )
    study.run(address)
    # Read again, because the budget may have been extended meanwhile.
    current = status(study.store)
    print_fields(status_fields(current))
    typer.echo(f"report: {study.report()}")
    if study.stop_reason in ("done", "budget") and not current["states"].get("COMPLETE"):
        raise FailedStudyError(
            f"No trial of {study.config.name!r} completed; `amlp-ray study trials` lists the "
            f"reasons."
        )


@app.command()
def resume(
    name: Name,
    runs: Runs = DEFAULT_RUNS,
    address: Address = None,
    allow_code: AllowCode = False,
) -> None:
    """Resume a study by its name: paused and interrupted trials first."""
    open_store(name, runs)
    run(Path(name), runs=runs, address=address, allow_code=allow_code)


@app.command()
def confirm(
    name: Name,
    top: Annotated[
        int | None, Option(help="Best trials to repeat; none: as in the study.", min=1)
    ] = None,
    seeds: Annotated[
        int | None, Option(help="Repeats of each; none: as in the study.", min=2)
    ] = None,
    runs: Runs = DEFAULT_RUNS,
    address: Address = None,
    allow_code: AllowCode = False,
    as_json: Json = False,
) -> None:
    """Train the best trials and the baselines over several seeds, and open the test images once."""
    open_store(name, runs)
    numbers = {"top": top, "seeds": seeds}
    overrides = [f"confirm.{key}={number}" for key, number in numbers.items() if number is not None]
    study = load_study(Path(name), runs, overrides=overrides, allow_code=allow_code)
    study.confirm(address)
    report_file = study.report()
    if as_json:
        from amlp_ray.study.confirmation.results import read_confirmation

        confirmation = read_confirmation(study.store)
        print_json(None if confirmation is None else confirmation.as_dict())
        return
    for sentence in study.verdict():
        typer.echo(sentence)
    typer.echo(f"report: {report_file}")


@app.command()
def report(
    name: Name,
    runs: Runs = DEFAULT_RUNS,
    out: Annotated[
        Path | None, Option(help="File to write; none: report.html in the study's folder.")
    ] = None,
) -> None:
    """Write the study's report."""
    from amlp_ray.study.report import write_report

    typer.echo(f"report: {write_report(open_store(name, runs), out)}")


app.command()(study_inspect.status)
app.command()(study_watch.watch)
app.command()(study_watch.logs)
app.command()(study_control.pause)
app.command()(study_control.stop)
app.command()(study_control.cancel)
app.command()(study_control.extend)
app.command()(study_control.enqueue)
app.command()(study_inspect.trials)
app.command()(study_inspect.best)
app.command()(study_inspect.compare)
app.command()(study_inspect.importance)
app.command("export")(study_transfer.export)
app.command("import")(study_transfer.import_)
app.command("list")(study_inspect.list_)
app.command()(study_control.repair)
app.command()(study_control.delete)
app.add_typer(study_trial.app, name="trial")
