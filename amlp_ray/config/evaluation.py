"""Settings of scoring an encoder with labels: the probe of a search, and fine-tuning."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, field_validator, model_validator

from amlp_ray.config.base import Config, Count, PositiveShare, Share
from amlp_ray.config.resources import ResourceConfig
from amlp_ray.errors import ConfigError


class ProbeConfig(Config):
    """`probe`: what a search maximizes. A frozen encoder, a linear head per patch, few labels."""

    num_labeled: int = Field(24, ge=4)
    """Labeled training images per subset; 8 is too noisy (SD 0.032 against 0.019)."""
    subsets: Count = 6
    """Fixed subsets, whose mean is the score: noise 0.008 DSC."""
    scoring: Literal["auto", "val", "cross-validation"] = "auto"
    """Images that are scored. auto: val from 40 lesion images on, else cross-validation."""
    images: int = Field(1000, ge=40)
    """Most images scored with a lesion, and as many without; 1000: noise 0.007 DSC."""
    folds: int = Field(5, ge=2)
    """Folds of cross-validation by group inside train + val; test is never read."""
    sizes: tuple[float, float] = (0.02, 0.1)
    """Shares of the image below which a lesion is small, and above which it is large; BUSI's
    quartiles: 0.018, 0.127."""
    seed: NonNegativeInt = 0
    """Seed of subsets and folds, the same for all trials of a study."""

    @field_validator("sizes")
    @classmethod
    def _check_sizes(cls, sizes: tuple[float, float]) -> tuple[float, float]:
        if not 0 < sizes[0] <= sizes[1] < 1:
            raise ValueError(
                f"two rising shares between 0 and 1, such as [0.02, 0.1], not {list(sizes)}"
            )
        return sizes


class SegmentConfig(Config):
    """`segment`: training a segmenter on labeled images, for confirmation."""

    epochs: Count = 60
    """Passes over the labeled training images with a lesion; `empty_share` adds others."""
    batch_size: Count = 12
    """Images per optimizer step, over all workers."""
    lr: float = Field(1e-3, gt=0, le=1)
    """Highest learning rate; below 1e-3 pretrained encoders lose far more than scratch does."""
    weight_decay: float = Field(0.05, ge=0, le=1)
    """Weight decay, as in pretraining."""
    warmup: float = Field(0.1, ge=0, lt=1)
    """Share of steps over which lr rises; then it falls along a cosine to zero."""
    layer_decay: float = Field(1.0, gt=0, le=1)
    """Factor of the learning rate from each block to the one before it. 1: the same for all, as
    small encoders do best at lr 1e-3. BEiT and MAE use 0.65 to 0.75 for ViT-B and larger, whose
    first blocks ImageNet has taught enough."""
    clip_grad: PositiveFloat = 1.0
    """Largest gradient norm of a step, as in pretraining."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """auto: bf16 on GPUs that have it, fp32 on CPU."""
    empty_share: Share = 0.25
    """Largest share of images without a lesion in an epoch. They are added to those with a lesion,
    spread over all batches, and drawn anew each epoch. 0: none. 1: all there are. At 0.25,
    `empty_correct` rose from 0.85 to 0.94 on phantoms and from 0.31 to 0.47 on BUSI; 0.5 doubles
    the steps and gained no more."""
    num_labeled: int | None = Field(None, ge=4)
    """Number of labeled training images with a lesion; `empty_share` adds to them. null: all."""
    label_share: float | None = Field(None, gt=0, le=1)
    """Share of the labeled training images, drawn by group (patient): whole groups until the share
    is reached, at least one. The images of a smaller share are among those of a larger one with
    the same seed. null: all, or `num_labeled`."""
    decoder: Literal["conv", "linear", "unetr", "dpt"] = "conv"
    """linear: a logit per token, what the encoder itself knows. conv: the tokens of four depths,
    summed. unetr: UNETR's pyramid, for patch sizes that are powers of two. dpt: DPT's fusion of
    four scales. conv is the default because every score so far was measured with it."""
    decoder_width: int = Field(64, ge=8, le=1024)
    """Channels of the convolutions from tokens to pixels."""
    freeze: bool = False
    """Train the decoder only."""
    min_crop_area: PositiveShare = 1.0
    """Least area share of a random crop, of image and mask; 1 is off."""
    flip: bool = True
    """Flip left-right, as in pretraining."""
    flip_vertical: bool = False
    """Flip vertically, as in pretraining: off where depth has a direction, as in ultrasound."""
    intensity_jitter: Share = 0.0
    """Strength of random gamma, contrast and brightness; 0 is off."""
    seed: NonNegativeInt = 0
    """Seed of the decoder's weights, of the choice of labeled images, and of their order."""

    @model_validator(mode="after")
    def _check_combinations(self) -> SegmentConfig:
        if self.num_labeled is not None and self.label_share is not None:
            raise ValueError(
                f"num_labeled {self.num_labeled} and label_share {self.label_share} both say how "
                f"many images are learned from; give one of them"
            )
        if self.freeze and self.layer_decay < 1:
            raise ValueError(
                f"layer_decay {self.layer_decay} needs freeze=false: a frozen encoder does not "
                f"learn"
            )
        return self

    def check_workers(self, resources: ResourceConfig) -> None:
        """Raise ConfigError if the workers cannot share a batch, or not in the way asked for."""
        resources.check_batch_size(self.batch_size)
        if resources.micro_batch is not None or resources.sharding == "fsdp":
            raise ConfigError(
                "resources.micro_batch and resources.sharding=fsdp are for pretraining; "
                "fine-tuning has a Dice loss over whole batches and whole models: leave them out."
            )

    def check_patch_size(self, patch_size: int) -> None:
        """Raise ConfigError if the decoder cannot decode an encoder's patches."""
        is_power_of_two = patch_size & (patch_size - 1) == 0
        if self.decoder == "unetr" and (patch_size < 4 or not is_power_of_two):
            raise ConfigError(
                f"decoder unetr doubles the grid of patches until it has pixels, so the patch size "
                f"must be a power of two from 4 on, not {patch_size}; choose decoder conv, linear "
                f"or dpt."
            )
