"""Forecast combine: a linear combination of at most J anchors with per-sample coefficients.

Only the references exist: the passes spell the plain one out in the graph, and Inductor fuses it with what follows.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor


def reference(coefficients: Tensor, row: int, anchors: list[Tensor], per_sample: bool) -> Tensor:
    """The forecast sum_j c[row, b, j] * anchors[j], accumulated in float32 and cast back.

    Shapes: coefficients [rows, batch, J] float32; each anchor [batch, ...] of one dtype; result like an anchor.
    Where `per_sample` is False the anchors' first dimension is not the batch, and sample 0's coefficients serve all.
    """
    weights = coefficients[row] if per_sample else coefficients[row][:1]
    return _total(anchors, lambda age: weights[:, age].view(-1, *([1] * (anchors[0].dim() - 1))))


def by_channel(coefficients: Tensor, row: int, anchors: list[Tensor], per_sample: bool, of_channel: Tensor) -> Tensor:
    """The same, but channel c has coefficient row `row + of_channel[c]`; of_channel [C] int64."""
    dim = anchors[0].dim()
    weights = coefficients[row:] if per_sample else coefficients[row:, :1]
    weights = weights.index_select(0, of_channel).permute(2, 1, 0)  # [J, batch, C]
    shape = [1] * dim
    shape[0], shape[channel_dim(dim)] = weights.shape[1:]
    return _total(anchors, lambda age: weights[age].view(shape))


def channel_dim(dim: int) -> int:
    """Where values of `dim` dimensions have their channels: second in images and videos, else last."""
    return dim - 1 if dim <= 3 else 1


def _total(anchors: list[Tensor], weight: Callable[[int], Tensor]) -> Tensor:
    total = anchors[0].float() * weight(0)
    for age, anchor in enumerate(anchors[1:], start=1):
        total = total + anchor.float() * weight(age)
    return total.to(anchors[0].dtype)
