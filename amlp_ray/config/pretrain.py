"""Settings of a pretraining run, and its named variants."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, model_validator

from amlp_ray.config.base import Config
from amlp_ray.config.data import ImageSpec
from amlp_ray.config.method import (
    LossConfig,
    ModelConfig,
    RatioConfig,
    SelectionConfig,
    Share,
)
from amlp_ray.config.overrides import merged
from amlp_ray.config.resources import ResourceConfig
from amlp_ray.errors import ConfigError

_PLAIN_LOSS = {"weighting": "none", "ccl_weight": 0.0}
_RATIO_OF_MAE = {"start": 0.75, "end": 0.75}

# Named baselines: each is a setting of the same code. Values given by the user win over them.
VARIANTS: dict[str, dict[str, Any]] = {
    # AMLP, second version: the defaults, with the teacher's category fed back, without which CCL refines nothing.
    "amlp": {"selection": {"feedback": 0.5}},
    # AMLP's "probability" of a lesion: masks are drawn by score, below ratios that mask every lesion patch anyway.
    "amlp-soft": {"selection": {"mode": "soft"}, "ratio": {"start": 0.3, "end": 0.5}},
    # MPS-AMS, the predecessor: selection and ratio of AMLP with the plain loss.
    "mps-ams": {
        "selection": {"features": "raw", "clusters": 3, "rule": "smallest"},
        "loss": _PLAIN_LOSS,
    },
    # MAE (He et al. 2022): random masks at 0.75.
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
        "selection": {
            "mode": "ranked",
            "score": "difficulty",
            "aim_start": 0.0,
            "aim_end": 0.5,
            "analysis_interval": 0,
        },
        "ratio": _RATIO_OF_MAE,
        "loss": {**_PLAIN_LOSS, "ranking_weight": 1.0},
    },
    # After AttMask (Kakogeorgiou et al. 2022): the most attended patches, some shown as hints, ratio U(0.1, 0.5).
    "attmask": {
        "selection": {
            "mode": "ranked",
            "score": "attention",
            "aim_start": 1.0,
            "aim_end": 1.0,
            "lesion_share": 0.7,
        },
        "ratio": {"start": 0.1, "end": 0.5, "shape": "random", "update_per": "step"},
        "loss": _PLAIN_LOSS,
    },
    # After SemMAE (Li et al. 2022): from a share of every part to whole parts; parts are our clusters.
    "semmae": {
        "selection": {"mode": "parts"},
        "ratio": _RATIO_OF_MAE,
        "loss": _PLAIN_LOSS,
    },
    # SimSiam (Chen and He 2021): two crops of an image agree; no mask.
    "simsiam": {"objective": "simsiam", "selection": {"mode": "random"}, "loss": _PLAIN_LOSS},
    # No pretraining: what every other baseline has to beat.
    "scratch": {"objective": "none", "selection": {"mode": "random"}, "loss": _PLAIN_LOSS},
}

Variant = Literal[
    "amlp", "amlp-soft", "mps-ams", "mae", "simmim", "hpm", "attmask", "semmae", "simsiam", "scratch"
]  # fmt: skip


class PretrainConfig(Config):
    """One pretraining run. `variant` sets a named baseline; every other value given wins over it.

    >>> PretrainConfig(variant="mae").ratio.start
    0.75
    """

    variant: Variant = (
        "amlp"  # the whole of AMLP; the other baselines are its parts and its relatives
    )
    # simsiam: two crops of an image agree (Chen and He 2021); none: the random encoder, for comparison
    objective: Literal["reconstruction", "simsiam", "none"] = "reconstruction"
    epochs: int = Field(
        100, ge=1
    )  # over the training images; below about 400 steps in all, runs do not rank
    batch_size: int = Field(
        16, ge=1
    )  # images per optimiser step over all workers; small sets need many steps
    lr: float = Field(1e-3, gt=0, le=1)  # highest learning rate, of batches of lr_batch images
    lr_batch: int = Field(
        16, ge=1
    )  # batch_size at which lr holds as it is; lr is 1.5e-4 at 256 in MAE
    # with batch_size over lr_batch: sqrt keeps AdamW's noise the same (Malladi et al. 2022), linear is MAE's rule
    lr_scaling: Literal["sqrt", "linear", "none"] = "sqrt"
    weight_decay: float = Field(0.05, ge=0, le=1)  # MAE's; not of biases and norms
    warmup: float = Field(
        0.1, ge=0, lt=1
    )  # share of steps over which lr rises; then cosine to zero
    clip_grad: float = Field(1.0, gt=0)  # largest gradient norm of a step
    teacher_momentum: float = Field(
        0.999, ge=0, lt=1
    )  # teacher's decay per step, applied before each look; 0: the model itself
    # decay per step of a moving average of all weights, which is scored and exported in place of the last ones; 0: off,
    # since a cosine to zero settles them as well
    weight_ema: float = Field(0.0, ge=0, lt=1)
    min_crop_area: float = Field(
        0.6, gt=0, le=1
    )  # least area share of a random crop; lesions must stay in the picture
    flip: bool = True  # left-right
    flip_vertical: bool = (
        False  # off: depth has a direction in ultrasound; true for skin, microscopy, brain slices
    )
    intensity_jitter: Share = 0.0  # strength of random gamma, contrast and brightness; 0: the picture itself is to be rebuilt
    # auto: bf16 on GPUs that have it, else fp32; fp16, with a loss scale, is for GPUs that do not
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    compile: bool = (
        False  # torch.compile: pays on GPUs; takes a minute, and as much again per masked count
    )
    seed: int = Field(0, ge=0, lt=2**63)  # of weights, order, crops and masks
    # resident: in memory that a node's runs share; mapped: decoded once onto disk; stream: by Ray Data, while training;
    # auto: the first of these that has room
    data: Literal["auto", "resident", "mapped", "stream"] = "auto"
    # what the encoder starts from: an encoder.safetensors of a run, a file of timm weights of the named ViT (ImageNet,
    # MAE, ...), or timm:NAME from the internet; none: random. Of timm's, channels and positions are adapted, and it is
    # said how; a run's must be of images of the same shape
    weights: str | None = None
    model: ModelConfig = ModelConfig()
    ratio: RatioConfig = RatioConfig()
    selection: SelectionConfig = SelectionConfig()
    loss: LossConfig = LossConfig()

    @model_validator(mode="before")
    @classmethod
    def _lay_variant_under(cls, given: Any) -> Any:
        if not isinstance(given, Mapping):
            return given
        variant = given.get("variant", "amlp")
        return merged(VARIANTS.get(variant, {}) if isinstance(variant, str) else {}, given)

    @model_validator(mode="after")
    def _check_ranking(self) -> PretrainConfig:
        if self.loss.ranking_weight > 0 and self.model.encode == "all":
            raise ValueError(
                "loss.ranking_weight needs model.encode=visible: the ranking decoder reads visible tokens"
            )
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
        hard = self.selection.mode == "hard" and self.selection.uses_clusters
        return hard and self.selection.feedback > 0 and self.loss.ccl_weight > 0

    def check_image(self, spec: ImageSpec) -> None:
        """Raise ConfigError where the patch size does not divide the images, or leaves a single patch."""
        p = self.model.patch_size
        patches = spec.height * spec.width // (p * p)
        if self.ratio.round_to > max(1, patches // 2):
            raise ConfigError(
                f"ratio.round_to {self.ratio.round_to} is above half of the {patches} patches of an image; lower it."
            )
        if patches == 1:
            raise ConfigError(
                f"model.patch_size {p} makes one patch of an image, but some must stay visible; lower it."
            )
        if spec.height % p or spec.width % p:
            raise ConfigError(
                f"model.patch_size {p} does not divide the images of {spec.height}x{spec.width} pixels; "
                f"choose a divisor or prepare the data with another --size."
            )

    @property
    def scaled_lr(self) -> float:
        """The highest learning rate, as scaled to the batch.

        >>> PretrainConfig(lr=1e-3, batch_size=64).scaled_lr
        0.002
        """
        power = {"sqrt": 0.5, "linear": 1.0, "none": 0.0}[self.lr_scaling]
        return self.lr * (self.batch_size / self.lr_batch) ** power

    def check_workers(self, resources: ResourceConfig) -> None:
        """Raise ConfigError where the workers cannot share a batch."""
        if self.batch_size < resources.most_workers:
            raise ConfigError(
                f"batch_size {self.batch_size} is less than resources.workers {resources.most_workers}; raise it, or "
                f"use fewer workers."
            )
        if resources.sharding == "fsdp" and (
            resources.elastic or self.batch_size % resources.most_workers
        ):
            raise ConfigError(
                f"resources.sharding=fsdp needs a fixed number of workers that divides batch_size {self.batch_size}, "
                f"not {resources.workers}; change one of them, or use ddp."
            )
        if self.objective == "simsiam" and resources.micro_batch is not None:
            raise ConfigError(
                "resources.micro_batch would change objective simsiam, which normalises over a batch."
            )
        if self.objective == "simsiam" and self.batch_size < 2 * resources.most_workers:
            raise ConfigError(
                f"batch_size {self.batch_size} leaves one image per worker, but objective simsiam normalises over "
                f"several; raise batch_size."
            )
