"""Forecast combine: a linear combination of at most 8 anchors with per-sample or per-channel coefficients.

The passes spell the plain form out in the graph, and Inductor fuses it with what follows. The kernel adds a gate and a
residual, so that a forecast branch enters its residual stream in one pass over memory. It sums in float32 and casts
once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dcc.kernels.base import check, in_order, jit, memory_format, run_kernel, runs_on, tl

MOST = 8
BLOCK = 1024


def reference(
    coefficients: Tensor,
    row: int,
    anchors: list[Tensor],
    per_sample: bool,
    gate: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """The forecast residual + gate * sum_j c[row, b, j] * anchors[j], accumulated in float32 and cast back.

    Shapes: coefficients [rows, batch, J] float32; each anchor [batch, ...] of one dtype; result like an anchor.
    Where `per_sample` is False the anchors' first dimension is not the batch, and sample 0's coefficients serve all.
    gate: [batch or 1, 1, C] or [batch or 1, C, 1, 1], one number per channel; residual: shaped like an anchor.
    """
    weights = coefficients[row] if per_sample else coefficients[row][:1]
    sizes = [-1] + [1] * (anchors[0].dim() - 1) if anchors[0].dim() else []
    return _total(anchors, lambda age: weights[:, age].view(sizes), gate, residual)


def by_channel(
    coefficients: Tensor,
    row: int,
    anchors: list[Tensor],
    per_sample: bool,
    of_channel: Tensor,
    gate: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """The forecast of `reference`, but channel c has coefficient row `row + of_channel[c]`; of_channel [C] int64."""
    dim = anchors[0].dim()
    weights = coefficients[row:] if per_sample else coefficients[row:, :1]
    weights = weights.index_select(0, of_channel).permute(2, 1, 0)  # [J, batch, C]
    shape = [1] * dim
    shape[0], shape[channel_dim(dim)] = weights.shape[1:]
    return _total(anchors, lambda age: weights[age].view(shape), gate, residual)


def channel_dim(dim: int) -> int:
    """Where values of `dim` dimensions have their channels: second in images and videos, else last."""
    return dim - 1 if dim <= 3 else 1


def _total(
    anchors: list[Tensor], weight: Callable[[int], Tensor], gate: Tensor | None, residual: Tensor | None
) -> Tensor:
    wide = torch.complex64 if anchors[0].is_complex() else torch.float32
    total = anchors[0].to(wide) * weight(0)
    for age, anchor in enumerate(anchors[1:], start=1):
        total = total + anchor.to(wide) * weight(age)
    if gate is not None:
        total = total * gate.float()
    if residual is not None:
        total = total + residual.to(wide)
    return total.to(anchors[0].dtype)


@jit(do_not_specialize=["first"])
def _kernel(
    out,  # [samples, size], like every anchor and the residual
    anchors,
    coefficients,  # float32, row by row
    of_channel,  # [CHANNELS] int64, or None
    gate,  # [samples or 1, CHANNELS], or None
    residual,
    first,  # where the coefficients of this row begin
    size,
    row_stride,
    sample_stride,
    gate_stride,
    CHANNELS: tl.constexpr,
    INNER: tl.constexpr,  # how many adjacent numbers share a channel
    BLOCK: tl.constexpr,
):
    sample = tl.program_id(1).to(tl.int64)
    start = tl.program_id(0).to(tl.int64) * BLOCK
    lane = tl.arange(0, BLOCK)
    mask = lane < size - start
    place = sample * size + start + lane
    channel = ((start % (CHANNELS * INNER)).to(tl.int32) + lane) // INNER % CHANNELS
    weights = coefficients + first + sample * sample_stride
    if of_channel is not None:
        weights += tl.load(of_channel + channel) * row_stride
    total = tl.zeros([BLOCK], tl.float32)
    for age in tl.static_range(len(anchors)):  # pyright: ignore[reportGeneralTypeIssues]
        total += tl.load(anchors[age] + place, mask=mask, other=0).to(tl.float32) * tl.load(weights + age)
    if gate is not None:
        total *= tl.load(gate + sample * gate_stride + channel).to(tl.float32)
    if residual is not None:
        total += tl.load(residual + place, mask=mask, other=0).to(tl.float32)
    tl.store(out + place, total.to(out.dtype.element_ty), mask=mask)


def launch(
    coefficients: Tensor,
    row: int,
    anchors: list[Tensor],
    per_sample: bool,
    of_channel: Tensor | None = None,
    gate: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """Runs the kernel; its arguments are those of `reference` and `by_channel`.

    The result has the memory format of the first anchor. Raises KernelError for shapes that do not fit.
    """
    check_anchors(coefficients, anchors, per_sample)
    like = anchors[0]
    shape, dim = like.shape, channel_dim(like.dim())
    channels = shape[dim]
    if of_channel is not None:
        check(of_channel.shape == (channels,), "a row for every channel", of_channel, like)
    if gate is not None:
        one = [1] * len(shape)
        one[0], one[dim] = gate.shape[0], channels
        check(list(gate.shape) == one and gate.shape[0] in (1, shape[0]), "a gate for every channel", gate, like)
    values = in_order([*anchors, *([] if residual is None else [residual])])
    out = torch.empty(values[0].shape, dtype=like.dtype, device=like.device)
    samples = shape[0] if per_sample or (gate is not None and gate.shape[0] > 1) else 1
    size = out.numel() // samples
    inner = 1 if dim == len(shape) - 1 or out.shape != shape else out[0, 0].numel()
    table = coefficients.contiguous()
    by_the_channel = gate is not None or of_channel is not None
    run_kernel(
        _kernel,
        (-(-size // BLOCK), samples),
        out,
        tuple(values[: len(anchors)]),
        table,
        None if of_channel is None else of_channel.contiguous(),
        None if gate is None else gate.reshape(gate.shape[0], channels).contiguous(),
        None if residual is None else values[-1],
        row * table.stride(0),
        size,
        table.stride(0),
        table.stride(1) if per_sample else 0,
        channels if gate is not None and gate.shape[0] > 1 else 0,
        CHANNELS=channels if by_the_channel else 1,
        INNER=inner if by_the_channel else 1,
        BLOCK=BLOCK,
    )
    return out if memory_format(like) is torch.contiguous_format else out.movedim(-1, 1)


def check_anchors(coefficients: Tensor, anchors: list[Tensor], per_sample: bool) -> None:
    """Raises KernelError unless these are 1 to 8 anchors of one shape and dtype, with coefficients for all of them."""
    most = min(MOST, coefficients.shape[-1])
    check(1 <= len(anchors) <= most, f"1 to {most} anchors", *anchors)
    alike = {(anchor.shape, anchor.dtype) for anchor in anchors}
    check(len(alike) == 1, "anchors of one shape and dtype", *anchors)
    check(not per_sample or coefficients.shape[1] == anchors[0].shape[0], "a row per sample", coefficients, *anchors)


@torch.library.custom_op("dcc::combine", mutates_args=())
def op(
    coefficients: Tensor,
    row: int,
    anchors: list[Tensor],
    per_sample: bool,
    of_channel: Tensor | None = None,
    gate: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """`reference`, or `by_channel` where there is `of_channel`; on a GPU by the kernel."""
    if runs_on(anchors[0]):
        return launch(coefficients, row, anchors, per_sample, of_channel, gate, residual)
    plain = (coefficients, row, anchors, per_sample)
    if of_channel is None:
        result = reference(*plain, gate, residual)
    else:
        result = by_channel(*plain, of_channel, gate, residual)
    return result.contiguous(memory_format=memory_format(anchors[0]))


@op.register_fake
def _(coefficients: Tensor, row: int, anchors: list[Tensor], *_: Any, **__: Any) -> Tensor:
    return torch.empty_like(anchors[0], memory_format=memory_format(anchors[0]))
