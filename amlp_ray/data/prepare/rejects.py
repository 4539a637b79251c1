"""List files that could not be used, or were used after a repair: `<name>.rejects.csv`.

The list lies beside the dataset and not inside, because names of files may name patients.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from amlp_ray.data.layouts import Listing, RejectedFile
from amlp_ray.data.path import DataPath
from amlp_ray.errors import DataError
from amlp_ray.utils.csv_text import csv_text
from amlp_ray.utils.text import counted

# Share of masks without an image from which on names or layout are at fault, not single files.
MAX_STRAY_SHARE = 0.5


class Rejects:
    """Collect rejected and repaired files."""

    def __init__(self, out: DataPath, strict: bool) -> None:
        """Start an empty list; `strict` makes the first file an error."""
        self.path = out.parent / f"{out.name}.rejects.csv"
        self.strict = strict
        self._files: list[RejectedFile] = []

    @property
    def num_rejected(self) -> int:
        """Number of files that could not be used."""
        return sum(file.action == "rejected" for file in self._files)

    @property
    def num_repaired(self) -> int:
        """Number of files that were used after a repair."""
        return len(self._files) - self.num_rejected

    def add(self, files: Iterable[RejectedFile]) -> None:
        """Add files to the list. Raises DataError at the first if strict."""
        for file in files:
            self._files.append(file)
            if self.strict:
                stop = "No dataset was made, since --strict stops at the first such file."
                raise DataError(f"{self.first()} {stop}")

    def first(self) -> str:
        """Return the first file and its reason as a sentence."""
        file = self._files[0]
        names_another_file = "/" in file.reason.partition(" ")[0]
        sentence = file.reason if names_another_file else f"{file.file} {file.reason}"
        return sentence if sentence.endswith(".") else f"{sentence}."

    def summary(self) -> str:
        """Return the counts, where the list is, and the commonest reasons, as sentences."""
        counts = f"{counted(self.num_rejected, 'file')} rejected and {self.num_repaired} repaired"
        sentences = [f"{counts}, see {self.path}."]
        for action in ("rejected", "repaired"):
            files = [file for file in self._files if file.action == action]
            if files:
                example, number = commonest(files)
                reason = example.reason.removesuffix(".")
                sentences.append(f"Most often {action} ({number}): {example.file} {reason}.")
        return " ".join(sentences)

    def write(self) -> None:
        """Write the list sorted by file, or delete an older one if it is empty. Raises OSError."""
        if not self._files:
            self.path.delete()
            return
        self.path.atomic_write(csv_text(RejectedFile._fields, sorted(set(self._files))))


def commonest(files: Sequence[RejectedFile]) -> tuple[RejectedFile, int]:
    """Return the first file with the commonest reason, and the number of files that have it."""
    reason, number = Counter(file.reason for file in files).most_common(1)[0]
    return next(file for file in files if file.reason == reason), number


def check_stray_masks(listing: Listing) -> None:
    """Raise DataError if most masks of a folder belong to no image, so that lesions would be lost.

    The commonest reason is told.
    """
    num_strays = len(listing.stray_masks)
    num_masks = num_strays + sum(len(item.masks) for item in listing.items)
    if num_strays <= MAX_STRAY_SHARE * num_masks:
        return
    example, _ = commonest(listing.stray_masks)
    raise DataError(
        f"{num_strays} of {counted(num_masks, 'mask')} belong to no image, so their lesions would "
        f"be lost. The commonest fault: {example.file} {example.reason}. If that is not so, the "
        f"layout {listing.layout} is not theirs; name another with --layout, or remove the masks "
        "if they are not wanted."
    )
