"""Every contestant of every benchmark runs for one row at a tiny size, or says why it cannot.

What another package's absence keeps from running (cache-dit, DeepCache) counts as said; any other failure does not.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import dcc
from dcc.text import error_line

FOLDER = Path(__file__).resolve().parent.parent / "benchmarks"
pytestmark = pytest.mark.usefixtures("graphs")
STEPS = 6
SMOKED = (
    "compile_time", "conformance", "evolution", "hoisting", "host_overhead", "kernel_speed", "latency", "other_runs",
    "plans", "promise", "quality", "readme", "replay", "speed",
)  # fmt: skip
PARTS = ("baselines", "cases", "measure", "methods", "peers", "speed_peers", "subjects")  # imported by those
OTHERS_WARN = pytest.mark.filterwarnings("ignore")  # torch.compile and other libraries, of their own deprecations


def script(name: str) -> ModuleType:
    """A script of the folder, whose files import each other by their bare names."""
    if str(FOLDER) not in sys.path:
        sys.path.insert(0, str(FOLDER))
    return importlib.import_module(name)


@pytest.fixture(autouse=True)
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Result files of a trial go to a folder of its own."""
    monkeypatch.setattr(script("measure"), "RESULTS", tmp_path)
    return tmp_path


def test_every_script_is_smoked() -> None:
    scripts = {path.stem for path in FOLDER.glob("*.py")}
    assert scripts == {*SMOKED, *PARTS}


@pytest.mark.long
@pytest.mark.parametrize("path", sorted((FOLDER / "zoo").glob("*.py")), ids=lambda path: path.stem)
def test_a_training_script_compiles_and_prints_its_help(path: Path) -> None:
    source = path.read_text()
    compile(source, str(path), "exec")
    if "argparse" in source and "__main__" in source:
        done = subprocess.run(
            [sys.executable, "-W", "ignore", str(path), "--help"], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0 and "usage:" in done.stdout, done.stderr


# quality.py: its contestants are asked for here and run below


def contestants(name: str, survey: bool) -> dict[str, Any]:
    """One contestant of each label of a pipeline: budgets differ in a knob only."""
    subject = FakeSubject(name)
    if survey:
        found = [*script("methods").methods(subject), *script("baselines").solver_plans(subject)]
    else:
        found = [*script("baselines").baselines(subject), *script("peers").peers(subject)]
    return {contestant.name.rsplit(" @ ", 1)[0]: contestant for contestant in reversed(found)}


class FakeSubject:
    """What listing contestants asks of a subject."""

    def __init__(self, name: str) -> None:
        self.name, self.steps = name, STEPS


def listed() -> list[tuple[str, bool, str]]:
    """Every contestant once: on the two pipelines by turns, where it is listed for both."""
    found = []
    for survey in (False, True):
        both = {name: contestants(name, survey) for name in ("mmdit", "unet")}
        for index, label in enumerate({**both["mmdit"], **both["unet"]}):
            name = ("mmdit", "unet")[index % 2]
            found.append((name if label in both[name] else ("unet", "mmdit")[index % 2], survey, label))
    return found


LISTED = listed()
SUBJECTS: dict[str, Any] = {}
FEW = [entry for entry in LISTED if entry[2].startswith(("dcc even newton", "uncached, one", "diffusers FirstBlock"))]


def reasons(name: str, label: str) -> set[str]:
    """Why a contestant does not run on a pipeline, as its result file says."""
    rows = json.loads((FOLDER / "results" / f"quality_{name}.json").read_text())["rows"]
    return {row["reason"] for row in rows if row["name"].rsplit(" @ ", 1)[0] == label and "reason" in row}


def run_contestant(name: str, survey: bool, label: str) -> None:
    quality, subjects = script("quality"), script("subjects")
    if name not in SUBJECTS:
        SUBJECTS[name] = quality.Measurement(subjects.Subject(name, num_inference_steps=STEPS), 1)
    measurement = SUBJECTS[name]
    contestant = contestants(name, survey)[label]
    parameters = dict(contestant.parameters)
    if contestant.knob:
        knob = contestant.knob
        values = [value for value in knob.values if value not in (1, STEPS)] or list(knob.values)
        parameters[knob.name] = values[len(values) // 2] if values else (knob.low * knob.high) ** 0.5
    if "full_steps" in parameters and not contestant.knob:
        parameters["full_steps"] = STEPS + 2
    try:
        row = measurement._at(contestant, parameters)
    except ModuleNotFoundError as error:  # a package that is not installed here
        assert error.name in ("cache_dit", "DeepCache"), error
        return
    except subjects.DoesNotRun as reason:
        assert len(str(reason)) > 20
        return
    except dcc.errors.PlanError as error:  # a released plan is for the released number of steps
        assert contestant.family == "dcc solver" and "noise levels" in str(error), error
        return
    except Exception as error:  # of another library, in the words that the result file has
        assert not contestant.family.startswith("dcc") and error_line(error) in reasons(name, label), label
        return
    assert row["speedup"] > 0 and row["psnr"] > 0
    measurement._check_clean(contestant)


@pytest.mark.parametrize(("name", "survey", "label"), FEW)
def test_some_contestants_of_quality_run(name: str, survey: bool, label: str) -> None:
    run_contestant(name, survey, label)


@pytest.mark.long
@OTHERS_WARN
@pytest.mark.parametrize(("name", "survey", "label"), [entry for entry in LISTED if entry not in FEW])
def test_every_contestant_of_quality_runs(name: str, survey: bool, label: str) -> None:
    run_contestant(name, survey, label)


def test_quality_writes_keeps_and_prints_rows(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    quality = script("quality")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quality, "Subject", lambda name: script("subjects").Subject(name, num_inference_steps=3))
        quality.run("mmdit", "quality", 1, "^uncached, one", False)
        quality.run("mmdit", "quality", 1, "^uncached, one", False)
    assert "every row is there" in capsys.readouterr().out
    (row,) = json.loads((results / "quality_mmdit.json").read_text())["rows"]
    assert row["psnr"] == quality.SAME and row["speedup"] == pytest.approx(1.0)
    shutil.copy(FOLDER / "results" / "quality_mmdit.json", results)
    quality.table("mmdit", "quality")
    quality.plot("mmdit", "quality", str(results / "plot.png"))
    assert "at least 3x fewer FLOPs" in capsys.readouterr().out
    assert (results / "plot.png").stat().st_size > 1000


# speed.py, latency.py, compile_time.py: what compiles is long


def tiny_case() -> Any:
    cases = script("cases")
    from diffusers import FluxTransformer2DModel

    def build() -> torch.nn.Module:
        return FluxTransformer2DModel(
            patch_size=1, in_channels=64, num_layers=1, num_single_layers=1, attention_head_dim=16,
            num_attention_heads=2, joint_attention_dim=32, pooled_projection_dim=16, axes_dims_rope=(4, 6, 6),
        )  # fmt: skip

    inputs = lambda draw: cases.mmdit_inputs(draw, 4, 4, 32, 16)  # noqa: E731
    return cases.Case("mmdit", build, inputs, "hidden_states", "stack", steps=8)


SPEED = script("speed")


@pytest.mark.parametrize("name", [n for n in SPEED.names(False) if not n.endswith(SPEED.COMPILED)] + [*SPEED.RATIOS])
def test_contestants_of_speed_run(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run_speed(name, monkeypatch)


@pytest.mark.long
@OTHERS_WARN
@pytest.mark.parametrize("name", [SPEED.BASE, *(n for n in SPEED.names(False) if n.endswith(SPEED.COMPILED))])
def test_compiled_contestants_of_speed_run(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run_speed(name, monkeypatch)


def run_speed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SPEED, "CASES", (tiny_case(),))
    with contextlib.ExitStack() as stack:
        missing = {"cache-dit": "cache_dit", "DeepCache": "DeepCache"}.get(name.split()[0].rstrip(","))
        if missing and importlib.util.find_spec(missing) is None:
            stack.enter_context(pytest.raises(ModuleNotFoundError, match=missing))
        elif missing == "DeepCache":
            stack.enter_context(pytest.raises(AttributeError, match="down_blocks"))  # this denoiser is no U-Net
        facts, seconds = SPEED.make("mmdit", name, "eager")
        assert facts["implied"] >= 1 and seconds() > 0
        expected = torch.from_numpy(facts["output"])
        row = SPEED.row_of(name, facts, [2.0, 2.0], [1.0, 1.0], expected)
        assert row["ratio"] == 2.0 and row["difference_to_uncached"] == 0.0


@pytest.mark.long
@OTHERS_WARN
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("family", ["uncached", "dcc solver", "diffusers"])
def test_contestants_of_latency_run(family: str, compiled: bool) -> None:
    latency, subjects = script("latency"), script("subjects")
    rows = json.loads((FOLDER / "results" / "quality_mmdit.json").read_text())["rows"]
    row = next(row for row in rows if row["family"].startswith(family) and "psnr" in row)
    timed = latency.prepared(subjects.Subject("mmdit"), row, compiled)
    assert timed.seconds() > 0
    timed.stack.close()


@pytest.mark.long
@OTHERS_WARN
def test_compile_time_measures_both_and_the_cache() -> None:
    compile_time = script("compile_time")
    ours, theirs = compile_time.with_dcc(3), compile_time.with_torch(3)
    assert ours["variants"] == 2 and ours["problems"] == [] and ours["seconds"] > 0 and theirs["seconds"] > 0
    kept = compile_time.cache(3)
    assert kept["blocks"]["bytes"] < kept["blocks, apart"]["bytes"] and kept["branches"]["tensors"] > 0


# conformance.py, hoisting.py


CONFORMANCE = script("conformance").pairs()


@pytest.mark.long
@OTHERS_WARN
@pytest.mark.parametrize("index", range(len(CONFORMANCE)), ids=lambda i: f"{CONFORMANCE[i].name} {i}")
def test_pairs_of_conformance_agree(index: int, monkeypatch: pytest.MonkeyPatch) -> None:
    conformance, subjects = script("conformance"), script("subjects")
    monkeypatch.setattr(conformance, "PROMPTS", 1)
    pair = CONFORMANCE[index]
    if f"full {pair.pipeline}" not in SUBJECTS:
        SUBJECTS[f"full {pair.pipeline}"] = subjects.Subject(pair.pipeline)
    try:
        row = conformance.compare(SUBJECTS[f"full {pair.pipeline}"], pair)
    except ModuleNotFoundError as error:
        assert error.name in ("cache_dit", "DeepCache"), error
        return
    assert row["same_decisions"] and row["psnr_between"] == conformance.EQUAL


HOISTING = script("hoisting")


@pytest.mark.long
@pytest.mark.parametrize("case", HOISTING.CASES, ids=lambda case: case.name)
def test_cases_of_hoisting_run(case: Any) -> None:
    row = HOISTING.time_case(case, 1, "eager")
    assert row["difference"] == 0.0 and "saved_share" in row and 0 <= row["hoisted_share"] <= row["fixed_share"] < 1


# the rest


def test_host_overhead_prints_its_rows(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script("host_overhead").main(repeats=2, blocks=2)
    rows = json.loads((results / "host_overhead.json").read_text())["rows"]
    assert [row["name"] for row in rows] == ["1 selector", "4 selectors"]
    assert all(0 < row["forecast_ms"] < 100 and 0 < row["full_ms"] < 100 for row in rows)
    look = json.loads((results / "host_overhead.json").read_text())["look"]
    assert look["modules"] > 50 and 0 < look["look_ms"] < 100 and 0 < look["share"] < 0.5
    out = capsys.readouterr().out
    assert "4 selectors: forecast step" in out and f"a look at {look['modules']} modules" in out


def test_kernels_agree_with_their_references_and_ask_for_a_gpu() -> None:
    import typer

    kernel_speed = script("kernel_speed")
    for case in kernel_speed.cases(16, 32, "cpu"):
        assert kernel_speed.error(case) < 1e-2, case.name
        assert case.moved > 0
    if not torch.cuda.is_available():
        with pytest.raises(typer.BadParameter, match="needs a CUDA device"):
            kernel_speed.main()


def fewer_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = dcc.demo.settings
    monkeypatch.setattr(dcc.demo, "settings", lambda name: settings(name) | {"num_inference_steps": STEPS})


@pytest.mark.long
@OTHERS_WARN
def test_plans_promise_and_other_runs_write_their_files(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fewer_steps(monkeypatch)
    plans, promise, other_runs = script("plans"), script("promise"), script("other_runs")
    monkeypatch.setattr(plans, "FOLDER", results)
    command = ["plans.py", "mmdit", "--speedups", "2", "--prompts", "4", "--effort", "fast"]
    monkeypatch.setattr(sys, "argv", command)
    plans.main()
    assert dcc.Plan.load(results / "mmdit_2x.json").speedup >= 2
    monkeypatch.setattr(other_runs, "TEST", 1)
    monkeypatch.setattr(promise, "CALIBRATION", 4)
    monkeypatch.setattr(sys, "argv", ["promise.py", "--quality", "20"])
    promise.main()
    assert [row["pipeline"] for row in json.loads((results / "promise.json").read_text())["rows"]] == ["mmdit", "unet"]
    monkeypatch.setattr(other_runs, "CALIBRATION", 4)
    monkeypatch.setattr(other_runs, "OTHERS", (5,))
    monkeypatch.setattr(other_runs, "FULL", 3)
    monkeypatch.setattr(sys, "argv", ["other_runs.py", "mmdit"])
    other_runs.main()
    assert len(json.loads((results / "other_runs_mmdit.json").read_text())["rows"]) == 4


def test_a_replay_says_what_differs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans, pictures and refusals, each on its own."""
    from safetensors.torch import load_file, save_file
    from typer.testing import CliRunner

    fewer_steps(monkeypatch)
    replay, command = script("replay"), CliRunner()
    folders = [tmp_path / "before", tmp_path / "after"]
    for folder in folders:
        done = command.invoke(replay.app, ["write", str(folder), "--only", "mmdit (fora|deepcache)$"])
        assert done.exit_code == 0 and len(done.stdout.splitlines()) == 2, done.output
    same = command.invoke(replay.app, ["compare", *map(str, folders)])
    assert same.exit_code == 0 and same.stdout == "1 plans, 2 pictures, 1 refusals: 0 differences\n"
    pictures = load_file(folders[1] / "mmdit_fora.safetensors")["pictures"].clone()
    pictures[0, 0, 0, 0] += 0.5
    save_file({"pictures": pictures}, folders[1] / "mmdit_fora.safetensors")
    plan = json.loads((folders[1] / "mmdit_fora.plan.json").read_text())
    (folders[1] / "mmdit_fora.plan.json").write_text(json.dumps(plan | {"policy": "other"}))
    facts = json.loads((folders[1] / "mmdit_deepcache.json").read_text())
    (folders[1] / "mmdit_deepcache.json").write_text(json.dumps(facts | {"refusal": "other"}))
    other = command.invoke(replay.app, ["compare", *map(str, folders)])
    assert other.exit_code == 1 and "3 differences" in other.stdout
    assert "mmdit fora: pictures differ by up to 0.5" in other.stdout
    assert "mmdit fora: the plan differs in policy" in other.stdout


def test_the_evolution_is_drawn_from_result_files(results: Path) -> None:
    for name in ("mmdit", "unet"):
        shutil.copy(FOLDER / "results" / f"survey_{name}.json", results)
    script("evolution").main()
    assert (results / "survey.png").stat().st_size > 10_000


def test_tables_of_the_readme_are_those_of_the_result_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Writing them anew changes nothing."""
    readme = script("readme")
    for name in [name for name in vars(readme) if name.endswith("README")]:
        path = getattr(readme, name)
        copy = tmp_path / f"{name}.md"
        shutil.copy(path, copy)
        monkeypatch.setattr(readme, name, copy)
    before = {path.name: path.read_text() for path in tmp_path.glob("*.md")}
    readme.main()
    assert {path.name: path.read_text() for path in tmp_path.glob("*.md")} == before
