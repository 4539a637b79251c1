"""Writing files so that a reader, or a run after a kill, finds the old content or the new, never half of it."""

import os
from pathlib import Path


def write_whole(path: Path, text: str) -> None:
    """Replace the content of `path` in one step."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
