"""Small linear summaries of features, whose inner products estimate those of the features.

A feature of n numbers becomes SIZE numbers: number i is added, with a fixed random sign, to bucket i mod SIZE. Sums of
products of buckets are then unbiased estimates of <a, b>, with a standard deviation of about sqrt(2 / SIZE) |a| |b|.
SIZE is prime so that a channel that is large in every token, or a mean that all tokens share, spreads over all buckets
instead of filling a few; without that, and without a sign of its own for every number, such features (all that
transformers have) cost a multiple of that error. Up to SIZE numbers are kept as they are.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.functional import pad

SIZE = 4099
COORDINATES = 1024
SEED = 20251
ROWS = 256  # of signs; a larger feature uses them again, rotated


def sketch(values: Tensor, like: Tensor) -> Tensor:
    """Sketches features [v, b, ...] of any dtype; returns [v, samples, min(n, SIZE)] float32, n numbers a sample.

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
    """The buckets [v, samples, SIZE] of at most ROWS * SIZE numbers a sample."""
    rows = -(-flat.shape[-1] // SIZE)
    padded = pad(flat.float(), (0, rows * SIZE - flat.shape[-1])).unflatten(-1, (rows, SIZE))
    return (padded * signs(flat.device)[:rows]).sum(2)


def coordinates(values: Tensor, like: Tensor) -> Tensor:
    """A fixed subset of at most COORDINATES of the n numbers of each sample, [v, samples, min(n, COORDINATES)] float32.

    `values` and `like` are those of `sketch`.
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
