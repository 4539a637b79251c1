"""Settings of a pretraining run, and its named variants."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, PositiveFloat, model_validator

from amlp_ray.config.base import Config, Count, PositiveShare, Share
from amlp_ray.config.data import ImageSpec
from amlp_ray.config.method import LossConfig, ModelConfig, RatioConfig, SelectionConfig
from amlp_ray.config.overrides import merge
from amlp_ray.config.resources import ResourceConfig
from amlp_ray.errors import ConfigError

PLAIN_LOSS = {"weighting": "none", "ccl_weight": 0.0}
MAE_RATIO = {"start": 0.75, "end": 0.75}

# Settings of each named variant; values given by the user override them.
VARIANTS: dict[str, dict[str, Any]] = {
    "amlp": {"selection": {"feedback": 0.5}},
    "amlp-soft": {"selection": {"mode": "soft"}, "ratio": {"start": 0.3, "end": 0.5}},
    "mps-ams": {
        "selection": {"features": "raw", "clusters": 3, "rule": "smallest"},
        "loss": PLAIN_LOSS,
    },
    "mae": {"selection": {"mode": "random"}, "ratio": MAE_RATIO, "loss": PLAIN_LOSS},
    "simmim": {
        "selection": {"mode": "random"},
        "ratio": {"start": 0.6, "end": 0.6},
        "loss": {**PLAIN_LOSS, "distance": "l1"},
        "model": {"encode": "all", "decoder_depth": 0},
    },
    "hpm": {
        "selection": {
            "mode": "ranked",
            "score": "difficulty",
            "score_share_start": 0.0,
            "score_share_end": 0.5,
            "analysis_interval": 0,
        },
        "ratio": MAE_RATIO,
        "loss": {**PLAIN_LOSS, "ranking_weight": 1.0},
    },
    "attmask": {
        "selection": {
            "mode": "ranked",
            "score": "attention",
            "score_share_start": 1.0,
            "score_share_end": 1.0,
            "lesion_share": 0.7,
        },
        "ratio": {"start": 0.1, "end": 0.5, "shape": "random", "update_per": "step"},
        "loss": PLAIN_LOSS,
    },
    "semmae": {"selection": {"mode": "parts"}, "ratio": MAE_RATIO, "loss": PLAIN_LOSS},
    "simsiam": {"objective": "simsiam", "selection": {"mode": "random"}, "loss": PLAIN_LOSS},
    "scratch": {"objective": "none", "selection": {"mode": "random"}, "loss": PLAIN_LOSS},
}

VARIANT_DESCRIPTIONS: dict[str, str] = {
    "amlp": (
        "AMLP, second version: the defaults, with the teacher's category fed back, without which "
        "CCL refines nothing."
    ),
    "amlp-soft": (
        'AMLP\'s "probability" of a lesion: masks are drawn by score, below ratios that mask every '
        "lesion patch anyway."
    ),
    "mps-ams": "MPS-AMS, the predecessor: selection and ratio of AMLP with the plain loss.",
    "mae": "MAE (He et al. 2022): random masks at 0.75.",
    "simmim": (
        "SimMIM (Xie et al. 2022): every token is encoded, a linear head, l1, masking ratio 0.6."
    ),
    "hpm": (
        "HPM (Wang et al. 2023): the teacher's predicted difficulty selects up to half of the "
        "mask, computed on every crop."
    ),
    "attmask": (
        "After AttMask (Kakogeorgiou et al. 2022): the most attended patches, some shown as hints, "
        "ratio U(0.1, 0.5)."
    ),
    "semmae": (
        "After SemMAE (Li et al. 2022): from a share of every part to whole parts; parts are our "
        "clusters."
    ),
    "simsiam": "SimSiam (Chen and He 2021): two crops of an image agree; no mask.",
    "scratch": "No pretraining: what every other baseline has to beat.",
}

Variant = Literal[
    "amlp",
    "amlp-soft",
    "mps-ams",
    "mae",
    "simmim",
    "hpm",
    "attmask",
    "semmae",
    "simsiam",
    "scratch",
]


class PretrainConfig(Config):
    """One pretraining run. `variant` selects a named variant; every other value given overrides
    it.

    >>> PretrainConfig(variant="mae").ratio.start
    0.75
    """

    variant: Variant = "amlp"
    """The whole of AMLP, or a baseline: one of its parts or relatives."""
    objective: Literal["reconstruction", "simsiam", "none"] = "reconstruction"
    """simsiam: two crops of an image agree (Chen and He 2021). none: the random encoder, for
    comparison."""
    epochs: Count = 100
    """Passes over the training images; below about 400 steps in total, results do not rank runs."""
    batch_size: Count = 16
    """Images per optimizer step over all workers; small datasets need many steps."""
    lr: float = Field(1e-3, gt=0, le=1)
    """Highest learning rate, for batches of lr_batch images."""
    lr_batch: Count = 16
    """batch_size at which lr holds as it is. MAE's lr is 1.5e-4 at 256."""
    lr_scaling: Literal["sqrt", "linear", "none"] = "sqrt"
    """How lr grows with batch_size / lr_batch. sqrt keeps AdamW's noise the same (Malladi et al.
    2022); linear is MAE's rule."""
    weight_decay: float = Field(0.05, ge=0, le=1)
    """MAE's weight decay; not applied to biases and norms."""
    warmup: float = Field(0.1, ge=0, lt=1)
    """Share of steps over which lr rises; then it falls along a cosine to zero."""
    clip_grad: PositiveFloat = 1.0
    """Largest gradient norm of a step."""
    teacher_momentum: float = Field(0.999, ge=0, lt=1)
    """Teacher's decay per step, applied before each analysis; 0: the model itself."""
    weight_ema: float = Field(0.0, ge=0, lt=1)
    """Decay per step of a moving average of all weights, which is scored and exported instead of
    the last ones. 0: off, because a cosine to zero settles them as well."""
    min_crop_area: PositiveShare = 0.6
    """Least area share of a random crop; lesions must stay in the image."""
    flip: bool = True
    """Flip left-right."""
    flip_vertical: bool = False
    """Flip vertically. Off because depth has a direction in ultrasound; true for skin, microscopy,
    brain slices."""
    intensity_jitter: Share = 0.0
    """Strength of random gamma, contrast and brightness. 0: the image itself is reconstructed."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """auto: bf16 on GPUs that have it, else fp32. fp16, with a loss scale, is for other GPUs."""
    compile: bool = False
    """torch.compile: pays on GPUs; takes a minute, and another for every masked count."""
    seed: int = Field(0, ge=0, lt=2**63)
    """Seed of weights, order, crops and masks."""
    data: Literal["auto", "mapped", "stream"] = "auto"
    """mapped: decoded once into a file that all runs of a node share. stream: by Ray Data, while
    training. auto: mapped if the disk of AMLP_RAY_CACHE has room, else stream."""
    weights: str | None = None
    """Weights that the encoder starts from: an encoder.safetensors of a run, a file of timm weights
    of the named ViT (ImageNet, MAE, ...), or timm:NAME from the internet. null: random. Channels
    and positions of timm weights are adapted, and the adaptation is printed. A run's encoder must
    be of images of the same shape."""
    model: ModelConfig = ModelConfig()
    """The masked autoencoder."""
    ratio: RatioConfig = RatioConfig()
    """The masking ratio over training."""
    selection: SelectionConfig = SelectionConfig()
    """Which patches are masked first."""
    loss: LossConfig = LossConfig()
    """Reconstruction loss and its weighting."""

    @model_validator(mode="before")
    @classmethod
    def _add_variant(cls, values: Any) -> Any:
        if not isinstance(values, Mapping):
            return values
        variant = values.get("variant", "amlp")
        base = VARIANTS.get(variant, {}) if isinstance(variant, str) else {}
        return merge(base, values)

    @model_validator(mode="after")
    def _check_ranking(self) -> PretrainConfig:
        if self.loss.ranking_weight > 0 and self.model.encode == "all":
            raise ValueError(
                "loss.ranking_weight needs model.encode=visible: the ranking decoder reads visible "
                "tokens"
            )
        return self

    @property
    def needs_teacher(self) -> bool:
        """Whether a setting in use reads the teacher, a moving average of the model."""
        selection = self.selection
        by_clusters = selection.uses_clusters and (
            selection.features == "tokens" or selection.rule == "hardest"
        )
        by_score = selection.uses_score and selection.score in ("difficulty", "attention")
        reads_teacher = by_clusters or by_score or self.uses_feedback
        return self.objective == "reconstruction" and reads_teacher

    @property
    def uses_feedback(self) -> bool:
        """Whether CCL's category takes part in locating the lesion."""
        is_hard = self.selection.mode == "hard" and self.selection.uses_clusters
        return is_hard and self.selection.feedback > 0 and self.loss.ccl_weight > 0

    def check_image(self, spec: ImageSpec) -> None:
        """Raise ConfigError if the patch size does not divide the images, or leaves one patch."""
        patch_size = self.model.patch_size
        patches = spec.height * spec.width // patch_size**2
        if self.ratio.round_to > max(1, patches // 2):
            raise ConfigError(
                f"ratio.round_to {self.ratio.round_to} is above half of the {patches} patches of "
                f"an image; lower it."
            )
        if patches == 1:
            raise ConfigError(
                f"model.patch_size {patch_size} makes one patch of an image, but some must stay "
                f"visible; lower it."
            )
        if spec.height % patch_size or spec.width % patch_size:
            raise ConfigError(
                f"model.patch_size {patch_size} does not divide the images of "
                f"{spec.height}x{spec.width} pixels; choose a divisor or prepare the data with "
                f"another --size."
            )

    @property
    def scaled_lr(self) -> float:
        """The highest learning rate, scaled to the batch.

        >>> PretrainConfig(lr=1e-3, batch_size=64).scaled_lr
        0.002
        """
        power = {"sqrt": 0.5, "linear": 1.0, "none": 0.0}[self.lr_scaling]
        return self.lr * (self.batch_size / self.lr_batch) ** power

    def check_workers(self, resources: ResourceConfig) -> None:
        """Raise ConfigError if the workers cannot share a batch."""
        resources.check_batch_size(self.batch_size)
        workers = resources.max_workers
        is_uneven = resources.is_elastic or self.batch_size % workers != 0
        if resources.sharding == "fsdp" and is_uneven:
            raise ConfigError(
                f"resources.sharding=fsdp needs a fixed number of workers that divides batch_size "
                f"{self.batch_size}, not {resources.workers}; change one of them, or use ddp."
            )
        if self.objective == "simsiam" and resources.micro_batch is not None:
            raise ConfigError(
                "resources.micro_batch would change objective simsiam, which normalizes over a "
                "batch."
            )
        if self.objective == "simsiam" and self.batch_size < 2 * workers:
            raise ConfigError(
                f"batch_size {self.batch_size} leaves one image per worker, but objective simsiam "
                f"normalizes over several; raise batch_size."
            )
