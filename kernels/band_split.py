"""Band split: a forecast whose low and high spatial frequencies come from two combinations of the same anchors.

Only the reference exists. The low-pass filter is a projection onto the kept frequencies, so it is a few matrix products
with small bases, which Inductor lowers with their surroundings; no complex numbers occur. Bases are made of whole
numbers modulo their period, so that float32 holds their angles exactly.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dcc.errors import PlanError

TRANSFORMS = ("dct", "fft")
ROUNDING = 1e-9  # a frequency on the cutoff is kept, whatever rounding does to the product


def reference(low: Tensor, high: Tensor, transform: str, cutoff: float, grid: tuple[int, int] | None) -> Tensor:
    """The low band of the forecast `low` and the high band of the forecast `high`, of one shape and dtype.

    The split is linear, so one filter is enough: high + low_pass(low - high), in float32, cast back at the end.
    """
    difference = low.float() - high.float()
    return (high.float() + low_pass(difference, transform, cutoff, grid)).to(high.dtype)


def low_pass(value: Tensor, transform: str, cutoff: float, grid: tuple[int, int] | None = None) -> Tensor:
    """The low spatial frequencies of `value` [batch, tokens, C] or [batch, C, ..., H, W], in its shape and dtype.

    Computed in float32. "fft": along the tokens, |f| <= cutoff max|f|. "dct": over rows and columns, sqrt(k^2 + l^2) <=
    cutoff times its largest value; tokens stand in rows of a `grid` (rows, columns), pixels need none. Both are
    published (FreqCa, arXiv 2510.08669, repository Tammytcl/FreqCa). Raises PlanError for tokens that the grid does not
    fit.
    """
    x = value.float()
    if transform == "fft":
        basis = fourier_basis(x.shape[1], cutoff, x)
        low = basis.T @ (basis @ x)
    elif x.dim() > 3:
        low = _low_pass_2d(x, cutoff)
    else:
        image = x.transpose(1, 2).unflatten(2, fitted(grid, x.shape[1]))
        low = _low_pass_2d(image, cutoff).flatten(2).transpose(1, 2)
    return low.to(value.dtype)


def fitted(grid: tuple[int, int] | None, tokens: int) -> tuple[int, int]:
    """The grid of this many tokens: the given one, or one of the same aspect at another resolution.

    Raises PlanError where there is none. A grid of another aspect with as many tokens is taken for the given one.
    """
    if grid is not None:
        scale = math.sqrt(tokens / (grid[0] * grid[1]))
        height, width = round(grid[0] * scale), round(grid[1] * scale)
        if height * width == tokens and height * grid[1] == width * grid[0]:
            return height, width
    given = "x".join(map(str, grid)) if grid else "of no known size"
    raise PlanError(
        f"{tokens} tokens do not fill the grid {given} that frequency bands were planned for; compile for this size, "
        'or choose transform="fft", which takes tokens in a line'
    )


def fourier_basis(size: int, cutoff: float, like: Tensor) -> Tensor:
    """Orthonormal real waves [kept, size] of all frequencies up to cutoff * max."""
    kept = math.floor(cutoff * (size // 2) + ROUNDING)
    points = torch.arange(size, device=like.device)
    waves = torch.arange(1, min(kept, (size - 1) // 2) + 1, device=like.device)
    angle = (waves[:, None] * points % size).to(like.dtype) * (2 * math.pi / size)
    ends = [torch.ones_like(angle[:0].sum(0))[None] / math.sqrt(size)]
    if 2 * kept == size:
        ends.append((1 - 2 * (points % 2)).to(like.dtype)[None] / math.sqrt(size))
    return torch.cat([*ends, angle.cos() * math.sqrt(2 / size), angle.sin() * math.sqrt(2 / size)])


def cosine_basis(size: int, kept: int, like: Tensor) -> Tensor:
    """The first `kept` orthonormal vectors [kept, size] of DCT-II."""
    points = torch.arange(size, device=like.device)
    waves = torch.arange(kept, device=like.device)[:, None]
    angle = ((2 * points + 1) * waves % (4 * size)).to(like.dtype) * (math.pi / (2 * size))
    return angle.cos() * torch.where(waves == 0, math.sqrt(1 / size), math.sqrt(2 / size)).to(like.dtype)


def _low_pass_2d(image: Tensor, cutoff: float) -> Tensor:
    """The low frequencies of an image: DCT-II over its last two dimensions, masked by radius, and back."""
    height, width = image.shape[-2:]
    reach = cutoff * math.hypot(height - 1, width - 1) + ROUNDING
    down = cosine_basis(height, min(height, math.floor(reach) + 1), image)
    across = cosine_basis(width, min(width, math.floor(reach) + 1), image)
    squares = [torch.arange(len(basis), device=image.device) ** 2 for basis in (down, across)]
    mask = squares[0][:, None] + squares[1] <= reach**2
    return down.T @ (down @ image @ across.T * mask) @ across
