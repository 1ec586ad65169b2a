"""Realised speed-up against the FLOPs-implied one: compiled uncached and compiled cached, side by side in one run.

    python benchmarks/speed.py [--repeats 3] [--only mmdit]

Writes benchmarks/results/speed.json. Both sides go through the same Inductor path; the uncached side is the
all-compute plan. No ratio is printed where the all-compute plan does not equal the eager denoiser.
"""

from __future__ import annotations

import statistics
from typing import Annotated, Any

import cases
import measure
import torch
import typer
from rich.console import Console
from rich.table import Table

import dcc


def time_case(case: cases.Case, repeats: int, backend: str) -> dict[str, Any]:
    """One row of the table."""
    torch.manual_seed(0)
    net, run = case.build().requires_grad_(False), cases.loop(case)
    full = dcc.compile(net, [0], sample=run, policy="interval", interval=1, backend=backend)
    cached = dcc.compile(net, [0], sample=run, policy="taylorseer", backend=backend, **case.policy)
    expected, actual = run(net, 0), run(full, 0)
    error = float((actual - expected).norm() / expected.norm())
    seconds = measure.side_by_side({"uncached": lambda: run(full, 0), "cached": lambda: run(cached, 0)}, repeats)
    realised = measure.median_ratio(seconds["uncached"], seconds["cached"])
    plan = cached.plan
    return {
        "case": case.name,
        "steps": plan.steps,
        "full_steps": sum(plan.steps_mask),
        "forward_ms": 1e3 * statistics.median(seconds["uncached"]) / plan.steps,
        "uncached_s": seconds["uncached"],
        "cached_s": seconds["cached"],
        "realised": realised,
        "flops_implied": plan.speedup,
        "share": realised / plan.speedup,
        "error_uncached": error,
        "compile_s": {"uncached": full.summary().compile_seconds, "cached": cached.summary().compile_seconds},
        "cache_bytes": cached.summary().cache_bytes,
        "problems": [*full.summary().problems[:-1], *cached.summary().problems],
    }


def main(
    repeats: Annotated[int, typer.Option(help="timed runs of each side")] = 3,
    only: Annotated[str, typer.Option(help="cases whose name contains this")] = "",
    backend: str = "inductor",
) -> None:
    """Times every case and writes the result file."""
    table = Table("case", "forward, ms", "full steps", "FLOPs-implied", "realised", "share of it")
    rows = []
    for case in cases.CASES:
        if only not in case.name:
            continue
        row = time_case(case, repeats, backend)
        rows.append(row)
        wrong = row["error_uncached"] > 1e-3
        table.add_row(
            case.name,
            f"{row['forward_ms']:.0f}",
            f"{row['full_steps']} of {row['steps']}",
            f"{row['flops_implied']:.2f}x",
            "wrong numbers" if wrong else f"{row['realised']:.2f}x",
            "" if wrong else f"{row['share']:.3f}",
        )
    Console().print(table)
    print(measure.write("speed", {"backend": backend, "repeats": repeats, "rows": rows}))


if __name__ == "__main__":
    typer.run(main)
