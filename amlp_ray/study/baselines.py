"""Configs of the baselines and ablations of a study."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from amlp_ray.config import (
    ABLATIONS,
    ABOUT,
    STEPS,
    VARIANTS,
    Fixed,
    PretrainConfig,
    StudyConfig,
    baseline_names,
)
from amlp_ray.config.base import build
from amlp_ray.config.overrides import merged, nested
from amlp_ray.data.dataset import PatchDataset
from amlp_ray.errors import ConfigError
from amlp_ray.study.rungs import schedule, with_schedule

BySeed = Callable[[int], PretrainConfig]


METHOD = (
    "variant",
    "objective",
    "ratio",
    "selection",
    "loss",
)  # what makes a baseline; the rest is the study's


@dataclass(frozen=True)
class BaselinePlan:
    """A baseline of a study: what it is, and its settings by seed."""

    name: str
    about: str  # a phrase, such as "plain MAE"; empty for settings of one's own
    diagnosis: bool  # uses true masks: shown, and never part of a verdict or a best
    config: BySeed


def baseline_plans(config: StudyConfig) -> list[BaselinePlan]:
    """All baselines of a study, in order. Controls change one thing of the study's own `pretrain`.

    Raises:
        ConfigError: naming every baseline that cannot be had with the study's model, or means nothing there.
    """
    plans, faults = [], []
    for name in baseline_names(config.baselines):
        try:
            plans.append(baseline_plan(config, name))
        except ConfigError as error:
            faults.append(str(error))
    if faults:
        raise ConfigError(" ".join(faults))
    return plans


def baseline_plan(config: StudyConfig, name: str, reference: BySeed | None = None) -> BaselinePlan:
    """One baseline of a study; `reference` is what a control changes one thing of, the study's own `pretrain` if not given.

    Raises:
        ConfigError: as `baseline_plans`.
    """

    def of_seed(seed: int) -> PretrainConfig:
        if name in ABLATIONS:
            own = study_config(config, seed) if reference is None else reference(seed)
            return ablated_config(own, name, f"{config.name}, baseline {name}")
        return with_schedule(baseline_config(config, name, seed=seed), config.pruner)

    return BaselinePlan(name, ABOUT.get(name, ""), of_seed(0).selection.uses_truth, of_seed)


def check_baselines(config: StudyConfig, dataset: PatchDataset) -> None:
    """Raise ConfigError for baselines that cannot be had, such as an oracle over images without masks.

    Args:
        dataset: that is trained on.
    """
    for plan in baseline_plans(config):
        counts = dataset.manifest.counts["train"]
        if plan.diagnosis and counts.labeled < counts.images:
            raise ConfigError(
                f"{config.name}: baseline {plan.name} aims by true lesions, but {counts.images - counts.labeled} of "
                f"{counts.images} training images in {dataset.path} have no mask; take it out of baselines, or add masks."
            )


def study_config(config: StudyConfig, seed: int) -> PretrainConfig:
    """The study's own `pretrain`, with what its space sets for every trial, as a trial would run it."""
    return with_schedule(config.trial(_always(config), seed=seed), config.pruner)


def ablated_config(reference: PretrainConfig, control: str, source: str) -> PretrainConfig:
    """`reference` with the one thing changed that a control is about.

    Raises:
        ConfigError: where that changes nothing, so that the control would answer no question.
    """
    selection, change = reference.selection, ABLATIONS[control].change
    if reference.objective != "reconstruction":
        raise ConfigError(
            f"{source} changes how images are masked, but objective {reference.objective} masks none."
        )
    if control in ("equal-mean", "random-ratio"):
        ratios = schedule(reference)
        mean = round(fmean(ratios), 4)
        if min(ratios) == max(ratios):
            raise ConfigError(
                f"{source} is about a ratio that changes, but this one is {mean:g} throughout."
            )
        if control == "random-ratio" and reference.ratio.shape == "random":
            raise ConfigError(f"{source} draws the ratio at random, which is done already.")
        low, high = (mean, mean) if control == "equal-mean" else (min(ratios), max(ratios))
        change = merged(change, {"ratio": {"start": low, "end": high}})
    if control == "random-cluster" and not (selection.uses_clusters and selection.mode != "parts"):
        raise ConfigError(
            f"{source} is about which cluster is the lesion, but this mask is aimed at none."
        )
    if control == "random-cluster" and selection.rule == "random":
        raise ConfigError(f"{source} names a cluster at random, which is done already.")
    if control == "oracle" and selection.uses_truth:
        raise ConfigError(f"{source} aims by true lesions, which is done already.")
    return build(PretrainConfig, merged(reference.model_dump(), change), source)


def baseline_config(config: StudyConfig, baseline: str, *, seed: int) -> PretrainConfig:
    """Settings of a baseline that is no control: the study's model, optimiser and length, but the baseline's own method.

    What the study fixes of objective, ratio, selection, loss and `model.encode` belongs to the searched method and
    would change what `mae` means.

    Raises:
        ConfigError: where the baseline cannot be had with the study's model.
    """
    own = baseline_names(config.baselines).get(baseline) or STEPS.get(baseline) or {}
    variant = baseline if baseline in VARIANTS else own.get("variant", "amlp")
    given = merged(config.pretrain, nested(_always(config)))
    shared = {key: value for key, value in given.items() if key not in METHOD}
    if isinstance(model := shared.get("model"), Mapping):
        # SimMIM's linear head is its method; the others need a decoder, as deep as the study says.
        dropped = (
            ("encode", "decoder_depth")
            if variant == "simmim" or model.get("decoder_depth") == 0
            else ("encode",)
        )
        shared["model"] = {key: value for key, value in model.items() if key not in dropped}
    if baseline == "scratch":  # a random encoder, also where all others start from weights
        shared.pop("weights", None)
    values = merged(shared, own) | {"variant": variant, "seed": seed}
    return build(PretrainConfig, values, f"{config.name}, baseline {baseline}")


def _always(config: StudyConfig) -> dict[str, Any]:
    """What the space sets and does not search, by dotted name."""
    space = {} if isinstance(config.space, str) else config.space
    return {
        name: fixed.value
        for name, fixed in space.items()
        if isinstance(fixed, Fixed) and not fixed.when
    }
