"""Running all checks, and what comes of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from amlp_ray.data.check import duplicates, image_checks, label_checks
from amlp_ray.data.check.finding import SEVERITIES, Finding
from amlp_ray.data.check.measure import measured
from amlp_ray.data.dataset import PatchDataset
from amlp_ray.data.path import DataPath
from amlp_ray.errors import DataError


@dataclass(frozen=True)
class Report:
    """All that was looked for in a dataset: what is there, worst first; what is not; what could not be looked for."""

    dataset: PatchDataset
    against: PatchDataset | None
    looked_for: tuple[Finding, ...]

    @property
    def findings(self) -> tuple[Finding, ...]:
        there = [finding for finding in self.looked_for if finding.count]
        return tuple(
            sorted(there, key=lambda f: (SEVERITIES.index(f.severity), -f.count / max(1, f.of)))
        )

    @property
    def clear(self) -> tuple[Finding, ...]:
        return tuple(
            finding for finding in self.looked_for if not finding.count and finding.gap is None
        )

    @property
    def gaps(self) -> tuple[Finding, ...]:
        return tuple(
            finding for finding in self.looked_for if not finding.count and finding.gap is not None
        )

    @property
    def clean(self) -> bool:
        """There is neither a leak nor a warning."""
        return all(finding.severity == "note" for finding in self.findings)

    def as_dict(self) -> dict[str, Any]:
        """The report in plain values, for JSON."""
        return {
            "dataset": self.dataset.path,
            "against": None if self.against is None else self.against.path,
            "clean": self.clean,
            "findings": [finding.as_dict() for finding in self.findings],
            "clear": [finding.key for finding in self.clear],
            "not_looked_for": {finding.key: finding.gap for finding in self.gaps},
        }

    def write(self, folder: str | Path) -> tuple[Path, Path]:
        """Write check.html and check.png into `folder`, which is made; return their paths.

        Both hold images of the dataset: they are as private as it is.

        Raises:
            DataError: the folder cannot be written, or a part of the dataset is damaged.
        """
        from amlp_ray.data.check.contact_sheet import read_pictures, write_sheet
        from amlp_ray.data.check.html import write_page

        folder = Path(folder)
        pictures = read_pictures(self)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            return write_page(self, pictures, folder / "check.html"), write_sheet(
                self, pictures, folder / "check.png"
            )
        except OSError as error:
            raise DataError(
                f"{folder} cannot be written ({error.strerror}); choose another with --out."
            ) from None


def check_dataset(
    dataset: str | Path | DataPath | PatchDataset,
    *,
    against: str | Path | DataPath | PatchDataset | None = None,
    progress: Callable[[str], None] | None = None,
) -> Report:
    """Look for leaks, doubtful labels, doubtful images and uneven splits in a dataset.

    Reads every pixel once, a row group at a time in a few threads; memory stays below 1 GiB.

    Args:
        dataset: path, URI or open dataset.
        against: another dataset, such as the unlabelled one that an encoder is pretrained on: images that one of the
            two holds out and the other has in another split are told.
        progress: is told a sentence now and then.

    Raises:
        DataError: a dataset cannot be opened, or a part is damaged.
    """
    opened = dataset if isinstance(dataset, PatchDataset) else PatchDataset.open(dataset)
    other = (
        against
        if against is None or isinstance(against, PatchDataset)
        else PatchDataset.open(against)
    )
    if other is not None and other.path == opened.path:
        raise DataError(
            f"{opened.path} cannot be compared with itself; name another dataset with --against."
        )
    table = measured(opened, progress)
    return Report(
        opened,
        other,
        (
            *duplicates.findings(table, other),
            *label_checks.findings(table, opened),
            *image_checks.findings(table, opened),
        ),
    )
