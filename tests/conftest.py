"""Fixtures for all tests: one Ray session, one small dataset of phantoms, and the real images."""

from __future__ import annotations

import atexit
import os
import secrets
import socket
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from amlp_ray.runtime.session import ENVIRONMENT
from amlp_ray.utils.temporary_folder import temporary_folder

# Read when Ray is imported, so set before any test module imports it.
os.environ.update(ENVIRONMENT)
# Ray asks for a token, as it does of users whose machine has one.
os.environ["RAY_AUTH_MODE"] = "token"
os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
# Of the local S3 server; here, so that Ray's workers have them too.
os.environ.update(
    AWS_ACCESS_KEY_ID="key", AWS_SECRET_ACCESS_KEY="secret", AWS_DEFAULT_REGION="us-east-1"
)

# Those of test runs that were killed are removed too.
_cache = ExitStack()
os.environ["AMLP_RAY_CACHE"] = str(_cache.enter_context(temporary_folder()))
atexit.register(_cache.close)

if TYPE_CHECKING:
    from amlp_ray.data.dataset import PatchDataset

_numbers = count()

REAL_DATA = os.environ.get("AMLP_RAY_DATA", str(Path(__file__).parents[1] / "../shared/data"))


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Use one thread: tensors of tests are too small for more, which would wait for each other."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    """Start one local Ray for the whole run, because starting one takes seconds.

    Ray Train asks its dashboard as each group ends.
    """
    import ray

    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=True,
        log_to_driver=False,
        configure_logging=False,
    )
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Return the folder with busi, busi_large, isic2017 and splits; skip the test without it."""
    path = Path(REAL_DATA).resolve()
    if not (path / "busi").is_dir():
        pytest.skip(f"no real images at {path}; set AMLP_RAY_DATA to their folder")
    return path


@pytest.fixture(scope="session")
def phantom_dataset(ray_session: None, tmp_path_factory: pytest.TempPathFactory) -> PatchDataset:
    """Prepare 60 ultrasound phantoms of 64x64 pixels, split 0.6/0.2/0.2 by image.

    All tests share the dataset, so none may change it.
    """
    from amlp_ray.config import PrepareConfig
    from amlp_ray.data.phantoms import write_phantoms
    from amlp_ray.data.prepare.pipeline import prepare

    folder = tmp_path_factory.mktemp("phantoms")
    source = write_phantoms(folder / "source", kind="ultrasound", count=60, size=64)
    config = PrepareConfig(layout="paired", size=64, group_by="image", fractions=(0.6, 0.2, 0.2))
    return prepare(source, folder / "dataset", config)


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """A local S3 server; its address."""
    import subprocess
    import sys
    import time
    import urllib.request

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(100):
            try:
                urllib.request.urlopen(address, timeout=1).close()
                break
            except OSError:
                time.sleep(0.2)
        yield address
    finally:
        process.kill()


@pytest.fixture
def s3_bucket(s3_server: str) -> str:
    """An empty bucket of its own for each test, as a URI that says where the server is."""
    from pyarrow import fs

    name = f"bucket-{next(_numbers)}"
    fs.S3FileSystem(endpoint_override=s3_server, allow_bucket_creation=True).create_dir(name)
    host = s3_server.removeprefix("http://")
    return f"s3://{name}?endpoint_override={host}&scheme=http"
