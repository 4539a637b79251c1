"""What a run asks of a cluster: a worker, several, or as many as there are."""

from __future__ import annotations

from typing import Any

import pytest

from amlp_ray.config import ResourceConfig
from amlp_ray.errors import ResourceError
from amlp_ray.runtime.resources import Cluster, job_bundles, jobs_side_by_side


def resources_of(workers: Any, **options: Any) -> ResourceConfig:
    return ResourceConfig(workers=workers, **options)


@pytest.mark.parametrize(
    ("workers", "cpus"),
    [(1, [1]), (2, [0.01, 1, 1]), ((1, 4), [0.01, 1]), ((3, 4), [0.01, 1, 1, 1])],
    ids=str,
)
def test_a_run_asks_for_its_least_workers_and_a_driver_where_there_may_be_several(
    workers: Any, cpus: list[float]
) -> None:
    assert [bundle["CPU"] for bundle in job_bundles(resources_of(workers))] == cpus


def test_an_elastic_run_fits_where_its_least_workers_do() -> None:
    small = Cluster(({"CPU": 4.0, "GPU": 0.0, "memory": 8e9},))
    assert jobs_side_by_side(resources_of((2, 64)), small) >= 1
    with pytest.raises(
        ResourceError,
        match=r"resources\.workers=5 with 1 CPUs each is more than the cluster's 4 CPUs",
    ):
        jobs_side_by_side(resources_of((5, 64)), small)
    with pytest.raises(ResourceError, match=r"One run needs 4 workers .* for its driver"):
        jobs_side_by_side(resources_of((4, 64)), small)


TWO_NODES = Cluster(
    ({"CPU": 4.0, "GPU": 2.0, "accelerator_type:A100": 1.0}, {"CPU": 4.0, "GPU": 0.0})
)


@pytest.mark.parametrize(
    ("placement", "workers", "side_by_side"),
    [
        ("pack", 3, 2),
        ("spread", 8, 0),
        ("strict-pack", 4, 1),
        ("strict-pack", 5, 0),
        ("strict-pack", 1, 8),
        ("strict-spread", 2, 3),
        ("strict-spread", 3, 0),
        ("strict-spread", 1, 8),
    ],
)
def test_workers_are_counted_as_they_are_placed(
    placement: Any, workers: int, side_by_side: int
) -> None:
    """Two nodes of 4 CPUs; what a driver takes beside its workers counts too."""
    resources = resources_of(workers, placement=placement)
    if side_by_side:
        assert jobs_side_by_side(resources, TWO_NODES) == side_by_side
        return
    with pytest.raises(
        ResourceError,
        match=f"placement={placement}" if "strict" in placement else "which do not fit",
    ):
        jobs_side_by_side(resources, TWO_NODES)


def test_a_kind_of_gpu_that_no_node_has_is_refused_by_name() -> None:
    assert jobs_side_by_side(resources_of(1, accelerator="A100", gpus_per_worker=1), TWO_NODES) == 2
    with pytest.raises(
        ResourceError, match=r"resources\.accelerator=H100, but nodes have A100; leave it out"
    ):
        jobs_side_by_side(resources_of(2, accelerator="H100", gpus_per_worker=1), TWO_NODES)
    with pytest.raises(ResourceError, match="but nodes have no GPU"):
        jobs_side_by_side(
            resources_of(1, accelerator="A100", gpus_per_worker=1),
            Cluster(({"CPU": 4.0, "GPU": 0.0},)),
        )
