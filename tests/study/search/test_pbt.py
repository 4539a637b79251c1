"""Population-based training: what it decides, from stored trials alone, and that steps train
as one run."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState

from amlp_ray.config import StudyConfig
from amlp_ray.config.base import build
from amlp_ray.config.overrides import merge
from amlp_ray.data.dataset import PatchDataset
from amlp_ray.errors import ConfigError
from amlp_ray.launch.job import run_job
from amlp_ray.launch.run_spec import RunSpec
from amlp_ray.method.masking_ratio import masking_ratio
from amlp_ray.study.search.pbt import (
    PbtStep,
    Population,
    check_population,
    leader,
    learned_schedule,
    lineage,
)
from amlp_ray.study.storage.trial_record import TrialRecord
from amlp_ray.training.checkpoint.manager import checkpoints, read_checkpoint
from amlp_ray.training.pretrain import Hooks

MEMBERS, GENERATIONS = 8, 5
PBT: dict[str, Any] = {
    "name": "pbt",
    "seed": 5,
    "pretrain": {"epochs": 20, "batch_size": 12},
    "space": {"ratio.points": {"low": 0.1, "high": 0.9}},
    "sampler": {
        "name": "pbt",
        "population_size": MEMBERS,
        "interval": 4,
        "exploit": 0.25,
        "perturb": 0.1,
    },
    "pruner": {"name": "none"},
    "budget": {"trials": MEMBERS * GENERATIONS},
}
MORE: dict[str, Any] = {
    "ratio.points": {"low": 0.1, "high": 0.9},
    "lr": {"low": 1e-4, "high": 1e-2, "log": True},
    "loss.gamma": {"low": 0.0, "high": 4.0, "step": 0.5},
    "loss.mix": {"choices": [0.0, 0.25, 0.5, 0.75, 1.0]},
    "selection.lesion_share": {"low": 0.5, "high": 1.0},
}

Score = Callable[[list[PbtStep]], float | None]  # of a lineage; None fails


def study(**changes: Any) -> StudyConfig:
    return build(StudyConfig, merge(PBT, changes), "test")


def memory() -> optuna.Study:
    return optuna.create_study(direction="maximize")


def begin(store: optuna.Study, segment: PbtStep) -> int:
    template = FrozenTrial(
        number=-1,
        trial_id=-1,
        state=TrialState.RUNNING,
        value=None,
        datetime_start=None,
        datetime_complete=None,
        params=segment.params,
        distributions=segment.distributions,
        user_attrs=dict(segment.attributes),
        system_attrs={},
        intermediate_values={},
    )
    trial_id = store._storage.create_new_trial(store._study_id, template_trial=template)
    return store._storage.get_trial_number_from_id(trial_id)


def end(
    store: optuna.Study, number: int, segment: PbtStep, value: float | None, epochs: int = 20
) -> None:
    trial = optuna.trial.Trial(store, store.get_trials(deepcopy=False)[number]._trial_id)
    if value is None:
        store.tell(trial, state=TrialState.FAIL)
    elif segment.until == epochs:
        store.tell(trial, value)
    else:
        trial.report(value, segment.until)
        store.tell(trial, state=TrialState.PRUNED)


def play(
    config: StudyConfig,
    store: optuna.Study,
    score: Score,
    *,
    side_by_side: int = 1,
    shuffle: int = 0,
) -> None:
    """Run a study to its end, its trials `side_by_side` ending in an order of `shuffle`."""
    order = random.Random(shuffle)
    running: dict[int, PbtStep] = {}
    while True:
        trials = store.get_trials(deepcopy=False)
        following = Population(config).next_step(
            trials
        )  # a new one each time: it has no state of its own
        if isinstance(following, PbtStep) and len(running) < side_by_side:
            running[begin(store, following)] = following
            continue
        if not running:
            assert following is None
            return
        number = order.choice(sorted(running))
        line = [Population(config).step_of(trials, n) for n in lineage(trials, number)]
        end(store, number, running.pop(number), score(line))


def best_ratio(share: float) -> float:
    return 0.3 + 0.4 * share  # the best ratio rises


def level(segment: PbtStep) -> float:
    ratio: float = segment.params["ratio.points"]
    return ratio


def schedule_score(line: list[PbtStep]) -> float:
    """High where each step of the whole lineage moved to what would be best there."""
    return 1.0 - sum((level(segment) - best_ratio(segment.until / 20)) ** 2 for segment in line)


def records(store: optuna.Study) -> list[tuple[Any, ...]]:
    return [
        (t.params, t.user_attrs, t.state, TrialRecord(t).value)
        for t in store.get_trials(deepcopy=False)
    ]


def test_a_study_runs_whole_generations_and_says_pruned_of_all_but_the_last() -> None:
    store = memory()
    play(study(), store, schedule_score)
    trials = store.get_trials(deepcopy=False)
    members = [(t.user_attrs["generation"], t.user_attrs["member"]) for t in trials]
    assert members == [(g, m) for g in range(GENERATIONS) for m in range(MEMBERS)]
    assert [t.state for t in trials[:-MEMBERS]] == [TrialState.PRUNED] * (
        MEMBERS * (GENERATIONS - 1)
    )
    assert [t.state for t in trials[-MEMBERS:]] == [TrialState.COMPLETE] * MEMBERS
    assert all(t.user_attrs["parent"] is None for t in trials[:MEMBERS])
    assert Population(study()).next_step(trials) is None


def test_a_rising_schedule_is_learned_where_a_rising_one_is_best() -> None:
    learned: list[float] = []
    blind: list[float] = []
    rises = []
    for seed in range(10):
        for score, scores in ((schedule_score, learned), (lambda line: 0.5, blind)):
            store, config = memory(), study(seed=seed)
            play(config, store, score)
            trials = store.get_trials(deepcopy=False)
            best = leader(trials)
            assert best is not None
            line = [Population(config).step_of(trials, n) for n in lineage(trials, best.number)]
            scores.append(schedule_score(line))
            if score is schedule_score:
                assert best.value == max(t.value for t in trials[-MEMBERS:] if t.value is not None)
                schedule = learned_schedule(config, trials, best.number)
                rises.append(schedule[-1][1] - schedule[0][1])
    assert sum(rises) / 10 > 0.1  # of 0.32 that four steps can reach
    assert min(learned) > 0.9
    assert sum(learned) / 10 > sum(blind) / 10 + 0.2


@pytest.mark.parametrize(("side_by_side", "shuffle"), [(3, 1), (8, 2), (100, 3)])
def test_the_result_does_not_depend_on_how_many_run_at_once_and_which_ends_first(
    side_by_side: int, shuffle: int
) -> None:
    config = study(space=MORE)
    one, many = memory(), memory()
    play(config, one, schedule_score)
    play(config, many, schedule_score, side_by_side=side_by_side, shuffle=shuffle)
    assert records(many) == records(one)


def test_a_study_goes_on_from_its_journal_as_if_it_had_not_been_killed(tmp_path: Path) -> None:
    config = study(space=MORE)
    whole = memory()
    play(config, whole, schedule_score)

    def opened() -> optuna.Study:
        storage = JournalStorage(JournalFileBackend(str(tmp_path / "journal")))
        return optuna.create_study(
            study_name="pbt", storage=storage, direction="maximize", load_if_exists=True
        )

    for killed_after in (3, MEMBERS, 13, 20, math.inf):
        store, begun = opened(), 0
        for trial in store.get_trials(states=(TrialState.RUNNING,)):  # taken over first
            trials = store.get_trials(deepcopy=False)
            segment = Population(config).step_of(trials, trial.number)
            line = [Population(config).step_of(trials, n) for n in lineage(trials, trial.number)]
            end(store, trial.number, segment, schedule_score(line))
        while isinstance(
            following := Population(config).next_step(store.get_trials(deepcopy=False)), PbtStep
        ):
            number = begin(store, following)
            if (begun := begun + 1) > killed_after:
                break
            trials = store.get_trials(deepcopy=False)
            assert Population(config).step_of(trials, number) == following
            line = [Population(config).step_of(trials, n) for n in lineage(trials, number)]
            end(store, number, following, schedule_score(line))
    assert records(opened()) == records(whole)


def test_a_generation_waits_for_the_last_member_of_the_one_before() -> None:
    config, store = study(), memory()
    population = Population(config)
    running = {}
    for _ in range(MEMBERS):
        segment = population.next_step(store.get_trials())
        assert isinstance(segment, PbtStep)
        running[begin(store, segment)] = segment
    for number, segment in running.items():
        assert population.next_step(store.get_trials()) == "wait"
        end(store, number, segment, 0.5)
    following = population.next_step(store.get_trials())
    assert isinstance(following, PbtStep)
    assert (following.generation, following.member, following.until) == (1, 0, 8)


def after_one_generation(
    config: StudyConfig, scores: list[float | None]
) -> tuple[optuna.Study, list[PbtStep]]:
    """The second generation, all of it begun, where members of the first got `scores`."""
    store = memory()
    play(study(**config.model_dump(include={"space", "sampler", "seed"})), store, one_only(scores))
    trials = store.get_trials(deepcopy=False)
    second = [
        Population(config).step_of(trials, n) for n in range(MEMBERS, min(2 * MEMBERS, len(trials)))
    ]
    return store, second


def one_only(scores: list[float | None]) -> Score:
    return lambda line: scores[line[0].member] if len(line) == 1 else 0.5


SCORES: list[float | None] = [
    0.1,
    0.8,
    0.3,
    0.9,
    0.4,
    0.2,
    0.5,
    0.6,
]  # best: members 3 and 1; worst: 0 and 5


def test_the_poorest_members_go_on_from_the_best_and_all_others_from_themselves() -> None:
    parents = set()
    for seed in range(20):
        _, second = after_one_generation(study(seed=seed), SCORES)
        assert all(
            segment.parent == segment.member for segment in second if segment.member not in (0, 5)
        )
        assert {second[0].parent, second[5].parent} <= {1, 3}
        parents |= {second[0].parent, second[5].parent}
    assert parents == {1, 3}  # drawn, not always the very best


def test_every_ratio_takes_a_step_and_other_values_change_on_replacement_only() -> None:
    config = study(space=MORE)
    store, second = after_one_generation(config, SCORES)
    trials = store.get_trials()
    for segment in second:
        assert segment.parent is not None
        parent = trials[segment.parent].params
        assert 0 < abs(level(segment) - parent["ratio.points"]) <= 0.1 * 0.8 + 1e-12
        others = {
            name for name in MORE if name != "ratio.points" and segment.params[name] != parent[name]
        }
        if segment.member not in (0, 5):
            assert not others
        else:
            assert {"lr", "selection.lesion_share"} <= others
            assert abs(math.log10(segment.params["lr"] / parent["lr"])) <= 0.1 * 2 + 1e-12
            assert abs(segment.params["loss.gamma"] - parent["loss.gamma"]) <= 0.5
            assert abs(segment.params["loss.mix"] - parent["loss.mix"]) <= 0.25


def test_values_stay_inside_their_ranges_and_on_their_grids_and_reach_both_neighbors() -> None:
    moves = set()
    for seed in range(6):
        config = study(seed=seed, space=MORE, sampler={"perturb": 0.5, "exploit": 0.5})
        store = memory()
        play(config, store, schedule_score)
        trials = store.get_trials(deepcopy=False)
        for trial in trials:
            assert 0.1 <= trial.params["ratio.points"] <= 0.9
            assert 1e-4 <= trial.params["lr"] <= 1e-2
            assert trial.params["loss.gamma"] in [i / 2 for i in range(9)]
            assert trial.params["loss.mix"] in MORE["loss.mix"]["choices"]
            if (parent := trial.user_attrs["parent"]) is not None:
                moves.add(trial.params["loss.mix"] - trials[parent].params["loss.mix"])
    assert {-0.25, 0.0, 0.25} <= moves


def test_first_ratios_are_spread_over_their_range_and_defaults_are_tried_first() -> None:
    store = memory()
    play(study(), store, schedule_score)
    first = [trial.params["ratio.points"] for trial in store.get_trials()[:MEMBERS]]
    assert [int((ratio - 0.1) / 0.1) for ratio in first] == list(range(MEMBERS))
    defaults = study(space={"ratio.points": {"low": 0.1, "high": 0.9, "default": 0.75}})
    segment = Population(defaults).next_step([])
    assert isinstance(segment, PbtStep)
    assert segment.params == {"ratio.points": 0.75}


def test_failed_members_are_replaced_before_the_poorest() -> None:
    scores = [None, 0.8, 0.3, 0.9, None, 0.2, 0.5, 0.6]
    _, second = after_one_generation(study(), scores)
    assert {second[0].parent, second[4].parent} <= {1, 3}
    assert second[5].parent == 5  # two failed, so the share that is replaced is used up


def test_many_failures_are_all_replaced_by_those_that_are_left() -> None:
    _, second = after_one_generation(study(), [None, None, None, 0.4, None, None, None, None])
    assert [segment.parent for segment in second] == [3] * MEMBERS


def test_a_generation_that_failed_as_a_whole_ends_the_study() -> None:
    store, second = after_one_generation(study(), [None] * MEMBERS)
    assert second == []
    assert Population(study()).next_step(store.get_trials()) is None


def test_a_failed_trial_that_was_tried_again_counts_by_its_last_try() -> None:
    config, store = study(), memory()
    population = Population(config)
    for member in range(MEMBERS):
        segment = population.next_step(store.get_trials())
        assert isinstance(segment, PbtStep)
        end(store, begin(store, segment), segment, None if member == 2 else 0.1 * member)
    again = population.step_of(store.get_trials(), 2)
    number = begin(store, again)
    assert population.next_step(store.get_trials()) == "wait"
    end(store, number, again, 0.99)
    second = []
    while (
        isinstance(segment := population.next_step(store.get_trials()), PbtStep)
        and segment.generation == 1
    ):
        second.append(segment)
        begin(store, segment)
    assert second[2].parent == number == MEMBERS


def test_trials_of_users_are_no_members() -> None:
    config, store = study(), memory()
    store.enqueue_trial({"ratio.points": 0.5})
    store.add_trial(optuna.trial.create_trial(value=1.0))
    play(config, store, schedule_score)
    trials = store.get_trials()
    assert len(trials) == 2 + MEMBERS * GENERATIONS
    best = leader(trials)
    assert best is not None
    assert min(lineage(trials, best.number)) >= 2


@pytest.mark.parametrize("update_per", ["epoch", "step"])
def test_a_step_continues_the_schedule_of_its_parent_and_changes_nothing_before_it(
    update_per: str,
) -> None:
    config = study(
        pretrain={"epochs": 18, "ratio": {"update_per": update_per}}
    )  # the last step is shorter
    store = memory()
    play(config, store, schedule_score)
    trials = store.get_trials()
    for trial in trials:
        segment = Population(config).step_of(trials, trial.number)
        continued = config.trial(segment.values, seed=segment.seed)
        assert continued.ratio.points == learned_schedule(config, trials, trial.number)
        assert continued.ratio.points[-1] == (segment.until / 18, level(segment))
        if segment.parent is None:
            assert [ratio for _, ratio in continued.ratio.points] == [level(segment)] * 2
            continue
        before = Population(config).step_of(trials, segment.parent)
        parent = config.trial(before.values, seed=before.seed)
        assert continued.ratio.points[:-1] == parent.ratio.points
        for epoch in range(1, before.until + 1):
            for step in range(3):
                ratios = [
                    masking_ratio(s.ratio, epoch, 18, step=step, steps=3)
                    for s in (continued, parent)
                ]
                assert ratios[0] == ratios[1]
    assert trials[-1].user_attrs["generation"] == 4
    assert Population(config).step_of(trials, trials[-1].number).until == 18


def test_other_values_of_the_space_reach_the_settings_of_a_trial() -> None:
    config = study(space={**MORE, "loss.weighting": {"value": "arl"}})
    segment = Population(config).next_step([])
    assert isinstance(segment, PbtStep)
    trial = config.trial(segment.values, seed=segment.seed)
    assert trial.ratio.shape == "points"
    assert trial.loss.weighting == "arl"
    assert (trial.lr, trial.loss.gamma) == (segment.params["lr"], segment.params["loss.gamma"])
    assert set(segment.params) == set(segment.distributions) == set(MORE)


FAULTS: list[tuple[dict[str, Any], str]] = [
    (
        {"budget": {"trials": 16}},
        r"budget\.trials is 16, .* 8 members x 5 generations of 4 epochs; set it to 40",
    ),
    ({"sampler": {"interval": 20}}, r"sampler\.interval 20 leaves one generation of the 20 epochs"),
    ({"pruner": {"name": "median"}}, r"pruner\.name median does nothing .* set it to none"),
    ({"require": ["lr < 1"]}, "require is not kept"),
    ({"limits": {"memory": 4}}, "limits is not kept"),
    ({"objectives": {"seconds": "minimize"}}, "by a score, not by seconds"),
    ({"pretrain": {"variant": "simsiam"}}, r"pretrain\.objective simsiam masks nothing"),
]


@pytest.mark.parametrize(
    ("changes", "message"), FAULTS, ids=[message[:25] for _, message in FAULTS]
)
def test_a_study_that_pbt_cannot_run_is_refused(changes: dict[str, Any], message: str) -> None:
    config = merge(PBT, changes)
    if "objectives" in changes:
        config["objectives"] = changes["objectives"]
    with pytest.raises(ConfigError, match=message):
        check_population(build(StudyConfig, config, "test"))


RATIO = {"ratio.points": {"low": 0.2, "high": 0.8}}
BAD_SPACES: list[tuple[Any, str]] = [
    ({"lr": {"low": 0.001, "high": 0.01}}, r"ratio\.points, .* is missing; give low and high"),
    ({"ratio.points": {"low": 0.0, "high": 0.8}}, r"is no range within 0-1"),
    ({"ratio.points": {"choices": [0.2, 0.8]}}, r"is no range within 0-1"),
    (
        {**RATIO, "ratio.start": {"low": 0.2, "high": 0.8}},
        r"cannot change ratio\.start in a running model",
    ),
    (
        {**RATIO, "model.depth": {"low": 1, "high": 4}},
        r"cannot change model\.depth in a running model",
    ),
    ({**RATIO, "loss.gama": {"low": 1, "high": 4}}, r"cannot change loss\.gama"),
    (
        {**RATIO, "lr": {"low": 1e-3, "high": 1e-2, "when": {"variant": "amlp"}}},
        r"lr has a condition",
    ),
    (
        {**RATIO, "loss.ccl_weight": {"low": 0.0, "high": 1.0}},
        r"loss\.ccl_weight reaches 0 .* stay above 0",
    ),
    ({**RATIO, "loss.ranking_weight": {"choices": [0, 1.0]}}, r"loss\.ranking_weight reaches 0"),
    ({**RATIO, "loss.clip_max": {"low": 0.5, "high": 4.0}}, r"clip_max"),
    ("spaces:space", "needs a declared space, not a function"),
]


@pytest.mark.parametrize(
    ("space", "message"), BAD_SPACES, ids=[message[:25] for _, message in BAD_SPACES]
)
def test_a_space_that_pbt_cannot_search_is_refused(space: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_population(build(StudyConfig, {**PBT, "space": space}, "test"))


def test_all_faults_are_told_at_once_and_a_good_study_has_none() -> None:
    check_population(study(space=MORE))
    with pytest.raises(ConfigError) as caught:
        check_population(
            study(
                space={"model.depth": {"low": 1, "high": 4}},
                budget={"trials": 3},
                require=["lr < 1"],
            )
        )
    assert all(word in str(caught.value) for word in ("model.depth", "budget.trials", "require"))


def test_steps_of_a_population_train_as_one_run_of_the_learned_schedule_to_the_bit(
    phantom_dataset: PatchDataset, tmp_path: Path
) -> None:
    model = {"width": 24, "depth": 1, "heads": 2, "decoder_width": 16, "decoder_heads": 2}
    config = study(
        pretrain={"epochs": 5, "model": model},
        sampler={"population_size": 3, "interval": 2, "exploit": 0.4, "perturb": 0.2},
        budget={"trials": 9},
    )
    check_population(config)
    store, population = memory(), Population(config)

    def run_spec(segment: PbtStep, folder: Path, fork: Path | None) -> RunSpec:
        pretrain = config.trial(segment.values, seed=segment.seed)
        return RunSpec(
            config=pretrain,
            data=str(phantom_dataset.path),
            folder=folder,
            until=segment.until,
            fork=fork,
        )

    while isinstance(segment := population.next_step(store.get_trials()), PbtStep):
        number = begin(store, segment)
        fork = None if segment.parent is None else tmp_path / str(segment.parent)
        result = run_job(run_spec(segment, tmp_path / str(number), fork), Hooks())
        # Members that began low are the poor ones, so that some go on from another.
        end(
            store,
            number,
            segment,
            population.step_of(store.get_trials(), number).values["ratio.points"][0][1],
            5,
        )
        assert result.epochs == segment.until
    trials = store.get_trials()
    assert len(trials) == 9
    exploited = [
        t
        for t in trials
        if t.user_attrs["parent"] is not None and t.user_attrs["parent"] % 3 != t.number % 3
    ]
    last = max(t.number for t in exploited)
    line = lineage(trials, last)
    alone = population.step_of(trials, last)
    run_job(run_spec(alone, tmp_path / "alone", None), Hooks())
    states = [read_checkpoint(checkpoints(tmp_path / name)[0]) for name in (str(last), "alone")]
    assert len(line) >= 2
    assert states[0]["epoch"] == states[1]["epoch"] == alone.until
    assert all(
        torch.equal(states[0]["model"][name], value) for name, value in states[1]["model"].items()
    )
    assert states[0]["config"] == states[1]["config"]
