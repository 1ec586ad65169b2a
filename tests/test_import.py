"""What `import dcc` and the command line cost, and what stays unloaded until it is asked for."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import dcc
from dcc.plans.plan import Plan, make_plan
from dcc.plans.predictors import Predictor

BAR = 1.3  # times the CPU time of `import torch` and an empty command of typer's, least of REPEATS, in turns
REPEATS = 3


def a_plan() -> Plan:
    """A plan of two steps."""
    return make_plan(
        model="m", scheduler="s", levels=(2.0, 1.0), sites=["h"], schedule=[[1], [0]],
        predictors=[Predictor("copy")], policy="test", parameters={},
    )  # fmt: skip


def run(code: str, tmp_path: Path) -> str:
    """What a fresh interpreter prints."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "DCC_"))}
    result = subprocess.run(
        [sys.executable, "-P", "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def seconds(code: str, tmp_path: Path) -> float:
    """CPU seconds of a fresh interpreter that runs the code."""
    printed = run(f"{code}\nimport time\nprint()\nprint(time.process_time())", tmp_path)
    return float(printed.splitlines()[-1])


def command(*arguments: str) -> str:
    """Code that runs the command line as `dcc` does."""
    call = f"app({list(arguments)!r})"
    return f"from dcc.cli import app\ntry:\n    {call}\nexcept SystemExit as end:\n    assert not end.code"


EMPTY = """
import torch, typer
app = typer.Typer()
@app.command()
def empty(path: str, number: int = 1): ...
try:
    app(["x"])
except SystemExit as end:
    assert not end.code
"""


@pytest.mark.slow
def test_importing_and_asking_for_help_costs_no_more_than_an_empty_command(tmp_path):
    a_plan().save(tmp_path / "plan.json")
    codes = {
        "empty": EMPTY,
        "dcc": "import dcc",
        "dcc --help": command("--help"),
        "dcc plan show": command("plan", "show", str(tmp_path / "plan.json")),
    }
    times: dict[str, list[float]] = {name: [] for name in codes}
    for _ in range(REPEATS):
        for name, code in codes.items():
            times[name].append(seconds(code, tmp_path))
    least = {name: min(found) for name, found in times.items()}
    assert {name: found for name, found in least.items() if found > BAR * least["empty"]} == {}


LOADED = """
import json, sys
import torch
before = set(sys.modules)
{code}
print(json.dumps(sorted(set(sys.modules) - before)))
"""
HEAVY = ("torch.export", "torch._inductor", "torch._dynamo", "diffusers", "transformers", "matplotlib", "torchmetrics")


def loaded(code: str, tmp_path: Path) -> list[str]:
    """Modules that the code loads besides those of torch."""
    return json.loads(run(LOADED.format(code=code), tmp_path).splitlines()[-1])


def test_import_loads_nothing_but_dcc_itself(tmp_path):
    assert [name for name in loaded("import dcc", tmp_path) if name.startswith("dcc")] == ["dcc"]


def test_loading_and_showing_a_plan_loads_neither_export_nor_inductor(tmp_path):
    a_plan().save(tmp_path / "plan.json")
    code = (
        f"import dcc\nplan = dcc.Plan.load({str(tmp_path / 'plan.json')!r})\nassert 'plan' in repr(type(plan)).lower()"
    )
    for what in (code, command("plan", "show", str(tmp_path / "plan.json"))):
        found = loaded(what, tmp_path)
        assert [name for name in found if name.startswith(HEAVY)] == []
        assert any(name.startswith("dcc.plans") for name in found)


def test_dir_shows_the_public_names(tmp_path):
    shown = json.loads(run("import dcc, json\nprint(json.dumps(dir(dcc)))", tmp_path))
    assert shown == sorted([*dcc.__all__, "__version__"])


def test_no_submodule_bears_an_exported_name(tmp_path):
    """`dcc.plan` is a function whatever was imported before it."""
    folder = Path(dcc.__file__).parent
    files = {path.stem for path in folder.glob("*.py")} | {path.name for path in folder.iterdir() if path.is_dir()}
    assert files & set(dcc.__all__) == {"demo", "errors"}  # which are exported as modules
    code = "import dcc.plans.plan, dcc.report.evaluate, dcc\nprint(callable(dcc.plan), callable(dcc.evaluate))"
    assert run(code, tmp_path).split() == ["True", "True"]


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'dcc' has no attribute 'nothing'"):
        dcc.nothing  # noqa: B018
