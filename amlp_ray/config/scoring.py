"""Settings of scoring an encoder with labels: the probe of a search, and the segmenter that confirms it."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

from amlp_ray.config.method import Share
from amlp_ray.settings import Settings


class ProbeSettings(Settings):
    """`probe`: what a search maximises. A frozen encoder, a linear head per patch, few labels."""

    labels: int = Field(24, ge=4)  # labelled training images per subset; 8 is too noisy (SD 0.032 against 0.019)
    subsets: int = Field(6, ge=1)  # fixed subsets, their mean is the score: noise 0.008 DSC
    scoring: Literal["auto", "val", "cross-validation"] = "auto"  # auto: val from 40 lesion images on
    images: int = Field(1000, ge=40)  # scored at most with a lesion, and as many without; 1000: noise 0.007 DSC
    folds: int = Field(5, ge=2)  # cross-validation by group inside train + val; test is never read
    # shares of the image: below the first a lesion is small, above the second large; BUSI's quartiles: 0.018, 0.127
    sizes: tuple[float, float] = (0.02, 0.1)
    seed: int = Field(0, ge=0)  # subsets and folds; the same for all trials of a study

    @field_validator("sizes")
    @classmethod
    def _check_sizes(cls, given: tuple[float, float]) -> tuple[float, float]:
        if not 0 < given[0] <= given[1] < 1:
            raise ValueError(f"two rising shares between 0 and 1, such as [0.02, 0.1], not {list(given)}")
        return given


class SegmentSettings(Settings):
    """`segment`: training a segmenter on labelled images, for confirmation."""

    epochs: int = Field(60, ge=1)  # over the labelled training images with a lesion
    batch_size: int = Field(12, ge=1)  # images per optimiser step
    lr: float = Field(1e-3, gt=0, le=1)  # below 1e-3 pretrained encoders are penalised far more than scratch
    weight_decay: float = Field(0.05, ge=0, le=1)  # as in pretraining
    warmup: float = Field(0.1, ge=0, lt=1)  # share of steps over which lr rises; then cosine to zero
    labels: int | None = Field(None, ge=4)  # labelled training images; none: all with a lesion
    decoder_width: int = Field(64, ge=8, le=1024)  # channels of the convolutions that lead from tokens to pixels
    freeze: bool = False  # train the decoder only
    crop_min: float = Field(1.0, gt=0, le=1)  # least area share of a random crop, of image and mask; 1 is off
    flip: bool = True  # left-right, as in pretraining
    flip_vertical: bool = False  # as in pretraining: off where depth has a direction, as in ultrasound
    intensity: Share = 0.0  # strength of random gamma, contrast and brightness; 0 is off
    seed: int = Field(0, ge=0)  # of the decoder's weights, the labelled images chosen, and their order
