"""The study commands that need no cluster, run on studies as a driver leaves them."""

from __future__ import annotations

import io
import json
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers.studies import add, add_baseline, make_store, note_data, write_study
from optuna.trial import TrialState

from amlp_ray.cli import main
from amlp_ray.cli.study import app
from amlp_ray.study.storage.study_store import StudyStore

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Exit code, stdout and stderr of a study command on the studies of this test."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("AMLP_RAY_RUNS", str(tmp_path / "runs"))

    def command(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["amlp-ray", "study", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            main()
        captured = capsys.readouterr()
        return int(end.value.code or 0), captured.out, captured.err

    return command


@pytest.fixture
def store(tmp_path: Path) -> StudyStore:
    store = make_store(tmp_path / "runs")
    add(store, {"ratio.start": 0.25, "selection.mode": "hard"}, 0.5)
    add(store, {"ratio.start": 0.45, "selection.mode": "soft"}, 0.7, path="trials/1")
    add(store, state=TrialState.FAIL, reason="no luck")
    add_baseline(store, "mae", 0, 0.4)
    note_data(store, "f00d")
    return store


def answer(run: Run, *arguments: object) -> Any:
    code, out, err = run(*arguments, "--json")
    assert code == 0, err
    return json.loads(out)


def test_a_new_file_is_valid_commented_and_not_written_twice(run: Run, tmp_path: Path) -> None:
    code, out, _ = run("init", "mine")
    assert code == 0
    assert "mine.yaml" in out
    assert (tmp_path / "mine.yaml").read_text().count("#") > 10
    code, out, _ = run("validate", "mine.yaml")
    assert (code, out.splitlines()[0]) == (
        0,
        "mine.yaml: ok; --data checks it against a dataset too",
    )
    assert answer(run, "validate", "mine.yaml")["searched"] == 4
    (tmp_path / "mine.yaml").write_text("changed")
    code, _, err = run("init", "mine")
    assert (code, (tmp_path / "mine.yaml").read_text()) == (2, "changed")
    assert "exists and is left as it is" in err


def test_a_ready_study_is_begun_under_a_name_of_ones_own(run: Run, tmp_path: Path) -> None:
    assert run("init", "ours", "--from", "masking_ratio")[0] == 0
    ready = (Path(__file__).parents[2] / "studies/masking_ratio.yaml").read_text()
    assert (tmp_path / "ours.yaml").read_text() == ready.replace(
        "name: masking_ratio", "name: ours"
    )
    code, _, err = run("init", "other", "--from", "maskin_ratio")
    assert code == 2
    assert "did you mean masking_ratio?" in err
    code, _, err = run("init", "../other")
    assert code == 2
    assert "'../other' is no name of a study; take letters, digits" in err
    assert not (tmp_path / "other.yaml").exists()


@pytest.mark.parametrize("command", ["run", "plan", "validate"])
@pytest.mark.parametrize(
    ("file", "advice"),
    [
        ("nope.yaml", "check the path, or begin a study with `amlp-ray study init NAME`."),
        ("masking_ratio", "`amlp-ray study init NAME --from masking_ratio`."),
        ("masking_ratoi.yaml", "did you mean the ready study masking_ratio?"),
    ],
)
def test_a_study_that_is_neither_file_nor_name_is_refused_with_what_to_do(
    run: Run, command: str, file: str, advice: str
) -> None:
    code, _, err = run(command, file)
    assert code == 2
    assert f"There is no study file or study '{file}'; " in err
    assert advice in err


def test_every_fault_of_a_file_is_a_line(run: Run, tmp_path: Path) -> None:
    file = write_study(
        tmp_path / "bad.yaml",
        seed=-1,
        space={"ratio.strat": {"low": 0.1, "high": 0.2}},
        baselines=["mea"],
    )
    code, _, err = run("validate", file)
    assert code == 2
    lines = err.splitlines()
    assert len(lines) == 3
    for message in ("seed is -1", "ratio.strat", "mea"):
        assert sum(message in line for line in lines) >= 1, message


def test_status_trials_best_and_importance_answer_people_and_programs(
    run: Run, store: StudyStore
) -> None:
    assert answer(run, "status", "tiny")["states"] == {"COMPLETE": 2, "FAIL": 1}
    assert "trial 1 with dsc 0.7" in run("status", "tiny")[1]
    assert [row["state"] for row in answer(run, "trials", "tiny")] == [
        "COMPLETE",
        "COMPLETE",
        "FAIL",
        "COMPLETE",
    ]
    chosen = answer(
        run,
        "trials",
        "tiny",
        "--state",
        "complete",
        "--sort",
        "-dsc",
        "--columns",
        "number,dsc",
        "--limit",
        1,
    )
    assert chosen == [{"number": 1, "dsc": 0.7}]
    assert "no luck" in run("trials", "tiny")[1]
    assert answer(run, "best", "tiny")["number"] == 1
    assert "0.7" in run("best", "tiny")[1]
    assert answer(run, "importance", "tiny")["dsc"]["shares"] == {}
    assert "too few" in run("importance", "tiny")[1]
    assert [row["name"] for row in answer(run, "list")] == ["tiny"]
    assert "tiny" in run("list")[1]


def test_importance_has_shares_where_there_are_trials_enough(run: Run, store: StudyStore) -> None:
    for i in range(12):
        add(store, {"ratio.start": 0.2 + 0.02 * i, "selection.mode": "hard"}, 0.3 + 0.03 * i)
    shares = answer(run, "importance", "tiny")["dsc"]["shares"]
    assert max(shares, key=shares.get) == "ratio.start"
    assert sum(shares.values()) == pytest.approx(1)


def test_a_front_is_shown_for_several_objectives(run: Run, tmp_path: Path) -> None:
    two = make_store(
        tmp_path / "runs", "two", objectives={"dsc": "maximize", "gpu_seconds": "minimize"}
    )
    for values in ([0.5, 20.0], [0.6, 30.0], [0.4, 40.0]):
        add(two, values=values)
    printed = answer(run, "best", "two")
    assert printed["best"] == 1
    assert [row["number"] for row in printed["front"]] == [1, 0]
    assert run("best", "two")[0] == 0


def test_studies_are_compared(run: Run, store: StudyStore, tmp_path: Path) -> None:
    other = make_store(tmp_path / "runs", "other", seed=9)
    add(other, values=0.9)
    note_data(other, "f00d")
    assert answer(run, "compare", "tiny", "other")["comparable"]
    code, out, _ = run("compare", "tiny", "other")
    assert code == 0
    assert "other found the best trial, 0.200 above tiny" in out
    assert "seed" in out
    assert run("compare", "tiny")[0] == 2


def test_a_trial_is_shown_and_tried_again(run: Run, store: StudyStore) -> None:
    assert answer(run, "trial", "show", "tiny", 1)["params"] == {
        "ratio.start": 0.45,
        "selection.mode": "soft",
    }
    code, out, _ = run("trial", "show", "tiny", 2)
    assert code == 0
    assert "no luck" in out
    code, out, _ = run("trial", "retry", "tiny", 2)
    assert code == 0
    assert "trial 3 of 'tiny' waits" in out
    assert "the budget is used (trials 3 of 3)" in out
    assert run("trial", "show", "tiny", 9)[0] == 2
    assert "never began to train" in run("trial", "replay", "tiny", 1)[2]


def test_trials_are_enqueued_by_name_or_file(run: Run, store: StudyStore, tmp_path: Path) -> None:
    assert answer(run, "enqueue", "tiny", "ratio.start=0.3", "selection.mode=soft") == {
        "study": "tiny",
        "number": 3,
    }
    code, _, err = run("enqueue", "tiny", "ratio.start=0.9")
    assert code == 2
    assert "which has 0.2 to 0.5" in err
    file = write_study(tmp_path / "new.yaml", name="new")
    assert answer(run, "enqueue", file, "ratio.start=0.3") == {"study": "new", "number": 0}
    assert answer(run, "status", "new")["state"] == "not begun"
    assert run("enqueue", "nothing", "ratio.start=0.3")[0] == 2


def test_a_budget_is_extended_and_a_space_changed(
    run: Run, store: StudyStore, tmp_path: Path
) -> None:
    assert answer(run, "extend", "tiny", "--trials", "+10")["budget"]["trials"] == 13
    code, out, _ = run("extend", "tiny", "--hours", "2")
    assert code == 0
    assert "study resume tiny" in out
    wide = {
        "ratio.start": {"low": 0.1, "high": 0.6},
        "lr": {"low": 1e-4, "high": 1e-2, "log": True},
    }
    file = write_study(tmp_path / "wide.yaml", space=wide)
    code, _, err = run("extend", "tiny", "--space", file)
    assert code == 2
    assert "selection.mode is gone" in err
    done = answer(
        run, "extend", "tiny", "--space", file, "--fill", "lr=0.001", "--drop", "selection.mode"
    )
    assert (done["kept"], done["outside"]) == (3, 0)
    assert run("extend", "tiny", "--drop", "lr")[0] == 2
    assert run("extend", "tiny")[0] == 2


def test_trials_leave_and_enter_by_files(run: Run, store: StudyStore, tmp_path: Path) -> None:
    code, out, _ = run("export", "tiny", "--out", "all.csv")
    assert (code, out) == (0, "4 trials: all.csv\n")
    file = write_study(tmp_path / "new.yaml", name="new")
    code, out, _ = run("import", file, "all.csv")
    assert code == 0
    assert "2 trials imported into 'new', 0 known already" in out
    assert "skipped line 4: " in out
    assert answer(run, "import", "new", "tiny")["known"] == 2
    assert run("export", "tiny", "--out", "all.txt")[0] == 2
    assert run("import", "new", "nothing")[0] == 2


def test_a_study_is_deleted_when_that_is_meant(
    run: Run, store: StudyStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("n\n"))
    code, out, _ = run("delete", "tiny")
    assert code == 0
    assert out.startswith(f"Delete {store.folder} with 3 trials and all encoders?")
    assert out.endswith("nothing was deleted\n")
    assert store.folder.is_dir()
    assert run("delete", "tiny", "--yes")[0] == 0
    assert not store.folder.exists()


@pytest.fixture
def driven(store: StudyStore) -> Iterator[list[str]]:
    """Somebody runs the study and answers; the verbs that were heard."""
    heard: list[str] = []
    begun, over = threading.Event(), threading.Event()

    def drive() -> None:
        reopened = StudyStore.open(store.folder)
        with reopened.lock():
            begun.set()
            while not over.wait(0.05):
                reopened.answer_requests(lambda request: heard.append(request["verb"]))

    thread = threading.Thread(target=drive)
    thread.start()
    assert begun.wait(30)
    yield heard
    over.set()
    thread.join()


@pytest.mark.parametrize(
    ("verb", "means", "state"),
    [
        ("pause", "`amlp-ray study resume tiny` resumes them", "pausing"),
        ("stop", "running ones finish", "stopping"),
        ("cancel", "end now, as failed", "cancelling"),
    ],
)
def test_a_running_study_hears_what_is_asked_of_it(
    run: Run, driven: list[str], verb: str, means: str, state: str
) -> None:
    code, out, _ = run(verb, "tiny")
    assert code == 0
    assert driven == [verb]
    assert means in out.splitlines()[-1]
    printed = answer(run, "status", "tiny")
    assert (printed["state"], printed["request"]["verb"]) == (state, verb)


def test_looks_and_extensions_do_not_disturb_a_running_study(
    run: Run, driven: list[str], tmp_path: Path
) -> None:
    assert answer(run, "status", "tiny")["state"] == "running"
    assert answer(run, "extend", "tiny", "--trials", "+2")["budget"]["trials"] == 5
    assert answer(run, "enqueue", "tiny", "ratio.start=0.3")["number"] == 3
    assert "is run by process" in run("delete", "tiny", "--yes")[2]
    assert (
        "pause it before"
        in run("extend", "tiny", "--space", write_study(tmp_path / "same.yaml"))[2]
    )
    assert driven == []


@pytest.mark.parametrize("verb", ["pause", "stop", "cancel"])
def test_of_a_study_that_nobody_runs_nothing_is_asked(
    run: Run, store: StudyStore, verb: str
) -> None:
    code, out, _ = run(verb, "tiny")
    assert (code, out) == (0, f"Study 'tiny' is not running; there is nothing to {verb}.\n")
    assert StudyStore.open(store.folder).last_request() is None, "the next run would obey at once"
    code, _, err = run(verb, "starting")
    assert code == 2
    assert err.startswith(f"amlp-ray: Study 'starting' has not begun in {store.folder.parent}, so ")
    assert f"there is nothing to {verb}; " in err


def test_a_study_is_watched_in_one_picture(run: Run, driven: list[str], store: StudyStore) -> None:
    add(store, state=TrialState.RUNNING, values=None)
    folder = store.trial_folder(3)
    folder.mkdir(parents=True)
    row = {"epoch": 2, "loss": 0.25, "ratio": 0.31, "images_per_second": 87.0}
    (folder / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    code, out, _ = run("watch", "tiny", "--once")
    assert code == 0
    for text in ("running", "trials/3", "0.31", "87", "4 of 3", "trial 1 with dsc 0.7"):
        assert text in out, out


def test_logs_are_those_of_the_study_or_of_a_trial(run: Run, store: StudyStore) -> None:
    assert run("logs", "tiny")[0] == 2
    (store.folder / "events.log").write_text("12:00 trial 0 starts\n12:01 trial 0 compl")
    assert run("logs", "tiny")[1] == "12:00 trial 0 starts\n"
    folder = store.trial_folder(1)
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text('{"epoch": 1, "loss": 0.123456}\n')
    (folder / "error.txt").write_text("Traceback: it broke\n")
    assert run("logs", "tiny", 1)[1] == "epoch 1, loss 0.1235\nTraceback: it broke\n"
    assert run("logs", "tiny", 9)[0] == 2


def test_a_log_is_followed_until_ctrl_c(
    run: Run, store: StudyStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = store.folder / "events.log"
    log.write_text("one\ntw")
    steps = iter([lambda: log.write_text("one\ntwo\n"), lambda: None])

    def sleep(seconds: float) -> None:
        try:
            next(steps)()
        except StopIteration:
            raise KeyboardInterrupt from None

    monkeypatch.setattr(time, "sleep", sleep)
    code, out, _ = run("logs", "tiny", "--follow")
    assert (code, out) == (130, "one\ntwo\n")


def test_every_verb_says_what_it_is_for() -> None:
    import typer

    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    expected = (
        "init validate plan run status watch logs pause resume stop cancel extend enqueue trials "
        "best compare importance report confirm export import list repair delete trial"
    )
    assert set(commands) == set(expected.split())
    assert set(commands["trial"].commands) == {"show", "replay", "retry"}
    assert all(command.help for command in commands.values())


def test_a_study_whose_journal_was_emptied_is_not_begun_anew_but_repaired(
    run: Run, store: StudyStore
) -> None:
    folder = store.trial_folder(0)
    folder.mkdir(parents=True)
    (folder / "score.json").write_text('{"epoch": 4, "dsc": 0.5}')
    (store.folder / "study.journal").write_text("")
    code, _, error = run("status", "tiny")
    assert code == 2
    assert "`amlp-ray study repair tiny` restores" in error
    code, out, _ = run("repair", "tiny")
    assert (code, out.splitlines()[0]) == (
        0,
        "repaired 'tiny': 1 run restored from folders, 0 as they were stored, 0 gone",
    )
    assert run("status", "tiny")[0] == 0
    assert run("repair", "tiny")[1] == "nothing is to be repaired in 'tiny'\n"
