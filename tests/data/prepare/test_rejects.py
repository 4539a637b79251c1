"""The list of files that could not be used."""

from __future__ import annotations

from pathlib import Path

from amlp_ray.data.layouts import RejectedFile
from amlp_ray.data.path import DataPath
from amlp_ray.data.prepare.rejects import Rejects


def test_names_of_files_are_no_formulas_in_the_list(tmp_path: Path) -> None:
    rejects = Rejects(DataPath(tmp_path / "set"), strict=False)
    rejects.add([RejectedFile("=HYPERLINK(1).png", "rejected", "is empty")])
    rejects.add([RejectedFile("a.png", "repaired", "-1 was taken for 0")])
    rejects.write()
    assert (tmp_path / "set.rejects.csv").read_text().splitlines()[1:] == [
        "'=HYPERLINK(1).png,rejected,is empty",
        "a.png,repaired,'-1 was taken for 0",
    ]
