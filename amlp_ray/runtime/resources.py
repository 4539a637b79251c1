"""Compare what a run asks for with what the cluster holds.

Ray waits forever for resources that no node has, so this is checked before anything starts.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

from amlp_ray.config import ResourceConfig
from amlp_ray.errors import ResourceError
from amlp_ray.runtime.ray_internals import draining_nodes
from amlp_ray.runtime.session import is_joined

DRIVER_CPU = 0.01  # of a trial that only drives a group of workers; Ray refuses zero
GB = 1e9
ANSWER_S = 30.0  # for a node to answer; Ray gives up one that is gone after about 20
MAX_CONCURRENT = 10_000  # more than any cluster holds
RAY_MEMORY_SHARE = 0.7  # Ray keeps 30 % for its object store
ROUNDING = 1e-9
PENDING_STATES = ("PENDING", "RESCHEDULING")  # of a placement group

ACCELERATOR = "accelerator_type:"  # before the name of a GPU model, in Ray's resources

# `CPU`, `GPU`, `memory` in bytes, and `accelerator_type:A100` where a node has such GPUs
Node = dict[str, float]


@dataclass(frozen=True)
class Cluster:
    """Resources of each node, in Ray's units."""

    nodes: tuple[Node, ...]

    def total(self, kind: str) -> float:
        """Return the sum of a resource over all nodes."""
        return sum(node.get(kind, 0.0) for node in self.nodes)

    def largest(self, kind: str) -> float:
        """Return the most of a resource that one node has."""
        return max((node.get(kind, 0.0) for node in self.nodes), default=0.0)


def cluster_resources() -> Cluster:
    """Return what the nodes of the joined cluster hold, whoever uses it at the moment."""
    import ray

    return Cluster(tuple(_as_node(node["Resources"]) for node in ray.nodes() if node["Alive"]))


def free_resources() -> dict[str, float]:
    """Return what nobody uses at the moment, summed over the joined cluster."""
    import ray

    return dict(ray.available_resources())


def count_pending_requests() -> int:
    """Count the groups of resources that this process, or its workers, wait for."""
    import ray
    from ray.util import placement_group_table

    job_id = ray.get_runtime_context().get_job_id()
    count = 0
    for group_id, group in placement_group_table().items():
        # The id of a placement group ends with that of its job.
        count += group["state"] in PENDING_STATES and group_id.endswith(job_id)
    return count


def answering_nodes() -> set[str]:
    """Return ids of the nodes that take work now.

    Ray believes a node that has just died alive for some seconds. A group that is placed on it
    waits a minute before it is placed anew, so a few seconds are spent here instead.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    draining = draining_nodes()
    task = ray.remote(num_cpus=0, max_retries=0)(_node_id)
    pending = []
    for node in ray.nodes():
        if node["Alive"] and node["NodeID"] not in draining:
            on_node = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            pending.append(task.options(scheduling_strategy=on_node).remote())
    finished, _ = ray.wait(pending, num_returns=len(pending), timeout=ANSWER_S)
    answered = set()
    for reference in finished:
        with suppress(ray.exceptions.RayError):  # the node has died
            answered.add(ray.get(reference))
    return answered


def _node_id() -> str:
    import ray

    return ray.get_runtime_context().get_node_id()


def machine_resources() -> Cluster:
    """Return what this machine holds, without starting Ray."""
    import torch

    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") * RAY_MEMORY_SHARE
    gpus = torch.cuda.device_count()
    node: Node = {"CPU": float(os.cpu_count() or 1), "GPU": float(gpus), "memory": memory}
    for i in range(gpus):
        node[f"{ACCELERATOR}{_accelerator_name(torch.cuda.get_device_name(i))}"] = 1.0
    return Cluster((node,))


def _accelerator_name(device: str) -> str:
    """Return Ray's name of a GPU model: `A100` for `NVIDIA A100-SXM4-80GB`."""
    match = re.match(r"\w+\s+([A-Z0-9]+)", device)
    return match[1] if match else device


def _as_node(resources: Mapping[str, float]) -> Node:
    accelerators = [kind for kind in resources if kind.startswith(ACCELERATOR)]
    kinds = ("CPU", "GPU", "memory", *accelerators)
    return {kind: float(resources.get(kind, 0.0)) for kind in kinds}


def worker_bundle(resources: ResourceConfig) -> dict[str, float]:
    """Return the resources of one worker, by Ray's names."""
    bundle = {"CPU": float(resources.cpus_per_worker)}
    if resources.gpus_per_worker:
        bundle["GPU"] = float(resources.gpus_per_worker)
    if resources.memory_per_worker:
        bundle["memory"] = float(int(resources.memory_per_worker * GB))
    if resources.accelerator:
        # Each node of that model has 1. A small part selects the node without limiting workers.
        bundle[f"{ACCELERATOR}{resources.accelerator}"] = 0.001
    return bundle


def job_bundles(resources: ResourceConfig) -> list[dict[str, float]]:
    """Return what one run asks of the cluster; each bundle lies on one node."""
    workers = [worker_bundle(resources)] * resources.min_workers
    if resources.placement == "strict-pack":
        workers = [{kind: amount * len(workers) for kind, amount in workers[0].items()}]
    if resources.is_single_worker:
        return workers
    return [{"CPU": DRIVER_CPU}, *workers]


def check_machine(resources: ResourceConfig, address: str | None) -> None:
    """Raise ResourceError if this machine has no room for a run that joins no cluster."""
    if address is None and (resources.is_single_worker or not is_joined()):
        jobs_side_by_side(resources, machine_resources())


def jobs_side_by_side(resources: ResourceConfig, cluster: Cluster) -> int:
    """Count how many runs fit at the same time, at most `resources.concurrency`.

    Runs are put on nodes one by one until one finds no room. Reading tasks of a stream are not
    counted: they ask Ray for no CPU, so they start even where workers hold all CPUs.

    Raises:
        ResourceError: not even one run fits.
    """
    _check_accelerator(resources, cluster)
    for kind, amount in worker_bundle(resources).items():
        if not kind.startswith(ACCELERATOR):
            _check_amount(kind, amount, resources, cluster)
    fit = _count_fitting(resources, cluster.nodes)
    if fit < 1:
        raise _no_room(resources, cluster)
    return fit


def _is_strictly_spread(resources: ResourceConfig) -> bool:
    return resources.placement == "strict-spread" and not resources.is_single_worker


def _check_amount(kind: str, amount: float, resources: ResourceConfig, cluster: Cluster) -> None:
    """Raise ResourceError if a worker needs more than a node has, or all workers more than all."""
    setting = {"CPU": "cpus_per_worker", "GPU": "gpus_per_worker", "memory": "memory_per_worker"}
    scale, unit = (GB, " GB of memory") if kind == "memory" else (1, f" {kind}s")
    workers = resources.min_workers
    largest = cluster.largest(kind)
    total = cluster.total(kind)
    if amount > largest:
        raise ResourceError(
            f"resources.{setting[kind]}={amount / scale:g}, but the largest node has "
            f"{largest / scale:.3g}{unit}; lower it or join a larger cluster with --address."
        )
    if amount * workers > total * (1 + ROUNDING):
        raise ResourceError(
            f"resources.workers={workers} with {amount / scale:g}{unit} each is more than the "
            f"cluster's {total / scale:.3g}{unit}; lower resources.workers or "
            f"resources.{setting[kind]}."
        )


def _no_room(resources: ResourceConfig, cluster: Cluster) -> ResourceError:
    """Describe why a run does not fit on the nodes, although their sum would suffice."""
    workers = resources.min_workers
    nodes = ", ".join(f"{node['CPU']:g} CPUs and {node['GPU']:g} GPUs" for node in cluster.nodes)
    each = f"{resources.cpus_per_worker:g} CPUs and {resources.gpus_per_worker:g} GPUs"
    placement = resources.placement
    if placement.startswith("strict"):
        where = "nodes of their own" if _is_strictly_spread(resources) else "one node"
        return ResourceError(
            f"resources.placement={placement} wants {workers} workers of {each} on {where}, but "
            f"there are nodes of {nodes}; use fewer workers, or "
            f"resources.placement={placement.removeprefix('strict-')}."
        )
    return ResourceError(
        f"One run needs {workers} workers of {each} and {DRIVER_CPU} CPUs for its driver, which "
        f"do not fit on nodes of {nodes}; set resources.cpus_per_worker to "
        f"{0.9 * cluster.total('CPU') / workers:g}, or use fewer workers."
    )


def _check_accelerator(resources: ResourceConfig, cluster: Cluster) -> None:
    if not resources.accelerator:
        return
    kinds = set().union(*cluster.nodes)
    models = [kind.removeprefix(ACCELERATOR) for kind in kinds if ACCELERATOR in kind]
    if resources.accelerator not in models:
        raise ResourceError(
            f"resources.accelerator={resources.accelerator}, but nodes have "
            f"{' and '.join(sorted(models)) or 'no GPU'}; leave it out, or join another cluster "
            f"with --address."
        )


def _count_fitting(resources: ResourceConfig, nodes: Sequence[Node]) -> int:
    """Count how many runs find room on the nodes, at most as many as are allowed at a time."""
    free = [dict(node) for node in nodes]
    bundles = job_bundles(resources)
    largest_first = sorted(bundles, key=lambda bundle: -sum(bundle.values()))
    spread = _is_strictly_spread(resources)
    limit = resources.concurrency or MAX_CONCURRENT
    for count in range(limit):
        used: list[Node] = []
        for bundle in largest_first:
            # The driver, whose bundle is the first, may lie beside a worker.
            excluded = used if spread and bundle is not bundles[0] else []
            for node in free:
                if _has_room(node, bundle) and not any(node is other for other in excluded):
                    break
            else:
                return count
            used.append(node)
            for kind, amount in bundle.items():
                node[kind] -= amount
    return limit


def _has_room(node: Node, bundle: Mapping[str, float]) -> bool:
    return all(node.get(kind, 0.0) + ROUNDING >= amount for kind, amount in bundle.items())
