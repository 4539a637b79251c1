"""What a report counts, what it calls the best, and what it keeps apart."""

import json
from pathlib import Path

import pytest
from helpers.finished_studies import SPACE, add_baseline, add_picture, add_trial, new_study
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import TrialState, create_trial

from amlp_ray.config import Choice, Derived, Fixed, Range
from amlp_ray.config.yaml_file import write_yaml
from amlp_ray.study.report import write_report
from amlp_ray.study.report.figures import fronts
from amlp_ray.study.report.report_data import collect
from amlp_ray.study.report.search_space import rules, space
from amlp_ray.study.report.tables import Table, front, notes, sizes
from amlp_ray.study.storage.study_store import StudyStore

SEVERAL = {
    "objectives": {"gpu_seconds": "minimize", "dsc": "maximize"},
    "pruner": {"metric": "dsc"},
}


def texts(table: Table) -> list[list[str]]:
    return [[cell.text for cell in row] for row in table.rows]


def study_of_two_objectives(folder: Path, **config) -> StudyStore:
    """Trials of rising DSC and cost, and one that trial 2 beats in both."""
    store = new_study(folder, **SEVERAL, **config)
    for dsc, cost in ((0.42, 10.0), (0.5, 30.0), (0.46, 20.0), (0.44, 25.0)):
        add_trial(store, dsc, values=[cost, dsc], attributes={"stats": {"gpu_seconds": cost}})
    return store


def test_front_holds_trials_that_none_beats_and_the_best_is_the_best_by_the_metric_on_it(
    tmp_path: Path,
) -> None:
    data = collect(study_of_two_objectives(tmp_path / "s"))
    assert {run.number for run in data.front} == {0, 1, 2}
    assert data.best is not None
    assert data.best.number == 1
    assert data.best.dsc == 0.5  # the second objective
    assert [row[0] for row in texts(front(data))] == ["trial 1", "trial 2", "trial 0"]
    assert set(data.importances) == {"gpu_seconds", "dsc"}


def test_trials_beyond_the_limits_are_neither_best_nor_on_the_front(tmp_path: Path) -> None:
    store = study_of_two_objectives(tmp_path / "s", limits={"gpu_seconds": 22.0})
    data = collect(store)
    assert {run.number for run in data.front} == {0, 2}
    assert data.best is not None
    assert data.best.number == 2
    assert notes(data.search[1]) == "beyond the limits"
    drawn = fronts(data)[0].figure
    assert drawn is not None
    assert {trace.name: list(trace.x) for trace in drawn.data} == {
        "breaks a limit": [30.0, 25.0],
        "Pareto front": [10.0, 20.0],
    }


def test_best_beyond_the_limits_says_so_where_no_trial_keeps_them(tmp_path: Path) -> None:
    page = write_report(
        study_of_two_objectives(tmp_path / "s", limits={"gpu_seconds": 5.0})
    ).read_text()
    assert "No complete trial keeps the limits, and neither does this one." in page


def test_page_of_several_objectives_has_a_front_and_importances_of_each(tmp_path: Path) -> None:
    page = write_report(study_of_two_objectives(tmp_path / "s")).read_text()
    assert "<h2>Pareto front</h2>" in page
    assert "3 of 4 complete trials are beaten by no other in every objective." in page
    assert 'id="plot-front_gpu_seconds"' in page
    assert "Importances for GPU-seconds" in page
    assert "Objectives: GPU-seconds (minimize), DSC (maximize)." in page


def test_pruned_trial_of_several_objectives_stands_at_its_last_rung(tmp_path: Path) -> None:
    store = new_study(tmp_path / "s", **SEVERAL)
    store.search().add_trial(
        create_trial(state=TrialState.PRUNED, intermediate_values={5: 0.3, 10: 0.4})
    )
    assert collect(store).search[0].metric_value == 0.4


def test_baseline_of_a_study_of_several_objectives_has_its_metric_as_its_only_value(
    tmp_path: Path,
) -> None:
    store = study_of_two_objectives(tmp_path / "s")
    add_baseline(store, "mae", 0, 0.45)
    assert collect(store).baselines[0].dsc == 0.45


def test_metric_other_than_dsc_ranks_trials_and_dsc_is_still_known(tmp_path: Path) -> None:
    store = new_study(tmp_path / "s", objectives={"ap": "maximize"})
    add_trial(store, 0.6, attributes={"stats": {"scores": {"ap": 0.6, "dsc": 0.41}}})
    add_trial(store, 0.5, attributes={"stats": {"scores": {"ap": 0.5, "dsc": 0.45}}})
    best = collect(store).best
    assert best is not None
    assert (best.number, best.metric_value, best.dsc) == (0, 0.6, 0.41)
    assert "Trial 0, Patch AP 0.600, after 100 epochs." in write_report(store).read_text()


def test_imported_trials_and_copies_are_shown_and_never_counted_or_best(tmp_path: Path) -> None:
    store = new_study(tmp_path / "s")
    add_trial(store, 0.5)
    add_trial(store, 0.9, attributes={"source": "import old.csv"})
    add_trial(store, 0.5, attributes={"copy_of": 0})
    data = collect(store)
    assert [
        [run.number for run in group] for group in (data.search, data.imported, data.copies)
    ] == [[0], [1], [2]]
    assert data.best is not None
    assert data.best.number == 0
    assert data.usage.trials == 1
    page = write_report(store).read_text()
    assert "1: 1 COMPLETE; 1 answered from the store; 1 imported" in page
    assert ">same as trial 0</td>" in page
    assert ">from import old.csv</td>" in page
    assert "1 from old.csv: the sampler learns from them" in page
    assert "1 trial of known settings, 100 epochs not trained" in page


def test_running_trials_are_interrupted_only_where_nobody_runs_the_study(tmp_path: Path) -> None:
    store = new_study(tmp_path / "s")
    add_trial(store, 0.5, state="RUNNING")
    assert collect(store).search[0].state_name == "INTERRUPTED"
    assert "no process runs the study now" in write_report(store).read_text()
    with store.lock():
        assert collect(StudyStore(store.folder)).search[0].state_name == "RUNNING"


def test_scores_that_were_stored_while_a_trial_ran_are_its_rungs(tmp_path: Path) -> None:
    store = new_study(tmp_path / "s")
    trial = store.search().ask()
    trial.report(0.3, 10)
    trial.report(0.4, 20)
    run = collect(StudyStore(store.folder)).search[0]
    assert (run.rungs, run.metric_value, run.epochs) == ({10: 0.3, 20: 0.4}, 0.4, 20)


def test_retries_and_lost_processes_are_noted(tmp_path: Path) -> None:
    store = new_study(tmp_path / "s")
    add_trial(store, 0.0, state="FAIL")
    add_trial(store, 0.5, attributes={"retry_of": 0, "lost": 2})
    page = write_report(store).read_text()
    assert ">trial 0 again; its process was lost twice</td>" in page
    assert "2, of 1 trial: these are no failures" in page
    assert "1; 1 trial tried again what had failed" in page


def test_table_reads_scores_from_the_store_and_opens_no_file_for_them(tmp_path: Path) -> None:
    store = new_study(tmp_path / "s")
    folder = add_trial(store, 0.5, attributes={"stats": {"scores": {"dsc": 0.5, "ppv": 0.77}}})
    folder.joinpath("score.json").unlink()
    assert collect(store).search[0].measure("ppv") == 0.77


def test_dsc_by_size_is_shown_where_it_was_measured(tmp_path: Path) -> None:
    store = new_study(tmp_path / "s")
    add_trial(
        store,
        0.5,
        attributes={"stats": {"scores": {"dsc_small": 0.2, "dsc_medium": 0.5, "dsc_large": None}}},
    )
    add_baseline(store, "mae", 0, 0.4)
    assert texts(sizes(collect(store), [])) == [["Best trial (0)", "0.200", "0.500", "\u2013"]]
    assert "Small (below 2 % of the image)" in write_report(store).read_text()
    assert "By size of the lesion" not in write_report(new_study(tmp_path / "t")).read_text()


def test_baseline_that_sees_true_masks_is_marked_and_compared_with_nothing(tmp_path: Path) -> None:
    store = new_study(tmp_path / "s", baselines=("mae", "oracle"))
    add_trial(store, 0.5)
    add_baseline(store, "mae", 0, 0.4)
    add_baseline(store, "oracle", 0, 0.7, uses_ground_truth=True)
    page = write_report(store).read_text()
    row = page[page.index("baseline oracle (uses true masks, compared with nothing)") :]
    assert row[: row.index("</tr>")].count("<td>\u2013</td>") >= 3  # difference, interval, reading
    assert "\u20130.200" not in page
    assert "-0.200" not in page


def test_space_says_what_is_searched_fixed_derived_or_a_helper(tmp_path: Path) -> None:
    declared = {
        "ratio.start": Range(low=0.1, high=0.6, default=0.3),
        "delta": Range(low=0, high=0.3),
        "ratio.end": Derived(expression="ratio.start + delta"),
        "ratio.shape": Choice(choices=["linear", "power"]),
        "ratio.power": Fixed(value=2.0, when={"ratio.shape": "power"}),
    }
    data = collect(new_study(tmp_path / "s", space=declared, require=["ratio.end <= 0.8"]))
    assert texts(space(data)) == [
        ["ratio.start", "searched", "0.1 to 0.6", "0.3", "always"],
        ["delta", "searched, a helper", "0 to 0.3", "\u2013", "always"],
        ["ratio.end", "derived", "= ratio.start + delta", "\u2013", "always"],
        ["ratio.shape", "searched", "linear, power", "\u2013", "always"],
        ["ratio.power", "fixed", "2", "\u2013", "ratio.shape is power"],
    ]
    assert "Required of every trial: ratio.end <= 0.8." in rules(data)
    assert data.parameter_names() == ["ratio.start", "delta", "ratio.shape"]


def test_space_of_a_python_function_is_shown_as_trials_were_drawn_from_it(tmp_path: Path) -> None:
    store = new_study(tmp_path / "s", space="my_spaces:space")
    distributions = {
        "lr": FloatDistribution(1e-5, 1e-2, log=True),
        "selection.clusters": IntDistribution(2, 8),
        "ratio.shape": CategoricalDistribution(["linear", "power"]),
    }
    params = {"lr": 1e-3, "selection.clusters": 3, "ratio.shape": "power"}
    store.search().add_trial(create_trial(value=0.5, params=params, distributions=distributions))
    data = collect(store)
    assert [row[:2] for row in texts(space(data))] == [
        ["lr", "1e-05 to 0.01, logarithmic"],
        ["selection.clusters", "2 to 8"],
        ["ratio.shape", "linear, power"],
    ]
    assert "The space is the Python function my_spaces:space" in rules(data)[0]
    write_report(store)


def test_every_run_of_the_study_is_listed_with_what_had_changed(tmp_path: Path) -> None:
    store = new_study(tmp_path / "s")
    add_trial(store, 0.5).joinpath("provenance.json").write_text(json.dumps({"commit": "a" * 40}))
    add_trial(store, 0.4).joinpath("provenance.json").write_text(json.dumps({"commit": "a" * 40}))
    page = write_report(store).read_text()
    assert "Runs of this study" not in page
    assert "states of the code" not in page
    later = {"commit": "b" * 40 + "+changes", "versions": {"torch": "2.9.0", "ray": "2.60.0"}}
    with store.folder.joinpath("environments.jsonl").open("a") as file:
        file.write(json.dumps(later) + '\n{"commit": "half')
    changed = {
        "commit": "b" * 40,
        "patch": "dirty-1.patch",
        "continued": [{"epoch": 5, "commit": "c" * 40}],
    }
    add_trial(store, 0.3).joinpath("provenance.json").write_text(json.dumps(changed))
    page = write_report(store).read_text()
    assert "commit: abc123 \u2192 bbbbbbbbbb+changes; versions.torch: 2.8.0 \u2192 2.9.0" in page
    assert "made by 2 states of the code" in page
    assert "aaaaaaaaaa: trials 0\u20131; bbbbbbbbbb with dirty-1.patch: trials 2." in page
    assert "continued by another: trials 2." in page


def test_population_has_its_lineage_and_the_best_of_its_latest_generation(tmp_path: Path) -> None:
    config = {
        "space": {"ratio.points": Range(low=0.1, high=0.9)},
        "pretrain": {"epochs": 4},
        "sampler": {"name": "pbt", "population_size": 2, "interval": 2},
        "pruner": {"name": "none"},
        "budget": {"trials": 4},
    }
    store = new_study(tmp_path / "s", **config)
    for generation, member, parent, ratio, value in (
        (0, 0, None, 0.3, 0.6),
        (0, 1, None, 0.7, 0.4),
        (1, 0, 0, 0.4, 0.5),
    ):
        store.search().add_trial(
            create_trial(
                value=value,
                params={"ratio.points": ratio},
                distributions={"ratio.points": FloatDistribution(0.1, 0.9)},
                user_attrs={"generation": generation, "member": member, "parent": parent},
            )
        )
    best = collect(store).best
    assert best is not None
    assert best.number == 2
    page = write_report(store).read_text()
    assert "<h2>Population</h2>" in page
    assert 'id="plot-lineage"' in page
    assert ">continues trial 0</td>" in page
    assert "none is pruned, so this is not asked here" in page


def test_parameters_of_an_older_space_are_named_as_such(tmp_path: Path) -> None:
    store = new_study(tmp_path / "s")
    add_trial(store, 0.5)
    changed = store.config().model_copy(
        update={"space": {k: v for k, v in SPACE.items() if k != "ratio.end"}}
    )
    write_yaml(changed, store.folder / "study.yaml")
    assert ["ratio.end", "no longer searched", "earlier trials have it", "\u2013"] in texts(
        space(collect(store))
    )


def test_pictures_of_the_best_trial_are_inside_the_page(tmp_path: Path) -> None:
    store = new_study(tmp_path / "s")
    add_picture(add_trial(store, 0.5), "case_0.png")
    assert write_report(store).read_text().count('<img src="data:image/png;base64,') == 1


@pytest.mark.parametrize("name", ["none", "median"])
def test_rules_say_whether_trials_are_pruned(tmp_path: Path, name: str) -> None:
    data = collect(new_study(tmp_path / "s", pruner={"name": name}))
    sentences = " ".join(rules(data))
    assert ("nothing is pruned" in sentences) == (name == "none")
