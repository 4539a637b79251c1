"""Configs of the baselines and ablations of a study."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from amlp_ray.config import (
    ABLATION_STEPS,
    ABLATIONS,
    BASELINE_DESCRIPTIONS,
    VARIANTS,
    Fixed,
    PretrainConfig,
    StudyConfig,
    baseline_names,
)
from amlp_ray.config.base import build
from amlp_ray.config.overrides import merge, nest
from amlp_ray.data.dataset import PatchDataset
from amlp_ray.errors import ConfigError
from amlp_ray.study.rungs import schedule, with_schedule

BySeed = Callable[[int], PretrainConfig]

# Settings that make a baseline what it is; all others are the study's.
METHOD = ("variant", "objective", "ratio", "selection", "loss")


@dataclass(frozen=True)
class BaselinePlan:
    """A baseline of a study."""

    name: str  # as `baselines` of the study names it
    # A phrase such as `plain MAE`; empty for a baseline of the user's own settings.
    description: str
    # Whether it sees true masks. It is shown then, and never part of a verdict or a best.
    uses_ground_truth: bool
    config: BySeed  # returns its settings for a seed


def baseline_plans(config: StudyConfig) -> list[BaselinePlan]:
    """Plan all baselines of a study, in order; ablations change the study's own `pretrain`.

    Raises:
        ConfigError: naming every baseline that does not fit the study's model or changes nothing.
    """
    plans = []
    errors = []
    for name in baseline_names(config.baselines):
        try:
            plans.append(baseline_plan(config, name))
        except ConfigError as error:
            errors.append(str(error))
    if errors:
        raise ConfigError(" ".join(errors))
    return plans


def baseline_plan(config: StudyConfig, name: str, reference: BySeed | None = None) -> BaselinePlan:
    """Plan one baseline of a study.

    Args:
        reference: settings that an ablation changes one thing of; by default the study's own.

    Raises:
        ConfigError: as `baseline_plans`.
    """

    def config_for_seed(seed: int) -> PretrainConfig:
        if name in ABLATIONS:
            original = study_config(config, seed) if reference is None else reference(seed)
            return ablated_config(original, name, f"{config.name}, baseline {name}")
        return with_schedule(baseline_config(config, name, seed=seed), config.pruner)

    return BaselinePlan(
        name=name,
        description=BASELINE_DESCRIPTIONS.get(name, ""),
        uses_ground_truth=config_for_seed(0).selection.uses_ground_truth,
        config=config_for_seed,
    )


def check_baselines(config: StudyConfig, dataset: PatchDataset) -> None:
    """Raise ConfigError for baselines that need true masks where training images have none."""
    counts = dataset.manifest.counts["train"]
    for plan in baseline_plans(config):
        if plan.uses_ground_truth and counts.labeled < counts.images:
            raise ConfigError(
                f"{config.name}: baseline {plan.name} uses true lesions, but "
                f"{counts.images - counts.labeled} of {counts.images} training images in "
                f"{dataset.path} have no mask; take it out of baselines, or add masks."
            )


def study_config(config: StudyConfig, seed: int) -> PretrainConfig:
    """Return the study's own `pretrain`, with what its space sets for every trial."""
    return with_schedule(config.trial(_fixed_settings(config), seed=seed), config.pruner)


def ablated_config(reference: PretrainConfig, ablation: str, source: str) -> PretrainConfig:
    """Return the reference with the one thing changed that an ablation asks about.

    Args:
        source: where the settings come from, for messages.

    Raises:
        ConfigError: the change changes nothing, so that the ablation answers no question.
    """
    selection = reference.selection
    change = ABLATIONS[ablation]
    if reference.objective != "reconstruction":
        raise ConfigError(
            f"{source} changes how images are masked, but objective {reference.objective} masks "
            f"none."
        )
    if ablation in ("equal-mean", "random-ratio"):
        change = merge(change, {"ratio": _ablated_ratio(reference, ablation, source)})
    if ablation == "random-cluster":
        if not selection.uses_clusters or selection.mode == "parts":
            raise ConfigError(
                f"{source} is about which cluster is the lesion, but these masks use none."
            )
        if selection.rule == "random":
            raise ConfigError(f"{source} names a cluster at random, which is done already.")
    if ablation == "oracle" and selection.uses_ground_truth:
        raise ConfigError(f"{source} uses true lesions, which is done already.")
    return build(PretrainConfig, merge(reference.model_dump(), change), source)


def baseline_config(config: StudyConfig, baseline: str, *, seed: int) -> PretrainConfig:
    """Return the settings of a baseline that is no ablation.

    Model, optimizer and length are the study's, the method is the baseline's. What the study sets
    of objective, ratio, selection, loss and `model.encode` belongs to the searched method and
    would change what `mae` means.

    Raises:
        ConfigError: the baseline does not fit the study's model.
    """
    changes = baseline_names(config.baselines).get(baseline) or ABLATION_STEPS.get(baseline) or {}
    variant = baseline if baseline in VARIANTS else changes.get("variant", "amlp")
    settings = merge(config.pretrain, nest(_fixed_settings(config)))
    shared = {key: value for key, value in settings.items() if key not in METHOD}
    if isinstance(model := shared.get("model"), Mapping):
        dropped = {"encode"}
        # SimMIM's linear head is its method; the others need a decoder, as deep as the study says.
        if variant == "simmim" or model.get("decoder_depth") == 0:
            dropped.add("decoder_depth")
        shared["model"] = {key: value for key, value in model.items() if key not in dropped}
    if baseline == "scratch":  # a random encoder, also where all others start from weights
        shared.pop("weights", None)
    values = merge(shared, changes) | {"variant": variant, "seed": seed}
    return build(PretrainConfig, values, f"{config.name}, baseline {baseline}")


def _ablated_ratio(reference: PretrainConfig, ablation: str, source: str) -> dict[str, float]:
    ratios = schedule(reference)
    low, high = min(ratios), max(ratios)
    mean = round(fmean(ratios), 4)
    if low == high:
        raise ConfigError(
            f"{source} is about a ratio that changes, but this one is {mean:g} throughout."
        )
    if ablation == "equal-mean":
        return {"start": mean, "end": mean}
    if reference.ratio.shape == "random":
        raise ConfigError(f"{source} draws the ratio at random, which is done already.")
    return {"start": low, "end": high}


def _fixed_settings(config: StudyConfig) -> dict[str, Any]:
    """Return what the space sets for every trial and does not search, by dotted name."""
    if isinstance(config.space, str):
        return {}
    fixed = {n: p for n, p in config.space.items() if isinstance(p, Fixed) and not p.when}
    return {name: parameter.value for name, parameter in fixed.items()}
