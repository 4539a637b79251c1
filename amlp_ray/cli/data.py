"""amlp-ray data: from folders of images to a patch dataset."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from amlp_ray.cli.output import Json, print_facts, print_json, print_table
from amlp_ray.config import PrepareSettings
from amlp_ray.settings import build

app = typer.Typer(help="Make and inspect patch datasets.", no_args_is_help=True)


@app.command()
def prepare(
    source: Annotated[Path, typer.Argument(help="Folder of images, with masks where there are any.")],
    out: Annotated[Path, typer.Argument(help="Folder of the patch dataset to write.")],
    layout: Annotated[str, typer.Option(help="busi: `x (1).png` + `x (1)_mask.png`; paired: images/ + masks/.")],
    size: Annotated[int, typer.Option(help="Pixels a side of the stored images.")] = 96,
    channels: Annotated[str, typer.Option(help="auto, 1 or 3; auto stores grey images with one channel.")] = "auto",
    group_by: Annotated[str, typer.Option(help="near-duplicates or image: what stays together.")] = "near-duplicates",
    group_file: Annotated[Path | None, typer.Option(help="CSV with columns id and group, such as patients.")] = None,
    split_file: Annotated[Path | None, typer.Option(help="JSON with lists of ids: train, val, test.")] = None,
    fractions: Annotated[str, typer.Option(help="Shares of train, val and test.")] = "0.7,0.1,0.2",
    seed: Annotated[int, typer.Option(help="Seed of the split.")] = 0,
    address: Annotated[str | None, typer.Option(help="Ray cluster to join; none: start Ray here.")] = None,
) -> None:
    """Write a patch dataset: Parquet files, a manifest, a split by group, and statistics."""
    try:
        shares = tuple(float(part) for part in fractions.split(","))
    except ValueError:
        raise typer.BadParameter(
            f"{fractions!r} is not three numbers such as 0.7,0.1,0.2", param_hint="--fractions"
        ) from None
    settings = build(
        PrepareSettings,
        {
            "layout": layout,
            "size": size,
            "channels": int(channels) if channels.isdigit() else channels,
            "group_by": group_by,
            "group_file": group_file and str(group_file),
            "split_file": split_file and str(split_file),
            "fractions": shares,
            "seed": seed,
        },
        "data prepare",
    )
    from amlp_ray.data.sources import find_items

    find_items(layout, source)  # a wrong folder is told at once, not after Ray has started

    from amlp_ray.data.prepare import prepare as run
    from amlp_ray.runtime.ray_session import ray_session

    with ray_session(address):
        dataset = run(source, out, settings, progress=typer.echo)
    _print_summary(dataset.summary())


@app.command()
def show(dataset: Annotated[Path, typer.Argument(help="Patch dataset.")], as_json: Json = False) -> None:
    """Show counts, splits, channels, mean and SD, lesion area."""
    from amlp_ray.data.dataset import PatchDataset

    summary = PatchDataset.open(dataset).summary()
    print_json(summary) if as_json else _print_summary(summary)


@app.command()
def phantoms(
    out: Annotated[Path, typer.Argument(help="Folder to write, in the layout `paired`.")],
    kind: Annotated[Literal["ultrasound", "mri", "pet"], typer.Option(help="What they look like.")] = "ultrasound",
    count: Annotated[int, typer.Option(help="Number of images.")] = 240,
    size: Annotated[int, typer.Option(help="Pixels a side.")] = 128,
    seed: Annotated[int, typer.Option(help="Equal seeds give equal images.")] = 0,
) -> None:
    """Generate images with lesions and their masks, for trying things out without data."""
    from amlp_ray.data.phantoms import write_phantoms

    typer.echo(f"{count} {kind} phantoms in {write_phantoms(out, kind=kind, count=count, size=size, seed=seed)}")


def _print_summary(summary: dict[str, Any]) -> None:
    print_facts({name: value for name, value in summary.items() if name != "splits"})
    rows = []
    for split, counts in summary["splits"].items():
        area = counts["lesion_area_percent"] or {}
        rows.append(
            {
                "split": split,
                **{name: counts[name] for name in ("images", "labelled", "lesions")},
                **{f"lesion area % {p}": area.get(p) for p in ("p10", "p50", "p90")},
            }
        )
    print_table(rows)
