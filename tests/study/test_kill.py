"""Kill a study's process and run the same command again: nothing lost, doubled, or left running."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from helpers.tiny_study import TINY
from optuna.trial import TrialState

from amlp_ray.data.dataset import PatchDataset
from amlp_ray.study.storage.study_store import StudyStore, read_metrics

DEADLINE_S = 120


def write_study(folder: Path, changes: dict[str, Any], *, epochs: int) -> Path:
    """A study of trials long enough to be killed in the middle."""
    study = folder / "tiny.yaml"
    study.write_text(
        yaml.safe_dump(TINY | changes | {"pretrain": TINY["pretrain"] | {"epochs": epochs}})
    )
    return study


def start(study: Path, data: Path, runs: Path, log: Path) -> subprocess.Popen[bytes]:
    command = [
        sys.executable,
        "-m",
        "amlp_ray",
        "study",
        "run",
        str(study),
        "--data",
        str(data),
        "--runs",
        str(runs),
    ]
    return subprocess.Popen(
        command, stdout=log.open("ab"), stderr=subprocess.STDOUT, start_new_session=True
    )


def wait_for(condition: object, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():  # type: ignore[operator]
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.05)


@pytest.mark.ray
@pytest.mark.timeout(400)
def test_a_killed_study_goes_on_where_it_stopped(
    phantom_dataset: PatchDataset, tmp_path: Path
) -> None:
    study = write_study(tmp_path, {"baselines": ["mae"], "budget": {"trials": 2}}, epochs=60)
    store, log = StudyStore(tmp_path / "runs" / "tiny"), tmp_path / "log"
    process = start(study, phantom_dataset.path, tmp_path / "runs", log)
    try:
        # In the middle of the first searched trial, past its first checkpoint.
        wait_for(lambda: len(read_metrics(store.trial_folder(0))) >= 5, process, log)
        children = psutil.Process(process.pid).children(recursive=True)
        writers = [
            p for p in children if p.cmdline() and p.cmdline()[0].startswith("ray::AmlpTrial")
        ]
        assert writers
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        assert TrialState.RUNNING in {t.state for t in store.search().trials}
        done = len(read_metrics(store.trial_folder(0)))

        process = start(study, phantom_dataset.path, tmp_path / "runs", log)
        assert process.wait(DEADLINE_S * 2) == 0, log.read_text()
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)

    output = log.read_text()
    assert "trial 0 continues" in output
    trials = store.search().trials
    assert [t.state for t in trials] == [TrialState.COMPLETE] * 2, output
    assert [t.state for t in store.baselines().trials] == [TrialState.COMPLETE]
    for trial in trials:
        rows = read_metrics(store.trial_folder(trial.number))
        assert [row["epoch"] for row in rows] == list(range(1, 61)), "every epoch once"
        assert sorted(trial.intermediate_values) == [30, 60]
    seconds = [row["seconds"] for row in read_metrics(store.trial_folder(0))]
    assert len(seconds) >= done
    _, alive = psutil.wait_procs(writers, timeout=20)
    assert not alive, "a trial outlived its driver"


@pytest.mark.ray
@pytest.mark.timeout(200)
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_ctrl_c_and_sigterm_say_so_and_leave_trials_to_be_taken_over(
    phantom_dataset: PatchDataset, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    study = write_study(tmp_path, {"baselines": [], "budget": {"trials": 1}}, epochs=500)
    store, log = StudyStore(tmp_path / "runs" / "tiny"), tmp_path / "log"
    process = start(study, phantom_dataset.path, tmp_path / "runs", log)
    try:
        wait_for(lambda: len(read_metrics(store.trial_folder(0))) >= 2, process, log)
        process.send_signal(number)
        assert process.wait(DEADLINE_S) == code, log.read_text()
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert "was interrupted; the same command resumes it" in log.read_text().splitlines()[-1]
    assert [t.state for t in store.search().trials] == [TrialState.RUNNING]


@pytest.mark.ray
@pytest.mark.timeout(300)
def test_a_trial_whose_process_is_killed_goes_on_from_its_checkpoint(
    phantom_dataset: PatchDataset, tmp_path: Path
) -> None:
    study = write_study(
        tmp_path,
        {"baselines": [], "budget": {"trials": 2}, "resources": {"concurrency": 1}},
        epochs=60,
    )
    store, log = StudyStore(tmp_path / "runs" / "tiny"), tmp_path / "log"
    process = start(study, phantom_dataset.path, tmp_path / "runs", log)
    try:
        wait_for(lambda: len(read_metrics(store.trial_folder(0))) >= 3, process, log)
        children = psutil.Process(process.pid).children(recursive=True)
        (trial,) = [
            p for p in children if p.cmdline() and p.cmdline()[0].startswith("ray::AmlpTrial")
        ]
        os.kill(trial.pid, signal.SIGKILL)
        before = read_metrics(store.trial_folder(0))
        assert process.wait(DEADLINE_S * 2) == 0, log.read_text()
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    output = log.read_text()
    lines = output.splitlines()
    assert "trial 0 lost its process (1 of 3 retries): it was killed or crashed" in lines
    assert not [line for line in lines if "raylet" in line or "Traceback" in line], output
    assert "trial 0 continues" in output
    first, second = store.search().trials
    assert (first.state, second.state) == (TrialState.COMPLETE, TrialState.COMPLETE)
    assert first.user_attrs["lost"] == 1
    assert "lost" not in second.user_attrs
    after = read_metrics(store.trial_folder(0))
    assert [row["epoch"] for row in after] == list(range(1, 61)), "every epoch once"
    count = len(before) - 1  # the last may have been without its checkpoint yet
    assert after[:count] == before[:count], "it went on; it did not begin anew"
