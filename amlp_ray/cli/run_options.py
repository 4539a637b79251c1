"""Options that `pretrain` and `segment` share: settings, resources and fault tolerance."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Option

from amlp_ray.errors import ConfigError

if TYPE_CHECKING:
    from amlp_ray.config import FaultToleranceConfig, ResourceConfig
    from amlp_ray.config.base import ConfigT

# Written out, so that --help need not import the configs.
DEFAULT_MAX_FAILURES = 3

Set = Annotated[
    list[str] | None, Option("--set", help="name=value, such as ratio.start=0.3; repeatable.")
]
Workers = Annotated[
    str,
    Option(
        help="Ray Train workers, such as 4. 2-8 follows nodes that join and leave. "
        "1 runs in this process."
    ),
]
CpusPerWorker = Annotated[float | None, Option(help="None: all cores, shared by the workers.")]
GpusPerWorker = Annotated[
    float, Option(help="With several workers or --address; otherwise a visible GPU is used.")
]
Accelerator = Annotated[str | None, Option(help="Type of GPU, by Ray's name: A100, H100, ...")]
Placement = Annotated[
    str, Option(help="Workers on nodes: pack, spread, strict-pack, strict-spread.")
]
MicroBatch = Annotated[
    int | None, Option(help="Images a worker processes at once; gradients are summed.")
]
Sharding = Annotated[str, Option(help="Several workers: ddp, fsdp; auto: fsdp from ViT-L on.")]
MaxFailures = Annotated[
    int,
    Option(
        help="Most losses of workers or nodes in a row, without an epoch in between, before the "
        "run gives up."
    ),
]
Address = Annotated[
    str | None, Option(help="Ray cluster to run on, such as auto; none: this machine.")
]


def parse_workers(text: str) -> int | list[int]:
    """Parse `4` or `2-8`. Raises ConfigError for anything else."""
    parts = text.split("-")
    if len(parts) > 2 or not all(part.isdigit() for part in parts):
        raise ConfigError(
            f"--workers {text!r} is neither a number, such as 4, nor a range, such as 2-8."
        )
    return int(parts[0]) if len(parts) == 1 else [int(part) for part in parts]


def load_config(
    model: type[ConfigT], assign: list[str] | None, file: Path | None = None
) -> ConfigT:
    """Return the settings of a YAML file, or the defaults, updated with `--set`."""
    from amlp_ray.config.overrides import build_with_overrides
    from amlp_ray.config.yaml_file import read_yaml

    values = read_yaml(file) if file else {}
    return build_with_overrides(model, values, assign or [])


def build_resources(
    address: str | None,
    max_failures: int,
    workers: str,
    cpus_per_worker: float | None,
    **others: Any,
) -> tuple[ResourceConfig, FaultToleranceConfig]:
    """Build what a run holds and survives; `cpus_per_worker` None shares this machine's cores."""
    from amlp_ray.config import FaultToleranceConfig, ResourceConfig
    from amlp_ray.config.base import build

    number = parse_workers(workers)
    if cpus_per_worker is None:
        cores = os.cpu_count() or 1
        max_workers = max(1, number if isinstance(number, int) else number[-1])
        is_single_process = max_workers == 1 and address is None
        # A group gets less than whole cores, because its controller needs a fraction too.
        cpus_per_worker = cores if is_single_process else 0.9 * cores / max_workers
    values = {"workers": number, "cpus_per_worker": cpus_per_worker, **others}
    resources = build(ResourceConfig, values, "options")
    return resources, build(FaultToleranceConfig, {"max_failures": max_failures}, "options")
