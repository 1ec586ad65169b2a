"""Tables for the terminal: what a plan decides, and what a caching demo measured."""

from __future__ import annotations

import inspect
import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from dcc.decisions import Decision
from dcc.plans.plan import Plan, describe
from dcc.quality import mean_psnr
from dcc.text import decibels, human_bytes, human_seconds

if TYPE_CHECKING:
    from dcc.policies import Method
    from dcc.report.report import Report
    from dcc.report.rows import Row

STYLES = {Decision.COMPUTE: "bold green", Decision.REFRESH: "cyan"}  # of one step in a line of steps; others are dim


def demo_table(report: Report, row: Row, title: str | None = None) -> Table:
    """Latency, fidelity and cost of one plan of a report against the uncached pipeline; 54 columns wide.

    `row` is one that has not failed.
    """
    plan, speedup, ideal = row.plan, report.speedup(row), row.ideal
    assert plan is not None and ideal is not None
    table = Table(title=title, title_justify="left")
    table.add_column("", no_wrap=True)
    table.add_column("uncached", justify="right", no_wrap=True)
    table.add_column("cached", justify="right", no_wrap=True)
    table.add_row("latency per image (median)", human_seconds(report.reference.latency), human_seconds(row.latency))
    table.add_row("full steps", f"{plan.steps} of {plan.steps}", row.full_steps.replace("/", " of "))
    table.add_row("cache", "none", human_bytes(row.cache_bytes if plan.trigger else plan.cache_bytes), end_section=True)
    table.add_row("[bold]speed-up[/]", "", f"[bold]{speedup:.2f}x[/]")
    table.add_row("ideal speed-up (denoiser FLOPs)", "", f"{ideal:.2f}x")
    table.add_row("share of the ideal", "", f"{speedup / ideal:.0%}", end_section=True)
    table.add_row("PSNR, mean", "", f"[bold]{decibels(mean_psnr(row.psnr))}[/]")
    table.add_row("PSNR, worst image", "", decibels(min(row.psnr)))
    table.add_row("SSIM, mean", "", f"{statistics.fmean(row.ssim):.4f}")
    return table


def plan_table(plan: Plan) -> Table:
    """What a plan decides and expects, as names and values that wrap at any width."""
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(no_wrap=True, style="dim")
    table.add_column(overflow="fold")
    parameters = ", ".join(f"{name}={value}" for name, value in plan.parameters.items())
    table.add_row("policy", Text(f"{plan.policy}({parameters})"))
    table.add_row("model", Text(plan.model))
    table.add_row("scheduler", Text(f"{plan.scheduler}, levels {plan.levels[0]:.4g} to {plan.levels[-1]:.4g}"))
    table.add_row("full steps", f"{sum(plan.steps_mask)} of {plan.steps}, {len(plan.rows)} variants")
    for k, site in enumerate(plan.sites):
        table.add_row("site", Text(f"{site}, up to {plan.anchors} anchors"))
        # full steps stand out by weight and, without colours, as 1 against 0
        mask = Text()
        for row in plan.schedule:
            mask.append(str(row[k]), STYLES.get(Decision(row[k]), "dim"))
        table.add_row("  steps", mask)
    if plan.trigger:
        table.add_row("trigger", Text(f"{plan.trigger.kind}; decides at run time where a step shows 0"))
        return table
    table.add_row("expected", f"{plan.speedup:.2f}x fewer denoiser FLOPs")
    table.add_row("", f"{plan.flops_uncached / 1e9:.2f} to {plan.flops / 1e9:.2f} GFLOP per run and stream")
    table.add_row("cache", f"{human_bytes(plan.cache_bytes)} per stream")
    if plan.measured:
        table.add_row("measured", describe(plan.measured))
    return table


def steps_table(plan: Plan) -> Table:
    """Each step of a plan: its noise level, what it does with each site, and the weights of the anchors it reads."""
    table = Table(box=None, pad_edge=False)
    table.add_column("step", justify="right")
    table.add_column("level", justify="right")
    for site in plan.sites:
        table.add_column(Text(site))
    for step, level in enumerate(plan.levels):
        cells = []
        for k in range(len(plan.sites)):
            anchors = plan.anchor_steps(step, k)
            rows = [
                ", ".join(f"{w:+.3g} of {s}" for w, s in zip(weights, anchors, strict=False))
                for weights in plan.weights(step, k)
            ]
            refreshed = plan.schedule[step][k] == Decision.REFRESH
            text = "; ".join([*(["some tokens computed"] if refreshed else []), *rows])
            decided = plan.trigger and plan.schedule[step][k] != Decision.COMPUTE
            if decided:
                cells.append(Text("decided at run time", "yellow"))
            else:
                cells.append(Text(text, "cyan" if refreshed else "dim") if any(rows) else Text("computed", "green"))
        table.add_row(str(step), f"{level:.4g}", *cells)
    return table


def policies_table(methods: Sequence[Method]) -> Group:
    """All methods, one table per class of the survey, at most 80 columns wide."""
    parts: list[Table | Text] = []
    for kind in dict.fromkeys(method.kind for method in methods):
        title = f"{kind.replace('_', '-')} ({sum(method.kind == kind for method in methods)})"
        # 16 + 20 + 15 + 10 + 5 + 3 and a gap of two after each but the last: the longest word of each column fits
        look = {"box": box.SIMPLE_HEAD, "show_edge": False, "padding": (0, 1, 0, 0)}
        table = Table(title=title, title_justify="left", title_style="bold", **look)
        table.add_column("policy", no_wrap=True, style="bold", width=16)
        table.add_column("decided by", width=20, overflow="fold")
        table.add_column("forecast", width=15, overflow="fold")
        table.add_column("needs", width=10, overflow="fold")
        table.add_column("reads", width=5)
        table.add_column("", width=3)
        for method in (method for method in methods if method.kind == kind):
            needs = "" if method.needs == "nothing" else method.needs
            reads = {"0": "", "1": "1"}.get(method.syncs, "rare")
            table.add_row(method.name, method.trigger, method.predictor, needs, reads, method.checked)
        parts.append(table)
    parts.append(
        Text(
            "reads: host reads per step; none where empty, rare where only computed steps read. Last column: formula "
            "checked in the method's own code (C), in another's (C3), by description only (D). "
            "`dcc policies NAME` shows one.",
            "dim",
        )
    )
    return Group(*parts)


def policy_table(method: Method) -> Group:
    """One method: its docstring, facts and parameters."""
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(no_wrap=True, style="dim")
    table.add_column(overflow="fold")
    facts = method.facts()
    for name in ("title", "kind", "sites", "trigger", "predictor", "needs", "source", "checked"):
        table.add_row(name, Text(str(facts[name]).replace("_", "-") if name == "kind" else str(facts[name])))
    table.add_row("host reads", Text(f"{method.syncs} per step"))
    for name, default in method.defaults.items():
        table.add_row(f"  {name}=", Text(default))
    return Group(Text(method.name, "bold"), Text(_paragraphs(inspect.getdoc(method.make) or "")), Text(""), table)


def _paragraphs(text: str) -> str:
    """Each paragraph on one line, for the terminal to wrap."""
    return "\n\n".join(" ".join(part.split()) for part in text.split("\n\n"))
