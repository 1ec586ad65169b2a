"""The documents: links lead somewhere, files that are named exist, commands parse, and tables list what there is."""

from __future__ import annotations

import ast
import re
import shlex
import tomllib
from pathlib import Path

import pytest
from typer.testing import CliRunner

import dcc
from dcc.cli import app

from .documents import ARCHITECTURE, PYTHON, README, ROOT
from .test_imports import ROOMS

FOLDERS = ("dcc", "passes", "kernels", "tests", "benchmarks")
DOCUMENTS = sorted({*ROOT.glob("*.md"), *(p.resolve() for folder in FOLDERS for p in (ROOT / folder).rglob("*.md"))})
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\(([^)\s]+)\)")
SPAN = re.compile(r"`([^`]+)`")
NAMED = re.compile(rf"(?:{'|'.join(FOLDERS)})/[\w./*<>-]+")
VARIABLE = re.compile(r"\bDCC_[A-Z_]+\b")
every_document = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))


def prose(document: Path) -> str:
    """A document without its blocks of code."""
    return FENCE.sub("", document.read_text())


def shell(document: Path) -> list[str]:
    """The commands that a document shows, in blocks and in the text."""
    blocks = [block for language, block in FENCE.findall(document.read_text()) if language == "bash"]
    lines = [line for block in blocks for line in block.splitlines()]
    return [part.strip() for line in [*lines, *SPAN.findall(prose(document))] for part in line.split("&&")]


def anchors(document: Path) -> set[str]:
    """What a link to a heading of a document may end with."""
    headings = re.findall(r"^#+ (.*)$", prose(document), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def first_column(document: Path) -> list[str]:
    """What stands between backticks in the first cells of a document's tables, in order."""
    cells = re.findall(r"^\| (.*?) \|", prose(document), re.MULTILINE)
    return [name for cell in cells for name in SPAN.findall(cell)]


def test_there_are_documents():
    names = {str(path.relative_to(ROOT)) for path in DOCUMENTS}
    assert {"README.md", "CHANGELOG.md", "CONTRIBUTING.md", "dcc/README.md", "benchmarks/README.md"} < names


@every_document
def test_relative_links_lead_somewhere(document: Path):
    lost = []
    for link in LINK.findall(prose(document)):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, heading = link.partition("#")
        target = (document.parent / path).resolve() if path else document
        if not target.exists() or (heading and heading not in anchors(target)):
            lost.append(link)
    assert lost == []


@every_document
def test_files_that_are_named_exist(document: Path):
    words = [word for text in [*SPAN.findall(prose(document)), *shell(document)] for word in text.split()]
    named = [word for word in words if NAMED.fullmatch(word) and "<" not in word]
    assert [word for word in named if not any(ROOT.glob(word))] == []


@every_document
def test_commands_of_dcc_parse(document: Path):
    for command in shell(document):
        if not command.startswith("dcc "):
            continue
        words = shlex.split(command, comments=True)[1:]
        done = CliRunner().invoke(app, [*words, "--help"])  # an unknown command or option is an error before the help
        assert done.exit_code == 0, f"{command}: {done.output}"


def test_a_wrong_command_is_found():
    for words in (["plna", "search"], ["plan", "search", "plan.json", "--sped", "4"]):
        assert CliRunner().invoke(app, [*words, "--help"]).exit_code != 0


@every_document
def test_blocks_of_python_are_python(document: Path):
    for block in PYTHON.findall(document.read_text()):
        ast.parse(block)


@every_document
def test_lines_are_short(document: Path):
    """Tables and code are as long as they must be; model cards are written by a script."""
    if document.is_relative_to(ROOT / "dcc" / "demo"):
        return
    long = [line for line in prose(document).splitlines() if len(line) > 120 and not line.startswith("|")]
    assert long == []


def test_the_front_page_is_short():
    assert len(README.read_text().splitlines()) <= 180
    assert len(ARCHITECTURE.read_text().splitlines()) <= 200


def test_every_public_name_is_mentioned():
    text = README.read_text() + ARCHITECTURE.read_text()
    assert [name for name in dcc.__all__ if not re.search(rf"\bdcc\.{name}\b", text)] == []


def test_every_variable_is_explained():
    sources = [path for folder in ("dcc", "passes", "kernels") for path in (ROOT / folder).rglob("*.py")]
    read = {name for path in sources for name in VARIABLE.findall(path.read_text())}
    assert read == set(VARIABLE.findall(ARCHITECTURE.read_text()))


def test_the_floor_plan_is_the_one_of_the_imports():
    rooms = [room for floor in ROOMS for room in floor]
    assert [name for name in first_column(ARCHITECTURE) if name in rooms] == rooms


@pytest.mark.parametrize("folder", ["passes", "kernels"])
def test_every_file_of_a_flat_folder_is_in_its_table(folder: str):
    names = first_column(ROOT / folder / "README.md")
    files = {path.name for path in (ROOT / folder).glob("*.py")} - {"__init__.py", "base.py"}
    assert set(names) - {"base.py"} == files and len(names) == len(set(names))


def test_every_script_is_in_the_table_of_benchmarks():
    folder = ROOT / "benchmarks"
    files = {path.name for path in folder.glob("*.py")}
    named = {name for name in SPAN.findall(prose(folder / "README.md")) if re.fullmatch(r"\w+\.py", name)}
    assert named == files


def test_the_citation_is_of_this_version():
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"\n## {version}" in (ROOT / "CHANGELOG.md").read_text()
