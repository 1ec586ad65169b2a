"""band_split: both bands make the whole, what is low and what is high, and the published masks."""

import numpy as np
import pytest
import torch

from dcc.errors import PlanError
from dcc.kernels.band_split import fitted, low_pass, reference

CASES = [("dct", (6, 4)), ("dct", None), ("fft", None)]
IDS = ["tokens", "pixels", "sequence"]


def value(transform, grid):
    return torch.randn(2, 3, 6, 5) if (transform, grid) == ("dct", None) else torch.randn(2, 24, 3)


def cosines(size):
    """The orthonormal DCT-II by its definition."""
    k, n = np.mgrid[:size, :size]
    table = np.sqrt(2 / size) * np.cos(np.pi * (2 * n + 1) * k / (2 * size))
    table[0] /= np.sqrt(2)
    return table


@pytest.mark.parametrize(("transform", "grid"), CASES, ids=IDS)
@pytest.mark.parametrize("cutoff", [0.0, 0.1, 0.37, 1.0])
def test_bands_of_one_value_make_it_whole(transform, grid, cutoff):
    x = value(transform, grid)
    assert torch.equal(reference(x, x, transform, cutoff, grid), x)
    low = low_pass(x, transform, cutoff, grid)
    torch.testing.assert_close(low_pass(low, transform, cutoff, grid), low)  # a projection
    assert low_pass(x - low, transform, cutoff, grid).abs().max() < 1e-5


@pytest.mark.parametrize(("transform", "grid"), CASES, ids=IDS)
def test_what_is_low_and_what_is_high(transform, grid):
    x = value(transform, grid)
    constant = torch.ones_like(x) * 3
    torch.testing.assert_close(low_pass(constant, transform, 0.0, grid), constant)
    torch.testing.assert_close(low_pass(x, transform, 1.0, grid), x)
    if transform == "fft":
        fast = (torch.arange(24) % 2 * 2.0 - 1)[None, :, None].expand_as(x)
    else:
        rows, columns = grid or x.shape[2:]
        board = (torch.arange(rows)[:, None] + torch.arange(columns)) % 2 * 2.0 - 1
        fast = board.flatten()[None, :, None].expand_as(x) if grid else board.expand_as(x)
    assert low_pass(fast, transform, 0.1, grid).abs().max() < 0.1
    mixed = reference(constant, constant + fast, transform, 0.1, grid)
    torch.testing.assert_close(mixed, constant + fast, atol=0.1, rtol=0)


@pytest.mark.parametrize("tokens", [24, 25])
@pytest.mark.parametrize("cutoff", [0.1, 0.3, 0.5])
def test_fft_keeps_the_published_frequencies(tokens, cutoff):
    x = torch.randn(2, tokens, 3)
    frequencies = np.abs(np.fft.fftfreq(tokens))
    spectrum = np.fft.fft(x.double().numpy(), axis=1) * (frequencies <= cutoff * frequencies.max() + 1e-12)[:, None]
    expected = torch.from_numpy(np.fft.ifft(spectrum, axis=1).real).float()
    torch.testing.assert_close(low_pass(x, "fft", cutoff, None), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("cutoff", [0.1, 0.3, 0.5])
def test_dct_keeps_the_published_radius(cutoff):
    x = torch.randn(2, 3, 6, 5)
    down, across = cosines(6), cosines(5)
    radius = np.hypot(*np.mgrid[:6, :5])
    spectrum = (down @ x.double().numpy() @ across.T) * (radius <= cutoff * radius.max())
    expected = torch.from_numpy(down.T @ spectrum @ across).float()
    torch.testing.assert_close(low_pass(x, "dct", cutoff, None), expected, atol=1e-5, rtol=0)
    tokens = low_pass(x.flatten(2).transpose(1, 2), "dct", cutoff, (6, 5))
    torch.testing.assert_close(tokens, expected.flatten(2).transpose(1, 2), atol=1e-5, rtol=0)


def test_low_precision_is_transformed_in_float32():
    x = (torch.randn(1, 64, 2) + 100).to(torch.bfloat16)
    low = low_pass(x, "dct", 0.2, (8, 8))
    assert low.dtype == torch.bfloat16
    assert torch.equal(low, low_pass(x.float(), "dct", 0.2, (8, 8)).to(torch.bfloat16))


def test_tokens_that_do_not_fill_the_grid_are_refused():
    with pytest.raises(PlanError, match="25 tokens do not fill the grid 6x4"):
        low_pass(torch.randn(1, 25, 3), "dct", 0.1, (6, 4))
    with pytest.raises(PlanError, match="of no known size"):
        low_pass(torch.randn(1, 24, 3), "dct", 0.1, None)


def test_a_grid_keeps_its_aspect_at_another_resolution():
    assert fitted((6, 4), 24) == (6, 4)
    assert fitted((6, 4), 96) == (12, 8)
    assert fitted((6, 4), 6) == (3, 2)
    with pytest.raises(PlanError, match="48 tokens"):
        fitted((6, 4), 48)
