"""What type checkers say about a user's script: they find dcc where it is installed, and catch wrong arguments."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.long

SCRIPT = """
import dcc
from dcc.plans.plan import Plan

pipe = dcc.demo.load("mmdit")
plan: Plan = dcc.plan(pipe, ["a red circle"], speedup=3)
dcc.compile(pipe, ["a red circle"], plan=plan, backend="eager", height=32)
dcc.compile(pipe, ["a red circle"], speedup="3x")  # wrong: a number
dcc.compile(pipe, ["a red circle"], speedup=3, effort="fst")  # wrong: no such effort
net: dcc.CompiledDenoiser = dcc.compiled(pipe)
print(net.plan.steps, dcc.summary(pipe).computed, dcc.sites(pipe))
"""
WRONG = [line for line, text in enumerate(SCRIPT.splitlines(), start=1) if "# wrong" in text]


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "user.py"
    path.write_text(SCRIPT)
    return path


def run(*command: str, cwd: Path) -> str:
    return subprocess.run([sys.executable, "-m", *command], cwd=cwd, capture_output=True, text=True, check=False).stdout


def test_pyright_finds_dcc_and_catches_wrong_arguments(script: Path):
    pytest.importorskip("pyright")
    said = json.loads(run("pyright", "--outputjson", "--pythonpath", sys.executable, "user.py", cwd=script.parent))
    found = [(each["range"]["start"]["line"] + 1, each["severity"]) for each in said["generalDiagnostics"]]
    assert found == [(line, "error") for line in WRONG], said["generalDiagnostics"]


def test_mypy_finds_dcc_and_catches_wrong_arguments(script: Path):
    pytest.importorskip("mypy")
    said = run("mypy", "--python-executable", sys.executable, "--follow-imports=silent", "user.py", cwd=script.parent)
    found = [int(line) for line in re.findall(r"^user\.py:(\d+): error", said, re.MULTILINE)]
    assert found == WRONG, said


def test_pyright_is_clean_on_dcc_itself():
    pytest.importorskip("pyright")
    root = Path(__file__).resolve().parent.parent
    said = json.loads(run("pyright", "--outputjson", "--pythonpath", sys.executable, cwd=root))
    assert said["summary"]["filesAnalyzed"] > 80  # those of dcc, passes and kernels
    assert said["generalDiagnostics"] == []
