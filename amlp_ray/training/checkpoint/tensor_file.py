"""Write and read safetensors files whose header and tensors have digests.

safetensors itself has none: a flipped bit of a weight is read without a word. Other programs ignore
the digests, which are two more texts in the header.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from amlp_ray.errors import CheckpointError
from amlp_ray.utils.files import atomic_write, open_regular

HEADER_DIGEST = "header_sha256"
TENSORS_DIGEST = "tensors_sha256"
# Any of them tells our files from those of others, even if another is damaged.
MARKS = (HEADER_DIGEST, TENSORS_DIGEST, "timm_arguments")
HEADER_BYTES = 1 << 20  # where marks are looked for; headers of our files have a few KB
DAMAGE_ERRORS = (SafetensorError, OSError, ValueError, RuntimeError, KeyError, TypeError)

Header = dict[str, str]


def write_tensors(path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> None:
    """Write tensors as safetensors atomically, with digests.

    The library's own writer makes files that colleagues cannot read.
    """
    plain = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
    full = {**header, TENSORS_DIGEST: _digest_tensors(plain)}
    full[HEADER_DIGEST] = _digest_header(full)
    atomic_write(path, save(plain, metadata=full))


def is_own_file(path: Path) -> bool:
    """Return whether amlp-ray wrote a file of tensors, which may be damaged."""
    try:
        with open_regular(path) as file:
            head = file.read(HEADER_BYTES)
    except OSError:
        return False
    return any(mark.encode() in head for mark in MARKS)


def read_header(path: Path) -> Header:
    """Read the header of a file of `write_tensors` and compare it with its digest.

    Raises:
        CheckpointError: the header is damaged, or the file was not written by `write_tensors`.
    """
    if not is_own_file(path):
        raise CheckpointError(
            f"{path} is no safetensors file of amlp-ray; give the encoder.safetensors of a "
            f"pretraining run, or the segmenter.safetensors of a fine-tuning."
        )
    try:
        with safe_open(str(path), framework="pt") as file:
            header = dict(file.metadata() or {})
    except DAMAGE_ERRORS:
        raise _damage(path, "it is cut short or its header cannot be read") from None
    if not header.keys() & {HEADER_DIGEST, TENSORS_DIGEST}:
        raise CheckpointError(
            f"{path} has no digests, so that damage could not be seen: an older amlp_ray wrote it; "
            f"run the same command again, which writes it anew from the last checkpoint."
        )
    if header.pop(HEADER_DIGEST, None) != _digest_header(header):
        raise _damage(path, "its header is not the one that was written")
    return header


def read_tensors(path: Path) -> tuple[Header, dict[str, Tensor]]:
    """Read header and tensors of a file of `write_tensors` and compare both with their digests.

    Raises:
        CheckpointError: the file is damaged, or was not written by `write_tensors`.
    """
    header = read_header(path)
    try:
        with safe_open(str(path), framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  (no dict)
    except DAMAGE_ERRORS:
        raise _damage(path, "its tensors cannot be read") from None
    if header.pop(TENSORS_DIGEST) != _digest_tensors(tensors):
        raise _damage(path, "its tensors are not those that were written")
    return header, tensors


def _damage(path: Path, problem: str) -> CheckpointError:
    return CheckpointError(
        f"{path} is damaged: {problem}; copy it again, or run the command that wrote it again."
    )


def _digest_header(header: Mapping[str, str]) -> str:
    return hashlib.sha256(json.dumps(header, sort_keys=True).encode()).hexdigest()


def _digest_tensors(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
