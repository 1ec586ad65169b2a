"""Compiles every kernel for GPUs that need not be there; prints a JSON object: what each came to.

    python tests/kernels/ahead_of_time.py

Run by test_base.py in a process of its own, since a process that interprets kernels cannot compile them.
"""

from __future__ import annotations

import json
import os
import re
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)

from triton import compile as build
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from dcc.kernels import combine, distance, gather_tokens, merge_tokens, sketch
from dcc.kernels.base import OPTIONS

ARCHITECTURES = (80, 90)
FORECAST = {
    "out": "*bf16",
    "anchors": ("*bf16",) * 3,
    "coefficients": "*fp32",
    "first": "i32",
    "sample_stride": "i32",
}
COMBINE = FORECAST | {"size": "i32", "row_stride": "i32", "gate_stride": "i32"}
PLAIN = {"of_channel": None, "gate": None, "residual": None, "CHANNELS": 1, "INNER": 1, "BLOCK": combine.BLOCK}
GATED = {"gate": "*bf16", "residual": "*bf16", "CHANNELS": 3072, "INNER": 1, "BLOCK": combine.BLOCK}
PIECES = {"partial": "*fp32", "value": "*bf16", "other": "*bf16", "size": "i32", "rounds": "i32", "pieces": "i32"}
FINISH = {"out": "*fp32", "partial": "*fp32", "size": "i32", "pieces": "i32", "TINY": distance.TINY, "BLOCK": 1024}
GATHER = {"out": "*bf16", "value": "*bf16", "index": "*i64", "chosen": "i32", "width": "i32", "value_stride": "i32"}
MERGE = FORECAST | {"rank_of": "*i32", "fresh": "*bf16", "tokens": "i32", "chosen": "i32", "width": "i32"}
SKETCH = {"partial": "*fp32", "flat": "*bf16", "signs": "*i8", "size": "i32", "pieces": "i32"} | {
    name: getattr(sketch, name) for name in ("SIZE", "ROWS", "PIECE", "TILE", "BLOCK")
}
KERNELS: dict[str, tuple[Any, dict[str, Any]]] = {
    "combine": (combine._kernel, COMBINE | PLAIN),
    "combine of one anchor": (combine._kernel, COMBINE | PLAIN | {"anchors": ("*bf16",)}),
    "combine of eight float32 anchors": (
        combine._kernel,
        COMBINE | PLAIN | {"out": "*fp32", "anchors": ("*fp32",) * 8},
    ),
    "combine, gate and residual": (combine._kernel, COMBINE | GATED | {"of_channel": None}),
    "combine by channel, channels first": (combine._kernel, COMBINE | GATED | {"of_channel": "*i64", "INNER": 4096}),
    "distance, absolute": (distance._sum_pieces, PIECES | {"SQUARED": False, "BLOCK": distance.BLOCK}),
    "distance, squares of the value": (
        distance._sum_pieces,
        PIECES | {"other": None, "SQUARED": True, "BLOCK": distance.BLOCK},
    ),
    "distance, finish": (distance._finish, FINISH | {"SQUARED": False, "RELATIVE": True}),
    "distance, finish rel_l2": (distance._finish, FINISH | {"SQUARED": True, "RELATIVE": True}),
    "gather_tokens": (gather_tokens._kernel, GATHER | {"BLOCK": gather_tokens.MOST_BLOCK}),
    "merge_tokens": (merge_tokens._kernel, MERGE | {"BLOCK": merge_tokens.MOST_BLOCK}),
    "sketch": (sketch._kernel, SKETCH),
}
SIXTEENS = {"size", "width", "value_stride"}  # whole multiples of 16, as channel numbers are; pointers are too


def source(kernel: Any, values: dict[str, Any]) -> ASTSource:
    """The kernel for arguments of these types, and for these constants."""
    signature, constants, attributes = {}, {}, {}
    for place, name in enumerate(kernel.arg_names):
        value = values[name]
        if isinstance(value, (str, tuple)):
            signature[name] = value
            for inner, text in enumerate(value if isinstance(value, tuple) else [value]):
                if text.startswith("*") or name in SIXTEENS:
                    path = (place, inner) if isinstance(value, tuple) else (place,)
                    attributes[path] = [["tt.divisibility", 16]]
        else:
            signature[name], constants[(place,)] = "constexpr", value
    return ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)


def facts(compiled: Any) -> dict[str, Any]:
    """Bytes of machine code, and how wide global memory is read, in bytes."""
    ptx = compiled.asm["ptx"]
    reads = re.findall(r"ld\.global(?:\.\w+)*?(?:\.v(\d))?\.b(\d+)", ptx)
    widths = sorted({int(lanes or 1) * int(bits) // 8 for lanes, bits in reads})
    return {"bytes": len(compiled.asm["cubin"]), "reads": widths}


def main() -> None:
    print(
        json.dumps(
            {
                f"{name}, sm_{architecture}": facts(
                    build(source(kernel, values), target=GPUTarget("cuda", architecture, 32), options=OPTIONS)
                )
                for name, (kernel, values) in KERNELS.items()
                for architecture in ARCHITECTURES
            },
            indent=1,
        )
    )


if __name__ == "__main__":
    main()
