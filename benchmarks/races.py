"""Change a study from many processes at once, and count what is lost.

    python benchmarks/races.py                       # every pair of changes, a journal, 20 at once
    python benchmarks/races.py --storage sqlite postgresql --changes extend enqueue delete

Of each pair, half of the processes make the one change and half the other, all released by one
barrier. Afterwards what the study holds is compared with what the processes were told. The exit
code is 1 if a change is lost or doubled, half a study is left, or somebody gets anything but a
sentence.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import combinations_with_replacement
from pathlib import Path
from typing import Any

from optuna.distributions import FloatDistribution
from optuna.trial import TrialState, create_trial

from amlp_ray.config import StudyConfig
from amlp_ray.config.base import build
from amlp_ray.errors import AmlpError, StudyError
from amlp_ray.study.operations.change_space import Change, migrate
from amlp_ray.study.operations.edit import delete, enqueue, extend, retry
from amlp_ray.study.operations.repair import repair
from amlp_ray.study.operations.status import status
from amlp_ray.study.operations.transfer import import_trials
from amlp_ray.study.storage.study_store import StudyStore
from amlp_ray.study.storage.trial_record import trial_records

NAME = "races"
TRIALS = 10  # of the budget at the start
IMPORTED = 3  # rows of the file that is imported
ANSWER_S = 60.0
VALUES: dict[str, Any] = {
    "name": NAME,
    "data": "data",
    "space": {"ratio.start": {"low": 0.2, "high": 0.5}},
    "budget": {"trials": TRIALS},
    "baselines": [],
}


def _space(low: float) -> StudyConfig:
    return build(StudyConfig, {**VALUES, "space": {"ratio.start": {"low": low, "high": 0.6}}}, "")


def _change_space(store: StudyStore, index: int) -> str:
    return migrate(store, _space(0.1 + index / 1000), Change()).version


def _import(store: StudyStore, index: int) -> list[int]:
    return import_trials(store, store.config(), store.folder.parent / "prior.csv").taken


def _run(store: StudyStore, index: int) -> None:
    """Hold the study as a driver does."""
    with store.lock():
        time.sleep(0.02)


def _request(store: StudyStore, index: int) -> str:
    """Ask the driver for something and wait for its answer."""
    request_id = store.request("stop" if index % 2 else "pause")
    if request_id is None:
        raise StudyError("nobody runs the study")
    deadline = time.monotonic() + ANSWER_S
    while not store.is_answered(request_id):
        if time.monotonic() > deadline:
            raise RuntimeError("a request was never answered")
        time.sleep(0.05)
    return request_id


CHANGES: dict[str, Callable[[StudyStore, int], Any]] = {
    "extend": lambda store, index: extend(store, trials="+1").trials,
    "enqueue": lambda store, index: enqueue(store, store.config(), {"ratio.start": 0.3}),
    "retry": lambda store, index: retry(store, store.config(), 0),
    "import": _import,
    "space": _change_space,
    "run": _run,
    "repair": lambda store, index: len(repair(store).restored),
    "delete": lambda store, index: delete(store),
    "request": _request,
}


@dataclass
class Outcome:
    """What one process was told."""

    change: str
    value: Any = None
    refusal: str = ""  # a sentence
    crash: str = ""  # anything else


@dataclass
class Race:
    """One pair of changes, and what is wrong afterwards."""

    pair: tuple[str, str]
    outcomes: list[Outcome]
    seconds: float
    problems: list[str] = field(default_factory=list)

    def done(self, change: str) -> list[Any]:
        """Return what each process was told whose change was made."""
        return [
            outcome.value
            for outcome in self.outcomes
            if outcome.change == change and not (outcome.refusal or outcome.crash)
        ]


def make_study(runs: Path, storage: str | None) -> StudyStore:
    """Create a study with one complete trial, and a file to import."""
    config = build(StudyConfig, {**VALUES, "storage": storage}, "races")
    runs.mkdir(parents=True, exist_ok=True)
    rows = [f"0.{30 + index},0.{50 + index}" for index in range(IMPORTED)]
    (runs / "prior.csv").write_text("\n".join(["ratio.start,dsc", *rows]) + "\n")
    store = StudyStore(runs / NAME)
    with store.transaction(config):
        trial = create_trial(
            state=TrialState.COMPLETE,
            values=[0.5],
            params={"ratio.start": 0.25},
            distributions={"ratio.start": FloatDistribution(0.2, 0.5)},
        )
        store.add_trial(store.search(create=True), trial)
    return store


def race(pair: tuple[str, str], runs: Path, processes: int) -> Race:
    """Let half of the processes make one change of the pair and half the other, at once."""
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(processes + 1)
    queue: Any = context.Queue()
    workers = []
    for index in range(processes):
        arguments = (pair[index % 2], runs, index, barrier, queue)
        workers.append(context.Process(target=_change, args=arguments, daemon=True))
    with ExitStack() as stack:
        if "request" in pair:
            stack.enter_context(_Driver(context, runs))
        for worker in workers:
            worker.start()
        barrier.wait()
        started = time.monotonic()
        outcomes = [queue.get(timeout=600) for _ in workers]
        seconds = time.monotonic() - started
        for worker in workers:
            worker.join()
    return Race(pair, outcomes, seconds)


def _change(change: str, runs: Path, index: int, barrier: Any, queue: Any) -> None:
    outcome = Outcome(change)
    try:
        store = StudyStore.open(runs / NAME)
        barrier.wait()
        outcome.value = CHANGES[change](store, index)
    except AmlpError as error:
        outcome.refusal = str(error)
    except BaseException:
        outcome.crash = traceback.format_exc()
    queue.put(outcome)


class _Driver:
    """A process that runs the study and answers requests."""

    def __init__(self, context: Any, runs: Path) -> None:
        self._over = context.Event()
        self._begun = context.Event()
        self._process = context.Process(target=self._drive, args=(runs,), daemon=True)

    def __enter__(self) -> None:
        self._process.start()
        self._begun.wait()

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._process.join()

    def _drive(self, runs: Path) -> None:
        store = StudyStore.open(runs / NAME)
        with store.lock():
            self._begun.set()
            while not self._over.wait(0.05):
                store.answer_requests(lambda request: None)


def judge(result: Race, runs: Path) -> None:
    """Compare what the study holds with what the processes were told."""
    for outcome in result.outcomes:
        if outcome.crash:
            result.problems.append(outcome.crash.strip().splitlines()[-1])
    folder = runs / NAME
    if result.done("delete"):
        if folder.exists():
            result.problems.append(
                f"deleted, and left {sorted(path.name for path in folder.iterdir())}"
            )
        return
    store = StudyStore.open(folder)
    status(store)
    records = trial_records(store.search())
    budget = store.config().budget.trials
    expected = {
        "budget": (budget, TRIALS + len(result.done("extend"))),
        "budget as stored": (
            (store.search().user_attrs.get("budget") or {"trials": TRIALS})["trials"],
            TRIALS + len(result.done("extend")),
        ),
        "enqueued": (
            sum(record.is_enqueued and record.retry_of is None for record in records),
            len(result.done("enqueue")),
        ),
        "retries": (
            sum(record.retry_of is not None for record in records),
            len(result.done("retry")),
        ),
        "imported": (
            sum(record.is_imported for record in records),
            IMPORTED if result.done("import") else 0,
        ),
        "complete": (sum(r.is_complete and not r.is_imported for r in records), 1),
    }
    for name, (found, wanted) in expected.items():
        if found != wanted:
            result.problems.append(f"{name}: {found} instead of {wanted}")
    _judge_answers(result)


def _judge_answers(result: Race) -> None:
    numbers = Counter(result.done("enqueue") + result.done("retry"))
    numbers += Counter(number for taken in result.done("import") for number in taken)
    doubled = [number for number, count in numbers.items() if count > 1]
    if doubled:
        result.problems.append(f"numbers were given twice: {doubled}")
    if len(set(result.done("space"))) < len(result.done("space")):
        result.problems.append("two spaces have one version")
    # Only what needs the study for itself may be refused.
    exclusive = {"run", "space", "delete", "repair"}
    may_refuse = exclusive if not {"delete", "request"} & set(result.pair) else set(CHANGES)
    for outcome in result.outcomes:
        if outcome.refusal and outcome.change not in may_refuse:
            result.problems.append(f"{outcome.change} was refused: {outcome.refusal}")


def main() -> int:
    """Run all races and print a table."""
    options = _options()
    failed = 0
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="amlp-races-")))
        for storage in options.storage:
            url = _url(storage, scratch, stack)
            for pair in combinations_with_replacement(options.changes, 2):
                failed += _race_and_print(pair, storage, url, scratch, options.processes)
    print(f"{failed} of the races lost something" if failed else "nothing was lost")
    return int(failed > 0)


def _race_and_print(
    pair: tuple[str, str], storage: str, url: str | None, scratch: Path, processes: int
) -> bool:
    runs = scratch / f"{storage}-{'-'.join(pair)}"
    if url is not None:
        runs = scratch / storage
    store = make_study(runs, url)
    result = race(pair, runs, processes)
    try:
        judge(result, runs)
    except AmlpError as error:
        result.problems.append(f"the study cannot be read: {error}")
    told = {}
    for change in dict.fromkeys(pair):
        count = sum(outcome.change == change for outcome in result.outcomes)
        told[change] = f"{len(result.done(change))} of {count}"
    verdict = "; ".join(dict.fromkeys(result.problems)) or "ok"
    counts = json.dumps(told)
    name = " + ".join(pair)
    print(f"{storage:11}{name:20}{counts:48}{result.seconds:6.1f} s  {verdict}", flush=True)
    if store.folder.exists() and not result.problems:
        delete(StudyStore.open(store.folder))
    return bool(result.problems)


def _url(storage: str, scratch: Path, stack: ExitStack) -> str | None:
    if storage == "journal":
        return None
    if storage == "sqlite":
        return f"sqlite:///{scratch}/races.db"
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    from helpers.database import Postgres

    folder = scratch / "server"
    folder.mkdir()
    scratch.chmod(0o755)
    os.environ["AMLP_TEST_PASSWORD"] = Postgres.password
    server = Postgres(folder)
    stack.callback(server.close)
    return server.url


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    kinds = ["journal", "sqlite", "postgresql"]
    parser.add_argument("--storage", nargs="+", choices=kinds, default=["journal"])
    parser.add_argument("--changes", nargs="+", choices=CHANGES, default=list(CHANGES))
    parser.add_argument("--processes", type=int, default=20, help="at once, of each pair")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
