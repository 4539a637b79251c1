"""What is written by hand names what there is: guides and CONTRIBUTING follow the code."""

from __future__ import annotations

import re
from pathlib import Path
from typing import get_args

import pytest
from typer.testing import CliRunner

from amlp_ray.cli import app
from amlp_ray.config import PrunerConfig, SamplerConfig, SelectionConfig
from amlp_ray.config.base import find_field
from amlp_ray.config.data import Layout

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("cluster/*.md")])


def read(name: str) -> str:
    return (ROOT / name).read_text()


@pytest.mark.parametrize(
    ("document", "names"),
    [
        ("docs/data.md", get_args(Layout)),
        ("docs/method.md", get_args(find_field(SelectionConfig, "rule").annotation)),
        ("docs/studies.md", get_args(find_field(SamplerConfig, "name").annotation)),
        ("docs/studies.md", get_args(find_field(PrunerConfig, "name").annotation)),
    ],
    ids=["layouts", "cluster rules", "samplers", "pruners"],
)
def test_a_guide_names_every_choice(document: str, names: tuple[str, ...]) -> None:
    text = read(document)
    assert [name for name in names if f"`{name}`" not in text] == []


def test_the_help_of_prepare_names_every_layout() -> None:
    page = CliRunner().invoke(app, ["data", "prepare", "--help"], env={"COLUMNS": "300"}).output
    assert [name for name in get_args(Layout) if name not in page] == []


def test_every_path_and_function_that_contributing_names_exists() -> None:
    text = read("CONTRIBUTING.md")
    package = "\n".join(path.read_text() for path in (ROOT / "amlp_ray").rglob("*.py"))
    paths = set(re.findall(r"`((?:[a-z_]+/)+[a-z_]+\.(?:py|md|yaml))`", text))
    assert paths
    folders = (ROOT, ROOT / "amlp_ray")
    missing = [path for path in paths if not any((folder / path).exists() for folder in folders)]
    assert missing == []
    names = set(re.findall(r"`(_?[a-z]+(?:_[a-z]+)+|_?[A-Z][A-Z_]+|[A-Z][a-z]+[A-Z]\w+)`", text))
    defined = {name for name in names if re.search(rf"\b{name}\b", package)}
    external = {"ALL", "AMLP_RAY_DATA", "system_attrs"}  # of a test, the environment, and Optuna
    assert names - defined - external == set()
    classes = set(re.findall(r"`([A-Z][a-z]\w*)[`.]", text)) - {"None"}
    assert classes
    assert {name for name in classes if not is_class(name, package)} == set()


def is_class(name: str, package: str) -> bool:
    """Return whether the package has a class or a type alias of this name."""
    return bool(re.search(rf"^(?:class {name}\b|{name}(?:: TypeAlias)? =)", package, re.MULTILINE))


BRITISH = re.compile(
    r"\b\w*(?:labell|colour|neighbour|behaviour|favour|honour|tumour|grey|centre|metres\b|fibre"
    r"|licence|modell(?:ed|ing)|artefact|analyse[dr]?\b|catalogue|calliper|learnt|burnt|spelt"
    r"|towards|judgement|whilst|ageing"
    r"|(?:initial|normal|optim|local|organ|recogn|summar|serial|visual|general|standard|minim|maxim"
    r"|regular|categor|random|parallel|util|real|quant|special|penal|binar|token|equal|character"
    r"|stabil|synchron|memor|prior|custom|anonym)is(?:e|ed|er|ers|es|ing|ation)\b)\w*",
    re.IGNORECASE,
)
# The changelog names settings as they were called before, so code in backticks is not checked.
PROSE = [*DOCUMENTS, *ROOT.glob("benchmarks/*.md")]
SOURCES = [
    *(path for path in (ROOT / "amlp_ray").rglob("*") if path.suffix in (".py", ".html")),
    *ROOT.glob("benchmarks/*.py"),
    *ROOT.glob("studies/*.yaml"),
    ROOT / "pyproject.toml",
]


def british_words(text: str) -> list[str]:
    return sorted({match.group() for match in BRITISH.finditer(text)})


@pytest.mark.parametrize("word", ["Labelled", "unlabelled", "neighbours", "normalised", "greyish"])
def test_british_spellings_are_found(word: str) -> None:
    assert british_words(f"an {word} image, normal, equals, analyses, centered") == [word]


def test_documents_code_and_messages_are_in_us_spelling() -> None:
    texts = {path: path.read_text() for path in SOURCES}
    texts |= {path: re.sub(r"`[^`\n]*`", "", path.read_text()) for path in PROSE}
    words = {str(path.relative_to(ROOT)): british_words(text) for path, text in texts.items()}
    assert {name: found for name, found in words.items() if found} == {}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_link_leads_somewhere(document: Path) -> None:
    links = re.findall(r"\]\((?!https?:)([^)#\s]+)", document.read_text())
    assert [link for link in links if not (document.parent / link).exists()] == []
