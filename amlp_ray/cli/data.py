"""amlp-ray data: from folders of images to a patch dataset."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from amlp_ray.cli.data_bench import bench
from amlp_ray.cli.data_check import check
from amlp_ray.cli.output import Json, print_facts, print_json, print_table
from amlp_ray.config import PrepareConfig
from amlp_ray.config.base import build
from amlp_ray.errors import ConfigError, DataError

if TYPE_CHECKING:
    from tqdm import tqdm

app = typer.Typer(help="Make and inspect patch datasets.", no_args_is_help=True)
app.command()(check)
app.command()(bench)


@app.command()
def prepare(
    source: Annotated[
        str, typer.Argument(help="Folder or URI of images, with masks where there are any.")
    ],
    out: Annotated[str, typer.Argument(help="Folder or URI of the patch dataset to write.")],
    layout: Annotated[
        str,
        typer.Option(
            help="auto, busi, paired, flat, lgg, dicom, nifti, decathlon or coco; auto says what it saw."
        ),
    ] = "auto",
    file_list: Annotated[
        str | None, typer.Option(help="Text file, one image a line; layout flat.")
    ] = None,
    size: Annotated[int, typer.Option(help="Pixels a side of the stored images.")] = 96,
    fit: Annotated[
        str, typer.Option(help="stretch to a square, pad to keep the aspect, or cut tiles.")
    ] = "stretch",
    overlap: Annotated[
        float, typer.Option(help="Share of a tile that its neighbour repeats.")
    ] = 0.0,
    scale: Annotated[float, typer.Option(help="Shrink images by this before tiles are cut.")] = 1.0,
    min_foreground: Annotated[
        float, typer.Option(help="Least tissue of a tile or slice without a lesion.")
    ] = 0.1,
    channels: Annotated[
        str, typer.Option(help="auto, or a number; auto stores grey pictures with one.")
    ] = "auto",
    values: Annotated[
        str, typer.Option(help="keep, window or percentile: what becomes of pixel values.")
    ] = "keep",
    window: Annotated[
        str | None, typer.Option(help="LOW,HIGH kept by values=window; none: DICOM's own.")
    ] = None,
    axis: Annotated[
        str, typer.Option(help="axial, coronal or sagittal slices of NIfTI volumes.")
    ] = "axial",
    lesion_labels: Annotated[
        str | None, typer.Option(help="Mask values that are lesion, such as 1,4.")
    ] = None,
    group_by: Annotated[
        str, typer.Option(help="auto, patient, near-duplicates or image: what stays together.")
    ] = "auto",
    group_file: Annotated[
        str | None, typer.Option(help="CSV with a column id and one of groups.")
    ] = None,
    group_column: Annotated[
        str, typer.Option(help="The column of group_file, such as patient.")
    ] = "group",
    split_file: Annotated[
        str | None, typer.Option(help="JSON with lists of ids: train, val, test.")
    ] = None,
    fractions: Annotated[str, typer.Option(help="Shares of train, val and test.")] = "0.7,0.1,0.2",
    hash_names: Annotated[
        bool, typer.Option(help="Store salted hashes for names; always so for DICOM.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Seed of the split.")] = 0,
    strict: Annotated[
        bool, typer.Option(help="Stop at the first file that cannot be used as it is.")
    ] = False,
    address: Annotated[
        str | None, typer.Option(help="Ray cluster to join; none: start Ray here.")
    ] = None,
) -> None:
    """Write a patch dataset: Parquet files, a manifest, a split by group, and statistics.

    Killed, it goes on where it stopped when run again. Files that cannot be used are listed in OUT.rejects.csv.
    """
    config = build(
        PrepareConfig,
        {
            "layout": layout,
            "file_list": file_list,
            "size": size,
            "fit": fit,
            "overlap": overlap,
            "scale": scale,
            "min_foreground": min_foreground,
            "channels": channels
            if channels == "auto"
            else _numbers(channels, "--channels", int, 1)[0],
            "values": values,
            "window": _numbers(window, "--window", float, 2) if window else None,
            "axis": axis,
            "lesion_labels": _numbers(lesion_labels, "--lesion-labels", int)
            if lesion_labels
            else (),
            "group_by": group_by,
            "group_file": group_file,
            "group_column": group_column,
            "split_file": split_file,
            "fractions": _numbers(fractions, "--fractions", float, 3),
            "hash_names": hash_names,
            "seed": seed,
        },
        "data prepare",
    )
    from amlp_ray.data.path import DataPath

    if not DataPath(source).is_folder():  # told at once, not after Ray has started
        raise DataError(f"There is no folder {source}; check the path.")

    from amlp_ray.data.prepare.pipeline import Told
    from amlp_ray.data.prepare.pipeline import prepare as run
    from amlp_ray.runtime.session import ray_session

    with ray_session(address), _Bar() as bar:
        dataset = run(source, out, config, strict=strict, told=Told(bar.say, bar))
    _print_summary(dataset.summary())


class _Bar:
    """A progress bar per stage; sentences are printed above it."""

    def __init__(self) -> None:
        self._bar: tqdm | None = None
        self._what = ""

    def __enter__(self) -> _Bar:
        return self

    def __exit__(self, *error: object) -> None:
        self._close()

    def __call__(self, what: str, done: int, of: int) -> None:
        from tqdm import tqdm

        if self._bar is None or self._what != what:
            self._close()
            self._what = what
            self._bar = tqdm(
                total=of, desc=what, dynamic_ncols=True, leave=False, disable=None
            )  # none in a pipe
        self._bar.update(done - self._bar.n)

    def say(self, sentence: str) -> None:
        self._close()
        typer.echo(sentence)

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def _numbers(
    text: str, option: str, kind: Callable[[str], Any], count: int | None = None
) -> tuple[Any, ...]:
    """Read numbers between commas, `count` of them if given."""
    wanted = {None: "numbers between commas, such as 1,4,", 1: "one number"}.get(
        count, f"{count} numbers between commas"
    )
    try:
        numbers = tuple(kind(part) for part in text.split(","))
    except ValueError:
        numbers = ()
    if not numbers or count not in (None, len(numbers)):
        raise ConfigError(f"{option} is {text!r}, but {wanted} must be given.")
    return numbers


@app.command()
def show(
    dataset: Annotated[str, typer.Argument(help="Patch dataset.")], as_json: Json = False
) -> None:
    """Show counts, splits, channels, mean and SD, lesion area, and which columns are stored."""
    from amlp_ray.data.dataset import PatchDataset

    summary = PatchDataset.open(dataset).summary()
    print_json(summary) if as_json else _print_summary(summary)


@app.command()
def phantoms(
    out: Annotated[Path, typer.Argument(help="Folder to write, in the layout `paired`.")],
    kind: Annotated[
        Literal["ultrasound", "mri", "pet"], typer.Option(help="What they look like.")
    ] = "ultrasound",
    count: Annotated[int, typer.Option(help="Number of images.")] = 240,
    size: Annotated[int, typer.Option(help="Pixels a side.")] = 128,
    seed: Annotated[int, typer.Option(help="Equal seeds give equal images.")] = 0,
) -> None:
    """Generate images with lesions and their masks, for trying things out without data."""
    from amlp_ray.data.phantoms import write_phantoms

    typer.echo(
        f"{count} {kind} phantoms in {write_phantoms(out, kind=kind, count=count, size=size, seed=seed)}"
    )


def _print_summary(summary: dict[str, Any]) -> None:
    print_facts({name: value for name, value in summary.items() if name != "splits"})
    rows = []
    for split, counts in summary["splits"].items():
        area = counts["lesion_area_percent"] or {}
        rows.append(
            {
                "split": split,
                **{name: counts[name] for name in ("images", "labeled", "lesions")},
                **{f"lesion area % {p}": area.get(p) for p in ("p10", "p50", "p90")},
                "background": counts["background"],
            }
        )
    print_table(rows)
