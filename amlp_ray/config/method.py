"""Settings of the method: the model, the masking ratio, the selection of patches, and the losses."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from functools import cache
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from amlp_ray.config.base import Config
from amlp_ray.config.overrides import merged

Share = Annotated[float, Field(ge=0, le=1)]


class ModelConfig(Config):
    """The masked autoencoder: a timm ViT encoder and a narrow decoder.

    >>> ModelConfig(encoder="vit_small_patch16_224").width
    384
    """

    encoder: str | None = (
        None  # a timm ViT, such as vit_small_patch16_224: its sizes hold where none is given below
    )
    patch_size: int = Field(8, ge=2, le=64)  # pixels; lesions of 10-30 pixels are 1-4 patches of 16
    width: int = Field(
        96, ge=16, le=2048
    )  # trains on two CPU cores in minutes; 384 is ViT-S, 768 ViT-B
    depth: int = Field(4, ge=1, le=64)  # blocks; 12 in ViT-S and ViT-B
    heads: int = Field(3, ge=1, le=64)  # 32 values each at width 96; ViT-S and ViT-B have 64
    class_token: bool = True  # MAE has one; nothing here reads it but attention scores
    register_tokens: int = Field(
        0, ge=0, le=16
    )  # 4 in DINOv2's ViTs: they take over what else spoils patch tokens
    encode: Literal["visible", "all"] = (
        "visible"  # all: mask tokens pass the encoder too (SimMIM), at twice the work
    )
    decoder_width: int = Field(
        64, ge=16, le=2048
    )  # 512x8, MAE's, is over half of the work at ratio 0.75
    decoder_depth: int = Field(1, ge=0, le=16)  # 0: a linear head, for encode=all only
    decoder_heads: int = Field(2, ge=1, le=64)  # 32 values each, as in the encoder

    @model_validator(mode="before")
    @classmethod
    def _lay_architecture_under(cls, given: Any) -> Any:
        if isinstance(given, Mapping) and isinstance(given.get("encoder"), str):
            return merged(architecture(given["encoder"]), given)
        return given

    @model_validator(mode="after")
    def _check_parts(self) -> ModelConfig:
        for width, heads, name in (
            (self.width, self.heads, ""),
            (self.decoder_width, self.decoder_heads, "decoder_"),
        ):
            if width % heads:
                raise ValueError(f"{name}width {width} must be a multiple of {name}heads {heads}")
            if width % 4:
                raise ValueError(
                    f"{name}width {width} must be a multiple of 4 (2-D sine-cosine positions)"
                )
        if self.decoder_depth == 0 and self.encode == "visible":
            raise ValueError(
                "decoder_depth 0 needs encode=all: a linear head cannot fill in what no token stands for"
            )
        return self


@cache  # timm takes a tenth of a second, and a search asks at each suggestion
def architecture(name: str) -> dict[str, Any]:
    """Sizes of a timm ViT by name, as model settings, and a decoder half as wide.

    Raises ValueError where timm has no such ViT.
    """
    import timm
    import torch
    from timm.layers import PatchEmbed
    from timm.models.vision_transformer import Attention, Block, VisionTransformer

    known = timm.list_models("*vit*") + timm.list_models("deit*")
    if name not in known:
        plain_ones = timm.list_models(module="vision_transformer") + timm.list_models(module="deit")
        near = difflib.get_close_matches(name, plain_ones, n=3, cutoff=0.5) or [
            "vit_small_patch16_224"
        ]
        raise ValueError(f"encoder {name!r} is no ViT that timm knows; near: {', '.join(near)}")
    with torch.device("meta"):
        vit = timm.create_model(name, pretrained=False)
    # Hybrids embed feature maps of a CNN; other blocks and attentions hold no such attention as is read here.
    plain = (
        type(vit) is VisionTransformer
        and type(vit.patch_embed) is PatchEmbed
        and type(vit.blocks[0]) is Block
    )
    if not plain or vit.pos_embed is None or type(vit.blocks[0].attn) is not Attention:
        raise ValueError(
            f"encoder {name!r} is a {type(vit).__name__} of its own kind in timm; accepted are plain ViTs with added "
            f"positions, such as vit_small_patch16_224"
        )
    width, heads = vit.embed_dim, vit.blocks[0].attn.num_heads
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
    """AMR: the masking ratio over training, from `start` to `end` (see method/ratio.py)."""

    start: float = Field(
        0.25, gt=0, lt=1
    )  # low, as AMLP argues: more context while features are young
    end: float = Field(0.75, gt=0, lt=1)  # MAE's ratio; may lie below start to test AMLP's claim
    # AMLP says that the ratio rises, not along what; fixed (`start` throughout) and random (between both) are controls
    shape: Literal[
        "linear", "cosine", "power", "step", "exponential", "fixed", "random", "points"
    ] = "linear"
    power: float = Field(1.0, ge=0.1, le=10)  # exponent of `power`; 1 is linear
    levels: int = Field(4, ge=2, le=50)  # number of plateaus of `step`
    points: tuple[
        tuple[float, float], ...
    ] = ()  # of `points`: (share of training, ratio), what a search found
    # epochs up to each of which the whole schedule is run again: what pruner.schedule=compress makes of a trial
    rungs: tuple[int, ...] = ()
    duration: float = Field(1.0, gt=0, le=1)  # share of training after which `end` is reached
    update_per: Literal["epoch", "step"] = (
        "epoch"  # step: smoother, and `random` draws once a batch, not once an epoch
    )
    ratio_over: Literal["all", "tissue"] = (
        "all"  # tissue: as great a share of tissue as of the black border
    )
    round_to: int = Field(
        1, ge=1
    )  # masked patches are a multiple of it: few shapes, so that `compile` compiles few

    @model_validator(mode="after")
    def _check_points(self) -> RatioConfig:
        if self.shape == "points" and len(self.points) < 2:
            raise ValueError(
                "shape points needs at least two points, such as [[0, 0.3], [1, 0.75]]"
            )
        at = [t for t, _ in self.points]
        if sorted(set(at)) != at or any(not 0 <= t <= 1 or not 0 < r < 1 for t, r in self.points):
            raise ValueError(
                f"points are (share of training, ratio) with rising shares in 0-1, not {self.points}"
            )
        return self


PatchScore = Literal["row_contrast", "blob", "border_saliency", "geodesic", "texture", "combined"]


class SelectionConfig(Config):
    """MPS: which patches are masked first (see method/selection.py)."""

    # random is MAE; hard masks a cluster first; soft draws by score; ranked takes the top scores (HPM, AttMask);
    # parts goes from a share of every cluster to whole clusters (SemMAE)
    mode: Literal["random", "hard", "soft", "ranked", "parts"] = "hard"
    analysis_interval: int = Field(
        15, ge=0
    )  # epochs between looks, which cost about a step each; 0: at each crop, in every step
    # Clusters, for modes hard and parts, and for score=cluster.
    features: Literal["raw", "stats", "context", "tokens"] = (
        "context"  # tokens: the teacher's; raw until warm-up ends
    )
    clusters: int = Field(
        6, ge=2, le=16
    )  # 2 or 3 split tissue from shadow; context, 6, geodesic: docs/localisation.md
    scope: Literal["image", "dataset"] = "image"  # dataset: centroids carried along over all images
    n_init: int = Field(
        8, ge=1, le=32
    )  # of k-means, the best is kept; 8: within 1 % of scikit-learn's inertia
    # Which cluster is the lesion: a patch score names that of the highest mean. hardest: the teacher's error; oracle:
    # true masks, diagnosis only. Geodesic is never far below the best on two public sets, without sign or centre.
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
    min_patches: int = Field(2, ge=1)  # a smaller cluster is an outlier, not a lesion
    max_share: float = Field(0.5, gt=0, le=1)  # a larger one is tissue
    hard_by: Literal["cluster", "score"] = (
        "cluster"  # score: hard without clusters, all patches 1 SD above the mean score
    )
    lesion_share: float = Field(
        1.0, gt=0, le=1
    )  # masked share of the lesion (ranked: the top 10 %), the rest are hints
    dilate: int = Field(0, ge=0, le=4)  # patches added round the lesion: its rim decides DSC
    feedback: Share = (
        0.0  # hard, with CCL: share of the teacher's category in what counts as lesion
    )
    # Scores, for modes soft and ranked, and for by=score.
    score: Literal[PatchScore, "cluster", "difficulty", "attention", "oracle"] = (
        "geodesic"  # cluster: soft membership
    )
    lesion_sign: Literal["dark", "bright", "free"] = (
        "dark"  # true of ultrasound and skin; bright for PET and FLAIR
    )
    center_prior: float = Field(
        0.0, ge=0
    )  # SD in half sides, 0 is off; halves what is found of small lesions
    strength: float = Field(
        1.0, ge=0, le=50
    )  # soft: 0 is random masking; above 1.5 nearly every lesion is masked
    temperature: float = Field(
        1.0, ge=1e-3
    )  # score=cluster: of the softmax over clusters, in units of their spread
    aim_start: Share = (
        0.0  # ranked: share of the masked patches that the score chooses, the rest is random
    )
    aim_end: Share = 0.5  # HPM's; above it the feedback of difficulty on masks runs away
    # For all modes: a black border is no tissue.
    background_filter: bool = True  # off: the border is clustered and counted like tissue
    background_mean: float = Field(
        0.02, ge=0, le=1
    )  # share of the image's range; a patch below both is border
    background_std: float = Field(0.01, ge=0, le=1)  # share of the range too

    @model_validator(mode="after")
    def _check_score(self) -> SelectionConfig:
        if self.mode == "hard" and self.hard_by == "score" and self.score == "cluster":
            raise ValueError(
                "by score needs a score that is no cluster; choose another score, or by cluster"
            )
        return self

    @property
    def uses_clusters(self) -> bool:
        hard = self.mode == "hard" and self.hard_by == "cluster"
        return (
            hard
            or self.mode == "parts"
            or (self.mode in ("soft", "ranked") and self.score == "cluster")
        )

    @property
    def uses_score(self) -> bool:
        return self.mode in ("soft", "ranked") or (self.mode == "hard" and self.hard_by == "score")

    @property
    def names_lesion(self) -> bool:
        """Whether some patches count as the probable lesion; random masks and whole parts are aimed at none."""
        return self.mode in ("hard", "soft", "ranked")

    @property
    def uses_truth(self) -> bool:
        """Whether true masks aim the mask: diagnosis only."""
        return (self.uses_clusters and self.rule == "oracle") or (
            self.uses_score and self.score == "oracle"
        )


class LossConfig(Config):
    """Reconstruction loss, its weighting towards hard patches (ARL, RRL, ranking), and CCL (see method/losses.py)."""

    distance: Literal["l2", "l1"] = "l2"  # l1 is SimMIM's
    # standardise each target patch; off, since raw-target error follows lesions better (AUC 0.76 v 0.53, 0.81 v 0.61)
    norm_pix: bool = False
    difficulty: Literal["loss", "raw"] = (
        "loss"  # target of what counts as hard: the loss's own, or never standardised
    )
    weighting: Literal["none", "arl", "rrl"] = (
        "rrl"  # of hard patches; arl in AMLP's first version, rrl in its second
    )
    mix: Share = 1.0  # share of the weighted loss; 0 is the plain one
    temperature: float = Field(
        1.0, ge=1e-3
    )  # arl: softmax temperature in units of the image's mean error
    gamma: float = Field(
        1.0, ge=0, le=8
    )  # rrl: exponent of the relative error; 0 is the plain loss
    clip_min: float = Field(
        0.2, gt=0, le=1
    )  # rrl: bounds on weights keep speckle and callipers from ruling the loss
    clip_max: float = Field(5.0, ge=1)  # rrl: the same, from above
    ranking_weight: float = Field(
        0.0, ge=0, le=10
    )  # HPM: a second decoder learns to rank difficulty; 1 there
    ccl_weight: float = Field(0.1, ge=0, le=10)  # 0 is off
    ccl_threshold: Literal["mean", "quantile", "otsu"] = (
        "quantile"  # quantile: as many hard as the lesion has patches
    )
    ccl_difficulty_share: Share = 0.5  # eta: difficulty label against cluster label
    warmup: float = Field(
        0.1, ge=0, le=0.9
    )  # share of training with the plain loss: early errors mean nothing
