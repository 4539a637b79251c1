"""What a study survives: lost database, full disk, killed processes, lost lease, second driver."""

from __future__ import annotations

import json
import logging
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import optuna
import psutil
import pytest
import yaml
from helpers.database import Postgres
from helpers.tiny_study import TINY
from optuna.trial import TrialState

from amlp_ray.config import SegmentConfig, StudyConfig
from amlp_ray.data.dataset import PatchDataset
from amlp_ray.errors import StudyError
from amlp_ray.launch.run_spec import RunSpec
from amlp_ray.study.storage.optuna_storage import open_journal
from amlp_ray.study.storage.study_store import StudyStore, read_metrics

DEADLINE_S = 240  # seconds suffice where nobody else uses the machine


class Driver:
    """A study's process on the Ray of the tests: it starts in seconds, and leftovers would show."""

    def __init__(
        self, folder: Path, data: PatchDataset, *, epochs: int = 40, **changes: Any
    ) -> None:
        import ray

        values = (
            TINY
            | {"baselines": [], "budget": {"trials": 1}, "resources": {"concurrency": 1}}
            | changes
        )
        values["pretrain"] = TINY["pretrain"] | {"epochs": epochs}
        self.study, self.runs, self.log = folder / "tiny.yaml", folder / "runs", folder / "log"
        self.study.write_text(yaml.safe_dump(values))
        self.store = StudyStore(self.runs / "tiny")
        self._data, self._address = data.path, ray.get_runtime_context().gcs_address
        self.processes: list[subprocess.Popen[bytes]] = []

    def start(self) -> subprocess.Popen[bytes]:
        command = [
            sys.executable,
            "-m",
            "amlp_ray",
            "study",
            "run",
            str(self.study),
            "--data",
            str(self._data),
        ]
        command += ["--runs", str(self.runs), "--address", self._address]
        with self.log.open("ab") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        self.processes.append(process)
        return process

    def wait_for(self, condition: Callable[[], object]) -> None:
        deadline = time.monotonic() + DEADLINE_S
        while not condition():
            assert self.processes[-1].poll() is None, self.output()
            assert time.monotonic() < deadline, self.output()
            time.sleep(0.05)

    def epochs(self, number: int = 0) -> int:
        return len(read_metrics(self.store.trial_folder(number)))

    def output(self) -> str:
        return self.log.read_text()

    def last_line(self) -> str:
        return self.output().splitlines()[-1]

    def end(self) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.kill()
                process.wait()


@pytest.fixture
def driver(phantom_dataset: PatchDataset, tmp_path: Path) -> Iterator[Callable[..., Driver]]:
    made: list[Driver] = []

    def make(folder: Path = tmp_path, **changes: Any) -> Driver:
        made.append(Driver(folder, phantom_dataset, **changes))
        return made[-1]

    yield make
    for one in made:
        one.end()


WRITER = """
import json, os, signal, sys
from amlp_ray.study.storage import optuna_storage
import optuna
from optuna.trial import TrialState
journal, last = sys.argv[1], int(sys.argv[2])
append = optuna_storage.Journal.append_logs
writes = 0

def dying(self, logs):
    global writes
    writes += 1
    if writes == last:
        with self.lock(), open(journal, "ab") as file:
            file.write(json.dumps(logs[0]).encode()[: 3 + 11 * last])
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
    append(self, logs)

optuna_storage.Journal.append_logs = dying
from pathlib import Path
store = optuna_storage.open_journal(Path(journal))
study = optuna.create_study(study_name="s", storage=store, load_if_exists=True)
for trial in study.get_trials(states=[TrialState.RUNNING]):
    store.set_trial_state_values(trial._trial_id, TrialState.COMPLETE, [float(trial.number)])
while len(study.trials) < 12:
    trial = study.ask()
    store.set_trial_intermediate_value(trial._trial_id, 1, 0.5)
    study.tell(trial, float(trial.number))
"""


def test_a_journal_whose_writer_dies_in_the_middle_of_every_kind_of_line_loses_nothing(
    tmp_path: Path,
) -> None:
    journal = tmp_path / "study.journal"
    for last in (1, 2, 3, 4, 5, 9, 1000):
        ended = subprocess.run([sys.executable, "-c", WRITER, str(journal), str(last)]).returncode
        assert ended == (0 if last == 1000 else -signal.SIGKILL)
    trials = optuna.load_study(study_name="s", storage=open_journal(journal)).trials
    assert [(t.number, t.state, t.value) for t in trials] == [
        (n, TrialState.COMPLETE, float(n)) for n in range(12)
    ]
    assert all(json.loads(line) for line in journal.read_text().splitlines())


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of a megabyte."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("no file system can be mounted here, which takes root")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_is_waited_for_and_leaves_no_half_line(
    small_disk: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "amlp_ray")
    storage = open_journal(small_disk / "study.journal", 60)
    study = optuna.create_study(study_name="s", storage=storage)
    filler = small_disk / "filler"
    with filler.open("wb", buffering=0) as file, suppress(OSError):  # no space left
        while True:
            file.write(bytes(512))
    room = 4096 - (small_disk / "study.journal").stat().st_size % 4096
    study.set_user_attr("first", "x" * (room // 2))  # still fits into its last block
    before = (small_disk / "study.journal").read_bytes()
    contents: list[bytes] = []

    def make_room() -> None:
        contents.append((small_disk / "study.journal").read_bytes())
        filler.unlink()

    threading.Timer(2, make_room).start()
    study.set_user_attr("second", "y" * 9000)
    assert contents == [before], "half a line was left on the full disk"
    assert caplog.messages == [
        f"the study's storage {small_disk / 'study.journal'} cannot be reached (No space left on "
        f"device); retrying while trials train",
        "the study's storage is back",
    ]
    attributes = optuna.load_study(
        study_name="s", storage=open_journal(small_disk / "study.journal")
    ).user_attrs
    assert len(attributes["second"]) == 9000


@pytest.mark.ray
@pytest.mark.timeout(600)
def test_a_trial_whose_process_dies_too_often_fails_and_the_study_goes_on(
    driver: Callable[..., Driver],
) -> None:
    run = driver(epochs=60, budget={"trials": 2}, fault_tolerance={"max_failures": 1})
    process = run.start()
    for death in (1, 2):
        done = run.epochs()
        run.wait_for(
            lambda done=done: run.epochs() >= done + 2 and writer(run.store.trial_folder(0))
        )
        writer(run.store.trial_folder(0)).kill()
        run.wait_for(
            lambda death=death: (
                "its process" in run.output() and run.output().count("its process") >= death
            )
        )
    assert process.wait(DEADLINE_S) == 0, run.output()
    first, second = run.store.search().trials
    assert first.state == TrialState.FAIL
    assert first.user_attrs["reason"] == (
        "its process died 2 times (fault_tolerance.max_failures=1): it was killed or crashed"
    )
    assert "raylet" not in run.output()
    assert second.state == TrialState.COMPLETE


def writer(folder: Path) -> psutil.Process | None:
    """The process that holds a trial's folder."""
    for process in psutil.process_iter():
        try:
            if any(file.path == str(folder / "lock") for file in process.open_files()):
                return process
        except psutil.Error:
            continue
    return None


@pytest.mark.ray
@pytest.mark.timeout(600)
def test_a_study_outlives_its_database_and_then_gives_up_and_goes_on(
    driver: Callable[..., Driver], server: Postgres
) -> None:
    run = driver(
        epochs=100,
        storage=server.url,
        fault_tolerance={"storage_minutes": 0.15},
        pruner={"name": "none", "rungs": 10},
    )
    process = run.start()
    run.wait_for(lambda: run.epochs() >= 2)
    server.stop()
    try:
        time.sleep(6)
        at = run.epochs()
    finally:
        server.start()
    run.wait_for(lambda: "the study's storage is back" in run.output())
    assert at > 2, "trials train on"
    server.stop()
    try:
        assert process.wait(DEADLINE_S) == 2, run.output()
    finally:
        server.start()
    assert "the study's storage postgresql://" in run.output()
    assert "cannot be reached for 9 s" in run.last_line()
    assert Postgres.password not in run.output()
    assert [t.state for t in run.store.search().trials] == [TrialState.RUNNING]
    assert run.start().wait(DEADLINE_S) == 0, run.output()
    (trial,) = run.store.search().trials
    assert trial.state == TrialState.COMPLETE
    assert sorted(trial.intermediate_values) == list(range(10, 101, 10))
    assert run.epochs() == 100


@pytest.mark.ray
@pytest.mark.timeout(600)
def test_a_second_driver_is_refused_by_name_also_from_another_folder(
    driver: Callable[..., Driver], server: Postgres, tmp_path: Path
) -> None:
    run = driver(epochs=3000, storage=server.url, name="twice")
    run.store = StudyStore(run.runs / "twice")
    first = run.start()
    run.wait_for(lambda: run.epochs() >= 1)
    holder = f"already run by process {first.pid} on"

    assert run.start().wait(DEADLINE_S) == 2
    assert holder in run.last_line()

    copied = (
        tmp_path / "elsewhere" / "twice"
    )  # as another machine has it: the database alone tells them apart
    shutil.copytree(run.runs / "twice", copied, ignore=shutil.ignore_patterns("trials", "run.lock"))
    with pytest.raises(StudyError, match=holder), StudyStore(copied).lock():
        pass

    (copied / "id").unlink()  # another study of the same name
    with pytest.raises(StudyError, match="of another folder than"), StudyStore(copied).lock():
        pass
    assert first.poll() is None, "the first was not disturbed"


@pytest.mark.ray
@pytest.mark.timeout(600)
def test_a_driver_whose_lease_was_taken_over_stops_and_writes_no_more(
    driver: Callable[..., Driver],
) -> None:
    run = driver(epochs=3000)
    process = run.start()
    run.wait_for(lambda: run.epochs() >= 1)
    other = {
        "id": "other",
        "holder": "process 1 on elsewhere",
        "host": "elsewhere",
        "pid": 1,
        "at": time.time(),
    }
    run.store.search().set_user_attr("lease", other | {"seconds": 0.0, "over": False})
    journal = (run.store.folder / "study.journal").read_bytes()
    assert process.wait(DEADLINE_S) == 2, run.output()
    assert "was taken over by another process" in run.last_line()
    assert (run.store.folder / "study.journal").read_bytes() == journal
    assert [t.state for t in run.store.search().trials] == [TrialState.RUNNING]
    with pytest.raises(StudyError, match="already run by process 1 on elsewhere"), run.store.lock():
        pass


@pytest.mark.ray
def test_a_trial_whose_driver_died_before_it_was_pruned_is_not_trained_on(
    phantom_dataset: PatchDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    from amlp_ray.study.execution.stop_flags import StopFlags
    from amlp_ray.study.execution.trial import amlp_trial
    from amlp_ray.study.trial_spec import TrialSpec

    class DriverDied(BaseException):
        pass

    def die(result: dict[str, Any]) -> None:
        raise DriverDied

    def prune(result: dict[str, Any]) -> None:
        reported.append(result["epoch"])
        ray.get(stop_flags.request.remote(str(tmp_path / "trial"), "now"))

    config = StudyConfig.model_validate(TINY)
    reported: list[int] = []
    stop_flags = ray.remote(StopFlags).options(num_cpus=0).remote()
    run = RunSpec(
        study="tiny",
        label="trial 0",
        folder=tmp_path / "trial",
        data=phantom_dataset.path,
        config=config.trial({}, seed=1),
        probe=config.probe,
        resources=config.resources,
        rungs=(2, 3, 4),
    )
    trial_spec = TrialSpec(kind="search", number=0, run=run).model_dump(mode="json")
    tune_config = {"trial_spec": trial_spec, "stop_flags": stop_flags}
    monkeypatch.setattr("ray.tune.report", die)
    with pytest.raises(DriverDied):
        amlp_trial(tune_config)
    monkeypatch.setattr("ray.tune.report", prune)
    assert amlp_trial(tune_config)["epochs"] == 2
    assert reported == [2], (
        "rung 3 would have been another result than that of an undisturbed trial"
    )
    assert (tmp_path / "trial" / "encoder.safetensors").is_file()
    ray.kill(stop_flags)


@pytest.mark.ray
def test_a_paused_confirmation_run_is_fine_tuned_only_when_it_was_trained_to_its_end(
    phantom_dataset: PatchDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    from amlp_ray.study.execution.stop_flags import StopFlags
    from amlp_ray.study.execution.trial import amlp_trial
    from amlp_ray.study.trial_spec import TrialSpec

    folder = tmp_path / "run"
    config = StudyConfig.model_validate(TINY)
    stop_flags = [ray.remote(StopFlags).options(num_cpus=0).remote() for _ in range(2)]
    ray.get(stop_flags[0].request.remote(str(folder), "now"))
    run = RunSpec(
        study="tiny",
        label="confirm mae-0",
        folder=folder,
        data=phantom_dataset.path,
        config=config.trial({}, seed=1),
        probe=config.probe,
        resources=config.resources,
        rungs=(4,),
    )
    finetune = SegmentConfig(epochs=1)
    trial_spec = TrialSpec(kind="confirm", number=0, run=run, finetune=finetune)
    plain_spec = trial_spec.model_dump(mode="json")
    monkeypatch.setattr("ray.tune.report", lambda result: None)
    result = amlp_trial({"trial_spec": plain_spec, "stop_flags": stop_flags[0]})
    assert result["epochs"] == 1
    assert not (folder / "finetune.json").exists(), (
        "an encoder of one epoch is not what is confirmed"
    )
    result = amlp_trial({"trial_spec": plain_spec, "stop_flags": stop_flags[1]})
    assert result["epochs"] == 4
    assert (folder / "finetune.json").is_file()
    for actor in stop_flags:
        ray.kill(actor)
