"""Settings of a study: its search space, sampler, pruner, budget, and arms."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, field_validator, model_validator

from amlp_ray.config.pretrain import PretrainSettings, Variant
from amlp_ray.config.scoring import ProbeSettings
from amlp_ray.settings import Settings, build, merged, nested


class SamplerSettings(Settings):
    """Which Optuna sampler proposes settings."""

    name: Literal["tpe", "random", "gp", "qmc"] = "tpe"  # tpe is multivariate and grouped, for conditional spaces
    startup: int = Field(5, ge=1)  # random trials before TPE models anything; studies here have tens of trials


class PrunerSettings(Settings):
    """Which Optuna pruner stops poor trials early, and the rungs at which a trial is scored."""

    # median: worse than half of the earlier trials at the same rung
    name: Literal["median", "percentile", "halving", "none"] = "median"
    rungs: int = Field(4, ge=1)  # scorings per trial, evenly spaced, the last at full length
    min_steps: int = Field(400, ge=0)  # no pruning earlier: rungs below about 400 optimiser steps do not rank
    startup: int = Field(3, ge=0)  # complete trials before the first one may be pruned
    percentile: float = Field(50.0, gt=0, lt=100)  # `percentile` keeps the best this many percent at each rung
    reduction: int = Field(2, ge=2)  # `halving` keeps 1 in this many


class BudgetSettings(Settings):
    """When a study ends; the first limit reached counts. Baseline arms come on top of `trials`."""

    trials: int = Field(16, ge=1)  # of the search, pruned and failed ones included
    hours: float | None = Field(None, gt=0)  # of this run; running trials finish


class ResourceSettings(Settings):
    """What one trial holds. One worker trains in the trial's own process, more in a Ray Train group."""

    workers: int = Field(1, ge=1)  # batch_size must be a multiple
    cpus_per_worker: float = Field(1, gt=0)  # threads of a worker too, rounded down
    gpus_per_worker: float = Field(0, ge=0)  # below 1: trials share a GPU
    concurrency: int | None = Field(None, ge=1)  # trials side by side; none: as many as the cluster holds


class Range(Settings):
    """A numeric parameter of a search space."""

    low: float  # inside the range of the setting itself
    high: float  # as low, and above it
    log: bool = False  # drawn on a log scale; needs low > 0 and no step
    step: float | None = Field(None, gt=0)  # none: any value between, or any integer
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

    choices: list[str | int | float | bool] = Field(min_length=1)  # each accepted by the setting itself
    when: dict[str, Any] | None = None  # as in a range


Parameter = Annotated[
    Annotated[Range, Tag("range")] | Annotated[Choice, Tag("choice")],
    Discriminator(lambda given: "choice" if isinstance(given, Choice) or "choices" in given else "range"),
]


class StudySettings(Settings):
    """One study: what is searched, by which rules, on what, and until when."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")  # of its folder among the runs too
    description: str = ""  # what it asks, for the report
    data: str | None = None  # path or URI of a patch dataset; --data gives it too
    labels: str | None = None  # of another, whose labelled images score instead, such as a public set; none: data's own
    seed: int = Field(0, ge=0, lt=2**63)  # those of sampler, trials and arms follow from it
    pretrain: dict[str, Any] = Field(default_factory=dict)  # settings of every trial, kept as given (see `trial`)
    space: dict[str, Parameter] = Field(default_factory=dict)  # dotted names of pretrain settings; seed is not searched
    probe: ProbeSettings = ProbeSettings()
    sampler: SamplerSettings = SamplerSettings()
    pruner: PrunerSettings = PrunerSettings()
    budget: BudgetSettings = BudgetSettings()
    resources: ResourceSettings = ResourceSettings()
    arms: tuple[Variant, ...] = ("scratch", "mae")  # baselines, each trained as long as a trial
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
