"""amlp-ray settings: the same table for people, as Markdown and as JSON."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import get_args

import pytest

from amlp_ray.cli import main
from amlp_ray.config import VARIANTS, PretrainConfig
from amlp_ray.config.data import Layout
from amlp_ray.config.overrides import flatten

ROOT = Path(__file__).parents[2]


def run(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: object
) -> tuple[int, str, str]:
    """Exit code, standard output, and standard error of a command."""
    monkeypatch.setattr(sys, "argv", ["amlp-ray", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        main()
    out = capsys.readouterr()
    return int(end.value.code or 0), out.out, out.err


def test_the_page_in_docs_is_what_make_docs_writes(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = re.search(
        r"amlp-ray (settings .*) > docs/settings\.md", (ROOT / "Makefile").read_text()
    )
    assert command
    code, out, _ = run(capsys, monkeypatch, *command[1].split())
    assert code == 0
    assert (ROOT / "docs/settings.md").read_text() == out, "run `make docs`"


def test_every_setting_of_a_run_is_a_row_of_the_table_and_of_the_page(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    names = list(flatten(PretrainConfig()))
    _, table, _ = run(capsys, monkeypatch, "settings")
    # Lines that begin further right continue a cell of the row above.
    first = re.findall(r"^ ?([\w.]+)", table, re.M)
    assert [name for name in first if name in names] == names
    _, page, _ = run(capsys, monkeypatch, "settings", "--markdown")
    assert re.findall(r"^\| `([\w.]+)` \|", page, re.M) == names
    assert [line for line in page.splitlines() if line.startswith("#")] == [
        "# Settings", "## pretrain", "### model", "### ratio", "### selection", "### loss",
    ]  # fmt: skip


def test_brackets_are_shown_and_not_taken_for_a_style(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, table, _ = run(capsys, monkeypatch, "settings", "prepare")
    assert "[number, number, number]" in table
    first, second, *_, last = get_args(Layout)
    assert re.search(rf"layout +{first}, {second}, .*, {last} +auto", table)
    _, table, _ = run(capsys, monkeypatch, "settings", "study")
    assert re.search(r"probe\.sizes +\[number, number\] +\[0\.02, 0\.1\]", table)


def test_tables_of_the_page_have_a_cell_in_every_column(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, page, _ = run(
        capsys,
        monkeypatch,
        "settings",
        "pretrain",
        "variants",
        "study",
        "segment",
        "prepare",
        "--markdown",
    )
    for table in re.findall(r"(?:^\|.*\n)+", page, re.M):
        widths = {len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}
        assert len(widths) == 1, table


def test_the_default_tells_what_the_usual_variant_sets(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, page, _ = run(capsys, monkeypatch, "settings", "--markdown")
    overrides = dict(re.findall(r"^\| `([\w.]+)` \|.*`[^`]* \(amlp: ([^)]*)\)`", page, re.M))
    assert overrides == {name: str(value) for name, value in flatten(VARIANTS["amlp"]).items()}


def test_json_holds_values_and_not_words(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code, out, _ = run(capsys, monkeypatch, "settings", "segment", "variants", "--json")
    assert code == 0
    printed = json.loads(out)
    assert {row["name"]: row["default"] for row in printed["segment"]}["freeze"] is False
    assert {row["variant"]: row["sets"] for row in printed["variants"]} == {
        n: flatten(v) for n, v in VARIANTS.items()
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["settings", "nope"],
            "none of 'nope'; known are pretrain, study, segment, prepare, predict, variants.",
        ),
        (
            ["pretrain", "absent", "--out", "out", "--set", "model.encoder=vit_smal"],
            "--set: model: encoder 'vit_smal' is no ViT that timm knows; near: ",
        ),
        (
            ["pretrain", "absent", "--out", "out", "--set", "model.encoder=davit_tiny"],
            "--set: model: encoder 'davit_tiny' is a DaVit of its own kind in timm; accepted are",
        ),
        (
            ["pretrain", "absent", "--out", "out", "--set", "ratio.shape=points"],
            "--set: ratio: shape points needs at ",
        ),
        (
            ["pretrain", "absent", "--out", "out", "--set", "variant=beit"],
            "--set: variant is 'beit', but must be ",
        ),
    ],
)
def test_bad_settings_get_one_sentence(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = run(capsys, monkeypatch, *arguments)
    assert code == 2, err
    assert out == ""
    assert err.startswith("amlp-ray: ")
    assert message in err
    assert err.count("\n") == 1
    assert not list(tmp_path.iterdir())
