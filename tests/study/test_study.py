"""A whole study on phantoms, on a real Ray: run, resume, extend, look at, report."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import optuna
import pytest
import yaml
from helpers.tiny_study import TINY
from optuna.trial import TrialState

from amlp_ray.data.dataset import PatchDataset
from amlp_ray.errors import ConfigError, DataError, ResourceError, StudyError
from amlp_ray.study.execution.stop_reason import StopReason
from amlp_ray.study.storage.study_store import StudyStore, read_metrics
from amlp_ray.study.study import Study
from amlp_ray.utils.json_files import read_json, seal_json


def write(folder: Path, **changes: Any) -> Path:
    file = folder / "tiny.yaml"
    file.write_text(yaml.safe_dump(TINY | changes))
    return file


@contextmanager
def listener(notify: Callable[[str], object]) -> Iterator[None]:
    """Call `notify` with every message that the package logs."""
    handler = logging.Handler(logging.INFO)
    handler.emit = lambda record: notify(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("amlp_ray")
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


@pytest.fixture(scope="module")
def finished(
    phantom_dataset: PatchDataset, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Study, list[str]]:
    """A study that ran to its end, and the lines it said."""
    folder = tmp_path_factory.mktemp("study")
    lines: list[str] = []
    study = Study.load(write(folder), data=phantom_dataset.path, runs=folder / "runs")
    with listener(lines.append):
        study.run()
    return study, lines


@pytest.mark.ray
def test_every_trial_ends_once_and_leaves_its_files(finished: tuple[Study, list[str]]) -> None:
    study, _ = finished
    assert [t.state for t in study.store.search().trials] == [TrialState.COMPLETE] * 3
    assert [t.user_attrs["baseline"] for t in study.store.baselines().trials] == ["scratch", "mae"]
    for trial in study.store.search().trials:
        folder = study.store.trial_folder(trial.number)
        files = {
            "config.yaml",
            "metrics.jsonl",
            "score.json",
            "rungs",
            "encoder.safetensors",
            "checkpoint",
        }
        assert files | {"pictures", "provenance.json"} <= {p.name for p in folder.iterdir()}
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert [row["epoch"] for row in rows] == [1, 2, 3, 4]
        assert {
            row["epoch"]: row["dsc"] for row in rows if "dsc" in row
        } == trial.intermediate_values
        stats = trial.user_attrs["stats"]
        assert stats["epochs"] == 4
        assert stats["memory"] > 0
        assert stats["scores"]["dsc"] == trial.value
    score_file = study.store.folder / "baselines" / "scratch-0" / "score.json"
    scratch = json.loads(score_file.read_text())
    assert scratch["epoch"] == 0
    assert scratch["mean_mask_dsc"] > 0


@pytest.mark.ray
def test_plain_optuna_opens_the_journal(finished: tuple[Study, list[str]]) -> None:
    study, _ = finished
    backend = optuna.storages.journal.JournalFileBackend(str(study.store.folder / "study.journal"))
    loaded = optuna.load_study(study_name="tiny", storage=optuna.storages.JournalStorage(backend))
    assert loaded.best_value == study.best_trial.value


@pytest.mark.ray
def test_table_status_and_report_agree_with_the_store(finished: tuple[Study, list[str]]) -> None:
    study, lines = finished
    frame = study.trials_dataframe()
    assert list(frame["kind"]) == ["search"] * 3 + ["scratch", "mae"]
    assert frame["ratio.start"][:3].between(0.2, 0.5).all()
    status = study.status()
    assert status["states"] == {"COMPLETE": 3}
    assert status["best"][0]["dsc"] == frame["dsc"][:3].max() == study.best_trial.value
    assert status["baselines"]["mae"] == {"n": 1, "dsc": frame["dsc"][4]}
    assert status["budget"]["trials"] == {"used": 3, "allowed": 3}
    assert status["budget"]["epochs"]["used"] == 4 * 4
    assert (study.store.folder / "events.log").read_text().count("complete") == 5
    assert study.report().read_text().count("tiny") > 0
    assert sum("complete" in line for line in lines) == 5


@pytest.mark.ray
def test_a_finished_study_runs_no_more_and_an_extended_one_goes_on(
    finished: tuple[Study, list[str]], phantom_dataset: PatchDataset, tmp_path: Path
) -> None:
    study, _ = finished
    before = [t.params for t in study.store.search().trials]
    study.run()
    assert len(study.store.search().trials) == 3
    runs = study.store.folder.parent
    more = Study.load(write(tmp_path, budget={"trials": 4}), data=phantom_dataset.path, runs=runs)
    more.run()
    after = [t.params for t in more.store.search().trials]
    assert after[:3] == before
    assert len(after) == 4
    assert Study.open("tiny", runs=runs).config.budget.trials == 4
    more.extend(trials="+1")
    again = Study.load(write(tmp_path, budget={"trials": 4}), data=phantom_dataset.path, runs=runs)
    again.run()
    assert len(again.store.search().trials) == 5, (
        "the file that says 4 is no wish for less than was extended to"
    )


@pytest.mark.ray
def test_a_trial_that_diverges_fails_with_its_reason_and_the_study_goes_on(
    phantom_dataset: PatchDataset, tmp_path: Path
) -> None:
    space = {
        "lr": {"choices": [1.0]},
        "clip_grad": {"choices": [1e30]},
        "precision": {"choices": ["bf16"]},
    }
    study = Study.load(
        write(tmp_path, space=space, baselines=[], budget={"trials": 1}),
        data=phantom_dataset.path,
        runs=tmp_path,
    )
    study.store.trial_folder(0).mkdir(parents=True)
    (study.store.trial_folder(0) / "checkpoint").mkdir()
    (study.store.trial_folder(0) / "checkpoint" / f"epoch-1.{0:016x}.pt").write_bytes(
        b"no checkpoint"
    )
    study.run()
    (trial,) = study.store.search().trials
    assert trial.state == TrialState.FAIL
    assert "are damaged" in trial.user_attrs["reason"]
    assert "CheckpointError" in (study.store.trial_folder(0) / "error.txt").read_text()
    with pytest.raises(StudyError, match="no complete trial"):
        _ = study.best_trial


@pytest.mark.ray
def test_trials_of_two_workers_report_their_rungs_and_may_be_pruned(
    phantom_dataset: PatchDataset, tmp_path: Path
) -> None:
    changes = {
        "baselines": [],
        "pretrain": TINY["pretrain"] | {"epochs": 12},
        "resources": {"workers": 2, "cpus_per_worker": 0.9},
        "pruner": {"name": "median", "rungs": 6, "min_steps": 1, "n_startup_trials": 1},
        "budget": {"trials": 2},
        "space": {"lr": {"choices": [1e-3, 1e-7]}},
    }
    study = Study.load(write(tmp_path, **changes), data=phantom_dataset.path, runs=tmp_path)
    study.run()
    for trial in study.store.search().trials:
        rows = read_metrics(study.store.trial_folder(trial.number))
        assert [row["epoch"] for row in rows] == list(range(1, len(rows) + 1))
        assert {
            row["epoch"]: row["dsc"] for row in rows if "dsc" in row
        } == trial.intermediate_values
        full = max(trial.intermediate_values) == 12
        assert trial.state == (TrialState.COMPLETE if full else TrialState.PRUNED)


@pytest.mark.ray
def test_a_study_is_paused_by_another_and_goes_on_with_its_trials(
    phantom_dataset: PatchDataset, tmp_path: Path
) -> None:
    changes = {
        "pretrain": TINY["pretrain"] | {"epochs": 80},
        "baselines": [],
        "budget": {"trials": 2},
    }
    changes |= {"pruner": {"name": "none", "rungs": 16}}
    study = Study.load(
        write(tmp_path, **changes), data=phantom_dataset.path, runs=tmp_path / "runs"
    )
    other = Study(study.config, StudyStore(study.store.folder))
    lines: list[str] = []

    def notify(line: str) -> None:
        lines.append(line)
        if sum(" epoch " in text for text in lines) == 1 and " epoch " in line:
            other.pause()

    with listener(notify):
        study.run()
    assert study.stop_reason == StopReason.PAUSE
    assert other.status()["states"]["INTERRUPTED"] >= 1
    assert any("pause was asked for by process" in line for line in lines)
    other.resume()
    assert other.stop_reason == StopReason.DONE
    assert {t.state for t in other.store.search().trials} == {TrialState.COMPLETE}
    for trial in other.store.search().trials:
        rows = read_metrics(other.store.trial_folder(trial.number))
        assert [row["epoch"] for row in rows] == list(range(1, 81))


@pytest.mark.ray
def test_a_population_learns_a_schedule_step_by_step(
    phantom_dataset: PatchDataset, tmp_path: Path
) -> None:
    changes = {
        "baselines": [],
        "space": {"ratio.points": {"low": 0.2, "high": 0.8}},
        "sampler": {"name": "pbt", "population_size": 3, "interval": 2},
        "budget": {"trials": 6},
    }
    study = Study.load(
        write(tmp_path, **changes), data=phantom_dataset.path, runs=tmp_path / "runs"
    )
    study.run()
    trials = study.store.search().trials
    assert [t.state for t in trials] == [TrialState.PRUNED] * 3 + [TrialState.COMPLETE] * 3
    assert [t.user_attrs["stats"]["epochs"] for t in trials] == [2] * 6, (
        "each trains its own step only"
    )
    for trial in trials[3:]:
        rows = read_metrics(study.store.trial_folder(trial.number))
        assert [row["epoch"] for row in rows] == [1, 2, 3, 4]
        assert [row.get("inherited", False) for row in rows] == [True, True, False, False]


@pytest.mark.ray
def test_a_confirmation_scores_by_both_protocols_and_opens_the_test_images_once(
    phantom_dataset: PatchDataset, finished: tuple[Study, list[str]], tmp_path: Path
) -> None:
    shutil.copytree(finished[0].store.folder, tmp_path / "tiny")
    confirm = {"top": 1, "seeds": 2, "finetune": {"epochs": 1}}
    study = Study.load(
        tmp_path / "tiny" / "study.yaml", runs=tmp_path, overrides={"confirm": confirm}
    )
    study.confirm()
    trials = study.store.confirmation().trials
    best = f"trial-{study.best_trial.number}"
    assert {(t.user_attrs["candidate"], t.user_attrs["repeat"]) for t in trials} == {
        (name, repeat) for name in (best, "scratch", "mae") for repeat in (0, 1)
    }
    for trial in trials:
        folder = study.store.confirm_folder(
            trial.user_attrs["candidate"], trial.user_attrs["repeat"]
        )
        test = read_json(folder / "test.json")
        assert set(test) >= {"probe", "finetune"}
        assert 0 <= test["finetune"]["dsc"] <= 1
    opened = study.store.confirmation().user_attrs["test_unlocked"]
    lines: list[str] = []
    with listener(lines.append):
        study.confirm()
    assert study.store.confirmation().user_attrs["test_unlocked"] == opened
    assert any("test images were opened on" in line for line in lines)


def test_a_changed_setting_is_refused_by_name(
    finished: tuple[Study, list[str]], phantom_dataset: PatchDataset, tmp_path: Path
) -> None:
    runs = finished[0].store.folder.parent
    changed = Study.load(write(tmp_path, seed=4), data=phantom_dataset.path, runs=runs)
    with pytest.raises(StudyError, match="seed was 3 and is now 4"):
        changed.run()


def test_changed_data_is_refused(
    finished: tuple[Study, list[str]], phantom_dataset: PatchDataset, tmp_path: Path
) -> None:
    runs = finished[0].store.folder.parent
    environment_file = finished[0].store.folder / "environment.json"
    before = environment_file.read_text()
    environment = read_json(environment_file) or {}
    environment["dataset"]["fingerprint"] = "0" * 64
    environment_file.write_text(seal_json(environment))
    study = Study.load(write(tmp_path, budget={"trials": 4}), data=phantom_dataset.path, runs=runs)
    with pytest.raises(StudyError, match="begun on other data"):
        study.run()
    environment_file.write_text(before)


def test_a_study_that_another_process_runs_says_who(finished: tuple[Study, list[str]]) -> None:
    study, _ = finished
    with study.store.lock(), pytest.raises(StudyError, match="already run by process"):
        study.run()


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"resources": {"gpus_per_worker": 64}}, ResourceError, "gpus_per_worker=64"),
        ({"resources": {"cpus_per_worker": 1000}}, ResourceError, "cpus_per_worker=1000"),
        ({"probe": {"num_labeled": 1000}}, DataError, "probe.num_labeled=1000"),
        ({"pretrain": {"model": {"patch_size": 7}}}, ConfigError, "does not divide"),
        ({"probe": {"num_labeled": 20, "folds": 2}}, DataError, "lower probe.num_labeled"),
        ({"space": {"model.patch_size": {"choices": [8, 10]}}}, ConfigError, "does not divide"),
        (
            {
                "space": {"batch_size": {"choices": [12, 3]}},
                "resources": {"workers": 4, "cpus_per_worker": 0.1},
            },
            ConfigError,
            "batch_size 3 is less than resources.workers 4",
        ),
        (
            {"resources": {"workers": 5, "cpus_per_worker": 0.1, "sharding": "fsdp"}},
            ConfigError,
            "fsdp needs a fixed number of workers that divides batch_size 12",
        ),
        (
            {"space": {"selection.rule": {"choices": ["smallest", "oracle"]}}},
            ConfigError,
            "an oracle uses true",
        ),
        (
            {"pretrain": {"selection": {"mode": "soft", "score": "oracle"}}, "space": {}},
            ConfigError,
            "an oracle uses true",
        ),
        (
            {"baselines": ["simsiam"], "pretrain": {"batch_size": 1}},
            ConfigError,
            "one image per worker",
        ),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_written(
    phantom_dataset: PatchDataset,
    tmp_path: Path,
    changes: dict[str, Any],
    error: type[Exception],
    message: str,
) -> None:
    study = Study.load(
        write(tmp_path, **changes), data=phantom_dataset.path, runs=tmp_path / "runs"
    )
    with pytest.raises(error, match=message):
        study.plan()
    with pytest.raises(error, match=message):
        study.run()
    assert not (tmp_path / "runs").exists()


def test_a_plan_prices_the_study_without_running_it(
    phantom_dataset: PatchDataset, tmp_path: Path
) -> None:
    study = Study.load(write(tmp_path), data=phantom_dataset.path, runs=tmp_path / "runs")
    plan = study.plan()
    assert (plan.trials, plan.baseline_runs, plan.rungs, plan.steps_per_trial) == (3, 2, (2, 4), 12)
    assert plan.concurrency >= 1
    assert 0 < plan.hours[0] <= plan.hours[1] <= plan.hours[2] < 1
    assert 0 < plan.disk_gb < 1
    assert not (tmp_path / "runs").exists()


def test_a_copied_study_is_read_under_its_new_folder_and_a_renamed_one_refused(
    finished: tuple[Study, list[str]], tmp_path: Path
) -> None:
    study, _ = finished
    shutil.copytree(study.store.folder, tmp_path / "copy")
    copy = Study.open("copy", runs=tmp_path)
    assert copy.status()["states"] == study.status()["states"]
    assert copy.best_trial.value == study.best_trial.value
    file = tmp_path / "copy" / "study.yaml"
    file.write_text(file.read_text().replace("name: tiny", "name: other"))
    with pytest.raises(StudyError, match="holds the study 'tiny'"):
        Study.open("copy", runs=tmp_path).status()


def test_a_half_written_last_journal_line_is_cut_and_the_study_goes_on(
    finished: tuple[Study, list[str]], phantom_dataset: PatchDataset, tmp_path: Path
) -> None:
    shutil.copytree(finished[0].store.folder, tmp_path / "tiny")
    study = Study.open("tiny", runs=tmp_path)
    before = study.status()
    with (tmp_path / "tiny" / "study.journal").open("a") as journal:
        journal.write('{"op_code":5,"wor')
    study.run()
    after = study.status()
    for snapshot in (before, after):
        snapshot["budget"].pop("hours")  # of which starting takes some
    assert after == before


def test_status_says_whether_anybody_runs_the_study(finished: tuple[Study, list[str]]) -> None:
    study, _ = finished
    assert study.status()["run_by"] is None
    with study.store.lock():
        assert study.status()["run_by"].startswith("process ")


def test_a_baseline_is_named_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="each baseline is named once"):
        Study.load(write(tmp_path, baselines=["mae", "mae"]), data="anywhere")


@pytest.mark.parametrize(
    ("pruner", "rungs"),
    [
        ({"name": "median", "rungs": 4, "min_steps": 6}, (2, 3)),
        ({"name": "median", "rungs": 4, "min_steps": 400}, ()),
        ({"name": "median", "rungs": 1, "min_steps": 0}, ()),
        ({"name": "none"}, ()),
    ],
)
def test_a_plan_says_at_which_rungs_a_trial_may_be_pruned(
    phantom_dataset: PatchDataset, tmp_path: Path, pruner: dict[str, Any], rungs: tuple[int, ...]
) -> None:
    assert (
        Study.load(write(tmp_path, pruner=pruner), data=phantom_dataset.path).plan().prunable_rungs
        == rungs
    )


def test_an_unknown_study_is_told_with_those_there_are(finished: tuple[Study, list[str]]) -> None:
    with pytest.raises(StudyError, match="studies there: tiny"):
        Study.open("tinny", runs=finished[0].store.folder.parent)


@pytest.mark.parametrize(
    "file", sorted((Path(__file__).parents[2] / "studies").glob("*.yaml")), ids=lambda f: f.stem
)
def test_the_ready_studies_are_valid(file: Path) -> None:
    study = Study.load(file, data="anywhere")  # checks the space too
    assert study.config.name == file.stem
    assert study.config.description
