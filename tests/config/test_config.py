from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from amlp_ray.config import (
    VARIANTS,
    Choice,
    ImageSpec,
    LossConfig,
    ModelConfig,
    PrepareConfig,
    PretrainConfig,
    ProbeConfig,
    Range,
    RatioConfig,
    ResourceConfig,
    SegmentConfig,
    SelectionConfig,
    StudyConfig,
    Variant,
    architecture,
)
from amlp_ray.config.base import build
from amlp_ray.config.overrides import flatten, nest
from amlp_ray.config.yaml_file import read_yaml, write_yaml
from amlp_ray.errors import ConfigError

# Whole groups win over the variant, so these are the defaults without one.
DEFAULTS = flatten(
    PretrainConfig(
        model=ModelConfig(),
        ratio=RatioConfig(),
        selection=SelectionConfig(),
        loss=LossConfig(),
    )
)
ASK_A_TEACHER = ("amlp", "hpm", "attmask")


def refused(values: dict[str, Any], model: Any = PretrainConfig) -> str:
    with pytest.raises(ConfigError) as caught:
        build(model, nest(values), "here")
    return str(caught.value)


@pytest.mark.parametrize(
    ("name", "value", "accepted"),
    [
        ("epochs", 0, "greater than or equal to 1"),
        ("lr", 0, "greater than 0"),
        ("lr", 2, "less than or equal to 1"),
        ("seed", -1, "greater than or equal to 0"),
        ("min_crop_area", 0, "greater than 0"),
        ("ratio.start", 1, "less than 1"),
        ("ratio.end", 0, "greater than 0"),
        ("ratio.shape", "wavy", "'exponential', 'fixed', 'random' or 'points'"),
        ("ratio.levels", 1, "greater than or equal to 2"),
        ("ratio.duration", 1.5, "less than or equal to 1"),
        ("ratio.round_to", 0, "greater than or equal to 1"),
        ("selection.mode", "easy", "'random', 'hard', 'soft', 'ranked' or 'parts'"),
        ("selection.clusters", 1, "greater than or equal to 2"),
        ("selection.lesion_share", 0, "greater than 0"),
        ("selection.strength", 51, "less than or equal to 50"),
        ("selection.analysis_interval", -1, "greater than or equal to 0"),
        ("selection.n_init", 33, "less than or equal to 32"),
        ("selection.dilate", 5, "less than or equal to 4"),
        ("selection.feedback", 1.1, "less than or equal to 1"),
        ("selection.score_share_end", -0.1, "greater than or equal to 0"),
        ("selection.rule", "cluster", "'smallest', 'distinct'"),
        ("selection.score", "random", "'row_contrast', 'blob'"),
        ("model.register_tokens", 17, "less than or equal to 16"),
        ("model.encode", "some", "'visible' or 'all'"),
        ("model.decoder_depth", -1, "greater than or equal to 0"),
        ("objective", "byol", "'reconstruction', 'simsiam' or 'none'"),
        ("teacher_momentum", 1, "less than 1"),
        ("loss.distance", "l3", "'l2' or 'l1'"),
        ("loss.ranking_weight", 11, "less than or equal to 10"),
        ("loss.gamma", -0.1, "greater than or equal to 0"),
        ("loss.clip_min", 1.1, "less than or equal to 1"),
        ("loss.clip_max", 0.9, "greater than or equal to 1"),
        ("loss.ccl_weight", 11, "less than or equal to 10"),
        ("loss.temperature", 0, "greater than or equal to 0.001"),
        ("precision", "fp8", "'auto', 'fp32', 'bf16' or 'fp16'"),
        ("loss.norm_pix", "maybe", "valid boolean"),
    ],
)
def test_a_value_out_of_range_is_told_with_key_value_and_range(
    name: str, value: Any, accepted: str
) -> None:
    text = refused({name: value})
    assert text.startswith(f"here: {name} is {value!r}, but must be ")
    assert accepted in text


@pytest.mark.parametrize("name", DEFAULTS)
def test_a_misspelled_setting_is_refused_with_its_right_name(name: str) -> None:
    text = refused({name + "_": 1})
    assert text == f"here: unknown setting '{name}_'; did you mean {name}?"


@pytest.mark.parametrize(
    ("word", "names"),
    [
        ("ema", "weight_ema"),
        ("batch", "lr_batch, batch_size"),
        ("ratio.over", "ratio.ratio_over"),
        ("loss.clip", "loss.clip_min, loss.clip_max"),
    ],
)
def test_a_word_of_names_is_refused_with_all_of_them_and_without_a_guess(
    word: str, names: str
) -> None:
    assert refused({word: 1}) == f"here: unknown setting '{word}'; similar here: {names}."


def test_an_unknown_variant_is_refused_with_the_known_ones() -> None:
    text = refused({"variant": "beit"})
    assert all(repr(name) in text for name in VARIANTS)


def test_widths_that_heads_or_positions_do_not_divide_are_refused() -> None:
    assert "width 100 must be a multiple of heads 3" in refused({"model.width": 100})
    assert "decoder_width 50 must be a multiple of decoder_heads 4" in refused(
        {"model.decoder_width": 50, "model.decoder_heads": 4}
    )
    assert "width 30 must be a multiple of 4" in refused({"model.width": 30})


def test_a_named_encoder_lays_its_sizes_under_those_given() -> None:
    model = build(ModelConfig, {"encoder": "vit_small_patch16_224", "depth": 3}, "here")
    assert (model.patch_size, model.width, model.heads, model.class_token) == (16, 384, 6, True)
    assert (model.decoder_width, model.decoder_heads) == (192, 6)
    assert model.depth == 3, "given"
    assert model.decoder_depth == 1, "no property of an encoder: the default"
    assert build(ModelConfig, model.model_dump(), "here") == model


def test_a_named_encoder_brings_its_tokens() -> None:
    assert (
        architecture("vit_small_patch14_reg4_dinov2").items()
        >= {"register_tokens": 4, "patch_size": 14}.items()
    )
    assert architecture("vit_base_patch16_siglip_gap_224")["class_token"] is False


def test_an_encoder_that_timm_does_not_know_is_refused_with_near_names() -> None:
    text = refused({"model.encoder": "vit_small_patch16_244"})
    assert text.startswith(
        "here: model: encoder 'vit_small_patch16_244' is no ViT that timm knows; near: vit_small_"
    )
    assert "vit_small_patch16_224" in text
    assert refused({"model.encoder": "resnet50"}).endswith("near: vit_small_patch16_224.")


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("davit_tiny", "DaVit"),  # another class
        ("vit_base_r50_s16_224", "VisionTransformer"),  # embeds feature maps of a CNN
        ("vit_relpos_small_patch16_224", "VisionTransformerRelPos"),  # adds no positions
        (
            "deit_tiny_distilled_patch16_224",
            "VisionTransformerDistilled",
        ),  # a second token of its own
    ],
)
def test_an_encoder_that_is_no_plain_vit_is_refused_in_one_sentence(name: str, kind: str) -> None:
    text = refused({"model.encoder": name})
    assert text.startswith(
        f"here: model: encoder {name!r} is a {kind} of its own kind in timm; accepted are plain"
    )


def test_a_linear_head_is_refused_where_only_visible_patches_are_encoded() -> None:
    assert "decoder_depth 0 needs encode=all" in refused({"model.decoder_depth": 0})
    assert build(ModelConfig, {"decoder_depth": 0, "encode": "all"}, "here").decoder_depth == 0


def test_ranking_is_refused_where_every_token_is_encoded() -> None:
    text = refused({"model.encode": "all", "loss.ranking_weight": 1.0})
    assert text.startswith("here: loss.ranking_weight needs model.encode=visible")
    assert "loss.ranking_weight" in refused({"variant": "hpm", "model.encode": "all"})


def test_a_lesion_found_by_score_cannot_be_found_by_a_cluster() -> None:
    text = refused({"selection.hard_by": "score", "selection.score": "cluster"})
    assert text.startswith("here: selection: hard_by score needs a score that is no cluster")


@pytest.mark.parametrize(
    ("points", "message"),
    [
        ([], "shape points needs at least two points"),
        ([[0, 0.5]], "shape points needs at least two points"),
        ([[0, 0.5], [0, 0.6]], "rising shares in 0-1"),
        ([[0.5, 0.5], [0.2, 0.6]], "rising shares in 0-1"),
        ([[0, 0.5], [1.1, 0.6]], "rising shares in 0-1"),
        ([[-0.1, 0.5], [1, 0.6]], "rising shares in 0-1"),
        ([[0, 0], [1, 0.6]], "rising shares in 0-1"),
        ([[0, 0.5], [1, 1]], "rising shares in 0-1"),
        ([[0, 0.5, 1], [1, 0.5]], "ratio.points"),
    ],
)
def test_faulty_points_of_a_schedule_are_refused(points: list[list[float]], message: str) -> None:
    assert message in refused({"ratio.shape": "points", "ratio.points": points})


def test_points_are_checked_even_where_another_shape_is_chosen() -> None:
    assert "rising shares in 0-1" in refused({"ratio.points": [[1, 0.5], [0, 0.5]]})
    ratio = build(RatioConfig, {"shape": "points", "points": [[0, 0.3], [1, 0.75]]}, "here")
    assert ratio.points == ((0, 0.3), (1, 0.75))


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_variant_lays_its_values_under_those_given_and_leaves_the_other_defaults(
    variant: str,
) -> None:
    overrides = flatten(VARIANTS[variant])
    assert flatten(PretrainConfig(variant=variant)) == {**DEFAULTS, "variant": variant, **overrides}  # type: ignore[arg-type]


def test_the_variants_are_those_that_the_setting_names() -> None:
    assert tuple(VARIANTS) == get_args(Variant)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_variant_written_and_read_again_is_the_same(variant: str, tmp_path: Path) -> None:
    config = build(PretrainConfig, {"variant": variant}, "here")
    write_yaml(config, tmp_path / "config.yaml")
    assert build(PretrainConfig, read_yaml(tmp_path / "config.yaml"), "here") == config


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_teacher_is_kept_only_where_a_variant_asks_one(variant: str) -> None:
    assert build(PretrainConfig, {"variant": variant}, "here").needs_teacher == (
        variant in ASK_A_TEACHER
    )


@pytest.mark.parametrize(
    ("values", "needed"),
    [
        ({"selection.features": "tokens"}, True),
        ({"selection.rule": "hardest"}, True),
        ({"selection.hard_by": "score", "selection.score": "attention"}, True),
        ({"selection.score": "difficulty"}, False),  # hard by cluster: no score is looked at
        ({"selection.mode": "soft", "selection.score": "difficulty"}, True),
        ({"selection.mode": "soft", "selection.rule": "hardest"}, False),  # no cluster is named
        (
            {"selection.mode": "soft", "selection.score": "cluster", "selection.rule": "hardest"},
            True,
        ),
        ({"selection.mode": "random", "selection.features": "tokens"}, False),
        ({"selection.features": "tokens", "objective": "simsiam"}, False),
        ({"selection.feedback": 0.5, "loss.ccl_weight": 0.1}, True),
        ({"selection.feedback": 0.5}, False),  # mps-ams trains no category that could be fed back
    ],
)
def test_a_teacher_is_kept_where_a_setting_in_use_asks_one(
    values: dict[str, Any], needed: bool
) -> None:
    assert (
        build(PretrainConfig, nest({"variant": "mps-ams", **values}), "here").needs_teacher
        == needed
    )


def test_mae_is_random_masking_at_75_percent_with_the_plain_loss() -> None:
    mae = PretrainConfig(variant="mae")
    assert (mae.selection.mode, mae.ratio.start, mae.ratio.end) == ("random", 0.75, 0.75)
    assert (mae.loss.weighting, mae.loss.ccl_weight) == ("none", 0.0)


@pytest.mark.parametrize("as_model", [False, True])
def test_values_given_win_over_the_variant_and_their_neighbors_stay(as_model: bool) -> None:
    ratio = {"end": 0.9}
    config = PretrainConfig.model_validate(
        {
            "variant": "mae",
            "ratio": RatioConfig(**ratio) if as_model else ratio,
            "loss": {"weighting": "rrl"},
        }
    )
    assert config.ratio.end == 0.9
    assert config.ratio.start == (
        0.25 if as_model else 0.75
    )  # a whole model gives every one of its values
    assert config.loss.weighting == "rrl"
    assert config.loss.ccl_weight == 0
    assert config.selection.mode == "random"


@given(st.sampled_from(sorted(VARIANTS)), st.floats(0.01, 0.99), st.integers(2, 16), st.booleans())
def test_written_and_read_again_settings_are_the_same(
    variant: str, start: float, clusters: int, norm_pix: bool
) -> None:
    values = {
        "variant": variant,
        "ratio.start": start,
        "selection.clusters": clusters,
        "loss.norm_pix": norm_pix,
    }
    config = build(PretrainConfig, nest(values), "here")
    assert flatten(config).items() >= values.items()
    assert build(PretrainConfig, config.model_dump(mode="json"), "here") == config
    assert build(PretrainConfig, nest(flatten(config)), "here") == config


def test_a_patch_size_must_divide_both_sides_of_the_images() -> None:
    config = PretrainConfig.model_validate({"model": {"patch_size": 16}})
    spec = ImageSpec(channels=1, height=96, width=96, mean=(0,), std=(1,))
    config.check_image(spec)
    for side in ("height", "width"):
        with pytest.raises(
            ConfigError,
            match=r"model.patch_size 16 does not divide .* choose a divisor or prepare",
        ):
            config.check_image(spec.model_copy(update={side: 100}))


@pytest.mark.parametrize("fractions", [(0.5, 0.2, 0.2), (0, 0.5, 0.5), (1.2, -0.1, -0.1)])
def test_fractions_must_sum_to_1_with_some_training_images(
    fractions: tuple[float, float, float],
) -> None:
    assert "fractions must be train > 0" in refused(
        {"layout": "busi", "fractions": fractions}, PrepareConfig
    )


def test_every_model_of_settings_has_valid_defaults() -> None:
    for model in (PretrainConfig, ProbeConfig, SegmentConfig):
        assert build(model, model().model_dump(), "here") == model()


# Studies


def study(**values: Any) -> StudyConfig:
    return build(StudyConfig, {"name": "s", **values}, "study.yaml")


def test_a_parameter_with_choices_is_a_choice_and_one_with_bounds_a_range() -> None:
    space = study(
        space={"ratio.shape": {"choices": ["linear", "step"]}, "lr": {"low": 1e-4, "high": 1e-2}}
    ).space
    assert isinstance(space["ratio.shape"], Choice)
    assert isinstance(space["lr"], Range)


@pytest.mark.parametrize(
    ("parameter", "expected"),
    [
        ({"low": 0.5, "high": 0.2}, "space.lr: low 0.5 must lie below high 0.2"),
        ({"low": 0.2, "high": 0.2}, "space.lr: low 0.2 must lie below high 0.2"),
        ({"low": 0, "high": 1, "log": True}, "space.lr: log needs low > 0 and no step"),
        (
            {"low": 0.1, "high": 1, "log": True, "step": 0.1},
            "space.lr: log needs low > 0 and no step",
        ),
        ({"low": 0.1}, "space.lr.high is missing"),
        ({"choices": []}, "space.lr.choices is []"),
        ({"low": 0, "high": 1, "steps": 2}, "unknown setting 'space.lr.steps'"),
    ],
)
def test_a_faulty_parameter_is_refused_with_its_name(
    parameter: dict[str, Any], expected: str
) -> None:
    with pytest.raises(ConfigError, match=r"^study\.yaml: ") as caught:
        study(space={"lr": parameter})
    assert expected in str(caught.value)


def test_all_faults_of_a_study_are_told_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        study(
            name="a b",
            space={"lr": {"low": 1, "high": 0}, "ratio.start": {"choices": []}},
            budget={"trials": 0},
            baselines=["beit"],
            equivalence_margin=-1,
        )
    for part in (
        "'a b' is no name",
        "space.lr: low 1",
        "space.ratio.start.choices",
        "budget.trials is 0",
        "baselines",
        "equivalence_margin",
    ):
        assert part in str(caught.value)


def test_faulty_settings_of_the_trials_are_refused_when_the_study_is_read() -> None:
    with pytest.raises(ConfigError, match=r"pretrain: epochs is 0, but must be"):
        study(pretrain={"epochs": 0})


def test_a_trial_has_the_study_s_settings_with_its_parameters_on_top() -> None:
    config = study(pretrain={"epochs": 7, "ratio": {"start": 0.3}})
    trial = config.trial({"ratio.end": 0.6, "lr": 0.01}, seed=5)
    assert (trial.epochs, trial.ratio.start, trial.ratio.end, trial.lr, trial.seed) == (
        7,
        0.3,
        0.6,
        0.01,
        5,
    )


def test_a_searched_variant_brings_its_own_values_along() -> None:
    config = study(pretrain={"epochs": 7})
    assert config.trial({"variant": "mae"}, seed=0) == PretrainConfig(variant="mae", epochs=7)


# Workers


@pytest.mark.parametrize(
    ("workers", "least", "most", "elastic", "alone"),
    [
        (1, 1, 1, False, True),
        (3, 3, 3, False, False),
        ([2, 8], 2, 8, True, False),
        ([1, 2], 1, 2, True, False),
    ],
    ids=str,
)
def test_workers_are_a_number_or_the_least_and_the_most(
    workers: Any, least: int, most: int, elastic: bool, alone: bool
) -> None:
    resources = build(ResourceConfig, {"workers": workers}, "here")
    assert (resources.min_workers, resources.max_workers) == (least, most)
    assert (resources.is_elastic, resources.is_single_worker) == (elastic, alone)
    assert build(ResourceConfig, resources.model_dump(mode="json"), "here") == resources


@pytest.mark.parametrize("workers", [0, -1, [0, 2], [4, 2]], ids=str)
def test_workers_below_1_or_the_wrong_way_round_are_refused(workers: Any) -> None:
    assert (
        "a number from 1 on, or the least and the most, such as 2-8 ([2, 8] in a file)"
        in refused({"workers": workers}, ResourceConfig)
    )


@pytest.mark.parametrize("workers", [[2], [1, 2, 3], 1.5, "many", None], ids=str)
def test_workers_of_another_form_are_refused(workers: Any) -> None:
    assert "workers" in refused({"workers": workers}, ResourceConfig)


def test_a_kind_of_gpu_without_a_gpu_is_refused() -> None:
    resources = {"accelerator": "A100"}
    assert "accelerator A100 is a kind of GPU; set gpus_per_worker too" in refused(
        resources, ResourceConfig
    )
    assert build(ResourceConfig, resources | {"gpus_per_worker": 1}, "here").accelerator == "A100"


def test_several_workers_on_one_gpu_are_refused() -> None:
    message = "gpus_per_worker 0.5 is for one worker; several cannot share a GPU"
    assert message in refused({"gpus_per_worker": 0.5, "workers": 2}, ResourceConfig)
    assert message in refused({"gpus_per_worker": 0.5, "workers": [1, 2]}, ResourceConfig)
    assert build(ResourceConfig, {"gpus_per_worker": 0.5}, "here").gpus_per_worker == 0.5


FITTING: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"batch_size": 3}, {"workers": 3}),
    ({"batch_size": 16}, {"workers": [1, 16]}),
    ({"batch_size": 16}, {"workers": 3, "micro_batch": 2}),
    ({"batch_size": 16}, {"workers": 4, "sharding": "fsdp"}),
    ({"batch_size": 16}, {"workers": [2, 4], "sharding": "auto"}),
    ({"batch_size": 16, "variant": "simsiam"}, {"workers": 8}),
]


@pytest.mark.parametrize(("pretrain", "resources"), FITTING, ids=str)
def test_workers_that_can_share_a_batch_are_accepted(
    pretrain: dict[str, Any], resources: dict[str, Any]
) -> None:
    PretrainConfig.model_validate(pretrain).check_workers(ResourceConfig.model_validate(resources))


UNFIT: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    (
        {"batch_size": 2},
        {"workers": 3},
        r"batch_size 2 is less than resources\.workers 3; raise it",
    ),
    (
        {"batch_size": 7},
        {"workers": [2, 8]},
        r"batch_size 7 is less than resources\.workers 8; raise it",
    ),
    (
        {},
        {"workers": 3, "sharding": "fsdp"},
        r"fsdp needs a fixed number .* divides batch_size 16, not 3;",
    ),
    ({}, {"workers": [2, 4], "sharding": "fsdp"}, r"fsdp needs a fixed number .* not \(2, 4\);"),
    ({"variant": "simsiam"}, {"micro_batch": 4}, "micro_batch would change objective simsiam"),
    (
        {"variant": "simsiam"},
        {"workers": 9},
        "batch_size 16 leaves one image per worker, but objective simsiam",
    ),
]


@pytest.mark.parametrize(
    ("pretrain", "resources", "message"), UNFIT, ids=[message[:30] for *_, message in UNFIT]
)
def test_workers_that_cannot_share_a_batch_are_refused_with_what_to_change(
    pretrain: dict[str, Any], resources: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        PretrainConfig.model_validate(pretrain).check_workers(
            ResourceConfig.model_validate(resources)
        )
