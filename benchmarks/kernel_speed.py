"""Every Triton kernel against what Inductor makes of its reference, and against the bandwidth of a copy.

    python benchmarks/kernel_speed.py [--tokens 4608] [--width 3072] [--repeats 100]

Needs a CUDA device. The default sizes are those of a multimodal DiT at 1024x1024 pixels: 4096 image and 512 text
tokens, in bfloat16. Writes benchmarks/results/kernels.json. No time is printed for a kernel whose numbers are wrong.
(Not called kernels.py: scripts here would then hide the package `kernels` from other libraries.)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

import measure
import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor
from triton.testing import do_bench

from dcc.kernels import combine, distance, gather_tokens, merge_tokens, sketch


@dataclass(frozen=True)
class Case:
    """A kernel, its reference, their arguments, and the bytes that must pass through memory."""

    name: str
    launch: Callable[..., Tensor]
    reference: Callable[..., Tensor]
    arguments: tuple[Any, ...]
    moved: int


def cases(tokens: int, width: int, device: str) -> list[Case]:
    """One image, a third of whose tokens are computed afresh."""
    values = torch.randn(5, 1, tokens, width, device=device).bfloat16()
    residual, *anchors = values
    size = residual.nbytes
    gate = torch.randn(1, 1, width, device=device).bfloat16()
    table = torch.randn(8, 1, 4, device=device)
    cluster = torch.randint(0, 8, (width,), device=device)
    index = torch.rand(1, tokens, device=device).topk(tokens // 3, dim=1).indices.sort(dim=1).values
    fresh = gather_tokens.reference(residual, index).contiguous()

    def gated(*arguments: Any) -> Tensor:
        return combine.reference(*arguments[:4], *arguments[5:])

    def fresh_case(count: int) -> Case:
        arguments = (table, 0, anchors[:count], True, index, fresh)
        moved = size + fresh.nbytes + count * (size - fresh.nbytes)
        return Case(f"merge_tokens, {count} anchors", merge_tokens.launch, merge_tokens.reference, arguments, moved)

    return [
        *(
            Case(
                f"combine, {count} anchors, gate, residual",
                combine.launch,
                gated,
                (table, 0, anchors[:count], True, None, gate, residual),
                (count + 2) * size,
            )
            for count in (1, 2, 3)
        ),
        Case(
            "combine, 2 anchors by channel",
            combine.launch,
            combine.by_channel,
            (table, 0, anchors[:2], True, cluster),
            3 * size,
        ),
        *(
            Case(f"distance, {norm}", distance.launch, distance.reference, (residual, anchors[0], norm, 1), 2 * size)
            for norm in distance.NORMS
        ),
        Case("gather_tokens", gather_tokens.launch, gather_tokens.reference, (residual, index), 2 * fresh.nbytes),
        *(fresh_case(count) for count in (1, 3)),
        Case("sketch", sketch.launch, sketch.reference, (residual[None], residual), size),
    ]


def error(case: Case) -> float:
    """Relative L2 distance of the kernel's result from the reference's."""
    result, expected = (function(*case.arguments).float() for function in (case.launch, case.reference))
    return float((result - expected).norm() / expected.norm())


def time_case(case: Case, repeats: int, copy: float) -> dict[str, Any]:
    """One row; times are medians with a cold cache, `copy` is in bytes per millisecond."""
    compiled = torch.compile(case.reference, dynamic=False)
    compiled(*case.arguments)
    kernel, inductor = (
        do_bench(lambda function=function: function(*case.arguments), rep=repeats, return_mode="median")
        for function in (case.launch, compiled)
    )
    return {
        "case": case.name,
        "error": error(case),
        "kernel_ms": kernel,
        "inductor_ms": inductor,
        "bytes": case.moved,
        "kernel_share_of_copy": case.moved / kernel / copy,
        "inductor_share_of_copy": case.moved / inductor / copy,
    }


def main(
    tokens: int = 4608,
    width: int = 3072,
    repeats: Annotated[int, typer.Option(help="milliseconds to spend on each timing")] = 100,
) -> None:
    """Times every kernel and writes the result file."""
    if not torch.cuda.is_available():
        raise typer.BadParameter("needs a CUDA device: on a CPU the ops run their references, so there is no race")
    torch.manual_seed(0)
    source, target = torch.empty(2, 2**28, dtype=torch.uint8, device="cuda")
    copy = 2 * source.nbytes / do_bench(lambda: target.copy_(source), rep=repeats, return_mode="median")
    table, rows = Table("kernel", "kernel, ms", "Inductor, ms", "kernel, of copy", "Inductor, of copy"), []
    for case in cases(tokens, width, "cuda"):
        row = time_case(case, repeats, copy)
        rows.append(row)
        shown = [f"{row[key]:.3f}" for key in ("kernel_ms", "inductor_ms")]
        shown += [f"{row[key]:.0%}" for key in ("kernel_share_of_copy", "inductor_share_of_copy")]
        table.add_row(case.name, *(["wrong numbers"] if row["error"] > 1e-2 else shown))
    Console().print(table)
    print(measure.write("kernels", {"tokens": tokens, "width": width, "copy_gb_s": copy / 1e6, "rows": rows}))


if __name__ == "__main__":
    typer.run(main)
