"""Run all checks of a dataset and collect what they find."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from amlp_ray.data.check import duplicates, image_checks, label_checks
from amlp_ray.data.check.finding import SEVERITIES, Finding
from amlp_ray.data.check.measure import measure_dataset
from amlp_ray.data.dataset import PatchDataset
from amlp_ray.data.path import DataPath
from amlp_ray.errors import DataError


@dataclass(frozen=True)
class Report:
    """All checks of a dataset, with what they found."""

    dataset: PatchDataset
    against: PatchDataset | None
    checks: tuple[Finding, ...]

    @property
    def findings(self) -> tuple[Finding, ...]:
        """Checks that found something, worst first."""
        present = [finding for finding in self.checks if finding.count]
        present.sort(key=lambda finding: -finding.count / max(1, finding.of))
        return tuple(sorted(present, key=lambda finding: SEVERITIES.index(finding.severity)))

    @property
    def clear(self) -> tuple[Finding, ...]:
        """Checks that found nothing."""
        checked = [finding for finding in self.checks if finding.gap is None]
        return tuple(finding for finding in checked if not finding.count)

    @property
    def gaps(self) -> tuple[Finding, ...]:
        """Checks that could not be made."""
        return tuple(finding for finding in self.checks if finding.gap is not None)

    @property
    def clean(self) -> bool:
        """Whether there is neither a leak nor a warning."""
        return all(finding.severity == "note" for finding in self.findings)

    def as_dict(self) -> dict[str, Any]:
        """Return the report in plain values, for JSON."""
        return {
            "dataset": self.dataset.path,
            "against": None if self.against is None else self.against.path,
            "clean": self.clean,
            "findings": [asdict(finding) for finding in self.findings],
            "clear": [finding.key for finding in self.clear],
            "not_checked": {finding.key: finding.gap for finding in self.gaps},
        }


def check_dataset(
    dataset: str | Path | DataPath | PatchDataset,
    *,
    against: str | Path | DataPath | PatchDataset | None = None,
) -> Report:
    """Look for leaks, doubtful labels, doubtful images and uneven splits in a dataset.

    Reads every pixel once, a row group at a time in a few threads; memory stays below 1 GiB.
    `amlp_ray.data.check.html.write_report` shows the report with pictures.

    Args:
        dataset: path, URI or open dataset.
        against: another dataset, such as the unlabeled one that an encoder is pretrained on. Images
            that one of the two holds out and the other has in another split are reported.

    Raises:
        DataError: a dataset cannot be opened, or a part is damaged.
    """
    opened = _open(dataset)
    other = None if against is None else _open(against)
    if other is not None and other.path == opened.path:
        raise DataError(
            f"{opened.path} cannot be compared with itself; name another dataset with --against."
        )
    table = measure_dataset(opened)
    checks = (
        *duplicates.findings(table, opened.manifest.group_unit, other),
        *label_checks.findings(table, opened),
        *image_checks.findings(table, opened),
    )
    return Report(opened, other, checks)


def _open(dataset: str | Path | DataPath | PatchDataset) -> PatchDataset:
    return dataset if isinstance(dataset, PatchDataset) else PatchDataset.open(dataset)
