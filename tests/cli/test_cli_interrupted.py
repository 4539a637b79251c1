"""Ctrl-C and SIGTERM in the middle of a run: one sentence, an exit code, and a resumable run."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from amlp_ray.data.dataset import PatchDataset
from amlp_ray.training.loggers.metrics_file import read_rows

pytestmark = pytest.mark.ray
TINY = [
    "model.width=24",
    "model.depth=1",
    "model.heads=2",
    "model.decoder_width=16",
    "model.decoder_heads=2",
]


@pytest.mark.parametrize(
    ("number", "code", "options"),
    [
        (signal.SIGINT, 130, []),
        (signal.SIGTERM, 143, []),
        (signal.SIGTERM, 143, ["--workers", "2", "--cpus-per-worker", "0.9"]),
    ],
    ids=["ctrl-c", "sigterm", "sigterm, two workers"],
)
def test_an_interrupted_run_says_how_to_go_on(
    phantom_dataset: PatchDataset,
    tmp_path: Path,
    number: signal.Signals,
    code: int,
    options: list[str],
) -> None:
    out = tmp_path / "run"
    overrides = [word for name in ("epochs=5000", "variant=mae", *TINY) for word in ("--set", name)]
    command = [
        sys.executable,
        "-m",
        "amlp_ray",
        "pretrain",
        phantom_dataset.path,
        "--out",
        str(out),
        *overrides,
        *options,
    ]
    signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # a job in the background hands on that it ignores it
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 120
        while len(read_rows(out / "metrics.jsonl")) < 2:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(number)
        _, output = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == code, output[-2000:]
    assert (
        output.splitlines()[-1]
        == f"amlp-ray: {out} was interrupted; run the same command to resume from its checkpoint."
    )
