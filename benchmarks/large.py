"""Prepare and stream a large set of generated images, and watch the memory of all processes.

    python benchmarks/large.py --images 200000 --folder /somewhere/with/20/GB
    python benchmarks/large.py --images 20000 --folder ... --kill 5     # kill five times, compare

Memory is the sum of proportional set sizes over this process and all its children, Ray's among
them, so shared memory counts once. Images are 256 x 256 PNG: smooth shapes with speckle, a tenth
with a mask.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
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
FOLDER_IMAGES = 1000


def main() -> None:
    args = _options()
    source = args.folder / f"images-{args.images}"
    if args.prepare_only:
        prepare_images(source, Path(args.prepare_only), args.size)
        return
    generate(source, args.images)
    figures: dict[str, float] = {"images": args.images}
    first = args.folder / "first"
    with MemoryWatch() as memory:
        started = time.perf_counter()
        # A command of its own, as users run it.
        subprocess.run(prepare_command(args, first), check=True)
        figures["prepare_seconds"] = time.perf_counter() - started
        figures["prepare_peak_gib"] = memory.take_peak()
        figures |= stream(first, args.epochs, args.batch)
        figures["stream_peak_gib"] = memory.take_peak()
    if args.kill:
        second = args.folder / "second"
        figures["kills"] = prepare_with_kills(args, second, figures["prepare_seconds"])
        figures["same_bytes"] = hashes(first) == hashes(second)
    for name, value in figures.items():
        print(f"{name:24} {value:,.2f}" if isinstance(value, float) else f"{name:24} {value:,}")
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--images", type=int, default=200_000)
    add("--folder", type=Path, required=True, help="for images and datasets; kept")
    add("--size", type=int, default=224, help="pixels a side of stored images")
    add("--epochs", type=int, default=2)
    add("--batch", type=int, default=64)
    add("--kill", type=int, default=0, help="times a second preparation is killed")
    add("--json", type=Path)
    add("--prepare-only", help=argparse.SUPPRESS)
    return parser.parse_args()


def generate(folder: Path, count: int) -> None:
    """Write the images, unless they are there."""
    if (folder / "done").exists():
        return
    starts = range(0, count, FOLDER_IMAGES)
    with ProcessPoolExecutor() as pool:
        futures = []
        for start in starts:
            images = min(FOLDER_IMAGES, count - start)
            futures.append(pool.submit(_write_images, folder, start, images))
        for future in futures:
            future.result()
    (folder / "done").touch()


def _write_images(folder: Path, start: int, count: int) -> None:
    rng = np.random.default_rng(start)
    for name in ("images", "masks"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    speckle = rng.integers(-12, 13, (SIDE + 64, SIDE + 64)).astype(np.int16)
    for i in range(start, start + count):
        file = f"p{i % 1000:04d}_{i:06d}.png"
        coarse = Image.fromarray(rng.integers(20, 220, (6, 6), dtype=np.uint8))
        pixels = np.asarray(coarse.resize((SIDE, SIDE), Image.Resampling.BICUBIC)).astype(np.int16)
        y, x = rng.integers(0, 64, 2)
        pixels = (pixels + speckle[y : y + SIDE, x : x + SIDE]).clip(0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / "images" / file, compress_level=1)
        if i % 10 == 0:
            rows, columns = np.mgrid[:SIDE, :SIDE]
            center_y, center_x = rng.integers(60, 200), rng.integers(60, 200)
            distance = np.hypot(rows - center_y, columns - center_x)
            disc = distance < rng.integers(8, 40)
            Image.fromarray(disc).save(folder / "masks" / file)


def prepare_images(source: Path, out: Path, size: int) -> None:
    """Prepare the images as a patch dataset."""
    from amlp_ray.config import PrepareConfig
    from amlp_ray.data.prepare.pipeline import prepare
    from amlp_ray.runtime.session import ray_session

    logging.basicConfig(format="%(message)s")
    logging.getLogger("amlp_ray").setLevel(logging.INFO)
    with ray_session():
        prepare(source, out, PrepareConfig(layout="paired", size=size))


def stream(path: Path, epochs: int, batch_size: int) -> dict[str, float]:
    """Stream shuffled epochs; every image of a complete batch must come once in each."""
    from amlp_ray.data.dataset import PatchDataset
    from amlp_ray.data.loading.batches import open_batches
    from amlp_ray.runtime.session import ray_session

    dataset = PatchDataset.open(path)
    expected = dataset.count("train") // batch_size * batch_size
    figures: dict[str, float] = {}
    with ray_session():
        batches = open_batches(dataset, batch_size=batch_size, seed=0, mode="stream", epochs=epochs)
        for epoch in range(1, epochs + 1):
            started = time.perf_counter()
            first = 0.0
            batch_keys = []
            for batch in batches.epoch(epoch):
                first = first or time.perf_counter() - started
                batch_keys.append(batch.keys.numpy().copy())
            seconds = time.perf_counter() - started
            keys = np.concatenate(batch_keys)
            assert len(np.unique(keys)) == len(keys) == expected
            figures[f"epoch_{epoch}_images_s"] = len(keys) / seconds
            figures[f"epoch_{epoch}_start_s"] = first
    return figures


def prepare_command(args: argparse.Namespace, out: Path) -> list[str]:
    """Return the command that prepares into `out`."""
    command = [sys.executable, __file__, "--folder", str(args.folder)]
    command += ["--images", str(args.images), "--size", str(args.size)]
    return [*command, "--prepare-only", str(out)]


def prepare_with_kills(args: argparse.Namespace, out: Path, seconds: float) -> int:
    """Prepare into `out`, killed at other moments on the way; return the number of kills."""
    rng = np.random.default_rng(0)
    command = prepare_command(args, out)
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
    return kills


def hashes(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of every file; the manifest's without the dataset's name, the folder's."""
    digests = {}
    for file in sorted(folder.rglob("*")):
        if file.is_file():
            content = file.read_bytes().replace(f'"name": "{folder.name}"'.encode(), b"")
            digests[str(file.relative_to(folder))] = hashlib.sha256(content).hexdigest()
    return digests


class MemoryWatch:
    """Sample the memory of this process and all its children."""

    def __enter__(self) -> MemoryWatch:
        self._peak = 0.0
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stopped.set()
        self._thread.join()

    def take_peak(self) -> float:
        """Return the highest GiB since the last call."""
        peak = self._peak
        self._peak = 0.0
        return peak

    def _watch(self) -> None:
        this = psutil.Process()
        while not self._stopped.wait(0.5):
            total = 0
            for process in [this, *this.children(recursive=True)]:
                try:
                    total += process.memory_full_info().pss
                except (psutil.NoSuchProcess, psutil.AccessDenied):
                    continue
            self._peak = max(self._peak, total / 2**30)


if __name__ == "__main__":
    main()
