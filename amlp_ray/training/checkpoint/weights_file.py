"""Read the tensors of a checkpoint file of others, without running code from it."""

from __future__ import annotations

import pickle
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from amlp_ray.errors import CheckpointError, describe_error

ZIP_MAGIC = b"PK\x03\x04"
PICKLE_MAGIC = b"\x80"
# Types of what training scripts store beside tensors: values of numpy, arguments and paths.
HARMLESS_TYPES = (
    "numpy.dtype",
    "numpy.core.multiarray.scalar",
    "numpy._core.multiarray.scalar",
    "numpy.ndarray",
    "numpy.core.multiarray._reconstruct",
    "numpy._core.multiarray._reconstruct",
    "numpy._core.numeric._frombuffer",
    "argparse.Namespace",
    "types.SimpleNamespace",
    "pathlib.Path",
    "pathlib.PosixPath",
    "pathlib.WindowsPath",
    "pathlib.PurePosixPath",
    "pathlib.PureWindowsPath",
    "pathlib._local.PosixPath",
    "pathlib._local.WindowsPath",
)
# Pickled with a module of torch or timm, whatever its own class is.
MODULE_PACKAGES = ("torch.nn.modules.", "timm.models.", "timm.layers.")
BLOCKED_TYPE = re.compile(r"GLOBAL (\S+?)(?: was|$|\.? )")
UNPICKLER_REASON = re.compile(r"WeightsUnpickler error:\s+([^\n]{1,100})")
DECIMAL_DTYPES = {torch.float64, torch.float32, torch.float16, torch.bfloat16}

Tensors = dict[str, Tensor]


class _Ignored:
    """Stand in for an object of `HARMLESS_TYPES`: it takes all arguments and keeps nothing."""

    def __init__(self, *arguments: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


def read_tensors(file: Path) -> Tensors:
    """Return all tensors of a file, by their names joined with dots through nested dictionaries.

    The content tells the format, not the suffix. Pickled objects other than tensors are never
    built: a stand-in takes the place of the harmless ones, and others are refused.

    Raises:
        CheckpointError: the file cannot be read, or holds no tensors or objects that could run
            code.
    """
    try:
        with file.open("rb") as stream:
            head = stream.read(len(ZIP_MAGIC))
    except OSError as error:
        raise CheckpointError(
            f"{file} cannot be read ({error.strerror or error}); check its rights."
        ) from None
    is_pickle = head == ZIP_MAGIC or head.startswith(PICKLE_MAGIC)
    content = _load_pickle(file) if is_pickle else _load_safetensors(file)
    tensors = dict(_flatten(content, ""))
    if not tensors:
        raise CheckpointError(
            f"{file} holds no tensors, but a state dict of a ViT is needed; give a file of weights."
        )
    return tensors


def check_numbers(tensors: Mapping[str, Tensor], label: str) -> None:
    """Raise CheckpointError unless all weights are finite decimal numbers."""
    for problem, keys in (
        ("whole numbers", [k for k, v in tensors.items() if v.dtype not in DECIMAL_DTYPES]),
        ("NaN or infinite values", [k for k, v in tensors.items() if not _is_finite(v)]),
    ):
        if keys:
            plural = "s" if len(keys) > 1 else ""
            raise CheckpointError(
                f"{label} has {problem} in {len(keys)} tensor{plural} such as {keys[0]}, but "
                f"weights are finite decimal numbers; give other weights."
            )


def _is_finite(tensor: Tensor) -> bool:
    return tensor.dtype not in DECIMAL_DTYPES or bool(torch.isfinite(tensor).all())


def _load_safetensors(file: Path) -> Tensors:
    try:
        return load_file(file)
    except Exception as error:  # the file may be anything
        raise CheckpointError(
            f"{file} is cut short, or no file of weights ({describe_error(error)}); give a state "
            f"dict as .safetensors, or as torch.save writes it."
        ) from None


def _load_pickle(file: Path) -> Any:
    stand_ins: list[Callable[..., Any] | tuple[Callable[..., Any], str]]
    stand_ins = [(_Ignored, name) for name in HARMLESS_TYPES]
    try:
        # A stream, since torch goes by the suffix of a path. It warns of pickle protocols that it
        # reads all the same.
        with (
            file.open("rb") as stream,
            safe_globals(stand_ins),
            warnings.catch_warnings(action="ignore"),
        ):
            return torch.load(stream, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise _refused(file, error) from None
    except Exception as error:  # the file may be anything
        raise _unreadable(file, error) from None


def _refused(file: Path, error: Exception) -> CheckpointError:
    """Say which objects in a file are no tensors."""
    try:
        with file.open("rb") as stream:
            types = get_unsafe_globals_in_checkpoint(stream)
    except Exception:  # not of torch's zip format
        types = BLOCKED_TYPE.findall(str(error))
    types = sorted(name for name in types if name not in HARMLESS_TYPES)
    if any(name.startswith(MODULE_PACKAGES) for name in types):
        return CheckpointError(
            f"{file} holds a whole pickled model, and loading it would run code from the file; "
            f"where it was trained, save its weights alone: torch.save(model.state_dict(), FILE)."
        )
    if types:
        return CheckpointError(
            f"{file} holds an object of type {types[0]} beside its tensors, and loading it could "
            f"run code from the file; where it was trained, save its weights alone: "
            f"torch.save(model.state_dict(), FILE)."
        )
    return _unreadable(file, error)


def _unreadable(file: Path, error: Exception) -> CheckpointError:
    if "TorchScript" in str(error):
        return CheckpointError(
            f"{file} is a TorchScript program, but a state dict is needed; where it was made, save "
            f"its weights alone: torch.save(model.state_dict(), FILE)."
        )
    # torch advises to load without its protection, so all but its reason is left out.
    reason = UNPICKLER_REASON.search(str(error))
    what = reason[1].rstrip(". ") if reason else type(error).__name__
    return CheckpointError(
        f"{file} cannot be read as weights ({what}): it is damaged, or no state dict; give one as "
        f".safetensors, or as torch.save writes it."
    )


def _flatten(content: Any, prefix: str) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of nested dictionaries with their full names."""
    if isinstance(content, Tensor) and prefix:
        yield prefix.removesuffix("."), content
    elif isinstance(content, dict):
        for key, value in content.items():
            if isinstance(key, str):
                yield from _flatten(value, f"{prefix}{key}.")
