"""What compiling costs: every variant of a 4x plan against torch.compile of the uncached denoiser, cold and warm.

    python benchmarks/compile_time.py [--repeats 3]

Every measurement is a process of its own with an empty Inductor cache ("cold") or the one that the cold run left
("warm"). Seconds are those from the built module to its compiled variants: for dcc a recorded run, the capture and the
lowering of all variants, for torch.compile the first call less a second one. Writes
benchmarks/results/compile_time.json.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Annotated, Any

import measure
import torch
import typer
from diffusers import FluxTransformer2DModel
from rich.console import Console
from rich.table import Table

DEPTHS = {12: (4, 8), 24: (8, 16), 57: (19, 38)}  # double and single blocks
TRIAL = {3: (1, 2)}  # to see that the script runs
MASK = [1, 1, 0, 0, 0, 0, 0, 0]  # 4x
STEPS = len(MASK)


def build(blocks: int) -> torch.nn.Module:
    """A multimodal DiT of width 256."""
    torch.manual_seed(0)
    double, single = (DEPTHS | TRIAL)[blocks]
    return (
        FluxTransformer2DModel(
            patch_size=1,
            in_channels=16,
            num_layers=double,
            num_single_layers=single,
            attention_head_dim=32,
            num_attention_heads=8,
            joint_attention_dim=64,
            pooled_projection_dim=64,
            axes_dims_rope=(8, 12, 12),
        )
        .eval()
        .requires_grad_(False)
    )


def inputs() -> dict[str, Any]:
    """256 image and 32 text tokens."""
    draw = torch.Generator().manual_seed(0)
    return {
        "hidden_states": torch.randn(1, 256, 16, generator=draw),
        "encoder_hidden_states": torch.randn(1, 32, 64, generator=draw),
        "pooled_projections": torch.randn(1, 64, generator=draw),
        "timestep": torch.ones(1),
        "img_ids": torch.zeros(256, 3),
        "txt_ids": torch.zeros(32, 3),
        "return_dict": False,
    }


@torch.no_grad()
def sample(net: torch.nn.Module, prompt: Any) -> torch.Tensor:
    """STEPS steps with a fixed rule."""
    values = inputs()
    for step in range(STEPS):
        values["timestep"] = torch.full((1,), 1.0 - step / STEPS)
        values["hidden_states"] = values["hidden_states"] - net(**values)[0] / STEPS
    return values["hidden_states"]


def with_dcc(blocks: int) -> dict[str, Any]:
    """Seconds of dcc.compile, its parts, and what it made."""
    import dcc

    net = build(blocks)
    start = time.perf_counter()
    dcc.compile(net, [0], sample=sample, policy="taylorseer", order=1, steps_mask=MASK, site="stack")
    seconds = time.perf_counter() - start
    compiled = dcc.compiled(net)
    programs = list(compiled.programs.values())
    return {
        "seconds": seconds,
        "captured": compiled.compile_seconds,
        "lowered": sum(p.seconds for p in programs),
        "variants": len(programs),
        "bodies": max(p.bodies for p in programs),
        "problems": [p.problem for p in programs if p.problem],
        "speedup": compiled.plan.speedup,
    }


def with_torch(blocks: int) -> dict[str, Any]:
    """Seconds of the first call of torch.compile, less those of a second one."""
    net = torch.compile(build(blocks), fullgraph=True)
    spent = []
    with torch.no_grad():
        for _ in range(2):
            start = time.perf_counter()
            net(**inputs())
            spent.append(time.perf_counter() - start)
    return {"seconds": spent[0] - spent[1]}


def cache(blocks: int) -> dict[str, Any]:
    """Cache bytes and tensors of a forecast of order 1: every branch, and every block's residual, joined or not."""
    import dcc
    from dcc import passes

    net, found, whole = build(blocks), {}, passes.PASSES
    for site, joined in (("branches", True), ("blocks", False), ("blocks", True)):
        passes.PASSES = tuple(p for p in whole if joined or p.name != "coalesce_forecasts")
        dcc.compile(net, [0], sample=sample, policy="taylorseer", order=1, steps_mask=MASK, site=site, backend="eager")
        passes.PASSES = whole
        compiled = dcc.compiled(net)
        dcc.restore(net)
        (sites,) = compiled.families[0].selectors
        tensors = compiled.plan.anchors * sum(len(one.ports) for one in sites)
        found[site if joined else f"{site}, apart"] = {"bytes": compiled.plan.cache_bytes, "tensors": tensors}
    return found


def child(which: str, blocks: int, folder: str) -> dict[str, Any]:
    """One measurement in a process of its own, with Inductor's cache in `folder`."""
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": folder}
    command = [sys.executable, "-W", "ignore", __file__, "--child", f"{which}:{blocks}"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def measured(repeats: int) -> list[dict[str, Any]]:
    """Cold and warm runs of torch.compile and of dcc at every depth, in turns."""
    kinds = [("torch", 24), *(("dcc", blocks) for blocks in DEPTHS)]
    rows = [{"which": which, "blocks": blocks, "cold": [], "warm": []} for which, blocks in kinds]
    for _ in range(repeats):
        for row in rows:
            with tempfile.TemporaryDirectory() as folder:
                for kind in ("cold", "warm"):
                    row[kind].append(child(row["which"], row["blocks"], folder))
    for row in rows:
        row |= {f"{kind}_s": statistics.median(run["seconds"] for run in row[kind]) for kind in ("cold", "warm")}
    return rows


def main(
    repeats: Annotated[int, typer.Option(help="processes of each kind")] = 3,
    child_: Annotated[str, typer.Option("--child", hidden=True)] = "",
) -> None:
    """Measures and writes the result file."""
    if child_:
        which, blocks = child_.split(":")
        print(json.dumps({"dcc": with_dcc, "torch": with_torch, "cache": cache}[which](int(blocks))))
        return
    rows = measured(repeats)
    base = rows[0]["cold_s"]
    table = Table("what", "blocks", "cold", "of torch.compile", "warm", "of cold torch.compile")
    for row in rows:
        named = "torch.compile, uncached" if row["which"] == "torch" else "dcc, every variant"
        share = [f"{row[kind] / base:.2f}" if row["blocks"] == 24 else "" for kind in ("cold_s", "warm_s")]
        table.add_row(named, str(row["blocks"]), f"{row['cold_s']:.1f} s", share[0], f"{row['warm_s']:.1f} s", share[1])
    Console().print(table)
    kept = child("cache", 57, tempfile.gettempdir())
    print(measure.write("compile_time", {"repeats": repeats, "rows": rows, "cache": kept}))


if __name__ == "__main__":
    typer.run(main)
