"""Settings of the method: model, masking ratio, selection of patches, and losses."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from functools import cache
from typing import Any, ClassVar, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, model_validator

from amlp_ray.config.base import Config, Count, PositiveShare, Share
from amlp_ray.config.overrides import merge


class ModelConfig(Config):
    """The masked autoencoder: a timm ViT encoder and a narrow decoder.

    >>> ModelConfig(encoder="vit_small_patch16_224").width
    384
    """

    encoder: str | None = None
    """Name of a timm ViT, such as vit_small_patch16_224, whose sizes are the defaults of the
    settings below."""
    patch_size: int = Field(8, ge=2, le=64)
    """Side of a patch in pixels; lesions of 10-30 pixels are 1-4 patches of 16."""
    width: int = Field(96, ge=16, le=2048)
    """Values per token. 96 trains on two CPU cores in minutes; 384 is ViT-S, 768 ViT-B."""
    depth: int = Field(4, ge=1, le=64)
    """Number of blocks; 12 in ViT-S and ViT-B."""
    heads: int = Field(3, ge=1, le=64)
    """Attention heads, of 32 values each at width 96; ViT-S and ViT-B have 64."""
    class_token: bool = True
    """Add a class token, as MAE does; only attention scores read it here."""
    register_tokens: int = Field(0, ge=0, le=16)
    """Number of register tokens. DINOv2's ViTs have 4, which take over what otherwise spoils patch
    tokens."""
    encode: Literal["visible", "all"] = "visible"
    """all: mask tokens pass the encoder too (SimMIM), at twice the work."""
    decoder_width: int = Field(64, ge=16, le=2048)
    """Values per token of the decoder. 512x8, MAE's, is over half of the work at ratio 0.75."""
    decoder_depth: int = Field(1, ge=0, le=16)
    """Number of decoder blocks. 0: a linear head, for encode=all only."""
    decoder_heads: int = Field(2, ge=1, le=64)
    """Attention heads of the decoder, of 32 values each, as in the encoder."""

    @model_validator(mode="before")
    @classmethod
    def _add_architecture(cls, values: Any) -> Any:
        if isinstance(values, Mapping) and isinstance(values.get("encoder"), str):
            return merge(architecture(values["encoder"]), values)
        return values

    @model_validator(mode="after")
    def _check_sizes(self) -> ModelConfig:
        _check_heads(self.width, self.heads, "")
        _check_heads(self.decoder_width, self.decoder_heads, "decoder_")
        if self.decoder_depth == 0 and self.encode == "visible":
            raise ValueError(
                "decoder_depth 0 needs encode=all: a linear head cannot fill in what no token "
                "stands for"
            )
        return self


def _check_heads(width: int, heads: int, prefix: str) -> None:
    if width % heads:
        raise ValueError(f"{prefix}width {width} must be a multiple of {prefix}heads {heads}")
    if width % 4:
        raise ValueError(
            f"{prefix}width {width} must be a multiple of 4 (2-D sine-cosine positions)"
        )


# Cached because timm takes a tenth of a second, and a search asks for each suggestion.
@cache
def architecture(name: str) -> dict[str, Any]:
    """Return the sizes of a timm ViT as model settings, with a decoder half as wide.

    Raises:
        ValueError: timm has no plain ViT of this name.
    """
    import timm
    import torch
    from timm.layers import PatchEmbed
    from timm.models.vision_transformer import Attention, Block, VisionTransformer

    if name not in timm.list_models("*vit*") + timm.list_models("deit*"):
        plain = timm.list_models(module="vision_transformer") + timm.list_models(module="deit")
        near = difflib.get_close_matches(name, plain, n=3, cutoff=0.5)
        near = near or ["vit_small_patch16_224"]
        raise ValueError(f"encoder {name!r} is no ViT that timm knows; near: {', '.join(near)}")
    with torch.device("meta"):
        vit = timm.create_model(name, pretrained=False)
    # Hybrids embed feature maps of a CNN; other blocks have another attention.
    is_plain = (
        type(vit) is VisionTransformer
        and type(vit.patch_embed) is PatchEmbed
        and type(vit.blocks[0]) is Block
        and type(vit.blocks[0].attn) is Attention
        and vit.pos_embed is not None
    )
    if not is_plain:
        raise ValueError(
            f"encoder {name!r} is a {type(vit).__name__} of its own kind in timm; accepted are "
            f"plain ViTs with added positions, such as vit_small_patch16_224"
        )
    width = vit.embed_dim
    heads = vit.blocks[0].attn.num_heads
    return {
        "patch_size": vit.patch_embed.patch_size[0],
        "width": width,
        "depth": len(vit.blocks),
        "heads": heads,
        "class_token": vit.cls_token is not None,
        "register_tokens": vit.num_reg_tokens,
        "decoder_width": width // 2,
        "decoder_heads": heads if width // 2 % heads == 0 else 1,
    }


class RatioConfig(Config):
    """AMR: the masking ratio over training, from `start` to `end` (see method/masking_ratio.py)."""

    start: float = Field(0.25, gt=0, lt=1)
    """Ratio at the start: low, as AMLP argues, for more context while features are young."""
    end: float = Field(0.75, gt=0, lt=1)
    """MAE's ratio; may lie below start to test AMLP's claim."""
    shape: Literal[
        "linear", "cosine", "power", "step", "exponential", "fixed", "random", "points"
    ] = "linear"
    """Curve from start to end: AMLP says that the ratio rises, not how. fixed (`start` throughout)
    and random (between both) are controls."""
    power: float = Field(1.0, ge=0.1, le=10)
    """power: exponent; 1 is linear."""
    levels: int = Field(4, ge=2, le=50)
    """step: number of plateaus."""
    points: tuple[tuple[float, float], ...] = ()
    """points: pairs (share of training, ratio), such as a search has found."""
    rungs: tuple[int, ...] = ()
    """Epochs up to each of which the whole schedule is run again; pruner.schedule=compress sets
    them for a trial."""
    duration: PositiveShare = 1.0
    """Share of training after which `end` is reached."""
    update_per: Literal["epoch", "step"] = "epoch"
    """step: smoother, and `random` draws once per batch, not once per epoch."""
    ratio_over: Literal["all", "tissue"] = "all"
    """tissue: mask as great a share of tissue as of the black border."""
    round_to: Count = 1
    """Masked patches are a multiple of it: few shapes, so that `compile` compiles few."""

    @model_validator(mode="after")
    def _check_points(self) -> RatioConfig:
        if self.shape == "points" and len(self.points) < 2:
            raise ValueError(
                "shape points needs at least two points, such as [[0, 0.3], [1, 0.75]]"
            )
        shares = [share for share, _ in self.points]
        is_rising = sorted(set(shares)) == shares
        in_range = all(0 <= share <= 1 and 0 < ratio < 1 for share, ratio in self.points)
        if not is_rising or not in_range:
            raise ValueError(
                f"points are (share of training, ratio) with rising shares in 0-1, not "
                f"{self.points}"
            )
        return self


PatchScore = Literal["row_contrast", "blob", "border_saliency", "geodesic", "texture", "combined"]


class SelectionConfig(Config):
    """MPS: which patches are masked first (see method/patch_selection.py)."""

    SECTIONS: ClassVar = {
        "features": "Clusters, for modes hard and parts, and for score=cluster.",
        "score": "Scores, for modes soft and ranked, and for hard_by=score.",
        "background_filter": "For all modes: a black border is no tissue.",
    }
    """Headings of the settings page, by the field that each stands above."""

    mode: Literal["random", "hard", "soft", "ranked", "parts"] = "hard"
    """random: MAE. hard: mask a cluster first. soft: draw patches by score. ranked: take the top
    scores (HPM, AttMask). parts: from a share of every cluster to whole clusters (SemMAE)."""
    analysis_interval: NonNegativeInt = 15
    """Epochs between analyses, each of which costs about a step. 0: at each crop, in every step."""

    features: Literal["raw", "stats", "context", "tokens"] = "context"
    """What is clustered. tokens: the teacher's, and raw until warm-up ends."""
    clusters: int = Field(6, ge=2, le=16)
    """Number of clusters. 2 or 3 split tissue from shadow; docs/localization.md compares context,
    6, geodesic with others."""
    scope: Literal["image", "dataset"] = "image"
    """dataset: centroids are shared and updated over all images."""
    n_init: int = Field(8, ge=1, le=32)
    """Starts of k-means, of which the best is used; 8: within 1 % of scikit-learn's inertia."""
    rule: Literal[
        "smallest",
        "distinct",
        "most_central",
        "darkest",
        "brightest",
        PatchScore,
        "hardest",
        "random",
        "oracle",
    ] = "geodesic"
    """Which cluster is the lesion. A patch score selects the cluster of the highest mean. hardest:
    the teacher's error. oracle: true masks, for diagnosis only. geodesic is never far below the
    best on two public sets, without sign or center."""
    min_patches: Count = 2
    """Least patches of a lesion; a smaller cluster is an outlier."""
    max_share: PositiveShare = 0.5
    """Largest share of a lesion; a larger cluster is tissue."""
    hard_by: Literal["cluster", "score"] = "cluster"
    """score: hard without clusters, all patches 1 SD above the mean score."""
    lesion_share: PositiveShare = 1.0
    """Masked share of the lesion (ranked: of the top 10 %); the rest are hints."""
    dilate: int = Field(0, ge=0, le=4)
    """Patches added around the lesion, whose rim decides DSC."""
    feedback: Share = 0.0
    """hard, with CCL: share of the teacher's category in what counts as lesion."""

    score: Literal[PatchScore, "cluster", "difficulty", "attention", "oracle"] = "geodesic"
    """Score of a patch. cluster: soft membership."""
    lesion_sign: Literal["dark", "bright", "free"] = "dark"
    """Brightness of lesions: dark in ultrasound and skin, bright in PET and FLAIR."""
    center_prior: NonNegativeFloat = 0.0
    """SD in half sides of a preference for the center; 0 is off. It halves what is found of small
    lesions."""
    strength: float = Field(1.0, ge=0, le=50)
    """soft: 0 is random masking; above 1.5 nearly every lesion is masked."""
    temperature: float = Field(1.0, ge=1e-3)
    """score=cluster: temperature of the softmax over clusters, in units of their spread."""
    score_share_start: Share = 0.0
    """ranked: share of the masked patches that the score selects at the start, not chance."""
    score_share_end: Share = 0.5
    """ranked: the same share at the end. 0.5 is HPM's; above it the feedback of difficulty on masks
    runs away."""

    background_filter: bool = True
    """off: the border is clustered and counted like tissue."""
    background_mean: Share = 0.02
    """Share of the image's range; a patch whose mean and SD lie below both limits is border."""
    background_std: Share = 0.01
    """Limit of the SD, as a share of the range too."""

    @model_validator(mode="after")
    def _check_score(self) -> SelectionConfig:
        if self.mode == "hard" and self.hard_by == "score" and self.score == "cluster":
            raise ValueError(
                "hard_by score needs a score that is no cluster; choose another score, or hard_by "
                "cluster"
            )
        return self

    @property
    def uses_clusters(self) -> bool:
        if self.mode == "hard":
            return self.hard_by == "cluster"
        return self.mode == "parts" or (self.mode in ("soft", "ranked") and self.score == "cluster")

    @property
    def uses_score(self) -> bool:
        return self.mode in ("soft", "ranked") or (self.mode == "hard" and self.hard_by == "score")

    @property
    def names_lesion(self) -> bool:
        """Whether some patches count as the probable lesion; not so for random masks and parts."""
        return self.mode in ("hard", "soft", "ranked")

    @property
    def uses_ground_truth(self) -> bool:
        """Whether true masks select the patches, which is for diagnosis only."""
        by_cluster = self.uses_clusters and self.rule == "oracle"
        by_score = self.uses_score and self.score == "oracle"
        return by_cluster or by_score


class LossConfig(Config):
    """Reconstruction loss, its weighting toward hard patches (ARL, RRL, ranking), and CCL (see
    method/losses.py)."""

    distance: Literal["l2", "l1"] = "l2"
    """Distance of pixels; l1 is SimMIM's."""
    norm_pix: bool = False
    """Standardize each target patch. Off because the error of raw targets follows lesions better
    (AUC 0.76 v 0.53, 0.81 v 0.61)."""
    difficulty: Literal["loss", "raw"] = "loss"
    """Target that difficulty is measured by: the loss's own, or one that is never standardized."""
    weighting: Literal["none", "arl", "rrl"] = "rrl"
    """Weighting of hard patches: arl in AMLP's first version, rrl in its second."""
    mix: Share = 1.0
    """Share of the weighted loss; 0 is the plain one."""
    temperature: float = Field(1.0, ge=1e-3)
    """arl: temperature of the softmax in units of the image's mean error."""
    gamma: float = Field(1.0, ge=0, le=8)
    """rrl: exponent of the relative error; 0 is the plain loss."""
    clip_min: float = Field(0.2, gt=0, le=1)
    """rrl: lower bound of the weights. Bounds keep speckle and calipers from ruling the loss."""
    clip_max: float = Field(5.0, ge=1)
    """rrl: upper bound of the weights."""
    ranking_weight: float = Field(0.0, ge=0, le=10)
    """HPM: weight of the loss of a second decoder, which learns to rank difficulty; 1 in HPM."""
    ccl_weight: float = Field(0.1, ge=0, le=10)
    """Weight of CCL; 0 is off."""
    ccl_threshold: Literal["mean", "quantile", "otsu"] = "quantile"
    """Threshold between easy and hard patches. quantile: as many hard as the lesion has patches."""
    ccl_difficulty_share: Share = 0.5
    """eta: weight of the difficulty label against the cluster label."""
    warmup: float = Field(0.1, ge=0, le=0.9)
    """Share of training with the plain loss, because early errors mean nothing."""
