"""Small linear summaries of features, whose inner products estimate those of the features.

A feature of n numbers becomes SIZE numbers: number i is added, with a fixed random sign, to bucket i mod SIZE. Sums of
products of buckets are then unbiased estimates of <a, b>, with a standard deviation of about sqrt(2 / SIZE) |a| |b|.
SIZE is prime so that a channel that is large in every token, or a mean that all tokens share, spreads over all buckets
instead of filling a few; without that, and without a sign of its own for every number, the error of such features (all
that transformers have) is a multiple of this. Features of up to SIZE numbers are kept as they are. The kernel reads a
feature once, in its own dtype; sums of pieces are added in a fixed order.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.functional import pad

from dcc.kernels.base import jit, run_kernel, runs_on, tl

SIZE = 4099
COORDINATES = 1024
SEED = 20251
ROWS = 256  # rows of signs; a larger feature uses them again, rotated
BLOCK = 128  # buckets per program
TILE, PIECE = 8, 64  # rows that a program reads at a time, and in all; both divide ROWS


def reference(values: Tensor, like: Tensor) -> Tensor:
    """Sketches features [v, b, ...] of any dtype; returns [v, samples, min(n, SIZE)] float32 for n numbers per sample.

    `samples` is the first dimension of `like` where that divides b (frames folded into the batch belong to their
    sample), else 1. Linear, seeded, and the same in every process; memory beyond the input does not grow with it.
    """
    flat = per_sample(values, like)
    if flat.shape[-1] <= SIZE:
        return flat.float()
    first, *others = (_fold(part) for part in flat.split(ROWS * SIZE, dim=-1))
    for index, part in enumerate(others, start=1):
        # squares: no two pairs of parts are rotated against each other by the same distance
        first += part.roll(index * index, -1)
    return first


def _fold(flat: Tensor) -> Tensor:
    """The buckets [v, samples, SIZE] of at most ROWS * SIZE numbers per sample."""
    rows = -(-flat.shape[-1] // SIZE)
    padded = pad(flat.float(), (0, rows * SIZE - flat.shape[-1])).unflatten(-1, (rows, SIZE))
    return (padded * signs(flat.device)[:rows]).sum(2)


def coordinates(values: Tensor, like: Tensor) -> Tensor:
    """A fixed subset of at most COORDINATES of the n numbers of each sample, [v, samples, min(n, COORDINATES)] float32.

    `values` and `like` are the same as in `reference`.
    """
    flat = per_sample(values, like)
    if flat.shape[-1] <= COORDINATES:
        return flat.float()
    return flat.index_select(-1, chosen_coordinates(flat.shape[-1], flat.device)).float()


def per_sample(values: Tensor, like: Tensor) -> Tensor:
    """Features [v, b, ...] as [v, samples, n]."""
    samples = like.shape[0] if like.dim() and values.dim() > 1 and values.shape[1] % like.shape[0] == 0 else 1
    return values.reshape(values.shape[0], samples, -1)


@lru_cache(maxsize=4)
def signs(device: torch.device) -> Tensor:
    """Random signs [ROWS, SIZE] float32."""
    table = torch.randint(0, 2, (ROWS, SIZE), generator=torch.Generator().manual_seed(SEED)) * 2 - 1
    return table.to(device, torch.float32)


@lru_cache(maxsize=64)
def chosen_coordinates(size: int, device: torch.device) -> Tensor:
    """Indices of COORDINATES of `size` numbers, with repetitions."""
    return torch.randint(0, size, (COORDINATES,), generator=torch.Generator().manual_seed(SEED)).to(device)


@jit()
def _kernel(
    partial,  # [features, pieces, SIZE]
    flat,  # [features, size]
    signs,  # [ROWS, SIZE] int8
    size,
    pieces,
    SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    PIECE: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    piece, feature = tl.program_id(1), tl.program_id(2).to(tl.int64)
    bucket = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    part = (piece * PIECE // ROWS).to(tl.int64)
    column = (bucket + SIZE - (part * part % SIZE).to(tl.int32)) % SIZE
    total = tl.zeros([TILE, BLOCK], tl.float32)
    for turn in range(PIECE // TILE):
        row = piece * PIECE + turn * TILE + tl.arange(0, TILE)
        place = row.to(tl.int64)[:, None] * SIZE + column[None, :]
        sign = tl.load(signs + (row % ROWS)[:, None] * SIZE + column[None, :]).to(tl.float32)
        total += tl.load(flat + feature * size + place, mask=place < size, other=0).to(tl.float32) * sign
    tl.store(partial + (feature * pieces + piece) * SIZE + bucket, tl.sum(total, 0), mask=bucket < SIZE)


def launch(values: Tensor, like: Tensor) -> Tensor:
    """Runs the kernel; arguments and result are those of `reference`."""
    flat = per_sample(values, like)
    size = flat.shape[-1]
    if size <= SIZE:
        return flat.to(torch.float32, copy=True)
    rows = flat.reshape(-1, size).contiguous()
    pieces = -(-size // (SIZE * PIECE))
    partial = torch.empty(rows.shape[0], pieces, SIZE, dtype=torch.float32, device=flat.device)
    run_kernel(
        _kernel,
        (-(-SIZE // BLOCK), pieces, rows.shape[0]),
        partial,
        rows,
        small_signs(flat.device),
        size,
        pieces,
        SIZE=SIZE,
        ROWS=ROWS,
        PIECE=PIECE,
        TILE=TILE,
        BLOCK=BLOCK,
    )
    return partial.sum(1).view(*flat.shape[:2], SIZE)


@lru_cache(maxsize=4)
def small_signs(device: torch.device) -> Tensor:
    """The signs [ROWS, SIZE] in int8, because the kernel reads one of them per number of the feature."""
    return signs(device).to(torch.int8)


@torch.library.custom_op("dcc::sketch", mutates_args=())
def op(values: Tensor, like: Tensor) -> Tensor:
    """`reference`; on a GPU by the kernel."""
    return launch(values, like) if runs_on(values) else reference(values, like).clone()


@op.register_fake
def _(values: Tensor, like: Tensor) -> Tensor:
    flat = per_sample(values, like)
    return flat.new_empty((*flat.shape[:2], min(flat.shape[2], SIZE)), dtype=torch.float32)
