"""Time a training step of amlp_ray and of other implementations of MAE, at equal sizes, in turn.

    python benchmarks/step.py --size Ti --batch 32 --json step.json \\
        --mae path/to/facebookresearch/mae

README.md beside this file says what is compared.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import time
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from contenders import (
    ANALYSIS_INTERVAL,
    ANALYZED,
    CACHED,
    MAE,
    PATCHES,
    SIZES,
    Contender,
    Size,
    contenders,
)

from amlp_ray.training.loggers.flops import listed_peak

AMLP = "amlp"  # a step of it with its share of an analysis
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def main() -> None:
    options = _options()
    torch.set_num_threads(options.threads)
    taking_part = contenders(options)
    if options.only:
        taking_part = [
            c for c in taking_part if c.name == MAE or c.name.startswith(tuple(options.only))
        ]
    if options.optimizer:
        for contender in taking_part:
            contender.optimizer = torch.optim.AdamW(
                contender.trained, lr=1e-4, betas=(0.9, 0.95), fused=True
            )
    before = _peak_tflops(options)
    seconds, losses = race(taking_part, options)
    peak = max(before, _peak_tflops(options))  # a busy machine shows its peak at times only
    result = _result(taking_part, seconds, losses, peak, options)
    _print(result)
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=SIZES, default="Ti")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--ratio", type=float, default=0.75, help="masking ratio")
    parser.add_argument(
        "--dtype", choices=["fp32", "bf16"], default="fp32", help="bf16 is autocast"
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--clock",
        choices=["wall", "cpu"],
        default="wall",
        help="cpu: processor time, for a machine that others use",
    )
    parser.add_argument(
        "--rounds", type=int, default=10, help="each contender takes one turn in each"
    )
    parser.add_argument(
        "--optimizer", action="store_true", help="time AdamW's step too, fused for all"
    )
    parser.add_argument(
        "--mae", type=Path, help="folder of a clone of github.com/facebookresearch/mae"
    )
    parser.add_argument(
        "--only", nargs="+", metavar="NAME", help="contenders whose names begin so; mae always runs"
    )
    parser.add_argument(
        "--peak-tflops", type=float, help="of the device; else measured on CPU, by name on CUDA"
    )
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    return parser.parse_args()


def race(
    taking_part: list[Contender], options: argparse.Namespace
) -> tuple[dict[str, np.ndarray], dict[str, float]]:
    """Let every contender take one turn in each round; the first round is not timed.

    Another contender is first each time.

    Returns:
        Seconds per round, and the first loss, by name.
    """
    seconds: dict[str, list[float]] = {c.name: [] for c in taking_part}
    losses: dict[str, float] = {}
    clock = CLOCKS[options.clock]
    for turn in range(options.rounds + 1):
        first = turn % len(taking_part)
        for contender in taking_part[first:] + taking_part[:first]:
            _wait(options.device)
            started = clock()
            contender.model.zero_grad(set_to_none=True)
            loss = contender.loss(turn)
            loss.backward()
            if contender.optimizer:
                contender.optimizer.step()
            _wait(options.device)
            if turn:
                seconds[contender.name].append(clock() - started)
            losses.setdefault(contender.name, loss.item())
    return {name: np.array(values) for name, values in seconds.items()}, losses


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _result(
    taking_part: list[Contender],
    seconds: dict[str, np.ndarray],
    losses: dict[str, float],
    peak: float,
    options: argparse.Namespace,
) -> dict[str, Any]:
    """Median figures by contender.

    `times_mae` is its time over that of our `mae` in the same round.
    """
    parameters = {c.name: sum(p.numel() for p in c.trained) for c in taking_part}
    analysis: dict[str, float] = {}
    if CACHED in seconds and ANALYZED in seconds:
        extra = seconds[ANALYZED] - seconds[CACHED]
        analysis["analysis_ms_per_image"] = 1e3 * float(np.median(extra)) / options.batch
        # One epoch in ANALYSIS_INTERVAL analyzes every image.
        seconds = {**seconds, AMLP: seconds[CACHED] + extra / ANALYSIS_INTERVAL}
        losses[AMLP] = losses[CACHED]
        parameters[AMLP] = parameters[CACHED]
    work = training_tflop(SIZES[options.size], options.ratio) * options.batch
    rows = {}
    for name, times in seconds.items():
        low, middle, high = np.quantile(times / seconds[MAE], [0.25, 0.5, 0.75]).tolist()
        median = float(np.median(times))
        rows[name] = {
            "parameters": parameters[name],
            "first_loss": losses[name],
            "seconds": median,
            "images_per_second": options.batch / median,
            "times_mae": {"quartile_1": low, "median": middle, "quartile_3": high},
            "mfu": work / median / peak,
        }
    config = {
        name: str(value) if isinstance(value, Path) else value
        for name, value in vars(options).items()
    }
    return {
        "config": config,
        "host": _host(options.device),
        "peak_tflops": peak,
        "contenders": rows,
        **analysis,
    }


def training_tflop(size: Size, ratio: float) -> float:
    """Arithmetic of all blocks for one image, in TFLOP: forward, and backward at twice that."""

    def blocks(tokens: int, width: int, depth: int) -> int:
        return depth * (24 * tokens * width**2 + 4 * tokens**2 * width)

    visible = PATCHES - round(ratio * PATCHES)
    encoder = blocks(1 + visible, size.width, size.depth)
    decoder = blocks(1 + PATCHES, size.decoder_width, size.decoder_depth)
    return 3e-12 * (encoder + decoder)


def _peak_tflops(options: argparse.Namespace) -> float:
    """As given.

    Else of a GPU by its name (NaN if unknown), and of a CPU the best matrix product, by our
    clock.
    """
    if options.peak_tflops:
        return options.peak_tflops
    dtype = torch.bfloat16 if options.dtype == "bf16" else torch.float32
    if options.device == "cuda":
        return (listed_peak(torch.cuda.get_device_name(), dtype) or math.nan) / 1e12
    n = 2048
    a = torch.randn(n, n, dtype=dtype)
    clock, times = CLOCKS[options.clock], []
    for _ in range(10):
        started = clock()
        a @ a
        times.append(clock() - started)
    return 2e-12 * n**3 / min(times)


def _host(device: str) -> dict[str, str]:
    name = torch.cuda.get_device_name() if device == "cuda" else platform.machine()
    host = {"device": name, "python": platform.python_version()}
    for package in ("torch", "timm", "transformers", "vit-pytorch"):
        with suppress(PackageNotFoundError):
            host[package] = version(package)
    return host


def _print(result: dict[str, Any]) -> None:
    config = result["config"]
    how = [f"{config[name]} {name}" for name in ("threads", "rounds")]
    how += [f"{config['clock']} time", f"{'with' if config['optimizer'] else 'without'} optimizer"]
    how = [
        f"batch {config['batch']}",
        f"ratio {config['ratio']}",
        f"{config['dtype']} on {config['device']}",
        *how,
    ]
    print(", ".join([f"size {config['size']}", *how]))
    print(f"{'':17} parameters   loss  s/step  images/s  time / mae (quartiles)    MFU")
    for name, row in result["contenders"].items():
        ratio = row["times_mae"]
        quartiles = f"({ratio['quartile_1']:.3f}-{ratio['quartile_3']:.3f})"
        print(
            f"{name:17} {row['parameters'] / 1e6:8.2f} M  {row['first_loss']:5.2f} "
            f"{row['seconds']:7.3f} {row['images_per_second']:9.1f}  {ratio['median']:.3f} "
            f"{quartiles:15} {row['mfu']:7.1%}"
        )
    if "analysis_ms_per_image" in result:
        print(
            f"An analysis costs {result['analysis_ms_per_image']:.2f} ms an image, in one epoch of "
            f"{ANALYSIS_INTERVAL}; `amlp` includes it."
        )


if __name__ == "__main__":
    main()
