"""Measure what the platform itself costs: in simulated time, against bare Tune, of a `status`.

    python benchmarks/overhead.py --json overhead.json
    python benchmarks/overhead.py --parts simulated --trials 1000 --profile

README.md beside this file says what is compared and what was measured.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = (
    "1"  # before numpy: a second thread would take the other core from the trials
)

import argparse
import json
import logging
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import ray
from optuna.trial import TrialState
from overhead_simulated import IMAGES, SLOTS, Clock, Searcher, make_store, play, simulated

from amlp_ray.config import ResourceConfig
from amlp_ray.runtime.resources import worker_bundle
from amlp_ray.runtime.session import ray_session
from amlp_ray.study.execution.driver import run_on_tune
from amlp_ray.study.execution.study_log import log_events
from amlp_ray.study.execution.trial import should_return
from amlp_ray.study.execution.trial_queue import TrialQueue
from amlp_ray.study.trial_spec import TrialSpec


def main() -> None:
    options = _options()
    logging.disable(logging.WARNING)  # Tune's, of its own files
    result: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="amlp-overhead-", dir=options.folder) as name:
        folder = Path(name)
        if "simulated" in options.parts or "real" in options.parts:
            with ray_session():
                if "simulated" in options.parts:
                    result["simulated"] = [
                        simulated(folder, sampler, pruner, options)
                        for sampler in options.samplers
                        for pruner in options.pruners
                    ]
                if "real" in options.parts:
                    result["real"] = real(folder, options)
        if "status" in options.parts:
            result["status"] = status(folder, options)
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--parts",
        nargs="+",
        choices=("simulated", "real", "status"),
        default=["simulated", "real", "status"],
    )
    parser.add_argument("--trials", type=int, default=10_000, help="of the simulated study")
    parser.add_argument("--samplers", nargs="+", default=["random", "tpe"])
    parser.add_argument(
        "--pruners",
        nargs="+",
        default=["none", "median", "median-deaf"],
        help="-deaf: no trial stops early, whatever the pruner says",
    )
    parser.add_argument(
        "--ahead", type=int, default=SLOTS, help="suggestions of tpe made while trials run; 0: none"
    )
    parser.add_argument(
        "--clock",
        choices=("busy", "wall"),
        default="busy",
        help="busy: processor time, and waits for the disk and Ray",
    )
    parser.add_argument(
        "--profile", action="store_true", help="print where the simulated study's own time goes"
    )
    parser.add_argument(
        "--pieces", type=int, default=5, help="of the real study, taking turns with bare Tune"
    )
    parser.add_argument("--per-piece", type=int, default=100, help="real trials")
    parser.add_argument(
        "--stored", type=int, default=5000, help="trials of the study whose status is asked"
    )
    parser.add_argument("--folder", type=Path, help="of temporary files: its disk is measured")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    return parser.parse_args()


# Against bare Tune


def no_op(config: dict[str, Any]) -> dict[str, Any]:
    """Run a trial that trains nothing, but reads its spec and reports as `amlp_trial` does."""
    from ray import tune

    run = TrialSpec.model_validate(config["trial_spec"]).run
    ray.get(config["stop_flags"].mark_started.remote(str(run.folder)))
    for epoch in run.rungs:
        tune.report({"epoch": epoch, "epochs": epoch, "dsc": epoch / 10, "seconds": 0.0})
        should_return(config["stop_flags"], run)
    return {"ended": True, "epochs": run.rungs[-1], "seconds": 0.0, "dsc": run.rungs[-1] / 10}


def bare_no_op(config: dict[str, Any]) -> dict[str, Any]:
    """The same of plain Tune."""
    from ray import tune

    for epoch in (2, 4):
        tune.report({"epoch": epoch, "dsc": epoch / 10})
    return {"dsc": 0.4, "at": time.time()}


def real(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Run no-op trials on Ray, ours and plain Tune's in turns, by random search.

    Each piece begins and ends Tune's run and its processes, which a study does once. So the time
    between the ends of its first and its last trial is measured as well.
    """
    store, config = make_store(
        folder,
        "real",
        sampler={"name": "random"},
        pruner={"name": "none", "rungs": 2},
        baselines=[],
    )
    at_once = int(ray.cluster_resources()["CPU"])
    pieces: list[dict[str, float]] = []
    bare(folder, 2 * at_once, at_once)  # Ray's first processes
    with log_events(store.folder), store.lock() as lease:
        for piece in range(options.pieces):
            budget = config.budget.model_copy(update={"trials": (piece + 1) * options.per_piece})
            extended = config.model_copy(update={"budget": budget})
            started = time.perf_counter()
            run_on_tune(
                store,
                extended,
                lease,
                data="speckle",
                eval_data=None,
                images=IMAGES,
                side_by_side=at_once,
                trainable=no_op,
            )
            study_seconds = time.perf_counter() - started
            trials = store.search().get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
            ends = [t.datetime_complete.timestamp() for t in trials if t.datetime_complete][
                -options.per_piece :
            ]
            tune_seconds, their_ends = bare(folder, options.per_piece, at_once)
            between = {
                "study_between": max(ends) - min(ends),
                "tune_between": max(their_ends) - min(their_ends),
            }
            pieces.append({"study": study_seconds, "tune": tune_seconds, **between})
            print(
                f"real, piece {piece}: "
                + ", ".join(f"{k} {v:.1f} s" for k, v in pieces[-1].items()),
                flush=True,
            )
    assert len(trials) == options.pieces * options.per_piece
    rate = {name: len(trials) / sum(piece[name] for piece in pieces) for name in pieces[0]}
    ratio = statistics.median(piece["study"] / piece["tune"] for piece in pieces)
    between_ratio = statistics.median(
        piece["study_between"] / piece["tune_between"] for piece in pieces
    )
    print(
        f"real: {rate['study']:.2f} trials/s, plain Tune {rate['tune']:.2f}, "
        f"time {ratio:.3f} of Tune's (median of pieces); "
        f"without beginning and end {rate['study_between']:.2f} and {rate['tune_between']:.2f}, "
        f"{between_ratio:.3f}"
    )
    return {
        "trials": len(trials),
        "at_once": at_once,
        "pieces": pieces,
        "per_second": rate,
        "ratio": ratio,
        "between_ratio": between_ratio,
    }


def bare(folder: Path, trials: int, at_once: int) -> tuple[float, list[float]]:
    """Seconds of plain Tune for as many no-op trials, and when each ended."""
    from ray import tune

    resources = tune.PlacementGroupFactory([worker_bundle(ResourceConfig())])
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        results = tune.Tuner(
            tune.with_resources(bare_no_op, resources),
            param_space={"start": tune.uniform(0.15, 0.75), "end": tune.uniform(0.3, 0.85)},
            tune_config=tune.TuneConfig(
                num_samples=trials, max_concurrent_trials=at_once, reuse_actors=True
            ),
            run_config=tune.RunConfig(name="bare", storage_path=scratch, verbose=0),
        ).fit()
        ends = [result.metrics["at"] for result in results if result.metrics]
    return time.perf_counter() - started, ends


# Status


def status(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Time `amlp-ray study status` of a study as the simulated one writes it."""
    store, config = make_store(
        folder, "stored", sampler={"name": "random"}, pruner={"name": "none"},
        budget={"trials": options.stored},
    )  # fmt: skip
    with store.lock():
        queue = TrialQueue(store, config, data="speckle", eval_data=None, suggest_ahead=0)
        searcher = Searcher(
            store,
            config,
            queue,
            images=IMAGES,
            stop_flags=None,  # nobody is asked to stop
            seconds=lambda: 0.0,
        )
        play(searcher, Clock("busy"))
    command = [
        str(Path(sys.executable).with_name("amlp-ray")),
        "study",
        "status",
        "stored",
        "--runs",
        str(folder),
    ]
    seconds, cpu = [], []
    for _ in range(7):
        started, before = time.perf_counter(), os.times()
        subprocess.run(command, check=True, capture_output=True)
        after = os.times()
        seconds.append(time.perf_counter() - started)
        cpu.append(sum(after[2:4]) - sum(before[2:4]))  # of processes that ended
    journal = (store.folder / "study.journal").stat().st_size
    print(
        f"status of {options.stored} trials ({journal / 1e6:.1f} MB): "
        f"{statistics.median(seconds):.2f} s "
        f"({min(seconds):.2f} to {max(seconds):.2f}), processor {statistics.median(cpu):.2f} s"
    )
    return {"trials": options.stored, "bytes": journal, "seconds": seconds, "cpu_seconds": cpu}


if __name__ == "__main__":
    main()
