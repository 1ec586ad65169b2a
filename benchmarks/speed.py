"""Wall clock at the same full steps, side by side in one run: eager, torch.compile, other libraries' caches, dcc.

    python benchmarks/speed.py [--repeats 3] [--only mmdit]
    python benchmarks/speed.py --ratios     # dcc alone, at 2x, 4x and 5x; writes speed_ratios.json

Needs benchmarks/requirements-peers.txt. Every contestant has the same weights, inputs and full steps: those of
diffusers' TaylorSeer at an interval of 4. Ratios are medians of the ratios within one repeat. Writes
benchmarks/results/speed.json; on a machine with CUDA the cases are those of real checkpoints' sizes.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Annotated, Any

import cases
import measure
import torch
import typer
from rich.console import Console
from rich.table import Table
from speed_peers import PEERS, full_steps
from torch import Tensor
from torch._dynamo.utils import counters

import dcc

PLANS: dict[str, dict[str, Any]] = {"dcc": {}, "dcc, raw output": {"site": "output"}}
RATIOS = {f"dcc, every {n}": {"every": n} for n in (2, 4, 6)}


class Timed:
    """One contestant: `run()` samples once; what compiling and the first run took is kept."""

    def __init__(self, name: str, ideal: float, run: Callable[[], Tensor]) -> None:
        self.name, self.ideal, self.run = name, ideal, run
        torch._dynamo.reset()
        counters.clear()
        start = time.perf_counter()
        run()
        self.first_s = time.perf_counter() - start
        self.regions, self.breaks = regions(), sum(counters["graph_break"].values())
        run()
        self.recompiled = regions() - self.regions
        self.facts: dict[str, Any] = {}


def regions() -> int:
    """Graphs that Dynamo has handed to Inductor so far."""
    return counters["stats"]["unique_graphs"]


def contestants(
    case: cases.Case, mask: list[int], backend: str, ratios: bool
) -> Iterator[tuple[Timed | None, str, str]]:
    """(contestant, name, "") or (None, name, why it does not run)."""
    sample, ideal = cases.loop(case), len(mask) / sum(mask)
    for compiled in (False, True):
        net = case.network()
        net = torch.compile(net) if compiled else net
        yield Timed("torch.compile" if compiled else "eager", 1.0, lambda net=net: sample(net, 0)), "", ""
    for name, parameters in (RATIOS if ratios else PLANS).items():
        every = parameters.get("every")
        start = time.perf_counter()
        net = dcc.compile(
            case.network(),
            [0],
            sample=sample,
            policy="taylorseer",
            order=1,
            steps_mask=[int(step % every == 0) for step in range(case.steps)] if every else mask,
            backend=backend,
            site=parameters.get("site", case.site),
        )
        seconds = time.perf_counter() - start
        timed = Timed(name, net.plan.speedup, lambda net=net: sample(net, 0))
        timed.first_s += seconds
        summary = net.summary()
        timed.regions = summary.programs
        timed.facts = {"cache_bytes": summary.cache_bytes, "problems": list(summary.problems), "syncs": summary.syncs}
        yield timed, name, ""
    for peer in () if ratios else PEERS:
        for compiled in (False, True):
            name = f"{peer.name}{', compiled' if compiled else ''}"
            net = case.network()
            try:
                run = peer.install(net, case, mask, compiled)
                yield Timed(name, ideal, lambda run=run: run(sample)), name, ""
            except Exception as error:  # whatever a library raises on a denoiser that it does not know
                yield None, name, f"{type(error).__name__}: {str(error).strip().splitlines()[0][:160]}"


@contextlib.contextmanager
def peak_memory(found: dict[str, int]) -> Iterator[None]:
    """Peak bytes of the accelerator's memory, where there is one."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    yield
    if torch.cuda.is_available():
        found["peak_bytes"] = torch.cuda.max_memory_allocated()


def time_case(case: cases.Case, repeats: int, backend: str, ratios: bool) -> dict[str, Any]:
    """All contestants of one case."""
    mask = full_steps(case)
    runners, failed = [], []
    for timed, name, reason in contestants(case, mask, backend, ratios):
        if timed is None:
            failed.append({"name": name, "reason": reason})
        else:
            print(f"{case.name}: {timed.name}, first run {timed.first_s:.1f} s", flush=True)
            runners.append(timed)
    seconds = measure.side_by_side({timed.name: timed.run for timed in runners}, repeats)
    expected = runners[0].run()
    rows = []
    for timed in runners:
        memory: dict[str, int] = {}
        with peak_memory(memory):
            actual = timed.run()
        ratio = measure.median_ratio(seconds["torch.compile"], seconds[timed.name])
        rows.append(
            {
                "name": timed.name,
                "seconds": seconds[timed.name],
                "ratio": ratio,
                "implied": timed.ideal,
                "share": ratio / timed.ideal,
                "first_s": timed.first_s,
                "regions": timed.regions,
                "graph_breaks": timed.breaks,
                "recompiled_at_second_run": timed.recompiled,
                "difference_to_uncached": float((actual - expected).norm() / expected.norm()),
                **timed.facts,
                **memory,
            }
        )
    forward_ms = 1e3 * statistics.median(seconds["torch.compile"]) / case.steps
    return {"case": case.name, "full_steps": mask, "forward_ms": forward_ms, "rows": rows, "failed": failed}


def main(
    repeats: Annotated[int, typer.Option(help="timed runs of each contestant")] = 3,
    only: Annotated[str, typer.Option(help="cases whose name contains this")] = "",
    ratios: Annotated[bool, typer.Option(help="dcc alone, at other ratios of full steps")] = False,
    threads: Annotated[int, typer.Option(help="of the processor; 0: as torch chooses")] = 0,
    backend: str = "inductor",
) -> None:
    """Times every case and writes the result file."""
    if threads:
        torch.set_num_threads(threads)
    found = []
    for case in cases.GPU_CASES if torch.cuda.is_available() else cases.CASES:
        if only not in case.name:
            continue
        data = time_case(case, repeats, backend, ratios)
        found.append(data)
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
        print(
            measure.write(
                "speed_ratios" if ratios else "speed", {"backend": backend, "repeats": repeats, "cases": found}
            )
        )


if __name__ == "__main__":
    typer.run(main)
