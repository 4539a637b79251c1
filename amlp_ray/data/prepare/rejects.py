"""What a preparation could not use, or used after a repair: `<name>.rejects.csv` beside the dataset.

Beside and not inside, since names of files may name patients.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable

from amlp_ray.data.layouts import RejectedFile
from amlp_ray.data.path import DataPath
from amlp_ray.errors import DataError


class Rejects:
    """Collects faults, or stops at the first if `strict`."""

    def __init__(self, out: DataPath, strict: bool) -> None:
        self.place = out.parent / f"{out.name}.rejects.csv"
        self.strict = strict
        self._faults: list[RejectedFile] = []

    @property
    def rejected(self) -> int:
        return sum(fault.action == "rejected" for fault in self._faults)

    @property
    def repaired(self) -> int:
        return len(self._faults) - self.rejected

    def add(self, faults: Iterable[RejectedFile]) -> None:
        """Take faults over. Raises DataError with the first if `strict`."""
        for fault in faults:
            self._faults.append(fault)
            if self.strict:
                raise DataError(
                    f"{self.first()} No dataset was made, since --strict stops at the first such file."
                )

    def first(self) -> str:
        """The first fault as a sentence."""
        fault = self._faults[0]
        names_another = "/" in fault.reason.partition(" ")[0]
        sentence = fault.reason if names_another else f"{fault.file} {fault.reason}"
        return sentence if sentence.endswith(".") else f"{sentence}."

    def write(self) -> None:
        """Write the list, sorted by file, or take an older one away if there is nothing to list. Raises OSError."""
        if not self._faults:
            self.place.delete()
            return
        text = io.StringIO(newline="")
        table = csv.writer(text)
        table.writerow(RejectedFile._fields)
        table.writerows(sorted(set(self._faults)))
        self.place.atomic_write(text.getvalue())
