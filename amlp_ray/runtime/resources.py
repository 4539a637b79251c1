"""What a cluster holds and what fits into it: Ray waits for ever for what does not fit, so we ask first."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

from amlp_ray.config import ResourceConfig
from amlp_ray.errors import ResourceError

DRIVER_CPU = 0.01  # of a trial that only drives a group of workers; Ray refuses zero
GB = 1e9
ANSWER_S = 30.0  # that a node may take to answer; Ray gives up one that is gone after about 20
ENOUGH = 10_000  # trials side by side, at most: more than any cluster holds

ACCELERATOR = "accelerator_type:"  # before the name of a node's kind of GPU, in Ray's resources

Node = dict[
    str, float
]  # `CPU`, `GPU`, `memory` in bytes, and `accelerator_type:A100` where it has such


@dataclass(frozen=True)
class Cluster:
    """What each node holds, in Ray's units; `total` sums it."""

    nodes: tuple[Node, ...]

    def total(self, kind: str) -> float:
        return sum(node.get(kind, 0.0) for node in self.nodes)

    def largest(self, kind: str) -> float:
        return max((node.get(kind, 0.0) for node in self.nodes), default=0.0)


def cluster_resources() -> Cluster:
    """What the nodes of the cluster we are joined to hold, whoever uses it at this moment."""
    import ray

    return Cluster(tuple(_kinds(node["Resources"]) for node in ray.nodes() if node["Alive"]))


def free_resources() -> Cluster:
    """The same, of what nobody uses now."""
    from ray._private.state import available_resources_per_node

    return Cluster(tuple(_kinds(node) for node in available_resources_per_node().values()))


def answering_nodes() -> set[str]:
    """Ids of the nodes that take work now. A node that has just died is believed alive for some seconds more.

    A group that is placed on such a node waits a minute before it is placed anew, so we wait here, for seconds.
    """
    import ray
    from ray._private.state import state
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    leaving = set(state.get_draining_nodes())  # take no work
    nodes = [
        node["NodeID"] for node in ray.nodes() if node["Alive"] and node["NodeID"] not in leaving
    ]
    answer = ray.remote(num_cpus=0, max_retries=0)(_node_id)
    asked = [
        answer.options(
            scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)
        ).remote()
        for node in nodes
    ]
    done, _ = ray.wait(asked, num_returns=len(asked), timeout=ANSWER_S)
    found = set()
    for reference in done:
        with suppress(ray.exceptions.RayError):  # dead by now
            found.add(ray.get(reference))
    return found


def _node_id() -> str:
    import ray

    return ray.get_runtime_context().get_node_id()


def machine_resources() -> Cluster:
    """What this machine alone holds, without starting Ray."""
    import torch

    memory = (
        os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") * 0.7
    )  # Ray keeps 30 % for its object store
    gpus = torch.cuda.device_count()
    kinds = {f"{ACCELERATOR}{_kind_of(torch.cuda.get_device_name(i))}": 1.0 for i in range(gpus)}
    return Cluster(
        ({"CPU": float(os.cpu_count() or 1), "GPU": float(gpus), "memory": memory, **kinds},)
    )


def _kind_of(device: str) -> str:
    """As Ray names a GPU: `NVIDIA A100-SXM4-80GB` is an `A100`, `Tesla V100-PCIE` a `V100`."""
    found = re.match(r"\w+\s+([A-Z0-9]+)", device)
    return found[1] if found else device


def _kinds(node: Mapping[str, float]) -> Node:
    counted = {kind: float(node.get(kind, 0.0)) for kind in ("CPU", "GPU", "memory")}
    return counted | {
        kind: float(amount) for kind, amount in node.items() if kind.startswith(ACCELERATOR)
    }


def worker_bundle(resources: ResourceConfig) -> dict[str, float]:
    """Resources of one worker, as Ray names them."""
    bundle = {"CPU": float(resources.cpus_per_worker)}
    if resources.gpus_per_worker:
        bundle["GPU"] = float(resources.gpus_per_worker)
    if resources.memory_per_worker:
        bundle["memory"] = float(int(resources.memory_per_worker * GB))
    if resources.accelerator:
        bundle[f"{ACCELERATOR}{resources.accelerator}"] = (
            0.001  # each node of that kind has 1: it tells, not counts
        )
    return bundle


def job_bundles(resources: ResourceConfig) -> list[dict[str, float]]:
    """What one job (trial, pretraining run) asks of the cluster; each bundle lies on one node."""
    workers = [worker_bundle(resources)] * resources.least_workers
    if resources.placement == "strict-pack":
        workers = [{kind: amount * len(workers) for kind, amount in workers[0].items()}]
    return workers if resources.alone else [{"CPU": DRIVER_CPU}, *workers]


def jobs_side_by_side(resources: ResourceConfig, cluster: Cluster) -> int:
    """How many jobs fit side by side, at most `resources.concurrency`: jobs are put on nodes until one finds no room.

    A stream's reading tasks count nothing: they ask Ray for no CPU, so they start where workers hold all of them.

    Raises:
        ResourceError: where not even one fits: Ray would wait for it for ever.
    """
    config = {"CPU": "cpus_per_worker", "GPU": "gpus_per_worker", "memory": "memory_per_worker"}
    workers = resources.least_workers
    _check_accelerator(resources, cluster)
    for kind, wanted in worker_bundle(resources).items():
        if kind not in config:
            continue
        scale, unit = (GB, " GB of memory") if kind == "memory" else (1, f" {kind}s")
        if wanted > cluster.largest(kind):
            raise ResourceError(
                f"resources.{config[kind]}={wanted / scale:g}, but the largest node has "
                f"{cluster.largest(kind) / scale:.3g}{unit}; lower it or join a larger cluster with --address."
            )
        if wanted * workers > cluster.total(kind) * (1 + 1e-9):
            raise ResourceError(
                f"resources.workers={workers} with {wanted / scale:g}{unit} each is more than the "
                f"cluster's {cluster.total(kind) / scale:.3g}{unit}; lower resources.workers or "
                f"resources.{config[kind]}."
            )
    apart = resources.placement == "strict-spread" and not resources.alone
    fit = _fit(job_bundles(resources), cluster.nodes, resources.concurrency or ENOUGH, apart=apart)
    if fit < 1:
        nodes = ", ".join(
            f"{node['CPU']:g} CPUs and {node['GPU']:g} GPUs" for node in cluster.nodes
        )
        if resources.placement.startswith("strict"):
            where = "nodes of their own" if apart else "one node"
            raise ResourceError(
                f"resources.placement={resources.placement} wants {workers} workers of {resources.cpus_per_worker:g} "
                f"CPUs and {resources.gpus_per_worker:g} GPUs on {where}, but there are nodes of {nodes}; use fewer "
                f"workers, or resources.placement={resources.placement.removeprefix('strict-')}."
            )
        raise ResourceError(
            f"One run needs {workers} workers of {resources.cpus_per_worker:g} CPUs and "
            f"{resources.gpus_per_worker:g} GPUs and {DRIVER_CPU} CPUs for its driver, which do not fit on nodes of "
            f"{nodes}; set resources.cpus_per_worker to {0.9 * cluster.total('CPU') / workers:g}, or use "
            f"fewer workers."
        )
    return fit


def _check_accelerator(resources: ResourceConfig, cluster: Cluster) -> None:
    if not resources.accelerator:
        return
    there = sorted(
        {
            kind.removeprefix(ACCELERATOR)
            for node in cluster.nodes
            for kind in node
            if ACCELERATOR in kind
        }
    )
    if resources.accelerator not in there:
        raise ResourceError(
            f"resources.accelerator={resources.accelerator}, but nodes have {' and '.join(there) or 'no GPU'}; leave "
            f"it out, or join another cluster with --address."
        )


def _fit(
    bundles: Sequence[Mapping[str, float]], nodes: Sequence[Node], most: int, *, apart: bool = False
) -> int:
    """How many times all bundles fit; where `apart`, those of one time lie on different nodes but for the driver's."""
    left = [dict(node) for node in nodes]
    largest_first = sorted(bundles, key=lambda bundle: -sum(bundle.values()))
    for count in range(most):
        taken: list[int] = []
        for bundle in largest_first:
            held = taken if apart and bundle is not bundles[0] else []
            room = next(
                (n for n, node in enumerate(left) if n not in held and _holds(node, bundle)), None
            )
            if room is None:
                return count
            taken.append(room)
            for kind, amount in bundle.items():
                left[room][kind] -= amount
    return most


def _holds(node: Node, bundle: Mapping[str, float]) -> bool:
    return all(node.get(kind, 0.0) + 1e-9 >= amount for kind, amount in bundle.items())
