"""A damaged journal is read past its damage: no trial gets another one's number, scores or name."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest
from helpers.studies import add, make_store
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

from amlp_ray.errors import StudyError
from amlp_ray.study.operations.repair import repair
from amlp_ray.study.storage.journal import Journal
from amlp_ray.study.storage.study_store import StudyStore
from amlp_ray.study.storage.trial_files import write_trial_file

N_TRIALS = 5


@pytest.fixture
def journal(tmp_path: Path) -> Path:
    """The journal of a study whose trials have values that follow from their numbers."""
    store = make_store(tmp_path)
    for number in range(N_TRIALS):
        add(store, {"ratio.start": 0.2 + number / 50}, 0.5 + number / 100)
    running = add(store, {"ratio.start": 0.4}, 0.1, state=TrialState.RUNNING, rungs={2: 0.6})
    store.set_attrs(store.search(), running, lost=1)
    store.finish(store.search(), running, TrialState.COMPLETE, [0.9])
    return store.folder / "study.journal"


def trials_of(journal: Path) -> list[optuna.trial.FrozenTrial]:
    return StudyStore.open(journal.parent).search().trials


def check_trials(journal: Path) -> None:
    """Every trial has the values of its number, or says that it is damaged."""
    for trial in trials_of(journal)[:N_TRIALS]:
        if "damaged" not in trial.user_attrs:
            assert trial.params == {"ratio.start": 0.2 + trial.number / 50}
            assert trial.values == [0.5 + trial.number / 100]


def line_of(lines: list[bytes], trial: int) -> int:
    """The index of the line that creates a trial of the search."""
    return next(i for i, line in enumerate(lines) if b'"new_trial":[%d,' % trial in line)


def replaced(by: bytes) -> Callable[[list[bytes], int], None]:
    def damage(lines: list[bytes], index: int) -> None:
        lines[index] = by + b"\n"

    return damage


def cut(lines: list[bytes], index: int) -> None:
    lines[index] = lines[index][:40] + b"\n"


def remove(lines: list[bytes], index: int) -> None:
    del lines[index]


def repeat(lines: list[bytes], index: int) -> None:
    lines.insert(index, lines[index])


def join(lines: list[bytes], index: int) -> None:
    lines[index] = lines[index].rstrip(b"\n")


def flip_value(lines: list[bytes], index: int) -> None:
    """Change a digit, so that the line is as valid as before."""
    lines[index] = lines[index].replace(b'"value":0.5', b'"value":0.7')


def insert(text: bytes) -> Callable[[list[bytes], int], None]:
    def damage(lines: list[bytes], index: int) -> None:
        lines.insert(index, text + b"\n")

    return damage


@pytest.mark.parametrize(
    "damage",
    [
        replaced(b"\x00" * 300),
        replaced(b"\xff\xfe\xfd not text"),
        replaced(b"null"),
        replaced(b"[" * 5000),
        replaced(b""),
        cut,
        remove,
        repeat,
        join,
        flip_value,
        insert(b"null"),
        insert(b'{"op_code": 99, "worker_id": "x"}'),
        insert(b'{"op_code": 4, "worker_id": "x", "study_id": "0"}'),
        insert(b'{"op_code": 7, "worker_id": "x", "trial_id": 0, "step": 1}'),
        insert(b'{"op_code": 6, "worker_id": "x", "trial_id": 5, "state": 77, "values": null}'),
        insert(b'{"op_code": 8, "worker_id": "x", "trial_id": 0, "user_attr": []}'),
    ],
)
def test_after_a_damaged_line_every_trial_is_itself(
    journal: Path, damage: Callable[[list[bytes], int], None]
) -> None:
    lines = journal.read_bytes().splitlines(keepends=True)
    damage(lines, line_of(lines, 1))
    journal.write_bytes(b"".join(lines))
    assert len(trials_of(journal)) == N_TRIALS + 1
    check_trials(journal)


def test_a_damaged_line_is_named_and_the_file_is_copied_before_it_is_written(
    journal: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lines = journal.read_bytes().splitlines(keepends=True)
    index = line_of(lines, 2)
    flip_value(lines, index)
    damaged = b"".join(lines)
    journal.write_bytes(damaged)
    store = StudyStore.open(journal.parent)
    with caplog.at_level(logging.WARNING, "amlp_ray"):
        assert [t.number for t in store.search().trials if "damaged" in t.user_attrs] == [2]
    assert f"line {index + 1} differs from its checksum" in caplog.text
    assert not list(journal.parent.glob("study.journal.damaged-*")), "a look writes nothing"
    store.search().set_user_attr("a", 1)
    (copy,) = journal.parent.glob("study.journal.damaged-*")
    assert copy.read_bytes() == damaged
    assert StudyStore.open(journal.parent).search().user_attrs["a"] == 1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda lines: lines[:-2] + lines[-1:], "comes after 1 missing line"),
        (lambda lines: [*lines[:-1], lines[-2], lines[-1]], "repeats line"),
        (lambda lines: lines[:-3] + lines[-1:], "comes after 2 missing lines"),
        (
            lambda lines: [*lines[:-2], b"\n", b"what is this\n", *lines[-2:]],
            "1 damaged place (line",
        ),
    ],
)
def test_lines_that_are_gone_or_stand_twice_are_told_and_writing_goes_on(
    journal: Path,
    change: Callable[[list[bytes]], list[bytes]],
    words: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join(change(lines)))
    check_trials(journal)
    assert words in caplog.text
    store = StudyStore.open(journal.parent)
    number = add(store, {"ratio.start": 0.3}, 0.7)
    assert trials_of(journal)[number].value == 0.7


def test_a_trial_whose_end_is_gone_from_the_journal_is_told(
    journal: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = StudyStore.open(journal.parent)
    folder = store.trial_folder(N_TRIALS)
    folder.mkdir(parents=True)
    trial = store.search().trials[N_TRIALS]
    write_trial_file(folder, trial)
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join(lines[:-1]))  # the line that ended it
    assert StudyStore.open(journal.parent).lost_ends() == [N_TRIALS]
    StudyStore.open(journal.parent).search()
    assert f"lost the end of trial {N_TRIALS}" in caplog.text
    repair(StudyStore.open(journal.parent))
    assert trials_of(journal)[N_TRIALS].value == trial.value


def test_a_study_with_a_trial_of_unknown_parameters_is_not_run(journal: Path) -> None:
    lines = journal.read_bytes().splitlines(keepends=True)
    cut(lines, line_of(lines, 2))
    journal.write_bytes(b"".join(lines))
    with (
        pytest.raises(StudyError, match=r"Trial 2 .* is damaged .*study repair tiny"),
        StudyStore.open(journal.parent).lock(),
    ):
        pass


def test_a_last_line_without_its_end_is_no_damage(
    journal: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = journal.read_bytes()
    journal.write_bytes(whole + whole.splitlines(keepends=True)[-1][:-20])
    with caplog.at_level(logging.WARNING, "amlp_ray"):
        assert len(trials_of(journal)) == N_TRIALS + 1
    assert not caplog.text
    assert not Journal(journal).reader.problems


def test_a_last_line_that_lacks_only_its_end_is_kept_by_the_next_writer(journal: Path) -> None:
    whole = journal.read_bytes()
    journal.write_bytes(whole[:-1])
    assert trials_of(journal)[-1].state == TrialState.RUNNING, "it might still be written"
    StudyStore.open(journal.parent).search().set_user_attr("a", 1)
    assert trials_of(journal)[-1].state == TrialState.COMPLETE
    assert journal.read_bytes().startswith(whole)


def test_a_journal_that_is_gone_or_cut_while_it_is_open_is_a_sentence(journal: Path) -> None:
    search = StudyStore.open(journal.parent).search()
    content = journal.read_bytes()
    journal.write_bytes(content[:100])
    with pytest.raises(StudyError, match="was cut short while it was in use"):
        search.set_user_attr("a", 1)
    journal.unlink()
    with pytest.raises(StudyError, match="is gone; `amlp-ray study repair tiny`"):
        search.set_user_attr("a", 1)


def test_plain_optuna_reads_the_journal_and_its_lines_are_read(journal: Path) -> None:
    plain = JournalStorage(JournalFileBackend(str(journal)))
    study = optuna.load_study(study_name="tiny", storage=plain)
    assert [trial.values for trial in study.trials] == [t.values for t in trials_of(journal)]
    study.add_trial(optuna.trial.create_trial(value=0.3))
    study.enqueue_trial({"ratio.start": 0.25})
    assert [trial.value for trial in trials_of(journal)[-2:]] == [0.3, None]


def test_lines_of_plain_optuna_have_no_checksum_and_one_that_is_lost_moves_no_trial(
    tmp_path: Path,
) -> None:
    file = tmp_path / "study.journal"
    storage = JournalStorage(JournalFileBackend(str(file)))
    study = optuna.create_study(study_name="s", storage=storage)
    for number in range(4):
        trial = study.ask({"x": optuna.distributions.FloatDistribution(0, 10)})
        trial.report(number, 1)
        study.tell(trial, number)
    lines = file.read_bytes().splitlines(keepends=True)
    index = [json.loads(line)["op_code"] for line in lines].index(4)
    lines[index] = b"\x00\x00\x00\n"
    file.write_bytes(b"".join(lines))
    stored: Any = optuna.load_study(study_name="s", storage=JournalStorage(Journal(file))).trials
    assert [trial.value for trial in stored] == [0, 1, 2, 3]
    assert ["damaged" in trial.user_attrs for trial in stored] == [True, False, False, False]
