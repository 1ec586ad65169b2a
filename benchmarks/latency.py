"""Latency of the searched plans and of the best released caches, on the demo pipelines as a user runs them.

    python benchmarks/latency.py [mmdit unet] [--repeats 9]

One image at a time, from the sampler's first step to the last latent (neither text encoders nor decoder), against
`torch.compile` of the uncached denoiser. At every budget: the searched plan, and the other library's cache that is best
there in quality_<pipeline>.json, eagerly and compiled. Every contestant has a process of its own, because Dynamo's
guards of one slow the others down; those of a budget take turns, ratios are medians over the turns. Writes
benchmarks/results/latency_<pipeline>.json after every pipeline.
"""

from __future__ import annotations

import contextlib
import functools
import time
import warnings
from collections.abc import Callable
from typing import Annotated, Any

import measure
import torch
import typer
from measure import Contestant
from peers import peers
from plans import FOLDER
from quality import best, load
from rich.console import Console
from rich.table import Table
from subjects import BUDGETS, Subject
from torch._dynamo.utils import counters

import dcc

LIBRARIES = ("diffusers", "cache-dit", "DeepCache")
SEED = 1000


class Timed:
    """One contestant on a pipeline of its own; `seconds()` samples once. What `stack` holds is installed until then."""

    def __init__(self, subject: Subject, pipe: Any, changes: dict[str, Any], stack: contextlib.ExitStack) -> None:
        self.pipe, self.stack = pipe, stack
        self.call = subject.call | changes | {"output_type": "latent"}
        self.prompt, self.started = dcc.demo.prompts("test")[0], 0.0
        inner = pipe.scheduler.set_timesteps

        @functools.wraps(inner)
        def set_timesteps(*args: Any, **kwargs: Any) -> Any:
            self.started = time.perf_counter()
            return inner(*args, **kwargs)

        pipe.scheduler.set_timesteps = set_timesteps

    @torch.no_grad()
    def seconds(self) -> float:
        """Of the sampling loop: from the schedule to the last latent."""
        self.pipe(self.prompt, generator=torch.Generator().manual_seed(SEED), **self.call)
        return time.perf_counter() - self.started


def prepared(subject: Subject, row: dict[str, Any], compiled: bool) -> Timed:
    """The uncached pipeline, a searched plan, or a library's cache with the parameters that quality.py tuned."""
    pipe, changes, stack = subject.fresh(), None, contextlib.ExitStack()
    pipe.set_progress_bar_config(disable=True)
    if row["family"] == "dcc solver":
        plan = dcc.Plan.load(FOLDER / row["parameters"]["plan"])
        dcc.compile(pipe, dcc.demo.prompts("calib")[:2], plan=plan, **subject.call)
    elif row["family"] != "uncached":
        found = next(contestant for contestant in peers(subject) if contestant.name == row["name"])
        changes = stack.enter_context(found.install(subject, pipe, **row["parameters"]))
    if compiled and row["family"] != "dcc solver":
        subject.target(pipe).module.compile()
    return Timed(subject, pipe, changes or {}, stack)


def make(name: str, row: dict[str, Any], compiled: bool) -> tuple[dict[str, Any], Callable[[], float]]:
    """A contestant in its process: what its first image showed, and the seconds of another one."""
    warnings.simplefilter("ignore")
    timed = prepared(Subject(name), row, compiled)
    start = time.perf_counter()
    timed.seconds()
    facts = {"first_s": time.perf_counter() - start, "graph_breaks": sum(counters["graph_break"].values())}
    timed.seconds()  # what is compiled for the second image
    return facts, timed.seconds


def side_by_side(name: str, group: list[tuple[dict[str, Any], bool]], repeats: int) -> list[dict[str, Any]]:
    """Rows of the contestants of one budget; the first of them, uncached and compiled, is what ratios are against."""
    contestants = []
    for row, compiled in group:
        contestants.append(Contestant(make, name, row, compiled))
        print(name, row["name"], "compiled" if compiled else "eager", contestants[-1].facts, flush=True)
    rows, timed = [], measure.taking_turns(contestants, repeats)
    for (row, compiled), contestant, seconds in zip(group, contestants, timed, strict=True):
        kept = {key: row[key] for key in ("name", "family", "speedup", "psnr", "psnr_worst")}
        rows.append(kept | {"compiled": compiled, "seconds": seconds} | contestant.facts)
        if contestant.runs:
            rows[-1]["ratio"] = measure.median_ratio(timed[0], seconds)
        contestant.close()
    return rows


def main(
    pipelines: Annotated[list[str] | None, typer.Argument(help="demo pipelines")] = None,
    repeats: Annotated[int, typer.Option(help="turns")] = 9,
) -> None:
    """Measures and writes the result files."""
    for name in pipelines or dcc.demo.names():
        rows = load(name, "quality")["rows"]
        uncached, found = rows[0], []
        for budget in BUDGETS:
            chosen = best([row for row in rows if row["family"].startswith((*LIBRARIES, "dcc solver"))], budget)
            plan = next(row for row in chosen if row["family"] == "dcc solver")
            peer = next(row for row in chosen if row["family"] != "dcc solver")
            group = [(uncached, True), (uncached, False), (plan, True), (peer, False), (peer, True)]
            found += [row | {"budget": budget} for row in side_by_side(name, group, repeats)]
        table = Table("contestant", "FLOPs", "against torch.compile", "PSNR")
        for row in found:
            label = f"{row['name']}{', compiled' if row['compiled'] else ''}"
            ratio = f"{row['ratio']:.2f}x" if "ratio" in row else row["reason"]
            table.add_row(label, f"{row['speedup']:.2f}x", ratio, f"{row['psnr']:.1f} dB")
        Console().print(table)
        print(measure.write(f"latency_{name}", {"pipeline": name, "repeats": repeats, "rows": found}))


if __name__ == "__main__":
    typer.run(main)
