"""Forecast combine: a linear combination of at most J anchors with per-sample coefficients.

Only the reference exists: the passes spell it out in the graph and Inductor fuses it with what follows.
"""

from __future__ import annotations

from torch import Tensor


def reference(coefficients: Tensor, group: int, anchors: list[Tensor], per_sample: bool) -> Tensor:
    """The forecast sum_j c[group, b, j] * anchors[j], accumulated in float32 and cast back.

    Shapes: coefficients [groups, batch, J] float32; each anchor [batch, ...] of one dtype; result like an anchor.
    Where `per_sample` is False the anchors' first dimension is not the batch, and sample 0's coefficients serve all.
    """
    first = anchors[0]
    rows = coefficients[group] if per_sample else coefficients[group][:1]
    total = first.float() * _column(rows, 0, first.dim())
    for age, anchor in enumerate(anchors[1:], start=1):
        total = total + anchor.float() * _column(rows, age, first.dim())
    return total.to(first.dtype)


def _column(rows: Tensor, age: int, dim: int) -> Tensor:
    return rows[:, age].view(-1, *([1] * (dim - 1)))
