"""Import a search space that is a Python function of an Optuna trial.

A study file may come from anybody, and importing a module runs its code. So only functions that
were allowed in this process are imported. Nothing in a study's folder allows them.
"""

from __future__ import annotations

import importlib
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from optuna.trial import Trial

from amlp_ray.errors import ConfigError

_allowed: set[str] = set()

logger = logging.getLogger(__name__)


def allow_code(space: object) -> None:
    """Allow this process to import the function that is a study's space.

    Args:
        space: `space` of a study; a declared one needs no permission.
    """
    if isinstance(space, str) and space not in _allowed:
        _allowed.add(space)
        logger.info("the space is Python code, which is run: %s", space)


def load_function(reference: str, folder: Path | None = None) -> Callable[[Trial], Any]:
    """Import the function that `module:function` refers to.

    Args:
        folder: where the module is looked for before the working directory.

    Raises:
        ConfigError: it was not allowed, there is no such module or function, it fails, or another
            module of that name is in use.
    """
    if reference not in _allowed:
        raise ConfigError(
            f"space: {reference} is Python code, which is not run unasked; read it, then give "
            f"--allow-code, or allow_code=True in Python."
        )
    module_name, _, name = reference.partition(":")
    folders = [str(path.absolute()) for path in (folder, Path()) if path is not None]
    previous_path = list(sys.path)
    sys.path[:0] = folders
    importlib.invalidate_caches()
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        missing = error.name or module_name
        searched = " or ".join(dict.fromkeys(folders))
        raise ConfigError(
            f"space: there is no module {missing!r} in {searched} or among those installed; start "
            f"where it lies, or put its folder on PYTHONPATH."
        ) from None
    except Exception as error:
        raise ConfigError(
            f"space: module {module_name!r} fails: {type(error).__name__}: {error}."
        ) from error
    finally:
        sys.path[:] = previous_path
    source = getattr(module, "__file__", None)
    if folder is not None:
        file = folder / (module_name.replace(".", "/") + ".py")
        if file.is_file() and (source is None or Path(source).resolve() != file.resolve()):
            raise ConfigError(
                f"space: {file} cannot be imported, since a module {module_name!r} is in use "
                f"already, from {source or 'Python itself'}; give it another name."
            )
    function = getattr(module, name, None)
    if not callable(function):
        raise ConfigError(f"space: module {module_name!r} has no function {name!r}.")
    return function
