"""Run a study of stub trials in simulated time.

Everything of ours is real but the driver; Tune's loop is played.
"""

from __future__ import annotations

import argparse
import cProfile
import heapq
import itertools
import math
import os
import pstats
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray
from numpy.typing import NDArray
from optuna.trial import TrialState

from amlp_ray.config import StudyConfig
from amlp_ray.config.base import build
from amlp_ray.config.yaml_file import write_yaml
from amlp_ray.study.execution.active_trial import ActiveTrial
from amlp_ray.study.execution.stop_flags import StopFlags, StopWhen
from amlp_ray.study.execution.study_log import log_events
from amlp_ray.study.execution.trial_queue import TrialQueue
from amlp_ray.study.execution.tune_searcher import StudySearcher
from amlp_ray.study.storage.study_store import StudyStore

FloatArray = NDArray[np.floating[Any]]

TRIAL_S, RUNGS, SLOTS = (
    1.0,
    4,
    16,
)  # those of Ray's own figure: 10,000 trials of a second in 715 s, of which 625 s are work
LOOK_S = 0.1  # that Tune waits for a result before it asks its searcher again
IMAGES = 320
SPACE = {
    "selection.mode": {"choices": ["hard", "soft"]},
    "selection.strength": {"low": 0.3, "high": 2.0, "when": {"selection.mode": "soft"}},
    "ratio.start": {"low": 0.15, "high": 0.75},
    "ratio.end": {"low": 0.3, "high": 0.85},
    "ratio.shape": {"choices": ["linear", "cosine", "power"]},
    "ratio.power": {"low": 0.5, "high": 3.0, "log": True, "when": {"ratio.shape": "power"}},
}  # of studies/masking_ratio.yaml


def make_store(folder: Path, name: str, **changes: Any) -> tuple[StudyStore, StudyConfig]:
    """A study as `study run` makes it, before its first trial."""
    values: dict[str, Any] = {
        "name": name,
        "pretrain": {"epochs": RUNGS},
        "space": SPACE,
        "data": "speckle",
    }
    config = build(StudyConfig, values | changes, name)
    store = StudyStore(folder / name)
    store.folder.mkdir(parents=True)
    write_yaml(config, store.folder / "study.yaml")
    return store, config


def stub_score(trial_spec: dict[str, Any], epoch: int) -> float:
    """A score that depends on the settings, rises by epoch, and has noise."""
    ratio = trial_spec["run"]["config"]["ratio"]
    good = 0.6 - abs(ratio["start"] - 0.3) - 0.5 * abs(ratio["end"] - 0.6)
    noise = random.Random(f"{trial_spec['run']['label']} {epoch}").gauss(0.0, 0.03)
    return max(0.0, good * (1 - math.exp(-2 * epoch / RUNGS)) + noise)


class Clock:
    """Simulated seconds: those that stub trials take, and on top those that our own calls take.

    A call is counted by the clock on the wall, or (`busy`) by processor time and its waits for the
    disk and for Ray, so that other jobs of the machine count less. Both are kept in `spent`.
    """

    def __init__(self, kind: str) -> None:
        self.now, self.longest = 0.0, 0.0
        self.spent: dict[str, FloatArray] = {}  # (busy, wall) by name of our method
        self.calls: Counter[str] = Counter()
        self._kind = ("busy", "wall").index(kind)
        self._waited = 0.0
        self._beside = np.zeros(2)

    def call(self, method: Callable[..., Any], *args: Any) -> Any:
        """Call one of ours from Tune's loop, which is one thread and waits meanwhile."""
        before = self._read()
        answer = method(*args)
        took = self._read() - before
        self.spent[method.__name__] = self.spent.get(method.__name__, 0.0) + took
        self.calls[method.__name__] += 1
        self.now += took[self._kind]
        self.longest = max(self.longest, took[self._kind])
        return answer

    def beside(self, work: Callable[..., Any], *args: Any) -> tuple[Any, float]:
        """Return what work in another thread gives, and its seconds.

        They do not count for the call in which the work is done.
        """
        before = self._read()
        answer = work(*args)
        took = self._read() - before
        self._beside += took
        return answer, took[self._kind]

    def _read(self) -> FloatArray:
        return np.array([time.thread_time() + self._waited, time.perf_counter()]) - self._beside

    @contextmanager
    def counting_waits(self) -> Iterator[None]:
        """Count as busy what waits for the disk or for Ray, since that time is lost to us too."""

        def counted(function: Callable[..., Any]) -> Callable[..., Any]:
            def call(*args: Any, **named: Any) -> Any:
                idle = time.perf_counter() - time.thread_time()
                try:
                    return function(*args, **named)
                finally:
                    self._waited += time.perf_counter() - time.thread_time() - idle

            return call

        sync, get = os.fsync, ray.get
        os.fsync, ray.get = counted(sync), counted(get)
        try:
            yield
        finally:
            os.fsync, ray.get = sync, get


class Beside:
    """Stand in for the thread that makes suggestions, one at a time, each after its own time."""

    def __init__(self, clock: Clock) -> None:
        self._clock, self._free = clock, 0.0

    def submit(self, work: Callable[..., Any], *args: Any) -> Made:
        answer, took = self._clock.beside(work, *args)
        self._free = max(self._free, self._clock.now) + took
        return Made(self._clock, answer, self._free)

    def shutdown(self, **named: Any) -> None:
        """Nothing to end."""


@dataclass
class Made:
    """A suggestion that is made while trials run."""

    clock: Clock
    answer: Any
    at: float

    def done(self) -> bool:
        return self.clock.now >= self.at

    def result(self) -> Any:
        self.clock.now = max(self.clock.now, self.at)
        return self.answer


class Searcher(StudySearcher):
    """A study searcher that remembers which trials it asked to return: stubs read no flags."""

    def __init__(self, *args: Any, **named: Any) -> None:
        super().__init__(*args, **named)
        self.asked: set[str] = set()

    def _ask_to_return(self, active: ActiveTrial, when: StopWhen) -> None:
        super()._ask_to_return(active, when)
        self.asked.add(str(active.run.folder))


@dataclass
class Stub:
    """A trial that trains for a second in all, scored after each quarter of it."""

    key: str  # Tune's
    trial_spec: dict[str, Any]
    epoch: int = 0
    ended: bool = False


def simulated(
    folder: Path, sampler: str, pruner: str, options: argparse.Namespace
) -> dict[str, Any]:
    """Run a study of stub trials with everything of ours but the driver; Tune's loop is played."""
    ahead = 0 if sampler == "random" else options.ahead
    store, config = make_store(
        folder,
        f"{sampler}-{pruner}",
        sampler={"name": sampler, "suggest_ahead": ahead},
        pruner={"name": pruner.removesuffix("-deaf"), "rungs": RUNGS, "min_steps": 0},
        budget={"trials": options.trials},
    )
    clock, stop_flags = Clock(options.clock), ray.remote(StopFlags).options(num_cpus=0).remote()
    log = log_events(store.folder)
    with log, store.lock(), clock.counting_waits(), _profiled(options.profile):
        queue = TrialQueue(store, config, data="speckle", eval_data=None, suggest_ahead=ahead)
        queue.close()
        queue._sampler_thread = Beside(clock)  # type: ignore[assignment]
        seconds = lambda: clock.now  # noqa: E731
        searcher = Searcher(
            store, config, queue, images=IMAGES, stop_flags=stop_flags, seconds=seconds
        )
        started = time.perf_counter()
        epochs = play(searcher, clock, deaf=pruner.endswith("-deaf"))
    ray.kill(stop_flags)
    trials = store.search().get_trials(deepcopy=False)
    assert [t.state.is_finished() for t in trials] == [True] * options.trials
    floor = epochs * TRIAL_S / RUNGS / SLOTS
    names = {name: clock.spent[name] / clock.calls[name] * 1000 for name in clock.spent}
    stats = {
        "sampler": sampler,
        "pruner": pruner,
        "suggest_ahead": ahead,
        "trials": len(trials),
        "pruned": sum(t.state == TrialState.PRUNED for t in trials),
        "floor": floor,
        "total": clock.now,
        "share": 1 - floor / clock.now,
        "longest": clock.longest,
        "busy_ms": sum(clock.spent.values())[0] / len(trials) * 1000,  # type: ignore[index]
        "wall_ms": sum(clock.spent.values())[1] / len(trials) * 1000,  # type: ignore[index]
        "calls_ms": {name: round(float(took[clock._kind]), 3) for name, took in names.items()},
        "took": time.perf_counter() - started,
    }
    print(
        f"simulated, {sampler}, {pruner}: {stats['total']:.0f} s for a floor of {floor:.0f} s, "
        f"platform {stats['share']:.1%}. A trial of ours: {stats['busy_ms']:.1f} ms busy, "
        f"{stats['wall_ms']:.1f} ms on the wall; longest call {clock.longest * 1000:.0f} ms; "
        f"{stats['pruned']} pruned; {stats['calls_ms']}",
        flush=True,
    )
    return stats


def play(searcher: Searcher, clock: Clock, *, deaf: bool = False) -> int:
    """Call a searcher as Tune's loop does and return the epochs that trials trained.

    If a slot is free a trial is asked for; then one result is passed on. A trial goes on when its
    result was handled, and stops early where it is asked to and is not deaf.
    """
    results: list[tuple[float, int, Stub]] = []
    order, slots, epochs, over = itertools.count(), SLOTS, 0, False

    def train(stub: Stub) -> None:
        heapq.heappush(results, (clock.now + TRIAL_S / RUNGS, next(order), stub))

    while results or not over:
        if slots and not over:
            key = f"{next(order):08x}"
            config = clock.call(searcher.suggest, key)
            if config == Searcher.FINISHED:
                over = True
            elif config is not None:
                slots -= 1
                train(Stub(key, config["trial_spec"]))
        if not results or (slots and not over and results[0][0] > clock.now + LOOK_S):
            clock.now += LOOK_S * (not over)
            continue
        at, _, stub = heapq.heappop(results)
        clock.now = max(clock.now, at)
        if stub.ended:
            result = {"ended": True, "epochs": stub.epoch, "seconds": TRIAL_S * stub.epoch / RUNGS}
            result["dsc"] = stub_score(stub.trial_spec, stub.epoch)
            clock.call(searcher.on_trial_result, stub.key, result)
            clock.call(searcher.on_trial_complete, stub.key, result)
            slots += 1
            continue
        stub.epoch, epochs = stub.epoch + 1, epochs + 1
        score = stub_score(stub.trial_spec, stub.epoch)
        summary = {
            "epoch": stub.epoch,
            "epochs": stub.epoch,
            "seconds": TRIAL_S * stub.epoch / RUNGS,
            "dsc": score,
        }
        clock.call(searcher.on_trial_result, stub.key, summary)
        stub.ended = stub.epoch == RUNGS or (
            stub.trial_spec["run"]["folder"] in searcher.asked and not deaf
        )
        if stub.ended:
            heapq.heappush(results, (clock.now, next(order), stub))
        else:
            train(stub)
    return epochs


@contextmanager
def _profiled(is_enabled: bool) -> Iterator[None]:
    if not is_enabled:
        yield
        return
    with cProfile.Profile() as profile:
        yield
    pstats.Stats(profile).sort_stats("tottime").print_stats(45).sort_stats("cumtime").print_stats(
        45
    )
