"""Measure what Ray Train costs, what a second worker brings, and that all workers learn the same.

    # Ray Train with 1 worker against the bare loop, in turn
    python benchmarks/scaling.py overhead
    # 2 workers of 1 thread against 1 of 1 thread, in turn
    python benchmarks/scaling.py workers
    # seconds from the command to the first step
    python benchmarks/scaling.py start
    # losses of 1, 2 and 4 workers, and a page with their figure
    python benchmarks/scaling.py curves --data runs/busi

README.md beside this file says what is compared. Without --data, phantoms are generated.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from amlp_ray.config import PretrainConfig, ResourceConfig
from amlp_ray.data.dataset import PatchDataset
from amlp_ray.data.loading.batches import open_batches
from amlp_ray.launch.launcher import run_on_ray
from amlp_ray.launch.run_spec import RunSpec
from amlp_ray.runtime.session import ray_session
from amlp_ray.training.loggers.metrics_file import read_rows
from amlp_ray.training.objectives import make_objective
from amlp_ray.training.pretrain import train_epoch
from amlp_ray.training.train_state import TrainState
from amlp_ray.utils.event_log import read_events

LEAST = 3e-8  # relative, below what float32 tells apart: equal losses are drawn there
WARM = 2  # epochs of a turn that are not counted: caches fill, and torch picks its kernels


def main() -> None:
    args = _arguments()
    with tempfile.TemporaryDirectory(prefix="amlp-scaling-") as scratch:
        data = args.data or _phantoms(Path(scratch))
        {"overhead": overhead, "workers": workers, "start": start, "curves": curves}[args.part](
            args, data, Path(scratch)
        )


def overhead(args: argparse.Namespace, data: str, scratch: Path) -> None:
    """The bare loop is `train_epoch` alone.

    No checkpoint, no metrics on disk, nobody to report to.
    """
    config = _settings(args)
    with ray_session():
        ratios = []
        for turn in range(args.turns):
            bare = _bare(config, data, args)
            ray_train = _on_ray(
                config, data, scratch / f"one-{turn}", ResourceConfig(cpus_per_worker=1)
            )
            ratios.append(ray_train / bare)
            print(
                f"turn {turn + 1}: bare {bare:.0f} images/s, Ray Train with 1 worker "
                f"{ray_train:.0f}: {ray_train / bare:.3f}",
                flush=True,
            )
    print(
        f"median ratio {statistics.median(ratios):.3f} of {len(ratios)} turns "
        f"({min(ratios):.3f}-{max(ratios):.3f})"
    )


def workers(args: argparse.Namespace, data: str, scratch: Path) -> None:
    config = _settings(args)
    with ray_session():
        ratios = []
        for turn in range(args.turns):
            one, two = (
                _on_ray(
                    config,
                    data,
                    scratch / f"{n}-{turn}",
                    ResourceConfig(workers=n, cpus_per_worker=0.9),
                )
                for n in (1, 2)
            )
            ratios.append(two / one)
            print(
                f"turn {turn + 1}: 1 worker {one:.0f} images/s, 2 workers {two:.0f}: "
                f"{two / one:.2f}",
                flush=True,
            )
    print(
        f"median ratio {statistics.median(ratios):.2f} of {len(ratios)} turns "
        f"({min(ratios):.2f}-{max(ratios):.2f})"
    )


def start(args: argparse.Namespace, data: str, scratch: Path) -> None:
    """Cold: the command starts Ray; warm: it joins one that runs.

    Its first step began when its first epoch did.
    """
    kinds = {"in its own process": (1, None), "2 workers, cold": (2, None)}
    for what, (number, address) in kinds.items():
        seconds = [
            _first_step(args, data, scratch / f"{what}-{turn}", number, address)
            for turn in range(args.turns)
        ]
        print(
            f"{what}: {statistics.median(seconds):.1f} s ({min(seconds):.1f}-{max(seconds):.1f})",
            flush=True,
        )
    with _standing_ray() as address:
        seconds = [
            _first_step(args, data, scratch / f"warm-{turn}", 2, address)
            for turn in range(args.turns)
        ]
    print(
        f"2 workers, warm: {statistics.median(seconds):.1f} s "
        f"({min(seconds):.1f}-{max(seconds):.1f})"
    )


def curves(args: argparse.Namespace, data: str, scratch: Path) -> None:
    """The control is one worker that sums each batch's gradient in two pieces.

    Another order of the same floats.
    """
    share = 0.9 * (os.cpu_count() or 1)
    crowds = {
        "1 worker": ResourceConfig(cpus_per_worker=share / 2),
        "1 worker, in two pieces": ResourceConfig(
            cpus_per_worker=share / 2, micro_batch=args.batch // 2
        ),
        "2 workers": ResourceConfig(workers=2, cpus_per_worker=share / 2),
        "4 workers": ResourceConfig(workers=4, cpus_per_worker=share / 4),
    }
    losses: dict[str, dict[str, list[float]]] = {}
    with ray_session():
        for variant in ("amlp", "mae"):
            config = _settings(args)
            config = PretrainConfig.model_validate(
                {**config.model_dump(exclude_unset=True), "variant": variant}
            )
            for crowd, resources in crowds.items():
                out = scratch / f"{variant}-{crowd}"
                _on_ray(config, data, out, resources)
                rows = read_rows(out / "metrics.jsonl")
                losses.setdefault(variant, {})[crowd] = [row["loss"] for row in rows]
                print(
                    f"{variant}, {crowd}: {len(rows)} epochs, last loss {rows[-1]['loss']:.7f}",
                    flush=True,
                )
    _draw(losses, args.page)


def _draw(losses_by_variant: dict[str, dict[str, list[float]]], page: Path) -> None:
    """Curves of each variant by its workers.

    And how far each lies from that of one worker, the first.
    """
    from plotly.subplots import make_subplots

    figure = make_subplots(1, 2, subplot_titles=["loss", "relative difference from 1 worker"])
    colors = {"amlp": "#d1495b", "mae": "#3a8fb7"}
    line_styles: list[dict[str, Any]] = [
        {"width": 7},
        {"width": 2, "dash": "dot"},
        {"width": 4, "dash": "dash"},
        {"width": 1.5},
    ]
    for variant, losses in losses_by_variant.items():
        one, *others = losses
        for (crowd, curve), line_style in zip(losses.items(), line_styles, strict=True):
            line = {"color": colors[variant], **line_style}
            style = {"x0": 1, "mode": "lines", "line": line, "name": f"{variant}, {crowd}"}
            figure.add_scatter(
                y=curve, opacity=0.35 if crowd == one else 1.0, row=1, col=1, **style
            )
            if crowd in others:
                differences = [abs(a - b) / b for a, b in zip(curve, losses[one], strict=True)]
                print(
                    f"{variant}, {crowd}: largest relative difference of the loss "
                    f"{max(differences):.1e}"
                )
                visible = [max(x, LEAST) for x in differences]
                figure.add_scatter(y=visible, showlegend=False, row=1, col=2, **style)
    figure.update_xaxes(title_text="epoch", gridcolor="#eceff3", zeroline=False)
    figure.update_yaxes(gridcolor="#eceff3", zeroline=False)
    figure.update_yaxes(type="log", exponentformat="power", dtick=1, row=1, col=2)
    figure.update_layout(
        template="none",
        font={"family": "system-ui, sans-serif", "size": 14},
        width=1200,
        height=500,
    )
    figure.update_layout(
        legend={"orientation": "h", "y": -0.2}, margin={"l": 60, "r": 20, "t": 40, "b": 120}
    )
    figure.write_html(page, include_plotlyjs=True, config={"displayModeBar": False})
    print(f"figure: {page}")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=["overhead", "workers", "start", "curves"])
    parser.add_argument("--data", help="a patch dataset; none: generated phantoms")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=12, help="of each turn, or of each curve")
    parser.add_argument("--width", type=int, default=192, help="of the encoder; 192 is ViT-Ti")
    parser.add_argument("--batch", type=int, default=32, help="images per step, over all workers")
    parser.add_argument(
        "--page", type=Path, default=Path("workers.html"), help="the figure of `curves`"
    )
    return parser.parse_args()


def _settings(args: argparse.Namespace) -> PretrainConfig:
    model = {"width": args.width, "depth": 6, "heads": args.width // 32}
    return PretrainConfig.model_validate(
        {"epochs": args.epochs, "batch_size": args.batch, "model": model}
    )


def _phantoms(scratch: Path) -> str:
    for words in (
        ["phantoms", str(scratch / "images"), "--count", "600", "--size", "96"],
        ["prepare", str(scratch / "images"), str(scratch / "data"), "--size", "96"],
    ):
        subprocess.run(
            [sys.executable, "-m", "amlp_ray", "data", *words],
            check=True,
            stdout=subprocess.DEVNULL,
        )
    return str(scratch / "data")


def _bare(config: PretrainConfig, data: str, args: argparse.Namespace) -> float:
    """Images per second of the loop alone, one thread: the median over epochs."""
    torch.set_num_threads(1)
    dataset = PatchDataset.open(data)
    batches = open_batches(dataset, batch_size=config.batch_size, seed=config.seed)
    train_state = TrainState(config, dataset.spec, "cpu")
    objective = make_objective(train_state.model, config, None)
    speeds = [
        train_epoch(train_state.model, train_state, objective, batches, epoch)["images_per_second"]
        for epoch in range(1, args.epochs + 1)
    ]
    return statistics.median(speeds[WARM:])


def _on_ray(config: PretrainConfig, data: str, out: Path, resources: ResourceConfig) -> float:
    """Images per second of a whole run on Ray Train: the median over epochs."""
    run_on_ray(RunSpec(config=config, data=data, folder=out, resources=resources), name=out.name)
    return statistics.median(
        [row["images_per_second"] for row in read_rows(out / "metrics.jsonl")][WARM:]
    )


def _first_step(
    args: argparse.Namespace, data: str, out: Path, number: int, address: str | None
) -> float:
    began = time.time()
    words = [
        "--workers",
        str(number),
        "--cpus-per-worker",
        "0.9",
        *(["--address", address] if address else []),
    ]
    command = [
        sys.executable,
        "-m",
        "amlp_ray",
        "pretrain",
        data,
        "--out",
        str(out),
        "--set",
        "epochs=1",
        *words,
    ]
    subprocess.run(
        command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=_open()
    )
    return read_events(out)[0]["time"] - began  # noted just before the first step


def _open() -> dict[str, str]:
    """Without the tokens that Ray asks for: the cluster of the warm start is gone in a minute."""
    return {**os.environ, "RAY_AUTH_MODE": "disabled"}


@contextmanager
def _standing_ray() -> Iterator[str]:
    ray = [str(Path(sys.executable).with_name("ray"))]
    quiet: dict[str, Any] = {
        "stdout": subprocess.DEVNULL,
        "stderr": subprocess.DEVNULL,
        "env": _open(),
    }
    subprocess.run([*ray, "start", "--head", "--port", "6399"], check=True, **quiet)
    try:
        yield "127.0.0.1:6399"
    finally:
        subprocess.run([*ray, "stop", "--force"], check=False, **quiet)


if __name__ == "__main__":
    main()
