"""Inspect a run: held-out images as its model masks and reconstructs them, and their figures."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from pydantic import BaseModel
from torch import Tensor

from amlp_ray.config import ImageSpec, PretrainConfig
from amlp_ray.data.dataset import PatchDataset, Split
from amlp_ray.errors import CheckpointError, ConfigError
from amlp_ray.evaluation.diagnostics import held_out
from amlp_ray.evaluation.labels import check_fits
from amlp_ray.method.autoencoder import MaskedAutoencoder
from amlp_ray.method.cluster_rules import true_lesion_patches
from amlp_ray.method.patches import lesion_shares
from amlp_ray.method.visualization import (
    ImageAnalysis,
    analyze,
    draw_panels,
    draw_sheet,
    draw_strip,
)
from amlp_ray.training.checkpoint.restore import load_model, read_run_config
from amlp_ray.training.loggers.metrics_file import read_rows
from amlp_ray.utils.files import atomic_path, atomic_write, local_path
from amlp_ray.utils.json_files import parse_json_mapping, read_json, unseal

MAX_IMAGES = 64  # nobody looks through a sheet of more
SUMMARY = "inspection.json"
SHEET = "sheet.png"
# `lesion_share` and `true_lesion_share` are shares of all patches, `true_lesion_masked` is a share
# of the true lesion's. `precision` and `recall` are those of the probable lesion. `error` is the
# mean squared error of masked tissue patches in the image's scale, `error_inside` and
# `error_outside` that inside and outside the true lesion.
FIGURES = (
    "true_lesion_share",
    "lesion_share",
    "precision",
    "recall",
    "true_lesion_masked",
    "error",
    "error_inside",
    "error_outside",
)
REPORTED_METRICS = (
    "loss",
    "loss_reference",
    "agreement",
    "effective_patches",
    "lesion_precision",
    "lesion_recall",
    "lesion_recall_small",
    "lesion_recall_large",
    "true_lesion_masked",
    "dsc",
)
CAPTIONS = {
    "lesion_share": "probable lesion {:.0%} of the patches",
    "precision": "precision {:.2f}",
    "recall": "recall {:.2f}",
    "true_lesion_masked": "{:.0%} of the true lesion masked",
    "error_inside": "error {:.3g} inside it",
    "error_outside": "{:.3g} outside",
}

Row = dict[str, Any]


class TrainingData(BaseModel):
    """A dataset that a run was trained on or scored by, as its `data.json` says."""

    path: str
    fingerprint: str
    image: ImageSpec | None = None  # of the pretraining images; None in the files of some runs
    eval_data: TrainingData | None = None  # the labeled dataset, where it is another one


def _read_training_data(run: Path) -> TrainingData:
    path = run / "data.json"
    try:
        return TrainingData.model_validate(unseal(parse_json_mapping(path.read_bytes())))
    except (OSError, ValueError):
        raise CheckpointError(
            f"{path} does not say what data the run was trained on; train the run again."
        ) from None


def inspect_run(
    run: str | Path,
    *,
    data: str | Path | None = None,
    count: int = 8,
    epoch: int | None = None,
    out: str | Path | None = None,
    seed: int | None = None,
    device: str = "cpu",
) -> dict[str, Any]:
    """Draw held-out images with the latest model of a run, or of one trial of a study.

    Writes one strip per image, `sheet.png` with all of them, and `inspection.json`, which is also
    returned:

    - `images`: `id`, `picture` and `FIGURES` of each image; None where one does not apply.
    - `mean`: of each figure, over the images that have it.
    - `metrics`: first and last value of the run's metrics.

    Args:
        data: patch dataset, by path or URI; by default the run's labeled one.
        count: maximum number of images.
        epoch: whose masks and ratio are drawn, with the weights of the latest; default the latest.
        out: folder; by default `inspect` in the run's. Earlier pictures are replaced.
        seed: of the masks and clusters. By default the run's own.

    Raises:
        ConfigError, CheckpointError, DataError: the arguments, the run or the data are unusable.
    """
    run = local_path(run)
    out = local_path(out) if out else run / "inspect"
    config = read_run_config(run)
    _check_arguments(run, config, count, epoch, seed, out)
    trained_on = _read_training_data(run)
    scored_by = trained_on.eval_data or trained_on
    dataset = PatchDataset.open(data or scored_by.path)
    config.check_image(dataset.spec)
    spec = trained_on.image or dataset.spec
    check_fits(dataset, spec, f"{run} was trained on")
    model, latest_epoch = load_model(run, config, spec)
    config = config if seed is None else config.model_copy(update={"seed": seed})
    epoch = epoch or latest_epoch
    split = held_out(dataset, count)
    analysis, strips = _analyze(model.to(device), split, config, epoch)
    rows = _image_rows(analysis, split, config)
    summary = {
        "run": str(run),
        "data": dataset.path,
        "own_data": dataset.manifest.fingerprint in (trained_on.fingerprint, scored_by.fingerprint),
        "split": "val" if dataset.count("val") else "train",
        "variant": config.variant,
        "epoch": epoch,
        "weights_of_epoch": latest_epoch,
        "ratio": analysis.ratio,
        "images": rows,
        "mean": {name: _mean_of_column(rows, name) for name in FIGURES},
        "metrics": _first_and_last_metrics(run),
    }
    _write(out, summary, strips)
    return summary


def _check_arguments(
    run: Path,
    config: PretrainConfig,
    count: int,
    epoch: int | None,
    seed: int | None,
    out: Path,
) -> None:
    if config.objective != "reconstruction":
        raise ConfigError(
            f"{run} holds a run of variant {config.variant}: it reconstructs nothing to inspect."
        )
    if not 1 <= count <= MAX_IMAGES:
        raise ConfigError(f"count is {count}, but must be from 1 to {MAX_IMAGES}.")
    if epoch is not None and not 1 <= epoch <= config.epochs:
        raise ConfigError(f"epoch is {epoch}, but the run has epochs 1 to {config.epochs}.")
    if seed is not None and not 0 <= seed < 2**63:
        raise ConfigError(f"seed is {seed}, but must be from 0 to 2**63 - 1.")
    if out.exists() and not out.is_dir():
        raise ConfigError(f"{out} is a file; give a folder for the pictures.")


def _analyze(
    model: MaskedAutoencoder, split: Split, config: PretrainConfig, epoch: int
) -> tuple[ImageAnalysis, list[Image.Image]]:
    """Return the analysis of images and one strip per image."""
    masks = split.masks if split.labeled.all() else None
    images = torch.from_numpy(split.images)
    keys = torch.from_numpy(split.keys)
    analysis = analyze(model, images, keys, masks, config, epoch)
    panels = draw_panels(analysis, model, masks, config)
    return analysis, [draw_strip(image_panels) for image_panels in panels]


def _image_rows(analysis: ImageAnalysis, split: Split, config: PretrainConfig) -> list[Row]:
    """Return id, picture and `FIGURES` of every image; None where one does not apply."""
    error = analysis.error.cpu()
    masked = analysis.masked.cpu()
    tissue = analysis.selection.tissue.cpu()
    lesion = analysis.selection.lesion.cpu()
    truth = true_lesion_patches(lesion_shares(split.masks, config.model.patch_size))
    rows = []
    for i, is_labeled in enumerate(split.labeled):
        file_name = re.sub(r"[^A-Za-z0-9.-]+", "_", split.ids[i])
        row: Row = {"id": split.ids[i], "picture": f"{i}-{file_name}.png"}
        row |= dict.fromkeys(FIGURES)
        row["error"] = _mean_where(error[i], masked[i] & tissue[i])
        if config.selection.names_lesion:
            row["lesion_share"] = float(lesion[i].float().mean())
        if is_labeled:
            row["true_lesion_share"] = float(truth[i].float().mean())
        if is_labeled and split.masks[i].any():
            outside = tissue[i] & ~truth[i]
            row["true_lesion_masked"] = _mean_where(masked[i].float(), truth[i])
            row["error_inside"] = _mean_where(error[i], masked[i] & truth[i])
            row["error_outside"] = _mean_where(error[i], masked[i] & outside)
            if config.selection.names_lesion:
                row["precision"] = _mean_where(truth[i].float(), lesion[i])
                row["recall"] = _mean_where(lesion[i].float(), truth[i])
        rows.append(row)
    return rows


def _mean_where(values: Tensor, where: Tensor) -> float | None:
    """Return the mean of values (N,) over `where` (N,) bool; None where that is empty."""
    return float(values[where].mean()) if bool(where.any()) else None


def _mean_of_column(rows: list[Row], name: str) -> float | None:
    values = [row[name] for row in rows if row[name] is not None]
    return float(np.mean(values)) if values else None


def _first_and_last_metrics(run: Path) -> dict[str, dict[str, float]]:
    """Return first and last value of every metric of `REPORTED_METRICS` that the run has."""
    rows = read_rows(run / "metrics.jsonl")
    metrics = {}
    for name in REPORTED_METRICS:
        values = [row[name] for row in rows if name in row]
        if values:
            metrics[name] = {"first": values[0], "last": values[-1]}
    return metrics


def _write(out: Path, summary: dict[str, Any], strips: list[Image.Image]) -> None:
    """Write pictures and figures into `out`, in place of those of an earlier inspection."""
    rows = summary["images"]
    pictures = {row["picture"]: strip for row, strip in zip(rows, strips, strict=True)}
    pictures[SHEET] = draw_sheet(strips, [_caption(row) for row in rows])
    out.mkdir(parents=True, exist_ok=True)
    for name in _earlier_pictures(out / SUMMARY):
        (out / name).unlink(missing_ok=True)
    for name, picture in pictures.items():
        with atomic_path(out / name) as partial:
            picture.save(partial, "png")
    atomic_write(out / SUMMARY, json.dumps(summary, indent=1))


def _earlier_pictures(summary: Path) -> list[str]:
    """Return the pictures of an earlier inspection; none where its summary is unreadable."""
    try:
        images = (read_json(summary) or {})["images"]
        return [Path(row["picture"]).name for row in images]
    except (KeyError, TypeError):
        return []


def _caption(row: Row) -> str:
    parts = [text.format(row[name]) for name, text in CAPTIONS.items() if row[name] is not None]
    return f"{row['id']}:  " + ",  ".join(parts)
