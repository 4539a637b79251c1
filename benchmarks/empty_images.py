"""Compare shares of images without a lesion in fine-tuning, by scores of both kinds of images.

    python benchmarks/empty_images.py DATASET... --encoder ENCODER... --out FOLDER

Each share is fine-tuned by each seed on each dataset, such as the folds of one, and scored on val.
Test images are never read. Finished runs in FOLDER are not repeated. README.md beside this file has
the results.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

# Before numpy and torch are imported: other jobs may share the machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pandas as pd
import torch

from amlp_ray.config import SegmentConfig
from amlp_ray.data.dataset import PatchDataset
from amlp_ray.evaluation.labels import empty_count, lesion_pixels
from amlp_ray.evaluation.segmentation import segment

SHARES = (0.0, 0.1, 0.25, 0.5, 1.0)
MEASURES = ("dsc", "empty_correct")
RESAMPLES = 4000


def main() -> None:
    options = _options()
    torch.set_num_threads(1)
    reference = None
    # The last row has no image without a lesion, but as many steps as the largest share takes.
    for share, has_more_epochs in [*((share, False) for share in options.shares), (0.0, True)]:
        runs = []
        for seed in range(options.seeds):
            tables = [
                score(path, encoder, share, seed, has_more_epochs, options)
                for path, encoder in zip(options.datasets, options.encoder, strict=True)
            ]
            runs.append(pd.concat(tables))
        images = pd.concat(runs).groupby(["id", "group"])[list(MEASURES)].mean()
        if reference is None:
            reference = images
        title = f"{share:g}, more epochs" if has_more_epochs else f"{share:g}"
        print(describe(title, runs, images, reference), flush=True)


def score(
    path: str,
    encoder: str,
    share: float,
    seed: int,
    has_more_epochs: bool,
    options: argparse.Namespace,
) -> pd.DataFrame:
    """Fine-tune on a dataset and return a row per image of val."""
    dataset = PatchDataset.open(path)
    epochs = options.epochs
    if has_more_epochs:
        pixels = lesion_pixels(dataset, "train")
        n_lesion = int((pixels > 0).sum())
        added = empty_count(n_lesion, int((pixels == 0).sum()), max(options.shares))
        epochs = round(epochs * (n_lesion + added) / n_lesion)
    config = SegmentConfig(epochs=epochs, decoder_width=options.width, empty_share=share, seed=seed)
    out = options.out / f"{Path(path).name}-share-{share:g}-epochs-{epochs}-seed-{seed}"
    segment(dataset, encoder, out, config, from_scratch=options.from_scratch)
    return pd.read_csv(out / "per_image.csv")


def describe(
    title: str, runs: list[pd.DataFrame], images: pd.DataFrame, reference: pd.DataFrame
) -> str:
    """Describe the runs of one share: the mean and range over seeds, and the gain on `reference`.

    Args:
        runs: the scores of the images, a table per seed.
        images: their mean over seeds.
        reference: likewise, of the share that others are compared with.
    """
    texts = []
    for name in MEASURES:
        by_seed = [run[name].mean() for run in runs]
        mean, low, high = np.mean(by_seed), min(by_seed), max(by_seed)
        texts.append(f"{name} {mean:.3f} (seeds {low:.3f}-{high:.3f})")
        if images is not reference:
            gains = (images[name] - reference[name]).dropna()
            gain, low, high = gain_interval(gains)
            texts.append(f"{gain:+.3f} [{low:+.3f}, {high:+.3f}]")
    return f"{title}: {', '.join(texts)}"


def gain_interval(gains: pd.Series) -> tuple[float, float, float]:
    """Compute the mean gain and its 95 % bootstrap interval over groups of images."""
    groups = gains.groupby("group").agg(["sum", "count"]).to_numpy()
    drawn = np.random.default_rng(0).integers(len(groups), size=(RESAMPLES, len(groups)))
    totals = groups[drawn].sum(1)
    low, high = np.percentile(totals[:, 0] / totals[:, 1], [2.5, 97.5])
    return float(gains.mean()), float(low), float(high)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("datasets", nargs="+")
    parser.add_argument("--encoder", nargs="+", required=True, help="one for each dataset")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--from-scratch", action="store_true")
    parser.add_argument("--shares", type=float, nargs="+", default=SHARES)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--width", type=int, default=16, help="of the decoder")
    return parser.parse_args()


if __name__ == "__main__":
    main()
