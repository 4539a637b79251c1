"""What ties a study's folder to its Optuna studies, and which version of the layout it has."""

from __future__ import annotations

from pathlib import Path

from amlp_ray.errors import StudyError
from amlp_ray.utils.files import atomic_write

FORMAT = 1  # of the study folder; raised when an older one can no longer be read


def read_id(folder: Path) -> str | None:
    """Read the id of a study folder; None before the study begins."""
    file = folder / "id"
    if not file.is_file():
        return None
    return file.read_text(errors="replace").strip() or None


def write_id(folder: Path, folder_id: str) -> None:
    """Write the id of a study folder and the format of this version."""
    atomic_write(folder / "format", str(FORMAT))
    atomic_write(folder / "id", folder_id)


def check_format(folder: Path) -> None:
    """Refuse a study that was begun by a version whose folders look otherwise.

    Raises:
        StudyError: it was.
    """
    if not (folder / "id").is_file():
        return
    file = folder / "format"
    stored_format = file.read_text(errors="replace").strip() if file.is_file() else "0"
    if stored_format != str(FORMAT):
        raise StudyError(
            f"{folder} has study format {stored_format[:20]!r}, and this version of amlp-ray reads "
            f"format {FORMAT}; use the version that began the study, or begin a new one."
        )
