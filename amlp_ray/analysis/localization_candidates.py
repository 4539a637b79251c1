"""The ways to find lesions that the localisation bench compares: a name, a block of the table, and settings."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from amlp_ray.config import SelectionConfig
from amlp_ray.method.patch_scores import PATCH_SCORES

RANDOM, CENTER = "random patches", "nearness to the centre"
CLUSTERS = (2, 3, 4, 6, 8)
# Against which the rest is read: the rule nearest to the paper, a random cluster of the same sizes, and patch SD, which
# difficulty must beat, since a teacher errs where patches vary.
REFERENCES = ("raw, 3, smallest", "raw, 3, random", "texture")
SIGNED = ("row_contrast", "blob", "combined")  # scores that a lesion's sign changes


class Candidate(NamedTuple):
    """A way to find lesions: settings of the aim, or none for `RANDOM` and `CENTRE`.

    `per_variance` divides the teacher's difficulty by the patch's variance, as standardised targets do.
    """

    block: str
    name: str
    selection: SelectionConfig | None = None
    per_variance: bool = False


def candidates(*, encoder: bool = False, decoder: bool = False) -> list[Candidate]:
    """All rows of the bench; those that ask a trained encoder, or its decoder, only where there is one."""
    found = [Candidate("reference", RANDOM), Candidate("reference", CENTER)]
    features = ("raw", "stats", "context") + (("tokens",) if encoder else ())
    found += [
        _clusters(f, k, "image", **rule) for f in features for k in CLUSTERS for rule in _rules(k)
    ]
    found += [
        _clusters(f, k, "dataset", **rule) for f in features for k in (3, 8) for rule in _rules(k)
    ]
    for score in ("row_contrast", "blob", "border_saliency", "geodesic", "texture", "combined"):
        for sign in ("dark", "free") if score in SIGNED else ("free",):
            found += [_score(score, sign, prior) for prior in (0.0, 0.8)]
    if encoder:
        found.append(_score("attention"))
    if decoder:
        found += [_clusters(f, k, "image", rule="hardest") for f in features for k in CLUSTERS[1:]]
        found += [_score("difficulty"), _score("difficulty", per_variance=True)]
    return found


def _rules(clusters: int) -> Iterator[dict[str, Any]]:
    yield {"rule": "smallest"}
    if clusters == 2:
        return  # the larger of two is above `max_share`, so that every rule names the smaller
    for rule in ("distinct", "most_central", "darkest", "brightest", "random", "oracle"):
        yield {"rule": rule}
    for sign, prior in (
        ("dark", 0.0),
        ("bright", 0.0),
        ("free", 0.0),
        ("dark", 0.8),
        ("free", 0.8),
    ):
        yield {"rule": "combined", "lesion_sign": sign, "center_prior": prior}
    yield {"rule": "geodesic"}


def _clusters(features: str, clusters: int, scope: str, **rule: Any) -> Candidate:
    given = {"mode": "hard", "features": features, "clusters": clusters, "scope": scope, **rule}
    selection = SelectionConfig.model_validate(given)
    named = (
        f"by {_score_name(selection, selection.rule)}"
        if selection.rule in PATCH_SCORES
        else selection.rule
    )
    of = "clusters of the data set" if scope == "dataset" else "clusters of an image"
    block = of
    if selection.rule == "oracle":
        block = f"best {of} (labels)"
    elif features == "tokens" or selection.rule == "hardest":
        block = f"teacher's {of}"
    return _placed(
        block,
        f"{features}, {clusters}, {named}" + (", data set" if scope == "dataset" else ""),
        selection,
    )


def _score(
    score: str, sign: str = "free", prior: float = 0.0, *, per_variance: bool = False
) -> Candidate:
    given = {"mode": "soft", "score": score, "lesion_sign": sign, "center_prior": prior}
    selection = SelectionConfig.model_validate(given)
    block = "teacher's scores" if score in ("attention", "difficulty") else "scores"
    name = _score_name(selection, selection.score) + (" / patch variance" if per_variance else "")
    return _placed(block, name, selection)._replace(per_variance=per_variance)


def _placed(block: str, name: str, selection: SelectionConfig) -> Candidate:
    return Candidate("reference" if name in REFERENCES else block, name, selection)


def _score_name(selection: SelectionConfig, score: str) -> str:
    parts = [score, selection.lesion_sign if score in SIGNED else ""]
    return " ".join(part for part in parts if part) + (
        " x centre" if selection.center_prior else ""
    )
