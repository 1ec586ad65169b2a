"""distance: every norm by hand, per sample, in low precision, and against zeros."""

import pytest
import torch

from dcc.kernels.distance import reference

VALUE = torch.tensor([[1.0, -2.0], [4.0, 0.0]])
OTHER = torch.tensor([[2.0, -2.0], [1.0, 1.0]])


@pytest.mark.parametrize(
    ("norm", "expected"),
    [("l1", [0.5, 2.0]), ("mse", [0.5, 5.0]), ("rel_l1", [0.25, 2.0]), ("rel_l2", [(1 / 8) ** 0.5, 5**0.5])],
)
def test_by_hand(norm, expected):
    assert reference(VALUE, OTHER, norm, 2).tolist() == pytest.approx(expected)


@pytest.mark.parametrize(("norm", "expected"), [("l1", [1.5, 2.0]), ("mse", [2.5, 8.0]), ("rel_l1", [1, 1])])
def test_against_zeros(norm, expected):
    assert reference(VALUE, None, norm, 2).tolist() == pytest.approx(expected)


def test_samples_of_several_rows_and_equal_values():
    folded = torch.arange(24.0).reshape(6, 2, 2)  # two samples of three frames
    moved = folded + torch.tensor([1.0, 1, 1, 3, 3, 3]).reshape(6, 1, 1)
    assert reference(moved, folded, "l1", 2).tolist() == [1.0, 3.0]
    for norm in ("l1", "mse", "rel_l1", "rel_l2"):
        assert reference(folded, folded, norm, 2).tolist() == [0.0, 0.0]


def test_bfloat16_is_summed_in_float32():
    value = torch.full((1, 4096), 1.0, dtype=torch.bfloat16)
    assert reference(value, value * 2, "l1", 1).item() == 1.0  # a bfloat16 sum would stop at 256
    assert reference(value, value * 0, "rel_l1", 1).isfinite().all()
