"""Latency of the searched plans and of the best released caches, on the demo pipelines as a user runs them.

    python benchmarks/latency.py [mmdit unet] [--repeats 9] [--only REGEX]

One image at a time, from the sampler's first step to the last latent (neither text encoders nor decoder), against
`torch.compile` of the uncached denoiser. At every budget: the searched plan, and the other library's cache that is best
there in quality_<pipeline>.json, eagerly and compiled. Contestants take turns, ratios are medians over the turns.
Writes benchmarks/results/latency_<pipeline>.json after every pipeline.
"""

from __future__ import annotations

import contextlib
import functools
import re
import time
import warnings
from collections.abc import Iterator
from typing import Annotated, Any

import measure
import torch
import typer
from baselines import solver_plans
from peers import peers
from plans import FOLDER
from quality import best, load
from rich.console import Console
from rich.table import Table
from subjects import BUDGETS, Contestant, Subject
from torch._dynamo.utils import counters

import dcc

LIBRARIES = ("diffusers", "cache-dit", "DeepCache")
SEED = 1000


class Timed:
    """One contestant on a pipeline of its own; `seconds()` samples once."""

    def __init__(self, subject: Subject, pipe: Any, changes: dict[str, Any]) -> None:
        self.pipe, self.call = pipe, subject.call | changes | {"output_type": "latent"}
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


def installed(stack: contextlib.ExitStack, subject: Subject, row: dict[str, Any], found: Contestant) -> Timed:
    """A contestant of quality.py with the parameters that it was tuned to."""
    pipe = subject.fresh()
    pipe.set_progress_bar_config(disable=True)
    changes = stack.enter_context(found.install(subject, pipe, **row["parameters"]))
    return Timed(subject, pipe, changes or {})


def contestants(stack: contextlib.ExitStack, subject: Subject, only: str) -> Iterator[tuple[dict[str, Any], Timed]]:
    """(facts, contestant): the uncached pipeline, and at every budget the searched plan and the best library."""
    rows = load(subject.name, "quality")["rows"]
    known = {contestant.name: contestant for contestant in (*solver_plans(subject), *peers(subject))}
    for compiled in (False, True):
        pipe = subject.fresh()
        pipe.set_progress_bar_config(disable=True)
        if compiled:
            subject.target(pipe).module.compile()
        yield {"name": "uncached", "compiled": compiled, "speedup": 1.0, "budget": None}, Timed(subject, pipe, {})
    for budget in BUDGETS:
        chosen = best([row for row in rows if row["family"].startswith((*LIBRARIES, "dcc solver"))], budget)
        plan = next(row for row in chosen if row["family"] == "dcc solver")
        peer = next(row for row in chosen if row["family"] != "dcc solver")
        for row in (plan, peer):
            if not re.search(only, row["name"]):
                continue
            facts = {name: row[name] for name in ("name", "family", "speedup", "psnr", "psnr_worst")}
            if row is plan:
                pipe = subject.fresh()
                pipe.set_progress_bar_config(disable=True)
                saved = dcc.Plan.load(FOLDER / row["parameters"]["plan"])
                dcc.compile(pipe, dcc.demo.prompts("calib")[:2], plan=saved, **subject.call)
                timed = Timed(subject, pipe, {})
                facts["problems"] = list(subject.target(pipe).module.summary().problems)
                yield facts | {"compiled": True, "budget": budget}, timed
                continue
            for compiled in (False, True):
                timed = installed(stack, subject, row, known[row["name"]])
                if compiled:
                    subject.target(timed.pipe).module.compile()
                yield facts | {"compiled": compiled, "budget": budget}, timed


def main(
    pipelines: Annotated[list[str] | None, typer.Argument(help="demo pipelines")] = None,
    repeats: Annotated[int, typer.Option(help="turns")] = 9,
    only: Annotated[str, typer.Option(help="rows whose name this finds")] = "",
) -> None:
    """Measures and writes the result files."""
    torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = 10_000  # many instances
    for name in pipelines or dcc.demo.names():
        subject, facts, runs = Subject(name), [], {}
        with contextlib.ExitStack() as stack, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for row, timed in contestants(stack, subject, only):
                counters.clear()
                start = time.perf_counter()
                try:
                    timed.seconds()
                    row["first_s"] = time.perf_counter() - start
                    row["graph_breaks"] = sum(counters["graph_break"].values())
                    timed.seconds()  # what is compiled for the second image
                    runs[len(facts)] = timed
                except Exception as error:  # whatever a library raises when it is compiled
                    row["reason"] = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:160]}"
                facts.append(row)
                print(name, row["name"], "compiled" if row["compiled"] else "eager", row.get("first_s"), flush=True)
            for timed in runs.values():
                timed.seconds()  # what is compiled again now that others are there
            seconds: dict[int, list[float]] = {index: [] for index in runs}
            for _ in range(repeats):
                for index, timed in runs.items():
                    seconds[index].append(timed.seconds())
        for index, row in enumerate(facts):
            if index in seconds:
                row["seconds"] = seconds[index]
                row["ratio"] = measure.median_ratio(seconds[1], seconds[index])
        table = Table("contestant", "FLOPs", "against torch.compile", "PSNR")
        for row in facts:
            label = f"{row['name']}{', compiled' if row['compiled'] else ''}"
            ratio = f"{row['ratio']:.2f}x" if "ratio" in row else row["reason"]
            table.add_row(label, f"{row['speedup']:.2f}x", ratio, f"{row.get('psnr', 100.0):.1f} dB")
        Console().print(table)
        print(measure.write(f"latency_{name}", {"pipeline": name, "repeats": repeats, "rows": facts}))


if __name__ == "__main__":
    typer.run(main)
