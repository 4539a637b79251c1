"""One trial: pretrain, score at rungs, report, and return when asked. Runs in a Tune trial's process."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, get_args

from amlp_ray.config import (
    COSTS,
    Objective,
)
from amlp_ray.errors import AmlpError
from amlp_ray.study.storage.provenance import write_provenance
from amlp_ray.study.storage.study_store import read_metrics
from amlp_ray.study.trial_spec import Task
from amlp_ray.training.loggers.metrics_file import own_rows
from amlp_ray.utils.locks import only_writer

SCORES = tuple(name for name in get_args(Objective) if name not in COSTS)


def amlp_trial(config: dict[str, Any]) -> dict[str, Any]:
    """Tune's entry point: run the task in `config["task"]`, asking `config["board"]` after each report.

    Never raises: Tune's own failures carry no reason, so a failure is reported as a result with one.
    """
    import ray
    from ray import tune

    task = Task.from_config(config["task"])
    folder = Path(task.folder)
    started = time.perf_counter()
    ray.get(config["board"].begin.remote(task.folder))
    try:
        with only_writer(folder):
            forget_peak_memory()
            write_provenance(task)
            should_stop = partial(asked_to_return, config["board"], task)
            rows = own_rows(read_metrics(folder))
            for row in rows:  # of an earlier driver, which may have died before storing them
                if "dsc" in row:
                    tune.report(_rung(row, folder))
                    if (
                        should_stop()
                    ):  # it died before the trial returned; one more rung would be another result
                        task = replace(task, until=rows[-1]["epoch"])
                        break
            alone = task.resources.alone or task.settings.objective == "none"
            (run_alone if alone else run_in_group)(task, should_stop)
            if task.finetune is not None and _is_whole(task):
                _confirm(task)
        return {
            "ended": True,
            **spent_so_far(folder, time.perf_counter() - started),
            **_memory(task),
        }
    except Exception as error:
        with suppress(OSError):  # the disk may be what failed
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "error.txt").write_text(traceback.format_exc())
        reason = str(error) if isinstance(error, AmlpError) else f"{type(error).__name__}: {error}"
        return {
            "failed": " ".join(reason.split())[:500],
            **spent_so_far(folder, time.perf_counter() - started),
        }


def spent_so_far(folder: Path, here: float) -> dict[str, Any]:
    """Epochs, seconds, speed and last scores from the trial's own lines, so that those before a take-over count too.

    `here` stands in where nothing was trained.
    """
    rows = own_rows(read_metrics(folder))
    scored = next((row for row in reversed(rows) if "dsc" in row), {})
    told = {name: scored[name] for name in SCORES if scored.get(name) is not None}
    if not rows or "seconds" not in rows[-1]:
        return {"epochs": 0, "seconds": here, **told}
    seconds = sum(row["seconds"] + row.get("evaluate_seconds", 0.0) for row in rows)
    speed = sum(row["images_per_second"] for row in rows) / len(rows)
    return {"epochs": len(rows), "seconds": seconds, "images_per_second": round(speed, 1), **told}


def asked_to_return(board: Any, task: Task) -> bool:
    """Whether the searcher asked this trial to return by now."""
    import ray

    when = ray.get(board.asked.remote(task.folder))
    if when == "rung":
        rows = read_metrics(Path(task.folder))
        return bool(rows) and rows[-1]["epoch"] in task.rungs
    return when == "now"


def run_alone(task: Task, should_stop: Callable[[], bool]) -> None:
    """One worker: train in this process, which costs nothing. `tune.report` returns after the searcher has judged."""
    from ray import tune

    from amlp_ray.launch.launcher import run_here
    from amlp_ray.runtime.dashboard_metrics import TrialGauges
    from amlp_ray.training.pretrain import Hooks, Metrics

    gauges = TrialGauges(task.study, task.label)

    def report(metrics: Metrics) -> None:
        gauges.update(metrics)
        if "dsc" in metrics:
            tune.report(_rung(metrics, Path(task.folder)))

    share_gpu(task.resources.gpus_per_worker)
    try:
        run_here(_job(task), Hooks(report=report, should_stop=should_stop))
    finally:
        gauges.close()


def run_in_group(task: Task, should_stop: Callable[[], bool]) -> None:
    """Several workers: an inner Ray Train group, which costs about 10 s to start.

    Its first worker asks the board while the searcher may still judge, so a poor trial returns an epoch or more later.
    """
    from ray import tune

    from amlp_ray.launch.launcher import run_on_ray

    def report(metrics: dict[str, Any]) -> None:
        if "dsc" in metrics:
            tune.report(_rung(metrics, Path(task.folder)))

    name = f"{task.study}-{task.label.replace(' ', '-')}"
    run_on_ray(_job(task), name=name, should_stop=should_stop, report=report)


def _job(task: Task) -> Any:
    from amlp_ray.launch.job import Job

    return Job(
        settings=task.settings,
        data=task.data,
        labels=task.labels,
        folder=Path(task.folder),
        probe=task.probe,
        rungs=task.rungs,
        resources=task.resources,
        faults=task.faults,
        tracking=task.tracking,
        study=task.study,
        label=task.label,
        until=task.until,
        fork=None if task.fork is None else Path(task.fork),
    )


def _rung(metrics: dict[str, Any], folder: Path) -> dict[str, Any]:
    """What Tune is told of a rung: its scores, and what the trial has taken up to it."""
    keys = ("epoch", *SCORES, "loss", "ratio", "images_per_second")
    spent = spent_so_far(folder, 0.0)
    told = {key: metrics[key] for key in keys if metrics.get(key) is not None}
    return told | {"seconds": spent["seconds"], "epochs": spent["epochs"]}


def _is_whole(task: Task) -> bool:
    """Whether it was trained to its end: one that was paused is fine-tuned when it has gone on."""
    rows = read_metrics(Path(task.folder))
    return task.settings.objective == "none" or (
        bool(rows) and rows[-1]["epoch"] >= task.settings.epochs
    )


def _confirm(task: Task) -> None:
    """The second protocol of a confirmation, after its training."""
    import torch

    from amlp_ray.data.dataset import PatchDataset
    from amlp_ray.evaluation.confirmation_run import finish_confirmation_run

    assert task.finetune is not None
    device = "cuda" if task.gpus and torch.cuda.is_available() else "cpu"
    labels = PatchDataset.open(task.labels or task.data)
    finish_confirmation_run(
        Path(task.folder), labels, task.finetune, sizes=task.probe.sizes, device=device
    )


def share_gpu(share: float) -> None:
    """Keep a trial that has a part of a GPU to that part of its memory: the greedy one fails, not its neighbour."""
    import torch

    if 0 < share < 1 and torch.cuda.is_available():
        torch.cuda.set_per_process_memory_fraction(share)


def forget_peak_memory() -> None:
    """Begin to measure anew: Tune runs trial after trial in one process."""
    import torch

    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def _memory(task: Task) -> dict[str, float]:
    """Peak memory in GB of this process, of the GPU where it has one; of a group nothing is known here."""
    import torch

    from amlp_ray.training.loggers.flops import peak_memory

    if not task.resources.alone:
        return {}
    device = "cuda" if task.gpus and torch.cuda.is_available() else "cpu"
    return {"memory": round(peak_memory(device), 3)}
