"""Settings of searching: what proposes settings, what stops poor trials, and what a study strives for."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from amlp_ray.config.base import Config
from amlp_ray.config.resources import FaultToleranceConfig

StudyObjective = Literal[
    "dsc", "ap", "ppv", "sensitivity", "dsc_small", "dsc_medium", "dsc_large", "seconds", "gpu_seconds", "memory"
]  # fmt: skip
Direction = Literal["maximize", "minimize"]

_OF = {  # sampler or pruner that a setting is of, where it is of some only
    "multivariate": ("tpe",),
    "group": ("tpe",),
    "population_size": ("nsga2", "nsga3", "cmaes", "pbt"),
    "interval": ("pbt",),
    "exploit": ("pbt",),
    "perturb": ("pbt",),
    "percentile": ("percentile",),
    "reduction_factor": ("halving", "hyperband", "geometric"),
    "patience": ("patient",),
    "min_delta": ("patient",),
    "p_threshold": ("wilcoxon",),
}


def _check_options(given: Config, *names: str) -> None:
    """Refuse what is set and does nothing. A default does no harm: a settings file written in full holds them all."""
    for option in sorted(_OF.keys() & type(given).model_fields.keys()):
        changed = getattr(given, option) != type(given).model_fields[option].default
        if changed and not set(names) & set(_OF[option]):
            raise ValueError(
                f"{option} is a setting of {', '.join(_OF[option])} and does nothing for {names[-1]}"
            )


class SamplerConfig(Config):
    """Which Optuna sampler proposes settings; `pbt` is population-based training, ours on Optuna's storage."""

    # tpe: models good and poor trials; gp: a Gaussian process, for few and dear trials; cmaes: numeric spaces of some
    # hundred trials; nsga2, nsga3: several objectives; grid: every combination; qmc: evenly spread; random: the control
    name: Literal["tpe", "gp", "cmaes", "nsga2", "nsga3", "qmc", "random", "grid", "pbt"] = "tpe"
    n_startup_trials: int = Field(
        5, ge=1
    )  # random trials before tpe, gp or cmaes model anything; studies here have tens of trials
    multivariate: bool = True  # of tpe: parameters are modelled together; a ratio's end means little without its start
    group: bool = (
        True  # of tpe: a conditional space has no parameters common to all trials otherwise
    )
    population_size: int = Field(
        8, ge=2
    )  # of nsga2, nsga3, cmaes: trials per generation; of pbt: members
    interval: int = Field(10, ge=1)  # of pbt: epochs of a segment, after which members are compared
    exploit: float = Field(
        0.25, gt=0, le=0.5
    )  # of pbt: share of members that go on from one of the best as many
    perturb: float = Field(
        0.1, gt=0, le=1
    )  # of pbt: largest change per segment, as a share of the range
    # suggestions made while trials run, so that a slow sampler idles no GPU; none: 1, but 0 where trials run one by
    # one, since each then learns from all before
    suggest_ahead: int | None = Field(None, ge=0, le=64)

    @model_validator(mode="after")
    def _check_options_of_name(self) -> SamplerConfig:
        _check_options(self, self.name)
        return self


class PrunerConfig(Config):
    """Which Optuna pruner stops poor trials early, and the rungs at which a trial is scored."""

    # median: worse than half of the earlier trials at the same rung; percentile: than other shares; halving: not among
    # the best of a rung (asynchronous, ASHA); hyperband: halving with several first rungs; patient: no gain for some
    # rungs; wilcoxon: worse than the best trial on the same images, by a signed-rank test
    name: Literal["median", "percentile", "halving", "hyperband", "patient", "wilcoxon", "none"] = (
        "median"
    )
    rungs: int = Field(4, ge=1)  # scorings per trial, the last at full length
    spacing: Literal["even", "geometric"] = (
        "even"  # geometric: each `reduction` times the one before, as halving has it
    )
    min_steps: int = Field(
        400, ge=0
    )  # no pruning earlier: rungs below about 400 optimiser steps do not rank
    n_startup_trials: int = Field(3, ge=0)  # complete trials before the first one may be pruned
    percentile: float = Field(
        50.0, gt=0, lt=100
    )  # `percentile` keeps the best this many percent at each rung
    reduction_factor: int = Field(2, ge=2)  # `halving` and `hyperband` keep 1 in this many
    patience: int = Field(1, ge=0)  # of patient: rungs without a gain that are forgiven
    min_delta: float = Field(0.0, ge=0)  # of patient: what counts as a gain
    p_threshold: float = Field(0.1, gt=0, lt=1)  # of wilcoxon: prune below it
    metric: StudyObjective | None = (
        None  # what is compared at rungs; none: the first objective; given with several
    )
    # a rising ratio means that an early rung has seen low ratios only. fixed: the schedule spans all epochs, and rungs
    # are compared at that; compress: it is run whole up to each rung, so that every rung has seen all of it
    schedule: Literal["fixed", "compress"] = "fixed"

    @model_validator(mode="after")
    def _check_options_of_name(self) -> PrunerConfig:
        _check_options(self, self.spacing, self.name)
        return self


class BudgetConfig(Config):
    """When a study ends: the first limit reached counts, over all its runs. Running trials end at their next rung.

    `trials` is the exception: trials that run are finished. Baseline baselines come on top of it and count in the others.
    """

    trials: int = Field(16, ge=1)  # of the search, pruned and failed ones included
    hours: float | None = Field(None, gt=0)  # in which the study is run, pauses left out
    gpu_hours: float | None = Field(None, gt=0)  # held by trials
    epochs: int | None = Field(None, ge=1)  # trained by all trials together


class StudyFaultToleranceConfig(FaultToleranceConfig):
    """What a study bears before it gives up; `retries` counts for each trial."""

    max_identical_failures: int = Field(
        3, ge=1
    )  # first trials that fail for one reason before the study stops: it is not the settings

    def of_trial(self) -> FaultToleranceConfig:
        """What one trial bears."""
        return FaultToleranceConfig(**self.model_dump(exclude={"max_identical_failures"}))
