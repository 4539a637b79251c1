"""What the tests of a study share."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from helpers.database import Postgres, programs


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Postgres]:
    """A PostgreSQL server of a module's own, whose tests may stop and start it."""
    if programs() is None:
        pytest.skip("no PostgreSQL server is installed")
    os.environ["AMLP_TEST_PASSWORD"] = Postgres.password
    server = Postgres(tmp_path_factory.mktemp("pg"))
    yield server
    server.close()
