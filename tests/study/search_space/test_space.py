"""A space: faults are told before anything runs, rules hold, and however it is written, seeds
decide."""

import warnings
from pathlib import Path
from typing import Any, get_args

import optuna
import pytest
from optuna.trial import FixedTrial

from amlp_ray.config import Choice, Derived, Fixed, PretrainConfig, Range, StudyConfig
from amlp_ray.config.base import build, find_field
from amlp_ray.config.overrides import flatten, nest
from amlp_ray.config.yaml_file import read_yaml, write_yaml
from amlp_ray.errors import ConfigError
from amlp_ray.study.search_space.parameters import LAYERS, sampling_order
from amlp_ray.study.search_space.space import SearchSpace
from amlp_ray.study.search_space.space_function import allow_code
from amlp_ray.study.search_space.validate import build_study, check_space, sample_configs


def study(space: dict[str, Any], **other: Any) -> StudyConfig:
    return build(StudyConfig, {"name": "s", "space": space, **other}, "study.yaml")


FAULTS = {
    "misspelled": ({"ratio.strat": {"low": 0.1, "high": 0.5}}, "did you mean ratio.start"),
    "unlike anything": ({"zzzzzz": {"low": 0.1, "high": 0.5}}, "unknown setting 'zzzzzz'"),
    "value outside": ({"ratio.end": {"low": 0.1, "high": 1.2}}, "ratio.end is 1.2"),
    "choice outside": ({"selection.clusters": {"choices": [1, 3]}}, "selection.clusters is 1"),
    "choice unknown": ({"selection.rule": {"choices": ["smallest", "reddest"]}}, "reddest"),
    "range of words": (
        {"selection.rule": {"low": 0, "high": 1}},
        "give choices instead of a range",
    ),
    "range of switches": ({"flip": {"low": 0, "high": 1}}, "give choices instead of a range"),
    "seed": ({"seed": {"low": 0, "high": 9}}, "seed is not searched"),
    "condition on nothing": (
        {"ratio.power": {"low": 1, "high": 2, "when": {"ratio.form": "power"}}},
        "which is no setting",
    ),
    "condition never met": (
        {
            "ratio.shape": {"choices": ["linear"]},
            "ratio.power": {"low": 1, "high": 2, "when": {"ratio.shape": "power"}},
        },
        "never searched",
    ),
    "half steps of an integer": (
        {"selection.clusters": {"low": 2, "high": 6, "step": 0.5}},
        "is an integer",
    ),
    "combination": (
        {"model.width": {"low": 24, "high": 48, "step": 4}, "model.heads": {"choices": [2, 3]}},
        "some combinations are refused",
    ),
    "condition of another type": (
        {
            "selection.clusters": {"choices": [3, 4]},
            "selection.lesion_share": {
                "low": 0.5,
                "high": 1.0,
                "when": {"selection.clusters": "3"},
            },
        },
        "never searched",
    ),
    "circle": (
        {
            "ratio.start": {"low": 0.1, "high": 0.5, "when": {"ratio.end": 0.5}},
            "ratio.end": {"choices": [0.5, 0.6], "when": {"ratio.start": 0.3}},
        },
        "circle",
    ),
}


@pytest.mark.parametrize(("space", "message"), FAULTS.values(), ids=FAULTS)
def test_a_bad_space_is_refused_with_its_fault(space: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_space(study(space))


def test_all_faults_are_told_at_once() -> None:
    with pytest.raises(ConfigError) as error:
        check_space(
            study(
                {"ratio.strat": {"low": 0.1, "high": 0.5}, "ratio.end": {"low": 0.1, "high": 1.2}}
            )
        )
    assert "ratio.strat" in str(error.value)
    assert "1.2" in str(error.value)


@pytest.mark.parametrize(
    ("parameter", "message"),
    [
        ({"low": 0.9, "high": 0.2}, "must lie below"),
        ({"low": 0.0, "high": 0.2, "log": True}, "log needs"),
        ({"choices": []}, "at least 1"),
        ({"lo": 0.1, "high": 0.2}, "low is missing"),
    ],
)
def test_a_malformed_parameter_is_refused(parameter: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        study({"ratio.start": parameter})


CONDITIONAL = {
    "ratio.power": {"low": 0.5, "high": 3.0, "log": True, "when": {"ratio.shape": "power"}},
    "ratio.shape": {"choices": ["linear", "power"]},
    "selection.clusters": {"low": 2, "high": 6},
}


def test_a_parameter_is_asked_only_where_its_condition_holds() -> None:
    config = study(CONDITIONAL)
    check_space(config)
    assert sampling_order(config.space).index("ratio.shape") < sampling_order(config.space).index(
        "ratio.power"
    )
    search = optuna.create_study(sampler=optuna.samplers.RandomSampler(0))
    suggested = [SearchSpace(config).suggest(search.ask()).values for _ in range(30)]
    assert {params["ratio.shape"] for params in suggested} == {"linear", "power"}
    for params in suggested:
        assert ("ratio.power" in params) == (params["ratio.shape"] == "power")
        assert type(params["selection.clusters"]) is int


def test_conditions_may_rest_on_a_fixed_setting() -> None:
    space = {"ratio.power": {"low": 0.5, "high": 3.0, "when": {"ratio.shape": "power"}}}
    config = study(space, pretrain={"ratio": {"shape": "power"}})
    check_space(config)
    assert "ratio.power" in SearchSpace(config).suggest(optuna.create_study().ask()).values


def test_a_trial_asked_before_gives_the_same_values_again() -> None:
    config, search = (
        study(CONDITIONAL),
        optuna.create_study(sampler=optuna.samplers.RandomSampler(1)),
    )
    trial = search.ask()
    first = SearchSpace(config).suggest(trial).values
    again = optuna.trial.Trial(search, trial._trial_id)
    assert SearchSpace(config).suggest(again).values == first


def test_a_searched_variant_brings_its_own_settings() -> None:
    config = study({"variant": {"choices": ["mae", "amlp"]}}, pretrain={"epochs": 3})
    assert config.trial({"variant": "mae"}, seed=0).selection.mode == "random"
    assert config.trial({"variant": "amlp"}, seed=0).selection.mode == "hard"


# Fixed, derived, required, and defaults

DERIVED = {
    "ratio.start": {"low": 0.1, "high": 0.5},
    "delta": {"low": -0.2, "high": 0.4},
    "ratio.end": {"expression": "ratio.start + delta"},
    "ratio.shape": "power",
    "ratio.power": {"value": 2.0, "when": {"ratio.shape": "power"}},
    "selection.clusters": {"expression": "2 * half"},
    "half": {"low": 1, "high": 3, "step": 1},
}
RISES = ["ratio.start <= ratio.end", "ratio.start + delta > 0"]


def test_fixed_and_derived_values_are_settings_and_helpers_are_not() -> None:
    config = study(DERIVED, require=RISES)
    check_space(config)
    trial = optuna.create_study(sampler=optuna.samplers.RandomSampler(3)).ask()
    values = SearchSpace(config).suggest(trial).values
    assert (
        trial.params.keys()
        == {"ratio.start", "delta", "half"}
        == set(SearchSpace(config).parameters)
    )
    assert values.keys() == DERIVED.keys() - {"delta", "half"}
    assert values["ratio.end"] == trial.params["ratio.start"] + trial.params["delta"]
    assert values["selection.clusters"] == 2 * trial.params["half"]
    assert type(values["selection.clusters"]) is int
    resolved = config.trial(values, seed=0)
    assert (resolved.ratio.shape, resolved.ratio.power) == ("power", 2.0)


def test_a_requirement_is_told_of_values_and_helpers() -> None:
    config = study(DERIVED, require=["ratio.start <= ratio.end", "delta < 0.3"])
    assert (
        SearchSpace(config).broken_requirement({"ratio.start": 0.3, "ratio.end": 0.4, "delta": 0.1})
        is None
    )
    assert (
        SearchSpace(config).broken_requirement({"ratio.start": 0.3, "ratio.end": 0.2, "delta": 0.1})
        is not None
    )
    assert (
        SearchSpace(config).broken_requirement(
            {"ratio.start": 0.3, "ratio.end": 0.65, "delta": 0.35}
        )
        is not None
    )
    assert (
        SearchSpace(config).broken_requirement({"ratio.start": 0.3, "ratio.end": 0.65}) is None
    ), "without delta it says nothing"
    assert SearchSpace(config).broken_requirement({"ratio.start": 0.9}) is not None, (
        "the study's own ratio.end is 0.75"
    )


def test_drawn_settings_keep_the_requirements_and_are_the_same_every_time() -> None:
    config = study(DERIVED, require=RISES)
    drawn = sample_configs(config)
    assert 10 < len(drawn) < 100, "some are refused"
    assert all(trial.ratio.start <= trial.ratio.end for trial in drawn)
    assert drawn == sample_configs(study(DERIVED, require=RISES))


def test_a_suggestion_says_why_no_trial_may_have_it() -> None:
    config = study(
        {
            "ratio.start": {"low": 0.1, "high": 0.5},
            "ratio.end": {"expression": "0.1 / (ratio.start - 0.3)"},
        },
        require=["ratio.start < 0.4"],
    )
    suggestion = SearchSpace(config).suggest(FixedTrial({"ratio.start": 0.35}))
    assert (suggestion.refused, suggestion.params) == (None, {"ratio.start": 0.35})
    assert (
        SearchSpace(config).suggest(FixedTrial({"ratio.start": 0.5})).refused
        == "require 'ratio.start < 0.4' does not hold"
    )
    zero = FixedTrial({"ratio.start": 0.3})
    assert "divides by zero" in (SearchSpace(config).suggest(zero).refused or "")
    with pytest.raises(ConfigError, match=r"ratio\.end: .* divides by zero"):
        SearchSpace(config).config_of(zero.params)


def test_a_condition_on_a_step_holds_though_steps_do_not_add_up() -> None:
    space = {
        "ratio.start": {"low": 0.1, "high": 0.5, "step": 0.1},
        "loss.gamma": {"low": 1, "high": 2, "when": {"ratio.start": 0.3}},
    }
    config = study(space)
    check_space(config)
    params = {"ratio.start": 0.1 + 2 * 0.1, "loss.gamma": 1.5}
    assert "loss.gamma" in SearchSpace(config).config_of(params)


def test_a_condition_sees_what_a_searched_variant_brings() -> None:
    space = {
        "selection.strength": {"low": 0.5, "high": 2.0, "when": {"selection.mode": "soft"}},
        "variant": {"choices": ["amlp", "amlp-soft"]},
    }
    config = study(space)
    check_space(config)
    assert tuple(SearchSpace(config).parameters) == ("variant", "selection.strength")
    assert SearchSpace(config).config_of({"variant": "amlp"}) == {"variant": "amlp"}
    params = {"variant": "amlp-soft", "selection.strength": 1.0}
    assert SearchSpace(config).config_of(params) == params


def test_no_other_setting_lays_values_under_others() -> None:
    plain = flatten(PretrainConfig())
    for name, value in plain.items():
        kind = find_field(PretrainConfig, name).annotation
        options = get_args(kind) if isinstance(value, str) else ()
        for other in options:
            try:
                changed = flatten(build(PretrainConfig, nest({name: other}), "x"))
            except ConfigError:
                continue
            if name not in LAYERS:
                assert {n for n in plain if changed[n] != plain[n]} <= {name}


def test_parameters_are_asked_as_written_but_after_what_they_need() -> None:
    assert sampling_order(study(CONDITIONAL).space) == [
        "ratio.shape",
        "ratio.power",
        "selection.clusters",
    ]
    assert sampling_order(study(DERIVED).space) == [
        "ratio.start",
        "delta",
        "ratio.end",
        "ratio.shape",
        "ratio.power",
        "half",
        "selection.clusters",
    ]


def test_without_defaults_no_first_trial_is_given() -> None:
    assert SearchSpace(study(CONDITIONAL)).defaults() is None


def test_the_first_trial_tries_the_defaults_and_the_studys_own_values() -> None:
    space = {
        "selection.mode": {"choices": ["hard", "soft"], "default": "soft"},
        "selection.strength": {"low": 0.5, "high": 2.0, "when": {"selection.mode": "soft"}},
        "selection.lesion_share": {"low": 0.5, "high": 0.9, "when": {"selection.mode": "hard"}},
        "selection.clusters": {"low": 2, "high": 6, "default": 4},
        "ratio.start": {"low": 0.1, "high": 0.5},
    }
    config = study(space, pretrain={"ratio": {"start": 0.4}})
    check_space(config)
    first = SearchSpace(config).defaults()
    assert first == {
        "selection.mode": "soft",
        "selection.strength": 1.0,
        "selection.clusters": 4,
        "ratio.start": 0.4,
    }
    assert type(first["selection.clusters"]) is int
    assert SearchSpace(config).suggest(FixedTrial(first)).params == first


# The same space in YAML, in Python, and as a function

YAML = """\
name: same
seed: 7
space:
  selection.mode: {choices: [hard, soft]}
  selection.strength: {low: 0.3, high: 2.0, when: {selection.mode: soft}}
  selection.clusters: {low: 2, high: 6, when: {selection.mode: hard}}
  ratio.start: {low: 0.15, high: 0.5}
  delta: {low: 0, high: 0.4, step: 0.05}
  ratio.end: {expression: "ratio.start + delta"}
  lr: {low: 1e-4, high: 1e-2, log: true}
  ratio.shape: cosine
"""
PYTHON = {
    "selection.mode": Choice(choices=["hard", "soft"]),
    "selection.strength": Range(low=0.3, high=2.0, when={"selection.mode": "soft"}),
    "selection.clusters": Range(low=2, high=6, when={"selection.mode": ["hard"]}),
    "ratio.start": Range(low=0.15, high=0.5),
    "delta": Range(low=0, high=0.4, step=0.05),
    "ratio.end": Derived(expression="ratio.start + delta"),
    "lr": Range(low=1e-4, high=1e-2, log=True),
    "ratio.shape": Fixed(value="cosine"),
}


def as_function(trial: optuna.Trial) -> dict[str, Any]:
    mode = trial.suggest_categorical("selection.mode", ["hard", "soft"])
    if mode == "soft":
        trial.suggest_float("selection.strength", 0.3, 2.0)
    else:
        trial.suggest_int("selection.clusters", 2, 6)
    start = trial.suggest_float("ratio.start", 0.15, 0.5)
    delta = trial.suggest_float("delta", 0, 0.4, step=0.05)
    trial.suggest_float("lr", 1e-4, 1e-2, log=True)
    return {"ratio.end": start + delta, "ratio.shape": "cosine"}


def samplers() -> dict[str, optuna.samplers.BaseSampler]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        tpe = optuna.samplers.TPESampler(seed=7, n_startup_trials=4, multivariate=True, group=True)
    return {"random": optuna.samplers.RandomSampler(7), "tpe": tpe}


def suggested_trials(
    config: StudyConfig, sampler: optuna.samplers.BaseSampler
) -> list[tuple[Any, Any]]:
    search = optuna.create_study(sampler=sampler, direction="maximize")
    trials = []
    for _ in range(15):
        trial = search.ask()
        values = SearchSpace(config).suggest(trial).values
        search.tell(trial, values["ratio.end"] - abs(values["lr"] - 3e-3))
        trials.append((trial.params, values))
    return trials


@pytest.mark.parametrize("sampler", ["random", "tpe"])
def test_yaml_python_and_a_function_give_the_same_suggestions(sampler: str, tmp_path: Path) -> None:
    file = tmp_path / "study.yaml"
    file.write_text(YAML)
    declared = build_study(read_yaml(file), str(file))
    python = StudyConfig(name="same", seed=7, space=PYTHON)
    # A function is kept by its name.
    function = StudyConfig(name="same", seed=7, space=as_function)
    allow_code(function.space)
    write_yaml(declared, tmp_path / "kept.yaml")
    reread = build_study(read_yaml(tmp_path / "kept.yaml"), "kept.yaml")
    first = suggested_trials(declared, samplers()[sampler])
    assert len({str(values) for _, values in first}) == 15
    for other in (python, function, reread):
        check_space(other)
        assert suggested_trials(other, samplers()[sampler]) == first


# Functions


def module(folder: Path, body: str, name: str) -> str:
    lines = "\n    ".join(body.splitlines())
    (folder / f"{name}.py").write_text(f"import optuna\n\n\ndef space(trial):\n    {lines}\n")
    allow_code(f"{name}:space")
    return f"{name}:space"


def test_a_function_is_found_beside_its_study_file(tmp_path: Path) -> None:
    space = module(
        tmp_path,
        "return {'ratio.end': trial.suggest_float('ratio.start', 0.1, 0.5) + 0.2}",
        "beside",
    )
    file = tmp_path / "study.yaml"
    file.write_text(f"name: s\nspace: {space}\n")
    config = build_study(read_yaml(file), str(file))
    assert config.space == "beside:space"
    assert SearchSpace(config).config_of({"ratio.start": 0.25}) == {
        "ratio.start": 0.25,
        "ratio.end": 0.45,
    }
    assert SearchSpace(config).parameters == {"ratio.start": Range(low=0.1, high=0.5)}


def test_a_function_may_refuse_and_ask_for_a_requirement(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = """\
start = trial.suggest_float("ratio.start", 0.1, 0.5)
end = trial.suggest_float("ratio.end", 0.1, 0.9)
if end < start:
    raise optuna.TrialPruned("falls")"""
    monkeypatch.chdir(tmp_path)
    config = study(module(tmp_path, body, "refusing"), require=["ratio.end - ratio.start < 0.4"])
    check_space(config)
    assert (
        SearchSpace(config).suggest(FixedTrial({"ratio.start": 0.4, "ratio.end": 0.3})).refused
        == "falls"
    )
    assert (
        SearchSpace(config).broken_requirement({"ratio.start": 0.1, "ratio.end": 0.8}) is not None
    )
    assert all(0 <= trial.ratio.end - trial.ratio.start < 0.4 for trial in sample_configs(config))


BAD_FUNCTIONS = {
    "misspelled": (
        "trial.suggest_float('ratio.strat', 0.1, 0.5)",
        ["'ratio.strat'; did you mean ratio.start?"],
    ),
    "misspelled in what it returns": (
        "return {'ratio.strat': 0.2}",
        ["unknown setting 'ratio.strat'"],
    ),
    "outside, and unused": (
        "trial.suggest_float('ratio.end', 0.1, 1.5)\ntrial.suggest_float('delta', 0, 1)",
        ["ratio.end is 1.5, but must be less than 1.", "unknown setting 'delta'"],
    ),
    "real for whole": (
        "trial.suggest_float('selection.clusters', 2, 6)",
        ["an integer; ask with suggest_int."],
    ),
    "refused choice": (
        "trial.suggest_categorical('ratio.shape', ['linear', 'square'])",
        ["ratio.shape is 'square'"],
    ),
    "strange choice": (
        "trial.suggest_categorical('ratio.points', [((0, 0.3), (1, 0.5))])",
        ["has choices that are"],
    ),
    "combination": (
        "trial.suggest_int('model.width', 24, 48, "
        "step=4)\ntrial.suggest_categorical('model.heads', [2, 3])",
        ["some combinations are refused (model: width"],
    ),
    "failing": ("return 1 / 0", ["failed: ZeroDivisionError: division by zero."]),
    "returning": ("return 5", ["returned int; it may return nothing, or a mapping"]),
    "refusing": ("raise optuna.TrialPruned('never')", ["never in 100 of 100 random draws"]),
}


@pytest.mark.filterwarnings("ignore:Choices for a categorical distribution")
@pytest.mark.parametrize("name", BAD_FUNCTIONS)
def test_a_function_is_checked_by_drawing(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    body, messages = BAD_FUNCTIONS[name]
    values = {
        "name": "s",
        "space": module(tmp_path, body, f"bad_{list(BAD_FUNCTIONS).index(name)}"),
    }
    with pytest.raises(ConfigError) as caught:
        build_study(values, "study.yaml")
    assert len(caught.value.messages) == len(messages), caught.value.messages
    for fault, words in zip(caught.value.messages, messages, strict=True):
        assert words in fault


def test_a_module_of_a_name_in_use_is_not_taken_for_it(tmp_path: Path) -> None:
    module(tmp_path, "return {}", "json")
    file = tmp_path / "study.yaml"
    file.write_text("name: s\nspace: json:space\n")
    with pytest.raises(
        ConfigError, match=r"study.yaml:2: space: .* a module 'json' is in use already"
    ):
        build_study(read_yaml(file), str(file))


def test_a_function_that_no_other_process_finds_is_refused() -> None:
    with pytest.raises(ConfigError, match="cannot be imported by another process"):
        study(lambda trial: None)  # type: ignore[arg-type]


def test_the_ratio_of_population_based_training_is_left_to_its_own_check() -> None:
    space = {"ratio.points": {"low": 0.2, "high": 0.8}, "lr": {"low": 1e-4, "high": 2.0}}
    values = {"name": "s", "space": space, "sampler": {"name": "pbt"}}
    with pytest.raises(ConfigError) as caught:
        build_study(values, "study.yaml")
    assert caught.value.messages == (
        "study.yaml: space: lr is 2.0, but must be less than or equal to 1.",
    )
    ranges = {"ratio.points": {"low": 0.2, "high": 0.8}, "lr": {"low": 1e-4, "high": 0.1}}
    config = build_study({**values, "space": ranges}, "study.yaml")
    assert all(
        trial.ratio.points == () and 1e-4 <= trial.lr <= 0.1 for trial in sample_configs(config)
    )
