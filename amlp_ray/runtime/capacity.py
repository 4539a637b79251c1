"""What a cluster holds and what fits into it: Ray waits for ever for what does not fit, so we ask first."""

from __future__ import annotations

import math
import os

from amlp_ray.config import ResourceSettings
from amlp_ray.errors import ResourceError

DRIVER_CPU = 0.01  # of a trial that only drives a group of workers; Ray refuses zero


def cluster_resources() -> dict[str, float]:
    """CPUs and GPUs of the cluster in all and of its largest node: `CPU`, `GPU`, `node_CPU`, `node_GPU`."""
    import ray

    alive = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    totals = {kind: float(sum(node.get(kind, 0) for node in alive)) for kind in ("CPU", "GPU")}
    largest = {f"node_{kind}": float(max((node.get(kind, 0) for node in alive), default=0)) for kind in ("CPU", "GPU")}
    return totals | largest


def machine_resources() -> dict[str, float]:
    """The same for this machine alone, without starting Ray."""
    import torch

    cpus, gpus = float(os.cpu_count() or 1), float(torch.cuda.device_count())
    return {"CPU": cpus, "GPU": gpus, "node_CPU": cpus, "node_GPU": gpus}


def jobs_side_by_side(resources: ResourceSettings, cluster: dict[str, float]) -> int:
    """How many jobs (trials, pretraining runs) fit side by side, at most `resources.concurrency`.

    A stream's reading tasks count nothing: they ask Ray for no CPU, so they start where workers hold all of them.

    Raises:
        ResourceError: where not even one fits: Ray would wait for it for ever.
    """
    for kind, wanted in (("CPU", resources.cpus_per_worker), ("GPU", resources.gpus_per_worker)):
        largest, total = cluster[f"node_{kind}"], cluster[kind]
        if wanted > largest:
            raise ResourceError(
                f"resources.{kind.lower()}s_per_worker={wanted:g}, but the largest node has {largest:g} {kind}s; "
                f"lower it or join a larger cluster with --address."
            )
        if wanted * resources.workers > total:
            raise ResourceError(
                f"resources.workers={resources.workers} with {wanted:g} {kind}s each is more than the "
                f"cluster's {total:g} {kind}s; lower resources.workers or resources.{kind.lower()}s_per_worker."
            )
    # A driver of a group takes a sliver of a CPU of its own, and Ray rounds nothing in our favour.
    cpus = resources.cpus_per_worker * resources.workers + (DRIVER_CPU if resources.workers > 1 else 0)
    fit = math.floor(cluster["CPU"] / cpus + 1e-9)
    if resources.gpus_per_worker:
        fit = min(fit, math.floor(cluster["GPU"] / (resources.gpus_per_worker * resources.workers) + 1e-9))
    if fit < 1:
        raise ResourceError(
            f"One run needs {cpus:g} CPUs ({resources.workers} workers and {DRIVER_CPU} for its driver), but the "
            f"cluster has {cluster['CPU']:g}; "
            f"set resources.cpus_per_worker to {0.9 * cluster['CPU'] / resources.workers:g}."
        )
    return min(fit, resources.concurrency or fit)
