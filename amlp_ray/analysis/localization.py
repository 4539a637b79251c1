"""Measure how well each rule and score finds lesions, before anything is trained.

Every candidate analyzes whole images as training does, and its probable lesion is compared with the
true lesion patches. Labels describe the candidates, they choose none. Whoever takes the best row of
their own val or test images has tuned on labels. Whoever takes that of train has used train's
labels and must say so.

A row has:

- `precision`, `recall`, `f1` of the probable lesion, means over images; 0 where nothing was found.
  `fallback` is the share of such images, `size` the share of the tissue in the probable lesion. A
  score's probable lesion lies 1 SD above the mean.
- Scores also have `auc`, `ap`, and precision, recall and F1 of the top tenth (`_top`) and of the
  top `share` (`_share`). Equal scores come in random order, as in masking.
- `_se` is the standard error over groups, such as patients. `_small` and `_large` are the means
  over the halves by lesion area.
- `ms` is the time per image in batches of 64 after a warm-up, with that of the teacher.

Shapes: B images, N patches, P values per patch.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from sklearn.metrics import average_precision_score, roc_auc_score
from torch import Tensor

from amlp_ray.analysis.localization_candidates import (
    DEFAULT_RULE,
    RANDOM,
    Candidate,
    all_candidates,
)
from amlp_ray.analysis.localization_measures import (
    overlap,
    per_image,
    standard_error,
    top_patches,
)
from amlp_ray.analysis.localization_teacher import Teacher, read_teacher
from amlp_ray.analysis.rule_choice import RuleChoice, choose_rule
from amlp_ray.config import ImageSpec, SelectionConfig
from amlp_ray.data.dataset import PatchDataset
from amlp_ray.errors import ConfigError, DataError
from amlp_ray.evaluation.labels import Rows, by_part, lesion_pixels, spread
from amlp_ray.method import counter_rng
from amlp_ray.method.augment import normalize
from amlp_ray.method.cluster_rules import true_lesion_patches
from amlp_ray.method.ema_teacher import teacher_view
from amlp_ray.method.kmeans import DatasetClusters
from amlp_ray.method.lesion_map import LesionMap, TeacherView, locate_lesion
from amlp_ray.method.patch_features import center_distance, cluster_features, tissue_mask
from amlp_ray.method.patch_scores import PATCH_SCORES
from amlp_ray.method.patches import lesion_shares, patchify

BATCH_SIZE = 64  # k-means over more images is no faster
# Images in memory as float32: a GB at 256 pixels a side. The standard error is 0.005 with as many.
MAX_IMAGES = 4096
CLUSTER_SETTINGS = ("features", "clusters", "scope", "rule")
SIGN_SETTINGS = ("lesion_sign", "center_prior")
TOP_SHARE = 0.10  # of the patches, whose precision and recall are reported beside `share`

Row = dict[str, Any]


class RuleBench(NamedTuple):
    """What the candidates reach on a dataset."""

    rows: list[Row]  # one for each candidate, for pandas
    choice: RuleChoice | None  # None if the default is no candidate


class ImageBatch(NamedTuple):
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
    candidates: Sequence[Candidate] | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> RuleBench:
    """Measure every candidate on the images with a lesion, uncropped.

    Args:
        images: maximum number of images, spread evenly; 4096 by default. Centroids of the dataset
            learn from all images of the split, lesion or not, up to 4096.
        seeds: repeats of what is random (k-means, teacher), averaged per image.
        teacher: a run's folder, or an encoder.safetensors, for candidates that use one. It may be
            of another dataset of the same shape and scale, whose mean and SD then normalize.
        candidates: by default `all_candidates`.
        progress: called with the number of finished candidates and of all.

    Raises:
        ConfigError: test images, or a patch size that does not divide the images.
        DataError: no image has a lesion mask.
        CheckpointError: the teacher is unusable, or of other images.
    """
    _check_arguments(dataset.spec, split, patch_size)
    spec = dataset.spec
    loaded_teacher = read_teacher(teacher, dataset, patch_size) if teacher else None
    if loaded_teacher:
        spec = loaded_teacher.model.spec
    if candidates is None:
        has_decoder = loaded_teacher is not None and loaded_teacher.has_decoder
        candidates = all_candidates(encoder=loaded_teacher is not None, decoder=has_decoder)
    lesion_rows = spread(_rows_with_lesion(dataset, split), images or MAX_IMAGES)
    all_rows = np.arange(dataset.count(split))
    benchmark = _Benchmark(
        spec,
        patch_size,
        share,
        _load(dataset, split, spread(all_rows, MAX_IMAGES), spec, patch_size),
        _load(dataset, split, lesion_rows, spec, patch_size),
        dataset.table(split, columns=["group"])["group"].to_numpy()[lesion_rows],
        loaded_teacher,
    )
    true_share = benchmark.true_share
    images_row: Row = {
        "data": dataset.name,
        "split": split,
        "images": len(true_share),
        "base_rate": float(true_lesion_patches(true_share).float().mean()),
    }
    rows = []
    f1_by_name: dict[str, np.ndarray] = {}
    for done, candidate in enumerate(candidates):
        progress(done, len(candidates))
        values, milliseconds = benchmark.measure(candidate, seeds)
        row = images_row | _describe(candidate)
        for name, of_images in values.items():
            row |= benchmark.summarize(name, of_images)
        rows.append(row | {"ms": milliseconds})
        if candidate.can_be_chosen:
            f1_by_name[candidate.name] = values["f1"]
    default = DEFAULT_RULE.name
    choice = choose_rule(f1_by_name, benchmark.groups, default) if default in f1_by_name else None
    return RuleBench(rows, choice)


def _check_arguments(spec: ImageSpec, split: str, patch_size: int) -> None:
    if split == "test":
        raise ConfigError("--split test: test images are for the last look; use train or val.")
    if spec.height % patch_size or spec.width % patch_size:
        raise ConfigError(
            f"--patch-size {patch_size} does not divide the images of {spec.height}x{spec.width}."
        )


def _rows_with_lesion(dataset: PatchDataset, split: str) -> Rows:
    rows = np.flatnonzero(lesion_pixels(dataset, split) > 0)
    if not len(rows):
        raise DataError(
            f"No image of {split} in {dataset.path} has a lesion mask; "
            f"rules are compared with true masks."
        )
    return rows


def _load(
    dataset: PatchDataset, split: str, rows: Rows, spec: ImageSpec, patch_size: int
) -> list[ImageBatch]:
    """Load rows of a split as batches."""
    patches = []
    keys = []
    shares = []
    for part_rows in by_part(dataset, split, rows):
        part = dataset.load(split, part_rows)
        patches.append(patchify(normalize(torch.from_numpy(part.images), spec), patch_size))
        keys.append(torch.from_numpy(part.keys))
        shares.append(lesion_shares(part.masks, patch_size))
    columns = [torch.cat(column).split(BATCH_SIZE) for column in (patches, keys, shares)]
    return [ImageBatch(*values) for values in zip(*columns, strict=True)]


class _Benchmark:
    """Images on which candidates are measured."""

    def __init__(
        self,
        spec: ImageSpec,
        patch_size: int,
        share: float,
        all_batches: list[ImageBatch],
        lesion_batches: list[ImageBatch],
        groups: np.ndarray,
        teacher: Teacher | None,
    ) -> None:
        """Keep images from which centroids of the dataset learn, and those that are scored.

        Args:
            groups: group of each image that is scored.
        """
        self.grid = (spec.height // patch_size, spec.width // patch_size)
        self.channels = spec.channels
        self.share = share
        self.all_batches = all_batches
        self.lesion_batches = lesion_batches
        self.groups = groups
        self.teacher = teacher
        self.true_share = torch.cat([batch.share for batch in lesion_batches])
        area = self.true_share.sum(1)
        self.is_small = (area <= area.median()).numpy()
        self._teacher_views: dict[tuple[object, ...], tuple[TeacherView, float]] = {}

    @torch.inference_mode()
    def measure(self, candidate: Candidate, seeds: int) -> tuple[dict[str, np.ndarray], float]:
        """Return the measures of each image, averaged over seeds, and the milliseconds it takes."""
        values_by_seed: dict[str, list[np.ndarray]] = defaultdict(list)
        seconds: list[float] = []
        for seed in range(seeds if candidate.is_random else 1):
            centroids = self._learn_centroids(candidate, seed)
            self._locate(candidate, self.lesion_batches[0], seed, centroids)  # warm-up
            values: dict[str, list[Tensor]] = defaultdict(list)
            for batch in self.lesion_batches:
                _, teacher_seconds = self._teacher_view(candidate, batch, seed)
                started = time.perf_counter()
                lesion_map = self._locate(candidate, batch, seed, centroids)
                batch_seconds = teacher_seconds + time.perf_counter() - started
                seconds.append(batch_seconds / len(batch.keys))
                for name, value in self._compare(candidate, lesion_map, batch).items():
                    values[name].append(value)
            for name, batch_values in values.items():
                values_by_seed[name].append(torch.cat(batch_values).double().numpy())
        means = {name: np.mean(of_seeds, 0) for name, of_seeds in values_by_seed.items()}
        return means, 1000 * float(np.median(seconds))

    def summarize(self, name: str, values: np.ndarray) -> Row:
        """Return mean, standard error, and the means of both halves by lesion size, of a measure.

        Args:
            values: of each image; NaN where the measure is not defined.
        """
        row: Row = {name: float(np.nanmean(values))}
        if name in ("size", "fallback"):
            return row
        is_small = self.is_small
        row[f"{name}_se"] = standard_error(values, self.groups)
        row[f"{name}_small"] = float(np.nanmean(values[is_small]))
        row[f"{name}_large"] = None if is_small.all() else float(np.nanmean(values[~is_small]))
        return row

    def _learn_centroids(self, candidate: Candidate, seed: int) -> DatasetClusters | None:
        """Return centroids of the dataset after one pass over all images."""
        selection = candidate.selection
        if selection is None or selection.scope == "image":
            return None
        first = self.all_batches[0]
        tokens = self._teacher_view(candidate, first, seed)[0].tokens
        tissue = tissue_mask(first.patches, selection)
        x = cluster_features(
            first.patches, tissue, self.grid, self.channels, selection.features, tokens
        )
        centroids = DatasetClusters(selection.clusters, x.shape[-1])
        for batch in self.all_batches:
            self._locate(candidate, batch, seed, centroids, learn=True)
        centroids.commit()
        return centroids

    def _teacher_view(
        self, candidate: Candidate, batch: ImageBatch, seed: int
    ) -> tuple[TeacherView, float]:
        """Evaluate the teacher where the candidate uses it; return its outputs and the seconds.

        Cached, since many candidates use the same outputs.
        """
        selection = candidate.selection
        if self.teacher is None or selection is None:
            return TeacherView(), 0.0
        config = self.teacher.config.model_copy(update={"selection": selection, "seed": seed})
        if not config.needs_teacher:
            return TeacherView(), 0.0
        # The one output that is random.
        uses_difficulty = selection.rule == "hardest" or selection.score == "difficulty"
        key = (
            id(batch.patches),
            selection.features == "tokens",
            selection.score == "attention",
            uses_difficulty,
            seed if uses_difficulty else 0,
        )
        if key not in self._teacher_views:
            started = time.perf_counter()
            view = teacher_view(self.teacher.model, batch.patches, batch.keys, config, 1)
            self._teacher_views[key] = view, time.perf_counter() - started
        view, seconds = self._teacher_views[key]
        if candidate.per_variance and view.difficulty is not None:
            view = view._replace(difficulty=view.difficulty / (batch.patches.var(-1) + 1e-6))
        return view, seconds

    def _locate(
        self,
        candidate: Candidate,
        batch: ImageBatch,
        seed: int,
        centroids: DatasetClusters | None,
        *,
        learn: bool = False,
    ) -> LesionMap:
        selection = candidate.selection
        if selection is None:
            score = self._reference_score(candidate, batch, seed)
            lesion = top_patches(score, self.share, batch.keys).float()
            return LesionMap(lesion, score, score)
        view, _ = self._teacher_view(candidate, batch, seed)
        return locate_lesion(
            batch.patches,
            batch.keys,
            self.grid,
            self.channels,
            selection,
            seed=seed,
            epoch=1,
            teacher=view,
            truth=batch.share if selection.uses_ground_truth else None,
            centroids=centroids,
            learn=learn,
        )

    def _reference_score(self, candidate: Candidate, batch: ImageBatch, seed: int) -> Tensor:
        """Return noise, or nearness to the center, (B, N)."""
        patches = batch.share.shape[1]
        noise = counter_rng.uniform(
            batch.keys, patches, seed=seed, epoch=1, stream=counter_rng.MASK
        )
        if candidate.name == RANDOM:
            return noise
        return -center_distance(self.grid, noise.device).expand_as(noise)

    def _compare(
        self, candidate: Candidate, lesion_map: LesionMap, batch: ImageBatch
    ) -> dict[str, Tensor]:
        """Return every measure by image, (B,)."""
        selection = candidate.selection or SelectionConfig()
        truth = true_lesion_patches(batch.share)
        lesion = lesion_map.lesion > 0.5
        tissue = tissue_mask(batch.patches, selection)
        values = overlap(lesion, truth)
        values["size"] = lesion.sum(1) / tissue.sum(1).clamp_min(1)
        values["fallback"] = ~lesion.any(1)
        if candidate.selection is None or not candidate.selection.uses_clusters:
            for suffix, share in (("_top", TOP_SHARE), ("_share", self.share)):
                top = top_patches(lesion_map.score, share, batch.keys)
                for name, value in overlap(top, truth).items():
                    values[name + suffix] = value
            values["auc"] = per_image(roc_auc_score, truth, lesion_map.score)
            values["ap"] = per_image(average_precision_score, truth, lesion_map.score)
        return values


def _describe(candidate: Candidate) -> Row:
    """Return block, name, and the settings that the candidate uses; None for the others."""
    names = (*CLUSTER_SETTINGS, "score", *SIGN_SETTINGS)
    row: Row = {"block": candidate.block, "name": candidate.name, **dict.fromkeys(names)}
    selection = candidate.selection
    if selection is None:
        return row
    used: list[str] = []
    if selection.uses_clusters:
        used += CLUSTER_SETTINGS
    if selection.uses_score:
        used.append("score")
    if selection.uses_score or selection.rule in PATCH_SCORES:
        used += SIGN_SETTINGS
    return row | {name: getattr(selection, name) for name in used}
