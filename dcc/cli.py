"""The command line: `dcc demo`, `dcc policies`, `dcc evaluate`, `dcc sites`, `dcc plan`."""

from __future__ import annotations

import ast
import contextlib
import importlib.metadata
import json as jsonlib
import os
import re
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, cast

import typer
from rich.console import Console
from rich.status import Status
from rich.text import Text
from typer.core import TyperGroup

import dcc
from dcc.errors import DccError, DemoError, PipelineError, PolicyError, PromptError, SettingError
from dcc.files import read_text
from dcc.text import count, decibels

# About three times fewer denoiser FLOPs on both demo pipelines.
INTERVALS = {"taylorseer": 4, "interval": 3}
CALIBRATION = 8  # prompts that policies measure on, which are not those they are scored on


class Commands(TyperGroup):
    """Prints every deliberate refusal as one message and exits with 1; DCC_DEBUG lets the traceback through."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except DccError as error:
            if os.environ.get("DCC_DEBUG"):
                raise
            Console(stderr=True, highlight=False).print(Text.assemble(("error: ", "bold red"), (str(error), "red")))
            raise typer.Exit(1) from error


app = typer.Typer(
    cls=Commands,
    help="A compiler that inserts feature caching into the sampling loop of a diffusion model.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
)
plan_app = typer.Typer(help="Look at plan files.", no_args_is_help=True)
app.add_typer(plan_app, name="plan")


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"dcc {dcc.__version__} (torch {importlib.metadata.version('torch')})")
        raise typer.Exit()


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """A compiler that inserts feature caching into the sampling loop of a diffusion model."""


@app.command()
def demo(
    pipeline: Annotated[str, typer.Option(help="The embedded pipeline: mmdit or unet.")] = "mmdit",
    policy: Annotated[str, typer.Option(help="The caching policy; `dcc policies` lists them.")] = "taylorseer",
    interval: Annotated[int | None, typer.Option(help="A full step every so many steps.")] = None,
    order: Annotated[int | None, typer.Option(help="The order of forecasts, where the policy takes one.")] = None,
    site: Annotated[str | None, typer.Option(help="What to cache; `dcc sites` lists the names.")] = None,
    prompts: Annotated[int, typer.Option(min=1, max=64, help="How many held-out prompts to draw.")] = 8,
    backend: Annotated[str, typer.Option(help="inductor compiles to machine code; eager starts at once.")] = "inductor",
    out: Annotated[Path | None, typer.Option(help="The picture; dcc-demo-PIPELINE.png if not given.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="The seed of the first prompt's noise.")] = 0,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads. The demo models are too small for many.")] = 1,
) -> None:
    """Draw held-out prompts uncached and cached, time both, and lay the images side by side."""
    from dcc.lower.program import check_backend
    from dcc.policies import Setting, make_policy

    settings = dcc.demo.settings(pipeline)
    given = {"interval": INTERVALS.get(policy) if interval is None else interval, "order": order, "site": site}
    parameters = {name: value for name, value in given.items() if value is not None}
    with contextlib.suppress(SettingError):  # bad names and values are refused before any work
        make_policy(policy, Setting(range(settings["num_inference_steps"])), parameters)
    check_backend(backend)
    out = _writable(out or Path(f"dcc-demo-{pipeline}.png"))
    with _threads(threads):
        _demo(pipeline, settings, {"policy": policy, **parameters}, prompts, backend, out, seed)


@app.command("policies")
def show_policies(
    name: Annotated[str | None, typer.Argument(help="One policy: what it does and which parameters it takes.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Every fact, for programs.")] = False,
) -> None:
    """List the published methods that dcc runs, by class of the survey (arXiv 2510.19755), or show one."""
    from dcc.policies import POLICIES, parameter_names
    from dcc.report.tables import policies_table, policy_table

    if name is not None:
        parameter_names(name)  # refuses unknown names, listing the known ones
    chosen = list(POLICIES.values()) if name is None else [POLICIES[name]]
    if as_json:
        typer.echo(jsonlib.dumps([method.facts() for method in chosen], indent=1))
        return
    Console().print(policies_table(chosen) if name is None else policy_table(chosen[0]))


@app.command()
def evaluate(
    pipeline: Annotated[str, typer.Option(help="mmdit, unet, or the folder of a saved diffusers pipeline.")] = "mmdit",
    policy: Annotated[
        list[str] | None, typer.Option(help="NAME or NAME:key=value,key=value, e.g. taylorseer:interval=4,order=1.")
    ] = None,
    plan: Annotated[list[Path] | None, typer.Option(help="A plan that Plan.save wrote.")] = None,
    prompts: Annotated[int, typer.Option(min=1, max=64, help="How many held-out prompts to run.")] = 8,
    backend: Annotated[str, typer.Option(help="inductor compiles to machine code; eager starts at once.")] = "inductor",
    html: Annotated[Path | None, typer.Option(help="Write one HTML page with plots and pictures.")] = None,
    csv: Annotated[Path | None, typer.Option(help="Write a line per plan.")] = None,
    json: Annotated[Path | None, typer.Option(help="Write every number.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Sampler steps, if not the pipeline's own number.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts per run that measures quality.")] = 1,
    seed: Annotated[int, typer.Option(min=0, help="The seed of the first prompt's noise.")] = 0,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 1,
) -> None:
    """Compare policies and plans, each given once or more, with the uncached pipeline: time and fidelity.

    Without any, the policies of `dcc demo`.
    """
    from dcc.lower.program import check_backend
    from dcc.report.evaluate import named  # refuses bad names before any work

    policies = [parse_policy(text) for text in policy or []]
    if not policies and not plan:
        policies = [(name, {"interval": interval}) for name, interval in INTERVALS.items()]
    wanted = (named(policies) if policies else {}) | _plans(plan or [])
    for option, path in (("--html", html), ("--csv", csv), ("--json", json)):
        if path is not None:
            _writable(path, option)
    check_backend(backend)
    call = dcc.demo.settings(pipeline) if pipeline in dcc.demo.names() else {}
    call |= {} if steps is None else {"num_inference_steps": steps}
    with _threads(threads):
        with Stages() as stages:
            stages(f"loading {pipeline}")
            report = dcc.evaluate(
                _load(pipeline),
                wanted,
                dcc.demo.prompts("test")[:prompts],
                calib_prompts=dcc.demo.prompts("calib")[:CALIBRATION],
                backend=cast(Any, backend),
                batch_size=batch_size,
                seed=seed,
                progress=stages.grouped,
                **call,
            )
    console = Console(highlight=False)
    console.print(report)
    for path, save in ((html, report.save_html), (csv, report.to_csv), (json, report.to_json)):
        if path is not None:
            save(path)
            console.print(f"written: {path}", soft_wrap=True)


@app.command()
def sites(
    pipeline: Annotated[str, typer.Option(help="mmdit, unet, or the folder of a saved diffusers pipeline.")] = "mmdit",
) -> None:
    """Print every value of a pipeline's denoiser that may be cached, with its shape, bytes and share of FLOPs."""
    with Stages() as stages:
        stages(f"loading {pipeline}")
        pipe = _load(pipeline)
        stages("capturing the denoiser")
        call = dcc.demo.settings(pipeline) if pipeline in dcc.demo.names() else {}
        found = dcc.sites(pipe, dcc.demo.prompts()[:1], **call)
    Console().print(found)


@plan_app.command("show")
def plan_show(
    file: Annotated[Path, typer.Argument(help="A plan that Plan.save wrote.")],
    steps: Annotated[bool, typer.Option("--steps", help="Also list what each step computes or forecasts.")] = False,
) -> None:
    """Print a plan readably."""
    from dcc.report.tables import plan_table, steps_table

    plan = dcc.Plan.load(file)
    console = Console()
    console.print(plan_table(plan))
    if steps:
        console.print()
        console.print(steps_table(plan))


@plan_app.command("search")
def plan_search(
    out: Annotated[Path, typer.Argument(help="The plan file to write.")],
    pipeline: Annotated[str, typer.Option(help="mmdit, unet, or the folder of a saved diffusers pipeline.")] = "mmdit",
    speedup: Annotated[float | None, typer.Option(help="Ratio of denoiser FLOPs, uncached over cached.")] = None,
    quality: Annotated[float | None, typer.Option(help="PSNR in dB to the uncached pictures.")] = None,
    latency: Annotated[float | None, typer.Option(help="Milliseconds a picture.")] = None,
    cache_bytes: Annotated[int | None, typer.Option(help="Limit of the anchors' bytes.")] = None,
    effort: Annotated[str, typer.Option(help="fast, normal or thorough.")] = "normal",
    prompts: Annotated[Path | None, typer.Option(help="A text file, a prompt per line; else the demo's own.")] = None,
    number: Annotated[int, typer.Option(min=4, help="How many of the prompts to use.")] = 16,
    steps: Annotated[int | None, typer.Option(min=1, help="Sampler steps, if not the pipeline's own number.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="The seed of the search and of the first prompt's noise.")] = 0,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 1,
) -> None:
    """Search the best plan for a budget, on prompts; it says what it reaches on prompts held back."""
    from dcc.report.tables import plan_table

    _writable(out, "OUT")
    call = dcc.demo.settings(pipeline) if pipeline in dcc.demo.names() else {}
    call |= {} if steps is None else {"num_inference_steps": steps}
    texts = dcc.demo.prompts("calib") if prompts is None else _lines(prompts)
    with _threads(threads):
        with Stages() as stages:
            stages(f"loading {pipeline}")
            budget = {"speedup": speedup, "quality": quality, "latency": latency, "cache_bytes": cache_bytes}
            plan = dcc.plan(
                _load(pipeline),
                texts[:number],
                effort=cast(Any, effort),
                seed=seed,
                progress=stages.grouped,
                **budget,
                **call,
            )
    plan.save(out)
    console = Console(highlight=False)
    console.print(plan_table(plan))
    console.print(f"written: {out}", soft_wrap=True)


@contextlib.contextmanager
def _threads(number: int) -> Iterator[None]:
    """Runs with this many CPU threads inside the context."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _plans(paths: list[Path]) -> dict[str, dcc.Plan]:
    """The plans of these files, named like the files; by their whole path where two files share a name."""
    stems = [path.stem for path in paths]
    return {path.stem if stems.count(path.stem) == 1 else str(path): dcc.Plan.load(path) for path in paths}


def _lines(file: Path) -> list[str]:
    """The lines of a text file that are not empty. Raises PromptError where there is no such file."""
    return [line.strip() for line in read_text(file, PromptError).splitlines() if line.strip()]


def _demo(
    name: str, settings: dict[str, Any], caching: dict[str, Any], number: int, backend: str, out: Path, seed: int
) -> None:
    """Runs a pipeline uncached and cached in turn, then prints and draws what came out."""
    import torch

    from dcc.report.grid import save_grid
    from dcc.report.tables import demo_table, plan_table

    start = time.perf_counter()
    prompts = dcc.demo.prompts("test")[:number]
    policy = caching.pop("policy")
    with Stages() as stages:
        stages(f"loading {name}")
        pipe = _load(name)
        wanted = {"cached": (policy, caching)}
        report = dcc.evaluate(
            pipe,
            wanted,
            prompts,
            calib_prompts=dcc.demo.prompts("calib")[:CALIBRATION],
            seed=seed,
            backend=cast(Any, backend),
            progress=stages.grouped,
            shown=number,
            **settings,
        )
        row = report["cached"]
        if row.error:
            raise DemoError(row.error)
        stages(f"writing {out}")
        plan = row.plan
        assert plan is not None  # a row that has not failed
        full = f"{sum(plan.steps_mask)} of {plan.steps} steps computed in full"
        headline = f"{name}: {plan.policy}, {full}, speed-up {report.speedup(row):.2f}x"
        before, after = (torch.stack(images) for images in zip(*row.pictures.values(), strict=True))
        save_grid(out, prompts, before, after, headline, [decibels(value) for value in row.psnr])
    console = Console(highlight=False)
    console.print("\n[bold]The plan[/]")
    console.print(plan_table(plan))
    threads = count(torch.get_num_threads(), "CPU thread")
    console.print(f"\n[bold]What it does[/]  {count(number, 'held-out prompt')}, {backend}, {threads}")
    console.print(demo_table(report, row))
    for part in (report.reference, row):
        for note in part.notes:
            console.print(Text(f"note: {part.name}: {note}", "yellow"))
    console.print(f"\npicture: {out}\ntotal: {time.perf_counter() - start:.0f} s", soft_wrap=True)


def _load(pipeline: str) -> Any:
    """A demo pipeline by name, or a saved one by folder, without the libraries' chatter."""
    with _quiet():
        if pipeline in dcc.demo.names() or not (Path(pipeline) / "model_index.json").is_file():
            if pipeline not in dcc.demo.names() and Path(pipeline).exists():
                raise PipelineError(f"{pipeline}: not a saved diffusers pipeline, it has no model_index.json")
            return dcc.demo.load(pipeline)
        try:
            from dcc.record.target import load_pipeline

            return load_pipeline(pipeline)
        except Exception as error:  # diffusers raises many kinds, KeyError for one; each means that it cannot be loaded
            raise PipelineError(f"{pipeline}: cannot be loaded: {type(error).__name__}: {error}") from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silences progress bars and advice of the libraries that load a pipeline; errors are raised as ever."""
    from diffusers.utils import logging as diffusers_logging  # noqa: TID251 - only to silence it while it loads
    from transformers.utils import logging as transformers_logging

    loggers = [diffusers_logging, transformers_logging]
    before = [(library.get_verbosity(), library.is_progress_bar_enabled()) for library in loggers]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for library in loggers:
                library.set_verbosity_error()
                library.disable_progress_bar()
            yield
    finally:
        for library, (verbosity, bar) in zip(loggers, before, strict=True):
            library.set_verbosity(verbosity)
            if bar:
                library.enable_progress_bar()


def parse_policy(text: str) -> tuple[str, dict[str, Any]]:
    """Reads "taylorseer:interval=4,site=stack" as ("taylorseer", {"interval": 4, "site": "stack"}).

    Raises PolicyError for what is not written like this.
    """
    name, _, rest = text.partition(":")
    parameters: dict[str, Any] = {}
    for item in re.split(r",(?![^\[]*\])", rest) if rest else []:  # commas inside brackets belong to a value
        key, equals, value = item.partition("=")
        if not equals:
            raise PolicyError(f"--policy {text}: {item!r} is not key=value; write e.g. taylorseer:interval=4,order=1")
        try:
            parameters[key.strip()] = ast.literal_eval(value)
        except (ValueError, SyntaxError):  # a plain word, such as a site's name
            parameters[key.strip()] = value
    return name, parameters


def _writable(path: Path, option: str = "--out") -> Path:
    """The path, where a file can be written there. Raises DemoError, before any work, where it cannot."""
    folder = path.absolute().parent
    if not folder.is_dir():
        raise DemoError(f"{option} {path}: there is no folder {folder}; create it or choose another path")
    if path.is_dir():
        raise DemoError(f"{option} {path}: this is a folder; name a file in it, e.g. {path / 'dcc'}")
    if not os.access(folder, os.W_OK):
        raise DemoError(f"{option} {path}: the folder {folder} cannot be written to; choose another path")
    return path


class Stages:
    """What is going on, on stderr: a spinner on a terminal while a stage runs, and a line with its seconds after it."""

    def __init__(self) -> None:
        self.console = Console(stderr=True, highlight=False)
        self.status: Status | None = None
        self.line, self.started = "", 0.0

    def __enter__(self) -> Stages:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: Any) -> None:
        self.end(finished=kind is None)

    def __call__(self, line: str) -> None:
        """Ends the running stage and begins the next one."""
        self.end()
        self.line, self.started = line, time.perf_counter()
        self.status = self.console.status(Text(line))
        self.status.start()

    def grouped(self, line: str) -> None:
        """Takes a line "what: detail": one stage per `what`, whose details show while it runs."""
        what, _, detail = line.partition(": ")
        if what != self.line:
            self(what)
        self.update(detail)

    def update(self, detail: str) -> None:
        """Shows how far the running stage is."""
        if self.status:
            self.status.update(Text(f"{self.line}: {detail}"))

    def end(self, finished: bool = True) -> None:
        """Ends the running stage, if there is one; leaves its line only where it finished."""
        if self.status:
            self.status.stop()
            self.status = None
            if finished:
                seconds = time.perf_counter() - self.started
                self.console.print(Text(f"{seconds:6.1f} s  {self.line}"), soft_wrap=True)
