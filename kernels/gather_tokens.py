"""Gather of token rows: the chosen tokens of a value, packed for the layers that compute them afresh."""

from __future__ import annotations

import torch
from torch import Tensor

from dcc.kernels.base import check, jit, power_of_2, run_kernel, runs_on, tl
from dcc.kernels.select_tokens import gather as reference

MOST_BLOCK = 1024


@jit()
def _kernel(out, value, index, chosen, width, value_stride, BLOCK: tl.constexpr):
    """Copies tokens of value [samples or 1, tokens, width] to out [samples, chosen, width], one part per program."""
    rank, sample = tl.program_id(0), tl.program_id(2).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    row = sample * chosen + rank
    token = tl.load(index + row).to(tl.int64)
    numbers = tl.load(value + sample * value_stride + token * width + column, mask=column < width)
    tl.store(out + row * width + column, numbers, mask=column < width)


def launch(value: Tensor, index: Tensor) -> Tensor:
    """The chosen tokens [B, k, C...] of a value [B or 1, N, C...] of any dtype, contiguous; index [B, k] int64.

    Indices must be in [0, N), which is not checked. Raises KernelError for shapes that do not fit.
    """
    check(index.dim() == 2 and value.shape[0] in (1, index.shape[0]), "an index of every sample", value, index)
    value, index = value.contiguous(), index.contiguous()
    samples, chosen = index.shape
    out = torch.empty(*index.shape, *value.shape[2:], dtype=value.dtype, device=value.device)
    width = value[0, 0].numel()
    block = power_of_2(width, MOST_BLOCK)
    run_kernel(
        _kernel,
        (chosen, -(-width // block), samples),
        out,
        value,
        index,
        chosen,
        width,
        value.stride(0) if value.shape[0] > 1 else 0,
        BLOCK=block,
    )
    return out


@torch.library.custom_op("dcc::gather_tokens", mutates_args=())
def op(value: Tensor, index: Tensor) -> Tensor:
    """`reference`; on a GPU by the kernel."""
    return launch(value, index) if runs_on(value) else reference(value, index).contiguous()


@op.register_fake
def _(value: Tensor, index: Tensor) -> Tensor:
    return value.new_empty(*index.shape, *value.shape[2:])
