"""A trial's main metrics as Ray metrics, for the cluster's dashboard, Prometheus and Grafana."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

REFRESH_S = 5.0  # a gauge that is not set again vanishes after about two export intervals of 10 s

GAUGES = {
    "loss": "Pretraining loss of the last epoch",
    "ratio": "Masking ratio of the last epoch",
    "lr": "Learning rate at the end of the last epoch",
    "grad_norm": "Mean gradient norm of the last epoch, before clipping",
    "images_per_second": "Images trained per second, by all workers",
    "images_per_second_per_worker": "Images trained per second and worker",
    "mfu": "Share of the device's peak arithmetic that training uses",
    "memory": "Most memory held so far, in GB: of the GPU, or of the first worker's process",
    "wait_share": "Share of the epoch spent waiting for data",
    "dsc": "DSC of the probe at the last rung",
}


class TrialGauges:
    """Export gauges `amlp_loss`, `amlp_ratio`, ... with tags for study and trial.

    A thread sets them again every few seconds until `close`.
    """

    def __init__(self, study: str, trial: str) -> None:
        from ray.util.metrics import Gauge

        tags = {"study": study, "trial": trial}
        self._gauges = {}
        for name, description in GAUGES.items():
            gauge = Gauge(f"amlp_{name}", description, tag_keys=tuple(tags))
            gauge.set_default_tags(tags)
            self._gauges[name] = gauge
        self._values: dict[str, float] = {}
        self._closed = threading.Event()
        threading.Thread(target=self._refresh, name="amlp-gauges", daemon=True).start()

    def update(self, metrics: Mapping[str, Any]) -> None:
        """Show an epoch's metrics; those without a gauge or a value are skipped."""
        for name in self._gauges:
            if metrics.get(name) is not None:
                self._values[name] = float(metrics[name])
        self._set_gauges()

    def close(self) -> None:
        """Let the gauges vanish."""
        self._closed.set()

    def _refresh(self) -> None:
        while not self._closed.wait(REFRESH_S):
            self._set_gauges()

    def _set_gauges(self) -> None:
        for name, value in list(self._values.items()):
            self._gauges[name].set(value)
