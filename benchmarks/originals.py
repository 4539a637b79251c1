"""Import modules of public repositories that were written for older versions of timm and numpy.

Used by `step.py` for speed and by `tests/method/test_against_originals.py` for exactness. The
repositories are read from their folders; none of their code is part of this project.
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
    """Import `module` from a repository's `folder`.

    Build its models inside the context; they work outside as well. Inside, timm's Block accepts the
    former `qk_scale` (the originals pass its default None) and numpy has its former `float`.
    Afterwards timm, numpy, `sys.path` and `sys.modules` are as before, so that two repositories
    with a package `util` of their own do not collide.

    Raises:
        ModuleNotFoundError: the folder has no such module, or the module needs a package that is
            not installed.
    """
    block = vision_transformer.Block

    def block_with_qk_scale(
        *args: Any, qk_scale: None = None, **kwargs: Any
    ) -> vision_transformer.Block:
        return block(*args, **kwargs)

    with (
        mock.patch.object(vision_transformer, "Block", block_with_qk_scale),
        mock.patch.object(np, "float", float, create=True),
        mock.patch.object(sys, "path", [str(folder), *sys.path]),
        _hidden_modules(module.partition(".")[0], "util"),
    ):
        yield importlib.import_module(module)


@contextmanager
def _hidden_modules(*packages: str) -> Iterator[None]:
    """Hide packages and their modules from `sys.modules`, and restore them afterwards."""

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
