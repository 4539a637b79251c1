"""amlp-ray method: how well the rules of patch selection locate lesions, without training."""

from __future__ import annotations

from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Argument, Option

from amlp_ray.cli.output import Json, print_fields, print_json, print_table
from amlp_ray.errors import ConfigError

if TYPE_CHECKING:
    from amlp_ray.analysis.rule_choice import RuleChoice

app = typer.Typer(help="Compare the rules that locate lesions.", no_args_is_help=True)

FOOTER = (
    "Labels describe the rules here. To choose a rule by the labels of your own val or test images "
    "is tuning on labels; disclose a choice by train's labels. A cluster or score that finds "
    "lesions need not train a better encoder."
)
COLUMN_TITLES = {
    "name": "name",
    "precision": "precision",
    "recall": "recall",
    "f1": "f1",
    "f1_se": "se",
    "size": "size",
    "fallback": "none found",
    "f1_small": "f1 small",
    "f1_large": "f1 large",
    "auc": "auc",
    "ap": "ap",
    "ap_small": "ap small",
    "ap_large": "ap large",
    "precision_top": "p@10%",
    "recall_top": "r@10%",
    "precision_share": "p@share",
    "recall_share": "r@share",
    "f1_share": "f1@share",
    "ms": "ms",
}


@app.command()
def bench(
    dataset: Annotated[str, Argument(help="Patch dataset with masks, by path or URI.")],
    split: Annotated[str, Option(help="train or val.")] = "train",
    images: Annotated[int | None, Option(min=1, help="Most images to score; none: 4096.")] = None,
    patch_size: Annotated[int, Option(min=2, help="Side of a patch in pixels.")] = 8,
    share: Annotated[
        float, Option(min=0.01, max=1, help="Share of the patches at which scores are cut.")
    ] = 0.15,
    encoder: Annotated[
        Path | None,
        Option(
            help="Run folder, or encoder.safetensors, of this or other data: adds rows that use it."
        ),
    ] = None,
    seeds: Annotated[int, Option(min=1, help="Repeats of random rules.")] = 3,
    top: Annotated[int, Option(min=1, help="Rows shown per block; --out has all.")] = 8,
    out: Annotated[Path | None, Option(help="CSV file for all rows and columns.")] = None,
    as_json: Json = False,
) -> None:
    """Compare clusterings, rules and scores with the true lesions, without training."""
    from amlp_ray.analysis.localization import bench_rules
    from amlp_ray.cli.progress import count_progress
    from amlp_ray.data.dataset import PatchDataset

    if out:
        _check_out(out)
    with count_progress() as update:
        bench_result = bench_rules(
            PatchDataset.open(dataset),
            split=split,
            images=images,
            patch_size=patch_size,
            share=share,
            seeds=seeds,
            teacher=encoder,
            progress=lambda done, total: update("rows", done, total),
        )
    rows = bench_result.rows
    choice = bench_result.choice
    if out:
        from amlp_ray.utils.csv_text import csv_text
        from amlp_ray.utils.files import atomic_write

        columns = list(dict.fromkeys(chain.from_iterable(rows)))
        atomic_write(out, csv_text(columns, [[row.get(c) for c in columns] for row in rows]))
    if as_json:
        print_json({"rows": rows, "choice": choice._asdict() if choice else None})
        return
    print_fields({name: rows[0][name] for name in ("data", "split", "images", "base_rate")})
    for block in dict.fromkeys(row["block"] for row in rows):
        block_rows = [row for row in rows if row["block"] == block]
        block_rows.sort(key=lambda row: -row["f1"])
        typer.echo(f"\n{block}")
        print_table([_table_row(row) for row in block_rows[:top]])
    if choice:
        typer.echo(f"\n{_describe_choice(choice, PatchDataset.open(dataset).manifest.group_unit)}")
    typer.echo(f"\n{FOOTER}")
    if out:
        typer.echo(f"all rows: {out}")


def _describe_choice(choice: RuleChoice, unit: str) -> str:
    """Say which rule the labels would choose, and what it gains where it was not chosen."""
    from amlp_ray.analysis.localization_candidates import all_candidates
    from amlp_ray.analysis.rule_choice import MIN_GROUPS

    default = f"the default ({choice.default}), F1 {choice.default_f1:.3f}"
    if choice.name == choice.default:
        return f"These labels would choose {default}."
    candidates = all_candidates(encoder=True, decoder=True)
    settings = next(c.settings for c in candidates if c.name == choice.name)
    options = " ".join(f"--set {name}={value}" for name, value in settings.items())
    if choice.interval is None or choice.difference is None:
        gain = f"{choice.groups} {unit}s are too few for an interval ({MIN_GROUPS} are needed)"
    else:
        low, high = choice.interval
        gain = (
            f"on {unit}s that had no part in the choice, {choice.difference:+.3f} [{low:+.3f}, "
            f"{high:+.3f}] over {choice.groups} {unit}s"
        )
    return (
        f"These labels would choose {choice.name}, F1 {choice.f1:.3f}, against {default}: {gain}; "
        f"the same rule in {choice.times_chosen} of {choice.folds} folds. To use it: {options}"
    )


def _check_out(out: Path) -> None:
    """Refuse, before anything is computed, a path that cannot be written."""
    from amlp_ray.utils.files import local_path

    folder = local_path(out).parent
    if out.is_dir():
        raise ConfigError(f"--out {out} is a folder; give a file such as {out / 'rules.csv'}.")
    if not folder.is_dir():
        raise ConfigError(f"--out {out}: there is no folder {folder}; make it first.")


def _table_row(row: dict[str, Any]) -> dict[str, Any]:
    cells = {}
    for name, title in COLUMN_TITLES.items():
        value = row.get(name)
        cells[title] = round(value, 3) if isinstance(value, float) else value
    return cells
