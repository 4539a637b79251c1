"""Prepare and stream a large set of generated images, and watch the memory of all processes together.

    python benchmarks/large.py --images 200000 --folder /somewhere/with/20/GB
    python benchmarks/large.py --images 20000 --folder ... --kill 5     # SIGKILL five times, then compare the bytes

Memory is the sum of proportional set sizes over this process and all its children, Ray's among them, so shared memory
counts once. Images are 256 x 256 PNG: smooth shapes with speckle, a tenth with a mask.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import psutil
from PIL import Image

SIDE = 256
PER_FOLDER = 1000


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=200_000)
    parser.add_argument("--folder", type=Path, required=True, help="for images and datasets; kept")
    parser.add_argument("--size", type=int, default=224, help="pixels a side of stored images")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--kill", type=int, default=0, help="times a second preparation is killed")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--prepare-only", help=argparse.SUPPRESS)
    args = parser.parse_args()
    source = args.folder / f"images-{args.images}"
    if args.prepare_only:
        prepare(source, Path(args.prepare_only), args.size)
        return
    generate(source, args.images)
    found: dict[str, float] = {"images": args.images}
    first = args.folder / "first"
    with Memory() as memory:
        started = time.perf_counter()
        subprocess.run(
            preparation(args, first), check=True
        )  # a command of its own, as users have it
        found["prepare_seconds"] = time.perf_counter() - started
        found["prepare_peak_gib"] = memory.take_peak()
        found |= stream(first, args.epochs, args.batch)
        found["stream_peak_gib"] = memory.take_peak()
    if args.kill:
        found |= killed(source, args, found["prepare_seconds"])
        found["same_bytes"] = hashes(first) == hashes(args.folder / "second")
    for name, value in found.items():
        print(f"{name:24} {value:,.2f}" if isinstance(value, float) else f"{name:24} {value:,}")
    if args.json:
        args.json.write_text(json.dumps(found, indent=1))


def generate(folder: Path, count: int) -> None:
    """Write the images, unless they are there."""
    if (folder / "done").exists():
        return
    starts = range(0, count, PER_FOLDER)
    with ProcessPoolExecutor() as pool:
        list(
            pool.map(
                _folder,
                [folder] * len(starts),
                starts,
                [min(PER_FOLDER, count - s) for s in starts],
            )
        )
    (folder / "done").touch()


def _folder(folder: Path, start: int, count: int) -> None:
    rng = np.random.default_rng(start)
    for name in ("images", "masks"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    speckle = rng.integers(-12, 13, (SIDE + 64, SIDE + 64)).astype(np.int16)
    for i in range(start, start + count):
        coarse = Image.fromarray(rng.integers(20, 220, (6, 6), dtype=np.uint8))
        pixels = np.asarray(coarse.resize((SIDE, SIDE), Image.Resampling.BICUBIC)).astype(np.int16)
        y, x = rng.integers(0, 64, 2)
        pixels = (pixels + speckle[y : y + SIDE, x : x + SIDE]).clip(0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(
            folder / "images" / f"p{i % 1000:04d}_{i:06d}.png", compress_level=1
        )
        if i % 10 == 0:
            rows, columns = np.mgrid[:SIDE, :SIDE]
            disc = np.hypot(
                rows - rng.integers(60, 200), columns - rng.integers(60, 200)
            ) < rng.integers(8, 40)
            Image.fromarray(disc).save(folder / "masks" / f"p{i % 1000:04d}_{i:06d}.png")


def prepare(source: Path, out: Path, size: int) -> None:
    from amlp_ray.config import PrepareConfig
    from amlp_ray.data.prepare.pipeline import Told
    from amlp_ray.data.prepare.pipeline import prepare as run
    from amlp_ray.runtime.session import ray_session

    with ray_session():
        run(source, out, PrepareConfig(layout="paired", size=size), told=Told(say=print))


def stream(dataset: Path, epochs: int, batch: int) -> dict[str, float]:
    """Stream shuffled epochs; every image but those of the last incomplete batch must come once in each."""
    from amlp_ray.data.dataset import PatchDataset
    from amlp_ray.data.loading.batches import open_batches
    from amlp_ray.runtime.session import ray_session

    opened = PatchDataset.open(dataset)
    found: dict[str, float] = {}
    with ray_session():
        batches = open_batches(opened, batch_size=batch, seed=0, mode="stream", epochs=epochs)
        for epoch in range(1, epochs + 1):
            started, keys, first = time.perf_counter(), [], 0.0
            for given in batches.epoch(epoch):
                first = first or time.perf_counter() - started
                keys.append(given.keys.numpy().copy())
            seconds = time.perf_counter() - started
            seen = np.concatenate(keys)
            assert len(np.unique(seen)) == len(seen) == opened.count("train") // batch * batch
            found[f"epoch_{epoch}_images_s"] = len(seen) / seconds
            found[f"epoch_{epoch}_start_s"] = first
    return found


def preparation(args: argparse.Namespace, out: Path) -> list[str]:
    """The command that prepares into `out`."""
    given = {
        "--folder": args.folder,
        "--images": args.images,
        "--size": args.size,
        "--prepare-only": out,
    }
    return [sys.executable, __file__, *(str(word) for pair in given.items() for word in pair)]


def killed(source: Path, args: argparse.Namespace, seconds: float) -> dict[str, float]:
    """Prepare again, killed some times on the way, each time at another moment."""
    out = args.folder / "second"
    rng = np.random.default_rng(0)
    command = preparation(args, out)
    kills = 0
    for _ in range(args.kill):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            process.wait(timeout=8 + float(rng.random()) * seconds / 2)
        except subprocess.TimeoutExpired:
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
            kills += 1
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return {"kills": kills}


def hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of every file; the manifest's without the dataset's name, which is the folder's."""
    found = {}
    for file in sorted(folder.rglob("*")):
        if file.is_file():
            content = file.read_bytes().replace(f'"name": "{folder.name}"'.encode(), b"")
            found[str(file.relative_to(folder))] = hashlib.sha256(content).hexdigest()
    return found


class Memory:
    """Watches the memory of this process and all its children."""

    def __enter__(self) -> Memory:
        self._peak, self._ended = 0.0, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        self._thread.join()

    def take_peak(self) -> float:
        """GiB at the most since the last call."""
        peak, self._peak = self._peak, 0.0
        return peak

    def _watch(self) -> None:
        me = psutil.Process()
        while not self._ended.wait(0.5):
            total = 0
            for process in [me, *me.children(recursive=True)]:
                try:
                    total += process.memory_full_info().pss
                except (psutil.NoSuchProcess, psutil.AccessDenied):
                    continue
            self._peak = max(self._peak, total / 2**30)


if __name__ == "__main__":
    main()
