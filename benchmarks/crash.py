"""Kill a study's process at random moments, start it again, and compare with an undisturbed study.

    python benchmarks/crash.py                                   # 30 trials, 25 kills
    python benchmarks/crash.py --study pbt --kills 10
    python benchmarks/crash.py --storage postgresql --outage 30  # the server is gone for 30 s
    python benchmarks/crash.py --cluster                         # a Ray that outlives its drivers

Exits with 1 where anything is lost, doubled, left over or different. README.md beside this file
says what is checked.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ["RAY_AUTH_MODE"] = (
    "disabled"  # read when Ray is imported; the cluster below listens on this machine only
)
os.environ.setdefault("OMP_NUM_THREADS", "1")

import optuna
import psutil
import yaml
from optuna.trial import TrialState

from amlp_ray.study.storage.optuna_internals import JournalOperation
from amlp_ray.study.storage.study_store import StudyStore, read_metrics

KINDS = {"work": 9, "write": 8, "score": 5, "start": 3}  # how often a kill is of each, of 25
EPOCHS, RUNGS = 24, 6
WRITES = 3  # of a trial besides its scores: its beginning, what it took, its end
LIFE_S = 600.0  # a driver that does nothing for so long hangs
GONE_S = 30.0  # for processes of a dead driver to notice
TAG = "AMLP_CRASH_TEST"  # in the environment of all that we start

STUDY: dict[str, Any] = {
    "name": "crash",
    "seed": 3,
    "pretrain": {
        "epochs": EPOCHS,
        "batch_size": 12,
        "model": {"width": 24, "depth": 1, "heads": 2, "decoder_width": 16, "decoder_heads": 2},
    },
    "space": {
        "ratio.start": {"low": 0.2, "high": 0.5},
        "lr": {"low": 1e-4, "high": 3e-3, "log": True},
        "selection.mode": {"choices": ["hard", "soft"]},
    },
    "probe": {"num_labeled": 12, "subsets": 2, "folds": 2},
    "pruner": {"name": "median", "rungs": RUNGS, "min_steps": 0},
    "baselines": ["mae"],
    "baseline_seeds": 1,
}
PBT: dict[str, Any] = {
    "space": {"ratio.points": {"low": 0.2, "high": 0.7}},
    "sampler": {"name": "pbt", "interval": EPOCHS // RUNGS},
    "pruner": {"name": "none"},
}


def main() -> int:
    options = _options()
    if options.dying:
        return die_while_writing(*options.dying)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="amlp-crash-")))
        testbed = Testbed(folder, options.data or make_data(folder), tag=uuid.uuid4().hex)
        stack.callback(testbed.end_all)
        if options.storage == "postgresql":
            testbed.server = stack.enter_context(database(folder))
        if options.cluster:
            testbed.address = stack.enter_context(cluster())
        quiet = left_alone(testbed, options)
        killed = with_kills(testbed, options, quiet)
        faults = [*faults_of(killed, options), *left_over(testbed)]
        if options.concurrency == 1:
            faults += differences(quiet, killed)
        if len(killed.kills) < options.kills:
            faults.append(f"the study ended after {len(killed.kills)} of {options.kills} kills")
        print_result(quiet, killed, faults, options)
        if options.json:
            options.json.write_text(
                json.dumps({"kills": killed.kills, "fault_tolerance": faults}, indent=1) + "\n"
            )
    return 1 if faults else 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=25)
    parser.add_argument("--trials", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0, help="of the moments; the study has its own")
    parser.add_argument(
        "--concurrency",
        type=int,
        default=1,
        help="above 1 nothing is compared with a study left alone",
    )
    parser.add_argument(
        "--study", choices=["tpe", "pbt"], default="tpe", help="pbt: --trials is members x 6"
    )
    parser.add_argument(
        "--storage",
        choices=["journal", "postgresql"],
        default="journal",
        help="a server of our own",
    )
    parser.add_argument(
        "--outage", type=float, default=0, help="seconds that the server is gone, once, half-way"
    )
    parser.add_argument(
        "--cluster", action="store_true", help="drivers join one Ray instead of starting their own"
    )
    parser.add_argument(
        "--data", type=Path, help="prepared patch dataset; none: 60 phantoms of 64 x 64 are made"
    )
    parser.add_argument("--json", type=Path, help="write kills and faults to this file")
    parser.add_argument("--dying", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.outage and options.storage == "journal":
        parser.error("--outage needs --storage postgresql")
    return options


# Where studies are run


@dataclass
class Testbed:
    """A folder, data, and what serves the studies in it."""

    folder: Path
    data: Path
    tag: str
    server: Any = None
    address: str | None = None

    def write_study(self, options: argparse.Namespace, name: str) -> Path:
        values = STUDY | (PBT if options.study == "pbt" else {})
        values |= {
            "name": name,
            "budget": {"trials": options.trials},
            "resources": {"concurrency": options.concurrency},
        }
        if options.study == "pbt":
            values["sampler"] = PBT["sampler"] | {"population_size": options.trials // RUNGS}
        if self.server is not None:
            values["storage"] = self.server.url
        file = self.folder / f"{name}.yaml"
        file.write_text(yaml.safe_dump(values))
        return file

    def start(self, study: Path, dying: int | None = None) -> subprocess.Popen[bytes]:
        """Start a driver in a session of its own.

        Args:
            dying: number of the write to the store in which it kills itself.
        """
        through = ["-m", "amlp_ray"] if dying is None else [__file__, "--dying", str(dying)]
        command = [sys.executable, *through, "study", "run", str(study), "--data", str(self.data)]
        command += ["--runs", str(self.folder / "runs")]
        if self.address:
            command += ["--address", self.address]
        with (self.folder / "output.log").open("ab") as log:
            environment = os.environ | {TAG: self.tag}
            return subprocess.Popen(
                command, stdout=log, stderr=log, env=environment, start_new_session=True
            )

    def end_all(self) -> None:
        for process in self.processes():
            process.kill()

    def processes(self) -> list[psutil.Process]:
        """All that descends from our drivers, whoever its parent is by now."""
        matches = []
        for process in psutil.process_iter():
            try:
                if (
                    process.environ().get(TAG) == self.tag
                    and process.status() != psutil.STATUS_ZOMBIE
                ):
                    matches.append(process)
            except psutil.Error:
                continue
        return matches


def make_data(folder: Path) -> Path:
    from amlp_ray.config import PrepareConfig
    from amlp_ray.data.phantoms import write_phantoms
    from amlp_ray.data.prepare.pipeline import prepare
    from amlp_ray.runtime.session import ray_session

    source = write_phantoms(folder / "source", kind="ultrasound", count=60, size=64)
    config = PrepareConfig(layout="paired", size=64, group_by="image", fractions=(0.6, 0.2, 0.2))
    with ray_session():
        prepare(source, folder / "dataset", config)
    return folder / "dataset"


def database(folder: Path) -> Any:
    """Return a context manager around a PostgreSQL server that may be stopped."""
    from contextlib import contextmanager

    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    from helpers.database import Postgres  # the one of the tests

    @contextmanager
    def served() -> Iterator[Any]:
        os.environ["AMLP_TEST_PASSWORD"] = Postgres.password
        folder.chmod(0o755)
        server_folder = folder / "server"
        server_folder.mkdir()
        server = Postgres(server_folder)
        try:
            yield server
        finally:
            server.stop()

    return served()


def cluster() -> Any:
    from contextlib import contextmanager

    @contextmanager
    def joined() -> Iterator[str]:
        import ray

        ray.init(address="local", num_cpus=2, include_dashboard=True, log_to_driver=False)
        try:
            yield ray.get_runtime_context().gcs_address
        finally:
            ray.shutdown()

    return joined()


# A driver's lives


@dataclass
class Run:
    """A study and the lives that its driver had."""

    store: StudyStore
    start_s: float = 0.0  # of its first life, until the first trial's first epoch
    trial_s: float = 0.0  # between ends of trials of its first life
    trial_scores: float = 0.0  # of a trial, at its rungs
    kills: list[dict[str, Any]] = field(default_factory=list)

    def events(self) -> list[str]:
        """Lines of events.log without their times."""
        log = self.store.folder / "events.log"
        return (
            [line.partition(" ")[2] for line in log.read_text().splitlines()]
            if log.is_file()
            else []
        )

    def ended(self) -> int:
        return sum(self.ends().values())

    def ends(self) -> Counter[str]:
        """How often the end of each trial of the search was told, by its label."""
        lines = [line.split() for line in self.events() if line.startswith("trial ")]
        words = ("complete", "pruned", "failed", "ends")
        return Counter(
            f"trial {parts[1]}"
            for parts in lines
            if len(parts) > 2 and parts[2].rstrip(":") in words
        )

    def scores(self) -> int:
        return sum(" epoch " in line and ":" in line for line in self.events())

    def trained(self) -> float:
        """When an epoch ended last, by the clock of the file system."""
        return max(
            (p.stat().st_mtime for p in self.store.folder.glob("*/*/metrics.jsonl")), default=0.0
        )


def left_alone(testbed: Testbed, options: argparse.Namespace) -> Run:
    run = Run(StudyStore(testbed.folder / "runs" / "alone", "alone"))
    process, began = testbed.start(testbed.write_study(options, "alone")), time.time()
    while not run.trained() and process.poll() is None:
        time.sleep(0.05)
    run.start_s = time.time() - began
    first_epoch = time.time()
    if process.wait() != 0:
        raise SystemExit((testbed.folder / "output.log").read_text())
    run.trial_s = (time.time() - first_epoch) / (options.trials + 1)
    run.trial_scores = run.scores() / (options.trials + 1)
    print(
        f"left alone: first epoch after {run.start_s:.1f} s, {run.trial_s:.1f} s a trial",
        flush=True,
    )
    return run


def with_kills(testbed: Testbed, options: argparse.Namespace, quiet: Run) -> Run:
    """Run the study through all kills, and one life more."""
    draw = random.Random(options.seed)
    run = Run(StudyStore(testbed.folder / "runs" / "killed", "killed"))
    study = testbed.write_study(options, "killed")
    kinds = draw.choices(list(KINDS), list(KINDS.values()), k=options.kills)
    print("\n| kill | moment | trials ended | seconds lived |\n|---|---|---|---|", flush=True)
    outage = options.outage
    for number, kind in enumerate(kinds, 1):
        left = options.trials - run.ended()
        share = min(
            2 * left / (options.kills - number + 1), 0.8 * left
        )  # trials that this life may live through
        moment = draw.random()
        writes = (
            1 + int(moment * (6 + share * (quiet.trial_scores + WRITES)))
            if kind == "write"
            else None
        )
        began = time.time()
        process = testbed.start(study, dying=writes)
        if outage and run.ended() >= options.trials / 2:
            take_away(testbed, run, process, outage)
            outage = 0
        what = live(run, process, kind, moment, share, began, quiet)
        if process.poll() is None:
            os.kill(process.pid, signal.SIGKILL)
        if (code := process.wait()) == 0:
            break
        if code != -signal.SIGKILL:
            raise SystemExit(
                f"a driver ended with {code}:\n"
                + (testbed.folder / "output.log").read_text()[-3000:]
            )
        run.kills.append(
            {"kind": kind, "moment": what, "ended": run.ended(), "seconds": time.time() - began}
        )
        print(f"| {number} | {what} | {run.ended()} | {time.time() - began:.1f} |", flush=True)
    process = testbed.start(study)
    if process.wait(LIFE_S) != 0:
        raise SystemExit((testbed.folder / "output.log").read_text()[-3000:])
    return run


def live(
    run: Run,
    process: subprocess.Popen[bytes],
    kind: str,
    moment: float,
    share: float,
    began: float,
    quiet: Run,
) -> str:
    """Wait until it is time to kill, or the process has ended. Returns what moment that is.

    Args: moment: drawn from 0-1. share: trials that this life may live through.
    """
    if kind == "write":
        process.wait(LIFE_S)
        return "within a write to the store"
    if kind == "start":
        seconds = moment * quiet.start_s
        wait(process, lambda: time.time() - began > seconds)
        return f"{seconds:.1f} s after its start"
    if kind == "score":
        scores, more = run.scores(), 1 + int(moment * share * quiet.trial_scores)
        wait(process, lambda: run.scores() >= scores + more)
        return f"at its score {more}"
    wait(process, lambda: run.trained() > began)
    seconds, first = moment * share * quiet.trial_s, time.time()
    wait(process, lambda: time.time() - first > seconds)
    return f"{seconds:.1f} s after its first epoch"


def wait(process: subprocess.Popen[bytes], reached: Any) -> None:
    deadline = time.time() + LIFE_S
    while process.poll() is None and not reached():
        if time.time() > deadline:
            raise SystemExit(f"a driver did nothing for {LIFE_S:g} s")
        time.sleep(0.01)


def take_away(testbed: Testbed, run: Run, process: subprocess.Popen[bytes], seconds: float) -> None:
    """Stop the database while trials run, and start it again."""
    began = time.time()
    wait(process, lambda: run.trained() > began)
    testbed.server.stop()
    time.sleep(seconds)
    testbed.server.start()
    wait(process, lambda: "the study's storage is back" in run.events())
    print(f"|  | the database was gone for {seconds:g} s | {run.ended()} | |", flush=True)


def die_while_writing(number: str, *command: str) -> int:
    """Be a driver that is killed within its n-th write.

    In a journal half a line is written; in a database the write is done and not answered.
    """
    from amlp_ray.cli import main as command_line
    from amlp_ray.study.storage import optuna_storage as storage

    left = int(number)

    def last() -> bool:
        nonlocal left
        left -= 1
        return left == 0

    append, ask = storage.Journal.append_logs, storage.RetryingStorage.retry

    def append_half(self: Any, logs: list[dict[str, Any]]) -> None:
        if last():
            with self.lock(), self.path.open("ab") as file:
                file.write(json.dumps(logs[0])[: 5 + 7 * int(number)].encode())
                file.flush()
                os.fsync(file.fileno())
                os.kill(os.getpid(), signal.SIGKILL)
        append(self, logs)

    def ask_and_die(self: Any, name: str, *args: Any, **named: Any) -> Any:
        answer = ask(self, name, *args, **named)
        if (
            name.startswith(("create_", "set_"))
            and isinstance(self.inner, optuna.storages._CachedStorage)
            and last()
        ):
            os.kill(os.getpid(), signal.SIGKILL)
        return answer

    storage.Journal.append_logs = append_half  # type: ignore[method-assign]
    storage.RetryingStorage.retry = ask_and_die  # type: ignore[method-assign]
    sys.argv = ["amlp-ray", *command]
    command_line()
    return 0


# What must hold


def faults_of(run: Run, options: argparse.Namespace) -> Iterator[str]:
    trials, baselines = run.store.search().get_trials(), run.store.baselines().get_trials()
    if [t.number for t in trials] != list(range(options.trials)):
        yield f"budget: {len(trials)} trials of {options.trials}"
    for trial in [*trials, *baselines]:
        name = (
            f"baseline {trial.user_attrs['baseline']}"
            if "baseline" in trial.user_attrs
            else f"trial {trial.number}"
        )
        if not trial.state.is_finished():
            yield f"{name} is {trial.state.name}"
        if trial.state == TrialState.FAIL:
            yield f"{name} failed: {trial.user_attrs.get('reason')}"
        if "lost" in trial.user_attrs:
            yield f"{name} was counted as lost, though it was its driver that died"
    for label, count in run.ends().items():
        if count > 1:
            yield f"{label} was told to have ended {count} times"
    for trial_id, count in journal_ends(run.store.folder / "study.journal").items():
        if count != 1:
            yield f"stored trial {trial_id} ended {count} times in the journal"
    for trial in trials:
        epochs = [row["epoch"] for row in read_metrics(run.store.trial_folder(trial.number))]
        if epochs != list(range(1, len(epochs) + 1)):
            yield f"trial {trial.number} has the epochs {epochs}"
        if options.study == "tpe" and trial.state == TrialState.COMPLETE and len(epochs) != EPOCHS:
            yield f"trial {trial.number} is complete with {len(epochs)} epochs"


def journal_ends(journal: Path) -> Counter[int]:
    """How often each trial's end stands in a journal; none where the study is in a database."""
    ends: Counter[int] = Counter()
    created = 0
    for line in journal.read_text().splitlines() if journal.is_file() else ():
        log = json.loads(line)  # half a line would be a fault of ours, and raises
        if log["op_code"] == JournalOperation.CREATE_TRIAL:
            ends[created] += TrialState(log.get("state", TrialState.RUNNING)).is_finished()
            created += 1
        elif log["op_code"] == JournalOperation.SET_TRIAL_STATE_VALUES:
            ends[log["trial_id"]] += TrialState(log["state"]).is_finished()
    return ends


def left_over(testbed: Testbed) -> Iterator[str]:
    """Processes, placement groups and actors of drivers that are gone."""
    deadline = time.time() + GONE_S
    while (alive := testbed.processes()) and time.time() < deadline:
        time.sleep(0.5)
    for process in alive:
        yield f"process {process.pid} ({' '.join(process.cmdline())[:60]}) is left"
    if testbed.address:
        import ray
        from ray.util.state import list_actors

        groups = ray.util.placement_group_table().values()
        yield from (f"a placement group is {g['state']}" for g in groups if g["state"] != "REMOVED")
        yield from (
            f"an actor {a.class_name} is {a.state}"
            for a in list_actors(testbed.address, limit=10_000)
            if a.state != "DEAD"
        )


def differences(quiet: Run, killed: Run) -> Iterator[str]:
    """Yield what differs from the undisturbed study: suggestions, scores, states, losses."""
    for kind in ("search", "baselines"):
        killed_trials, quiet_trials = (
            getattr(killed.store, kind)().get_trials(),
            getattr(quiet.store, kind)().get_trials(),
        )
        for trial, other in zip(killed_trials, quiet_trials, strict=False):
            for name in ("state", "params", "values", "intermediate_values"):
                if getattr(trial, name) != getattr(other, name):
                    values = f"{getattr(trial, name)} instead of {getattr(other, name)}"
                    yield f"{kind} {trial.number} has {name} {values}"
    for trial in killed.store.search().get_trials():
        rows = [
            [
                (row["epoch"], row["loss"], row.get("dsc"))
                for row in read_metrics(run.store.trial_folder(trial.number))
            ]
            for run in (killed, quiet)
        ]
        if trial.state == TrialState.COMPLETE and rows[0] != rows[1]:
            yield f"trial {trial.number} has other losses or scores in its metrics.jsonl"


def print_result(quiet: Run, killed: Run, faults: list[str], options: argparse.Namespace) -> None:
    states = Counter(t.state.name for t in killed.store.search().get_trials())
    kinds = Counter(kill["kind"] for kill in killed.kills)
    print("\n| | |\n|---|---|")
    print(
        f"| kills | {len(killed.kills)}: {', '.join(f'{n} {kind}' for kind, n in kinds.items())} |"
    )
    print(f"| trials | {', '.join(f'{n} {state}' for state, n in sorted(states.items()))} |")
    print(f"| taken over | {sum(' continues' in line for line in killed.events())} times |")
    for name, run in (("left alone", quiet), ("killed", killed)):
        best = run.store.search().best_trial
        print(f"| best, {name} | trial {best.number}: {best.value!r} |")
    compared = (
        "suggestions, scores, ends and losses as left alone"
        if options.concurrency == 1
        else "not compared"
    )
    print(f"| checked | {'; '.join(faults) or 'nothing lost, doubled or left over; ' + compared} |")


if __name__ == "__main__":
    sys.exit(main())
