"""Merge of token rows: a forecast whose chosen tokens are fresh. The forecast of chosen tokens is never computed."""

from __future__ import annotations

import torch
from torch import Tensor

from dcc.kernels import combine
from dcc.kernels.base import check, jit, power_of_2, run_kernel, runs_on, tl
from dcc.kernels.select_tokens import scatter

MOST_BLOCK = 1024


def reference(
    coefficients: Tensor, row: int, anchors: list[Tensor], per_sample: bool, index: Tensor, fresh: Tensor
) -> Tensor:
    """combine.reference over anchors [B, N, C...], with tokens `index` [B, k] int64 replaced by `fresh` [B, k, C...].

    The result has the anchors' dtype. A token that is named twice gets one of its fresh values.
    """
    return scatter(combine.reference(coefficients, row, anchors, per_sample), index, fresh)


@jit(do_not_specialize=["first"])
def _kernel(
    out,  # [samples, tokens, width], like every anchor
    anchors,
    coefficients,
    rank_of,  # [samples, tokens] int32: the token's row in `fresh`, or -1
    fresh,  # [samples, chosen, width]
    first,  # where the coefficients of this row begin
    tokens,
    chosen,
    width,
    sample_stride,
    BLOCK: tl.constexpr,
):
    token, sample = tl.program_id(0), tl.program_id(2).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < width
    row = sample * tokens + token
    place = row * width + column
    rank = tl.load(rank_of + row)
    if rank >= 0:
        numbers = tl.load(fresh + (sample * chosen + rank) * width + column, mask=mask, other=0)
        tl.store(out + place, numbers.to(out.dtype.element_ty), mask=mask)
    else:
        weights = coefficients + first + sample * sample_stride
        total = tl.zeros([BLOCK], tl.float32)
        for age in tl.static_range(len(anchors)):  # pyright: ignore[reportGeneralTypeIssues]
            total += tl.load(anchors[age] + place, mask=mask, other=0).to(tl.float32) * tl.load(weights + age)
        tl.store(out + place, total.to(out.dtype.element_ty), mask=mask)


def launch(
    coefficients: Tensor, row: int, anchors: list[Tensor], per_sample: bool, index: Tensor, fresh: Tensor
) -> Tensor:
    """Runs the kernel; its arguments are those of `reference`, its result is contiguous.

    Indices must be in [0, N), which is not checked. Raises KernelError for shapes that do not fit.
    """
    combine.check_anchors(coefficients, anchors, per_sample)
    shape = anchors[0].shape
    check(index.dim() == 2 and index.shape[0] == shape[0], "an index of every sample", index, anchors[0])
    check(fresh.shape == (*index.shape, *shape[2:]), "a fresh row for every index", fresh, index, anchors[0])
    samples, tokens, chosen = shape[0], shape[1], index.shape[1]
    ranks = torch.arange(chosen, dtype=torch.int32, device=index.device).expand(samples, chosen)
    rank_of = torch.full((samples, tokens), -1, dtype=torch.int32, device=index.device).scatter(1, index, ranks)
    table = coefficients.contiguous()
    out = torch.empty(shape, dtype=anchors[0].dtype, device=anchors[0].device)
    width = out[0, 0].numel()
    block = power_of_2(width, MOST_BLOCK)
    run_kernel(
        _kernel,
        (tokens, -(-width // block), samples),
        out,
        tuple(anchor.contiguous() for anchor in anchors),
        table,
        rank_of,
        fresh.contiguous(),
        row * table.stride(0),
        tokens,
        chosen,
        width,
        table.stride(1) if per_sample else 0,
        BLOCK=block,
    )
    return out


@torch.library.custom_op("dcc::merge_tokens", mutates_args=())
def op(coefficients: Tensor, row: int, anchors: list[Tensor], per_sample: bool, index: Tensor, fresh: Tensor) -> Tensor:
    """`reference`; on a GPU by the kernel."""
    if runs_on(anchors[0]):
        return launch(coefficients, row, anchors, per_sample, index, fresh)
    return reference(coefficients, row, anchors, per_sample, index, fresh).contiguous()


@op.register_fake
def _(coefficients: Tensor, row: int, anchors: list[Tensor], per_sample: bool, index: Tensor, fresh: Tensor) -> Tensor:
    return anchors[0].new_empty(anchors[0].shape)
