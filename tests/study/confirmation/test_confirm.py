"""Who is confirmed, how their runs end, and that test images are opened once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from helpers.tiny_study import TINY
from optuna.distributions import FloatDistribution
from optuna.trial import TrialState, create_trial

from amlp_ray.config import PretrainConfig, StudyConfig
from amlp_ray.config.overrides import merge
from amlp_ray.config.yaml_file import write_yaml
from amlp_ray.data.dataset import PatchDataset
from amlp_ray.errors import DataError, StudyError
from amlp_ray.evaluation.confirmation_run import finish_confirmation_run
from amlp_ray.launch.job import run_job
from amlp_ray.launch.run_spec import RunSpec
from amlp_ray.study.confirmation.confirm import (
    confirm_seed,
    confirmation_notes,
    confirmation_plan,
    find_test_unlock,
    finetuning,
    open_test,
    top_trials,
)
from amlp_ray.study.confirmation.results import read_confirmation
from amlp_ray.study.report import write_report
from amlp_ray.study.storage.study_store import StudyStore
from amlp_ray.training.pretrain import Hooks
from amlp_ray.utils.json_files import read_json

SPACE = {"ratio.start": {"low": 0.1, "high": 0.7}}
CONFIRM = {"top": 2, "seeds": 2, "finetune": {"epochs": 1, "batch_size": 12, "decoder_width": 8}}


def new_study(folder: Path, **changes: Any) -> tuple[StudyStore, StudyConfig]:
    changes["confirm"] = merge(CONFIRM, changes.get("confirm", {}))
    values = merge(TINY, {"name": folder.name, "baselines": ["scratch", "mae"], **changes})
    config = StudyConfig.model_validate({**values, "space": SPACE})
    folder.mkdir(parents=True)
    write_yaml(config, folder / "study.yaml")
    return StudyStore(folder), config


def add_trial(
    store: StudyStore,
    start: float,
    *values: float,
    with_folder: bool = True,
    state: str = "COMPLETE",
    **attrs: Any,
) -> None:
    """Add a trial of the search as it ends; `with_folder`: with its settings in its folder."""
    config = store.config()
    search = store.search(create=True)
    number = len(search.get_trials(deepcopy=False))
    epoch = attrs.pop("epoch", config.trial({}, seed=0).epochs)
    search.add_trial(
        create_trial(
            state=TrialState[state],
            values=list(values) if state != "FAIL" else None,
            params={"ratio.start": start},
            distributions={"ratio.start": FloatDistribution(0.1, 0.7)},
            intermediate_values={epoch: values[0]},
            user_attrs={"path": f"trials/{number}", **attrs},
        )
    )
    if with_folder:
        store.trial_folder(number).mkdir(parents=True)
        write_yaml(
            config.trial({"ratio.start": start}, seed=number),
            store.trial_folder(number) / "config.yaml",
        )


def end_run(
    store: StudyStore, candidate: str, repeat: int, state: str = "COMPLETE", **attrs: Any
) -> None:
    store.confirmation(create=True).add_trial(
        create_trial(
            state=TrialState[state],
            value=0.5 if state == "COMPLETE" else None,
            user_attrs={"candidate": candidate, "repeat": repeat, **attrs},
        )
    )


def names(store: StudyStore) -> list[str]:
    return [candidate.name for candidate in confirmation_plan(store, store.config())]


# Choosing


def test_the_best_trials_and_all_baselines_are_confirmed_in_order(tmp_path: Path) -> None:
    store, config = new_study(tmp_path / "s", baselines=["scratch", "leave-one-out", "mae"])
    for start, dsc in ((0.2, 0.4), (0.3, 0.6), (0.4, 0.5)):
        add_trial(store, start, dsc)
    baselines = ["scratch", "amlp", "amlp-mps", "amlp-amr", "amlp-rrl", "amlp-ccl", "mae"]
    assert names(store) == ["trial-1", "trial-2", *baselines]
    best, *_ = confirmation_plan(store, config)
    assert best.params == {"ratio.start": 0.3}
    assert best.config(9) == config.trial({"ratio.start": 0.3}, seed=9)


def test_of_trials_only_whole_ones_of_this_study_count_and_equal_settings_once(
    tmp_path: Path,
) -> None:
    store, config = new_study(tmp_path / "s")
    add_trial(store, 0.2, 0.9, state="PRUNED")
    add_trial(store, 0.2, 0.9, state="FAIL")
    add_trial(store, 0.25, 0.9, source="elsewhere trial 3", with_folder=False)
    add_trial(store, 0.3, 0.6)
    add_trial(store, 0.3, 0.6, copy_of=3)
    add_trial(store, 0.3, 0.6)
    add_trial(store, 0.4, 0.5)
    assert [trial.number for trial in top_trials(store, config)] == [3, 6]


def test_trials_beyond_the_limits_are_taken_only_where_every_one_is(tmp_path: Path) -> None:
    store, config = new_study(tmp_path / "s", limits={"memory": 2.0})
    add_trial(store, 0.2, 0.9, stats={"memory": 3.0})
    assert [trial.number for trial in top_trials(store, config)] == [0]
    add_trial(store, 0.3, 0.5, stats={"memory": 1.0})
    add_trial(store, 0.4, 0.6, stats={"memory": 2.0})
    assert [trial.number for trial in top_trials(store, config)] == [2, 1]


def test_with_several_objectives_the_study_s_metric_chooses(tmp_path: Path) -> None:
    objectives = {"seconds": "minimize", "dsc": "maximize"}
    store, config = new_study(tmp_path / "s", objectives=objectives, pruner={"metric": "dsc"})
    add_trial(store, 0.2, 10.0, 0.4)
    add_trial(store, 0.3, 99.0, 0.6)
    add_trial(store, 0.4, 50.0, 0.5)
    assert [trial.number for trial in top_trials(store, config)] == [1, 2]


def test_steps_of_a_population_count_at_their_full_length_only(tmp_path: Path) -> None:
    store, config = new_study(tmp_path / "s")
    add_trial(store, 0.2, 0.9, generation=0, epoch=2)
    add_trial(store, 0.3, 0.5, generation=1, epoch=4)
    assert [trial.number for trial in top_trials(store, config)] == [1]


def test_a_trial_whose_folder_is_gone_is_rebuilt_from_its_parameters(tmp_path: Path) -> None:
    store, config = new_study(tmp_path / "s", pruner={"rungs": 2, "schedule": "compress"})
    add_trial(store, 0.3, 0.5, with_folder=False)
    rebuilt = confirmation_plan(store, config)[0].config(4)
    assert (rebuilt.ratio.start, rebuilt.ratio.rungs, rebuilt.seed) == (0.3, (2, 4), 4)


def test_without_a_whole_trial_there_is_nothing_to_confirm(tmp_path: Path) -> None:
    store, config = new_study(tmp_path / "s")
    add_trial(store, 0.2, 0.9, state="PRUNED")
    with pytest.raises(StudyError, match="no trial of full length to confirm"):
        confirmation_plan(store, config)


def test_ablations_change_the_best_trial_and_one_that_would_change_nothing_is_left_out(
    tmp_path: Path,
) -> None:
    store, config = new_study(tmp_path / "s", baselines=["equal-mean", "random-cluster", "oracle"])
    add_trial(store, 0.3, 0.5)
    write_yaml(
        PretrainConfig.model_validate(
            {"epochs": 4, "ratio": {"start": 0.2, "end": 0.4}, "selection": {"mode": "soft"}}
        ),
        store.trial_folder(0) / "config.yaml",
    )
    assert names(store) == ["trial-0", "equal-mean-of-trial-0", "oracle-of-trial-0"]
    _, mean, oracle = confirmation_plan(store, config)
    assert mean.config(3).ratio.start == pytest.approx(0.3)
    assert (mean.uses_ground_truth, oracle.uses_ground_truth) == (False, True)
    (note,) = confirmation_notes(store, config)
    assert note.startswith(
        "random-cluster-of-trial-0 is left out: s, baseline random-cluster is about which cluster"
    )


def test_what_was_begun_stays_and_a_better_trial_joins_until_the_test_is_opened(
    tmp_path: Path,
) -> None:
    store, _ = new_study(tmp_path / "s", confirm={"top": 1}, baselines=["mae", "equal-mean"])
    add_trial(store, 0.3, 0.5)
    end_run(store, "trial-0", 0)
    end_run(store, "equal-mean-of-trial-0", 0)
    add_trial(store, 0.4, 0.6)
    assert names(store) == [
        "trial-0",
        "equal-mean-of-trial-0",
        "trial-1",
        "mae",
        "equal-mean-of-trial-1",
    ]
    record = {"when": "2026-01-01", "commit": None, "candidates": ["trial-0", "mae"], "runs": {}}
    store.confirmation(create=True).set_user_attr("test_unlocked", record)
    assert names(store) == ["trial-0", "mae"]


def test_repeats_have_seeds_of_their_own_that_all_candidates_share(tmp_path: Path) -> None:
    store, config = new_study(tmp_path / "s")
    add_trial(store, 0.3, 0.5)
    seeds = [confirm_seed(config, repeat) for repeat in range(3)]
    assert len({*seeds, *(finetuning(config, repeat).seed for repeat in range(3))}) == 6
    assert {candidate.config(seeds[1]).seed for candidate in confirmation_plan(store, config)} == {
        seeds[1]
    }
    assert finetuning(config, 1).epochs == config.confirm.finetune.epochs


# Running, and the test images


def train(store: StudyStore, dataset: PatchDataset) -> None:
    config = store.config()
    for repeat in range(config.confirm.seeds):
        for candidate in confirmation_plan(store, config):
            folder = store.confirm_folder(candidate.name, repeat)
            run_config = candidate.config(confirm_seed(config, repeat))
            rungs = (0,) if run_config.objective == "none" else (run_config.epochs,)
            run_job(
                RunSpec(
                    config=run_config,
                    data=dataset.path,
                    folder=folder,
                    probe=config.probe,
                    rungs=rungs,
                ),
                Hooks(),
            )
            finish_confirmation_run(
                folder, dataset, finetuning(config, repeat), sizes=config.probe.sizes
            )
            end_run(
                store,
                candidate.name,
                repeat,
                uses_ground_truth=candidate.uses_ground_truth,
                params=dict(candidate.params),
            )


@pytest.fixture(scope="module")
def trained(phantom_dataset: PatchDataset, tmp_path_factory: pytest.TempPathFactory) -> StudyStore:
    """A confirmation of one trial, two baselines and an oracle, two seeds each; test is closed."""
    pretrain = {"epochs": 2}
    store, _ = new_study(
        tmp_path_factory.mktemp("runs") / "trained",
        pretrain=pretrain,
        confirm={"top": 1},
        baselines=["scratch", "mae", "oracle"],
        probe={"num_labeled": 8},
        data=phantom_dataset.path,
    )
    add_trial(store, 0.3, 0.5)
    train(store, phantom_dataset)
    return store


def test_a_run_is_scored_on_val_by_both_protocols_and_keeps_its_segmenter(
    trained: StudyStore, phantom_dataset: PatchDataset
) -> None:
    folder = trained.confirm_folder("trial-0", 1)
    tuned = read_json(folder / "finetune.json")
    val = phantom_dataset.table("val", columns=["id", "lesion"])
    assert set(tuned["per_image"]) == set(val["id"][val["lesion"] > 0])
    assert (folder / "segmenter" / "segmenter.safetensors").is_file()
    assert read_json(folder / "score.json")["epoch"] == 2
    assert not list(trained.folder.glob("confirm/*/test.json"))


def test_a_finished_fine_tuning_is_not_done_again(
    trained: StudyStore, phantom_dataset: PatchDataset
) -> None:
    folder, config = trained.confirm_folder("mae", 0), trained.config()
    weights = folder / "segmenter" / "segmenter.safetensors"
    before = weights.stat().st_mtime_ns
    result = finish_confirmation_run(
        folder, phantom_dataset, finetuning(config, 0), sizes=config.probe.sizes
    )
    assert result == read_json(folder / "finetune.json")
    assert weights.stat().st_mtime_ns == before


def test_test_images_stay_closed_while_a_run_is_missing(
    phantom_dataset: PatchDataset, tmp_path: Path
) -> None:
    store, config = new_study(tmp_path / "s", confirm={"top": 1})
    add_trial(store, 0.3, 0.5)
    for name in ("trial-0", "scratch", "mae"):
        end_run(store, name, 0)
        end_run(store, name, 1, state="RUNNING" if name == "mae" else "COMPLETE")
    with pytest.raises(
        StudyError, match=r"1 of 6 confirmation runs left, such as mae-1; finish them"
    ):
        open_test(store, config, phantom_dataset)
    assert find_test_unlock(store) is None


def test_a_data_set_without_test_lesions_is_refused_and_nothing_is_recorded(
    trained: StudyStore, phantom_dataset: PatchDataset
) -> None:
    counts = phantom_dataset.manifest.counts
    none = counts | {"test": counts["test"].model_copy(update={"lesions": 0})}
    without = PatchDataset(
        phantom_dataset.root, phantom_dataset.manifest.model_copy(update={"counts": none})
    )
    with pytest.raises(DataError, match="no labeled test image with a lesion"):
        open_test(trained, trained.config(), without)
    assert find_test_unlock(trained) is None


def test_runs_that_were_fine_tuned_differently_are_not_compared(
    trained: StudyStore, phantom_dataset: PatchDataset
) -> None:
    confirm = trained.config().confirm
    changed = confirm.model_copy(
        update={"finetune": confirm.finetune.model_copy(update={"epochs": 9})}
    )
    with pytest.raises(
        StudyError, match=r"trial-0-0 was fine-tuned with other settings than confirm\.finetune"
    ):
        open_test(
            trained, trained.config().model_copy(update={"confirm": changed}), phantom_dataset
        )
    assert find_test_unlock(trained) is None


def test_a_setting_that_is_newer_than_a_fine_tuning_is_not_taken_for_its_default(
    trained: StudyStore, phantom_dataset: PatchDataset
) -> None:
    path = trained.confirm_folder("trial-0", 0) / "segmenter" / "config.yaml"
    written = path.read_text()
    # As an older version wrote it, and without a digest that would not fit.
    lines = [line for line in written.splitlines(True) if not line.startswith("# sha256")]
    path.write_text("".join(line for line in lines if "empty_share" not in line))
    assert path.read_text() != written
    try:
        with pytest.raises(StudyError, match="trial-0-0 was fine-tuned with other settings"):
            open_test(trained, trained.config(), phantom_dataset)
    finally:
        path.write_text(written)
    assert find_test_unlock(trained) is None


class Watched(PatchDataset):
    """Whether the test split had been recorded as opened whenever it was read."""

    store: StudyStore
    recorded: list[bool]

    def load(self, split: str, rows: Any = None) -> Any:
        if split == "test":
            self.recorded.append(find_test_unlock(self.store) is not None)
        return super().load(split, rows)


def test_test_images_are_opened_once_and_the_report_says_what_they_show(
    trained: StudyStore, phantom_dataset: PatchDataset, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="amlp_ray")
    config = trained.config()
    watched = Watched(phantom_dataset.root, phantom_dataset.manifest)
    watched.store, watched.recorded = trained, []
    before = write_report(trained).read_text()
    assert "The test images have not been opened: numbers are of val" in before

    first = open_test(trained, config, watched)
    assert find_test_unlock(trained) == first
    assert first.candidates == ["trial-0", "scratch", "mae", "oracle-of-trial-0"]
    assert set(first.runs) == {f"{name}-{repeat}" for name in first.candidates for repeat in (0, 1)}
    assert watched.recorded
    assert all(watched.recorded)

    test = phantom_dataset.table("test", columns=["id", "lesion"])
    lesions = set(test["id"][test["lesion"] > 0])
    for path in first.runs.values():
        scores = read_json(trained.folder / path / "test.json")
        assert {protocol: set(score["per_image"]) for protocol, score in scores.items()} == {
            "probe": lesions,
            "finetune": lesions,
        }
    assert scores["probe"]["scoring"] == "test"

    # A run that a killed process left unscored is scored again, to the same; a newcomer is not.
    mae = trained.confirm_folder("mae", 0) / "test.json"
    unchanged = mae.read_text()
    mae.unlink()
    add_trial(trained, 0.6, 0.9)
    end_run(trained, "trial-1", 0)
    caplog.clear()
    again = open_test(trained, config, phantom_dataset)
    lines = [record.getMessage() for record in caplog.records]
    assert again == first
    assert "nobody else is scored on them" in lines[0]
    assert lines[1:] == ["mae-0: scored on test"]
    assert mae.read_text() == unchanged
    assert names(trained) == first.candidates

    confirmation = read_confirmation(trained)
    assert confirmation is not None
    assert [c.name for c in confirmation.candidates] == first.candidates
    items = {item.baseline: item for item in confirmation.against_baselines["finetune"]}
    of_trial, oracle = items["mae"], items["oracle-of-trial-0"]
    assert (of_trial.candidate, of_trial.difference.seeds, of_trial.sample.images) == (
        "trial-0",
        2,
        len(lesions),
    )
    assert of_trial.p is not None
    assert (oracle.p, oracle.reading) == (None, "not known")
    page = write_report(trained).read_text()
    assert f"Over 2 seeds and {len(lesions)} test images, trial 0 scores" in page
    assert "after Holm" in page
    assert "It sees true masks, so it is no part of the verdict" in page
    assert f"The test images were opened once, on {first.when}" in page


def test_a_failed_run_is_left_out_and_the_test_is_opened_all_the_same(
    phantom_dataset: PatchDataset, trained: StudyStore, tmp_path: Path
) -> None:
    store, config = new_study(
        tmp_path / "s", confirm={"top": 1}, baselines=["mae"], probe={"num_labeled": 8}
    )
    add_trial(store, 0.3, 0.5)
    for name in ("trial-0", "mae"):
        for repeat in (0, 1):
            state = "FAIL" if (name, repeat) == ("mae", 1) else "COMPLETE"
            end_run(store, name, repeat, state=state, reason="node lost")
            target = store.confirm_folder(name, repeat)
            target.parent.mkdir(exist_ok=True)
            target.symlink_to(trained.confirm_folder(name, repeat))
    assert set(open_test(store, config, phantom_dataset).runs) == {
        "trial-0-0",
        "trial-0-1",
        "mae-0",
    }
    confirmation = read_confirmation(store)
    assert confirmation is not None
    assert confirmation.failed == {"mae-1": "node lost"}
    (item,) = confirmation.against_baselines["finetune"]
    assert item.difference.seeds == 1
    assert item.reading == "not known"  # one pair of seeds says nothing of the noise
