"""amlp-ray study: plan, run and look at studies."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from amlp_ray.cli.output import Json, print_facts, print_json, print_table
from amlp_ray.cli.pretrain import Set
from amlp_ray.errors import FailedStudyError

if TYPE_CHECKING:
    from amlp_ray.study.study import Study

app = typer.Typer(help="Search settings: many trials, scored by the segmentation they lead to.", no_args_is_help=True)

File = Annotated[Path, typer.Argument(help="Study file, or the name of a study that was run before.")]
Name = Annotated[str, typer.Argument(help="Name of the study.")]
Data = Annotated[str | None, typer.Option(help="Patch dataset, by path or URI, in place of the file's `data`.")]
Labels = Annotated[
    str | None,
    typer.Option(
        help="Another patch dataset, of the same shape, whose masks score the encoders; `amlp-ray data check LABELS "
        "--against DATA` tells of images in both."
    ),
]
Runs = Annotated[Path, typer.Option(help="Folder of all studies.", envvar="AMLP_RAY_RUNS")]
Address = Annotated[str | None, typer.Option(help="Ray cluster to join, such as auto; none: start Ray here.")]


@app.command()
def plan(
    file: File,
    data: Data = None,
    labels: Labels = None,
    runs: Runs = Path("runs"),
    assign: Set = None,
    address: Address = None,
    as_json: Json = False,
) -> None:
    """Check a study and say what it will take; nothing is run."""
    facts = _load(file, data, labels, runs, assign).plan(address).as_dict()
    print_json(facts) if as_json else print_facts(facts)


@app.command()
def run(
    file: File,
    data: Data = None,
    labels: Labels = None,
    runs: Runs = Path("runs"),
    assign: Set = None,
    address: Address = None,
) -> None:
    """Run a study, or go on with it where it stopped, then write its report."""
    study = _load(file, data, labels, runs, assign)
    study.run(address, notify=typer.echo)
    status = study.status()
    print_facts(status)
    typer.echo(f"report: {study.report()}")
    if not status["states"].get("COMPLETE"):
        raise FailedStudyError(
            f"No trial of {study.settings.name!r} completed; `amlp-ray study trials` gives the reasons."
        )


@app.command()
def status(name: Name, runs: Runs = Path("runs"), as_json: Json = False) -> None:
    """Show how far a study is."""
    facts = _open(name, runs).status()
    print_json(facts) if as_json else print_facts(facts)


@app.command()
def trials(name: Name, runs: Runs = Path("runs"), as_json: Json = False) -> None:
    """List all trials and baseline arms."""
    rows = _open(name, runs).trials()
    print_json(rows) if as_json else print_table(rows)


@app.command()
def best(name: Name, runs: Runs = Path("runs"), as_json: Json = False) -> None:
    """Show the best complete trial."""
    study = _open(name, runs)
    trial = study.best_trial
    folder = study.store.trial_folder(trial.number)
    facts = {
        "number": trial.number,
        "dsc": trial.value,
        "params": trial.params,
        "encoder": str(folder / "encoder.safetensors"),
        "settings": str(folder / "settings.yaml"),
    }
    print_json(facts) if as_json else print_facts(facts)


@app.command()
def report(name: Name, runs: Runs = Path("runs")) -> None:
    """Write the study's report.html."""
    typer.echo(f"report: {_open(name, runs).report()}")


def _load(file: Path, data: str | None, labels: str | None, runs: Path, assign: list[str] | None) -> Study:
    from amlp_ray.settings import assignments
    from amlp_ray.study.study import Study

    if not file.is_file() and (runs / file / "study.yaml").is_file():
        file = runs / file / "study.yaml"
    return Study.load(file, data=data, labels=labels, runs=runs, overrides=assignments(assign or []))


def _open(name: str, runs: Path) -> Study:
    from amlp_ray.study.study import Study

    return Study.open(name, runs=runs)
