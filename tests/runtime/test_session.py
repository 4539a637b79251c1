"""Joining a cluster, and what fits into one."""

from __future__ import annotations

import subprocess
import sys
import time
import urllib.request

import pytest

from amlp_ray.config import ResourceConfig
from amlp_ray.errors import ResourceError
from amlp_ray.runtime.ray_internals import HeadAnswer
from amlp_ray.runtime.resources import Cluster, cluster_resources, free_resources, jobs_side_by_side
from amlp_ray.runtime.session import ray_session


def machine(cpus: float, gpus: float = 0, nodes: int = 1, gb: float = 8) -> Cluster:
    return Cluster(({"CPU": cpus, "GPU": gpus, "memory": gb * 1e9},) * nodes)


UNEVEN = Cluster(
    (
        {"CPU": 3.0, "GPU": 0.0, "memory": 8e9},
        {"CPU": 3.0, "GPU": 1.0, "memory": 8e9},
        {"CPU": 1.0, "GPU": 1.0},
    )
)


@pytest.mark.parametrize(
    ("resources", "cluster", "fit"),
    [
        (ResourceConfig(), machine(2), 2),
        (ResourceConfig(concurrency=1), machine(2), 1),
        (ResourceConfig(cpus_per_worker=0.5), machine(2), 4),
        (ResourceConfig(workers=2, cpus_per_worker=0.9), machine(2), 1),
        (ResourceConfig(workers=2, cpus_per_worker=0.9), machine(4), 2),
        (ResourceConfig(gpus_per_worker=1), machine(16, 4), 4),
        (ResourceConfig(gpus_per_worker=0.5), machine(16, 1), 2),
        (
            ResourceConfig(workers=4, gpus_per_worker=1, cpus_per_worker=2),
            machine(16, 2, nodes=4),
            2,
        ),
        (
            ResourceConfig(cpus_per_worker=2),
            UNEVEN,
            2,
        ),  # of 7 CPUs in all: what is left over on a node fits nobody
        (ResourceConfig(cpus_per_worker=2, gpus_per_worker=1), UNEVEN, 1),
        (ResourceConfig(memory_per_worker=3), machine(16), 2),
        (ResourceConfig(gpus_per_worker=0.25), machine(16, 2), 8),
    ],
)
def test_as_many_runs_side_by_side_as_the_scarcest_resource_holds(
    resources: ResourceConfig, cluster: Cluster, fit: int
) -> None:
    assert jobs_side_by_side(resources, cluster) == fit


@pytest.mark.parametrize(
    ("resources", "cluster", "message"),
    [
        (ResourceConfig(gpus_per_worker=1), machine(2), "largest node has 0 GPUs"),
        (ResourceConfig(cpus_per_worker=3), machine(2, nodes=4), "largest node has 2 CPUs"),
        (ResourceConfig(workers=3), machine(2), "more than the cluster's 2 CPUs"),
        (ResourceConfig(workers=2), machine(2), "set resources.cpus_per_worker to 0.9"),
        (
            ResourceConfig(memory_per_worker=9),
            machine(2),
            "memory_per_worker=9, but the largest node has 8 GB",
        ),
        (
            ResourceConfig(workers=3, cpus_per_worker=2),
            UNEVEN,
            "do not fit on nodes of 3 CPUs and 0 GPUs, 3 CPUs",
        ),
    ],
)
def test_what_no_node_can_hold_is_refused(
    resources: ResourceConfig, cluster: Cluster, message: str
) -> None:
    with pytest.raises(ResourceError, match=message):
        jobs_side_by_side(resources, cluster)


@pytest.mark.ray
def test_the_cluster_of_the_tests_has_two_cpus(ray_session: None) -> None:
    assert cluster_resources().total("CPU") == 2
    assert cluster_resources().largest("memory") > 0
    assert free_resources()["CPU"] <= 2


@pytest.mark.ray
def test_gauges_of_a_trial_are_exported_and_stay(ray_session: None) -> None:
    import ray

    from amlp_ray.runtime.dashboard_metrics import TrialGauges

    gauges = TrialGauges("gauge-study", "trial 7")
    gauges.update(
        {"loss": 0.25, "ratio": 0.5, "epoch": 3, "memory": 1.5, "mfu": None}
    )  # a GPU of unknown peak
    node = ray.nodes()[0]
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    exported: list[str] = []
    deadline = time.monotonic() + 60
    while len(exported) < 3 and time.monotonic() < deadline:
        time.sleep(1)
        text = urllib.request.urlopen(url, timeout=5).read().decode()
        exported = [
            line
            for line in text.splitlines()
            if line.startswith("ray_amlp_") and "gauge-study" in line
        ]
    gauges.close()
    assert all('trial="trial 7"' in line for line in exported)
    assert {line.partition("{")[0]: float(line.split()[-1]) for line in exported} == {
        "ray_amlp_loss": 0.25,
        "ray_amlp_ratio": 0.5,
        "ray_amlp_memory": 1.5,
    }


def test_an_address_where_nobody_answers_is_told_within_seconds() -> None:
    code = (
        "from amlp_ray.runtime.session import ray_session\n"
        "from amlp_ray.errors import ResourceError\n"
        "try:\n    ray_session('127.0.0.1:9').__enter__()\n"
        "except ResourceError as error:\n    print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.startswith("No Ray cluster answers at '127.0.0.1:9'")


@pytest.fixture
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let no test join or leave the session that all tests share."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr("ray.init", lambda **_: pytest.fail("Ray was asked to join"))
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setattr("ray.shutdown", lambda: None)


@pytest.mark.usefixtures("no_ray")
@pytest.mark.parametrize(
    ("found", "message"),
    [
        (
            ["10.0.0.1:6379", "10.0.0.1:6380"],
            "--address auto could mean 2 Ray clusters on this machine: 10.0.0.1:6379, "
            "10.0.0.1:6380; give one of these addresses.",
        ),
        ([], "No Ray cluster runs on this machine; start one with `ray start --head`"),
    ],
)
def test_auto_joins_no_cluster_by_chance(
    found: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("amlp_ray.runtime.session.local_clusters", lambda: found)
    with pytest.raises(ResourceError) as error, ray_session("auto"):
        pass
    assert str(error.value).startswith(message)


@pytest.mark.usefixtures("no_ray")
@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (HeadAnswer.WANTS_TOKEN, ("wants a token", "RAY_AUTH_MODE=token", "RAY_AUTH_TOKEN")),
        (HeadAnswer.REFUSES_TOKEN, ("wants another token than yours", "RAY_AUTH_TOKEN")),
        (HeadAnswer.NONE, ("No Ray cluster answers", "because")),
    ],
)
def test_why_a_cluster_cannot_be_joined_is_told(
    answer: HeadAnswer, words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "head:6379")
    asked: list[str] = []

    def ask(address: str, timeout_s: float, *, use_stored_token: bool) -> tuple[HeadAnswer, str]:
        asked.append(address)
        return answer, "because"

    monkeypatch.setattr("amlp_ray.runtime.session.ask_head", ask)
    with pytest.raises(ResourceError) as error, ray_session("auto"):
        pass
    assert asked == ["head:6379"]
    assert all(word in str(error.value) for word in ("'head:6379'", *words))


@pytest.mark.usefixtures("no_ray")
def test_a_cluster_of_another_version_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def init(**_: object) -> None:
        raise RuntimeError("Version mismatch: the cluster was started with\n  Ray: 2.9.0")

    monkeypatch.setattr("ray.init", init)
    answer = (HeadAnswer.ACCEPTS, "")
    monkeypatch.setattr("amlp_ray.runtime.session.ask_head", lambda *_, **__: answer)
    with pytest.raises(ResourceError) as error, ray_session("head:6379"):
        pass
    assert str(error.value).startswith(
        "The Ray cluster at 'head:6379' cannot be joined (Version mismatch: the cluster was "
        "started with Ray: 2.9.0); check the address"
    )
