"""amlp-ray study: from a study file to its report; what looks at a study, and what changes it, stands beside."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from amlp_ray.cli import study_control, study_exchange, study_look, trial, watch
from amlp_ray.cli.output import Json, print_facts, print_json
from amlp_ray.cli.pretrain import Set
from amlp_ray.cli.study_look import told
from amlp_ray.cli.study_options import Address, Data, File, Labels, Name, Runs, load, opened
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
        typer.Option(
            "--from", help="A ready study, such as masking_ratio, or a study file to begin with."
        ),
    ] = None,
    folder: Annotated[Path, typer.Option(help="Where to write it.")] = Path(),
) -> None:
    """Write a commented study file NAME.yaml to change."""
    from amlp_ray.study.operations.templates import init_study

    file = init_study(name, template=template, folder=folder)
    typer.echo(f"study file: {file}; check it with `amlp-ray study validate {file}`")


@app.command()
def validate(
    file: Annotated[Path, typer.Argument(help="Study file.")],
    data: Data = None,
    eval_data: Labels = None,
    as_json: Json = False,
) -> None:
    """Check a study file and list all its faults; no data is needed."""
    from amlp_ray.study.operations.templates import validate

    facts = validate(file, data=data, eval_data=eval_data)
    if as_json:
        print_json({"ok": True, **facts})
        return
    typer.echo(f"{file}: ok" + ("" if data else "; --data checks it against a dataset too"))
    print_facts({key: value for key, value in facts.items() if value not in (None, 0)})


@app.command()
def plan(
    file: File,
    data: Data = None,
    eval_data: Labels = None,
    runs: Runs = Path("runs"),
    assign: Set = None,
    address: Address = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Also run two steps of one trial on the cluster, and keep nothing."
        ),
    ] = False,
    as_json: Json = False,
) -> None:
    """Check a study and say what it will take; nothing is run."""
    study = load(file, data, eval_data, runs, assign)
    facts: dict[str, Any] = study.plan(address).as_dict()
    if dry_run:
        facts["dry_run"] = study.dry_run(address)
    print_json(facts) if as_json else print_facts(
        {name: _ranged(name, value) for name, value in facts.items()}
    )


def _ranged(name: str, value: Any) -> Any:
    """Least, expected and most of a plan, as people read them."""
    if name not in ("seconds_per_trial", "hours", "gpu_hours"):
        return value
    least, expected, most = value
    return f"{expected:.3g} ({least:.3g} to {most:.3g})"


@app.command()
def run(
    file: File,
    data: Data = None,
    eval_data: Labels = None,
    runs: Runs = Path("runs"),
    assign: Set = None,
    address: Address = None,
) -> None:
    """Run a study, or go on with it where it stopped, then write its report."""
    from amlp_ray.study.operations.status import status

    study = load(file, data, eval_data, runs, assign)
    study.run(address, notify=typer.echo)
    facts = status(study.store)  # whose budget may have been extended meanwhile
    print_facts(told(facts))
    typer.echo(f"report: {study.report()}")
    if study.outcome in ("done", "budget") and not facts["states"].get("COMPLETE"):
        raise FailedStudyError(
            f"No trial of {study.config.name!r} completed; `amlp-ray study trials` gives the reasons."
        )


@app.command()
def resume(name: Name, runs: Runs = Path("runs"), address: Address = None) -> None:
    """Go on with a study by its name: paused and interrupted trials first."""
    opened(name, runs)
    run(Path(name), runs=runs, address=address)


@app.command()
def confirm(
    name: Name,
    top: Annotated[
        int | None, typer.Option(help="Best trials to repeat; none: as the study says.", min=1)
    ] = None,
    seeds: Annotated[
        int | None, typer.Option(help="Repeats of each; none: as the study says.", min=2)
    ] = None,
    runs: Runs = Path("runs"),
    address: Address = None,
    as_json: Json = False,
) -> None:
    """Train the best trials and every baseline again over several seeds, and look at the test images, once."""
    opened(name, runs)
    changes = [
        f"confirm.{key}={value}"
        for key, value in (("top", top), ("seeds", seeds))
        if value is not None
    ]
    study = load(Path(name), None, None, runs, changes)
    study.confirm(address, notify=lambda line: typer.echo(line, err=as_json))
    report = study.report()
    if as_json:
        from amlp_ray.study.confirmation.results import confirmation_of

        found = confirmation_of(study.store)
        print_json(None if found is None else found.as_dict())
        return
    for sentence in study.verdict():
        typer.echo(sentence)
    typer.echo(f"report: {report}")


@app.command()
def report(name: Name, runs: Runs = Path("runs")) -> None:
    """Write the study's report.html."""
    from amlp_ray.study.report import write_report

    typer.echo(f"report: {write_report(opened(name, runs))}")


app.command()(study_look.status)
app.command()(watch.watch)
app.command()(watch.logs)
for verb in (study_control.pause, study_control.stop, study_control.cancel):
    app.command()(verb)
app.command()(study_control.extend)
app.command()(study_control.enqueue)
app.command()(study_look.trials)
app.command()(study_look.best)
app.command()(study_look.compare)
app.command()(study_look.importance)
app.command("export")(study_exchange.export)
app.command("import")(study_exchange.import_)
app.command("list")(study_look.list_)
app.command()(study_control.delete)
app.add_typer(trial.app, name="trial")
