"""How well each rule and score finds lesions, before anything is trained.

Every candidate looks at whole images as training does, and what it calls the probable lesion is compared with the true
lesion patches. Labels *describe* the candidates; they choose none. Who takes the best row of their own val or test
images has tuned on labels, and who takes that of train has used train's labels and must say so.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from sklearn.metrics import average_precision_score, roc_auc_score
from torch import Tensor

from amlp_ray.analysis.localization_candidates import RANDOM, Candidate, candidates
from amlp_ray.config import ImageSpec, PretrainConfig, SelectionConfig
from amlp_ray.data.dataset import PatchDataset
from amlp_ray.errors import CheckpointError, ConfigError, DataError
from amlp_ray.evaluation.diagnostics import lesion_shares
from amlp_ray.evaluation.labels import Rows, by_part, check_fits, lesion_pixels, spread
from amlp_ray.method import counter_rng
from amlp_ray.method.augment import normalize
from amlp_ray.method.autoencoder import MaskedAutoencoder
from amlp_ray.method.cluster_rules import truth_patches
from amlp_ray.method.ema_teacher import teacher_view
from amlp_ray.method.kmeans import DatasetClusters
from amlp_ray.method.lesion_map import LesionMap, TeacherView, locate_lesion
from amlp_ray.method.patch_features import center_distance, cluster_features, tissue_of
from amlp_ray.method.patch_scores import PATCH_SCORES
from amlp_ray.method.patches import patchify
from amlp_ray.training.checkpoint.export import load_encoder, read_encoder_header
from amlp_ray.training.checkpoint.restore import load_model, run_settings

BATCH = 64  # images; k-means over more is no faster
MOST = 4096  # images in memory as float32: a GB at 256 pixels a side. More tell no truer: the standard error is 0.005
TOP = 0.10  # share of the patches whose precision and recall are told beside `share`

Row = dict[str, Any]


class Teacher(NamedTuple):
    """A trained model that is asked as a run's teacher is; `rebuilds` where its decoder is trained too."""

    model: MaskedAutoencoder
    config: PretrainConfig
    rebuilds: bool


class Batch(NamedTuple):
    """Whole images: patches (B, N, P), keys (B,), lesion share of every patch (B, N)."""

    patches: Tensor
    keys: Tensor
    share: Tensor


def bench_rules(
    dataset: PatchDataset,
    *,
    split: str = "train",
    images: int | None = None,
    patch_size: int = 8,
    share: float = 0.15,
    seeds: int = 3,
    teacher: Path | None = None,
    wanted: Sequence[Candidate] | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Row]:
    """Measure every candidate on the images with a lesion, uncropped; one row each, ready for pandas.

    - `precision`, `recall`, `f1` of the probable lesion, means over images; 0 where nothing was found (`fallback` is
      the share of such images). `size` is its share of the tissue. A score's probable lesion lies 1 SD above the mean.
    - Scores also: `auc`, `ap`, and precision, recall and F1 of the top tenth (`_top`) and of the top `share`
      (`_share`); equal scores come in random order, as in masking.
    - `_se` is the standard error over images; `_small` and `_large` the means over the halves by lesion area.
    - `ms` per image in batches of 64, after a warm-up; what a teacher is asked is counted.

    Args:
        images: at most so many, spread evenly; 4096 where not given. Centroids of the data set learn from all images
            of the split, lesion or not, up to as many.
        seeds: repeats of what is random (k-means, teacher), averaged per image.
        teacher: a run's folder, or an encoder.safetensors, for rows that ask one. It may be of another data set of the
            same shape and scale, whose mean and SD then normalise.
        wanted: what to compare; all `candidates` where none are given.

    Raises:
        ConfigError, DataError, CheckpointError: for test images, a patch size that does not divide, no masks, or a
            teacher of other images.
    """
    if split == "test":
        raise ConfigError("--split test: test images are for the last look; use train or val.")
    spec = dataset.spec
    if spec.height % patch_size or spec.width % patch_size:
        raise ConfigError(
            f"--patch-size {patch_size} does not divide the images of {spec.height}x{spec.width}."
        )
    asked = read_teacher(teacher, dataset, patch_size) if teacher else None
    spec = asked.model.spec if asked else spec
    every, scored = _load(dataset, spec, split, images, patch_size)
    bench = _Bench(spec, patch_size, share, every, scored, asked)
    area = torch.cat([batch.share for batch in scored]).sum(1)
    small = (area <= area.median()).numpy()
    about = {
        "data": dataset.name,
        "split": split,
        "images": len(area),
        "base_rate": bench.base_rate,
    }
    if wanted is None:
        wanted = candidates(encoder=asked is not None, decoder=asked is not None and asked.rebuilds)
    rows = []
    for done, candidate in enumerate(wanted):
        progress(done, len(wanted))
        values, seconds = bench.measure(candidate, seeds)
        rows.append(
            about | _described(candidate) | _summary(values, small) | {"ms": 1000 * seconds}
        )
    return rows


def read_teacher(path: Path, dataset: PatchDataset, patch_size: int) -> Teacher:
    """Load the model of a finished run's folder, or an encoder alone.

    Raises:
        CheckpointError: where there is none. ConfigError: it was trained on images of another shape or scale.
    """
    file = path / "encoder.safetensors" if path.is_dir() else path
    sizes, spec = read_encoder_header(file)
    check_fits(dataset, spec, f"{path} was trained on")
    if sizes.patch_size != patch_size:
        raise CheckpointError(
            f"{path} has patches of {sizes.patch_size} pixels; use --patch-size {sizes.patch_size}."
        )
    if path.is_dir():
        config = run_settings(path)
        if config.objective != "reconstruction":
            raise CheckpointError(
                f"{path} holds a run that rebuilds no images; give its encoder.safetensors alone."
            )
        model, _ = load_model(path, config, spec)
    else:
        config, model = PretrainConfig(model=sizes), MaskedAutoencoder(sizes, spec)
        model.encoder = load_encoder(path)
    if model.teacher is None:
        model.teacher = deepcopy(model)
    # Difficulty is what two masked passes miss, in the image's scale, whatever the run itself was trained with.
    loss = config.loss.model_copy(update={"difficulty": "raw", "ranking_weight": 0.0})
    return Teacher(model.eval(), config.model_copy(update={"loss": loss}), path.is_dir())


def _load(
    dataset: PatchDataset, spec: ImageSpec, split: str, images: int | None, patch_size: int
) -> tuple[list[Batch], list[Batch]]:
    """Images of a split to learn centroids from, and those to score."""
    lesion = np.flatnonzero(lesion_pixels(dataset, split) > 0)
    if not len(lesion):
        raise DataError(
            f"No image of {split} in {dataset.path} has a lesion mask; rules are compared with true masks."
        )

    def batches(rows: Rows) -> list[Batch]:
        patches, keys, shares = [], [], []
        for some in by_part(dataset, split, rows):
            part = dataset.load(split, some)
            patches.append(patchify(normalize(torch.from_numpy(part.images), spec), patch_size))
            keys.append(torch.from_numpy(part.keys))
            shares.append(lesion_shares(part.masks, patch_size))
        columns = (torch.cat(column).split(BATCH) for column in (patches, keys, shares))
        return [Batch(*each) for each in zip(*columns, strict=True)]

    return batches(spread(np.arange(dataset.count(split)), MOST)), batches(
        spread(lesion, images or MOST)
    )


class _Bench:
    """The images, and how a candidate is measured on them."""

    def __init__(
        self,
        spec: ImageSpec,
        patch_size: int,
        share: float,
        every: list[Batch],
        scored: list[Batch],
        teacher: Teacher | None,
    ) -> None:
        self.grid = (spec.height // patch_size, spec.width // patch_size)
        self.channels, self.share = spec.channels, share
        self.every, self.scored, self.teacher = every, scored, teacher
        self._told: dict[tuple[object, ...], tuple[TeacherView, float]] = {}
        self.base_rate = float(
            torch.cat([truth_patches(batch.share) for batch in scored]).float().mean()
        )

    @torch.inference_mode()
    def measure(self, candidate: Candidate, seeds: int) -> tuple[dict[str, np.ndarray], float]:
        """Every measure by image, (images,), averaged over seeds, and the median seconds per image."""
        by_seed: dict[str, list[np.ndarray]] = defaultdict(list)
        seconds: list[float] = []
        chance = (
            candidate.selection is None
            or candidate.selection.uses_clusters
            or "difficulty" in candidate.name
        )
        for seed in range(seeds if chance else 1):
            centroids = self._learnt(candidate, seed)
            self._look(candidate, self.scored[0], seed, centroids)  # warm-up
            by_batch: dict[str, list[Tensor]] = defaultdict(list)
            for batch in self.scored:
                asking = self._asked(candidate, batch, seed)[1]
                started = time.perf_counter()
                aim = self._look(candidate, batch, seed, centroids)
                seconds.append((asking + time.perf_counter() - started) / len(batch.keys))
                for name, value in self._compared(candidate, aim, batch).items():
                    by_batch[name].append(value)
            for name, parts in by_batch.items():
                by_seed[name].append(torch.cat(parts).double().numpy())
        return {name: np.mean(values, 0) for name, values in by_seed.items()}, float(
            np.median(seconds)
        )

    def _learnt(self, candidate: Candidate, seed: int) -> DatasetClusters | None:
        """Centroids of the data set after one pass over all images, which seeds and moves them."""
        s = candidate.selection
        if s is None or s.scope == "image":
            return None
        first = self.every[0]
        view, _ = self._asked(candidate, first, seed)
        tissue = tissue_of(first.patches, s)
        x = cluster_features(
            first.patches, tissue, self.grid, self.channels, s.features, view.tokens
        )
        centroids = DatasetClusters(s.clusters, x.shape[-1])
        for batch in self.every:
            self._look(candidate, batch, seed, centroids, learn=True)
        centroids.commit()
        return centroids

    def _asked(self, candidate: Candidate, batch: Batch, seed: int) -> tuple[TeacherView, float]:
        """What the teacher says of a batch, where the candidate asks it, and in how many seconds; kept for others."""
        s = candidate.selection
        if self.teacher is None or s is None:
            return TeacherView(), 0.0
        config = self.teacher.config.model_copy(update={"selection": s, "seed": seed})
        if not config.needs_teacher:
            return TeacherView(), 0.0
        error = s.rule == "hardest" or s.score == "difficulty"  # the one answer that is random
        key = (
            id(batch.patches),
            s.features == "tokens",
            s.score == "attention",
            error,
            seed if error else 0,
        )
        if key not in self._told:
            started = time.perf_counter()
            view = teacher_view(self.teacher.model, batch.patches, batch.keys, config, 1)
            self._told[key] = view, time.perf_counter() - started
        view, seconds = self._told[key]
        if candidate.per_variance and view.difficulty is not None:
            view = view._replace(difficulty=view.difficulty / (batch.patches.var(-1) + 1e-6))
        return view, seconds

    def _look(
        self,
        candidate: Candidate,
        batch: Batch,
        seed: int,
        centroids: DatasetClusters | None,
        *,
        learn: bool = False,
    ) -> LesionMap:
        s = candidate.selection
        if s is None:
            noise = counter_rng.uniform(
                batch.keys, batch.share.shape[1], seed=seed, epoch=1, stream=counter_rng.MASK
            )
            near = -center_distance(self.grid, noise.device).expand_as(noise)
            score = noise if candidate.name == RANDOM else near
            return LesionMap(_top(score, self.share, batch.keys).float(), score, score)
        return locate_lesion(
            batch.patches,
            batch.keys,
            self.grid,
            self.channels,
            s,
            seed=seed,
            epoch=1,
            teacher=self._asked(candidate, batch, seed)[0],
            truth=batch.share if s.uses_truth else None,
            centroids=centroids,
            learn=learn,
        )

    def _compared(self, candidate: Candidate, aim: LesionMap, batch: Batch) -> dict[str, Tensor]:
        truth, lesion = truth_patches(batch.share), aim.lesion > 0.5
        tissue = tissue_of(batch.patches, candidate.selection or SelectionConfig())
        found = _agreement(lesion, truth, "")
        found["size"] = lesion.sum(1) / tissue.sum(1).clamp_min(1)
        found["fallback"] = ~lesion.any(1)
        if candidate.selection is None or not candidate.selection.uses_clusters:
            found |= _agreement(_top(aim.score, TOP, batch.keys), truth, "_top")
            found |= _agreement(_top(aim.score, self.share, batch.keys), truth, "_share")
            for name, measure in (("auc", roc_auc_score), ("ap", average_precision_score)):
                pairs = zip(truth.numpy(), aim.score.numpy(), strict=True)
                # An image that is all lesion ranks nothing.
                found[name] = torch.tensor([np.nan if t.all() else measure(t, s) for t, s in pairs])
        return found


def _top(score: Tensor, share: float, keys: Tensor) -> Tensor:
    """The `share` of patches with the highest score, (B, N) bool; equal ones in random order."""
    noise = counter_rng.uniform(keys, score.shape[1], seed=0, epoch=0, stream=counter_rng.HINT)
    order = noise.argsort(1)
    order = order.gather(1, score.gather(1, order).argsort(stable=True, dim=1, descending=True))
    count = max(1, round(share * score.shape[1]))
    return torch.zeros_like(score, dtype=torch.bool).scatter(1, order[:, :count], True)


def _agreement(lesion: Tensor, truth: Tensor, ending: str) -> dict[str, Tensor]:
    """Precision, recall and F1 (B,) of lesion against truth (B, N)."""
    hit, found, true = (lesion & truth).sum(1), lesion.sum(1), truth.sum(1)
    return {
        f"precision{ending}": hit / found.clamp_min(1),
        f"recall{ending}": hit / true.clamp_min(1),
        f"f1{ending}": 2 * hit / (found + true).clamp_min(1),
    }


def _described(candidate: Candidate) -> Row:
    """Block, name, and the settings that the candidate uses; None for the others."""
    s = candidate.selection
    cluster = s if s is not None and s.uses_clusters else None
    scored = s if s is not None and s.uses_score else None
    signed = s if s is not None and (s.uses_score or s.rule in PATCH_SCORES) else None
    return {
        "block": candidate.block,
        "name": candidate.name,
        **{n: getattr(cluster, n, None) for n in ("features", "clusters", "scope", "rule")},
        "score": scored.score if scored else None,
        **{n: getattr(signed, n, None) for n in ("lesion_sign", "center_prior")},
    }


def _summary(values: dict[str, np.ndarray], small: np.ndarray) -> Row:
    """Mean, standard error, and means of both halves by lesion size, of every measure."""
    row: Row = {}
    for name, value in values.items():
        row[name] = float(np.nanmean(value))
        if name in ("size", "fallback"):
            continue
        count = int(np.isfinite(value).sum())
        row[f"{name}_se"] = float(np.nanstd(value, ddof=1) / count**0.5) if count > 1 else None
        row[f"{name}_small"] = float(np.nanmean(value[small]))
        row[f"{name}_large"] = float(np.nanmean(value[~small])) if not small.all() else None
    return row
