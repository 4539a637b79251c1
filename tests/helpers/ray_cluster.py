"""Run on three nodes of one machine, of which one is killed and one is added, for `test_nodes.py`.

Nodes are raylets of their own, so they cannot share the session of the other tests.

    python ray_cluster.py DATA OUT EPOCHS
"""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from amlp_ray.config import PretrainConfig, ResourceConfig
from amlp_ray.launch.run_spec import RunSpec
from amlp_ray.runtime.session import ENVIRONMENT
from amlp_ray.training.loggers.metrics_file import read_rows
from amlp_ray.utils.event_log import read_events

os.environ.update(ENVIRONMENT)

import ray
from ray.cluster_utils import Cluster

from amlp_ray.launch.launcher import run_on_ray
from amlp_ray.runtime import worker_group

WORK_S = 0.4  # of an epoch, at least: nodes take seconds to come and go
worker_group.RESIZE_S = 2.0


def unhurried(out: Path) -> bool:
    """Never stops the run, and makes its epochs last until the added node is at work."""
    time.sleep(WORK_S if started(out) < 3 else 0)
    return False


def run(data: str, out: Path, epochs: int) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    head = {
        "num_cpus": 0,
        "include_dashboard": True,
        "dashboard_port": port,
    }  # Ray Train asks it as each group ends
    cluster = Cluster(initialize_head=True, head_node_args=head)
    nodes = [cluster.add_node(num_cpus=1) for _ in range(3)]
    ray.init(address=cluster.address, log_to_driver=False)
    cluster.wait_for_nodes()
    config = PretrainConfig.model_validate(
        {"epochs": epochs, "model": {"width": 24, "depth": 1, "heads": 2, "decoder_width": 16}}
    )
    run_spec = RunSpec(
        config=config,
        data=data,
        folder=out,
        resources=ResourceConfig(workers=(1, 3), cpus_per_worker=1),
    )
    failure: list[BaseException] = []

    def train() -> None:
        try:
            run_on_ray(run_spec, name="nodes", should_stop=partial(unhurried, out))
        except BaseException as error:
            failure.append(error)

    thread = threading.Thread(target=train)
    thread.start()  # nodes can be added from the main thread only
    wait_for(lambda: len(read_rows(out / "metrics.jsonl")) >= 2, thread)
    cluster.remove_node(nodes[1], allow_graceful=False)
    wait_for(
        lambda: started(out) >= 2 and read_rows(out / "metrics.jsonl")[-1]["workers"] == 2, thread
    )
    cluster.add_node(num_cpus=1)
    thread.join()
    ray.shutdown()
    cluster.shutdown()
    if failure:
        raise failure[0]


def started(out: Path) -> int:
    return sum(event["event"] == "started" for event in read_events(out))


def wait_for(what: Callable[[], bool], thread: threading.Thread) -> None:
    while thread.is_alive() and not what():
        time.sleep(0.1)


if __name__ == "__main__":
    run(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
