"""`probe`: how well a linear head on frozen patch tokens finds lesions from few labels. What a search maximises.

Per label subset: a logistic regression from token to lesion share of the patch, L2 and threshold chosen by
cross-validation inside the labelled images, logits upsampled to pixels, DSC averaged over images. The mean over fixed
subsets is the score; subsets and folds are the same for all trials. Test images are read where a confirmation asks for
them by name, and nowhere else: the same heads are then scored on them.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cached_property
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score
from sklearn.model_selection import GroupKFold
from threadpoolctl import threadpool_limits
from timm.models.vision_transformer import VisionTransformer

from amlp_ray.config import ImageSpec, ProbeConfig
from amlp_ray.data.dataset import PatchDataset, Split
from amlp_ray.errors import DataError
from amlp_ray.evaluation.labels import lesion_pixels, spread
from amlp_ray.evaluation.metrics import (
    THRESHOLDS,
    FloatArray,
    ProbeScore,
    best_threshold,
    by_size,
    mean_mask_floor,
    score_images,
    sizes_of,
)
from amlp_ray.method.augment import normalize
from amlp_ray.method.encoder import encoder_tokens
from amlp_ray.method.patches import patchify

INVERSE_L2 = (
    0.01,
    0.1,
    1.0,
)  # scikit-learn's C; from clearly too stiff to clearly too loose for 24 images
MIN_VAL_IMAGES = 40  # below this the SD over images (0.22 DSC) leaves a standard error above 0.035
INNER_FOLDS = 3

Indices = NDArray[np.intp]
Tokens = Callable[[torch.Tensor], torch.Tensor]


def require_labels(dataset: PatchDataset, config: ProbeConfig) -> None:
    """Raise DataError where the training split has too few labelled images with a lesion."""
    lesions = dataset.manifest.counts["train"].lesions
    if lesions < config.num_labeled:
        raise DataError(
            f"{dataset.path} has {lesions} labelled training images with a lesion, but the probe needs "
            f"probe.num_labeled={config.num_labeled}; lower probe.num_labeled, add masks, or name a data set with masks by `eval_data`."
        )


class LabeledIndex(NamedTuple):
    """Labelled images, those of train first, that are not read yet."""

    rows: Indices  # (n,) in their split, rising
    groups: NDArray[np.str_]  # (n,)
    lesion: NDArray[np.bool_]  # (n,)
    train: int  # how many of them are of train


class LabeledImages(NamedTuple):
    """Labelled images, read, and the lesion share of their patches."""

    split: Split
    share: FloatArray  # (n, N)

    @classmethod
    def of(cls, split: Split, patch_size: int) -> LabeledImages:
        share = F.avg_pool2d(torch.from_numpy(split.masks).float()[:, None], patch_size)[:, 0]
        return cls(split, share.flatten(1).numpy())


class Probe:
    """The labelled images that a score needs, read once, and the fixed subsets on which every encoder is scored."""

    def __init__(
        self,
        dataset: PatchDataset,
        config: ProbeConfig,
        patch_size: int,
        spec: ImageSpec | None = None,
    ) -> None:
        """Read of train and val what is fitted or scored.

        Args:
            spec: of the images that encoders are pretrained on, where these are others: see `labelled.check_fits`.

        Raises:
            DataError: where there are too few labelled images with a lesion, or too few groups of them.
        """
        require_labels(dataset, config)
        self.dataset = dataset
        self.config = config
        self.spec = spec or dataset.spec
        self.patch_size = patch_size
        known = _known(dataset)
        val_lesions = int(known.lesion[known.train :].sum())
        self.scoring = config.scoring
        if config.scoring == "auto":
            self.scoring = "val" if val_lesions >= MIN_VAL_IMAGES else "cross-validation"
        if self.scoring == "val" and val_lesions == 0:
            raise DataError(
                f"{dataset.path} has no val image with a lesion; use probe.scoring=cross-validation."
            )
        groups = len(np.unique(known.groups))
        if self.scoring == "cross-validation" and groups < config.folds:
            raise DataError(
                f"{dataset.path} has labelled images of {groups} groups, but cross-validation over "
                f"probe.folds={config.folds} needs as many; lower probe.folds or label images of more groups."
            )
        plan = self._plan(known)
        if any(
            len(np.unique(known.groups[subset])) < 2 for subsets, _ in plan for subset in subsets
        ):
            raise DataError(
                f"{dataset.path} has labels that come from a single group, but the probe chooses its threshold across "
                f"groups; label images of more groups."
            )
        used = np.unique(
            np.concatenate([rows for subsets, scored in plan for rows in (*subsets, scored)])
        )
        train, val = used[used < known.train], used[used >= known.train]
        data = dataset.load("train", known.rows[train]).concat(dataset.load("val", known.rows[val]))
        self.own = LabeledImages.of(data, patch_size)
        self.plan = [
            ([np.searchsorted(used, s) for s in subsets], np.searchsorted(used, r))
            for subsets, r in plan
        ]
        self.grid = (self.spec.height // patch_size, self.spec.width // patch_size)

    @property
    def data(self) -> Split:
        """The images that are fitted or scored, those of train first."""
        return self.own.split

    @property
    def share(self) -> FloatArray:
        """Lesion share of their patches, (n, N)."""
        return self.own.share

    def images_by_size(self) -> dict[str, int]:
        """How many of the scored images have a small, a medium and a large lesion."""
        scored = np.concatenate([rows for _, rows in self.plan])
        sizes = sizes_of(self.data.masks[scored].mean((1, 2)), self.config.sizes)
        return {name: int(chosen.sum()) for name, chosen in sizes.items()}

    @cached_property
    def _test(self) -> LabeledImages:
        """Labelled test images; read for a confirmation, once."""
        pixels = lesion_pixels(self.dataset, "test")
        rows = np.flatnonzero(np.isfinite(pixels))
        if not (pixels > 0).any():
            raise DataError(
                f"{self.dataset.path} has no labelled test image with a lesion; there is nothing to confirm."
            )
        return LabeledImages.of(
            self.dataset.load("test", self._enough(rows, pixels[rows] > 0)), self.patch_size
        )

    def _plan(self, known: LabeledIndex) -> list[tuple[list[Indices], Indices]]:
        """(label subsets, images to score) per fold; one fold of val, or folds by group over train and val."""
        rng = np.random.default_rng(self.config.seed)
        everything = np.arange(len(known.rows))
        if self.scoring == "val":
            pool = everything[: known.train][known.lesion[: known.train]]
            subsets = [self._subset(pool, known, rng) for _ in range(self.config.subsets)]
            return [(subsets, self._enough(everything[known.train :], known.lesion[known.train :]))]
        folds = GroupKFold(self.config.folds, shuffle=True, random_state=self.config.seed)
        chosen = self._enough(everything, known.lesion)
        plan = []
        for rest, scored in folds.split(chosen, groups=known.groups[chosen]):
            pool = chosen[rest][known.lesion[chosen[rest]]]
            # Half as many subsets per fold: the folds average label noise as well.
            subsets = [
                self._subset(pool, known, rng) for _ in range(max(1, self.config.subsets // 2))
            ]
            plan.append((subsets, chosen[scored]))
        return plan

    def _enough(self, rows: Indices, lesion: NDArray[np.bool_]) -> Indices:
        """Of the rows (n,) with a lesion, and of those without, as many as `images` says, spread evenly."""
        return np.sort(
            np.concatenate([spread(rows[side], self.config.images) for side in (lesion, ~lesion)])
        )

    def _subset(self, pool: Indices, known: LabeledIndex, rng: np.random.Generator) -> Indices:
        """`labels` images, from different groups while there are any left: near-copies teach nothing new."""
        if len(pool) < self.config.num_labeled:
            raise DataError(
                f"A cross-validation fold leaves {len(pool)} labelled images with a lesion for fitting, but the probe "
                f"needs probe.num_labeled={self.config.num_labeled}; lower probe.num_labeled or raise probe.folds."
            )
        shuffled = rng.permutation(pool)
        _, firsts = np.unique(known.groups[shuffled], return_index=True)
        order = np.concatenate([shuffled[np.sort(firsts)], np.delete(shuffled, firsts)])
        return order[: self.config.num_labeled]

    def score(
        self, encoder: VisionTransformer, split: Literal["val", "test"] = "val"
    ) -> ProbeScore:
        """Score an encoder by its patch tokens, on val (or by cross-validation) or on test.

        Raises:
            DataError: test holds no lesion.
        """
        prefix, device = encoder.num_prefix_tokens, encoder.patch_embed.proj.weight.device
        return self.score_tokens(
            lambda patches: encoder_tokens(encoder, patches)[:, prefix:], device, split
        )

    @torch.inference_mode()
    def score_tokens(
        self,
        tokens: Tokens,
        device: torch.device | str = "cpu",
        split: Literal["val", "test"] = "val",
    ) -> ProbeScore:
        """Score a function from normalised patches (B, N, P) to tokens (B, N, D).

        On test, every head of every subset scores every image: heads are those that a score on val comes from.
        """
        x = self._features(self.own, tokens, device)
        # Over all images of the probe, scored ones included: no label is involved, and every encoder is treated alike.
        mean, sd = x.mean((0, 1)), x.std((0, 1)) + 1e-6
        x = (x - mean) / sd
        shown, y, plan = self.own, x, self.plan
        if split == "test":
            shown = self._test
            y = (self._features(shown, tokens, device) - mean) / sd
            plan = [([s for subsets, _ in self.plan for s in subsets], np.arange(len(shown.split)))]
        # NumPy's BLAS would take every core and wait in a spin for those that other trials hold: 7x slower (measured).
        with threadpool_limits(torch.get_num_threads(), "blas"):
            fits = [
                (rows, [self._fit(x, s, shown, y, rows) for s in subsets]) for subsets, rows in plan
            ]
        return self._summary(fits, shown, self.scoring if split == "val" else split)

    def _features(
        self, shown: LabeledImages, tokens: Tokens, device: torch.device | str
    ) -> FloatArray:
        features = []
        for chunk in torch.from_numpy(shown.split.images).split(64):
            patches = patchify(normalize(chunk.to(device), self.spec), self.patch_size)
            features.append(tokens(patches).float().cpu().numpy())
        return np.concatenate(features)

    def _fit(
        self, x: FloatArray, subset: Indices, shown: LabeledImages, y: FloatArray, rows: Indices
    ) -> tuple[FloatArray, FloatArray, FloatArray]:
        """Fit on one subset of x; per-image scores (4, n), patch logits (n, N), mean-mask DSC (n,) of rows of y."""
        inverse_l2, threshold = self._choose(x, subset)
        logits = _logits(_regression(x[subset], self.share[subset], inverse_l2), y[rows])
        masks = shown.split.masks[rows]
        s = score_images(self._pixels(logits) > threshold, masks > 0)
        floor = mean_mask_floor(self.data.masks[subset], masks)
        return np.stack([s.dsc, s.ppv, s.sensitivity, s.empty_correct]), logits, floor

    def _choose(self, x: FloatArray, subset: Indices) -> tuple[float, float]:
        """L2 strength and threshold with the best cross-validated DSC inside the labelled subset."""
        groups = self.data.groups[subset]
        folds = GroupKFold(min(INNER_FOLDS, len(np.unique(groups))))
        best = (-1.0, 0.0, 0.0)
        for inverse_l2 in INVERSE_L2:
            logits = np.zeros((len(subset), x.shape[1]))
            for fit, held in folds.split(subset, groups=groups):
                model = _regression(x[subset[fit]], self.share[subset[fit]], inverse_l2)
                logits[held] = _logits(model, x[subset[held]])
            threshold, dsc = best_threshold(
                self._pixels(logits), self.data.masks[subset] > 0, THRESHOLDS
            )
            best = max(best, (dsc, inverse_l2, threshold))
        return best[1], best[2]

    def _pixels(self, logits: FloatArray) -> FloatArray:
        """Probabilities (n, H, W) from patch logits (n, N)."""
        grid = torch.from_numpy(logits).reshape(-1, 1, *self.grid).float()
        size = (self.spec.height, self.spec.width)
        return (
            F.interpolate(grid, size, mode="bilinear", align_corners=False)[:, 0].sigmoid().numpy()
        )

    def _summary(
        self,
        folds: list[tuple[Indices, list[tuple[FloatArray, FloatArray, FloatArray]]]],
        shown: LabeledImages,
        scoring: str,
    ) -> ProbeScore:
        data = shown.split
        per_image = np.full((4, len(data)), np.nan)
        floors, aps, subset_dsc = [], [], []
        for scored, fits in folds:
            per_image[:, scored] = np.mean([scores for scores, _, _ in fits], 0)
            positive = (shown.share[scored] > 0.5).ravel()
            if positive.any():
                aps.append(
                    np.mean(
                        [average_precision_score(positive, logits.ravel()) for _, logits, _ in fits]
                    )
                )
            floors.append(np.mean([floor for _, _, floor in fits], 0))
            subset_dsc.append([float(np.nanmean(scores[0])) for scores, _, _ in fits])
        dsc, ppv, sensitivity, empty = per_image
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore", RuntimeWarning
            )  # the mean over no image is NaN, and meant
            means = [float(np.nanmean(v)) for v in (dsc, ppv, sensitivity, empty)]
        spread = (
            np.nanmean(np.std(np.asarray(subset_dsc), axis=1, ddof=1))
            if len(subset_dsc[0]) > 1
            else 0.0
        )
        return ProbeScore(
            dsc=means[0],
            ppv=means[1],
            sensitivity=means[2],
            ap=float(np.mean(aps)) if aps else float("nan"),
            dsc_sd=float(spread),
            empty_correct=None if np.isnan(means[3]) else means[3],
            images=int(np.isfinite(dsc).sum()),
            scoring=scoring,
            mean_mask_dsc=float(np.nanmean(np.concatenate(floors))),
            **by_size(dsc, data.masks.mean((1, 2)), self.config.sizes),
            per_image={
                data.ids[i]: round(float(dsc[i]), 6) for i in np.flatnonzero(np.isfinite(dsc))
            },
        )


def _known(dataset: PatchDataset) -> LabeledIndex:
    rows, groups, lesion = [], [], []
    for split in ("train", "val"):
        table = dataset.table(split, columns=["group", "lesion"])
        pixels = table["lesion"].to_numpy(np.float64)
        labeled = np.flatnonzero(np.isfinite(pixels))
        rows.append(labeled)
        groups.append(table["group"].to_numpy()[labeled].astype(str))
        lesion.append(pixels[labeled] > 0)
    return LabeledIndex(
        np.concatenate(rows), np.concatenate(groups), np.concatenate(lesion), len(rows[0])
    )


def _regression(x: FloatArray, share: FloatArray, inverse_l2: float) -> LogisticRegression:
    """Fit patches (n, N, D) to lesion shares (n, N): each patch counts once as lesion, once not, by its share."""
    flat, y = x.reshape(-1, x.shape[-1]), share.ravel()
    lesion, rest = np.flatnonzero(y > 0), np.flatnonzero(y < 1)
    model = LogisticRegression(C=inverse_l2, solver="newton-cholesky")
    return model.fit(
        np.concatenate([flat[lesion], flat[rest]]),
        np.concatenate([np.ones(len(lesion), int), np.zeros(len(rest), int)]),
        sample_weight=np.concatenate([y[lesion], 1 - y[rest]]),
    )


def _logits(model: LogisticRegression, x: FloatArray) -> FloatArray:
    return model.decision_function(x.reshape(-1, x.shape[-1])).reshape(x.shape[:2])
