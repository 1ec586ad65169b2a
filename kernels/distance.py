"""Distance of a value to a reference, one number per sample: what run-time triggers read.

Only the reference exists: Inductor fuses it with what made the value.
"""

from __future__ import annotations

from torch import Tensor

TINY = 1e-12


def reference(value: Tensor, other: Tensor | None, norm: str, batch: int) -> Tensor:
    """[batch] float32. `value` and `other` are [batch * n, ...]; `other` None stands for zeros.

    With d = value - other, means over all of a sample: rel_l1 is mean|d| / mean|other| (a ratio of means, which near-
    zero entries cannot blow up), l1 mean|d|, mse mean d^2, rel_l2 the ratio of the root mean squares.
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
