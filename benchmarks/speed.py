"""Wall clock at the same full steps, side by side in one run: eager, torch.compile, other libraries' caches, dcc.

    python benchmarks/speed.py [--repeats 5] [--only mmdit]
    python benchmarks/speed.py --ratios     # dcc alone, at 2x, 4x and 5x; writes speed_ratios.json

Needs benchmarks/requirements-peers.txt. Every contestant has the same weights, inputs and full steps: those of
diffusers' TaylorSeer at an interval of 4. Each has a process of its own and takes turns with torch.compile of the
uncached denoiser; ratios are medians of the ratios within one turn. Writes benchmarks/results/speed.json; on a machine
with CUDA the cases are those of real checkpoints' sizes.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from typing import Annotated, Any

import cases
import measure
import torch
import typer
from measure import Contestant
from rich.console import Console
from rich.table import Table
from speed_peers import PEERS, full_steps
from torch import Tensor
from torch._dynamo.utils import counters

import dcc

BASE, COMPILED = "torch.compile", ", compiled"
PLANS: dict[str, dict[str, Any]] = {"dcc": {}, "dcc, raw output": {"site": "output"}}
RATIOS = {f"dcc, every {n}": {"every": n} for n in (2, 4, 6)}
CASES = cases.GPU_CASES if torch.cuda.is_available() else cases.CASES


def names(ratios: bool) -> list[str]:
    """Of all contestants but the base."""
    libraries = [f"{peer.name}{compiled}" for peer in PEERS for compiled in ("", COMPILED)]
    return ["eager", *RATIOS] if ratios else ["eager", *PLANS, *libraries]


def make(case_name: str, name: str, backend: str) -> tuple[dict[str, Any], Callable[[], float]]:
    """A contestant in its process: what its first two runs showed, and a timed run."""
    case = next(case for case in CASES if case.name == case_name)
    mask, sample, net = full_steps(case), cases.loop(case), case.network()
    facts: dict[str, Any] = {"implied": 1.0}
    start = time.perf_counter()
    if name in ("eager", BASE):
        called = torch.compile(net) if name == BASE else net
        run = lambda: sample(called, 0)  # noqa: E731
    elif name.startswith("dcc"):
        compiled = with_dcc(case, net, mask, backend, **(RATIOS | PLANS)[name])
        facts["implied"] = compiled.plan.speedup
        run = lambda: sample(compiled, 0)  # noqa: E731
    else:
        peer = next(peer for peer in PEERS if peer.name == name.removesuffix(COMPILED))
        facts["implied"] = len(mask) / sum(mask)
        installed = peer.install(net, case, mask, name.endswith(COMPILED))
        run = lambda: installed(sample)  # noqa: E731
    facts["output"] = run().float().cpu().numpy()
    facts["first_s"] = time.perf_counter() - start
    facts["regions"], facts["graph_breaks"] = regions(), sum(counters["graph_break"].values())
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    run()
    facts["recompiled_at_second_run"] = regions() - facts["regions"]
    if torch.cuda.is_available():
        facts["peak_bytes"] = torch.cuda.max_memory_allocated()
    if name.startswith("dcc"):
        summary = compiled.summary()
        facts |= {"regions": summary.programs, "cache_bytes": summary.cache_bytes, "syncs": summary.syncs}
        facts["problems"] = list(summary.problems)
    return facts, lambda: seconds_of(run)


def with_dcc(case: cases.Case, net: Any, mask: list[int], backend: str, site: str = "", every: int = 0) -> Any:
    """A first-order forecast at the mask's steps, or after every so many."""
    return dcc.compile(
        net,
        [0],
        sample=cases.loop(case),
        policy="taylorseer",
        order=1,
        steps_mask=[int(step % every == 0) for step in range(case.steps)] if every else mask,
        backend=backend,
        site=site or case.site,
    )


def seconds_of(run: Callable[[], Tensor]) -> float:
    """Of one run; on an accelerator until it is done."""
    start = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def regions() -> int:
    """Graphs that Dynamo has handed to Inductor so far."""
    return counters["stats"]["unique_graphs"]


def time_case(case: cases.Case, repeats: int, backend: str, ratios: bool) -> dict[str, Any]:
    """All contestants of one case."""
    base, base_seconds = Contestant(make, case.name, BASE, backend), []
    expected = torch.from_numpy(base.facts["output"])
    rows, failed = [], []
    for name in names(ratios):
        contestant = Contestant(make, case.name, name, backend)
        if contestant.runs:
            against, seconds = measure.taking_turns([base, contestant], repeats)
            base_seconds += against
            rows.append(row_of(name, contestant.facts, against, seconds, expected))
            print(f"{case.name}: {name}, {rows[-1]['ratio']:.2f}x", flush=True)
        else:
            failed.append({"name": name, "reason": contestant.facts["reason"]})
            print(f"{case.name}: {name}: {failed[-1]['reason']}", flush=True)
        contestant.close()
    base.close()
    rows.insert(1, row_of(BASE, base.facts, base_seconds, base_seconds, expected))
    forward_ms = 1e3 * statistics.median(base_seconds) / case.steps
    found = {"case": case.name, "full_steps": full_steps(case), "forward_ms": forward_ms}
    return found | {"rows": rows, "failed": failed}


def row_of(
    name: str, facts: dict[str, Any], against: list[float], seconds: list[float], expected: Tensor
) -> dict[str, Any]:
    """A contestant's row of the result file."""
    actual, ratio = torch.from_numpy(facts.pop("output")), measure.median_ratio(against, seconds)
    timed = {"name": name, "seconds": seconds, "ratio": ratio, "share": ratio / facts["implied"]}
    return timed | facts | {"difference_to_uncached": float((actual - expected).norm() / expected.norm())}


def main(
    repeats: Annotated[int, typer.Option(help="turns of each contestant")] = 5,
    only: Annotated[str, typer.Option(help="cases whose name contains this; the file keeps its others")] = "",
    ratios: Annotated[bool, typer.Option(help="dcc alone, at other ratios of full steps")] = False,
    backend: str = "inductor",
) -> None:
    """Times every case and writes the result file."""
    name = "speed_ratios" if ratios else "speed"
    path = measure.RESULTS / f"{name}.json"
    found = {data["case"]: data for data in json.loads(path.read_text())["cases"]} if only and path.exists() else {}
    for case in CASES:
        if only not in case.name:
            continue
        data = found[case.name] = time_case(case, repeats, backend, ratios)
        table = Table("contestant", "against torch.compile", "FLOPs-implied", "share", "regions", "first run")
        for row in data["rows"]:
            table.add_row(
                row["name"],
                f"{row['ratio']:.2f}x",
                f"{row['implied']:.2f}x",
                f"{row['share']:.3f}",
                str(row["regions"]),
                f"{row['first_s']:.1f} s",
            )
        for row in data["failed"]:
            table.add_row(row["name"], row["reason"])
        Console().print(f"\n{data['case']}: {sum(data['full_steps'])} full steps of {len(data['full_steps'])}")
        Console().print(table)
        print(measure.write(name, {"backend": backend, "cases": list(found.values())}))


if __name__ == "__main__":
    typer.run(main)
