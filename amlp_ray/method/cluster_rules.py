"""The rules that name one cluster the lesion.

No rule is right by construction: which cluster holds the lesion is not identifiable without a prior.
The rule is therefore a searched, logged setting.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from amlp_ray.config import SelectionConfig
from amlp_ray.method.kmeans import Clusters
from amlp_ray.method.patch_features import center_distance


def name_lesion_cluster(
    config: SelectionConfig,
    clusters: Clusters,
    x: Tensor,
    inside: Tensor,
    grid: tuple[int, int],
    *,
    brightness: Tensor,
    noise: Tensor,
    score: Tensor | None = None,
    truth: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Choose the cluster that is taken for the lesion.

    Only clusters of at least `min_patches` and at most `max_share` of the tissue qualify: smaller ones are outliers,
    larger ones tissue.

    - `smallest`: fewest patches. `distinct`: centre farthest from the mean of all tissue.
    - `most_central`: patches nearest to the image centre. `darkest`, `brightest`: by mean brightness.
    - a patch score by name (see `scores.py`), or `hardest`, the error of the teacher: highest mean. While there is none
      no cluster qualifies.
    - `oracle`: best F1 against the true lesion patches, for diagnosis. `random`: the control.

    Args:
        x: (B, N, D) the clustered features.
        brightness: (B, N) mean value per patch.
        noise: (B, K) uniform numbers for `random`.
        score: (B, N), the patch score that the rule names, or the teacher's error; None where the rule names neither.
        truth: (B, N) lesion share, needed by `oracle`.

    Returns:
        Index of the cluster (B,) and whether any qualified (B,) bool.
    """
    member = (
        F.one_hot(clusters.labels.clamp_min(0), clusters.sizes.shape[1]) * inside[..., None]
    )  # (B, N, K)
    sizes = clusters.sizes.to(x.dtype)
    rule = config.rule

    def mean_of(values: Tensor) -> Tensor:
        return (member * values[..., None]).sum(1) / sizes.clamp_min(1)

    if rule == "smallest":
        merit = -clusters.counts.to(x.dtype)
    elif rule == "distinct":
        tissue_mean = (x * inside[..., None]).sum(1, keepdim=True) / inside.sum(1)[
            :, None, None
        ].clamp_min(1)
        merit = (clusters.centers - tissue_mean).square().sum(-1)
    elif rule == "most_central":
        merit = -mean_of(center_distance(grid, x.device).expand(x.shape[0], -1))
    elif rule in ("darkest", "brightest"):
        merit = mean_of(brightness) * (1 if rule == "brightest" else -1)
    elif rule == "oracle":
        assert truth is not None
        lesion = truth_patches(truth)
        merit = (
            2
            * (member * lesion[..., None]).sum(1)
            / (sizes + lesion.sum(1, keepdim=True)).clamp_min(1)
        )
    elif rule == "random":
        merit = noise
    else:
        merit = torch.full_like(sizes, -torch.inf) if score is None else mean_of(score)
    qualifies = (sizes >= config.min_patches) & (
        sizes <= config.max_share * inside.sum(1, keepdim=True)
    )
    if rule == "oracle":
        qualifies &= merit > 0
    merit = merit.masked_fill(~qualifies, -torch.inf)
    return merit.argmax(1), merit.isfinite().any(1)


def truth_patches(share: Tensor) -> Tensor:
    """Which patches count as lesion, (B, N) bool, from their lesion share: a quarter, or touched where none has it."""
    quarter = share >= 0.25
    return torch.where(quarter.any(1, keepdim=True), quarter, share > 0)
