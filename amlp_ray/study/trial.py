"""One trial: pretrain, score at rungs, report, and return when asked. Runs in a Tune trial's process."""

from __future__ import annotations

import fcntl
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from amlp_ray.config import PretrainSettings, ProbeSettings, ResourceSettings
from amlp_ray.errors import AmlpError, StudyError
from amlp_ray.study.store import read_metrics

LOCK_WAIT_S = 60.0  # processes of a killed study are gone within seconds


@dataclass(frozen=True)
class Task:
    """What a trial is told. `kind` is `search` or `arm`; `number` is Optuna's, within that kind."""

    study: str
    kind: str
    number: int
    label: str  # a short name: `trial 7`, `arm mae-0`
    folder: str
    data: str
    settings: PretrainSettings
    probe: ProbeSettings
    resources: ResourceSettings
    rungs: tuple[int, ...]
    labels: str | None = None  # where they are a data set apart

    def as_config(self) -> dict[str, Any]:
        """Plain values, which is what Tune shows and stores of a trial."""
        plain = {"settings": self.settings, "probe": self.probe, "resources": self.resources}
        return asdict(self) | {key: value.model_dump(mode="json") for key, value in plain.items()}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Task:
        return cls(
            **config
            | {
                "settings": PretrainSettings.model_validate(config["settings"]),
                "probe": ProbeSettings.model_validate(config["probe"]),
                "resources": ResourceSettings.model_validate(config["resources"]),
                "rungs": tuple(config["rungs"]),
            }
        )


class StopBoard:
    """Where the searcher leaves word that a trial should return; an actor of its own.

    Tune would end a trial by killing its process, and a killed process leaks the placement group of an inner Train run
    until the cluster is full. A trial that is asked returns by itself, with everything saved.
    """

    def __init__(self) -> None:
        self._asked: set[str] = set()

    def ask(self, folder: str) -> None:
        """Ask the trial that writes into `folder` to return."""
        self._asked.add(folder)

    def asked(self, folder: str) -> bool:
        return folder in self._asked


def amlp_trial(config: dict[str, Any]) -> dict[str, Any]:
    """Tune's entry point: run the task in `config["task"]`, asking `config["board"]` after each report.

    Never raises: Tune's own failures carry no reason, so a failure is reported as a result with one.
    """
    from ray import tune

    task = Task.from_config(config["task"])
    folder = Path(task.folder)
    started = time.perf_counter()
    try:
        with _only_writer(folder):
            for row in read_metrics(folder):  # of an earlier driver, which may have died before storing them
                if "dsc" in row:
                    tune.report(_rung(row))
            (run_in_group if task.resources.workers > 1 and task.settings.objective != "none" else run_alone)(
                task, partial(ask_board, config["board"], task.folder)
            )
        return {"ended": True, **_spent(folder, time.perf_counter() - started)}
    except Exception as error:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "error.txt").write_text(traceback.format_exc())
        reason = str(error) if isinstance(error, AmlpError) else f"{type(error).__name__}: {error}"
        return {"failed": " ".join(reason.split())[:500], **_spent(folder, time.perf_counter() - started)}


def _spent(folder: Path, here: float) -> dict[str, Any]:
    """Epochs, seconds and speed from the trial's own lines, so that those before a take-over count too.

    `here` stands in where nothing was trained.
    """
    rows = read_metrics(folder)
    if not rows:
        return {"epochs": 0, "seconds": here}
    seconds = sum(row["seconds"] + row.get("evaluate_seconds", 0.0) for row in rows)
    speed = sum(row["images_per_second"] for row in rows) / len(rows)
    return {"epochs": rows[-1]["epoch"], "seconds": seconds, "images_per_second": round(speed, 1)}


def ask_board(board: Any, folder: str) -> bool:
    """Whether the searcher asked this trial to return."""
    import ray

    return bool(ray.get(board.asked.remote(folder)))


def run_alone(task: Task, should_stop: Callable[[], bool]) -> None:
    """One worker: train in this process, which costs nothing. `tune.report` returns after the searcher has judged."""
    from ray import tune

    from amlp_ray.runtime.metrics import TrialGauges
    from amlp_ray.training.pretrain import Hooks, Metrics
    from amlp_ray.training.runners import run_here

    gauges = TrialGauges(task.study, task.label)

    def report(metrics: Metrics, checkpoint: Path) -> None:
        gauges.update(metrics)
        if "dsc" in metrics:
            tune.report(_rung(metrics))

    try:
        run_here(_job(task), Hooks(report=report, should_stop=should_stop))
    finally:
        gauges.close()


def run_in_group(task: Task, should_stop: Callable[[], bool]) -> None:
    """Several workers: an inner Ray Train group, which costs about 10 s to start.

    Its first worker asks the board while the searcher may still judge, so a poor trial returns an epoch or more later.
    """
    from ray import tune

    from amlp_ray.training.runners import run_on_ray

    def report(metrics: dict[str, Any]) -> None:
        if "dsc" in metrics:
            tune.report(_rung(metrics))

    rows = read_metrics(Path(task.folder))
    run_on_ray(
        _job(task),
        task.resources,
        name=f"{task.study}-{task.label.replace(' ', '-')}",
        storage=Path(task.folder) / "ray_train",
        should_stop=should_stop,
        report=report,
        reported=rows[-1]["epoch"] if rows else 0,
    )


def _job(task: Task) -> Any:
    from amlp_ray.training.job import Job

    return Job(
        settings=task.settings,
        data=task.data,
        labels=task.labels,
        folder=Path(task.folder),
        probe=task.probe,
        rungs=task.rungs,
        threads=max(1, int(task.resources.cpus_per_worker)),
        study=task.study,
        label=task.label,
    )


def _rung(metrics: dict[str, Any]) -> dict[str, Any]:
    keys = ("epoch", "dsc", "ppv", "sensitivity", "ap", "loss", "ratio", "images_per_second")
    return {key: metrics[key] for key in keys if key in metrics}


@contextmanager
def _only_writer(folder: Path) -> Iterator[None]:
    """Wait until no other process writes into the folder: one of a killed driver may live on for some seconds."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as file:
        deadline = time.monotonic() + LOCK_WAIT_S
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise StudyError(f"{folder} is still written by another process; end it and run again.") from None
                time.sleep(0.5)
        yield
