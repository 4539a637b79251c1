"""Keeping Ray Data from talking. Imported where Ray is used."""

from __future__ import annotations

import logging

from ray.data import DataContext


def quieten() -> None:
    """Turn off progress bars and per-run messages in this process: hundreds of lines for a set of a few files."""
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    logging.getLogger("ray.data._internal.progress").setLevel(
        logging.ERROR
    )  # warns that bars are off
