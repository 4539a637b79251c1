from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from amlp_ray.config import (
    ABOUT,
    CONTROLS,
    GROUPS,
    STEPS,
    VARIANTS,
    PretrainSettings,
    PrunerSettings,
    StudySettings,
)
from amlp_ray.config.base import build
from amlp_ray.data.dataset import PatchDataset
from amlp_ray.errors import SettingsError
from amlp_ray.study.baselines import (
    arm_plan,
    arm_plans,
    arm_settings,
    check_arms,
    controlled,
    own_settings,
)
from amlp_ray.study.rungs import prunable_rungs, rung_epochs, schedule, with_schedule


def study(**pretrain: Any) -> StudySettings:
    return StudySettings.model_validate({"name": "s", "pretrain": pretrain})


def with_arms(*arms: Any, **pretrain: Any) -> StudySettings:
    return StudySettings.model_validate({"name": "s", "pretrain": pretrain, "arms": arms})


def amlp(**given: Any) -> PretrainSettings:
    return PretrainSettings.model_validate({"epochs": 20, **given})


# Rungs


@pytest.mark.parametrize("spacing", ["even", "geometric"])
@pytest.mark.parametrize("epochs", [1, 2, 7, 70, 100])
@pytest.mark.parametrize("rungs", [1, 3, 8])
def test_rungs_rise_to_full_length_and_are_at_most_as_many_as_asked(
    spacing: str, epochs: int, rungs: int
) -> None:
    pruner = PrunerSettings.model_validate({"rungs": rungs, "spacing": spacing})
    found = rung_epochs(epochs, pruner)
    assert found[-1] == epochs
    assert found[0] >= 1
    assert list(found) == sorted(set(found))
    assert len(found) <= rungs


def test_geometric_rungs_are_reduction_times_the_one_before() -> None:
    pruner = PrunerSettings(rungs=3, spacing="geometric", reduction=3)
    assert rung_epochs(90, pruner) == (10, 30, 90)


def test_prunable_rungs_of_a_geometric_spacing_lie_past_the_first_steps() -> None:
    pruner = PrunerSettings(rungs=4, spacing="geometric", min_steps=100)
    assert prunable_rungs(amlp(epochs=80, batch_size=10), pruner, images=50) == (20, 40)


def test_a_compressed_schedule_is_run_whole_up_to_every_rung() -> None:
    pruner = PrunerSettings(rungs=2, schedule="compress")
    given = amlp(ratio={"start": 0.2, "end": 0.6})
    found = schedule(with_schedule(given, pruner))
    assert found[9] == found[19] == 0.6
    assert schedule(given)[9] < 0.6
    assert with_schedule(given, PrunerSettings(rungs=2)) == given
    assert with_schedule(amlp(variant="scratch"), pruner).ratio.rungs == ()


# Arms


@pytest.mark.parametrize("arm", VARIANTS)
@pytest.mark.parametrize(
    "searched",
    [
        {"variant": "simsiam"},
        {"objective": "simsiam"},
        {"variant": "simmim"},
        {"model": {"encode": "all", "decoder_depth": 0, "width": 48}},
        {"model": {"decoder_depth": 2}},
        {"ratio": {"start": 0.1}, "selection": {"mode": "soft"}, "loss": {"norm_pix": True}},
    ],
)
def test_an_arm_is_its_variant_whatever_method_a_study_searches(
    arm: str, searched: dict[str, Any]
) -> None:
    found = arm_settings(study(**searched), arm, seed=3)
    plain = arm_settings(study(), arm, seed=3)
    assert (found.variant, found.seed) == (arm, 3)
    for part in ("objective", "ratio", "selection", "loss"):
        assert getattr(found, part) == getattr(plain, part)
    assert found.model.encode == plain.model.encode
    assert (found.model.decoder_depth == 0) == (arm == "simmim")


def test_an_arm_shares_model_and_length_with_the_study() -> None:
    found = arm_settings(study(epochs=7, model={"width": 48, "decoder_depth": 2}), "mae", seed=0)
    assert (found.epochs, found.model.width, found.model.decoder_depth) == (7, 48, 2)


def test_scratch_is_a_random_encoder_where_all_others_start_from_weights() -> None:
    given = study(weights="/w.safetensors")
    assert arm_settings(given, "mae", seed=0).weights == "/w.safetensors"
    assert arm_settings(given, "scratch", seed=0).weights is None


def test_what_the_space_sets_for_every_trial_is_set_for_arms_but_for_the_method() -> None:
    space = {
        "epochs": 9,
        "model.width": {"value": 48},
        "ratio.start": 0.2,
        "lr": {"value": 0.5, "when": {"epochs": 1}},
    }
    settings = StudySettings.model_validate(
        {"name": "s", "space": space, "arms": ["mae", "equal-mean"]}
    )
    mae, mean = (plan.settings(0) for plan in arm_plans(settings))
    assert (mae.epochs, mae.model.width, mae.ratio.start) == (9, 48, 0.75)
    assert mae.lr == PretrainSettings().lr
    assert mean.epochs == 9
    assert mean.ratio.start == pytest.approx(np.mean(np.linspace(0.2, 0.75, 9)), abs=1e-4)


def test_arms_come_in_order_each_once_groups_spelt_out() -> None:
    plans = arm_plans(
        with_arms("scratch", "leave-one-out", "ladder", {"mine": {"loss": {"gamma": 0.5}}})
    )
    names = [plan.name for plan in plans]
    assert names[0] == "scratch"
    assert names[1:6] == list(GROUPS["leave-one-out"])
    assert names[6:-1] == [name for name in GROUPS["ladder"] if name not in names[:6]]
    assert names[-1] == "mine"
    assert len(set(names)) == len(names)


def test_every_arm_that_has_a_name_can_be_had_and_says_what_it_is() -> None:
    names = [*VARIANTS, *CONTROLS, *STEPS]
    plans = arm_plans(with_arms(*names, epochs=5))
    assert [plan.name for plan in plans] == names
    assert all(plan.settings(4).seed == 4 and plan.settings(4).epochs == 5 for plan in plans)
    assert [plan.name for plan in plans if plan.diagnosis] == ["oracle"]
    assert {plan.name for plan in plans if plan.about} == set(names) == ABOUT.keys()


def test_the_ladder_leads_from_mae_to_amlp_one_part_at_a_time() -> None:
    found = {plan.name: plan.settings(0) for plan in arm_plans(with_arms("ladder"))}
    aimed = {name: s.selection.mode != "random" for name, s in found.items()}
    rising = {name: s.ratio.start < s.ratio.end for name, s in found.items()}
    weighted = {name: s.loss.weighting != "none" for name, s in found.items()}
    category = {name: s.loss.ccl_weight > 0 for name, s in found.items()}
    for name in found:
        added = (
            {"mps", "amr", "rrl", "ccl"} - set(name.split("-"))
            if name.startswith("amlp")
            else set(name.split("+"))
        )
        has = ["mps" in added, "amr" in added, "rrl" in added, "ccl" in added]
        assert has == [aimed[name], rising[name], weighted[name], category[name]], name


def test_no_two_steps_of_an_ablation_are_the_same_run() -> None:
    plans = arm_plans(with_arms("scratch", "ladder", "leave-one-out"))
    methods = [
        plan.settings(0).model_copy(update={"variant": "amlp"}).model_dump_json() for plan in plans
    ]
    assert len(set(methods)) == len(plans) == 11


def test_leave_one_out_is_amlp_less_one_part_each() -> None:
    found = {plan.name: plan.settings(0) for plan in arm_plans(with_arms("leave-one-out"))}
    whole = found.pop("amlp").model_dump()
    assert found["amlp-mps"].selection.mode == "random"
    assert found["amlp-amr"].ratio.start == found["amlp-amr"].ratio.end
    assert found["amlp-rrl"].loss.weighting == "none"
    assert found["amlp-ccl"].loss.ccl_weight == 0
    parts = {"amlp-mps": "selection", "amlp-amr": "ratio", "amlp-rrl": "loss", "amlp-ccl": "loss"}
    for name, part in parts.items():
        changed = [key for key, value in found[name].model_dump().items() if value != whole[key]]
        assert changed == [part], name


def test_settings_of_ones_own_lie_over_the_study_s_model_and_no_method() -> None:
    own = {"variant": "mae", "ratio": {"start": 0.4, "end": 0.4}, "model": {"depth": 2}}
    settings = with_arms({"mine": own}, epochs=6, model={"width": 48}, selection={"mode": "soft"})
    (plan,) = arm_plans(settings)
    found = plan.settings(2)
    assert (found.variant, found.selection.mode, found.ratio.start) == ("mae", "random", 0.4)
    assert (found.epochs, found.model.width, found.model.depth, found.seed) == (6, 48, 2, 2)
    assert not plan.diagnosis


def test_an_oracle_of_ones_own_is_a_diagnosis_too() -> None:
    (plan,) = arm_plans(with_arms({"mine": {"selection": {"rule": "oracle"}}}))
    assert plan.diagnosis


@pytest.mark.parametrize(
    ("arm", "told"),
    [
        ({"mae": {"epochs": 3}}, "is an arm already"),
        ({"mine": {"epochs": 3}}, "'mine' sets epochs, but arms are trained as trials are"),
        ({"mine": {"seed": 3}}, "'mine' sets seed"),
        ({"mine": {"ratio": {"strat": 3}}}, r"unknown setting 'ratio\.strat'"),
        ({"../mine": {}}, "names a folder"),
        ({"trial-7": {}}, "names a folder"),
        ("laddr", "the nearest is ladder"),
    ],
)
def test_arms_that_mean_nothing_are_refused_with_the_settings(arm: Any, told: str) -> None:
    with pytest.raises(SettingsError, match=told):
        build(StudySettings, {"name": "s", "arms": [arm]}, "s.yaml")


def test_repeats_of_arms_share_seeds_and_nothing_else_of_the_seed_enters() -> None:
    for plan in arm_plans(with_arms("mae", "ladder", "equal-mean")):
        one, other = plan.settings(1), plan.settings(2)
        assert one.model_copy(update={"seed": 2}) == other


# Controls


@pytest.mark.parametrize(
    "shape", ["linear", "cosine", "power", "step", "exponential", "random", "points"]
)
@pytest.mark.parametrize("per", ["epoch", "step"])
def test_equal_mean_has_the_mean_of_the_schedule_throughout(shape: str, per: str) -> None:
    ratio = {
        "start": 0.2,
        "end": 0.7,
        "shape": shape,
        "per": per,
        "power": 2.5,
        "points": [[0, 0.2], [0.3, 0.7]],
    }
    given = amlp(ratio=ratio)
    found = controlled(given, "equal-mean", "s")
    assert set(schedule(found)) == {found.ratio.start}
    assert np.mean(schedule(found)) == pytest.approx(np.mean(schedule(given)), abs=1e-4)
    assert found.model_copy(update={"ratio": given.ratio}) == given


def test_equal_mean_of_a_compressed_schedule_is_that_of_what_is_run() -> None:
    given = with_schedule(
        amlp(ratio={"start": 0.2, "end": 0.6}), PrunerSettings(rungs=4, schedule="compress")
    )
    assert np.mean(schedule(controlled(given, "equal-mean", "s"))) == pytest.approx(
        np.mean(schedule(given)), abs=1e-4
    )


def test_random_ratio_draws_between_the_ends_of_the_schedule() -> None:
    given = amlp(epochs=50, ratio={"shape": "points", "points": [[0, 0.6], [0.5, 0.3], [1, 0.4]]})
    found = controlled(given, "random-ratio", "s")
    ratios = schedule(found)
    assert found.ratio.shape == "random"
    assert (found.ratio.start, found.ratio.end) == (min(schedule(given)), max(schedule(given)))
    assert len(set(ratios)) == 50
    assert np.mean(np.diff(ratios) > 0) == pytest.approx(0.5, abs=0.25)


def test_random_cluster_and_oracle_change_which_cluster_is_the_lesion_alone() -> None:
    given = amlp(variant="amlp")
    random = controlled(given, "random-cluster", "s")
    assert random.selection == given.selection.model_copy(update={"rule": "random"})
    assert random.model_copy(update={"selection": given.selection}) == given
    for mode in (
        {"mode": "hard"},
        {"mode": "soft"},
        {"mode": "hard", "by": "score"},
        {"mode": "random"},
    ):
        oracle = controlled(amlp(selection=mode), "oracle", "s")
        assert oracle.selection.uses_truth
        assert not oracle.uses_feedback  # else the aim were not the oracle's alone


@pytest.mark.parametrize(
    ("control", "given", "told"),
    [
        (
            "equal-mean",
            {"ratio": {"shape": "fixed"}},
            r"ratio that changes, but this one is 0\.25 throughout",
        ),
        (
            "random-ratio",
            {"variant": "mae"},
            r"ratio that changes, but this one is 0\.75 throughout",
        ),
        ("random-ratio", {"ratio": {"shape": "random"}}, "at random, which is done already"),
        ("random-cluster", {"selection": {"mode": "soft"}}, "this mask is aimed at none"),
        ("random-cluster", {"selection": {"mode": "parts"}}, "this mask is aimed at none"),
        ("random-cluster", {"selection": {"rule": "random"}}, "done already"),
        ("oracle", {"selection": {"rule": "oracle"}}, "done already"),
        ("oracle", {"variant": "simsiam"}, "objective simsiam masks none"),
        ("equal-mean", {"variant": "scratch"}, "objective none masks none"),
    ],
)
def test_a_control_that_would_change_nothing_is_refused(
    control: str, given: dict[str, Any], told: str
) -> None:
    with pytest.raises(SettingsError, match=told):
        controlled(amlp(**given), control, "s")
    with pytest.raises(SettingsError, match=rf"^s, arm {control} .*{told}"):
        arm_plans(with_arms("mae", control, **given))


def test_faults_of_all_arms_come_together() -> None:
    with pytest.raises(
        SettingsError, match=r"arm equal-mean is about .* arm random-cluster is about"
    ):
        arm_plans(with_arms("equal-mean", "random-cluster", variant="mae"))


def test_controls_are_of_the_study_s_own_pretrain_or_of_what_they_are_given() -> None:
    settings = with_arms("equal-mean", ratio={"start": 0.3, "end": 0.5})
    assert arm_plan(settings, "equal-mean").settings(0).ratio.start == pytest.approx(0.4)
    assert own_settings(settings, 5).seed == 5
    other = arm_plan(
        settings, "equal-mean", lambda seed: amlp(ratio={"start": 0.1, "end": 0.3}, seed=seed)
    )
    assert other.settings(7).ratio.start == pytest.approx(0.2)
    assert other.settings(7).seed == 7


def test_an_oracle_over_images_without_masks_is_refused_before_it_runs(
    phantom_dataset: PatchDataset,
) -> None:
    check_arms(with_arms("oracle"), phantom_dataset)
    counts = phantom_dataset.manifest.counts
    fewer = counts | {
        "train": counts["train"].model_copy(update={"labelled": counts["train"].images - 3})
    }
    lacking = PatchDataset(
        phantom_dataset.place, phantom_dataset.manifest.model_copy(update={"counts": fewer})
    )
    with pytest.raises(
        SettingsError, match=r"arm oracle aims by true lesions, but 3 of 36 training images"
    ):
        check_arms(with_arms("oracle"), lacking)
    check_arms(with_arms("mae", "equal-mean"), lacking)
