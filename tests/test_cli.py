"""The command line: what it prints, what it refuses, and one whole demo."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner, Result

import dcc
from dcc import cli
from dcc.errors import PipelineError, PlanError, PolicyError
from dcc.plans.plan import make_plan
from dcc.plans.predictors import Predictor

pytestmark = pytest.mark.usefixtures("graphs")


def run(*arguments: str, **environment: str) -> Result:
    return CliRunner().invoke(cli.app, [str(a) for a in arguments], env={"COLUMNS": "100", **environment})


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails the test if a pipeline is loaded or compiled."""

    def fail(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("work was started")

    monkeypatch.setattr(dcc.demo, "load", fail)
    monkeypatch.setattr(dcc, "compile", fail)
    monkeypatch.setattr(dcc, "evaluate", fail)


@pytest.fixture
def plan_file(tmp_path: Path) -> Path:
    plan = make_plan(
        model="0123",
        scheduler="DDIMScheduler",
        levels=[900, 600, 300],
        sites=["stack"],
        schedule=[[1], [0], [0]],
        predictors=[Predictor("copy")],
        policy="interval",
        parameters={"interval": 3},
    )
    plan.save(tmp_path / "plan.json")
    return tmp_path / "plan.json"


def test_help_lists_the_commands():
    result = run("--help")
    assert result.exit_code == 0
    for command in ("demo", "policies", "evaluate", "sites", "plan"):
        assert f"│ {command} " in result.stdout


@pytest.mark.parametrize("command", [("demo",), ("policies",), ("evaluate",), ("sites",), ("plan",), ("plan", "show")])
def test_every_command_has_help(command: tuple[str, ...]):
    assert run(*command, "--help").exit_code == 0


def test_version():
    result = run("--version")
    assert result.exit_code == 0
    assert dcc.__version__ in result.stdout and torch.__version__ in result.stdout


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("--pipeline", "video"), ("'video'", "mmdit", "unet")),
        (("--policy", "magic"), ("'magic'", "interval", "taylorseer")),
        (("--policy", "interval", "--order", "2"), ("'order'", "steps_mask")),
        (("--order", "9"), ("order=9", "1 to 4")),
        (("--interval", "0"), ("interval=0",)),
        (("--backend", "gcc"), ("'gcc'", "inductor", "eager")),
        (("--out", "no/such/folder/x.png"), ("--out", "no/such/folder", "create it")),
        (("--out", "/"), ("--out", "folder")),
    ],
)
def test_demo_refuses_before_any_work(arguments: tuple[str, ...], named: tuple[str, ...]):
    result = run("demo", *arguments, COLUMNS="300")
    assert result.exit_code == 1
    assert result.stderr.startswith("error: ") and "Traceback" not in result.stderr
    assert not result.stdout
    for part in named:
        assert part in result.stderr


@pytest.mark.usefixtures("no_work")
def test_demo_refuses_a_folder_that_cannot_be_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)  # permissions do not bind the superuser
    result = run("demo", "--out", tmp_path / "x.png", COLUMNS="300")
    assert result.exit_code == 1 and "cannot be written to" in result.stderr


@pytest.mark.usefixtures("no_work")
def test_policies_are_listed_shown_and_refused_without_a_pipeline():
    listed = run("policies", COLUMNS="80")
    assert listed.exit_code == 0 and "timestep-adaptive (" in listed.stdout and "t_gate" in listed.stdout
    shown = run("policies", "t_gate")
    for part in ("Freezes cross-attention", "T-GATE", "2404.02747", "sp_interval=", "drop_guidance="):
        assert part in shown.stdout
    unknown = run("policies", "magic", COLUMNS="2000")
    assert unknown.exit_code == 1 and not unknown.stdout
    assert unknown.stderr.startswith("error: unknown policy 'magic'") and "fastercache" in unknown.stderr


def test_the_help_of_demo_points_to_the_table():
    assert "dcc policies" in run("demo", "--help", COLUMNS="200").stdout


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize("arguments", [("--prompts", "0"), ("--prompts", "65"), ("--threads", "0"), ("--speed", "3")])
def test_values_out_of_range_are_usage_errors(arguments: tuple[str, ...]):
    assert run("demo", *arguments).exit_code == 2


def test_debug_lets_the_traceback_through():
    result = run("demo", "--policy", "magic", DCC_DEBUG="1")
    assert isinstance(result.exception, PolicyError)


def test_plan_show(plan_file: Path):
    result = run("plan", "show", plan_file)
    assert result.exit_code == 0
    for part in ("interval(interval=3)", "DDIMScheduler, levels 900 to 300", "1 of 3", "stack", "100"):
        assert part in result.stdout
    assert "+1 of 0" not in result.stdout
    assert run("plan", "show", plan_file, "--steps").stdout.count("+1 of 0") == 2


@pytest.mark.slow
def test_plan_search(tmp_path: Path):
    arguments = ("--speedup", "2", "--effort", "fast", "--number", "4", "--steps", "6")
    result = run("plan", "search", tmp_path / "plan.json", *arguments)
    assert result.exit_code == 0, result.output
    plan = dcc.Plan.load(tmp_path / "plan.json")
    assert plan.steps == 6 and plan.speedup >= 2 and plan.policy == "solver"
    for text in ("2 held-back prompts", "3 plain steps instead", f"written: {tmp_path}"):
        assert text in " ".join(result.stdout.split()), text


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (("nowhere/plan.json", "--speedup", "2"), "there is no folder"),
        (("plan.json", "--prompts", "none.txt"), "none.txt: cannot be read"),
        (("plan.json", "--quality", "-1"), "quality=-1.0 must be a positive number"),
        (("plan.json", "--speedup", "2", "--quality", "30"), "two budgets"),
        (("plan.json", "--speedup", "2", "--effort", "max"), "fast, normal, thorough"),
    ],
)
def test_plan_search_refuses_before_any_work(arguments: tuple[str, ...], problem: str, tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run("plan", "search", *arguments)
    assert result.exit_code == 1
    assert problem in " ".join(result.output.split())
    assert not list(tmp_path.iterdir())


def test_plan_show_says_what_is_wrong_with_a_file(tmp_path: Path, plan_file: Path):
    missing = run("plan", "show", tmp_path / "none.json", COLUMNS="300")
    assert missing.exit_code == 1 and "cannot be read" in missing.stderr
    plan_file.write_text("{}")
    other = run("plan", "show", plan_file, DCC_DEBUG="1")
    assert isinstance(other.exception, PlanError)


def test_sites_refuses_what_is_no_pipeline(tmp_path: Path):
    unknown = run("sites", "--pipeline", "video")
    assert unknown.exit_code == 1 and "mmdit, unet" in unknown.stderr
    folder = run("sites", "--pipeline", tmp_path, COLUMNS="300")
    assert folder.exit_code == 1 and "model_index.json" in folder.stderr
    (tmp_path / "model_index.json").write_text("{}")
    broken = run("sites", "--pipeline", tmp_path, DCC_DEBUG="1")
    assert isinstance(broken.exception, PipelineError)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("interval", ("interval", {})),
        ("taylorseer:interval=4,order=1", ("taylorseer", {"interval": 4, "order": 1})),
        ("interval:site=blocks[0:2],interval=3", ("interval", {"site": "blocks[0:2]", "interval": 3})),
        ("interval:steps_mask=[1,0,1],site=cut:0", ("interval", {"steps_mask": [1, 0, 1], "site": "cut:0"})),
    ],
)
def test_policies_are_read_from_text(text: str, expected: tuple[str, dict[str, Any]]):
    assert cli.parse_policy(text) == expected


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("--policy", "magic"), ("'magic'", "interval", "taylorseer")),
        (("--policy", "interval:order=2"), ("'order'", "steps_mask")),
        (("--policy", "interval:3"), ("'3' is not key=value",)),
        (("--plan", "none.json"), ("none.json", "cannot be read")),
        (("--backend", "gcc"), ("'gcc'", "inductor", "eager")),
        (("--html", "no/such/folder/x.html"), ("--html", "create it")),
        (("--csv", "/"), ("--csv", "folder")),
    ],
)
def test_evaluate_refuses_before_any_work(arguments: tuple[str, ...], named: tuple[str, ...]):
    result = run("evaluate", *arguments, COLUMNS="300")
    assert result.exit_code == 1 and result.stderr.startswith("error: ") and not result.stdout
    for part in named:
        assert part in result.stderr


@pytest.mark.slow
def test_evaluate(tmp_path: Path, plan_file: Path):
    files = {kind: tmp_path / f"r.{kind}" for kind in ("html", "csv", "json")}
    written = [part for kind, path in files.items() for part in (f"--{kind}", path)]
    wanted = ("--policy", "interval:interval=2", "--plan", plan_file)
    settings = ("--backend", "eager", "--prompts", "1", "--steps", "3")
    result = run("evaluate", *wanted, *settings, *written, COLUMNS="60")
    assert result.exit_code == 0, result.output
    assert max(len(line.rstrip()) for line in result.stdout.splitlines() if "written" not in line) <= 60
    for part in ("2/3", "failed: planning: PlanError: the plan is", *map(str, files.values())):
        assert part in " ".join(result.stdout.split())
    assert all(path.stat().st_size for path in files.values())


@pytest.mark.slow
def test_sites_of_a_demo_pipeline_and_of_its_folder():
    by_name = run("sites", "--pipeline", "mmdit")
    assert by_name.exit_code == 0
    for part in ("GFLOP per call", "stack", "output", "of FLOPs"):
        assert part in by_name.stdout
    assert "capturing the denoiser" in by_name.stderr


@pytest.mark.slow
def test_demo(tmp_path: Path):
    out = tmp_path / "demo.png"
    before = torch.get_num_threads()
    result = run("demo", "--backend", "eager", "--prompts", "1", "--out", out, COLUMNS="60")
    assert result.exit_code == 0, result.output
    assert torch.get_num_threads() == before
    for part in ("taylorseer(interval=4)", "9 of 28", "latency per image", "share of the ideal", "PSNR", str(out)):
        assert part in result.stdout
    for part in ("loading mmdit", "uncached", "cached", "prompts", f"writing {out}"):
        assert part in result.stderr
    assert "Loading" not in result.output and "torchvision" not in result.output
    with Image.open(out) as image:
        assert image.format == "PNG"
    assert list(tmp_path.iterdir()) == [out]
