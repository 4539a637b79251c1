"""Time how fast images come: mapped, streamed, and from torch DataLoaders over PNG files and a map.

    python benchmarks/data.py --images 8192 --rounds 5 --json data.json

The images are generated in a temporary folder. README.md beside this file says what is compared.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from amlp_ray.config import PrepareConfig, PretrainConfig, ResourceConfig
from amlp_ray.config.base import build
from amlp_ray.data.dataset import PatchDataset
from amlp_ray.data.loading.batches import Mode, open_batches
from amlp_ray.data.manifest import Counts, Manifest, Part, write_manifest
from amlp_ray.data.parquet import footer_digest, group_rows, part_rows, write_part
from amlp_ray.data.path import DataPath
from amlp_ray.launch.launcher import pretrain_dataset
from amlp_ray.runtime.session import ray_session
from amlp_ray.training.loggers.metrics_file import read_rows

SHAPE = (1, 224, 224)
MODES: tuple[Mode, ...] = ("mapped", "stream")
REFERENCE = "PNG, 2 workers"  # what ratios are against
SETTLE_S = 1.0  # a stream reads ahead for a moment after its turn

ReadEpoch = Callable[[int], Iterator[int]]  # yields the number of images of each batch


def main() -> None:
    options = _options()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory(prefix="amlp-bench-") as name:
        folder = Path(name)
        os.environ["AMLP_RAY_CACHE"] = str(folder / "cache")
        dataset = make_dataset(folder / "set", options.images)
        make_files(folder, options.png_images, dataset)
        with ray_session():
            result = race(contenders(dataset, folder, options), options)
        if options.train_images:
            result["training"] = train(folder, options)
    _print(result, options)
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "--images",
        type=int,
        default=8192,
        help="224 x 224, one channel; above 5350 the split is large",
    )
    add("--png-images", type=int, default=2048, help="images of a turn over PNG files")
    add("--batch", type=int, default=256)
    add("--rounds", type=int, default=5, help="turns of each contender")
    add("--threads", type=int, default=1, help="of torch")
    add("--train-images", type=int, default=256, help="of a training run per mode; 0: none")
    add("--train-batch", type=int, default=16)
    add("--json", type=Path, help="write all figures to this file")
    return parser.parse_args()


def speckle(count: int, seed: int) -> Iterator[np.ndarray]:
    """Yield images (224, 224) uint8: speckle in a dark-bordered fan compresses like ultrasound."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[:224, :224]
    for _ in range(count):
        fan = np.abs(columns - 112) < 40 + rows * rng.uniform(0.2, 0.5)
        yield (rng.rayleigh(45, (224, 224)) * fan).clip(0, 255).astype(np.uint8)


def make_dataset(folder: Path, count: int) -> PatchDataset:
    """Write a patch dataset of `count` training images."""
    size = part_rows(SHAPE, "uint8")
    parts = []
    for number, start in enumerate(range(0, count, size)):
        images = speckle(min(size, count - start), number)
        rows = [_row(f"image {start + i}", image) for i, image in enumerate(images)]
        file = f"train/part-{number:05d}.parquet"
        path = DataPath(folder) / file
        write_part(path, rows, SHAPE, "uint8")
        part = Part(file=file, rows=len(rows), bytes=path.info().size, footer=footer_digest(path))
        parts.append(part)
    nothing = Counts(groups=0, images=0, labeled=0, lesions=0)
    manifest = Manifest(
        created_by="benchmarks/data.py",
        name="speckle",
        layout="flat",
        channels=1,
        height=224,
        width=224,
        dtype="uint8",
        mean=(40.0,),
        std=(40.0,),
        counts={
            "train": Counts(groups=count, images=count, labeled=0, lesions=0),
            "val": nothing,
            "test": nothing,
        },
        parts={"train": parts, "val": [], "test": []},
        group_rows=group_rows(SHAPE, "uint8"),
        split_rule="",
        group_rule="",
        left_out=0,
        rejected=0,
        dropped=0,
        salt=None,
        config=PrepareConfig(),
        fingerprint=f"speckle {count}",
    )
    write_manifest(DataPath(folder), manifest)
    return PatchDataset.open(folder)


def _row(name: str, image: np.ndarray) -> dict[str, Any]:
    return {
        "id": name,
        "group": "",
        "source": "",
        "image": image.tobytes(),
        "mask": None,
        "lesion": None,
        "background": 0.0,
        "height": 224,
        "width": 224,
        "y": 0,
        "x": 0,
        "frame": 0,
        "spacing_y": None,
        "spacing_x": None,
        "hash": 0,
    }


def make_files(folder: Path, count: int, dataset: PatchDataset) -> None:
    """Write the same images as PNG files (the first `count`) and as one .npy file."""
    images = dataset.load("train").images
    np.save(folder / "images.npy", images)
    (folder / "png").mkdir()
    for i, image in enumerate(images[:count]):
        Image.fromarray(image[0]).save(folder / "png" / f"{i:06d}.png")


class PngFiles(torch.utils.data.Dataset[torch.Tensor]):
    """PNG files, as most training scripts read them."""

    def __init__(self, folder: Path) -> None:
        self.files = sorted(folder.iterdir())

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.from_numpy(np.array(Image.open(self.files[index])))[None]


class MappedFile(torch.utils.data.Dataset[torch.Tensor]):
    """A mapped .npy file, read image by image."""

    def __init__(self, file: Path) -> None:
        self.images = np.load(file, mmap_mode="r")

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.from_numpy(self.images[index].copy())


def contenders(
    dataset: PatchDataset, folder: Path, options: argparse.Namespace
) -> dict[str, ReadEpoch]:
    """Return the ways to read an epoch, by name."""
    readers: dict[str, ReadEpoch] = {}
    for mode in MODES:
        batches = open_batches(dataset, batch_size=options.batch, seed=0, mode=mode)

        def read_batches(epoch: int, batches: Any = batches) -> Iterator[int]:
            return (len(batch.keys) for batch in batches.epoch(epoch))

        readers[mode] = read_batches
    for name, data, workers in (
        ("memory map, 0 workers", MappedFile(folder / "images.npy"), 0),
        ("memory map, 2 workers", MappedFile(folder / "images.npy"), 2),
        ("PNG, 0 workers", PngFiles(folder / "png"), 0),
        (REFERENCE, PngFiles(folder / "png"), 2),
    ):
        loader = torch.utils.data.DataLoader(
            data,
            batch_size=options.batch,
            shuffle=True,
            drop_last=True,
            num_workers=workers,
            persistent_workers=workers > 0,
        )

        def read_loader(epoch: int, loader: Any = loader) -> Iterator[int]:
            return (len(images) for images in loader)

        readers[name] = read_loader
    return readers


def race(readers: dict[str, ReadEpoch], options: argparse.Namespace) -> dict[str, Any]:
    """Let every reader read an epoch per round, starting with another one each round.

    The first round is not timed. A stream reads two epochs, because it has read ahead during the
    turns of others, so its first epoch is partly there and is not timed. Timing begins when the
    last batch before was taken, so a restart is included.
    """
    seconds: dict[str, list[float]] = {name: [] for name in readers}  # per image
    restarts: dict[str, list[float]] = {name: [] for name in readers}
    images: dict[str, int] = {}
    epochs = dict.fromkeys(readers, 0)
    names = list(readers)
    for number in range(options.rounds + 1):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            for is_timed in (False, True) if name == "stream" else (True,):
                epochs[name] += 1
                images[name], elapsed, restart = _read(readers[name], epochs[name])
                if is_timed and number:
                    seconds[name].append(elapsed / images[name])
                    restarts[name].append(restart)
            if name == "stream":
                time.sleep(SETTLE_S)
    reference = np.array(seconds[REFERENCE])
    rows = {}
    for name in names:
        ratios = reference / np.array(seconds[name])
        low, middle, high = np.quantile(ratios, [0.25, 0.5, 0.75]).tolist()
        rows[name] = {
            "images_per_second": 1 / float(np.median(seconds[name])),
            "times_png": {"quartile_1": low, "median": middle, "quartile_3": high},
            "restart_seconds": float(np.median(restarts[name])),
            "images": images[name],
        }
    config = json.loads(json.dumps(vars(options), default=str))
    return {"config": config, "torch": torch.__version__, "readers": rows}


def _read(read_epoch: ReadEpoch, epoch: int) -> tuple[int, float, float]:
    """Read an epoch; return its images, seconds, and seconds until the first batch."""
    started = time.perf_counter()
    images = 0
    restart = 0.0
    for count in read_epoch(epoch):
        restart = restart or time.perf_counter() - started
        images += count
    return images, time.perf_counter() - started, restart


def train(folder: Path, options: argparse.Namespace) -> dict[str, float]:
    """Return the share of its time that a pretraining run waits for data, by mode.

    The run is MAE with ViT-Ti; the second of two epochs counts.
    """
    dataset = make_dataset(folder / "small", options.train_images)
    shares: dict[str, float] = {}
    for mode in MODES:
        values = {
            "variant": "mae",
            "epochs": 2,
            "batch_size": options.train_batch,
            "data": mode,
            "model": {"width": 192, "depth": 12, "heads": 3},
        }
        config = build(PretrainConfig, values, "data.py")
        resources = ResourceConfig(cpus_per_worker=options.threads)
        pretrain_dataset(dataset.path, folder / mode, config, resources=resources)
        shares[mode] = read_rows(folder / mode / "metrics.jsonl")[-1]["wait_share"]
    return shares


def _print(result: dict[str, Any], options: argparse.Namespace) -> None:
    print(f"{options.images} images of 224 x 224 uint8")
    print(f"batch {options.batch}, {options.rounds} rounds")
    print(f"{'':23} images/s  times {REFERENCE} (quartiles)   restart, s")
    for name, row in result["readers"].items():
        ratio = row["times_png"]
        quartiles = f"({ratio['quartile_1']:.2f}-{ratio['quartile_3']:.2f})"
        print(
            f"{name:23} {row['images_per_second']:8,.0f}  {ratio['median']:9.2f} {quartiles:19} "
            f"{row['restart_seconds']:9.3f}"
        )
    for mode, share in result.get("training", {}).items():
        print(f"waiting share of a training run, {mode}: {share:.2%}")


if __name__ == "__main__":
    main()
