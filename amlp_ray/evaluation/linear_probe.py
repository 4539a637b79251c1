"""Linear probe: how well a linear head on frozen patch tokens finds lesions from few labels.

This is what a search maximizes. For each label subset, a logistic regression maps tokens to the
lesion share of their patch. L2 and threshold are chosen by cross-validation within the subset, the
logits are upsampled to pixels, and the DSC is averaged over images. The score is the mean over
fixed subsets; subsets and folds are the same for all trials. Test images are read only where a
confirmation asks for them by name; the same heads are then scored on them.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cached_property
from statistics import fmean
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
    BoolArray,
    FloatArray,
    ProbeScore,
    best_threshold,
    dsc_by_size,
    mean_mask_floor,
    score_images,
    size_classes,
)
from amlp_ray.method.augment import normalize
from amlp_ray.method.encoder import encoder_tokens
from amlp_ray.method.patches import lesion_shares, patchify

# scikit-learn's C; from clearly too stiff to clearly too loose for 24 images.
INVERSE_L2 = (0.01, 0.1, 1.0)
# Below this, the SD over images (0.22 DSC) leaves a standard error above 0.035.
MIN_VAL_IMAGES = 40
INNER_FOLDS = 3
BATCH_SIZE = 64

Indices = NDArray[np.intp]
Tokens = Callable[[torch.Tensor], torch.Tensor]
ProbeSplit = Literal["val", "test"]


def require_labels(dataset: PatchDataset, config: ProbeConfig) -> None:
    """Raise DataError if the training split has too few labeled images with a lesion."""
    lesions = dataset.manifest.counts["train"].lesions
    if lesions < config.num_labeled:
        raise DataError(
            f"{dataset.path} has {lesions} labeled training images with a lesion, but the probe "
            f"needs probe.num_labeled={config.num_labeled}; lower probe.num_labeled, add masks, or "
            f"name a dataset with masks by `eval_data`."
        )


class LabeledIndex(NamedTuple):
    """Labeled images of train, then of val, before their pixels are read: (n,) each."""

    rows: Indices  # in their split, rising
    groups: NDArray[np.str_]
    has_lesion: BoolArray
    n_train: int  # how many of them are in train


class Fold(NamedTuple):
    """Indices of images: the label subsets that are fitted, and the images they are scored on."""

    subsets: list[Indices]
    scored: Indices


class HeadScores(NamedTuple):
    """Scores of a head that was fitted on one subset."""

    per_image: FloatArray  # DSC, PPV, sensitivity and empty_correct, (4, n)
    logits: FloatArray  # of the patches, (n, N)
    floor: FloatArray  # DSC of the subset's mean mask, (n,)


class Probe:
    """The labeled images that a score needs, read once, and the subsets for every encoder.

    Attributes:
        data: the images that are fitted or scored, those of train first.
        share: lesion share of their patches, (n, N).
        plan: which of them are fitted and scored.
        scoring: `val` or `cross-validation`.
    """

    def __init__(
        self,
        dataset: PatchDataset,
        config: ProbeConfig,
        patch_size: int,
        spec: ImageSpec | None = None,
    ) -> None:
        """Choose and read the images of train and val.

        Args:
            patch_size: of the encoders.
            spec: of the images that encoders are pretrained on, if they are others (see
                `labels.check_fits`).

        Raises:
            DataError: there are too few labeled images with a lesion, or too few groups of them.
        """
        require_labels(dataset, config)
        self.dataset = dataset
        self.config = config
        self.spec = spec or dataset.spec
        self.patch_size = patch_size
        self.grid = (self.spec.height // patch_size, self.spec.width // patch_size)
        index = _index_labels(dataset)
        self.scoring = _choose_scoring(dataset, config, index)
        plan = _plan_folds(config, self.scoring, index)
        _check_groups(dataset, plan, index)
        used_by_fold = [np.concatenate([*fold.subsets, fold.scored]) for fold in plan]
        used = np.unique(np.concatenate(used_by_fold))
        train = used[used < index.n_train]
        val = used[used >= index.n_train]
        train_images = dataset.load("train", index.rows[train])
        self.data = train_images.concat(dataset.load("val", index.rows[val]))
        self.share = lesion_shares(self.data.masks, patch_size).numpy()
        self.plan = []
        for fold in plan:
            subsets = [np.searchsorted(used, subset) for subset in fold.subsets]
            self.plan.append(Fold(subsets, np.searchsorted(used, fold.scored)))

    def images_by_size(self) -> dict[str, int]:
        """Count the scored images with a small, a medium and a large lesion."""
        scored = np.concatenate([fold.scored for fold in self.plan])
        classes = size_classes(self.data.masks[scored].mean((1, 2)), self.config.sizes)
        return {name: int(selected.sum()) for name, selected in classes.items()}

    @cached_property
    def _test_images(self) -> Split:
        """Labeled test images, read once for a confirmation."""
        pixels = lesion_pixels(self.dataset, "test")
        if not (pixels > 0).any():
            raise DataError(
                f"{self.dataset.path} has no labeled test image with a lesion; there is nothing "
                f"to confirm."
            )
        rows = np.flatnonzero(np.isfinite(pixels))
        rows = _limit(rows, pixels[rows] > 0, self.config.images)
        return self.dataset.load("test", rows)

    def score(self, encoder: VisionTransformer, split: ProbeSplit = "val") -> ProbeScore:
        """Score an encoder by its patch tokens, on val (or by cross-validation) or on test.

        Raises:
            DataError: test has no lesion.
        """

        def tokens(patches: torch.Tensor) -> torch.Tensor:
            return encoder_tokens(encoder, patches)[:, encoder.num_prefix_tokens :]

        return self.score_tokens(tokens, encoder.patch_embed.proj.weight.device, split)

    @torch.inference_mode()
    def score_tokens(
        self, tokens: Tokens, device: torch.device | str = "cpu", split: ProbeSplit = "val"
    ) -> ProbeScore:
        """Score a function from normalized patches (B, N, P) to tokens (B, N, D).

        On test, each head of each subset scores all images; these are the heads of a score on val.
        """
        fitted = self._features(self.data, tokens, device)
        # Over all images of the probe, scored ones included. It involves no label, and is the same
        # for every encoder.
        mean = fitted.mean((0, 1))
        sd = fitted.std((0, 1)) + 1e-6
        fitted = (fitted - mean) / sd
        images = self.data
        scored = fitted
        plan = self.plan
        if split == "test":
            images = self._test_images
            scored = (self._features(images, tokens, device) - mean) / sd
            subsets = [subset for fold in self.plan for subset in fold.subsets]
            plan = [Fold(subsets, np.arange(len(images)))]
        heads: list[list[HeadScores]] = []
        # NumPy's BLAS would take every core, and spin while other trials hold them: 7x slower
        # (measured).
        with threadpool_limits(torch.get_num_threads(), "blas"):
            for subsets, rows in plan:
                masks = images.masks[rows]
                tokens_of_fold = scored[rows]
                heads.append([self._score_head(fitted, s, tokens_of_fold, masks) for s in subsets])
        scoring = "test" if split == "test" else self.scoring
        return self._summarize(plan, heads, images, scoring)

    def _features(self, split: Split, tokens: Tokens, device: torch.device | str) -> FloatArray:
        """Compute the tokens (n, N, D) of images."""
        features = []
        for images in torch.from_numpy(split.images).split(BATCH_SIZE):
            patches = patchify(normalize(images.to(device), self.spec), self.patch_size)
            features.append(tokens(patches).float().cpu().numpy())
        return np.concatenate(features)

    def _score_head(
        self, fitted: FloatArray, subset: Indices, scored: FloatArray, masks: NDArray[np.uint8]
    ) -> HeadScores:
        """Fit a head on a subset of tokens (n, N, D); score it on others (m, N, D)."""
        inverse_l2, threshold = self._tune(fitted, subset)
        head = _fit_regression(fitted[subset], self.share[subset], inverse_l2)
        logits = _predict_logits(head, scored)
        scores = score_images(self._upsample(logits) > threshold, masks > 0)
        per_image = np.stack([scores.dsc, scores.ppv, scores.sensitivity, scores.empty_correct])
        return HeadScores(per_image, logits, mean_mask_floor(self.data.masks[subset], masks))

    def _tune(self, x: FloatArray, subset: Indices) -> tuple[float, float]:
        """Choose the L2 strength and threshold with the best cross-validated DSC in a subset."""
        groups = self.data.groups[subset]
        folds = GroupKFold(min(INNER_FOLDS, len(np.unique(groups))))
        best = (-1.0, 0.0, 0.0)
        for inverse_l2 in INVERSE_L2:
            logits = np.zeros((len(subset), x.shape[1]))
            for train, test in folds.split(subset, groups=groups):
                head = _fit_regression(x[subset[train]], self.share[subset[train]], inverse_l2)
                logits[test] = _predict_logits(head, x[subset[test]])
            truth = self.data.masks[subset] > 0
            threshold, dsc = best_threshold(self._upsample(logits), truth, THRESHOLDS)
            best = max(best, (dsc, inverse_l2, threshold))
        return best[1], best[2]

    def _upsample(self, logits: FloatArray) -> FloatArray:
        """Compute probabilities (n, H, W) from patch logits (n, N)."""
        grid = torch.from_numpy(logits).reshape(-1, 1, *self.grid).float()
        size = (self.spec.height, self.spec.width)
        pixels = F.interpolate(grid, size, mode="bilinear", align_corners=False)
        return pixels[:, 0].sigmoid().numpy()

    def _summarize(
        self, plan: list[Fold], heads: list[list[HeadScores]], data: Split, scoring: str
    ) -> ProbeScore:
        """Average over the subsets of each fold, then over images."""
        is_lesion_patch = lesion_shares(data.masks, self.patch_size).numpy() > 0.5
        per_image = np.full((4, len(data)), np.nan)
        floors = []
        precisions = []
        subset_dsc = []
        for fold, scores in zip(plan, heads, strict=True):
            per_image[:, fold.scored] = np.mean([head.per_image for head in scores], 0)
            floors.append(np.mean([head.floor for head in scores], 0))
            subset_dsc.append([float(np.nanmean(head.per_image[0])) for head in scores])
            truth = is_lesion_patch[fold.scored].ravel()
            if truth.any():
                ap = [average_precision_score(truth, head.logits.ravel()) for head in scores]
                precisions.append(np.mean(ap))
        with warnings.catch_warnings():
            # The mean over no image is NaN, as it should be.
            warnings.simplefilter("ignore", RuntimeWarning)
            dsc, ppv, sensitivity, empty_correct = (float(np.nanmean(row)) for row in per_image)
        dsc_sd = None
        if len(subset_dsc[0]) > 1:
            dsc_sd = float(np.nanmean(np.std(np.asarray(subset_dsc), axis=1, ddof=1)))
        image_dsc = per_image[0]
        with_lesion = np.flatnonzero(np.isfinite(image_dsc))
        by_group: dict[str, list[float]] = {}
        for i in with_lesion:
            by_group.setdefault(str(data.groups[i]), []).append(float(image_dsc[i]))
        return ProbeScore(
            dsc=dsc,
            ppv=ppv,
            sensitivity=sensitivity,
            ap=float(np.mean(precisions)) if precisions else float("nan"),
            dsc_sd=dsc_sd,
            empty_correct=None if np.isnan(empty_correct) else empty_correct,
            images=len(with_lesion),
            scoring=scoring,
            mean_mask_dsc=float(np.nanmean(np.concatenate(floors))),
            **dsc_by_size(image_dsc, data.masks.mean((1, 2)), self.config.sizes),
            per_image={data.ids[i]: round(float(image_dsc[i]), 6) for i in with_lesion},
            per_group={group: round(fmean(values), 6) for group, values in by_group.items()},
            unit=self.dataset.manifest.group_unit,
        )


def _index_labels(dataset: PatchDataset) -> LabeledIndex:
    """List the labeled images of train and val."""
    table = dataset.table("train", "val", columns=["group", "lesion"])
    table["row"] = table.groupby("split").cumcount()
    labeled = table[table["lesion"].notna()]
    return LabeledIndex(
        labeled["row"].to_numpy(),
        labeled["group"].to_numpy().astype(str),
        (labeled["lesion"] > 0).to_numpy(),
        n_train=int((labeled["split"] == "train").sum()),
    )


def _choose_scoring(
    dataset: PatchDataset, config: ProbeConfig, index: LabeledIndex
) -> Literal["val", "cross-validation"]:
    """Decide how to score, and check that there are enough images for it."""
    val_lesions = int(index.has_lesion[index.n_train :].sum())
    scoring = config.scoring
    if scoring == "auto":
        scoring = "val" if val_lesions >= MIN_VAL_IMAGES else "cross-validation"
    if scoring == "val" and val_lesions == 0:
        raise DataError(
            f"{dataset.path} has no val image with a lesion; use probe.scoring=cross-validation."
        )
    groups = len(np.unique(index.groups))
    if scoring == "cross-validation" and groups < config.folds:
        raise DataError(
            f"{dataset.path} has labeled images of {groups} groups, but cross-validation over "
            f"probe.folds={config.folds} needs as many; lower probe.folds or label images of more "
            f"groups."
        )
    return scoring


def _plan_folds(config: ProbeConfig, scoring: str, index: LabeledIndex) -> list[Fold]:
    """Choose label subsets and scored images: one fold of val, or folds by group over both."""
    rng = np.random.default_rng(config.seed)
    everything = np.arange(len(index.rows))
    if scoring == "val":
        train, val = np.split(everything, [index.n_train])
        pool = train[index.has_lesion[train]]
        subsets = [_sample_subset(pool, index, config, rng) for _ in range(config.subsets)]
        return [Fold(subsets, _limit(val, index.has_lesion[val], config.images))]
    images = _limit(everything, index.has_lesion, config.images)
    folds = GroupKFold(config.folds, shuffle=True, random_state=config.seed)
    # Half as many subsets per fold: the folds average label noise as well.
    n_subsets = max(1, config.subsets // 2)
    plan = []
    for train, test in folds.split(images, groups=index.groups[images]):
        pool = images[train][index.has_lesion[images[train]]]
        subsets = [_sample_subset(pool, index, config, rng) for _ in range(n_subsets)]
        plan.append(Fold(subsets, images[test]))
    return plan


def _limit(rows: Indices, has_lesion: BoolArray, count: int) -> Indices:
    """Choose at most `count` rows with a lesion and `count` without, evenly spaced."""
    chosen = [spread(rows[has_lesion], count), spread(rows[~has_lesion], count)]
    return np.sort(np.concatenate(chosen))


def _sample_subset(
    pool: Indices, index: LabeledIndex, config: ProbeConfig, rng: np.random.Generator
) -> Indices:
    """Sample `num_labeled` images, of different groups first: near-copies add little."""
    if len(pool) < config.num_labeled:
        raise DataError(
            f"A cross-validation fold leaves {len(pool)} labeled images with a lesion for "
            f"fitting, but the probe needs probe.num_labeled={config.num_labeled}; lower "
            f"probe.num_labeled or raise probe.folds."
        )
    shuffled = rng.permutation(pool)
    _, firsts = np.unique(index.groups[shuffled], return_index=True)
    order = np.concatenate([shuffled[np.sort(firsts)], np.delete(shuffled, firsts)])
    return order[: config.num_labeled]


def _check_groups(dataset: PatchDataset, plan: list[Fold], index: LabeledIndex) -> None:
    for fold in plan:
        for subset in fold.subsets:
            if len(np.unique(index.groups[subset])) < 2:
                raise DataError(
                    f"{dataset.path} has labels that come from a single group, but the probe "
                    f"chooses its threshold across groups; label images of more groups."
                )


def _fit_regression(x: FloatArray, share: FloatArray, inverse_l2: float) -> LogisticRegression:
    """Fit tokens (n, N, D) to lesion shares (n, N).

    A patch counts as lesion with the weight of its share, and as no lesion with the rest.
    """
    tokens = x.reshape(-1, x.shape[-1])
    weight = share.ravel()
    lesion = np.flatnonzero(weight > 0)
    rest = np.flatnonzero(weight < 1)
    model = LogisticRegression(C=inverse_l2, solver="newton-cholesky")
    return model.fit(
        np.concatenate([tokens[lesion], tokens[rest]]),
        np.concatenate([np.ones(len(lesion), int), np.zeros(len(rest), int)]),
        sample_weight=np.concatenate([weight[lesion], 1 - weight[rest]]),
    )


def _predict_logits(model: LogisticRegression, x: FloatArray) -> FloatArray:
    """Compute the logits (n, N) of tokens (n, N, D)."""
    return model.decision_function(x.reshape(-1, x.shape[-1])).reshape(x.shape[:2])
