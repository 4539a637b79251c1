"""Every setting of amlp_ray: its name, unit, range, default, and why that default.

A setting has one name everywhere. `ratio.start` below is `ratio.start` in a YAML file, in `--set ratio.start=0.3`,
in a study's search space, as an Optuna parameter, and in the report. Unknown names are errors.
Values come from small trials on breast ultrasound and dermoscopy unless a comment says otherwise.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, field_validator, model_validator

from amlp_ray.errors import SettingsError
from amlp_ray.settings import Settings, build, merged, nested

Share = Annotated[float, Field(ge=0, le=1)]


class ImageSpec(Settings):
    """What a model must know of a patch dataset: the shape of its images and how to normalise them.

    `mean` and `std` are per channel, in stored units (0-255 for uint8), over the training split.
    """

    channels: int = Field(ge=1)
    height: int = Field(ge=8)
    width: int = Field(ge=8)
    mean: tuple[float, ...]
    std: tuple[float, ...]


class PrepareSettings(Settings):
    """How a folder of images becomes a patch dataset."""

    layout: Literal["busi", "paired"]
    size: int = Field(96, ge=16, le=2048)  # pixels a side; 96 with patch 8 is 144 tokens, the least a patch head needs
    channels: Literal["auto", 1, 3] = "auto"  # auto: 1 if every image is grey, as exported ultrasound is
    group_by: Literal["near-duplicates", "image"] = "near-duplicates"  # public sets hold many near-copies
    group_file: str | None = None  # CSV with columns id, group; takes the place of group_by
    split_file: str | None = None  # JSON {"train": [ids], "val": ..., "test": ...}; takes the place of fractions
    fractions: tuple[float, float, float] = (0.7, 0.1, 0.2)  # train, val, test
    seed: int = Field(0, ge=0)

    @model_validator(mode="after")
    def _check_fractions(self) -> PrepareSettings:
        if min(self.fractions) < 0 or self.fractions[0] == 0 or abs(sum(self.fractions) - 1) > 1e-6:
            raise ValueError(f"fractions must be train > 0, val, test >= 0 with sum 1, not {self.fractions}")
        return self


class ModelSettings(Settings):
    """The masked autoencoder: a timm ViT encoder and a narrow decoder.

    >>> ModelSettings(encoder="vit_small_patch16_224").width
    384
    """

    encoder: str | None = None  # a timm ViT, such as vit_small_patch16_224: its sizes hold where none is given below
    patch_size: int = Field(8, ge=2, le=64)  # pixels; lesions of 10-30 pixels are 1-4 patches of 16
    width: int = Field(96, ge=16, le=2048)  # trains on two CPU cores in minutes; 384 is ViT-S, 768 ViT-B
    depth: int = Field(4, ge=1, le=64)
    heads: int = Field(3, ge=1, le=64)
    class_token: bool = True  # MAE has one; nothing here reads it but attention scores
    register_tokens: int = Field(0, ge=0, le=16)  # 4 in DINOv2's ViTs: they take over what else spoils patch tokens
    encode: Literal["visible", "all"] = "visible"  # all: mask tokens pass the encoder too (SimMIM), at twice the work
    decoder_width: int = Field(64, ge=16, le=2048)  # 512x8, MAE's, is over half of the work at ratio 0.75
    decoder_depth: int = Field(1, ge=0, le=16)  # 0: a linear head, for encode=all only
    decoder_heads: int = Field(2, ge=1, le=64)

    @model_validator(mode="before")
    @classmethod
    def _lay_architecture_under(cls, given: Any) -> Any:
        if isinstance(given, Mapping) and isinstance(given.get("encoder"), str):
            return merged(architecture(given["encoder"]), given)
        return given

    @model_validator(mode="after")
    def _check_parts(self) -> ModelSettings:
        for width, heads, name in (
            (self.width, self.heads, ""),
            (self.decoder_width, self.decoder_heads, "decoder_"),
        ):
            if width % heads:
                raise ValueError(f"{name}width {width} must be a multiple of {name}heads {heads}")
            if width % 4:
                raise ValueError(f"{name}width {width} must be a multiple of 4 (2-D sine-cosine positions)")
        if self.decoder_depth == 0 and self.encode == "visible":
            raise ValueError("decoder_depth 0 needs encode=all: a linear head cannot fill in what no token stands for")
        return self


def architecture(name: str) -> dict[str, Any]:
    """Sizes of a timm ViT by name, as model settings, and a decoder half as wide.

    Raises ValueError where timm has no such ViT.
    """
    import timm
    import torch
    from timm.models.vision_transformer import VisionTransformer

    known = timm.list_models("*vit*") + timm.list_models("deit*")
    if name not in known:
        near = difflib.get_close_matches(name, known, n=3) or ["vit_small_patch16_224"]
        raise ValueError(f"encoder {name!r} is no ViT that timm knows; near: {', '.join(near)}")
    with torch.device("meta"):
        vit = timm.create_model(name, pretrained=False)
    if type(vit) is not VisionTransformer or vit.pos_embed is None:
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


class RatioSettings(Settings):
    """AMR: the masking ratio over training, from `start` to `end` (see method/ratio.py)."""

    start: float = Field(0.25, gt=0, lt=1)  # low, as AMLP argues: more context while features are young
    end: float = Field(0.75, gt=0, lt=1)  # MAE's ratio; may lie below start to test AMLP's claim
    shape: Literal["linear", "cosine", "power", "step", "exponential", "fixed", "random", "points"] = "linear"
    power: float = Field(1.0, ge=0.1, le=10)  # exponent of `power`; 1 is linear
    levels: int = Field(4, ge=2, le=50)  # number of plateaus of `step`
    points: tuple[tuple[float, float], ...] = ()  # of `points`: (share of training, ratio), what a search found
    duration: float = Field(1.0, gt=0, le=1)  # share of training after which `end` is reached
    per: Literal["epoch", "step"] = "epoch"  # step: smoother, and `random` draws once a batch, not once an epoch
    over: Literal["all", "tissue"] = "all"  # tissue: as great a share of tissue as of the black border
    quantum: int = Field(1, ge=1)  # masked patches are a multiple of it: few shapes, so that `compile` compiles few

    @model_validator(mode="after")
    def _check_points(self) -> RatioSettings:
        if self.shape == "points" and len(self.points) < 2:
            raise ValueError("shape points needs at least two points, such as [[0, 0.3], [1, 0.75]]")
        at = [t for t, _ in self.points]
        if sorted(set(at)) != at or any(not 0 <= t <= 1 or not 0 < r < 1 for t, r in self.points):
            raise ValueError(f"points are (share of training, ratio) with rising shares in 0-1, not {self.points}")
        return self


class SelectionSettings(Settings):
    """MPS: which patches are masked first (see method/selection.py)."""

    # random is MAE; hard masks a cluster first; soft draws by score; ranked takes the top scores (HPM, AttMask);
    # parts goes from a share of every cluster to whole clusters (SemMAE)
    mode: Literal["random", "hard", "soft", "ranked", "parts"] = "hard"
    refresh: int = Field(10, ge=0)  # epochs between looks at whole images; 0: look at each crop, in every step
    # clusters: hard, parts, and score=cluster
    features: Literal["raw", "stats", "context", "tokens"] = "raw"  # tokens: the teacher's; raw until warm-up ends
    clusters: int = Field(3, ge=2, le=16)  # 2 splits tissue from shadow, not lesion from tissue
    scope: Literal["image", "dataset"] = "image"  # dataset: centroids carried along over all images
    starts: int = Field(4, ge=1, le=32)  # of k-means, the best is kept; one may miss scikit-learn's inertia by 10 %
    rule: Literal[
        "smallest", "hardest", "distinct", "most_central", "darkest", "brightest", "score", "random", "oracle"
    ] = "smallest"  # score: highest mean `score`; hardest: the teacher's error; oracle: true masks, diagnosis only
    min_patches: int = Field(2, ge=1)  # a smaller cluster is an outlier, not a lesion
    max_share: float = Field(0.5, gt=0, le=1)  # a larger one is tissue
    lesion_share: float = Field(1.0, gt=0, le=1)  # share of the lesion that is masked; below 1 leaves hints
    dilate: int = Field(0, ge=0, le=4)  # patches added round the lesion: its rim decides DSC
    feedback: Share = 0.0  # share of CCL's category, judged by the teacher, in what counts as lesion
    # scores: soft, ranked, and rule=score
    score: Literal[
        "row_contrast",
        "blob",
        "border_saliency",
        "geodesic",
        "texture",
        "combined",
        "cluster",
        "difficulty",
        "attention",
        "oracle",
    ] = "combined"
    lesion_sign: Literal["dark", "bright", "free"] = "dark"  # true of ultrasound and skin; bright for PET and FLAIR
    centre_prior: float = Field(0.0, ge=0)  # SD in half sides, 0 is off; 0.8 suits centred photographs and ultrasound
    strength: float = Field(1.0, ge=0, le=50)  # soft: 0 is random masking; above 1.5 nearly every lesion is masked
    temperature: float = Field(1.0, gt=0)  # score=cluster: of the softmax over clusters, in units of their spread
    aim_start: Share = 0.0  # ranked: share of the masked patches that the score chooses, the rest is random
    aim_end: Share = 0.5  # HPM's; above it the feedback of difficulty on masks runs away
    # all: black border is no tissue
    background_filter: bool = True
    background_mean: float = Field(0.02, ge=0, le=1)  # share of the image's range; a patch below both is border
    background_std: float = Field(0.01, ge=0, le=1)

    @model_validator(mode="after")
    def _check_score(self) -> SelectionSettings:
        if self.rule == "score" and self.score == "cluster":
            raise ValueError("rule score names a cluster by a score, so score may not be cluster; choose another score")
        return self

    @property
    def uses_clusters(self) -> bool:
        return self.mode in ("hard", "parts") or (self.mode in ("soft", "ranked") and self.score == "cluster")

    @property
    def uses_score(self) -> bool:
        return self.mode in ("soft", "ranked") or (self.uses_clusters and self.rule == "score")

    @property
    def uses_truth(self) -> bool:
        """Whether true masks aim the mask: diagnosis only."""
        return (self.uses_clusters and self.rule == "oracle") or (self.uses_score and self.score == "oracle")


class LossSettings(Settings):
    """Reconstruction loss, its weighting towards hard patches (ARL, RRL, ranking), and CCL (see method/losses.py)."""

    distance: Literal["l2", "l1"] = "l2"  # l1 is SimMIM's
    norm_pix: bool = (
        False  # standardise each target patch; off, since raw-target error follows lesions (AUC 0.81 v 0.57)
    )
    difficulty: Literal["loss", "raw"] = "loss"  # target of what counts as hard: the loss's own, or never standardised
    weighting: Literal["none", "arl", "rrl"] = "rrl"
    mix: Share = 1.0  # share of the weighted loss; 0 is the plain one
    temperature: float = Field(1.0, gt=0)  # arl: softmax temperature in units of the image's mean error
    gamma: float = Field(1.0, ge=0, le=8)  # rrl: exponent of the relative error; 0 is the plain loss
    clip_min: float = Field(0.2, gt=0, le=1)  # rrl: keeps speckle and callipers from ruling the loss
    clip_max: float = Field(5.0, ge=1)
    ranking_weight: float = Field(0.0, ge=0, le=10)  # HPM: a second decoder learns to rank difficulty; 1 there
    ccl_weight: float = Field(0.1, ge=0, le=10)  # 0 is off
    ccl_threshold: Literal["mean", "quantile", "otsu"] = "quantile"  # quantile: as many hard as the lesion has patches
    ccl_difficulty_share: Share = 0.5  # eta: difficulty label against cluster label
    warmup: float = Field(0.1, ge=0, le=0.9)  # share of training with the plain loss: early errors mean nothing


_PLAIN_LOSS = {"weighting": "none", "ccl_weight": 0.0}
_RATIO_OF_MAE = {"start": 0.75, "end": 0.75}

VARIANTS: dict[str, dict[str, Any]] = {
    # Named arms: each is a setting of the same code. Values given by the user win over them.
    "amlp": {"selection": {"feedback": 0.5}},
    "amlp-soft": {"selection": {"mode": "soft"}, "ratio": {"start": 0.3, "end": 0.5}},
    "mps-ams": {"loss": _PLAIN_LOSS},
    "mae": {"selection": {"mode": "random"}, "ratio": _RATIO_OF_MAE, "loss": _PLAIN_LOSS},
    # SimMIM (Xie et al. 2022): every token is encoded, a linear head, l1, ratio 0.6.
    "simmim": {
        "selection": {"mode": "random"},
        "ratio": {"start": 0.6, "end": 0.6},
        "loss": {**_PLAIN_LOSS, "distance": "l1"},
        "model": {"encode": "all", "decoder_depth": 0},
    },
    # HPM (Wang et al. 2023): the teacher's predicted difficulty picks up to half of the mask, seen on every crop.
    "hpm": {
        "selection": {"mode": "ranked", "score": "difficulty", "aim_start": 0.0, "aim_end": 0.5, "refresh": 0},
        "ratio": _RATIO_OF_MAE,
        "loss": {**_PLAIN_LOSS, "ranking_weight": 1.0},
    },
    # After AttMask (Kakogeorgiou et al. 2022): the most attended patches, some shown as hints, ratio U(0.1, 0.5).
    "attmask": {
        "selection": {"mode": "ranked", "score": "attention", "aim_start": 1.0, "aim_end": 1.0, "lesion_share": 0.7},
        "ratio": {"start": 0.1, "end": 0.5, "shape": "random", "per": "step"},
        "loss": _PLAIN_LOSS,
    },
    # After SemMAE (Li et al. 2022): from a share of every part to whole parts; parts are our clusters.
    "semmae": {
        "selection": {"mode": "parts", "features": "context", "clusters": 6},
        "ratio": _RATIO_OF_MAE,
        "loss": _PLAIN_LOSS,
    },
    "simsiam": {"objective": "simsiam", "selection": {"mode": "random"}, "loss": _PLAIN_LOSS},
    "scratch": {"objective": "none", "selection": {"mode": "random"}, "loss": _PLAIN_LOSS},
}

Variant = Literal[
    "amlp", "amlp-soft", "mps-ams", "mae", "simmim", "hpm", "attmask", "semmae", "simsiam", "scratch"
]  # fmt: skip


class PretrainSettings(Settings):
    """One pretraining run. `variant` sets a named arm; every other value given wins over it.

    >>> PretrainSettings(variant="mae").ratio.start
    0.75
    """

    variant: Variant = "amlp"
    # simsiam: two crops of an image agree (Chen and He 2021); none: the random encoder, for comparison
    objective: Literal["reconstruction", "simsiam", "none"] = "reconstruction"
    epochs: int = Field(100, ge=1)
    batch_size: int = Field(16, ge=1)  # images per optimiser step over all workers; small sets need many steps
    lr: float = Field(1e-3, gt=0, le=1)  # at batch 16; not scaled, so that one number means one thing
    weight_decay: float = Field(0.05, ge=0, le=1)
    warmup: float = Field(0.1, ge=0, lt=1)  # share of steps over which lr rises; then cosine to zero
    clip_grad: float = Field(1.0, gt=0)  # largest gradient norm
    ema: float = Field(0.999, ge=0, lt=1)  # teacher's decay per step, applied before each look; 0: the model itself
    crop_min: float = Field(0.6, gt=0, le=1)  # least area share of a random crop; lesions must stay in the picture
    flip: bool = True  # left-right only: depth has a direction in ultrasound
    precision: Literal["auto", "fp32", "bf16"] = "auto"  # auto: bf16 on GPUs that have it, fp32 on CPU
    compile: bool = False  # torch.compile: pays on GPUs; takes a minute, and as much again per masked count
    seed: int = Field(0, ge=0, lt=2**63)
    data: Literal["auto", "memory", "stream"] = "auto"  # auto: in memory up to 2 GiB, else a Ray Data stream
    model: ModelSettings = ModelSettings()
    ratio: RatioSettings = RatioSettings()
    selection: SelectionSettings = SelectionSettings()
    loss: LossSettings = LossSettings()

    @model_validator(mode="before")
    @classmethod
    def _lay_variant_under(cls, given: Any) -> Any:
        if not isinstance(given, Mapping):
            return given
        variant = given.get("variant", "amlp")
        return merged(VARIANTS.get(variant, {}) if isinstance(variant, str) else {}, given)

    @model_validator(mode="after")
    def _check_ranking(self) -> PretrainSettings:
        if self.loss.ranking_weight > 0 and self.model.encode == "all":
            raise ValueError("loss.ranking_weight needs model.encode=visible: the ranking decoder reads visible tokens")
        return self

    @property
    def needs_teacher(self) -> bool:
        """Whether a moving average of the model is kept, because something here asks it."""
        s = self.selection
        clusters = s.uses_clusters and (s.features == "tokens" or s.rule == "hardest")
        score = s.uses_score and s.score in ("difficulty", "attention")
        return self.objective == "reconstruction" and (clusters or score or self.uses_feedback)

    @property
    def uses_feedback(self) -> bool:
        """Whether CCL's category takes part in naming the lesion."""
        return self.selection.uses_clusters and self.selection.feedback > 0 and self.loss.ccl_weight > 0

    def check_image(self, spec: ImageSpec) -> None:
        """Raise SettingsError where the patch size does not divide the images."""
        p = self.model.patch_size
        if spec.height % p or spec.width % p:
            raise SettingsError(
                f"model.patch_size {p} does not divide the images of {spec.height}x{spec.width} pixels; "
                f"choose a divisor or prepare the data with another --size."
            )

    def check_workers(self, workers: int) -> None:
        """Raise SettingsError where the workers cannot share a batch evenly."""
        if self.batch_size % workers:
            raise SettingsError(f"batch_size {self.batch_size} must be a multiple of resources.workers {workers}.")


class ProbeSettings(Settings):
    """`probe`: what a search maximises. A frozen encoder, a linear head per patch, few labels."""

    labels: int = Field(24, ge=4)  # labelled training images per subset; 8 is too noisy (SD 0.032 against 0.019)
    subsets: int = Field(6, ge=1)  # fixed subsets, their mean is the score: noise 0.008 DSC
    scoring: Literal["auto", "val", "cross-validation"] = "auto"  # auto: val from 40 lesion images on
    folds: int = Field(5, ge=2)  # cross-validation by group inside train + val; test is never read
    seed: int = Field(0, ge=0)  # subsets and folds; the same for all trials of a study


class SegmentSettings(Settings):
    """`finetune`: training a segmenter on labelled images, for confirmation."""

    epochs: int = Field(60, ge=1)
    batch_size: int = Field(12, ge=1)
    lr: float = Field(1e-3, gt=0, le=1)  # below 1e-3 pretrained encoders are penalised far more than scratch
    weight_decay: float = Field(0.05, ge=0, le=1)
    warmup: float = Field(0.1, ge=0, lt=1)
    labels: int | None = Field(None, ge=4)  # labelled training images; none: all with a lesion
    decoder_width: int = Field(64, ge=8, le=1024)
    freeze: bool = False  # train the decoder only
    flip: bool = True
    seed: int = Field(0, ge=0)


class SamplerSettings(Settings):
    """Which Optuna sampler proposes settings."""

    name: Literal["tpe", "random", "gp", "qmc"] = "tpe"
    startup: int = Field(5, ge=1)  # random trials before TPE models anything; studies here have tens of trials


class PrunerSettings(Settings):
    """Which Optuna pruner stops poor trials early, and the rungs at which a trial is scored."""

    name: Literal["median", "percentile", "halving", "none"] = "median"
    rungs: int = Field(4, ge=1)  # scorings per trial, evenly spaced, the last at full length
    min_steps: int = Field(400, ge=0)  # no pruning earlier: rungs below about 400 optimiser steps do not rank
    startup: int = Field(3, ge=0)  # complete trials before the first one may be pruned
    percentile: float = Field(50.0, gt=0, lt=100)  # `percentile` keeps the best this many percent at each rung
    reduction: int = Field(2, ge=2)  # `halving` keeps 1 in this many


class BudgetSettings(Settings):
    """When a study ends; the first limit reached counts. Baseline arms come on top of `trials`."""

    trials: int = Field(16, ge=1)
    hours: float | None = Field(None, gt=0)  # of this run; running trials finish


class ResourceSettings(Settings):
    """What one trial holds. One worker trains in the trial's own process, more in a Ray Train group."""

    workers: int = Field(1, ge=1)
    cpus_per_worker: float = Field(1, gt=0)
    gpus_per_worker: float = Field(0, ge=0)
    concurrency: int | None = Field(None, ge=1)  # trials side by side; none: as many as the cluster holds


class Range(Settings):
    """A numeric parameter of a search space."""

    low: float
    high: float
    log: bool = False
    step: float | None = Field(None, gt=0)
    when: dict[str, Any] | None = None  # {"ratio.shape": "power"}: only in trials where that holds

    @model_validator(mode="after")
    def _check_order(self) -> Range:
        if self.low >= self.high:
            raise ValueError(f"low {self.low:g} must lie below high {self.high:g}")
        if self.log and (self.low <= 0 or self.step):
            raise ValueError("log needs low > 0 and no step")
        return self


class Choice(Settings):
    """A categorical parameter of a search space."""

    choices: list[str | int | float | bool] = Field(min_length=1)
    when: dict[str, Any] | None = None


Parameter = Annotated[
    Annotated[Range, Tag("range")] | Annotated[Choice, Tag("choice")],
    Discriminator(lambda given: "choice" if isinstance(given, Choice) or "choices" in given else "range"),
]


class StudySettings(Settings):
    """One study: what is searched, by which rules, on what, and until when."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    description: str = ""
    data: str | None = None  # path of a patch dataset; --data gives it too
    seed: int = Field(0, ge=0, lt=2**63)
    pretrain: dict[str, Any] = Field(default_factory=dict)  # settings of every trial, kept as given (see `trial`)
    space: dict[str, Parameter] = Field(default_factory=dict)
    probe: ProbeSettings = ProbeSettings()
    sampler: SamplerSettings = SamplerSettings()
    pruner: PrunerSettings = PrunerSettings()
    budget: BudgetSettings = BudgetSettings()
    resources: ResourceSettings = ResourceSettings()
    arms: tuple[Variant, ...] = ("scratch", "mae")  # same budget
    arm_seeds: int = Field(2, ge=1)  # repeats of each arm: one run says nothing about noise
    tie: float = Field(0.02, ge=0)  # DSC; smaller differences are noise at these sizes and called ties

    @field_validator("pretrain")
    @classmethod
    def _check_pretrain(cls, given: dict[str, Any]) -> dict[str, Any]:
        build(PretrainSettings, given, "pretrain")
        return given

    @field_validator("arms")
    @classmethod
    def _check_arms(cls, given: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(given)) < len(given):
            raise ValueError(f"each arm is named once, not {', '.join(given)}; repeats are set by arm_seeds")
        return given

    def trial(self, params: Mapping[str, Any], *, seed: int) -> PretrainSettings:
        """Return the settings of one trial: those of the study with `params` (dotted names) on top.

        Merged before they are resolved, so that a searched `variant` brings its own values along.
        """
        return build(PretrainSettings, merged(self.pretrain, nested({**params, "seed": seed})), self.name)
