"""The candidates that the localization benchmark compares: name, block of the table, settings."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from amlp_ray.config import SelectionConfig
from amlp_ray.method.patch_scores import PATCH_SCORES

RANDOM = "random patches"
CENTER = "nearness to the center"
CLUSTERS = (2, 3, 4, 6, 8)
DATASET_CLUSTERS = (3, 8)
SIGNED = ("row_contrast", "blob", "combined")  # scores that a lesion's sign changes
# What the others are compared with: the rule nearest to the paper, a random cluster of the same
# sizes, and patch SD, which difficulty must beat, since a teacher errs where patches vary.
REFERENCES = ("raw, 3, smallest", "raw, 3, random", "texture")


class Candidate(NamedTuple):
    """A way to find lesions."""

    block: str  # heading of the table
    name: str  # row of the table
    selection: SelectionConfig | None = None  # None for `RANDOM` and `CENTER`
    # Divide the teacher's difficulty by the patch's variance, as standardized targets do.
    per_variance: bool = False

    @property
    def is_random(self) -> bool:
        """Whether the result depends on the seed."""
        if self.selection is None or self.selection.uses_clusters:
            return True
        return "difficulty" in self.name

    @property
    def can_be_chosen(self) -> bool:
        """Whether a run can be set to it, without labels."""
        selection = self.selection
        return selection is not None and not (selection.uses_ground_truth or self.per_variance)

    @property
    def settings(self) -> dict[str, Any]:
        """Settings of a run that uses it, where they are not the default."""
        if self.selection is None:
            return {}
        changed = self.selection.model_dump(exclude_defaults=True)
        return {f"selection.{name}": value for name, value in changed.items()}


def all_candidates(*, encoder: bool = False, decoder: bool = False) -> list[Candidate]:
    """Return all candidates.

    Args:
        encoder: include those that need a trained encoder.
        decoder: include those that need a trained decoder.
    """
    features = ["raw", "stats", "context"]
    if encoder:
        features.append("tokens")
    result = [Candidate("reference", RANDOM), Candidate("reference", CENTER)]
    for scope, cluster_counts in (("image", CLUSTERS), ("dataset", DATASET_CLUSTERS)):
        for feature in features:
            for clusters in cluster_counts:
                for rule in _rules(clusters):
                    result.append(_cluster_candidate(feature, clusters, scope, **rule))
    for score in PATCH_SCORES:
        for sign in ("dark", "free") if score in SIGNED else ("free",):
            for center_prior in (0.0, 0.8):
                result.append(_score_candidate(score, sign, center_prior))
    if encoder:
        result.append(_score_candidate("attention"))
    if decoder:
        for feature in features:
            for clusters in CLUSTERS[1:]:
                result.append(_cluster_candidate(feature, clusters, "image", rule="hardest"))
        result.append(_score_candidate("difficulty"))
        result.append(_score_candidate("difficulty", per_variance=True))
    return result


def _rules(clusters: int) -> Iterator[dict[str, Any]]:
    yield {"rule": "smallest"}
    if clusters == 2:
        # The larger of two is above `max_share`, so every rule chooses the smaller.
        return
    for rule in ("distinct", "most_central", "darkest", "brightest", "random", "oracle"):
        yield {"rule": rule}
    for sign in ("dark", "bright", "free"):
        yield {"rule": "combined", "lesion_sign": sign, "center_prior": 0.0}
    for sign in ("dark", "free"):
        yield {"rule": "combined", "lesion_sign": sign, "center_prior": 0.8}
    yield {"rule": "geodesic"}


def _cluster_candidate(features: str, clusters: int, scope: str, **rule: Any) -> Candidate:
    selection = SelectionConfig.model_validate(
        {"mode": "hard", "features": features, "clusters": clusters, "scope": scope, **rule}
    )
    rule_name: str = selection.rule
    if selection.rule in PATCH_SCORES:
        rule_name = f"by {_score_name(selection, selection.rule)}"
    name = f"{features}, {clusters}, {rule_name}"
    block = "clusters of an image"
    if scope == "dataset":
        name += ", dataset"
        block = "clusters of the dataset"
    if selection.rule == "oracle":
        block = f"best {block} (labels)"
    elif features == "tokens" or selection.rule == "hardest":
        block = f"teacher's {block}"
    return _with_block(block, name, selection)


def _score_candidate(
    score: str, sign: str = "free", center_prior: float = 0.0, *, per_variance: bool = False
) -> Candidate:
    selection = SelectionConfig.model_validate(
        {"mode": "soft", "score": score, "lesion_sign": sign, "center_prior": center_prior}
    )
    block = "teacher's scores" if score in ("attention", "difficulty") else "scores"
    name = _score_name(selection, score)
    if per_variance:
        name += " / patch variance"
    return _with_block(block, name, selection)._replace(per_variance=per_variance)


def _with_block(block: str, name: str, selection: SelectionConfig) -> Candidate:
    """Create a candidate; references stand in a block of their own."""
    return Candidate("reference" if name in REFERENCES else block, name, selection)


def _score_name(selection: SelectionConfig, score: str) -> str:
    name = score
    if score in SIGNED:
        name += f" {selection.lesion_sign}"
    if selection.center_prior:
        name += " x center"
    return name


DEFAULT_RULE = next(c for c in all_candidates() if c.selection == SelectionConfig())
