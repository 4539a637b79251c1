"""What a confirmation is said to show, from written scores."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from optuna.trial import TrialState, create_trial

from amlp_ray.config import StudyConfig
from amlp_ray.config.yaml_file import write_yaml
from amlp_ray.study.confirmation.comparison import read_difference
from amlp_ray.study.confirmation.results import Confirmation, read_confirmation, unequal_budgets
from amlp_ray.study.confirmation.statistics import Difference
from amlp_ray.study.report.confirmation import confirmation_section, with_confirmation
from amlp_ray.study.report.summary import Verdict
from amlp_ray.study.storage.study_store import StudyStore

SEARCHED = Verdict("better", "The search says so.", ["of the search"], ["care"], "pruning")
IMAGES = 60


class WrittenConfirmation:
    """A study folder whose confirmation is written by hand: per-image scores around given means."""

    def __init__(self, folder: Path, **config: Any) -> None:
        folder.mkdir(parents=True)
        write_yaml(
            StudyConfig.model_validate({"name": folder.name, **config}), folder / "study.yaml"
        )
        self.store = StudyStore(folder)
        self.names: list[str] = []
        self.difficulty = np.random.default_rng(0).normal(0, 0.1, IMAGES)

    def add(
        self,
        name: str,
        test: float,
        *,
        val: float | None = None,
        probe: float | None = None,
        seeds: int = 3,
        noise: float = 0.01,
        failed: tuple[int, ...] = (),
        epochs: int = 10,
        uses_ground_truth: bool = False,
        empty_correct: float | None = None,
    ) -> None:
        """Add a candidate by its mean DSC: fine-tuning on test, probe on val, probe on test."""
        self.names.append(name)
        probed = test - 0.1 if probe is None else probe
        means = {"val": test if val is None else val, "finetune": test, "probe": probed}
        for repeat in range(seeds):
            rng = np.random.default_rng([len(self.names), repeat])
            scores = {
                at: {
                    f"i{i}": float(v)
                    for i, v in enumerate(mean + self.difficulty + rng.normal(0, noise, IMAGES))
                }
                for at, mean in means.items()
            }
            full = {
                at: {"dsc": float(np.mean(list(v.values()))), "per_group": v, "images": IMAGES}
                for at, v in scores.items()
            }
            full["finetune"] |= {"dsc_small": test, "empty_correct": empty_correct}
            folder = self.store.confirm_folder(name, repeat)
            folder.mkdir(parents=True)
            (folder / "score.json").write_text(json.dumps(full["val"]))
            (folder / "finetune.json").write_text(json.dumps(full["finetune"]))
            (folder / "test.json").write_text(
                json.dumps({p: full[p] for p in ("probe", "finetune")})
            )
            (folder / "config.yaml").write_text(
                f"objective: reconstruction\nepochs: {epochs}\nbatch_size: 16\n"
            )
            lost = repeat in failed
            self.store.confirmation(create=True).add_trial(
                create_trial(
                    state=TrialState.FAIL if lost else TrialState.COMPLETE,
                    value=None if lost else means["val"],
                    user_attrs={
                        "candidate": name,
                        "repeat": repeat,
                        "uses_ground_truth": uses_ground_truth,
                        "reason": "node lost",
                    },
                )
            )

    def open(self) -> Confirmation:
        record = {
            "when": "2026-03-01T10:00:00+00:00",
            "commit": "abc",
            "candidates": self.names,
            "runs": {},
        }
        self.store.confirmation(create=True).set_user_attr("test_unlocked", record)
        return self.confirmation()

    def confirmation(self) -> Confirmation:
        confirmation = read_confirmation(self.store)
        assert confirmation is not None
        return confirmation


@pytest.fixture
def written(tmp_path: Path) -> WrittenConfirmation:
    return WrittenConfirmation(tmp_path / "s")


def test_a_confirmation_that_was_not_begun_is_none_and_changes_no_verdict(
    written: WrittenConfirmation,
) -> None:
    assert read_confirmation(written.store) is None
    assert with_confirmation(SEARCHED, None) == SEARCHED


def test_the_trial_that_is_judged_is_the_best_on_val_and_not_on_test(
    written: WrittenConfirmation,
) -> None:
    written.add("trial-3", 0.70, val=0.50)
    written.add("trial-8", 0.60, val=0.60)
    written.add("mae", 0.65)
    confirmation = written.open()
    assert confirmation.chosen is not None
    assert confirmation.chosen.name == "trial-8"
    verdict = with_confirmation(SEARCHED, confirmation)
    assert verdict.kind == "worse"
    assert "3 seeds and 60 test images, trial 8 scores 0.60" in verdict.headline


@pytest.mark.parametrize(
    ("mae", "noise", "kind", "words"),
    [
        (0.50, 0.02, "better", ": better."),
        (0.70, 0.02, "worse", ": worse."),
        (0.595, 0.001, "tie", "shown, but under 0.02, a tie."),
        (0.60, 0.3, "tie", ": no difference shown."),
    ],
)
def test_a_verdict_can_be_each_of_four(
    written: WrittenConfirmation, mae: float, noise: float, kind: str, words: str
) -> None:
    written.add("trial-1", 0.6, noise=noise)
    written.add("mae", mae, noise=noise)
    verdict = with_confirmation(SEARCHED, written.open())
    assert verdict.kind == kind
    assert verdict.headline.endswith(words)
    assert "baseline mae (plain MAE)" in verdict.headline
    assert verdict.comparisons[-1] == "In the search before, on val: The search says so."


def test_better_than_mae_and_no_better_than_a_random_encoder_is_no_success(
    written: WrittenConfirmation,
) -> None:
    written.add("trial-1", 0.6)
    written.add("mae", 0.5)
    written.add("scratch", 0.6, noise=0.3)
    verdict = with_confirmation(SEARCHED, written.open())
    assert verdict.kind == "tie"
    assert "Against baseline scratch (a random encoder)" in verdict.headline


def test_until_the_test_is_opened_the_search_has_the_verdict_and_numbers_are_of_val(
    written: WrittenConfirmation,
) -> None:
    written.add("trial-1", 0.6, val=0.8)
    written.add("mae", 0.5)
    assert with_confirmation(SEARCHED, written.confirmation()) == SEARCHED
    section = confirmation_section(written.confirmation())
    assert "The test images have not been opened: numbers are of val" in section.state
    assert section.sentences
    assert written.confirmation().split == "val"


def test_images_without_a_lesion_stand_beside_dsc(written: WrittenConfirmation) -> None:
    written.add("trial-1", 0.6, empty_correct=0.25)
    written.add("mae", 0.5)
    table = confirmation_section(written.confirmation()).sizes
    assert table.columns[-1] == "Empties correct"
    assert [[cell.text for cell in row[1:]] for row in table.rows] == [
        ["0.600", "\u2013", "\u2013", "25 %"],
        ["0.500", "\u2013", "\u2013", "\u2013"],
    ]


def test_an_ablation_is_compared_with_its_own_trial_whichever_was_chosen(
    written: WrittenConfirmation,
) -> None:
    written.add("trial-1", 0.60, val=0.5)
    written.add("trial-2", 0.70, val=0.6)
    written.add("equal-mean-of-trial-1", 0.60)
    written.add("mae", 0.5)
    confirmation = written.open()
    candidate = {
        item.baseline: item.candidate for item in confirmation.against_baselines["finetune"]
    }
    assert candidate == {"equal-mean-of-trial-1": "trial-1", "mae": "trial-2"}
    comparisons = " ".join(with_confirmation(SEARCHED, confirmation).comparisons)
    assert "Trial 1 against equal-mean of trial 1" in comparisons
    assert "Does the ratio have to change, or is its mean enough?" in comparisons


def test_a_candidate_that_sees_true_masks_is_shown_and_never_counted(
    tmp_path: Path,
) -> None:
    with_it, without = WrittenConfirmation(tmp_path / "a"), WrittenConfirmation(tmp_path / "b")
    for written in (with_it, without):
        written.add("trial-1", 0.6, noise=0.2)
        written.add("mae", 0.55, noise=0.2)
    with_it.add("oracle-of-trial-1", 0.9, uses_ground_truth=True)
    (mae, oracle), (alone,) = (
        with_it.open().against_baselines["finetune"],
        without.open().against_baselines["finetune"],
    )
    assert mae.p == alone.p
    assert (oracle.p, oracle.reading) == (None, "not known")
    assert (
        with_confirmation(SEARCHED, with_it.confirmation()).kind
        == with_confirmation(SEARCHED, without.confirmation()).kind
    )
    assert any(
        "It sees true masks, so it is no part of the verdict" in text
        for text in with_confirmation(SEARCHED, with_it.confirmation()).comparisons
    )


def test_p_values_of_one_list_are_corrected_together(written: WrittenConfirmation) -> None:
    written.add("trial-1", 0.6, noise=0.2)
    for name in ("mae", "scratch", "amlp"):
        written.add(name, 0.57, noise=0.2)
    items = written.open().against_baselines["finetune"]
    raw = sorted(item.difference.p for item in items if item.difference.p is not None)
    assert min(item.p for item in items if item.p is not None) == pytest.approx(min(1, 3 * raw[0]))


def test_failed_runs_leave_pairs_and_are_named(written: WrittenConfirmation) -> None:
    written.add("trial-1", 0.6)
    written.add("mae", 0.5, failed=(1,))
    confirmation = written.open()
    (item,) = confirmation.against_baselines["finetune"]
    assert item.difference.seeds == 2
    assert any(
        "Runs that failed are left out, in pairs: mae-1." in text
        for text in with_confirmation(SEARCHED, confirmation).cautions
    )
    assert confirmation_section(confirmation).failed == ["mae-1 failed: node lost"]


def test_one_pair_of_seeds_is_never_a_verdict(written: WrittenConfirmation) -> None:
    written.add("trial-1", 0.9)
    written.add("mae", 0.1, failed=(0, 2))
    verdict = with_confirmation(SEARCHED, written.open())
    assert verdict.kind == "open"
    assert "One seed says nothing of the noise" in verdict.headline


def test_few_seeds_few_images_and_unequal_lengths_are_cautioned_about(
    written: WrittenConfirmation,
) -> None:
    written.add("trial-1", 0.6)
    written.add("mae", 0.5, epochs=5)
    confirmation = written.open()
    assert unequal_budgets(confirmation) == ["mae"]
    cautions = " ".join(with_confirmation(SEARCHED, confirmation).cautions)
    assert "3 seeds are few" in cautions
    assert (
        "Trial 1 and baseline mae differ in epochs or batch size: not the same budget." in cautions
    )
    assert "have a lesion and are scored" not in cautions


def test_five_seeds_of_equal_length_need_no_such_caution(written: WrittenConfirmation) -> None:
    written.add("trial-1", 0.6, seeds=5)
    written.add("mae", 0.5, seeds=5)
    assert len(with_confirmation(SEARCHED, written.open()).cautions) == 1


def test_noise_agreement_and_ties_of_protocols_are_worded(written: WrittenConfirmation) -> None:
    for i, dsc in enumerate((0.60, 0.61, 0.5, 0.4)):
        written.add(f"trial-{i}", dsc, probe=dsc - 0.2)
    written.add("mae", 0.3, probe=0.1)
    noise, agreement, tuned, probed = confirmation_section(written.open()).protocols
    assert "fine-tuning 0.00" in noise
    assert "by a rank correlation of +1.00" in agreement
    assert "over the means of 5 candidates (test)" in agreement
    assert "the search's score ranks as fine-tuning does" in agreement
    assert tuned.startswith("Ties by fine-tuning")
    assert "trial 1 and trial 0 (+0.01" in tuned
    assert "mae" not in tuned + probed


def test_protocols_that_disagree_are_not_said_to_agree(written: WrittenConfirmation) -> None:
    for i, dsc in enumerate((0.60, 0.55, 0.5, 0.45, 0.4)):
        written.add(f"trial-{i}", dsc, probe=1 - dsc)
    assert "they rank the other way round" in confirmation_section(written.open()).protocols[1]


def test_two_runs_are_too_few_to_agree(written: WrittenConfirmation) -> None:
    written.add("trial-1", 0.6, seeds=2)
    assert "1 candidates are too few" in confirmation_section(written.open()).protocols[1]
    assert (
        "no baseline to compare it with"
        in with_confirmation(SEARCHED, written.confirmation()).headline
    )


def test_plain_values_survive_json(written: WrittenConfirmation) -> None:
    written.add("trial-1", 0.6)
    written.add("mae", 0.5)
    values = json.loads(json.dumps(written.open().as_dict()))
    assert values["chosen"] == "trial-1"
    assert [row["candidate"] for row in values["candidates"]] == ["trial-1", "mae"]
    assert values["against_baselines"]["finetune"][0]["reading"] == "better"


@pytest.mark.parametrize(
    ("mean", "interval", "p", "reading"),
    [
        (0.05, (0.01, 0.09), 0.01, "better"),
        (-0.05, (-0.09, -0.01), 0.01, "worse"),
        (0.01, (0.005, 0.015), 0.001, "tie"),
        (0.02, (0.01, 0.03), 0.001, "better"),
        (0.05, (0.01, 0.09), 0.05, "no difference shown"),
        (0.05, (-0.01, 0.09), 0.01, "no difference shown"),
        (0.05, None, None, "not known"),
        (0.05, (0.01, 0.09), None, "not known"),
    ],
)
def test_readings(
    mean: float, interval: tuple[float, float] | None, p: float | None, reading: str
) -> None:
    assert (
        read_difference(Difference(mean, interval, p, p, None, 3, 50), p, equivalence_margin=0.02)
        == reading
    )
