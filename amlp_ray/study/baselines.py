"""Configs of the baselines and ablations of a study."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from amlp_ray.config import (
    ABOUT,
    CONTROLS,
    STEPS,
    VARIANTS,
    Fixed,
    PretrainSettings,
    StudySettings,
    arm_names,
)
from amlp_ray.config.base import build
from amlp_ray.config.overrides import merged, nested
from amlp_ray.data.dataset import PatchDataset
from amlp_ray.errors import SettingsError
from amlp_ray.study.rungs import schedule, with_schedule

BySeed = Callable[[int], PretrainSettings]


METHOD = (
    "variant",
    "objective",
    "ratio",
    "selection",
    "loss",
)  # what makes an arm; the rest is the study's


@dataclass(frozen=True)
class ArmPlan:
    """A baseline of a study: what it is, and its settings by seed."""

    name: str
    about: str  # a phrase, such as "plain MAE"; empty for settings of one's own
    diagnosis: bool  # uses true masks: shown, and never part of a verdict or a best
    settings: BySeed


def arm_plans(settings: StudySettings) -> list[ArmPlan]:
    """All arms of a study, in order. Controls change one thing of the study's own `pretrain`.

    Raises:
        SettingsError: naming every arm that cannot be had with the study's model, or means nothing there.
    """
    plans, faults = [], []
    for name in arm_names(settings.arms):
        try:
            plans.append(arm_plan(settings, name))
        except SettingsError as error:
            faults.append(str(error))
    if faults:
        raise SettingsError(" ".join(faults))
    return plans


def arm_plan(settings: StudySettings, name: str, reference: BySeed | None = None) -> ArmPlan:
    """One arm of a study; `reference` is what a control changes one thing of, the study's own `pretrain` if not given.

    Raises:
        SettingsError: as `arm_plans`.
    """

    def of_seed(seed: int) -> PretrainSettings:
        if name in CONTROLS:
            own = own_settings(settings, seed) if reference is None else reference(seed)
            return controlled(own, name, f"{settings.name}, arm {name}")
        return with_schedule(arm_settings(settings, name, seed=seed), settings.pruner)

    return ArmPlan(name, ABOUT.get(name, ""), of_seed(0).selection.uses_truth, of_seed)


def check_arms(settings: StudySettings, dataset: PatchDataset) -> None:
    """Raise SettingsError for arms that cannot be had, such as an oracle over images without masks.

    Args:
        dataset: that is trained on.
    """
    for plan in arm_plans(settings):
        counts = dataset.manifest.counts["train"]
        if plan.diagnosis and counts.labelled < counts.images:
            raise SettingsError(
                f"{settings.name}: arm {plan.name} aims by true lesions, but {counts.images - counts.labelled} of "
                f"{counts.images} training images in {dataset.path} have no mask; take it out of arms, or add masks."
            )


def own_settings(settings: StudySettings, seed: int) -> PretrainSettings:
    """The study's own `pretrain`, with what its space sets for every trial, as a trial would run it."""
    return with_schedule(settings.trial(_always(settings), seed=seed), settings.pruner)


def controlled(reference: PretrainSettings, control: str, source: str) -> PretrainSettings:
    """`reference` with the one thing changed that a control is about.

    Raises:
        SettingsError: where that changes nothing, so that the control would answer no question.
    """
    selection, change = reference.selection, CONTROLS[control].change
    if reference.objective != "reconstruction":
        raise SettingsError(
            f"{source} changes how images are masked, but objective {reference.objective} masks none."
        )
    if control in ("equal-mean", "random-ratio"):
        ratios = schedule(reference)
        mean = round(fmean(ratios), 4)
        if min(ratios) == max(ratios):
            raise SettingsError(
                f"{source} is about a ratio that changes, but this one is {mean:g} throughout."
            )
        if control == "random-ratio" and reference.ratio.shape == "random":
            raise SettingsError(f"{source} draws the ratio at random, which is done already.")
        low, high = (mean, mean) if control == "equal-mean" else (min(ratios), max(ratios))
        change = merged(change, {"ratio": {"start": low, "end": high}})
    if control == "random-cluster" and not (selection.uses_clusters and selection.mode != "parts"):
        raise SettingsError(
            f"{source} is about which cluster is the lesion, but this mask is aimed at none."
        )
    if control == "random-cluster" and selection.rule == "random":
        raise SettingsError(f"{source} names a cluster at random, which is done already.")
    if control == "oracle" and selection.uses_truth:
        raise SettingsError(f"{source} aims by true lesions, which is done already.")
    return build(PretrainSettings, merged(reference.model_dump(), change), source)


def arm_settings(settings: StudySettings, arm: str, *, seed: int) -> PretrainSettings:
    """Settings of an arm that is no control: the study's model, optimiser and length, but the arm's own method.

    What the study fixes of objective, ratio, selection, loss and `model.encode` belongs to the searched method and
    would change what `mae` means.

    Raises:
        SettingsError: where the arm cannot be had with the study's model.
    """
    own = arm_names(settings.arms).get(arm) or STEPS.get(arm) or {}
    variant = arm if arm in VARIANTS else own.get("variant", "amlp")
    given = merged(settings.pretrain, nested(_always(settings)))
    shared = {key: value for key, value in given.items() if key not in METHOD}
    if isinstance(model := shared.get("model"), Mapping):
        # SimMIM's linear head is its method; the others need a decoder, as deep as the study says.
        dropped = (
            ("encode", "decoder_depth")
            if variant == "simmim" or model.get("decoder_depth") == 0
            else ("encode",)
        )
        shared["model"] = {key: value for key, value in model.items() if key not in dropped}
    if arm == "scratch":  # a random encoder, also where all others start from weights
        shared.pop("weights", None)
    values = merged(shared, own) | {"variant": variant, "seed": seed}
    return build(PretrainSettings, values, f"{settings.name}, arm {arm}")


def _always(settings: StudySettings) -> dict[str, Any]:
    """What the space sets and does not search, by dotted name."""
    space = {} if isinstance(settings.space, str) else settings.space
    return {
        name: fixed.value
        for name, fixed in space.items()
        if isinstance(fixed, Fixed) and not fixed.when
    }
