from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from amlp_ray.config import (
    ABLATION_STEPS,
    ABLATIONS,
    BASELINE_DESCRIPTIONS,
    BASELINE_GROUPS,
    VARIANTS,
    PretrainConfig,
    PrunerConfig,
    StudyConfig,
)
from amlp_ray.config.base import build
from amlp_ray.data.dataset import PatchDataset
from amlp_ray.errors import ConfigError
from amlp_ray.study.baselines import (
    ablated_config,
    baseline_config,
    baseline_plan,
    baseline_plans,
    check_baselines,
    study_config,
)
from amlp_ray.study.rungs import prunable_rungs, rung_epochs, schedule, with_schedule


def study(**pretrain: Any) -> StudyConfig:
    return StudyConfig.model_validate({"name": "s", "pretrain": pretrain})


def with_baselines(*baselines: Any, **pretrain: Any) -> StudyConfig:
    return StudyConfig.model_validate({"name": "s", "pretrain": pretrain, "baselines": baselines})


def amlp(**values: Any) -> PretrainConfig:
    return PretrainConfig.model_validate({"epochs": 20, **values})


# Rungs


@pytest.mark.parametrize("spacing", ["even", "geometric"])
@pytest.mark.parametrize("epochs", [1, 2, 7, 70, 100])
@pytest.mark.parametrize("rungs", [1, 3, 8])
def test_rungs_rise_to_full_length_and_are_at_most_as_many_as_asked(
    spacing: str, epochs: int, rungs: int
) -> None:
    pruner = PrunerConfig.model_validate({"rungs": rungs, "spacing": spacing})
    result = rung_epochs(epochs, pruner)
    assert result[-1] == epochs
    assert result[0] >= 1
    assert list(result) == sorted(set(result))
    assert len(result) <= rungs


def test_geometric_rungs_are_reduction_times_the_one_before() -> None:
    pruner = PrunerConfig(rungs=3, spacing="geometric", reduction_factor=3)
    assert rung_epochs(90, pruner) == (10, 30, 90)


def test_prunable_rungs_of_a_geometric_spacing_lie_past_the_first_steps() -> None:
    pruner = PrunerConfig(rungs=4, spacing="geometric", min_steps=100)
    assert prunable_rungs(amlp(epochs=80, batch_size=10), pruner, images=50) == (20, 40)


def test_a_compressed_schedule_is_run_whole_up_to_every_rung() -> None:
    pruner = PrunerConfig(rungs=2, schedule="compress")
    config = amlp(ratio={"start": 0.2, "end": 0.6})
    result = schedule(with_schedule(config, pruner))
    assert result[9] == result[19] == 0.6
    assert schedule(config)[9] < 0.6
    assert with_schedule(config, PrunerConfig(rungs=2)) == config
    assert with_schedule(amlp(variant="scratch"), pruner).ratio.rungs == ()


# Baselines


@pytest.mark.parametrize("baseline", VARIANTS)
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
def test_a_baseline_is_its_variant_whatever_method_a_study_searches(
    baseline: str, searched: dict[str, Any]
) -> None:
    result = baseline_config(study(**searched), baseline, seed=3)
    plain = baseline_config(study(), baseline, seed=3)
    assert (result.variant, result.seed) == (baseline, 3)
    for part in ("objective", "ratio", "selection", "loss"):
        assert getattr(result, part) == getattr(plain, part)
    assert result.model.encode == plain.model.encode
    assert (result.model.decoder_depth == 0) == (baseline == "simmim")


def test_a_baseline_shares_model_and_length_with_the_study() -> None:
    result = baseline_config(
        study(epochs=7, model={"width": 48, "decoder_depth": 2}), "mae", seed=0
    )
    assert (result.epochs, result.model.width, result.model.decoder_depth) == (7, 48, 2)


def test_scratch_is_a_random_encoder_where_all_others_start_from_weights() -> None:
    config = study(weights="/w.safetensors")
    assert baseline_config(config, "mae", seed=0).weights == "/w.safetensors"
    assert baseline_config(config, "scratch", seed=0).weights is None


def test_what_the_space_sets_for_every_trial_is_set_for_baselines_but_for_the_method() -> None:
    space = {
        "epochs": 9,
        "model.width": {"value": 48},
        "ratio.start": 0.2,
        "lr": {"value": 0.5, "when": {"epochs": 1}},
    }
    config = StudyConfig.model_validate(
        {"name": "s", "space": space, "baselines": ["mae", "equal-mean"]}
    )
    mae, mean = (plan.config(0) for plan in baseline_plans(config))
    assert (mae.epochs, mae.model.width, mae.ratio.start) == (9, 48, 0.75)
    assert mae.lr == PretrainConfig().lr
    assert mean.epochs == 9
    assert mean.ratio.start == pytest.approx(np.mean(np.linspace(0.2, 0.75, 9)), abs=1e-4)


def test_baselines_come_in_order_each_once_groups_spelled_out() -> None:
    plans = baseline_plans(
        with_baselines("scratch", "leave-one-out", "ladder", {"mine": {"loss": {"gamma": 0.5}}})
    )
    names = [plan.name for plan in plans]
    assert names[0] == "scratch"
    assert names[1:6] == list(BASELINE_GROUPS["leave-one-out"])
    assert names[6:-1] == [name for name in BASELINE_GROUPS["ladder"] if name not in names[:6]]
    assert names[-1] == "mine"
    assert len(set(names)) == len(names)


def test_every_baseline_that_has_a_name_can_be_had_and_says_what_it_is() -> None:
    names = [*VARIANTS, *ABLATIONS, *ABLATION_STEPS]
    plans = baseline_plans(with_baselines(*names, epochs=5))
    assert [plan.name for plan in plans] == names
    assert all(plan.config(4).seed == 4 and plan.config(4).epochs == 5 for plan in plans)
    assert [plan.name for plan in plans if plan.uses_ground_truth] == ["oracle"]
    described = {plan.name for plan in plans if plan.description}
    assert described == set(names) == BASELINE_DESCRIPTIONS.keys()


def test_the_ladder_leads_from_mae_to_amlp_one_part_at_a_time() -> None:
    result = {plan.name: plan.config(0) for plan in baseline_plans(with_baselines("ladder"))}
    aimed = {name: s.selection.mode != "random" for name, s in result.items()}
    rising = {name: s.ratio.start < s.ratio.end for name, s in result.items()}
    weighted = {name: s.loss.weighting != "none" for name, s in result.items()}
    category = {name: s.loss.ccl_weight > 0 for name, s in result.items()}
    for name in result:
        added = (
            {"mps", "amr", "rrl", "ccl"} - set(name.split("-"))
            if name.startswith("amlp")
            else set(name.split("+"))
        )
        has = ["mps" in added, "amr" in added, "rrl" in added, "ccl" in added]
        assert has == [aimed[name], rising[name], weighted[name], category[name]], name


def test_no_two_steps_of_an_ablation_are_the_same_run() -> None:
    plans = baseline_plans(with_baselines("scratch", "ladder", "leave-one-out"))
    methods = [
        plan.config(0).model_copy(update={"variant": "amlp"}).model_dump_json() for plan in plans
    ]
    assert len(set(methods)) == len(plans) == 11


def test_leave_one_out_is_amlp_less_one_part_each() -> None:
    result = {plan.name: plan.config(0) for plan in baseline_plans(with_baselines("leave-one-out"))}
    whole = result.pop("amlp").model_dump()
    assert result["amlp-mps"].selection.mode == "random"
    assert result["amlp-amr"].ratio.start == result["amlp-amr"].ratio.end
    assert result["amlp-rrl"].loss.weighting == "none"
    assert result["amlp-ccl"].loss.ccl_weight == 0
    parts = {"amlp-mps": "selection", "amlp-amr": "ratio", "amlp-rrl": "loss", "amlp-ccl": "loss"}
    for name, part in parts.items():
        changed = [key for key, value in result[name].model_dump().items() if value != whole[key]]
        assert changed == [part], name


def test_settings_of_ones_own_lie_over_the_study_s_model_and_no_method() -> None:
    overrides = {"variant": "mae", "ratio": {"start": 0.4, "end": 0.4}, "model": {"depth": 2}}
    config = with_baselines(
        {"mine": overrides}, epochs=6, model={"width": 48}, selection={"mode": "soft"}
    )
    (plan,) = baseline_plans(config)
    result = plan.config(2)
    assert (result.variant, result.selection.mode, result.ratio.start) == ("mae", "random", 0.4)
    assert (result.epochs, result.model.width, result.model.depth, result.seed) == (6, 48, 2, 2)
    assert not plan.uses_ground_truth


def test_an_oracle_of_ones_own_uses_ground_truth_too() -> None:
    (plan,) = baseline_plans(with_baselines({"mine": {"selection": {"rule": "oracle"}}}))
    assert plan.uses_ground_truth


@pytest.mark.parametrize(
    ("baseline", "message"),
    [
        ({"mae": {"epochs": 3}}, "is a baseline already"),
        ({"mine": {"epochs": 3}}, "'mine' sets epochs, but baselines are trained as trials are"),
        ({"mine": {"seed": 3}}, "'mine' sets seed"),
        ({"mine": {"ratio": {"strat": 3}}}, r"unknown setting 'ratio\.strat'"),
        ({"../mine": {}}, "names a folder"),
        ({"trial-7": {}}, "names a folder"),
        ("laddr", "the nearest is ladder"),
    ],
)
def test_baselines_that_mean_nothing_are_refused_with_the_settings(
    baseline: Any, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        build(StudyConfig, {"name": "s", "baselines": [baseline]}, "s.yaml")


def test_repeats_of_baselines_share_seeds_and_nothing_else_of_the_seed_enters() -> None:
    for plan in baseline_plans(with_baselines("mae", "ladder", "equal-mean")):
        one, other = plan.config(1), plan.config(2)
        assert one.model_copy(update={"seed": 2}) == other


# Controls


@pytest.mark.parametrize(
    "shape", ["linear", "cosine", "power", "step", "exponential", "random", "points"]
)
@pytest.mark.parametrize("update_per", ["epoch", "step"])
def test_equal_mean_has_the_mean_of_the_schedule_throughout(shape: str, update_per: str) -> None:
    ratio = {
        "start": 0.2,
        "end": 0.7,
        "shape": shape,
        "update_per": update_per,
        "power": 2.5,
        "points": [[0, 0.2], [0.3, 0.7]],
    }
    config = amlp(ratio=ratio)
    result = ablated_config(config, "equal-mean", "s")
    assert set(schedule(result)) == {result.ratio.start}
    assert np.mean(schedule(result)) == pytest.approx(np.mean(schedule(config)), abs=1e-4)
    assert result.model_copy(update={"ratio": config.ratio}) == config


def test_equal_mean_of_a_compressed_schedule_is_that_of_what_is_run() -> None:
    config = with_schedule(
        amlp(ratio={"start": 0.2, "end": 0.6}), PrunerConfig(rungs=4, schedule="compress")
    )
    assert np.mean(schedule(ablated_config(config, "equal-mean", "s"))) == pytest.approx(
        np.mean(schedule(config)), abs=1e-4
    )


def test_random_ratio_draws_between_the_ends_of_the_schedule() -> None:
    config = amlp(epochs=50, ratio={"shape": "points", "points": [[0, 0.6], [0.5, 0.3], [1, 0.4]]})
    result = ablated_config(config, "random-ratio", "s")
    ratios = schedule(result)
    assert result.ratio.shape == "random"
    assert (result.ratio.start, result.ratio.end) == (min(schedule(config)), max(schedule(config)))
    assert len(set(ratios)) == 50
    assert np.mean(np.diff(ratios) > 0) == pytest.approx(0.5, abs=0.25)


def test_random_cluster_and_oracle_change_which_cluster_is_the_lesion_alone() -> None:
    config = amlp(variant="amlp")
    random = ablated_config(config, "random-cluster", "s")
    assert random.selection == config.selection.model_copy(update={"rule": "random"})
    assert random.model_copy(update={"selection": config.selection}) == config
    for mode in (
        {"mode": "hard"},
        {"mode": "soft"},
        {"mode": "hard", "hard_by": "score"},
        {"mode": "random"},
    ):
        oracle = ablated_config(amlp(selection=mode), "oracle", "s")
        assert oracle.selection.uses_ground_truth
        assert not oracle.uses_feedback  # else the lesion map were not the oracle's alone


@pytest.mark.parametrize(
    ("ablation", "changes", "message"),
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
        (
            "random-cluster",
            {"selection": {"mode": "soft"}},
            "which cluster is the lesion, but these masks use none",
        ),
        (
            "random-cluster",
            {"selection": {"mode": "parts"}},
            "which cluster is the lesion, but these masks use none",
        ),
        ("random-cluster", {"selection": {"rule": "random"}}, "done already"),
        ("oracle", {"selection": {"rule": "oracle"}}, "done already"),
        ("oracle", {"variant": "simsiam"}, "objective simsiam masks none"),
        ("equal-mean", {"variant": "scratch"}, "objective none masks none"),
    ],
)
def test_an_ablation_that_would_change_nothing_is_refused(
    ablation: str, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        ablated_config(amlp(**changes), ablation, "s")
    with pytest.raises(ConfigError, match=rf"^s, baseline {ablation} .*{message}"):
        baseline_plans(with_baselines("mae", ablation, **changes))


def test_errors_of_all_baselines_come_together() -> None:
    with pytest.raises(
        ConfigError, match=r"baseline equal-mean is about .* baseline random-cluster is about"
    ):
        baseline_plans(with_baselines("equal-mean", "random-cluster", variant="mae"))


def test_ablations_are_of_the_study_s_own_pretrain_or_of_what_they_are_given() -> None:
    config = with_baselines("equal-mean", ratio={"start": 0.3, "end": 0.5})
    assert baseline_plan(config, "equal-mean").config(0).ratio.start == pytest.approx(0.4)
    assert study_config(config, 5).seed == 5
    other = baseline_plan(
        config, "equal-mean", lambda seed: amlp(ratio={"start": 0.1, "end": 0.3}, seed=seed)
    )
    assert other.config(7).ratio.start == pytest.approx(0.2)
    assert other.config(7).seed == 7


def test_an_oracle_over_images_without_masks_is_refused_before_it_runs(
    phantom_dataset: PatchDataset,
) -> None:
    check_baselines(with_baselines("oracle"), phantom_dataset)
    counts = phantom_dataset.manifest.counts
    fewer = counts | {
        "train": counts["train"].model_copy(update={"labeled": counts["train"].images - 3})
    }
    lacking = PatchDataset(
        phantom_dataset.root, phantom_dataset.manifest.model_copy(update={"counts": fewer})
    )
    with pytest.raises(
        ConfigError, match=r"baseline oracle uses true lesions, but 3 of 36 training images"
    ):
        check_baselines(with_baselines("oracle"), lacking)
    check_baselines(with_baselines("mae", "equal-mean"), lacking)
