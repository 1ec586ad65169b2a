"""Distance of a value to a reference, one number per sample: what run-time triggers read.

Inductor fuses the reference with what made the value. The kernel reads both values once and keeps nothing: partial
sums of fixed pieces, then their sum in a fixed order, so that equal values give equal numbers on every run.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dcc.errors import KernelError
from dcc.kernels.base import check, in_order, jit, power_of_2, run_kernel, runs_on, tl

TINY = 1e-12
NORMS = ("rel_l1", "l1", "mse", "rel_l2")
BLOCK = 2048
MOST_PIECES = 1024  # per sample


def reference(value: Tensor, other: Tensor | None, norm: str, batch: int) -> Tensor:
    """Distances [batch] float32 of `value` to `other`, both [batch * n, ...]; `other` None stands for zeros.

    With d = value - other and means over all numbers of a sample: rel_l1 is mean|d| / mean|other| (a ratio of means,
    which entries near zero cannot blow up), l1 is mean|d|, mse is mean d^2, and rel_l2 is the ratio of the root mean
    squares. Relative norms against zeros are relative to the value itself.
    """
    rows = value.float().reshape(batch, -1)
    base = None if other is None else other.float().reshape(batch, -1)
    moved = rows if base is None else rows - base
    if norm == "l1":
        return moved.abs().mean(1)
    if norm == "mse":
        return moved.square().mean(1)
    scale = rows if base is None else base
    if norm == "rel_l1":
        return moved.abs().mean(1) / scale.abs().mean(1).clamp_min(TINY)
    return (moved.square().mean(1) / scale.square().mean(1).clamp_min(TINY**2)).sqrt()


@jit()
def _sum_pieces(partial, value, other, size, rounds, pieces, SQUARED: tl.constexpr, BLOCK: tl.constexpr):
    """Writes to partial [batch, 2, pieces] the sums of the differences and of what they are relative to."""
    piece, sample = tl.program_id(0), tl.program_id(1).to(tl.int64)
    moved = tl.zeros([BLOCK], tl.float32)
    scale = tl.zeros([BLOCK], tl.float32)
    for turn in range(rounds):
        start = (piece.to(tl.int64) * rounds + turn) * BLOCK
        lane = tl.arange(0, BLOCK)
        mask = lane < size - start
        place = sample * size + start + lane
        base = tl.load(value + place, mask=mask, other=0).to(tl.float32)
        change = base
        if other is not None:
            base = tl.load(other + place, mask=mask, other=0).to(tl.float32)
            change -= base
        moved += change * change if SQUARED else tl.abs(change)
        scale += base * base if SQUARED else tl.abs(base)
    tl.store(partial + sample * 2 * pieces + piece, tl.sum(moved, 0))
    tl.store(partial + (sample * 2 + 1) * pieces + piece, tl.sum(scale, 0))


@jit()
def _finish(
    out, partial, size, pieces, SQUARED: tl.constexpr, RELATIVE: tl.constexpr, TINY: tl.constexpr, BLOCK: tl.constexpr
):
    sample = tl.program_id(0)
    lane = tl.arange(0, BLOCK)
    sums = partial + sample * 2 * pieces + lane
    result = tl.sum(tl.load(sums, mask=lane < pieces, other=0), 0) / size
    if RELATIVE:
        scale = tl.sum(tl.load(sums + pieces, mask=lane < pieces, other=0), 0) / size
        result /= tl.maximum(scale, TINY * TINY if SQUARED else TINY)
        if SQUARED:
            result = tl.sqrt(result)
    tl.store(out + sample, result)


def launch(value: Tensor, other: Tensor | None, norm: str, batch: int) -> Tensor:
    """Runs the kernels; arguments and result are those of `reference`.

    Raises KernelError for shapes that differ, for a batch that does not divide them and for an unknown norm.
    """
    if norm not in NORMS:
        raise KernelError(f"norm {norm!r} is none of {', '.join(NORMS)}")
    values = in_order([value] if other is None else [value, other])
    check(value.shape[0] % batch == 0, f"a multiple of {batch} in the first dimension", value)
    size = value.numel() // batch
    rounds = max(-(-size // (BLOCK * MOST_PIECES)), 1)
    pieces = -(-size // (BLOCK * rounds))
    squared = norm in ("mse", "rel_l2")
    partial = torch.empty(batch, 2, pieces, dtype=torch.float32, device=value.device)
    out = torch.empty(batch, dtype=torch.float32, device=value.device)
    run_kernel(
        _sum_pieces,
        (pieces, batch),
        partial,
        values[0],
        None if other is None else values[1],
        size,
        rounds,
        pieces,
        SQUARED=squared,
        BLOCK=BLOCK,
    )
    run_kernel(
        _finish,
        (batch,),
        out,
        partial,
        size,
        pieces,
        SQUARED=squared,
        RELATIVE=norm.startswith("rel"),
        TINY=TINY,
        BLOCK=power_of_2(pieces, MOST_PIECES),
    )
    return out


@torch.library.custom_op("dcc::distance", mutates_args=())
def op(value: Tensor, other: Tensor | None, norm: str, batch: int) -> Tensor:
    """`reference`; on a GPU by the kernels."""
    return (launch if runs_on(value) else reference)(value, other, norm, batch)


@op.register_fake
def _(value: Tensor, other: Tensor | None, norm: str, batch: int) -> Tensor:
    return value.new_empty(batch, dtype=torch.float32)
