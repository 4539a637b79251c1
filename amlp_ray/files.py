"""Writing files so that a reader, or a run after a kill, finds the old content or the new, never half of it."""

import json
import os
from pathlib import Path
from typing import Any


def write_whole(path: Path, content: str | bytes) -> None:
    """Replace the content of `path` in one step."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    partial.write_bytes(content.encode() if isinstance(content, str) else content)
    partial.replace(path)


def read_json(path: Path) -> dict[str, Any] | None:
    """A JSON mapping; None where the file is missing, half-written or something else."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None
