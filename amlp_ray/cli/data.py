"""amlp-ray data: from folders of images to a patch dataset."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from typer import Argument, Option

from amlp_ray.cli.data_bench import bench
from amlp_ray.cli.data_check import check
from amlp_ray.cli.output import Json, print_fields, print_json, print_table
from amlp_ray.cli.run_options import Address
from amlp_ray.errors import ConfigError, DataError

MAX_KINDS = 12  # classes and sites whose shares are printed

app = typer.Typer(help="Make and inspect patch datasets.", no_args_is_help=True)
app.command()(check)
app.command()(bench)

Source = Annotated[str, Argument(help="Folder or URI of images, with or without masks.")]
Out = Annotated[str, Argument(help="Folder or URI of the patch dataset to write.")]
Layout = Annotated[
    str,
    Option(
        help="auto, busi, paired, folders, flat, lgg, dicom, nifti, decathlon or coco. auto prints "
        "what it detected."
    ),
]
FileList = Annotated[str | None, Option(help="Text file with one image per line; layout flat.")]
MaskFolder = Annotated[
    str | None, Option(help="Name of the folders of lesion masks, where there are others too.")
]
Size = Annotated[int, Option(help="Side of the stored images in pixels.")]
Fit = Annotated[
    str, Option(help="stretch to a square, pad to keep the aspect ratio, or cut tiles.")
]
Overlap = Annotated[float, Option(help="Share of a tile that its neighbor repeats.")]
Scale = Annotated[float, Option(help="Shrink images by this factor before tiles are cut.")]
MinForeground = Annotated[
    float, Option(help="Least share of tissue in a tile or slice without a lesion.")
]
Channels = Annotated[
    str, Option(help="auto, or a number; auto stores gray images with one channel.")
]
Values = Annotated[str, Option(help="keep, window or percentile: how pixel values are scaled.")]
Window = Annotated[str | None, Option(help="LOW,HIGH kept by values=window; none: DICOM's own.")]
Axis = Annotated[str, Option(help="axial, coronal or sagittal slices of NIfTI volumes.")]
LesionLabels = Annotated[
    str | None, Option(help="Mask values that are lesion, such as 1,4; none: all above 0.")
]
LesionThreshold = Annotated[
    float | None, Option(help="Mask values above this are lesion, such as 127; not with labels.")
]
GroupBy = Annotated[
    str, Option(help="auto, patient, near-duplicates or image: what stays in one split.")
]
GroupFile = Annotated[str | None, Option(help="CSV with a column id and one of groups.")]
GroupColumn = Annotated[str, Option(help="The column of group_file, such as patient.")]
BalanceColumns = Annotated[
    str | None, Option(help="Columns of group_file that splits share evenly, such as site,scanner.")
]
SplitFile = Annotated[str | None, Option(help="JSON with lists of ids: train, val, test.")]
Fractions = Annotated[str, Option(help="Shares of train, val and test.")]
HashNames = Annotated[bool, Option(help="Store salted hashes of names; always so for DICOM.")]
Seed = Annotated[int, Option(help="Seed of the split.")]
Strict = Annotated[bool, Option(help="Stop at the first file that cannot be used as it is.")]


@app.command()
def prepare(
    context: typer.Context,
    source: Source,
    out: Out,
    layout: Layout = "auto",
    file_list: FileList = None,
    mask_folder: MaskFolder = None,
    size: Size = 96,
    fit: Fit = "stretch",
    overlap: Overlap = 0.0,
    scale: Scale = 1.0,
    min_foreground: MinForeground = 0.1,
    channels: Channels = "auto",
    values: Values = "keep",
    window: Window = None,
    axis: Axis = "axial",
    lesion_labels: LesionLabels = None,
    lesion_threshold: LesionThreshold = None,
    group_by: GroupBy = "auto",
    group_file: GroupFile = None,
    group_column: GroupColumn = "group",
    balance_columns: BalanceColumns = None,
    split_file: SplitFile = None,
    fractions: Fractions = "0.7,0.1,0.2",
    hash_names: HashNames = False,
    seed: Seed = 0,
    strict: Strict = False,
    address: Address = None,
) -> None:
    """Write a patch dataset: Parquet files, a manifest, a split by group, and statistics.

    The same command resumes after an interruption. Files that cannot be used are listed in
    OUT.rejects.csv.
    """
    from amlp_ray.config import PrepareConfig

    settings = {name: context.params[name] for name in PrepareConfig.model_fields}
    _prepare(source, out, settings, strict=strict, address=address)


def _prepare(
    source: str, out: str, settings: dict[str, Any], *, strict: bool, address: str | None
) -> None:
    """Prepare a dataset with a progress bar.

    Args:
        settings: the options that are settings, as they were given.
    """
    from amlp_ray.config import PrepareConfig
    from amlp_ray.config.base import build
    from amlp_ray.data.path import DataPath

    values = dict(settings)
    if values["channels"] != "auto":
        values["channels"] = _parse_numbers(values["channels"], "--channels", int, 1)[0]
    window = values["window"]
    values["window"] = _parse_numbers(window, "--window", float, 2) if window else None
    labels = values["lesion_labels"]
    values["lesion_labels"] = _parse_numbers(labels, "--lesion-labels", int) if labels else ()
    columns = values["balance_columns"]
    values["balance_columns"] = tuple(columns.split(",")) if columns else ()
    values["fractions"] = _parse_numbers(values["fractions"], "--fractions", float, 3)
    config = build(PrepareConfig, values, "data prepare")
    # Checked here, before Ray starts.
    if not DataPath(source).is_folder():
        raise DataError(f"There is no folder {source}; check the path.")

    from amlp_ray.cli.progress import count_progress
    from amlp_ray.data.prepare.pipeline import prepare
    from amlp_ray.runtime.session import ray_session

    with ray_session(address), count_progress() as update:
        dataset = prepare(source, out, config, strict=strict, progress=update)
    _print_summary(dataset.summary())


def _parse_numbers(
    text: str, option: str, number_type: Callable[[str], Any], count: int | None = None
) -> tuple[Any, ...]:
    """Parse numbers between commas, as many as `count` says.

    Raises:
        ConfigError: a number cannot be read, or there are too few or too many.
    """
    try:
        numbers = tuple(number_type(part) for part in text.split(","))
    except ValueError:
        numbers = ()
    if numbers and count in (None, len(numbers)):
        return numbers
    if count is None:
        expected = "numbers between commas, such as 1,4,"
    else:
        expected = "one number" if count == 1 else f"{count} numbers between commas"
    raise ConfigError(f"{option} is {text!r}, but {expected} must be given.")


@app.command()
def show(dataset: Annotated[str, Argument(help="Patch dataset.")], as_json: Json = False) -> None:
    """Show counts, splits, channels, mean and SD, lesion area, and which columns are stored."""
    from amlp_ray.data.dataset import PatchDataset

    summary = PatchDataset.open(dataset).summary()
    print_json(summary) if as_json else _print_summary(summary)


@app.command()
def phantoms(
    out: Annotated[Path, Argument(help="Folder to write, in the layout `paired` or `lgg`.")],
    kind: Annotated[
        Literal["ultrasound", "mri", "pet"], Option(help="What they look like.")
    ] = "ultrasound",
    count: Annotated[int, Option(help="Number of images.")] = 240,
    size: Annotated[int, Option(help="Side of an image in pixels.")] = 128,
    seed: Annotated[int, Option(help="Equal seeds give equal images.")] = 0,
    empty_share: Annotated[
        float | None,
        Option(
            help="Share of the images without a lesion, 0 to 1.",
            show_default="a sixth, or half of a patient's slices",
        ),
    ] = None,
    slices: Annotated[
        int | None,
        Option(help="Mean number of slices of a patient; none: every image is a patient's own."),
    ] = None,
) -> None:
    """Generate images with lesions and their masks, to try things out without data."""
    from amlp_ray.data.phantom_patients import write_phantom_patients
    from amlp_ray.data.phantoms import write_phantoms

    options: dict[str, Any] = {"kind": kind, "count": count, "size": size, "seed": seed}
    if empty_share is not None:
        options["empty_share"] = empty_share
    if slices is None:
        folder = write_phantoms(out, **options)
    else:
        folder = write_phantom_patients(out, slices=slices, **options)
    typer.echo(f"{count} {kind} phantoms in {folder}")


def _print_summary(summary: dict[str, Any]) -> None:
    print_fields({name: value for name, value in summary.items() if name != "splits"})
    rows = []
    for split, counts in summary["splits"].items():
        row = {"split": split}
        row |= {name: counts[name] for name in ("groups", "images", "labeled", "lesions")}
        area = counts["lesion_area_percent"] or {}
        for percentile in ("p10", "p50", "p90"):
            row[f"lesion area % {percentile}"] = area.get(percentile)
        row["background"] = counts["background"]
        rows.append(row)
    print_table(rows)
    print_fields(_balance(summary["splits"]))


def _balance(splits: dict[str, dict[str, Any]]) -> dict[str, str]:
    """Describe the share of each class and site in train, val and test, most common first."""
    totals: Counter[str] = Counter()
    for counts in splits.values():
        totals.update(counts["kinds"])
    shares = {}
    for kind, _ in totals.most_common(MAX_KINDS):
        percents = []
        for counts in splits.values():
            share = counts["kinds"].get(kind, 0) / counts["images"] if counts["images"] else None
            percents.append("-" if share is None else f"{share:.0%}".removesuffix("%"))
        shares[f"{kind} %"] = "/".join(percents)
    return shares
