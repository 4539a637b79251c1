"""Settings of the search: sampler, pruner, objectives and budget."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, model_validator

from amlp_ray.config.base import Config, Count, PositiveShare
from amlp_ray.config.resources import FaultToleranceConfig

StudyObjective = Literal[
    "dsc",
    "ap",
    "ppv",
    "sensitivity",
    "dsc_small",
    "dsc_medium",
    "dsc_large",
    "seconds",
    "gpu_seconds",
    "memory",
]
Direction = Literal["maximize", "minimize"]
# Objectives that are minimized.
COST_OBJECTIVES = ("seconds", "gpu_seconds", "memory")

# Options that only some samplers or pruners have.
_OPTION_OWNERS = {
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


def _check_options(config: Config, *names: str) -> None:
    """Refuse an option that does nothing for the sampler or pruner, unless it has its default.

    A settings file written in full holds the defaults of all options.
    """
    fields = type(config).model_fields
    for option in sorted(_OPTION_OWNERS.keys() & fields.keys()):
        owners = _OPTION_OWNERS[option]
        has_default = getattr(config, option) == fields[option].default
        if not has_default and not set(names) & set(owners):
            raise ValueError(
                f"{option} is a setting of {', '.join(owners)} and does nothing for {names[-1]}"
            )


class SamplerConfig(Config):
    """Which Optuna sampler suggests settings; `pbt` is population-based training, our own on
    Optuna's storage."""

    name: Literal["tpe", "gp", "cmaes", "nsga2", "nsga3", "qmc", "random", "grid", "pbt"] = "tpe"
    """tpe: models good and poor trials. gp: a Gaussian process, for few and expensive trials.
    cmaes: numeric spaces of some hundred trials. nsga2, nsga3: several objectives. grid: every
    combination. qmc: evenly spread. random: the control."""
    n_startup_trials: Count = 5
    """Random trials before tpe, gp or cmaes model anything; studies here have tens of trials."""
    multivariate: bool = True
    """tpe: model parameters jointly, because a ratio's end means little without its start."""
    group: bool = True
    """tpe: group parameters that occur together, because the trials of a conditional space have no
    parameters in common otherwise."""
    population_size: int = Field(8, ge=2)
    """nsga2, nsga3, cmaes: trials per generation. pbt: members of the population."""
    interval: Count = 10
    """pbt: epochs of a step, after which members are compared."""
    exploit: float = Field(0.25, gt=0, le=0.5)
    """pbt: share of members that continue from one of the best; as many count as best."""
    perturb: PositiveShare = 0.1
    """pbt: largest change per step, as a share of the range."""
    suggest_ahead: int | None = Field(None, ge=0, le=64)
    """Suggestions made while trials run, so that no GPU waits for a slow sampler. null: 1, but 0
    where trials run one by one, because each then learns from all before."""

    @model_validator(mode="after")
    def _check_options_of_name(self) -> SamplerConfig:
        _check_options(self, self.name)
        return self


class PrunerConfig(Config):
    """Which Optuna pruner stops poor trials early, and the rungs at which a trial is scored."""

    name: Literal["median", "percentile", "halving", "hyperband", "patient", "wilcoxon", "none"] = (
        "median"
    )
    """median: worse than half of the earlier trials at the same rung. percentile: worse than
    another share of them. halving: not among the best of a rung (asynchronous, ASHA). hyperband:
    halving with several first rungs. patient: no gain for some rungs. wilcoxon: worse than the best
    trial on the same images, by a signed-rank test."""
    rungs: Count = 4
    """Scorings per trial, the last at full length."""
    spacing: Literal["even", "geometric"] = "even"
    """geometric: each rung is `reduction_factor` times the one before, as halving expects."""
    min_steps: NonNegativeInt = 400
    """Optimizer steps before any pruning; below about 400 steps rungs do not rank trials."""
    n_startup_trials: NonNegativeInt = 3
    """Complete trials before the first one may be pruned."""
    percentile: float = Field(50.0, gt=0, lt=100)
    """percentile: the best percentage that continues at each rung."""
    reduction_factor: int = Field(2, ge=2)
    """halving, hyperband: one in this many continues at each rung."""
    patience: NonNegativeInt = 1
    """patient: rungs without a gain before a trial is pruned."""
    min_delta: NonNegativeFloat = 0.0
    """patient: smallest difference that counts as a gain."""
    p_threshold: float = Field(0.1, gt=0, lt=1)
    """wilcoxon: p below which a trial is pruned."""
    metric: StudyObjective | None = None
    """Objective that is compared at rungs; required with several objectives. null: the first."""
    schedule: Literal["fixed", "compress"] = "fixed"
    """With a rising ratio an early rung has seen low ratios only. fixed: the schedule spans all
    epochs, and rungs are compared as they are. compress: the whole schedule is run up to each rung,
    so that every rung has seen all of it."""

    @model_validator(mode="after")
    def _check_options_of_name(self) -> PrunerConfig:
        _check_options(self, self.spacing, self.name)
        return self


class BudgetConfig(Config):
    """When a study ends: at the first limit that all its runs together reach. Running trials end
    at their next rung.

    With `trials`, running trials are finished. Baselines do not count in `trials`; they count in
    the other limits.
    """

    trials: Count = 16
    """Trials of the search, including pruned and failed ones."""
    hours: PositiveFloat | None = None
    """Hours during which the study runs, without pauses."""
    gpu_hours: PositiveFloat | None = None
    """Hours of GPUs held by trials."""
    epochs: Count | None = None
    """Epochs trained by all trials together."""


class StudyFaultToleranceConfig(FaultToleranceConfig):
    """How many failures a study survives; `max_failures` counts for each trial."""

    max_identical_failures: Count = 3
    """First trials that fail for the same reason before the study stops, because such a reason is
    not in the searched settings."""
    pause_minutes: PositiveFloat = 60
    """Minutes that a study pauses, in all between two scored rungs, because a trial could not write
    its folder for `storage_minutes`. An hour is enough to make room. Then the study ends, and the
    same command resumes it. No trial fails."""

    def for_trial(self) -> FaultToleranceConfig:
        """Return the part that holds for one trial."""
        return FaultToleranceConfig(
            **self.model_dump(exclude={"max_identical_failures", "pause_minutes"})
        )
