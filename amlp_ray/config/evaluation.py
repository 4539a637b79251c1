"""Settings of scoring an encoder with labels: the probe of a search, and the segmenter that confirms it."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator, model_validator

from amlp_ray.config.base import Config
from amlp_ray.config.method import Share
from amlp_ray.config.resources import ResourceConfig
from amlp_ray.errors import ConfigError


class ProbeConfig(Config):
    """`probe`: what a search maximises. A frozen encoder, a linear head per patch, few labels."""

    num_labeled: int = Field(
        24, ge=4
    )  # labelled training images per subset; 8 is too noisy (SD 0.032 against 0.019)
    subsets: int = Field(6, ge=1)  # fixed subsets, their mean is the score: noise 0.008 DSC
    scoring: Literal["auto", "val", "cross-validation"] = (
        "auto"  # auto: val from 40 lesion images on
    )
    images: int = Field(
        1000, ge=40
    )  # scored at most with a lesion, and as many without; 1000: noise 0.007 DSC
    folds: int = Field(5, ge=2)  # cross-validation by group inside train + val; test is never read
    # shares of the image: below the first a lesion is small, above the second large; BUSI's quartiles: 0.018, 0.127
    sizes: tuple[float, float] = (0.02, 0.1)
    seed: int = Field(0, ge=0)  # subsets and folds; the same for all trials of a study

    @field_validator("sizes")
    @classmethod
    def _check_sizes(cls, given: tuple[float, float]) -> tuple[float, float]:
        if not 0 < given[0] <= given[1] < 1:
            raise ValueError(
                f"two rising shares between 0 and 1, such as [0.02, 0.1], not {list(given)}"
            )
        return given


class SegmentConfig(Config):
    """`segment`: training a segmenter on labelled images, for confirmation."""

    epochs: int = Field(60, ge=1)  # over the labelled training images with a lesion
    batch_size: int = Field(12, ge=1)  # images per optimiser step, over all workers
    lr: float = Field(
        1e-3, gt=0, le=1
    )  # below 1e-3 pretrained encoders are penalised far more than scratch
    weight_decay: float = Field(0.05, ge=0, le=1)  # as in pretraining
    warmup: float = Field(
        0.1, ge=0, lt=1
    )  # share of steps over which lr rises; then cosine to zero
    # of the learning rate, from each block to the one before it. 1: all learn alike, as at lr 1e-3 small encoders do
    # best; BEiT and MAE take 0.65 to 0.75 for ViT-B and larger, whose first blocks ImageNet has taught enough
    layer_decay: float = Field(1.0, gt=0, le=1)
    clip_grad: float = Field(1.0, gt=0)  # largest gradient norm of a step, as in pretraining
    precision: Literal["auto", "fp32", "bf16"] = (
        "auto"  # auto: bf16 on GPUs that have it, fp32 on CPU
    )
    num_labeled: int | None = Field(None, ge=4)  # labelled training images; none: all with a lesion
    # of them, drawn by group (patient): whole groups until the share is reached, at least one. The images of a smaller
    # share are among those of a larger one with the same seed; none: all, or `labels`
    label_share: float | None = Field(None, gt=0, le=1)
    # linear: a logit per token, what the encoder itself knows; conv: the tokens of four depths, summed; unetr: UNETR's
    # pyramid, for patch sizes that are powers of two; dpt: DPT's fusion of four scales. conv is the default since
    # every score so far was measured with it
    decoder: Literal["conv", "linear", "unetr", "dpt"] = "conv"
    decoder_width: int = Field(
        64, ge=8, le=1024
    )  # channels of the convolutions that lead from tokens to pixels
    freeze: bool = False  # train the decoder only
    min_crop_area: float = Field(
        1.0, gt=0, le=1
    )  # least area share of a random crop, of image and mask; 1 is off
    flip: bool = True  # left-right, as in pretraining
    flip_vertical: bool = (
        False  # as in pretraining: off where depth has a direction, as in ultrasound
    )
    intensity_jitter: Share = 0.0  # strength of random gamma, contrast and brightness; 0 is off
    seed: int = Field(
        0, ge=0
    )  # of the decoder's weights, the labelled images chosen, and their order

    @model_validator(mode="after")
    def _check_parts(self) -> SegmentConfig:
        if self.num_labeled is not None and self.label_share is not None:
            raise ValueError(
                f"num_labeled {self.num_labeled} and label_share {self.label_share} both say how many images are learnt from; "
                f"give one of them"
            )
        if self.freeze and self.layer_decay < 1:
            raise ValueError(
                f"layer_decay {self.layer_decay} needs freeze=false: a frozen encoder does not learn"
            )
        return self

    def check_workers(self, resources: ResourceConfig) -> None:
        """Raise ConfigError where the workers cannot share a batch, or are asked to do it in a way they cannot."""
        if self.batch_size < resources.most_workers:
            raise ConfigError(
                f"batch_size {self.batch_size} is less than resources.workers {resources.most_workers}; raise it, or "
                f"use fewer workers."
            )
        if resources.micro_batch is not None or resources.sharding == "fsdp":
            raise ConfigError(
                "resources.micro_batch and resources.sharding=fsdp are for pretraining; fine-tuning has a Dice loss "
                "over whole batches and whole models: leave them out."
            )

    def check_patch_size(self, patch_size: int) -> None:
        """Raise ConfigError where the decoder does not go with an encoder's patches."""
        if self.decoder == "unetr" and (patch_size < 4 or patch_size & (patch_size - 1)):
            raise ConfigError(
                f"decoder unetr doubles the grid of patches until it has pixels, so the patch size must be a power of "
                f"two from 4 on, not {patch_size}; choose decoder conv, linear or dpt."
            )
