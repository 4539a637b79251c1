"""What a run looks like: held-out images as its model aims at, masks and rebuilds them, and the figures of each."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from amlp_ray.config import ImageSpec, PretrainConfig
from amlp_ray.data.dataset import PatchDataset, Split
from amlp_ray.errors import CheckpointError, ConfigError
from amlp_ray.evaluation.diagnostics import held_out, lesion_shares
from amlp_ray.evaluation.labels import check_fits
from amlp_ray.method.cluster_rules import truth_patches
from amlp_ray.method.visualization import ImageAnalysis, analyze, panels, sheet, strip
from amlp_ray.training.checkpoint.restore import load_model, run_settings
from amlp_ray.training.loggers.metrics_file import read_rows
from amlp_ray.utils.files import write_whole

MOST = 64  # images: a sheet of more is no longer looked at
SUMMARY = "inspection.json"
OWN = ("path", "fingerprint")  # of `data.json`
FIGURES = (
    "true_lesion_share", "lesion_share", "precision", "recall", "true_lesion_masked", "error", "error_inside",
    "error_outside",
)  # fmt: skip
FOLLOWED = (
    "loss", "loss_reference", "agreement", "effective_patches", "aim_precision", "aim_recall", "aim_recall_small",
    "aim_recall_large", "true_lesion_masked", "dsc",
)  # fmt: skip


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
    """Draw held-out images as the latest model of a run, or of one trial of a study, meets them.

    Writes one strip per image, `sheet.png` with all of them, and `inspection.json`, which is also returned:

    - `images`: of each its `id`, `picture` and figures; None where a figure does not apply. Shares are of all patches
      (`lesion_share`, `true_lesion_share`) or of the true lesion's (`true_lesion_masked`); `precision` and `recall` are
      those of the probable lesion; `error` is the mean squared error of masked tissue patches in the image's scale,
      `error_inside` and `error_outside` the true lesion.
    - `mean`: of each figure, over the images that have it. `metrics`: first and last of what the run told of itself.

    Args:
        data: patch dataset, by path or URI; the run's own where not given: its labelled one, where that is apart.
            Images are of val (of train, where val is empty), not test, and normalised as in training.
        count: at most so many images.
        epoch: whose masks and ratio are shown, with the weights of the latest; by default the latest.
        out: folder for the pictures, `inspect` in the run's by default; those of an earlier inspection are replaced.
        seed: of the masks and clusters; by default the run's own.

    Raises:
        ConfigError, CheckpointError, DataError: in one sentence each; nothing is written.
    """
    run = Path(run).absolute()
    config = run_settings(run)
    if config.objective != "reconstruction":
        raise ConfigError(
            f"{run} holds a run of variant {config.variant}: it reconstructs nothing to look at."
        )
    if not 1 <= count <= MOST:
        raise ConfigError(f"count is {count}, but must be from 1 to {MOST}.")
    if epoch is not None and not 1 <= epoch <= config.epochs:
        raise ConfigError(f"epoch is {epoch}, but the run has epochs 1 to {config.epochs}.")
    if seed is not None and not 0 <= seed < 2**63:
        raise ConfigError(f"seed is {seed}, but must be from 0 to 2**63 - 1.")
    folder = Path(out).absolute() if out else run / "inspect"
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder} is a file; give a folder for the pictures.")
    own = _own_data(run)
    sets = [own, *([own["eval_data"]] if "eval_data" in own else [])]
    dataset = PatchDataset.open(data or sets[-1]["path"])
    config.check_image(dataset.spec)
    spec = ImageSpec.model_validate(own["image"]) if "image" in own else dataset.spec
    check_fits(dataset, spec, f"{run} was trained on")
    model, latest = load_model(run, config, spec)
    if seed is not None:
        config = config.model_copy(update={"seed": seed})
    split, at = held_out(dataset, count), epoch or latest
    masks = split.masks if split.labeled.all() else None
    images, keys = torch.from_numpy(split.images), torch.from_numpy(split.keys)
    seen = analyze(model.to(device), images, keys, masks, config, at)
    strips = [strip(each) for each in panels(seen, model, masks, config)]
    figures = _figures(seen, split, config)
    rows = [
        {"id": name, "picture": f"{i}-{re.sub(r'[^A-Za-z0-9.-]+', '_', name)}.png", **row}
        for i, (name, row) in enumerate(zip(split.ids, figures, strict=True))
    ]
    found = {
        "run": str(run),
        "data": dataset.path,
        "own_data": dataset.manifest.fingerprint in [each["fingerprint"] for each in sets],
        "split": "val" if dataset.count("val") else "train",
        "variant": config.variant,
        "epoch": at,
        "weights_of_epoch": latest,
        "ratio": seen.ratio,
        "images": rows,
        "mean": {name: _mean([row[name] for row in figures]) for name in FIGURES},
        "metrics": _followed(run),
    }
    _write(folder, found, strips)
    return found


def _own_data(run: Path) -> dict[str, Any]:
    """What `job.claim` wrote of the data that the run was trained on, path and fingerprint for certain."""
    path = run / "data.json"
    try:
        about: dict[str, Any] = json.loads(path.read_text())
        if all(
            isinstance(part[name], str)
            for part in (about, about.get("eval_data", about))
            for name in OWN
        ):
            return about
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise CheckpointError(
        f"{path} does not say what data the run was trained on; train the run again."
    )


def _figures(
    seen: ImageAnalysis, split: Split, config: PretrainConfig
) -> list[dict[str, float | None]]:
    """`FIGURES` of every image."""
    masked, tissue, lesion = (
        x.cpu() for x in (seen.masked, seen.chosen.tissue, seen.chosen.lesion)
    )
    aimed, error = config.selection.names_lesion, seen.error.cpu()
    share = lesion_shares(split.masks, config.model.patch_size)
    truth, known = truth_patches(share), split.labeled & split.masks.any((1, 2))
    rows = []
    for i, labeled in enumerate(known):
        true, found, hidden = truth[i], lesion[i], masked[i]
        judged = aimed and labeled
        rows.append(
            {
                "true_lesion_share": float(true.float().mean()) if split.labeled[i] else None,
                "lesion_share": float(found.float().mean()) if aimed else None,
                "precision": _mean_of(true.float(), found) if judged else None,
                "recall": _mean_of(found.float(), true) if judged else None,
                "true_lesion_masked": _mean_of(hidden.float(), true) if labeled else None,
                "error": _mean_of(error[i], hidden & tissue[i]),
                "error_inside": _mean_of(error[i], hidden & true) if labeled else None,
                "error_outside": _mean_of(error[i], hidden & tissue[i] & ~true)
                if labeled
                else None,
            }
        )
    return rows


def _mean_of(values: Tensor, where: Tensor) -> float | None:
    """Mean of values (N,) over `where` (N,) bool; None where that is empty."""
    return float(values[where].mean()) if bool(where.any()) else None


def _mean(values: list[float | None]) -> float | None:
    there = [value for value in values if value is not None]
    return float(np.mean(there)) if there else None


def _followed(run: Path) -> dict[str, dict[str, float]]:
    """First and last of every figure of `FOLLOWED` that the run's metrics hold."""
    rows = read_rows(run / "metrics.jsonl")
    told = {name: [row[name] for row in rows if name in row] for name in FOLLOWED}
    return {
        name: {"first": values[0], "last": values[-1]} for name, values in told.items() if values
    }


def _write(out: Path, found: dict[str, Any], strips: list[Image.Image]) -> None:
    """Write pictures and figures into `out`, in place of those of an earlier inspection."""
    pictures = {row["picture"]: each for row, each in zip(found["images"], strips, strict=True)}
    pictures["sheet.png"] = sheet(strips, [_caption(row) for row in found["images"]])
    out.mkdir(parents=True, exist_ok=True)
    for name in _earlier_pictures(out / SUMMARY):
        (out / name).unlink(missing_ok=True)
    for name, picture in pictures.items():
        png = io.BytesIO()
        picture.save(png, "png")
        write_whole(out / name, png.getvalue())
    write_whole(out / SUMMARY, json.dumps(found, indent=1))


def _earlier_pictures(summary: Path) -> list[str]:
    """Names of the pictures of an earlier inspection; none where its summary is missing or is something else."""
    try:
        return [Path(row["picture"]).name for row in json.loads(summary.read_text())["images"]]
    except (OSError, ValueError, KeyError, TypeError):
        return []


def _caption(row: dict[str, Any]) -> str:
    wordings = {
        "lesion_share": "probable lesion {:.0%} of the patches",
        "precision": "precision {:.2f}",
        "recall": "recall {:.2f}",
        "true_lesion_masked": "{:.0%} of the true lesion masked",
        "error_inside": "error {:.3g} inside it",
        "error_outside": "{:.3g} outside",
    }
    return f"{row['id']}:  " + ",  ".join(
        text.format(row[name]) for name, text in wordings.items() if row[name] is not None
    )
