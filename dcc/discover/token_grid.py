"""The grid of rows and columns that a denoiser's image tokens stand in, read off its inputs."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dcc.discover.sites import Sites
from dcc.errors import SiteError

AXES = 4  # the most axes of an input that gives positions of tokens


def token_grid(sites: Sites, tokens: int) -> tuple[int, int] | None:
    """(rows, columns) of `tokens` image tokens in row order; None where no input of the denoiser tells.

    Either the latent is [batch, C, rows, columns] up to a patch size, or an input [..., tokens, axes] holds whole
    numbers whose last two axes count rows and columns. None where inputs of as many tokens say different grids.
    """
    try:
        latent = sites["latent"].shapes[0]
    except SiteError:  # not exported: nothing inside is known
        return None
    if len(latent) == 4:
        patch = math.isqrt(max(latent[2] * latent[3] // tokens, 1))
        grid = latent[2] // patch, latent[3] // patch
        return grid if math.prod(grid) == tokens else None
    found = {grid for tensor in sites.call.tensors if (grid := _of_positions(tensor, tokens)) is not None}
    planes = {grid for grid in found if min(grid) > 1} or found  # as many words count along one axis only
    return planes.pop() if len(planes) == 1 else None


def _of_positions(tensor: Tensor, tokens: int) -> tuple[int, int] | None:
    """The grid that an input of positions counts through, None for any other input."""
    if tensor.dim() < 2 or tensor.shape[-2] != tokens or not 2 <= tensor.shape[-1] <= AXES:
        return None
    places = tensor.reshape(-1, *tensor.shape[-2:])[0, :, -2:].double().cpu()
    places = places - places.min(0).values
    rows, columns = (int(size) + 1 for size in places.max(0).values.tolist())
    if rows * columns != tokens:
        return None
    counted = torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).reshape(tokens, 2).double()
    return (rows, columns) if torch.equal(places, counted) else None
