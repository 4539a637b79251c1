"""amlp-ray method: what the rules of masked patch selection find, without training."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from amlp_ray.cli.output import Json, print_facts, print_json, print_table

app = typer.Typer(help="Compare the rules that aim the mask.", no_args_is_help=True)

FOOTER = (
    "Labels describe the rules here. To choose a rule by the labels of your own val or test images is tuning on "
    "labels; a choice by train's labels is to be disclosed. A cluster or score that finds lesions need not train a "
    "better encoder."
)
SHOWN = {
    "name": "name", "precision": "precision", "recall": "recall", "f1": "f1", "f1_se": "se", "size": "size",
    "fallback": "none found", "f1_small": "f1 small", "f1_large": "f1 large", "auc": "auc", "ap": "ap",
    "ap_small": "ap small", "ap_large": "ap large", "precision_top": "p@10%", "recall_top": "r@10%",
    "precision_share": "p@share", "recall_share": "r@share", "f1_share": "f1@share", "ms": "ms",
}  # fmt: skip


@app.command()
def bench(
    dataset: Annotated[str, typer.Argument(help="Patch dataset with masks, by path or URI.")],
    split: Annotated[str, typer.Option(help="train or val.")] = "train",
    images: Annotated[
        int | None, typer.Option(min=1, help="Score at most so many images; none: 4096.")
    ] = None,
    patch_size: Annotated[int, typer.Option(min=2, help="Pixels a side.")] = 8,
    share: Annotated[
        float, typer.Option(min=0.01, max=1, help="Share of the patches at which scores are cut.")
    ] = 0.15,
    encoder: Annotated[
        Path | None,
        typer.Option(
            help="Run folder, or encoder.safetensors, of this or other data: adds rows that ask it."
        ),
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Repeats of what is random.")] = 3,
    top: Annotated[int, typer.Option(min=1, help="Rows shown per block; --out has all.")] = 8,
    out: Annotated[Path | None, typer.Option(help="CSV file for all rows and columns.")] = None,
    as_json: Json = False,
) -> None:
    """Compare clusterings, rules and scores with the true lesions, without training."""
    from tqdm import tqdm

    from amlp_ray.analysis.localization import bench_rules
    from amlp_ray.data.dataset import PatchDataset
    from amlp_ray.errors import ConfigError

    if out and out.is_dir():
        raise ConfigError(f"--out {out} is a folder; give a file such as {out / 'rules.csv'}.")
    if out and not out.absolute().parent.is_dir():
        raise ConfigError(
            f"--out {out}: there is no folder {out.absolute().parent}; make it first."
        )
    bar: tqdm | None = None  # drawn with the first row, so that an error stands alone

    def progress(done: int, total: int) -> None:
        nonlocal bar
        bar = (
            bar
            if bar is not None
            else tqdm(total=total, unit="row", dynamic_ncols=True, leave=False)
        )
        bar.update(done - bar.n)

    rows = bench_rules(
        PatchDataset.open(dataset),
        split=split,
        images=images,
        patch_size=patch_size,
        share=share,
        seeds=seeds,
        teacher=encoder,
        progress=progress,
    )
    if bar is not None:
        bar.close()
    if out:
        import pandas as pd

        from amlp_ray.utils.files import write_whole

        write_whole(out, pd.DataFrame(rows).to_csv(index=False))
    if as_json:
        print_json(rows)
        return
    print_facts({name: rows[0][name] for name in ("data", "split", "images", "base_rate")})
    for block in dict.fromkeys(row["block"] for row in rows):
        typer.echo(f"\n{block}")
        members = sorted((row for row in rows if row["block"] == block), key=lambda row: -row["f1"])
        print_table([_shown(row) for row in members[:top]])
    typer.echo(f"\n{FOOTER}" + (f"\nall rows: {out}" if out else ""))


def _shown(row: dict[str, Any]) -> dict[str, Any]:
    values = {title: row.get(name) for name, title in SHOWN.items()}
    return {
        title: round(value, 3) if isinstance(value, float) else value
        for title, value in values.items()
    }
