"""The grid of image tokens, read off a denoiser's inputs."""

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from dcc.discover.token_grid import _of_positions, token_grid

from . import tiny


def positions(rows, columns, axes=3, start=0):
    """[rows * columns, axes]: zeros, then row and column."""
    grid = torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).reshape(-1, 2) + start
    return torch.cat([torch.zeros(len(grid), axes - 2), grid], dim=1)


def test_positions_count_rows_and_columns():
    assert _of_positions(positions(4, 6), 24) == (4, 6)
    assert _of_positions(positions(6, 4, axes=4, start=3)[None].expand(2, -1, -1), 24) == (6, 4)
    assert _of_positions(positions(4, 6).bfloat16(), 24) == (4, 6)


@pytest.mark.parametrize(
    "tensor",
    [
        positions(4, 6)[torch.randperm(24)],  # not in row order
        positions(4, 6)[:, [0, 2, 1]],  # columns first
        torch.zeros(24, 3),
        torch.randn(2, 24, 4),
        positions(4, 6)[:23],
        torch.zeros(24),
    ],
)
def test_other_inputs_say_nothing(tensor):
    assert _of_positions(tensor, 24) is None


@pytest.mark.parametrize(
    ("inputs", "grid"),
    [
        ([positions(1, 24), positions(4, 6)], (4, 6)),  # as many words as image tokens, in either order
        ([positions(4, 6), positions(1, 24)], (4, 6)),
        ([positions(4, 6), positions(3, 8)], None),
        ([positions(1, 24)], (1, 24)),
        ([positions(4, 6), positions(4, 6, axes=4)], (4, 6)),
    ],
)
def test_as_many_words_as_image_tokens(inputs, grid):
    class Found:
        """Sites of a denoiser whose latent is a row of tokens."""

        call = SimpleNamespace(tensors=inputs)

        def __getitem__(self, name):
            return SimpleNamespace(shapes=((2, 24, 16),))

    assert token_grid(cast("Any", Found()), 24) == grid


@pytest.mark.parametrize(
    ("model", "tokens", "grid"),
    [
        ("flux", 24, (4, 6)),  # from the positions of tokens
        ("flux", 25, None),
        ("sd3", 24, (4, 6)),  # from a latent of 8x12 in patches of 2
        ("sd3", 96, (8, 12)),
        ("sd3", 31, None),
    ],
)
def test_grids_of_real_denoisers(model, tokens, grid):
    assert token_grid(tiny.sites(model), tokens) == grid
