"""What a run asks of a cluster: a worker, several, or as many as there are."""

from __future__ import annotations

from typing import Any

import pytest

from amlp_ray.config import ResourceSettings
from amlp_ray.errors import ResourceError
from amlp_ray.runtime.capacity import Cluster, job_bundles, jobs_side_by_side


def resources_of(workers: Any, **given: Any) -> ResourceSettings:
    return ResourceSettings(workers=workers, **given)


@pytest.mark.parametrize(
    ("workers", "cpus"), [(1, [1]), (2, [0.01, 1, 1]), ((1, 4), [0.01, 1]), ((3, 4), [0.01, 1, 1, 1])], ids=str
)
def test_a_run_asks_for_its_least_workers_and_a_driver_where_there_may_be_several(
    workers: Any, cpus: list[float]
) -> None:
    assert [bundle["CPU"] for bundle in job_bundles(resources_of(workers))] == cpus


def test_an_elastic_run_fits_where_its_least_workers_do() -> None:
    small = Cluster(({"CPU": 4.0, "GPU": 0.0, "memory": 8e9},))
    assert jobs_side_by_side(resources_of((2, 64)), small) >= 1
    with pytest.raises(ResourceError, match=r"resources\.workers=5 with 1 CPUs each is more than the cluster's 4 CPUs"):
        jobs_side_by_side(resources_of((5, 64)), small)
    with pytest.raises(ResourceError, match=r"One run needs 4 workers .* for its driver"):
        jobs_side_by_side(resources_of((4, 64)), small)
