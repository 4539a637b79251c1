"""Silence Ray Data. Imported only where Ray is used."""

from __future__ import annotations

import logging

from ray.data import DataContext
from ray.util.debug import log_once


def silence_ray_data() -> None:
    """Turn off progress bars and per-run messages in this process.

    Ray Data prints hundreds of lines for a set of a few files.
    """
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    # Ray Data warns once that the bars are off; this marks the warning as given.
    log_once("ray_data_progress_manager_disabled")
