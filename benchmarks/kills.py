"""Kill workers and the driver of a pretraining at random moments, and count what each kill costs.

    # 20 kills of 2 workers, every fifth of the driver instead
    python benchmarks/kills.py
    python benchmarks/kills.py --kills 5 --workers 3 --seed 7 --data runs/mine

Each kill is a SIGKILL by pid, at a moment that follows from the seed. After it, the run must resume
by itself, or by the same command if the driver was killed. An uninterrupted run of the same config
is trained afterwards and compared. The exit code is 1 if an epoch is missing or doubled, a kill
cost more than one finished epoch, a checkpoint is damaged, or the loss differs.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import psutil

from amlp_ray.training.checkpoint.manager import checkpoints, is_intact
from amlp_ray.training.loggers.metrics_file import read_rows
from amlp_ray.utils.event_log import read_events

RESUME_TIMEOUT_S = 300.0  # time within which a run must resume after a kill
MAX_DELAY_S = 6.0  # between the resumption of a run and the next kill: a few epochs
DRIVER_EVERY = 5  # every fifth kill is of the driver


@dataclass
class Kill:
    """One kill, and what it cost."""

    number: int
    target: str
    epoch: int  # the last finished epoch at the kill
    repeated: int = -1  # finished epochs that were trained again
    seconds: float = -1.0  # until the next epoch was finished
    damaged: list[str] = field(default_factory=list)


def main() -> int:
    args = _arguments()
    with tempfile.TemporaryDirectory(prefix="amlp-kills-") as scratch:
        data = args.data or _phantoms(Path(scratch))
        kills = run_with_kills(args, data, Path(scratch) / "killed")
        uninterrupted = Path(scratch) / "uninterrupted"
        subprocess.run(_command(args, data, uninterrupted), check=True, stderr=subprocess.DEVNULL)
        return verdict(args, kills, Path(scratch) / "killed", uninterrupted)


def run_with_kills(args: argparse.Namespace, data: str, out: Path) -> list[Kill]:
    """Train while workers and the driver are killed; return what each kill cost."""
    rng = random.Random(args.seed)
    kills: list[Kill] = []
    driver = _start(args, data, out)
    for number in range(1, args.kills + 1):
        started = _wait_for_start(out, after=number - 1, driver=driver)
        time.sleep(rng.uniform(0, MAX_DELAY_S))
        rows = read_rows(out / "metrics.jsonl")
        kill = Kill(number, "", rows[-1]["epoch"] if rows else 0)
        if number % DRIVER_EVERY == 0:
            kill.target = "driver"
            os.kill(driver.pid, signal.SIGKILL)
            driver.wait()
            kill.damaged = _damaged(out)
            driver = _start(args, data, out)
        else:
            victim = rng.choice(sorted(_workers(driver), key=lambda process: process.pid))
            kill.target = f"worker, pid {victim.pid}"
            victim.kill()
            kill.damaged = _damaged(out)
        killed = time.monotonic()
        _wait_for_start(out, after=started, driver=driver)
        kill.repeated = [event for event in read_events(out) if event["event"] == "started"][-1][
            "repeated"
        ]
        _wait_for_epoch(out, kill.epoch - kill.repeated, driver)
        kill.seconds = time.monotonic() - killed
        kills.append(kill)
        print(
            f"kill {number:2}: {kill.target}, epoch {kill.epoch}, {kill.repeated} repeated, "
            f"next epoch after {kill.seconds:.0f} s",
            flush=True,
        )
    if driver.wait(3600):
        raise SystemExit("The run failed after the last kill.")
    return kills


def verdict(args: argparse.Namespace, kills: list[Kill], out: Path, uninterrupted: Path) -> int:
    """Print the results; return 1 if anything is wrong."""
    rows = read_rows(out / "metrics.jsonl")
    reference_rows = read_rows(uninterrupted / "metrics.jsonl")
    epochs = [row["epoch"] for row in rows]
    difference = max(
        abs(row["loss"] - reference["loss"]) / abs(reference["loss"])
        for row, reference in zip(rows, reference_rows, strict=False)
    )
    damaged = [name for kill in kills for name in kill.damaged] + _damaged(out)
    seconds = sorted(kill.seconds for kill in kills)
    faults = {
        "epochs missing or doubled": epochs != list(range(1, args.epochs + 1)),
        "a kill that cost more than one finished epoch": any(kill.repeated > 1 for kill in kills),
        "damaged checkpoints": bool(damaged),
        "another loss than the uninterrupted run": difference > 1e-5,
    }
    print(
        f"{len(kills)} kills ({sum(kill.target == 'driver' for kill in kills)} of the driver), "
        f"{len(kills)} recoveries"
    )
    print(
        f"epochs: {len(epochs)} lines of {args.epochs}, each once: "
        f"{not faults['epochs missing or doubled']}"
    )
    print(
        f"finished epochs trained again: {sum(kill.repeated for kill in kills)} in all, "
        f"{max(k.repeated for k in kills)} at most"
    )
    print(f"checkpoints damaged: {len(damaged)}")
    print(
        f"seconds from a kill to the next finished epoch: median "
        f"{seconds[len(seconds) // 2]:.0f}, most {seconds[-1]:.0f}"
    )
    print(f"largest relative difference of the loss from the uninterrupted run: {difference:.1e}")
    for fault, is_present in faults.items():
        if is_present:
            print(f"FAULT: {fault}")
    return int(any(faults.values()))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument(
        "--epochs", type=int, default=150, help="enough that the run outlives the kills"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data", help="a patch dataset; none: generated phantoms")
    return parser.parse_args()


def _phantoms(scratch: Path) -> str:
    for arguments in (
        ["phantoms", str(scratch / "images"), "--count", "400", "--size", "96"],
        ["prepare", str(scratch / "images"), str(scratch / "data"), "--size", "64"],
    ):
        subprocess.run(
            [sys.executable, "-m", "amlp_ray", "data", *arguments],
            check=True,
            stdout=subprocess.DEVNULL,
        )
    return str(scratch / "data")


def _command(args: argparse.Namespace, data: str, out: Path) -> list[str]:
    cpus_per_worker = f"{0.9 * (os.cpu_count() or 1) / args.workers:.2f}"
    return [
        *(
            sys.executable,
            "-m",
            "amlp_ray",
            "pretrain",
            data,
            "--out",
            str(out),
            "--set",
            f"epochs={args.epochs}",
        ),
        *("--workers", str(args.workers), "--cpus-per-worker", cpus_per_worker),
    ]


def _start(args: argparse.Namespace, data: str, out: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen(_command(args, data, out), stdout=subprocess.DEVNULL, stderr=sys.stderr)


def _workers(driver: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """Return Ray Train's worker processes below the driver."""
    matches = []
    for process in psutil.Process(driver.pid).children(recursive=True):
        try:
            if "RayTrainWorker" in " ".join(process.cmdline()):
                matches.append(process)
        except psutil.Error:  # it exited meanwhile
            continue
    return matches


def _wait_for_start(out: Path, *, after: int, driver: subprocess.Popen[bytes]) -> int:
    """Wait until the run has started more than `after` times; return how often it has."""
    deadline = time.monotonic() + RESUME_TIMEOUT_S
    while True:
        count = sum(event["event"] == "started" for event in read_events(out))
        if count > after:
            return count
        _check_progress(driver, deadline)


def _wait_for_epoch(out: Path, epoch: int, driver: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + RESUME_TIMEOUT_S
    while True:
        rows = read_rows(out / "metrics.jsonl")
        if rows and rows[-1]["epoch"] > epoch:
            return
        _check_progress(driver, deadline)


def _check_progress(driver: subprocess.Popen[bytes], deadline: float) -> None:
    if driver.poll() is not None:
        raise SystemExit(f"The run ended ({driver.returncode}) before all kills; raise --epochs.")
    if time.monotonic() > deadline:
        raise SystemExit(f"The run did not resume within {RESUME_TIMEOUT_S:.0f} s after a kill.")
    time.sleep(0.1)


def _damaged(out: Path) -> list[str]:
    return [path.name for path in checkpoints(out) if path.exists() and not is_intact(path)]


if __name__ == "__main__":
    sys.exit(main())
