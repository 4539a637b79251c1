"""Settings of a study: its question, its data, its search and its end."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, NonNegativeFloat, field_validator, model_validator

from amlp_ray.config.base import Config, Count, build
from amlp_ray.config.baselines import check_baseline
from amlp_ray.config.evaluation import ProbeConfig, SegmentConfig
from amlp_ray.config.optimization import (
    COST_OBJECTIVES,
    BudgetConfig,
    Direction,
    PrunerConfig,
    SamplerConfig,
    StudyFaultToleranceConfig,
    StudyObjective,
)
from amlp_ray.config.overrides import merge, nest
from amlp_ray.config.pretrain import PretrainConfig
from amlp_ray.config.resources import ResourceConfig
from amlp_ray.config.search_space import Parameter, function_name
from amlp_ray.config.tracking import TrackingConfig

_FUNCTION_NAME = re.compile(r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$")
_URL_PASSWORD = re.compile(r"(?i)(?:^|&)(?:password|passwd|pwd|passfile|sslpassword)=([^&]*)")
_VARIABLE = re.compile(r"\$\{\w+\}")


def _maximize_dsc() -> dict[StudyObjective, Direction]:
    return {"dsc": "maximize"}


class ConfirmConfig(Config):
    """Train the best trials and every baseline again over several seeds, score them by both
    protocols, and open the test images once."""

    top: Count = 3
    """Number of best trials of the search."""
    seeds: int = Field(3, ge=2)
    """Runs of each. Below 5 an interval over seeds is wide, and the report says so."""
    finetune: SegmentConfig = SegmentConfig()
    """Settings of fine-tuning; its `seed` follows from the study's."""


def check_study_name(name: str) -> None:
    """Raise ValueError if a study cannot have a name."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", name):
        raise ValueError(
            f"{name!r} is no name of a study; take letters, digits, `_`, `.` and `-`, beginning "
            f"with a letter or digit"
        )
    if re.search(r"\.(baselines|confirm|v\d+)$", name):
        raise ValueError(
            f"{name!r} ends as the companions of a study do in a database; choose another name"
        )


def check_sqlite_url(url: str) -> None:
    """Raise ValueError if a SQLite URL names no file."""
    address, _, query = url.partition("://")[2].partition("?")
    path = address.removeprefix("/").strip()
    if path == ":memory:" or address == "" or "mode=memory" in query.replace(" ", ""):
        raise ValueError(
            "a database in memory is gone with its process, and no other sees it; name a file, as "
            "in sqlite:///trials.db, or leave storage out"
        )
    if not address.startswith("/") or path == "" or path.startswith("file:") or path[-1] == "/":
        raise ValueError(
            "the URL names no SQLite file; write sqlite:///trials.db for a file in the study's "
            "folder, or sqlite:////data/trials.db for one named from / on"
        )


class StudyConfig(Config):
    """One study: what is searched, how, on which data, and when it ends."""

    name: str
    """Name of the study and of its folder: letters, digits, `_`, `.` and `-`, beginning with a
    letter or digit."""
    description: str = ""
    """Question of the study, for the report."""
    data: str | None = None
    """Path or URI of a patch dataset; --data gives it too."""
    eval_data: str | None = None
    """Path or URI of another dataset whose labeled images score the trials, such as a public set.
    null: the labeled images of `data`."""
    seed: int = Field(0, ge=0, lt=2**63)
    """Seed from which those of sampler, trials and baselines follow."""
    storage: str | None = None
    """URL of a database. ${NAME} is taken from the environment, where passwords belong. A relative
    SQLite file, as in sqlite:///trials.db, lies in the study's folder. null: a journal there."""
    pretrain: dict[str, Any] = Field(default_factory=dict)
    """Settings of every trial."""
    space: dict[str, Parameter] | str = Field(default_factory=dict)
    """Searched settings by dotted name; or `module:function` of a Python function that takes an
    Optuna trial."""
    require: tuple[str, ...] = ()
    """Conditions that hold in every trial, such as `ratio.start <= ratio.end`."""
    probe: ProbeConfig = ProbeConfig()
    """Scoring of trials."""
    objectives: dict[StudyObjective, Direction] = Field(default_factory=_maximize_dsc)
    """What is optimized. Several objectives give a Pareto front instead of one best trial."""
    limits: dict[Literal["seconds", "gpu_seconds", "memory"], float] = Field(default_factory=dict)
    """Upper limits that a trial should keep; memory in GB."""
    sampler: SamplerConfig = SamplerConfig()
    """What suggests the settings of trials."""
    pruner: PrunerConfig = PrunerConfig()
    """What stops poor trials early."""
    budget: BudgetConfig = BudgetConfig()
    """When the study ends."""
    resources: ResourceConfig = ResourceConfig()
    """What each trial runs on."""
    fault_tolerance: StudyFaultToleranceConfig = StudyFaultToleranceConfig()
    """How many failures the study survives."""
    tracking: TrackingConfig = TrackingConfig()
    """Where trials are logged, each as a run in a group of the study's name."""
    baselines: tuple[str | dict[str, dict[str, Any]], ...] = ("scratch", "mae")
    """Baselines, each trained as long as a trial: variants, ablations, `ladder`, `leave-one-out`
    (see config/baselines.py), or a mapping of a name to settings of its own."""
    baseline_seeds: Count = 2
    """Runs of each baseline. One run says nothing about noise."""
    confirm: ConfirmConfig = ConfirmConfig()
    """Repeated runs of the best trials and the baselines."""
    equivalence_margin: NonNegativeFloat = 0.02
    """Difference in DSC below which two results count as a tie. Smaller differences are noise at
    these dataset sizes."""

    @model_validator(mode="before")
    @classmethod
    def _expand_space(cls, values: Any) -> Any:
        """Read `name: value` in a space as `name: {value: value}`, and a function by its name."""
        if not isinstance(values, Mapping):
            return values
        space = values.get("space")
        if callable(space):
            return {**values, "space": function_name(space)}
        if not isinstance(space, Mapping):
            return values
        expanded = {}
        for name, parameter in space.items():
            is_value = isinstance(parameter, str | int | float)
            expanded[name] = {"value": parameter} if is_value else parameter
        return {**values, "space": expanded}

    @field_validator("name")
    @classmethod
    def _check_name(cls, name: str) -> str:
        check_study_name(name)
        return name

    @field_validator("pretrain")
    @classmethod
    def _check_pretrain(cls, values: dict[str, Any]) -> dict[str, Any]:
        build(PretrainConfig, values, "pretrain")
        return values

    @field_validator("resources")
    @classmethod
    def _check_resources(cls, resources: ResourceConfig) -> ResourceConfig:
        if resources.is_elastic:
            workers = f"[{resources.min_workers}, {resources.max_workers}]"
            raise ValueError(
                f"workers {workers} follow the nodes, but a trial needs a number: an elastic group "
                f"counts what nodes hold, not what other trials use of it, and would wait for ever"
            )
        return resources

    @field_validator("space")
    @classmethod
    def _check_space(cls, space: Any) -> Any:
        if isinstance(space, str) and not _FUNCTION_NAME.match(space):
            raise ValueError(f"{space!r} is no module:function, such as my_spaces:space")
        return space

    @field_validator("storage")
    @classmethod
    def _check_storage(cls, url: str | None) -> str | None:
        """Refuse other databases, and passwords; no message repeats the URL."""
        if url is None:
            return None
        scheme = url.partition(":")[0].partition("+")[0]
        if scheme not in ("sqlite", "postgresql", "mysql") or "://" not in url:
            raise ValueError("the URL must begin with sqlite:///, postgresql:// or mysql://")
        if scheme == "sqlite":
            check_sqlite_url(url)
        rest = url.partition("://")[2]
        if "@" in rest.partition("?")[2].partition("&")[0].partition("=")[0]:
            raise ValueError("a ? stands before the @; write the user or password as ${NAME}")
        address, _, query = rest.partition("?")
        password = address.rpartition("@")[0].partition(":")[2]
        for text in (password, *_URL_PASSWORD.findall(query)):
            if text and not _VARIABLE.fullmatch(text):
                raise ValueError(
                    "a password stands in the URL; write ${NAME} there and set NAME in the "
                    "environment"
                )
        return url

    @field_validator("baselines")
    @classmethod
    def _check_baselines(cls, baselines: tuple[str | dict[str, dict[str, Any]], ...]) -> Any:
        configs: list[tuple[str, dict[str, Any] | None]] = []
        for baseline in baselines:
            if isinstance(baseline, dict):
                configs += baseline.items()
            else:
                configs.append((baseline, None))
        names = [name for name, _ in configs]
        if len(set(names)) < len(names):
            raise ValueError(
                f"each baseline is named once, not {', '.join(names)}; repeats are set by "
                f"baseline_seeds"
            )
        for name, config in configs:
            check_baseline(name, config)
        return baselines

    @model_validator(mode="after")
    def _check_objectives(self) -> StudyConfig:
        if not self.objectives:
            raise ValueError("objectives names nothing; the default is {dsc: maximize}")
        for name, direction in self.objectives.items():
            expected = "minimize" if name in COST_OBJECTIVES else "maximize"
            if direction != expected:
                raise ValueError(f"objectives: {name} is to be {expected}d")
        if self.pruner.metric in COST_OBJECTIVES:
            raise ValueError(
                f"pruner.metric {self.pruner.metric} is a cost that every rung adds to; name a "
                f"score"
            )
        if len(self.objectives) > 1:
            self._check_several_objectives()
        return self

    def _check_several_objectives(self) -> None:
        if self.pruner.name != "none" and self.pruner.metric is None:
            raise ValueError(
                f"pruner.metric must say which of {', '.join(self.objectives)} is compared at "
                f"rungs, or pruner.name be none"
            )
        if self.sampler.name in ("cmaes", "pbt"):
            raise ValueError(
                f"sampler.name {self.sampler.name} takes one objective; tpe, nsga2 and nsga3 take "
                f"several"
            )

    @property
    def metric(self) -> str:
        """The score that rungs, `best` and the report compare trials by."""
        if self.pruner.metric:
            return self.pruner.metric
        scores = [name for name in self.objectives if name not in COST_OBJECTIVES]
        return scores[0] if scores else "dsc"

    def trial(self, params: Mapping[str, Any], *, seed: int) -> PretrainConfig:
        """Return the settings of one trial: those of the study updated with `params`.

        They are merged before they are validated, so that a searched `variant` brings its own
        values.

        Args:
            params: searched settings, by dotted name.
            seed: of the trial.
        """
        values = merge(self.pretrain, nest({**params, "seed": seed}))
        return build(PretrainConfig, values, self.name)
