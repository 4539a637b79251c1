"""Run one trial in a Tune trial's process: pretrain, score at rungs, report, return when asked."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable
from contextlib import closing, suppress
from functools import partial
from pathlib import Path
from typing import Any, get_args

from amlp_ray.config import COST_OBJECTIVES, SegmentConfig, StudyObjective
from amlp_ray.errors import AmlpError
from amlp_ray.launch.run_spec import RunSpec
from amlp_ray.study.storage.provenance import write_provenance
from amlp_ray.study.storage.study_store import read_metrics
from amlp_ray.study.trial_spec import TrialSpec
from amlp_ray.training.loggers.metrics_file import own_rows
from amlp_ray.utils.retry import storage_failure
from amlp_ray.utils.run_dir import RunDir

SCORES = tuple(name for name in get_args(StudyObjective) if name not in COST_OBJECTIVES)
REPORTED = ("epoch", *SCORES, "loss", "ratio", "images_per_second")


def amlp_trial(config: dict[str, Any]) -> dict[str, Any]:
    """Run the trial `config["trial_spec"]`, asking `config["stop_flags"]` after each report.

    This is Tune's entry point. It never raises: Tune's failures carry no reason, so a failure is
    returned as a result with one.

    Returns:
        `ended` or `failed`, with `storage` if its folder could not be written, and what the trial
        took and scored.
    """

    trial_spec = TrialSpec.model_validate(config["trial_spec"])
    run = trial_spec.run
    stop_flags = config["stop_flags"]
    started = time.perf_counter()
    try:
        with RunDir(run.folder).lock():
            reset_peak_memory()
            write_provenance(run)
            should_stop = partial(should_return, stop_flags, run)
            mark_started = partial(_mark_started, stop_flags, run)
            if _is_in_this_process(run):
                mark_started()
            _train(_report_earlier_rungs(run, should_stop), should_stop, mark_started)
            if trial_spec.finetune is not None and _is_fully_trained(run):
                _finetune(run, trial_spec.finetune)
        usage = usage_so_far(run.folder, time.perf_counter() - started)
        return {"ended": True, **usage, **_peak_memory(run)}
    except Exception as error:
        if disk_failure := storage_failure(error, run.folder):
            return {"failed": disk_failure, "storage": True}
        usage = usage_so_far(run.folder, time.perf_counter() - started)
        with suppress(OSError):
            run.folder.mkdir(parents=True, exist_ok=True)
            (run.folder / "error.txt").write_text(traceback.format_exc())
        reason = str(error) if isinstance(error, AmlpError) else f"{type(error).__name__}: {error}"
        return {"failed": " ".join(reason.split())[:500], **usage}


def _report_earlier_rungs(run: RunSpec, should_stop: Callable[[], bool]) -> RunSpec:
    """Report rungs of an earlier driver, which may have died before it stored them.

    Returns:
        The run, ending where it is if the trial should have returned at one of these rungs. One
        rung more would give another result than an undisturbed trial has.
    """
    rows = own_rows(read_metrics(run.folder))
    for row in rows:
        if "dsc" in row:
            _report_rung(run.folder, row)
            if should_stop():
                return run.model_copy(update={"until": rows[-1]["epoch"]})
    return run


def usage_so_far(folder: Path, elapsed: float) -> dict[str, Any]:
    """Return epochs, seconds, speed and last scores of a trial.

    They come from the trial's own metrics, so that epochs before a restart count too.

    Args:
        folder: of the trial.
        elapsed: seconds to return if nothing was trained.
    """
    rows = own_rows(read_metrics(folder))
    scored = next((row for row in reversed(rows) if "dsc" in row), {})
    usage: dict[str, Any] = {"epochs": 0, "seconds": elapsed}
    measured = [row for row in rows if "seconds" in row and "images_per_second" in row]
    if measured:
        seconds = sum(row["seconds"] + row.get("evaluate_seconds", 0.0) for row in measured)
        speed = sum(row["images_per_second"] for row in measured) / len(measured)
        usage = {
            "epochs": len(rows),
            "seconds": seconds,
            "images_per_second": round(speed, 1),
        }
    scores = {name: scored[name] for name in SCORES if scored.get(name) is not None}
    return usage | scores


def should_return(stop_flags: Any, run: RunSpec) -> bool:
    """Return whether the searcher asked this trial to return by now."""
    import ray

    when = ray.get(stop_flags.requested.remote(str(run.folder)))
    if when == "rung":
        rows = read_metrics(run.folder)
        return bool(rows) and rows[-1]["epoch"] in run.rungs
    return when == "now"


def _mark_started(stop_flags: Any, run: RunSpec) -> None:
    """Tell the driver that the trial has its resources."""
    import ray

    ray.get(stop_flags.mark_started.remote(str(run.folder)))


def _is_in_this_process(run: RunSpec) -> bool:
    """Return whether the trial's own process trains, and no group of others."""
    return run.resources.is_single_worker or run.config.objective == "none"


def _train(run: RunSpec, should_stop: Callable[[], bool], mark_started: Callable[[], None]) -> None:
    if _is_in_this_process(run):
        _run_in_this_process(run, should_stop)
    else:
        _run_in_group(run, should_stop, mark_started)


def _run_in_this_process(run: RunSpec, should_stop: Callable[[], bool]) -> None:
    """Train one worker in this process, which costs nothing.

    `tune.report` returns after the searcher has decided about the trial.
    """
    from amlp_ray.launch.launcher import run_here
    from amlp_ray.runtime.dashboard_metrics import TrialGauges
    from amlp_ray.training.pretrain import Hooks, Metrics

    limit_gpu_memory(run.resources.gpus_per_worker)
    with closing(TrialGauges(run.study, run.label)) as gauges:

        def report(metrics: Metrics) -> None:
            gauges.update(metrics)
            _report_rung(run.folder, metrics)

        run_here(run, Hooks(report=report, should_stop=should_stop))


def _run_in_group(
    run: RunSpec, should_stop: Callable[[], bool], mark_started: Callable[[], None]
) -> None:
    """Train several workers in an inner Ray Train group, which costs about 10 s to start.

    The first worker may ask for stop requests before the searcher has decided, so a pruned trial
    returns an epoch or more later.
    """
    from amlp_ray.launch.launcher import run_on_ray

    name = f"{run.study}-{run.label.replace(' ', '-')}"
    report = partial(_report_rung, run.folder)
    run_on_ray(run, name=name, should_stop=should_stop, report=report, on_start=mark_started)


def _report_rung(folder: Path, metrics: dict[str, Any]) -> None:
    """Report an epoch and what the trial has taken to Tune if the probe scored it."""
    from ray import tune

    if "dsc" in metrics:
        usage = usage_so_far(folder, 0.0)
        result = {key: metrics[key] for key in REPORTED if metrics.get(key) is not None}
        tune.report(result | {"seconds": usage["seconds"], "epochs": usage["epochs"]})


def _is_fully_trained(run: RunSpec) -> bool:
    """Return whether the run was trained to its end; a paused one is fine-tuned later."""
    if run.config.objective == "none":
        return True
    rows = read_metrics(run.folder)
    return bool(rows) and rows[-1]["epoch"] >= run.config.epochs


def _finetune(run: RunSpec, config: SegmentConfig) -> None:
    """Run the second protocol of a confirmation, after its training."""
    from amlp_ray.data.dataset import PatchDataset
    from amlp_ray.evaluation.confirmation_run import finish_confirmation_run

    assert run.probe is not None
    dataset = PatchDataset.open(run.eval_data or run.data)
    sizes = run.probe.sizes
    finish_confirmation_run(run.folder, dataset, config, sizes=sizes, device=_device(run))


def _device(run: RunSpec) -> str:
    import torch

    return "cuda" if run.gpus and torch.cuda.is_available() else "cpu"


def limit_gpu_memory(share: float) -> None:
    """Limit a trial that has a part of a GPU to that part of its memory.

    A trial that needs more fails then, and not its neighbor.
    """
    import torch

    if 0 < share < 1 and torch.cuda.is_available():
        torch.cuda.set_per_process_memory_fraction(share)


def reset_peak_memory() -> None:
    """Start measuring peak memory anew: Tune runs trial after trial in one process."""
    import torch

    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def _peak_memory(run: RunSpec) -> dict[str, float]:
    """Return peak memory in GB of this process or its GPU; of a group nothing is known here."""
    from amlp_ray.training.loggers.flops import peak_memory

    if not run.resources.is_single_worker:
        return {}
    return {"memory": round(peak_memory(_device(run)), 3)}
