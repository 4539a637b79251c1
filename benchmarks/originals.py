"""Imports modules of public repositories that were written for a timm and a numpy of long ago.

Used by `step.py` for speed and by `tests/method/test_against_originals.py` for exactness. The repositories are read
where they lie; none of their code is part of this project.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import numpy as np
from timm.models import vision_transformer


@contextmanager
def original(folder: Path, module: str) -> Iterator[ModuleType]:
    """Import `module` from a repository's `folder`; build its models inside the context, use them outside as well.

    Inside, timm's Block takes the former `qk_scale` (None, the default, is all that the originals pass) and numpy has
    its former `float`. Afterwards timm, numpy, `sys.path` and `sys.modules` are as before, so that two repositories
    with a package `util` of their own do not meet.

    Raises:
        ModuleNotFoundError: the folder has no such module, or the module needs a package that is not installed.
    """
    block = vision_transformer.Block

    def block_of_old(*args: Any, qk_scale: None = None, **kwargs: Any) -> vision_transformer.Block:
        return block(*args, **kwargs)

    with (
        mock.patch.object(vision_transformer, "Block", block_of_old),
        mock.patch.object(np, "float", float, create=True),
        mock.patch.object(sys, "path", [str(folder), *sys.path]),
        _forgetting(module.partition(".")[0], "util"),
    ):
        yield importlib.import_module(module)


@contextmanager
def _forgetting(*packages: str) -> Iterator[None]:
    """Hide these packages and their modules from `sys.modules`, and put back afterwards what was there before."""

    def loaded() -> dict[str, ModuleType]:
        return {
            name: module
            for name, module in sys.modules.items()
            if name.partition(".")[0] in packages
        }

    before = loaded()
    for name in before:
        del sys.modules[name]
    importlib.invalidate_caches()
    try:
        yield
    finally:
        for name in loaded():
            del sys.modules[name]
        sys.modules.update(before)
