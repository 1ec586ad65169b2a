"""What dcc's own Python takes in one call: a forecast step and a full step, with one selector and with 114.

    python benchmarks/host_overhead.py [--repeats 60]

A transformer of 57 blocks and width 16, eagerly: from the call of the denoiser to its answer, less the time inside the
variant's program. Selectors are the 114 branches, each with a schedule and coefficients of its own, or the whole stack.
Milliseconds are medians over all steps of that kind. A request also looks twice whether the denoiser is as it was: what
that takes with a multimodal DiT of 57 blocks of full size, and as a share of a generation with one of width 256. Writes
benchmarks/results/host_overhead.json.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from time import perf_counter_ns
from typing import Annotated, Any

import compile_time
import measure
import torch
import typer
from diffusers import FluxTransformer2DModel
from torch import Tensor, nn

import dcc
from dcc.capture.state import Mark
from dcc.lower.program import Program
from dcc.plans.predictors import Predictor
from dcc.variants.cost import planned

BLOCKS, WIDTH, STEPS = 57, 16, 12
MASK = (1, 1, 1, 0, 0, 0, 1, 0, 0, 0, 1, 0)


class Block(nn.Module):
    """Gated attention and MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.gates = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, 2 * WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        attention, mlp = self.gates(time)[:, None].chunk(2, -1)
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, 2, WIDTH // 2)).permute(2, 0, 3, 1, 4).unbind(0)
        x = x + attention * nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return x + mlp * self.mlp(self.norm(x))


class Net(nn.Module):
    """The blocks between an embedder and a head, with a prompt that is added."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.embed, self.time, self.head = nn.Linear(4, WIDTH), nn.Linear(1, WIDTH), nn.Linear(WIDTH, 4)
        self.blocks = nn.ModuleList([Block() for _ in range(blocks)])

    def forward(self, sample: Tensor, time: Tensor, text: Tensor) -> Tensor:
        x, time = self.embed(sample) + text[:, None], self.time(time[:, None])
        for block in self.blocks:
            x = block(x, time)
        return self.head(x)


@torch.no_grad()
def sample(net: nn.Module, prompt: Any, seen: Any = None) -> Tensor:
    """A run of STEPS steps; `seen(step, nanoseconds)` gets what each call took."""
    x, text = torch.randn(1, 8, 4, generator=torch.Generator().manual_seed(0)), torch.zeros(1, WIDTH)
    for step in range(STEPS):
        time = torch.full((1,), 1 - step / STEPS)
        start = perf_counter_ns()
        output = net(sample=x, time=time, text=text)
        if seen is not None:
            seen(step, perf_counter_ns() - start)
        x = x - 0.1 * output
    return x


@contextmanager
def timed_programs() -> Iterator[list[int]]:
    """The nanoseconds spent in programs, as the only element of a list."""
    spent, call = [0], Program.__call__

    def timed(self: Program, values: Any) -> list[Tensor]:
        start = perf_counter_ns()
        outputs = call(self, values)
        spent[0] += perf_counter_ns() - start
        return outputs

    Program.__call__ = timed
    try:
        yield spent
    finally:
        Program.__call__ = call


def contestants(blocks: int = BLOCKS) -> dict[str, list[str]]:
    """The sites of each number of selectors."""
    branches = [f"blocks.{block}/{branch}" for block in range(blocks) for branch in ("attn", "mlp")]
    return {"1 selector": ["stack"], f"{len(branches)} selectors": branches}


def row(name: str, blocks: int, repeats: int) -> dict[str, Any]:
    """Medians of one number of selectors."""
    torch.manual_seed(0)
    net, sites = Net(blocks).eval().requires_grad_(False), contestants(blocks)[name]
    dcc.compile(net, [0], sample=sample, policy="interval", interval=1, backend="eager")
    subject = dcc.compiled(net).subject
    plan = planned(
        subject,
        sites=sites,
        schedule=[[full] * len(sites) for full in MASK],
        predictors=[Predictor("newton", 2)] * len(sites),
        policy="host overhead",
        parameters={},
    )
    dcc.restore(net)
    dcc.compile(net, [0], sample=sample, plan=plan, backend="eager")
    taken: dict[int, list[float]] = {0: [], 1: []}
    with timed_programs() as spent:

        def seen(step: int, nanoseconds: int) -> None:
            taken[MASK[step]].append((nanoseconds - spent[0]) / 1e6)
            spent[0] = 0

        for _ in range(repeats):
            sample(net, 0, seen)
    counts = dcc.compiled(net).sessions.counts
    assert (counts.missed, counts.forecast) == (0, MASK.count(0) * repeats)
    return {
        "name": name,
        "forecast_ms": statistics.median(taken[0]),
        "full_ms": statistics.median(taken[1]),
        "calls": len(taken[0]) + len(taken[1]),
    }


def looks(repeats: int, blocks: int = BLOCKS) -> dict[str, Any]:
    """The milliseconds of a look, and the share of a generation that a request's two looks take."""
    double, single = (compile_time.DEPTHS | compile_time.TRIAL)[blocks]
    with torch.device("meta"):
        full = FluxTransformer2DModel(num_layers=double, num_single_layers=single).eval()
    small = compile_time.build(blocks)
    start = perf_counter_ns()
    compile_time.sample(small, None)
    generation = (perf_counter_ns() - start) / 1e6
    return {
        "modules": len(list(full.modules())),
        "look_ms": look_ms(full, repeats),
        "share": 2 * look_ms(small, repeats) / generation,
        "steps": compile_time.STEPS,
    }


def look_ms(net: nn.Module, repeats: int) -> float:
    """Median milliseconds of finding out that a module is as it was."""
    mark, taken = Mark(net), []
    for _ in range(repeats):
        start = perf_counter_ns()
        assert mark.holds()
        taken.append((perf_counter_ns() - start) / 1e6)
    return statistics.median(taken)


def main(
    repeats: Annotated[int, typer.Option(help="runs of 12 steps")] = 60,
    blocks: Annotated[int, typer.Option(help="blocks of two branches")] = BLOCKS,
) -> None:
    """Measures, prints and writes the result file."""
    torch.set_num_threads(1)
    rows = [row(name, blocks, repeats) for name in contestants(blocks)]
    for one in rows:
        print(f"{one['name']}: forecast step {one['forecast_ms']:.3f} ms, full step {one['full_ms']:.3f} ms")
    look = looks(repeats, 57 if blocks == BLOCKS else 3)
    print(
        f"a look at {look['modules']} modules: {look['look_ms']:.2f} ms; two looks: {look['share']:.3%} of a generation"
    )
    print(measure.write("host_overhead", {"blocks": blocks, "rows": rows, "look": look}))


if __name__ == "__main__":
    typer.run(main)
