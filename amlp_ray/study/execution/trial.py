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
    StudyObjective,
)
from amlp_ray.errors import AmlpError
from amlp_ray.study.storage.provenance import write_provenance
from amlp_ray.study.storage.study_store import read_metrics
from amlp_ray.study.trial_spec import TrialSpec
from amlp_ray.training.loggers.metrics_file import own_rows
from amlp_ray.utils.locks import only_writer

SCORES = tuple(name for name in get_args(StudyObjective) if name not in COSTS)


def amlp_trial(config: dict[str, Any]) -> dict[str, Any]:
    """Tune's entry point: run the task in `config["task"]`, asking `config["board"]` after each report.

    Never raises: Tune's own failures carry no reason, so a failure is reported as a result with one.
    """
    import ray
    from ray import tune

    trial_spec = TrialSpec.from_config(config["trial_spec"])
    folder = Path(trial_spec.folder)
    started = time.perf_counter()
    ray.get(config["stop_flags"].begin.remote(trial_spec.folder))
    try:
        with only_writer(folder):
            forget_peak_memory()
            write_provenance(trial_spec)
            should_stop = partial(asked_to_return, config["stop_flags"], trial_spec)
            rows = own_rows(read_metrics(folder))
            for row in rows:  # of an earlier driver, which may have died before storing them
                if "dsc" in row:
                    tune.report(_rung(row, folder))
                    if (
                        should_stop()
                    ):  # it died before the trial returned; one more rung would be another result
                        trial_spec = replace(trial_spec, until=rows[-1]["epoch"])
                        break
            alone = trial_spec.resources.alone or trial_spec.config.objective == "none"
            (run_alone if alone else run_in_group)(trial_spec, should_stop)
            if trial_spec.finetune is not None and _is_whole(trial_spec):
                _confirm(trial_spec)
        return {
            "ended": True,
            **spent_so_far(folder, time.perf_counter() - started),
            **_memory(trial_spec),
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


def asked_to_return(stop_flags: Any, trial_spec: TrialSpec) -> bool:
    """Whether the searcher asked this trial to return by now."""
    import ray

    when = ray.get(stop_flags.asked.remote(trial_spec.folder))
    if when == "rung":
        rows = read_metrics(Path(trial_spec.folder))
        return bool(rows) and rows[-1]["epoch"] in trial_spec.rungs
    return when == "now"


def run_alone(trial_spec: TrialSpec, should_stop: Callable[[], bool]) -> None:
    """One worker: train in this process, which costs nothing. `tune.report` returns after the searcher has judged."""
    from ray import tune

    from amlp_ray.launch.launcher import run_here
    from amlp_ray.runtime.dashboard_metrics import TrialGauges
    from amlp_ray.training.pretrain import Hooks, Metrics

    gauges = TrialGauges(trial_spec.study, trial_spec.label)

    def report(metrics: Metrics) -> None:
        gauges.update(metrics)
        if "dsc" in metrics:
            tune.report(_rung(metrics, Path(trial_spec.folder)))

    share_gpu(trial_spec.resources.gpus_per_worker)
    try:
        run_here(_job(trial_spec), Hooks(report=report, should_stop=should_stop))
    finally:
        gauges.close()


def run_in_group(trial_spec: TrialSpec, should_stop: Callable[[], bool]) -> None:
    """Several workers: an inner Ray Train group, which costs about 10 s to start.

    Its first worker asks the board while the searcher may still judge, so a poor trial returns an epoch or more later.
    """
    from ray import tune

    from amlp_ray.launch.launcher import run_on_ray

    def report(metrics: dict[str, Any]) -> None:
        if "dsc" in metrics:
            tune.report(_rung(metrics, Path(trial_spec.folder)))

    name = f"{trial_spec.study}-{trial_spec.label.replace(' ', '-')}"
    run_on_ray(_job(trial_spec), name=name, should_stop=should_stop, report=report)


def _job(trial_spec: TrialSpec) -> Any:
    from amlp_ray.launch.job import RunSpec

    return RunSpec(
        config=trial_spec.config,
        data=trial_spec.data,
        eval_data=trial_spec.eval_data,
        folder=Path(trial_spec.folder),
        probe=trial_spec.probe,
        rungs=trial_spec.rungs,
        resources=trial_spec.resources,
        fault_tolerance=trial_spec.fault_tolerance,
        tracking=trial_spec.tracking,
        study=trial_spec.study,
        label=trial_spec.label,
        until=trial_spec.until,
        fork=None if trial_spec.fork is None else Path(trial_spec.fork),
    )


def _rung(metrics: dict[str, Any], folder: Path) -> dict[str, Any]:
    """What Tune is told of a rung: its scores, and what the trial has taken up to it."""
    keys = ("epoch", *SCORES, "loss", "ratio", "images_per_second")
    spent = spent_so_far(folder, 0.0)
    told = {key: metrics[key] for key in keys if metrics.get(key) is not None}
    return told | {"seconds": spent["seconds"], "epochs": spent["epochs"]}


def _is_whole(trial_spec: TrialSpec) -> bool:
    """Whether it was trained to its end: one that was paused is fine-tuned when it has gone on."""
    rows = read_metrics(Path(trial_spec.folder))
    return trial_spec.config.objective == "none" or (
        bool(rows) and rows[-1]["epoch"] >= trial_spec.config.epochs
    )


def _confirm(trial_spec: TrialSpec) -> None:
    """The second protocol of a confirmation, after its training."""
    import torch

    from amlp_ray.data.dataset import PatchDataset
    from amlp_ray.evaluation.confirmation_run import finish_confirmation_run

    assert trial_spec.finetune is not None
    device = "cuda" if trial_spec.gpus and torch.cuda.is_available() else "cpu"
    eval_data = PatchDataset.open(trial_spec.eval_data or trial_spec.data)
    finish_confirmation_run(
        Path(trial_spec.folder),
        eval_data,
        trial_spec.finetune,
        sizes=trial_spec.probe.sizes,
        device=device,
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


def _memory(trial_spec: TrialSpec) -> dict[str, float]:
    """Peak memory in GB of this process, of the GPU where it has one; of a group nothing is known here."""
    import torch

    from amlp_ray.training.loggers.flops import peak_memory

    if not trial_spec.resources.alone:
        return {}
    device = "cuda" if trial_spec.gpus and torch.cuda.is_available() else "cpu"
    return {"memory": round(peak_memory(device), 3)}
