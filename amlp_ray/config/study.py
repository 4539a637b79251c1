"""Settings of a study: its question, its data, and until when; the rest is in `space.py` and `search.py`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from amlp_ray.config.base import Config, build
from amlp_ray.config.baselines import check_arm
from amlp_ray.config.evaluation import ProbeConfig, SegmentConfig
from amlp_ray.config.optimization import (
    BudgetConfig,
    Direction,
    PrunerConfig,
    SamplerConfig,
    StudyFaultToleranceConfig,
    StudyObjective,
)
from amlp_ray.config.overrides import merged, nested
from amlp_ray.config.pretrain import PretrainConfig
from amlp_ray.config.resources import ResourceConfig
from amlp_ray.config.search_space import Parameter, function_name
from amlp_ray.config.tracking import TrackingConfig

FUNCTION = re.compile(r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$")


def _dsc_alone() -> dict[StudyObjective, Direction]:
    return {"dsc": "maximize"}


class ConfirmConfig(Config):
    """The best trials and every baseline again, over several seeds, by both protocols, with one look at the test images."""

    top: int = Field(3, ge=1)  # best trials of the search
    seeds: int = Field(
        3, ge=2
    )  # of each; below 5 an interval over seeds is wide, and the report says so
    finetune: SegmentConfig = SegmentConfig()  # `seed` follows from the study's


class StudyConfig(Config):
    """One study: what is searched, by which rules, on what, and until when."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")  # of its folder among the runs too
    description: str = ""  # what it asks, for the report
    data: str | None = None  # path or URI of a patch dataset; --data gives it too
    eval_data: str | None = (
        None  # of another, whose labelled images score instead, such as a public set; none: data's own
    )
    seed: int = Field(0, ge=0, lt=2**63)  # those of sampler, trials and baselines follow from it
    # URL of a database; ${NAME} is taken from the environment, where passwords belong; none: a journal in the folder
    storage: str | None = None
    pretrain: dict[str, Any] = Field(
        default_factory=dict
    )  # settings of every trial, kept as given (see `trial`)
    # dotted names of pretrain settings; or `module:function` of a Python function that takes an Optuna trial
    space: dict[str, Parameter] | str = Field(default_factory=dict)
    require: tuple[str, ...] = ()  # what holds in every trial, such as `ratio.start <= ratio.end`
    probe: ProbeConfig = ProbeConfig()
    # several: a Pareto front instead of one best
    objectives: dict[StudyObjective, Direction] = Field(default_factory=_dsc_alone)
    # that a trial should keep, memory in GB
    limits: dict[Literal["seconds", "gpu_seconds", "memory"], float] = Field(default_factory=dict)
    sampler: SamplerConfig = SamplerConfig()
    pruner: PrunerConfig = PrunerConfig()
    budget: BudgetConfig = BudgetConfig()
    resources: ResourceConfig = ResourceConfig()
    fault_tolerance: StudyFaultToleranceConfig = StudyFaultToleranceConfig()
    tracking: TrackingConfig = (
        TrackingConfig()
    )  # of every trial, as a run of its own in a group of the study's
    # baselines, each trained as long as a trial: variants, controls, `ladder`, `leave-one-out` (see config/baselines.py), or
    # a mapping of a name to settings of its own
    baselines: tuple[str | dict[str, dict[str, Any]], ...] = ("scratch", "mae")
    baseline_seeds: int = Field(
        2, ge=1
    )  # repeats of each baseline: one run says nothing about noise
    confirm: ConfirmConfig = ConfirmConfig()
    equivalence_margin: float = Field(
        0.02, ge=0
    )  # DSC; smaller differences are noise at these sizes and called ties

    @model_validator(mode="before")
    @classmethod
    def _spell_out_fixed(cls, given: Any) -> Any:
        """`name: value` in a space stands for `name: {value: value}`; a function is kept by its name."""
        if isinstance(given, Mapping) and callable(given.get("space")):
            return {**given, "space": function_name(given["space"])}
        if not isinstance(given, Mapping) or not isinstance(given.get("space"), Mapping):
            return given
        space = {
            k: {"value": v} if isinstance(v, str | int | float) else v
            for k, v in given["space"].items()
        }
        return {**given, "space": space}

    @field_validator("name")
    @classmethod
    def _check_name(cls, given: str) -> str:
        if re.search(r"\.(baselines|confirm|v\d+)$", given):
            raise ValueError(
                f"{given!r} ends as the companions of a study do in a database; choose another name"
            )
        return given

    @field_validator("pretrain")
    @classmethod
    def _check_pretrain(cls, given: dict[str, Any]) -> dict[str, Any]:
        build(PretrainConfig, given, "pretrain")
        return given

    @field_validator("resources")
    @classmethod
    def _check_resources(cls, given: ResourceConfig) -> ResourceConfig:
        if given.elastic:
            raise ValueError(
                f"workers [{given.least_workers}, {given.most_workers}] follow the nodes, but a trial needs a number: "
                f"an elastic group counts what nodes hold, not what other trials use of it, and would wait for ever"
            )
        return given

    @field_validator("space")
    @classmethod
    def _check_space(cls, given: Any) -> Any:
        if isinstance(given, str) and not FUNCTION.match(given):
            raise ValueError(f"{given!r} is no module:function, such as my_spaces:space")
        return given

    @field_validator("storage")
    @classmethod
    def _check_storage(cls, given: str | None) -> str | None:
        if given is None:
            return None
        scheme = given.partition(":")[0].partition("+")[0]
        if scheme not in ("sqlite", "postgresql", "mysql") or "://" not in given:
            raise ValueError(
                "the URL must begin with sqlite://, postgresql:// or mysql://"
            )  # never shown: passwords
        address, _, query = given.partition("://")[2].partition("?")
        word = address.rpartition("@")[0].partition(":")[2]
        named = re.findall(
            r"(?i)(?:^|&)(?:password|passwd|pwd|passfile|sslpassword)=([^&]*)", query
        )
        if any(text and not re.fullmatch(r"\$\{\w+\}", text) for text in (word, *named)):
            raise ValueError(
                "a password stands in the URL; write ${NAME} there and set NAME in the environment"
            )
        return given

    @field_validator("baselines")
    @classmethod
    def _check_arms(cls, given: tuple[str | dict[str, dict[str, Any]], ...]) -> Any:
        names = [
            name
            for baseline in given
            for name in (baseline if isinstance(baseline, dict) else [baseline])
        ]
        if len(set(names)) < len(names):
            raise ValueError(
                f"each baseline is named once, not {', '.join(names)}; repeats are set by baseline_seeds"
            )
        for baseline in given:
            for name in baseline if isinstance(baseline, dict) else [baseline]:
                check_arm(name, baseline[name] if isinstance(baseline, dict) else None)
        return given

    @model_validator(mode="after")
    def _check_objectives(self) -> StudyConfig:
        if not self.objectives:
            raise ValueError("objectives names nothing; the default is {dsc: maximize}")
        wrong = [n for n, d in self.objectives.items() if (n in COSTS) != (d == "minimize")]
        if wrong:
            raise ValueError(
                f"objectives: {wrong[0]} is to be {'minimize' if wrong[0] in COSTS else 'maximize'}d"
            )
        several = len(self.objectives) > 1
        if self.pruner.name != "none" and several and self.pruner.metric is None:
            raise ValueError(
                f"pruner.metric must say which of {', '.join(self.objectives)} is compared at rungs, or pruner.name be "
                f"none"
            )
        if self.pruner.metric in COSTS:
            raise ValueError(
                f"pruner.metric {self.pruner.metric} is a cost that every rung adds to; name a score"
            )
        if several and self.sampler.name in ("cmaes", "pbt"):
            raise ValueError(
                f"sampler.name {self.sampler.name} takes one objective; tpe, nsga2 and nsga3 take several"
            )
        return self

    @property
    def metric(self) -> str:
        """The score that rungs are compared by and that `best` and the report go by."""
        return self.pruner.metric or next(
            (name for name in self.objectives if name not in COSTS), "dsc"
        )

    def trial(self, params: Mapping[str, Any], *, seed: int) -> PretrainConfig:
        """Return the settings of one trial: those of the study with `params` (dotted names) on top.

        Merged before they are resolved, so that a searched `variant` brings its own values along.
        """
        return build(
            PretrainConfig, merged(self.pretrain, nested({**params, "seed": seed})), self.name
        )


COSTS = ("seconds", "gpu_seconds", "memory")
