"""The only way this package opens Ray Data: quiet, and in an order that repeats. Imported where Ray is used."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import ray.data
from ray.data import DataContext, FileShuffleConfig


def quieten() -> None:
    """Turn off progress bars and per-run messages in this process: hundreds of lines for a set of a few files."""
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)  # warns that bars are off


def read_files(files: Sequence[Path], *, columns: Sequence[str] | None, seed: int | None = None) -> ray.data.Dataset:
    """Read Parquet parts as a Ray dataset; with `seed` the order of files differs in every execution."""
    quieten()
    shuffle = None if seed is None else FileShuffleConfig(seed=seed)
    dataset = ray.data.read_parquet([str(file) for file in files], shuffle=shuffle)
    if columns:
        dataset = dataset.select_columns(list(columns))  # Ray reads no others then
    dataset.context.execution_options.preserve_order = True  # else blocks come in the order their tasks end
    return dataset
